"""config.json in and out: both spellings, defaults, and every refusal by name."""

import dataclasses

import pytest

from rabit_jax.errors import BadInput
from rabit_jax.formats.hf_config import from_hf, to_hf
from rabit_jax.models.config import ModelConfig, RopeScaling

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


def test_mistral_differs_from_llama_by_its_window_alone():
    mistral = BASE | {"model_type": "mistral", "sliding_window": None, "num_key_value_heads": 2}
    llama = dataclasses.replace(from_hf(BASE | {"num_key_value_heads": 2}), family="mistral")
    assert from_hf(mistral) == llama
    windowed = dataclasses.replace(llama, window=4096, local_layers=(True, True))
    assert from_hf(mistral | {"sliding_window": 4096}) == windowed
    # transformers takes a missing window as 4096.
    del mistral["sliding_window"]
    assert from_hf(mistral) == windowed


GEMMA = {"vocab_size": 64, "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4,
         "intermediate_size": 96, "num_key_value_heads": 2}


@pytest.mark.parametrize("family, change, message", [
    ("gemma2", {"use_bidirectional_attention": True}, "^unsupported use_bidirectional_attention"),
    ("gemma2", {"sliding_window": None}, "sliding_window is None, wanted a positive integer"),
    ("gemma2", {"hidden_activation": "gelu"}, "^unsupported hidden_act 'gelu'"),
    ("gemma2", {"mlp_bias": True}, "^unsupported config field mlp_bias"),
    ("gemma3_text", {"attn_logit_softcapping": 9.0}, "^unsupported .* attn_logit_softcapping"),
    ("gemma3_text", {"rope_parameters": {"sliding_attention": {"rope_type": "linear",
                                                               "factor": 2.0}}},
     "^unsupported rope scaling of sliding_attention"),
    ("gemma3_text", {"rope_parameters": {"rope_type": "linear", "factor": 8.0}},
     "^unsupported rotary field factor = 8.0"),
    ("gemma3", {}, "lacks text_config"),
    ("qwen2", {"use_mrope": True}, "^unsupported config field use_mrope"),
    ("qwen3", {"layer_types": ["chunked_attention"] * 2}, "^unsupported layer_types 'chunked"),
    ("qwen3", {"use_sliding_window": True, "layer_types": ["sliding_attention"]},
     "layer_types names 1 layers, num_hidden_layers is 2"),
    ("mistral", {"layer_types": ["sliding_attention", "full_attention"]},
     "^unsupported layer_types of a mistral"),
    ("qwen2_moe", {}, "^unsupported model_type 'qwen2_moe'"),
])
def test_features_of_families_are_refused_by_name(family, change, message):
    with pytest.raises(BadInput, match=message):
        from_hf({"model_type": family, **GEMMA, **change})


def test_the_unread_window_of_the_published_gemma2_is_ignored():
    raw = {"model_type": "gemma2", **GEMMA, "sliding_window": 16}
    assert from_hf(raw | {"sliding_window_size": 16}) == from_hf(raw)


def test_what_transformers_cannot_build_is_not_written():
    config = dataclasses.replace(from_hf(BASE), final_softcap=30.0)
    with pytest.raises(BadInput, match="^unsupported mixture: no LlamaForCausalLM"):
        to_hf(config)


@pytest.mark.parametrize("change, message", [
    ({"model_type": "mamba"}, "^unsupported model_type 'mamba', supported are llama, mistral"),
    ({"model_type": None}, "^unsupported model_type"),
    ({"hidden_act": "gelu"}, "^unsupported hidden_act 'gelu'"),
    ({"sliding_window": 16}, "^unsupported sliding_window 16"),
    ({"layer_types": ["sliding_attention"] * 2}, "^unsupported sliding_window None or layer_types"),
    ({"quantization_config": {"quant_method": "fp8"}}, "^unsupported quantization_config"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "^unsupported rope_type 'yarn'"),
    ({"rope_parameters": {"rope_type": "dynamic"}}, "^unsupported rope_type 'dynamic'"),
    ({"rope_parameters": {"full_attention": {}}}, "^unsupported rotary field full_attention"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "^unsupported partial_rotary_factor"),
    ({"partial_rotary_factor": 0.5}, "^unsupported partial_rotary_factor 0.5"),
    ({"rope_parameters": {"rope_theta": 1.0},
      "rope_scaling": {"type": "linear", "factor": 2.0}},
     "^unsupported config with both"),
    ({"dtype": "float64"}, "^unsupported dtype 'float64'"),
    ({"logit_scale": 0.5}, "^unsupported config field logit_scale = 0.5"),
    ({"rope_scaling": {"type": "linear"}}, "lacks factor"),
    ({"hidden_size": None}, "hidden_size is None"),
    ({"rms_norm_eps": None}, "rms_norm_eps is None, wanted a number"),
    ({"rope_scaling": [8.0]}, "rope_scaling is .* wanted an object or null"),
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
        o_bias=True,
        mlp_bias=True, initializer_range=0.01, bos_id=None, eos_ids=(3, 5), max_position=99,
        dtype="bfloat16", remat=True,
    )
    assert from_hf(to_hf(config)) == dataclasses.replace(config, remat=False)


def test_sizes_are_checked():
    with pytest.raises(BadInput, match="n_layers is 0, wanted a positive integer"):
        ModelConfig(vocab_size=1, d_model=2, n_layers=0, n_heads=1, n_kv_heads=1, head_dim=2,
                    d_hidden=2)
