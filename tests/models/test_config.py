"""config.json in and out: both spellings, defaults, and every refusal by name."""

import dataclasses

import pytest

from rabit_jax.errors import BadInput
from rabit_jax.models import ModelConfig, RopeScaling, from_hf, to_hf

BASE = {
    "model_type": "llama", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}


def test_old_and_new_spelling_read_the_same():
    old = BASE | {"rope_theta": 5e5, "torch_dtype": "bfloat16",
                  "rope_scaling": {"type": "llama3", **LLAMA3}}
    new = BASE | {"dtype": "bfloat16",
                  "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}}
    assert from_hf(old) == from_hf(new)
    assert from_hf(new).rope_theta == 5e5
    assert from_hf(new).rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
    assert from_hf(new).dtype == "bfloat16"


def test_defaults_are_those_of_transformers():
    config = from_hf({**BASE, "head_dim": None, "rope_scaling": None})
    assert (config.n_kv_heads, config.head_dim) == (4, 16)
    assert (config.rope_theta, config.norm_eps, config.dtype) == (10000.0, 1e-6, "float32")
    assert (config.bos_id, config.eos_ids, config.tied_head) == (1, (2,), False)


def test_harmless_and_empty_fields_are_ignored():
    noise = {"architectures": ["X"], "use_cache": True, "pretraining_tp": 2, "novel": None,
             "rope_interleaved": False, "layer_types": ["full_attention"] * 2,
             "partial_rotary_factor": 1.0, "quantization_config": None}
    assert from_hf(BASE | noise) == from_hf(BASE)


def test_mistral_without_a_window_is_a_llama():
    mistral = BASE | {"model_type": "mistral", "sliding_window": None, "num_key_value_heads": 2}
    assert from_hf(mistral) == from_hf(BASE | {"num_key_value_heads": 2})
    # transformers takes a missing window as 4096.
    del mistral["sliding_window"]
    with pytest.raises(BadInput, match="^unsupported sliding_window 4096"):
        from_hf(mistral | {"max_position_embeddings": 32768})


@pytest.mark.parametrize("change, message", [
    ({"model_type": "mamba"}, "^unsupported model_type 'mamba', supported are llama, mistral"),
    ({"model_type": None}, "^unsupported model_type"),
    ({"hidden_act": "gelu"}, "^unsupported hidden_act 'gelu'"),
    ({"sliding_window": 16}, "^unsupported sliding_window 16"),
    ({"layer_types": ["sliding_attention"]}, "^unsupported layer_types"),
    ({"quantization_config": {"quant_method": "fp8"}}, "^unsupported quantization_config"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "^unsupported rope_type 'yarn'"),
    ({"rope_parameters": {"rope_type": "dynamic"}}, "^unsupported rope_type 'dynamic'"),
    ({"rope_parameters": {"full_attention": {}}}, "^unsupported rotary field full_attention"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "^unsupported partial_rotary_factor"),
    ({"partial_rotary_factor": 0.5}, "^unsupported partial_rotary_factor 0.5"),
    ({"rope_parameters": {"rope_theta": 1.0}, "rope_scaling": {"type": "linear"}},
     "^unsupported config with both"),
    ({"dtype": "float64"}, "^unsupported dtype 'float64'"),
    ({"logit_scale": 0.5}, "^unsupported config field logit_scale = 0.5"),
    ({"rope_scaling": {"type": "linear"}}, "lacks factor"),
    ({"hidden_size": None}, "hidden_size is None"),
    ({"num_key_value_heads": 3}, "n_heads 4 is not a multiple of n_kv_heads 3"),
    ({"head_dim": 7}, "head_dim 7 is odd"),
])
def test_refuses_by_name(change, message):
    with pytest.raises(BadInput, match=message):
        from_hf(BASE | change)


@pytest.mark.parametrize("scaling", [None, RopeScaling("linear", 2.0),
                                     RopeScaling("llama3", 8.0, 1.0, 4.0, 64)])
def test_round_trip(scaling):
    config = ModelConfig(
        vocab_size=128, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=24, d_hidden=96,
        rope_theta=5e5, rope_scaling=scaling, norm_eps=1e-5, tied_head=True, attention_bias=True,
        mlp_bias=True, initializer_range=0.01, bos_id=None, eos_ids=(3, 5), max_position=99,
        dtype="bfloat16", remat=True,
    )
    assert from_hf(to_hf(config)) == dataclasses.replace(config, remat=False)


def test_sizes_are_checked():
    with pytest.raises(BadInput, match="n_layers is 0, wanted a positive integer"):
        ModelConfig(vocab_size=1, d_model=2, n_layers=0, n_heads=1, n_kv_heads=1, head_dim=2,
                    d_hidden=2)
