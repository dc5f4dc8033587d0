"""The decoder's settings, and their translation from and to Hugging Face's `config.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rabit_jax.errors import BadInput

DTYPES = ("float32", "bfloat16", "float16")

# What transformers assumes for a field that the file leaves out, by supported model_type.
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "num_key_value_heads": None},
    "mistral": {
        "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096,
    },
}
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
)
_READ = frozenset(_SIZES) | {
    "model_type", "num_key_value_heads", "head_dim", "rope_theta", "rope_scaling",
    "rope_parameters", "rms_norm_eps", "tie_word_embeddings", "attention_bias", "mlp_bias",
    "initializer_range", "bos_token_id", "eos_token_id", "max_position_embeddings", "dtype",
    "torch_dtype", "hidden_act", "sliding_window", "quantization_config", "layer_types",
    "partial_rotary_factor",
}
# Fields that leave the logits of the decoder as they are.
_HARMLESS = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "architectures",
    "attention_dropout", "attn_implementation", "chunk_size_feed_forward", "do_sample", "id2label",
    "is_llama_config", "label2id", "max_length", "max_sequence_length", "min_length", "num_beams",
    "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type",
    "repetition_penalty", "return_dict", "return_dict_in_generate", "temperature", "top_k",
    "top_p", "torchscript", "transformers.js_config", "transformers_version", "unk_token_id",
    "unsloth_fixed", "unsloth_version", "use_cache",
})
_ROPE_KEYS = frozenset({
    "rope_theta", "rope_type", "type", "factor", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings", "partial_rotary_factor",
})


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies `w_j` are stretched beyond the trained context.

    `linear`: every `w_j / factor`. `llama3`: `w_j / factor` for wavelengths above
    `original_max_position / low_freq_factor`, `w_j` below `original_max_position /
    high_freq_factor`, and a linear blend between.
    """

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes a decoder: sizes, rotary base, biases, precision.

    `dtype` is the dtype of the matrix products; parameters may be stored in another one. `remat`
    recomputes each block in the backward pass instead of keeping its activations.

    Raises:
      BadInput: a size that is not a positive integer, heads that do not divide into groups, an
        odd `head_dim`, or an unknown `dtype`.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_hidden: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tied_head: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    max_position: int = 2048
    dtype: str = "float32"
    remat: bool = False

    def __post_init__(self) -> None:
        for field in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim",
                      "d_hidden", "max_position"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise BadInput(f"model {field} is {value!r}, wanted a positive integer")
        if self.n_heads % self.n_kv_heads:
            raise BadInput(f"model n_heads {self.n_heads} is not a multiple of n_kv_heads "
                           f"{self.n_kv_heads}; choose sizes where it is")
        if self.head_dim % 2:
            raise BadInput(f"model head_dim {self.head_dim} is odd, rotary embedding wants it even")
        if self.dtype not in DTYPES:
            raise BadInput(f"unsupported dtype {self.dtype!r}, wanted one of {', '.join(DTYPES)}")


