"""`ModelConfig` from Hugging Face's `config.json` (`from_hf`), and back (`to_hf`)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TypeVar

from rabit_jax.errors import BadInput
from rabit_jax.formats.families import (
    ARCHITECTURES,
    COMMON,
    FAMILIES,
    LANGUAGE_MODELS,
    is_inert,
)
from rabit_jax.formats.hf_fields import OBJECT, ROTARY, check_fields, check_kinds, shown, token_ids
from rabit_jax.models.config import ModelConfig, RopeScaling
from rabit_jax.types import Json

T = TypeVar("T")
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_HF_ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}
# Rotary fields without effect where no frequency is stretched.
_UNSTRETCHED = frozenset({
    "attention_factor", "beta_fast", "beta_slow", "finetuned", "mscale", "mscale_all_dim",
    "truncate",
})
_LAYER_TYPES = ("full_attention", "sliding_attention")


def from_hf(raw: Json) -> ModelConfig:
    """The `ModelConfig` that a parsed `config.json` describes.

    Both spellings of the rotary fields and of the dtype are read: `rope_theta` with `rope_scaling`,
    or `rope_parameters` of transformers 5; `torch_dtype` or `dtype`. A missing dtype means float32.
    Of a multimodal model (`text_config` in the file) the language model is described.

    Raises:
      BadInput: a model type, or a field that changes the result, is not implemented; the message
        begins with `unsupported` and names it. An unknown field counts as one that changes the
        result unless `is_inert` says otherwise. A field that is missing, or that holds what it
        cannot mean, raises it too.
    """
    raw = language_model(raw)
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        known = ", ".join([*FAMILIES, *LANGUAGE_MODELS])
        raise BadInput(f"unsupported model_type {shown(family)}, supported are {known}")
    full = {**COMMON, **FAMILIES[family], **raw}
    _refuse(family, full)
    theta, scaling, local_theta = _rope(family, full)
    window, local = _windows(family, full)
    gemma = family.startswith("gemma")
    heads, size = full["num_attention_heads"], full["hidden_size"]
    biased = family == "qwen2" or bool(full.get("attention_bias"))
    return ModelConfig(
        vocab_size=full["vocab_size"], d_model=size, n_heads=heads,
        n_layers=full["num_hidden_layers"], d_hidden=full["intermediate_size"],
        n_kv_heads=_or(full["num_key_value_heads"], heads),
        head_dim=_or(full["head_dim"], size // heads),
        rope_theta=theta, rope_scaling=scaling, norm_eps=float(full["rms_norm_eps"]),
        tied_head=bool(full["tie_word_embeddings"]),
        attention_bias=biased, o_bias=biased and family != "qwen2",
        mlp_bias=bool(full.get("mlp_bias")),
        window=window, local_layers=local,
        local_rope_theta=local_theta if any(local) else None,
        qk_norm=family in ("qwen3", "gemma3_text"), post_norms=gemma, norm_plus_one=gemma,
        embed_scale=math.sqrt(size) if gemma else 1.0,
        activation=_ACTIVATIONS[_activation(full)],
        query_scalar=full["query_pre_attn_scalar"] if gemma else None,
        attention_softcap=full.get("attn_logit_softcapping"),
        final_softcap=full.get("final_logit_softcapping"),
        initializer_range=float(full["initializer_range"]),
        bos_id=full["bos_token_id"],
        eos_ids=token_ids(full["eos_token_id"], "config field eos_token_id"),
        max_position=full["max_position_embeddings"], family=family, dtype=_dtype(full),
    )


def language_model(raw: Json) -> Json:
    """The language model's part of a `config.json`; all of it unless the model is multimodal."""
    if raw.get("model_type") not in list(LANGUAGE_MODELS):
        return dict(raw)
    text = raw.get("text_config")
    if not isinstance(text, Mapping):
        raise BadInput(f"config.json of a {raw['model_type']} model lacks text_config")
    shared = ("dtype", "torch_dtype", "eos_token_id", "bos_token_id", "quantization_config",
              "tie_word_embeddings")
    outer = {name: raw[name] for name in shared if raw.get(name) is not None}
    inner = {name: value for name, value in text.items() if value is not None}
    return {**outer, "model_type": LANGUAGE_MODELS[raw["model_type"]], **inner, **outer}


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _activation(raw: Json) -> str:
    return raw["hidden_activation"] if raw.get("hidden_activation") else raw["hidden_act"]


