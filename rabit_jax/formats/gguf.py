"""GGUF files of llama.cpp as model folders: the config and the names of the tensors.

A GGUF file becomes a small folder in a cache: config.json, generation_config.json, the tokenizer,
and a link to the file itself, whose tensors are read from where they are. Everything that takes a
model folder therefore takes a GGUF file.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np

from rabit_jax.atomic import replacing, write_text
from rabit_jax.errors import BadInput
from rabit_jax.formats.gguf_file import GGUFFile, GGUFTensor, first_part, read_gguf
from rabit_jax.formats.gguf_tokenizer import end_ids, read_tokenizer, token_id
from rabit_jax.types import Json
from rabit_jax.workspaces import shortened, user_cache

LINK = "model.gguf"
VERSION = 3  # of what is written into the folder; a new one makes new folders
EDGE = 1 << 20

# model_type of Hugging Face for each architecture that our decoder covers
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}

SIZES = {
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
}
# Fields of an architecture that are read below, or change nothing in a decoder.
_KNOWN = frozenset(SIZES) | {
    "vocab_size", "attention.layer_norm_rms_epsilon", "attention.value_length",
    "attention.sliding_window", "attention.causal", "rope.freq_base", "rope.freq_base_swa",
    "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length", "rope.scaling.finetuned", "rope.scale_linear",
    "final_logit_softcapping", "tensor_data_layout", "expert_count", "expert_used_count",
    "attention.sliding_window_pattern",
}

MODULES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA_MODULES = {
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight"}
ROPE_FREQUENCIES = "rope_freqs.weight"

# Parameters of Llama 3's rotary scaling that all published models share; the factor differs.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192}


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that a path names: itself, or the only one in a folder without config.json; of
    a split model the first part.

    Raises:
      BadInput: a folder with several of them, or a part without the first one.
    """
    if path.is_file() and path.suffix == ".gguf":
        return first_part(path)
    if not path.is_dir() or (path / "config.json").exists():
        return None
    files = sorted({first_part(file) for file in path.glob("*.gguf")})
    if len(files) > 1:
        raise BadInput(f"{path} holds {len(files)} GGUF files ({files[0].name}, {files[1].name} "
                       "...): name one of them")
    return files[0] if files else None


def gguf_folder(path: Path) -> Path:
    """The model folder of a GGUF file, made in a cache the first time.

    The cache is `rabit_jax/gguf` in `$XDG_CACHE_HOME`, or `~/.cache`. The folder is named after the
    file's name, size and first and last MiB, so a changed file gets a new one.

    Raises:
      BadInput: a damaged file, or an architecture, field or tokenizer that is not supported.
    """
    path = Path(os.path.abspath(path))  # links are kept, for parts are found by their names
    cache = user_cache() / "gguf"
    folder = cache / f"{shortened(path.stem)}-{_digest(path)}"
    if (folder / LINK).exists() and (folder / LINK).readlink() == path:
        return folder
    file = read_gguf(path)
    raw = hf_config(file)
    tokenizer = read_tokenizer(file.fields, architecture(file))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with replacing(folder) as new:
            new.mkdir()
            ids = {name: raw[name] for name in ("bos_token_id", "eos_token_id")}
            for name, content in {"config.json": raw, "generation_config.json": ids}.items():
                write_text(new / name, json.dumps(content, indent=2) + "\n")
            tokenizer.save_pretrained(str(new))
            if isinstance(licence := file.fields.get("general.license"), str):
                write_text(new / "README.md", f"---\nlicense: {json.dumps(licence)}\n---\n")
            (new / LINK).symlink_to(path)
    except OSError as error:
        raise BadInput(f"cannot write the folder of {path} in the cache {cache} ({error}): free "
                       "space there or set XDG_CACHE_HOME") from error
    return folder


def architecture(file: GGUFFile) -> str:
    """The architecture of a file, one of `ARCHITECTURES`.

    Raises:
      BadInput: any other.
    """
    name = file.fields.get("general.architecture")
    if name not in ARCHITECTURES:
        raise BadInput(f"unsupported GGUF architecture {name!r} of {file.path}, supported are "
                       f"{', '.join(ARCHITECTURES)}")
    return name