def from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """The `ModelConfig` that a parsed `config.json` describes.

    Both spellings of today's files are read: `rope_theta` with `rope_scaling`, or transformers 5's
    `rope_parameters`; `torch_dtype` or `dtype`. A missing dtype means float32.

    Raises:
      BadInput: the message begins with `unsupported` and names the model type or field when it
        would change the result and is not implemented; an unknown field counts as such unless its
        value is null or false. Missing or malformed sizes raise it too.
    """
    family = raw.get("model_type")
    if family not in _FAMILIES:
        raise BadInput(f"unsupported model_type {family!r}, supported are {', '.join(_FAMILIES)}")
    full = {**_FAMILIES[family], **raw}
    _refuse(full)
    theta, scaling = _rope(full)
    heads = full["num_attention_heads"]
    return ModelConfig(
        vocab_size=full["vocab_size"], d_model=full["hidden_size"], n_heads=heads,
        n_layers=full["num_hidden_layers"], d_hidden=full["intermediate_size"],
        n_kv_heads=_or(full.get("num_key_value_heads"), heads),
        head_dim=_or(full.get("head_dim"), full["hidden_size"] // heads),
        rope_theta=theta, rope_scaling=scaling, norm_eps=float(full.get("rms_norm_eps", 1e-6)),
        tied_head=bool(full.get("tie_word_embeddings", False)),
        attention_bias=bool(full.get("attention_bias", False)),
        mlp_bias=bool(full.get("mlp_bias", False)),
        initializer_range=float(full.get("initializer_range", 0.02)),
        bos_id=full.get("bos_token_id", 1), eos_ids=token_ids(full.get("eos_token_id", 2)),
        max_position=full["max_position_embeddings"], dtype=_dtype(full),
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` content, as transformers 5 writes it and loads it, of `config`.

    `from_hf(to_hf(config)) == config`, but for `remat`, which is no property of the model.
    """
    eos = list(config.eos_ids)
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": config.vocab_size, "hidden_size": config.d_model,
        "intermediate_size": config.d_hidden, "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads, "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim, "rope_parameters": _rope_to_hf(config),
        "rms_norm_eps": config.norm_eps, "tie_word_embeddings": config.tied_head,
        "attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias,
        "initializer_range": config.initializer_range, "bos_token_id": config.bos_id,
        "eos_token_id": eos[0] if len(eos) == 1 else (eos or None),
        "max_position_embeddings": config.max_position, "dtype": config.dtype,
    }


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """A token id, a list of them or null, as Hugging Face writes `eos_token_id`, as a tuple."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _refuse(raw: Mapping[str, Any]) -> None:
    """Raises for the first field that is missing or whose effect is not implemented."""
    for name in _SIZES:
        if not isinstance(raw.get(name), int) or raw[name] < 1:
            raise BadInput(f"config field {name} is {raw.get(name)!r}, wanted a positive integer")
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise BadInput(f"unsupported hidden_act {raw['hidden_act']!r}, supported is silu")
    window = raw.get("sliding_window")
    if window is not None and window < raw["max_position_embeddings"]:
        raise BadInput(f"unsupported sliding_window {window}, only full attention is supported")
    if set(raw.get("layer_types") or ()) - {"full_attention"}:
        raise BadInput(f"unsupported layer_types {raw['layer_types']}, wanted full_attention only")
    if raw.get("quantization_config"):
        raise BadInput("unsupported quantization_config, load the full-precision model instead")
    for name, value in raw.items():
        if name not in _READ | _HARMLESS and value is not None and value is not False:
            raise BadInput(f"unsupported config field {name} = {value!r}: its effect on the result "
                           "is not known here")


def _dtype(raw: Mapping[str, Any]) -> str:
    name = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    return str(name).removeprefix("torch.")


def _rope(raw: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling, from either spelling."""
    new, old = raw.get("rope_parameters"), raw.get("rope_scaling")
    if new and old and new != old:
        raise BadInput("unsupported config with both rope_parameters and a different rope_scaling")
    rope = {"partial_rotary_factor": raw.get("partial_rotary_factor"), **(new or old or {})}
    for name, value in rope.items():
        if name not in _ROPE_KEYS and value is not None:
            raise BadInput(f"unsupported rotary field {name} = {value!r}")
    if rope["partial_rotary_factor"] not in (None, 1, 1.0):
        raise BadInput(f"unsupported partial_rotary_factor {rope['partial_rotary_factor']}")
    theta = _or(rope.get("rope_theta"), _or(raw.get("rope_theta"), 10000.0))
    return float(theta), _scaling(rope, raw["max_position_embeddings"])


def _scaling(rope: Mapping[str, Any], max_position: int) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise BadInput(f"unsupported rope_type {kind!r}, supported are default, linear, llama3")
    needed = ("factor", "low_freq_factor", "high_freq_factor")[: 1 if kind == "linear" else 3]
    missing = [name for name in needed if rope.get(name) is None]
    if missing:
        raise BadInput(f"rope_type {kind} lacks {', '.join(missing)} in config.json")
    factors = {name: float(rope[name]) for name in needed}
    if kind == "linear":
        return RopeScaling("linear", **factors)
    original = _or(rope.get("original_max_position_embeddings"), max_position)
    return RopeScaling("llama3", **factors, original_max_position=original)


def _rope_to_hf(config: ModelConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    scaling = config.rope_scaling
    if scaling is not None:
        rope |= {"rope_type": scaling.rope_type, "factor": scaling.factor}
    if scaling is not None and scaling.rope_type == "llama3":
        rope |= {"low_freq_factor": scaling.low_freq_factor,
                 "high_freq_factor": scaling.high_freq_factor,
                 "original_max_position_embeddings": scaling.original_max_position}
    return rope