def _refuse(family: str, raw: Json) -> None:
    """Raises for the first field that is malformed or whose effect is not implemented."""
    check_fields(raw)
    if _activation(raw) not in _ACTIVATIONS:
        raise BadInput(f"unsupported hidden_act {_activation(raw)!r}, supported are "
                       f"{', '.join(_ACTIVATIONS)}")
    if raw.get("use_bidirectional_attention"):
        raise BadInput("unsupported use_bidirectional_attention: the decoder is causal")
    if raw["quantization_config"]:
        raise BadInput("unsupported quantization_config, load the full-precision model instead "
                       "(a packed one of ours by load_model)")
    # A Llama converted from a Qwen names windows and switches them off.
    windowless = {"max_window_layers"} if raw.get("use_sliding_window") is False else set()
    known = COMMON.keys() | FAMILIES[family].keys() | windowless
    for name, value in raw.items():
        if name not in known and not is_inert(name, value):
            raise BadInput(f"unsupported config field {name} = {shown(value)}: its effect on the "
                           f"result is not known here for model_type {family}")


def _windows(family: str, raw: Json) -> tuple[int | None, tuple[bool, ...]]:
    """`(sliding window, whether each layer has it)`; `(None, ())` if no layer has one."""
    window, layers = raw.get("sliding_window"), raw["num_hidden_layers"]
    kinds = _layer_types(raw, layers)
    if family == "llama":
        local = [kind == "sliding_attention" for kind in kinds or []]
        reached = window is not None and window < raw["max_position_embeddings"]
        if (reached and raw.get("use_sliding_window") is not False) or any(local):
            raise BadInput(f"unsupported sliding_window {window} or layer_types {kinds} of a llama "
                           "model: transformers gives it full attention alone")
        return None, ()
    if family.startswith("qwen") and not raw["use_sliding_window"]:
        window = None
    if kinds and family != "mistral":
        local = [kind == "sliding_attention" for kind in kinds]
    elif family == "mistral":
        if len(set(kinds or [])) > 1:
            raise BadInput("unsupported layer_types of a mistral model: all its layers have the "
                           "same attention")
        local = [window is not None] * layers
    elif family.startswith("qwen"):
        local = [window is not None and n >= raw["max_window_layers"] for n in range(layers)]
    else:
        period = _or(raw.get("sliding_window_pattern"), 6 if family == "gemma3_text" else 2)
        local = [bool((n + 1) % period) for n in range(layers)]
    if any(local) and window is None:
        raise BadInput(f"config field sliding_window is {window!r}, wanted a positive integer for "
                       "its layers of sliding_attention")
    return (window, tuple(local)) if any(local) else (None, ())


def _layer_types(raw: Json, layers: int) -> list[str] | None:
    kinds = raw["layer_types"]
    if kinds is None:
        return None
    if odd := sorted(set(kinds) - set(_LAYER_TYPES)):
        raise BadInput(f"unsupported layer_types {odd[0]!r}, supported are "
                       f"{' and '.join(_LAYER_TYPES)}")
    if len(kinds) != layers:
        raise BadInput(f"config field layer_types names {len(kinds)} layers, num_hidden_layers is "
                       f"{layers}")
    return list(kinds)


def _dtype(raw: Json) -> str:
    name = raw["dtype"] or raw["torch_dtype"] or "float32"
    return str(name).removeprefix("torch.")


