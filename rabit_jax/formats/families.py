"""Model families of Hugging Face: the fields of their `config.json`, the names of their tensors."""

from __future__ import annotations

from collections.abc import Iterator

from rabit_jax.errors import BadInput
from rabit_jax.types import Json, Shape

# The class of transformers that reads each model_type.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}

# Multimodal models whose language model is read, with the model_type of the language model.
LANGUAGE_MODELS = {"gemma3": "gemma3_text"}

SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
)

# Fields that are read for every family, with the value that a missing one has in transformers.
COMMON: Json = {
    **dict.fromkeys(SIZES), "num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6,
    "rope_theta": None, "rope_scaling": None, "rope_parameters": None,
    "partial_rotary_factor": None, "tie_word_embeddings": False, "initializer_range": 0.02,
    "bos_token_id": None, "eos_token_id": None, "dtype": None, "torch_dtype": None,
    "hidden_act": "silu", "layer_types": None, "quantization_config": None,
}
_QWEN: Json = {
    "max_position_embeddings": 32768, "num_key_value_heads": 32, "use_sliding_window": False,
    "sliding_window": 4096, "max_window_layers": 28,
}
_GEMMA: Json = {
    "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "bos_token_id": 2,
    "eos_token_id": 1, "tie_word_embeddings": True, "attention_bias": False,
    "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
    "sliding_window": 4096, "use_bidirectional_attention": None,
}

# Further fields of each family, and its own defaults of common ones.
FAMILIES: dict[str, Json] = {
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
        "rope_local_base_freq": None, "sliding_window_pattern": 6,
    },
}

# Fields that do not change the logits of the decoder, whatever they hold: how the model is trained,
# run, sampled from, labelled and stored.
HARMLESS = frozenset({
    "architectures", "attn_implementation", "bad_words_ids", "begin_suppress_tokens",
    "cache_implementation", "chunk_size_feed_forward", "cross_attention_hidden_size",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task",
    "forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing", "id2label",
    "is_decoder", "is_llama_config", "label2id", "length_penalty", "max_length", "max_new_tokens",
    "max_seq_len", "max_sequence_length", "min_length", "min_new_tokens", "min_p",
    "model_max_length", "model_type", "name_or_path", "neftune_noise_alpha", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_labels", "num_return_sequences", "output_attentions",
    "output_hidden_states", "output_router_logits", "output_scores", "pad_token", "pad_token_id",
    "prefix", "pretraining_tp", "problem_type", "remove_invalid_values", "repetition_penalty",
    "return_dict", "return_dict_in_generate", "sep_token_id", "seq_length", "suppress_tokens",
    "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder",
    "tokenizer_class", "top_k", "top_p", "torchscript", "transformers.js_config",
    "transformers_version", "transformers_weights", "typical_p", "unk_token_id", "use_bfloat16",
    "use_cache", "use_flash_attention", "use_flash_attn",
})
# Values at which a field of another family does nothing.
NEUTRAL: Json = {
    "embedding_multiplier": 1, "logit_scale": 1, "logits_scaling": 1,
    "residual_multiplier": 1, "num_experts": 0, "num_local_experts": 0,
}
# Code that comes with a model: what it reads of these does not change the decoder.
_CODE = {"AutoConfig", "AutoTokenizer"}



def is_inert(name: str, value: object) -> bool:
    """Whether a field that no family reads leaves the logits as they are.

    Such are fields in `HARMLESS`, private ones, those of dropout, and any that is null, false or
    empty: what a field would switch on is then off.
    """
    if name in HARMLESS or name.startswith(("_", "unsloth_", "summary_")) or _is_dropout(name):
        return True
    if name == "auto_map":
        return isinstance(value, dict) and value.keys() <= _CODE
    empty = value is None or value is False or (isinstance(value, (str, list, dict)) and not value)
    neutral = name in NEUTRAL and not isinstance(value, bool) and value == NEUTRAL[name]
    return empty or neutral


def _is_dropout(name: str) -> bool:
    return "dropout" in name or name.endswith("_pdrop")


# The module of transformers for each module of the decoder; `{}` is the number of the layer.
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
    """The Hugging Face name of a module or tensor of the decoder.

    Args:
      path: such as `layers/attn/q` or `layers/attn/q/kernel`.
      layer: the layer number to fill in; None leaves `{}` in its place.

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


def tensor_names(path: str, shape: Shape) -> Iterator[tuple[str, Shape]]:
    """Name and torch shape of each Hugging Face tensor that makes up the parameter at `path`.

    A stacked parameter `[l, ...]` is l tensors; a kernel `[i, o]` is stored as `[o, i]`.
    """
    stacked = path.startswith("layers/")
    inner = shape[1:] if stacked else shape
    for layer in range(shape[0]) if stacked else [None]:
        yield hf_name(path, layer), inner[::-1] if path.endswith("/kernel") else inner