def hf_config(file: GGUFFile) -> Json:
    """The `config.json` that the metadata of a GGUF file describe; products run in float32.

    Raises:
      BadInput: an unsupported architecture or a field whose effect is not implemented (the message
        begins with `unsupported`), or a missing one.
    """
    name, fields = architecture(file), file.fields
    own = {key.removeprefix(f"{name}."): value for key, value in fields.items()
           if key.startswith(f"{name}.")}
    _refuse(name, own, file)
    raw: Json = {"model_type": ARCHITECTURES[name], "torch_dtype": "float32"}
    heads = own["attention.head_count"]
    # What is missing is what llama.cpp takes, which transformers does not.
    raw |= {"num_key_value_heads": heads, "head_dim": own["embedding_length"] // max(1, heads)}
    raw |= {hf: own[key] for key, hf in SIZES.items() if key in own}
    raw["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    raw["rms_norm_eps"] = _decimal(own["attention.layer_norm_rms_epsilon"])
    raw["rope_theta"] = _decimal(own.get("rope.freq_base", 10000.0))
    raw["rope_scaling"] = _rope_scaling(own, file)
    raw["tie_word_embeddings"] = "output.weight" not in file.tensors
    raw["bos_token_id"] = token_id(fields, "bos")
    raw["eos_token_id"] = end_ids(fields)
    if name in ("llama", "qwen3"):
        raw["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if name == "llama":
        raw["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    if name == "gemma3":
        raw |= _gemma3(raw, own)
    return raw


def hf_tensors(file: GGUFFile) -> dict[str, GGUFTensor]:
    """The tensors of a file by Hugging Face's names, as Hugging Face stores them.

    llama.cpp stores the rows of a Llama's q and k in the order of its rotary pairs, and the scales
    of Gemma's norms with 1 added; both are undone.

    Raises:
      BadInput: an unsupported architecture, or a tensor whose name is not known.
    """
    name = architecture(file)
    modules = MODULES | (GEMMA_MODULES if name == "gemma3" else {})
    heads = {"attn_q": file.fields[f"{name}.attention.head_count"]}
    heads["attn_k"] = file.fields.get(f"{name}.attention.head_count_kv", heads["attn_q"])
    found: dict[str, GGUFTensor] = {}
    for tensor in file.tensors.values():
        if tensor.name == ROPE_FREQUENCIES:
            continue
        part = tensor.name.split(".")
        if tensor.name in TOP:
            renamed = TOP[tensor.name]
        elif len(part) == 4 and part[0] == "blk" and part[2] in modules:
            renamed = f"model.layers.{part[1]}.{modules[part[2]]}.{part[3]}"
        else:
            raise BadInput(f"unsupported {tensor.label}: the {name} models known here have no "
                           "tensor of that name")
        if name == "llama" and part[-2] in heads:
            if tensor.shape[0] % (2 * heads[part[-2]]):
                raise BadInput(f"{tensor.label} has {tensor.shape[0]} rows for {heads[part[-2]]} "
                               "heads, wanted an even number for each head: take a complete file")
            tensor = tensor._replace(places=half_split_rows(tensor.shape[0], heads[part[-2]]))
        elif name == "gemma3" and renamed.endswith("norm.weight"):
            tensor = tensor._replace(added=1.0)
        found[renamed] = tensor
    return found


def half_split_rows(rows: int, heads: int) -> np.ndarray:
    """Where each row of a llama.cpp q or k belongs: int `[rows]`.

    llama.cpp rotates neighbouring rows 2j and 2j + 1 of a head together, Hugging Face the rows j
    and j + d/2 of its d rows.
    """
    width = rows // heads
    head, row = np.divmod(np.arange(rows), width)
    pair, second = np.divmod(row, 2)
    return head * width + second * (width // 2) + pair


def _gemma3(raw: Json, own: Json) -> Json:
    """What Gemma 3 has beyond the others; llama.cpp has its constants in code."""
    head_dim, layers = raw["head_dim"], raw["num_hidden_layers"]
    window, period = own.get("attention.sliding_window"), own.get(
        "attention.sliding_window_pattern", 6)
    pattern = period if isinstance(period, list) else [
        bool((n + 1) % period) for n in range(layers)]
    pattern = pattern if window else [False] * layers
    # The 27B model alone scales its scores by the width per head.
    scalar = raw["hidden_size"] // raw["num_attention_heads"] if layers == 62 else head_dim
    kinds = ["sliding_attention" if local else "full_attention" for local in pattern]
    return {
        "sliding_window": window or None, "layer_types": kinds,
        "query_pre_attn_scalar": scalar,
        "rope_local_base_freq": _decimal(own.get("rope.freq_base_swa", 10000.0)),
        "final_logit_softcapping": own.get("final_logit_softcapping"),
        "hidden_activation": "gelu_pytorch_tanh",
    }


def _refuse(name: str, own: Json, file: GGUFFile) -> None:
    """Raises for the first field or tensor that is missing or whose effect is not implemented."""
    for key in ("context_length", "embedding_length", "block_count", "feed_forward_length",
                "attention.head_count", "attention.layer_norm_rms_epsilon"):
        if key not in own:
            raise BadInput(f"{file.path} has no {name}.{key}: take a complete GGUF file")
    for key, value in own.items():
        if key not in _KNOWN and value not in (None, False, 0, 0.0, "none"):
            raise BadInput(f"unsupported GGUF field {name}.{key} = {str(value)[:60]} of "
                           f"{file.path}: its effect on the result is not known here")
    for key in SIZES:
        if isinstance(value := own.get(key), list):
            raise BadInput(f"unsupported {name}.{key} = {str(value)[:60]} of {file.path}: all "
                           "layers must have the same sizes")
    head_dim = own.get("attention.key_length",
                       own["embedding_length"] // max(1, own["attention.head_count"]))
    for key in ("rope.dimension_count", "attention.value_length"):
        if own.get(key, head_dim) != head_dim:
            raise BadInput(f"unsupported {name}.{key} = {own[key]} of {file.path}: the decoder "
                           f"wants the head's {head_dim}")
    if own.get("expert_count"):
        raise BadInput(f"unsupported {name}.expert_count = {own['expert_count']} of {file.path}: "
                       "mixtures of experts are not implemented")
    if name != "gemma3" and own.get("attention.sliding_window"):
        raise BadInput(f"unsupported {name}.attention.sliding_window of {file.path}: llama.cpp "
                       f"gives {name} models full attention alone")
    if "token_embd.weight" not in file.tensors:
        raise BadInput(f"missing tensor token_embd.weight in {file.path}")


def _rope_scaling(own: Json, file: GGUFFile) -> Json | None:
    """How rotary frequencies are stretched: by metadata, or by Llama 3's tensor of divisors."""
    kind = own.get("rope.scaling.type", "linear")
    factor = own.get("rope.scaling.factor", own.get("rope.scale_linear", 0))
    stretched = kind != "none" and factor not in (0, 1)
    if stretched and (kind != "linear" or ROPE_FREQUENCIES in file.tensors):
        raise BadInput(f"unsupported rope.scaling.type {kind!r} with factor {factor:g} of "
                       f"{file.path}, supported are linear, and the divisors of "
                       f"{ROPE_FREQUENCIES} without any other")
    if ROPE_FREQUENCIES in file.tensors:
        return _llama3_scaling(_decimal(own.get("rope.freq_base", 10000.0)), file)
    return {"rope_type": "linear", "factor": _decimal(factor)} if stretched else None


def _llama3_scaling(base: float, file: GGUFFile) -> Json:
    """Llama 3's rotary scaling from the divisors of the frequencies `[head_dim / 2]`.

    Raises:
      BadInput: divisors that no factor of the published models gives.
    """
    tensor = file.tensors[ROPE_FREQUENCIES]
    if len(tensor.shape) != 1:
        raise BadInput(f"unsupported {tensor.label}: its shape is {list(tensor.shape)}, wanted one "
                       "divisor for each frequency")
    divisors = np.concatenate([piece for _, piece in tensor.pieces()])
    wavelengths = 2 * np.pi * base ** (np.arange(divisors.size) / divisors.size)
    low, high, trained = LLAMA3_ROPE.values()
    smooth = np.clip((trained / wavelengths - low) / (high - low), 0, 1)
    # 1 / divisor = (1 - smooth) / factor + smooth, solved where the factor counts most.
    slowest = int(np.argmax(divisors))
    with np.errstate(all="ignore"):
        rest = 1 / divisors[slowest] - smooth[slowest]
        factor = _decimal((1 - smooth[slowest]) / rest) if rest > 0 else 1.0
        wanted = 1 / ((1 - smooth) / factor + smooth)
    if not (np.isfinite(wanted).all() and np.allclose(divisors, wanted, rtol=1e-4)):
        raise BadInput(f"unsupported {tensor.label}: its divisors are not those of Llama 3.1 to "
                       "3.3")
    return {"rope_type": "llama3", "factor": factor, **LLAMA3_ROPE}


def _decimal(value: float) -> float:
    """The shortest decimal number of a float32, as config files write it: 1e-05."""
    return float(str(np.float32(value)))


def _digest(path: Path) -> str:
    """16 hex digits of the file's name, size and ends, and of the version of the folder."""
    size = path.stat().st_size
    digest = hashlib.sha256(f"{VERSION} {path} {size}".encode())
    with open(path, "rb") as file:
        digest.update(file.read(EDGE))
        file.seek(max(EDGE, size - EDGE))
        digest.update(file.read(EDGE))
    return digest.hexdigest()[:16]