def _rope(family: str, raw: Json) -> tuple[float, RopeScaling | None, float | None]:
    """`(rotary base, scaling, rotary base of local layers)` from either spelling."""
    new, old = raw["rope_parameters"], raw["rope_scaling"]
    both = BadInput("unsupported config with both rope_parameters and a different rope_scaling")
    if family != "gemma3_text":
        found = _one_rope(new or old or {}, raw, 10000.0)
        if new and old and _one_rope({"rope_theta": new.get("rope_theta"), **old}, raw,
                                     10000.0) != found:
            raise both
        return *found, None
    new = new or {}
    if odd := sorted(set(new) - set(_LAYER_TYPES)):
        raise BadInput(f"unsupported rotary field {odd[0]} = {new[odd[0]]!r}: a {family} model has "
                       f"rope_parameters for {' and '.join(_LAYER_TYPES)}")
    check_kinds("rotary field", new, dict.fromkeys(_LAYER_TYPES, OBJECT))
    local = _one_rope(new.get("sliding_attention") or {},
                      {**raw, "rope_theta": raw["rope_local_base_freq"]}, 10000.0)
    if local[1] is not None:
        raise BadInput("unsupported rope scaling of sliding_attention layers")
    full = new.get("full_attention") or {}
    found = _one_rope(full or old or {}, raw, 1e6)
    if full and old and _one_rope({"rope_theta": full.get("rope_theta"), **old}, raw, 1e6) != found:
        raise both
    return *found, local[0]


def _one_rope(
    rope: Json, raw: Json, default: float
) -> tuple[float, RopeScaling | None]:
    """`(rotary base, scaling)` of one set of rotary fields; raw has what stands outside of it."""
    check_kinds("rotary field", rope, ROTARY)
    rope = {"partial_rotary_factor": raw["partial_rotary_factor"], **rope}
    known = ROTARY.keys() | (_UNSTRETCHED if rope.get("factor") == 1 else set())
    for name, value in rope.items():
        if name not in known and value is not None and value is not False:
            raise BadInput(f"unsupported rotary field {name} = {shown(value)}")
    if rope["partial_rotary_factor"] not in (None, 1, 1.0):
        raise BadInput(f"unsupported partial_rotary_factor {rope['partial_rotary_factor']}")
    inner, outer = rope.get("rope_theta"), raw["rope_theta"]
    if inner is not None and outer is not None and inner != outer:
        raise BadInput(f"config.json names two rotary bases, {inner} in rope_parameters and "
                       f"{outer} outside of it: take the wrong one out")
    return float(_or(inner, _or(outer, default))), _scaling(rope, raw["max_position_embeddings"])


def _scaling(rope: Json, max_position: int) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default" or _is_unstretched(kind, rope, max_position):
        return None
    if kind not in ("linear", "llama3"):
        raise BadInput(f"unsupported rope_type {kind!r}, supported are default, linear, llama3")
    needed = ("factor", "low_freq_factor", "high_freq_factor")[: 1 if kind == "linear" else 3]
    missing = [name for name in needed if rope.get(name) is None]
    if missing:
        raise BadInput(f"rope_type {kind} lacks {', '.join(missing)} in config.json")
    factor, *frequencies = (float(rope[name]) for name in needed)
    if kind == "linear":
        return RopeScaling("linear", factor)
    if not frequencies[0] < frequencies[1]:
        raise BadInput(f"rotary field low_freq_factor is {frequencies[0]}, wanted less than "
                       f"high_freq_factor {frequencies[1]}: correct config.json")
    original = _or(rope.get("original_max_position_embeddings"), max_position)
    return RopeScaling("llama3", factor, *frequencies, original_max_position=original)


def _is_unstretched(kind: str, rope: Json, max_position: int) -> bool:
    """Whether a scaling leaves all frequencies, up to the last position, as they are."""
    if kind not in ("linear", "dynamic", "yarn") or rope.get("factor") != 1:
        return False
    if kind == "dynamic":
        return _or(rope.get("original_max_position_embeddings"), max_position) >= max_position
    return rope.get("attention_factor") in (None, 1)


