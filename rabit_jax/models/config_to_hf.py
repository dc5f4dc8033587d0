"""Hugging Face's `config.json` for a `ModelConfig`; `config_hf` is the way back."""

from __future__ import annotations

import dataclasses
from typing import Any

from rabit_jax.errors import BadInput
from rabit_jax.models.config import ModelConfig
from rabit_jax.models.config_hf import from_hf
from rabit_jax.models.families import ARCHITECTURES

_ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` content, as transformers 5 writes it and loads it, of `config`.

    The rotary base and the dtype stand there in the older spelling too: a program on transformers 4
    would pass over `rope_parameters` and compute other logits without a word.

    `from_hf(to_hf(config)) == config`, but for `remat`, which is no property of the model.

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
    if from_hf(raw) != dataclasses.replace(config, remat=False):
        raise BadInput(f"unsupported mixture: no {ARCHITECTURES[family]} of transformers has the "
                       "settings of this model, so a folder of it could not be read back")
    return raw


def _family_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The fields that not all families have."""
    family = config.family
    act = _ACTIVATIONS[config.activation]
    if family.startswith("gemma"):
        return {
            "hidden_activation": act, "attention_bias": config.attention_bias,
            "query_pre_attn_scalar": config.query_scalar, **_windows(config),
            "attn_logit_softcapping": config.attention_softcap,
            "final_logit_softcapping": config.final_softcap,
        }
    raw: dict[str, Any] = {"hidden_act": act}
    if family == "llama":
        return raw | {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    if family == "mistral":
        return raw | {"sliding_window": config.window}
    if family == "qwen3":
        raw["attention_bias"] = config.attention_bias
    return raw | _windows(config) | {"use_sliding_window": config.window is not None}


def _older_spelling(config: ModelConfig) -> dict[str, Any]:
    """What transformers 4 reads in place of `rope_parameters` and `dtype`."""
    raw: dict[str, Any] = {"rope_theta": config.rope_theta, "torch_dtype": config.dtype}
    if config.rope_scaling is not None:
        rope = _full_rope(config)
        raw["rope_scaling"] = {name: rope[name] for name in rope if name != "rope_theta"}
    if config.local_rope_theta is not None:
        raw["rope_local_base_freq"] = config.local_rope_theta
    return raw


def _windows(config: ModelConfig) -> dict[str, Any]:
    local = config.local_layers or (False,) * config.n_layers
    kinds = ["sliding_attention" if one else "full_attention" for one in local]
    return {"sliding_window": config.window, "layer_types": kinds}


def _rope_to_hf(config: ModelConfig) -> dict[str, Any]:
    rope = _full_rope(config)
    if config.family != "gemma3_text":
        return rope
    local = {"rope_type": "default"}
    if config.local_rope_theta is not None:
        local["rope_theta"] = config.local_rope_theta
    return {"full_attention": rope, "sliding_attention": local}


def _full_rope(config: ModelConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    scaling = config.rope_scaling
    if scaling is not None:
        rope |= {"rope_type": scaling.rope_type, "factor": scaling.factor}
    if scaling is not None and scaling.rope_type == "llama3":
        rope |= {"low_freq_factor": scaling.low_freq_factor,
                 "high_freq_factor": scaling.high_freq_factor,
                 "original_max_position_embeddings": scaling.original_max_position}
    return rope
