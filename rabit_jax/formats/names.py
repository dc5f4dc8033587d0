"""Which Hugging Face tensor holds which of our parameters."""

from __future__ import annotations

from collections.abc import Iterator

from rabit_jax.errors import BadInput

HF_MODULES = {
    "embed": "model.embed_tokens",
    "layers/attn_norm": "model.layers.{}.input_layernorm",
    "layers/attn/q": "model.layers.{}.self_attn.q_proj",
    "layers/attn/k": "model.layers.{}.self_attn.k_proj",
    "layers/attn/v": "model.layers.{}.self_attn.v_proj",
    "layers/attn/o": "model.layers.{}.self_attn.o_proj",
    "layers/mlp_norm": "model.layers.{}.post_attention_layernorm",
    "layers/attn/q_norm": "model.layers.{}.self_attn.q_norm",
    "layers/attn/k_norm": "model.layers.{}.self_attn.k_norm",
    "layers/attn_post_norm": "model.layers.{}.post_attention_layernorm",
    "layers/mlp_pre_norm": "model.layers.{}.pre_feedforward_layernorm",
    "layers/mlp_post_norm": "model.layers.{}.post_feedforward_layernorm",
    "layers/mlp/gate": "model.layers.{}.mlp.gate_proj",
    "layers/mlp/up": "model.layers.{}.mlp.up_proj",
    "layers/mlp/down": "model.layers.{}.mlp.down_proj",
    "final_norm": "model.norm",
    "head": "lm_head",
}


def hf_name(path: str, layer: int | None = None) -> str:
    """The Hugging Face name of one of our paths, of a module or of a tensor.

    Args:
      path: such as `layers/attn/q` or `layers/attn/q/kernel`.
      layer: fills the layer number in; None leaves the `{}` in its place.

    Raises:
      BadInput: a path that the decoder does not have.

    Example:
      >>> hf_name("layers/attn/q/kernel", 3)
      'model.layers.3.self_attn.q_proj.weight'
    """
    module, _, leaf = path.rpartition("/")
    suffix = "" if path in HF_MODULES else (".bias" if leaf == "bias" else ".weight")
    name = HF_MODULES.get(path) or HF_MODULES.get(module)
    if name is None:
        raise BadInput(f"no Hugging Face name for {path!r}, known are {', '.join(HF_MODULES)}")
    return (name if layer is None else name.format(layer)) + suffix


def tensor_names(path: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Hugging Face name and torch shape of each tensor that makes up the parameter at `path`.

    A stacked parameter `[l, ...]` is l tensors; a kernel `[i, o]` is stored as `[o, i]`.
    """
    stacked = path.startswith("layers/")
    inner = shape[1:] if stacked else shape
    for layer in range(shape[0]) if stacked else [None]:
        yield hf_name(path, layer), inner[::-1] if path.endswith("/kernel") else inner