def to_hf(config: ModelConfig) -> Json:
    """The content of `config.json` for `config`, in the spelling of transformers 5.

    The rotary base and the dtype are written in the older spelling too: transformers 4 would ignore
    `rope_parameters` and silently compute other logits.

    `from_hf(to_hf(config)) == config`, except for `remat`, `remat_keep` and `attention_block`,
    which are no properties of the model.

    Raises:
      BadInput: a family that transformers does not build with these fields, such as a Llama with
        soft caps.
    """
    eos, family = list(config.eos_ids), config.family
    if family not in ARCHITECTURES:
        raise BadInput(f"unsupported family {family!r}, wanted one of {', '.join(ARCHITECTURES)}")
    raw = {
        "architectures": [ARCHITECTURES[family]], "model_type": family,
        "vocab_size": config.vocab_size, "hidden_size": config.d_model,
        "intermediate_size": config.d_hidden, "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads, "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim, "rope_parameters": _rope_to_hf(config),
        "rms_norm_eps": config.norm_eps, "tie_word_embeddings": config.tied_head,
        "initializer_range": config.initializer_range, "bos_token_id": config.bos_id,
        "eos_token_id": eos[0] if len(eos) == 1 else (eos or None),
        "max_position_embeddings": config.max_position, "dtype": config.dtype,
        **_family_to_hf(config), **_older_spelling(config),
    }
    if from_hf(raw) != dataclasses.replace(
            config, remat=False, remat_keep="nothing", attention_block=0):
        raise BadInput(f"unsupported mixture: no {ARCHITECTURES[family]} of transformers has the "
                       "settings of this model, so a folder of it could not be read back")
    return raw


def _family_to_hf(config: ModelConfig) -> Json:
    """The fields that not all families have."""
    family = config.family
    act = _HF_ACTIVATIONS[config.activation]
    if family.startswith("gemma"):
        return {
            "hidden_activation": act, "attention_bias": config.attention_bias,
            "query_pre_attn_scalar": config.query_scalar, **_windows_to_hf(config),
            "attn_logit_softcapping": config.attention_softcap,
            "final_logit_softcapping": config.final_softcap,
        }
    raw: Json = {"hidden_act": act}
    if family == "llama":
        return raw | {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    if family == "mistral":
        return raw | {"sliding_window": config.window}
    if family == "qwen3":
        raw["attention_bias"] = config.attention_bias
    return raw | _windows_to_hf(config) | {"use_sliding_window": config.window is not None}


def _older_spelling(config: ModelConfig) -> Json:
    """The fields that transformers 4 reads in place of `rope_parameters` and `dtype`."""
    raw: Json = {"rope_theta": config.rope_theta, "torch_dtype": config.dtype}
    if config.rope_scaling is not None:
        rope = _full_rope(config)
        raw["rope_scaling"] = {name: rope[name] for name in rope if name != "rope_theta"}
    if config.local_rope_theta is not None:
        raw["rope_local_base_freq"] = config.local_rope_theta
    return raw


def _windows_to_hf(config: ModelConfig) -> Json:
    local = config.local_layers or (False,) * config.n_layers
    kinds = ["sliding_attention" if one else "full_attention" for one in local]
    return {"sliding_window": config.window, "layer_types": kinds}


def _rope_to_hf(config: ModelConfig) -> Json:
    rope = _full_rope(config)
    if config.family != "gemma3_text":
        return rope
    local: Json = {"rope_type": "default"}
    if config.local_rope_theta is not None:
        local["rope_theta"] = config.local_rope_theta
    return {"full_attention": rope, "sliding_attention": local}


def _full_rope(config: ModelConfig) -> Json:
    rope: Json = {"rope_type": "default", "rope_theta": config.rope_theta}
    scaling = config.rope_scaling
    if scaling is not None:
        rope |= {"rope_type": scaling.rope_type, "factor": scaling.factor}
    if scaling is not None and scaling.rope_type == "llama3":
        rope |= {"low_freq_factor": scaling.low_freq_factor,
                 "high_freq_factor": scaling.high_freq_factor,
                 "original_max_position_embeddings": scaling.original_max_position}
    return rope
