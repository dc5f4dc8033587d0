"""What the `config.json` of each model family may say, and what transformers assumes otherwise."""

from __future__ import annotations

from typing import Any

# The class of transformers that reads each model_type.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}

# Multimodal models of which the language model is read, by that one's model_type.
LANGUAGE_MODELS = {"gemma3": "gemma3_text"}
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
)

# Read for every family.
COMMON: dict[str, Any] = {
    **dict.fromkeys(SIZES), "num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6,
    "rope_theta": None, "rope_scaling": None, "rope_parameters": None,
    "partial_rotary_factor": None, "tie_word_embeddings": False, "initializer_range": 0.02,
    "bos_token_id": None, "eos_token_id": None, "dtype": None, "torch_dtype": None,
    "hidden_act": "silu", "layer_types": None, "quantization_config": None,
}
_QWEN: dict[str, Any] = {
    "max_position_embeddings": 32768, "num_key_value_heads": 32, "use_sliding_window": False,
    "sliding_window": 4096, "max_window_layers": 28,
}
_GEMMA: dict[str, Any] = {
    "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "bos_token_id": 2,
    "eos_token_id": 1, "tie_word_embeddings": True, "attention_bias": False,
    "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
    "sliding_window": 4096, "use_bidirectional_attention": None,
}

# What a family reads besides, with its own defaults where the file leaves a field out.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2,
        "attention_bias": False, "mlp_bias": False, "sliding_window": None,
    },
    "mistral": {
        "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128, "attention_bias": False},
    "gemma2": {
        **_GEMMA, "vocab_size": 256000, "max_position_embeddings": 8192,
        "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0,
        # In the published 9B and 27B; transformers reads sliding_window instead.
        "sliding_window_size": None,
    },
    "gemma3_text": {
        **_GEMMA, "vocab_size": 262208, "max_position_embeddings": 131072,
        # Transformers reads no attn_logit_softcapping here: its attention leaves the scores alone.
        "final_logit_softcapping": None,
        "rope_local_base_freq": 10000.0, "sliding_window_pattern": 6,
    },
}

# Fields that leave the logits of the decoder as they are.
HARMLESS = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path",
    "_sliding_window_pattern", "architectures", "attention_dropout", "attn_implementation",
    "cache_implementation", "chunk_size_feed_forward", "do_sample", "id2label", "is_llama_config",
    "label2id", "max_length", "max_sequence_length", "min_length", "model_type", "num_beams",
    "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type",
    "repetition_penalty", "return_dict", "return_dict_in_generate", "temperature", "top_k",
    "top_p", "torchscript", "transformers.js_config", "transformers_version", "unk_token_id",
    "unsloth_fixed", "unsloth_version", "use_cache",
})
