"""Logits, text and folders against transformers on PyTorch, on tiny random models."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax.formats.hf import load_hf, save_hf
from rabit_jax.models.generation import generate

torch = pytest.importorskip("torch", reason="the reference runs on PyTorch")
transformers = pytest.importorskip("transformers", reason="the reference is transformers")

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.3,
    "eos_token_id": None, "bos_token_id": None,
}
ROPE3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
CASES = {
    "plain": {},
    "grouped": {"num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "head_dim": {"head_dim": 12, "num_key_value_heads": 2},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "llama3": {"rope_parameters": ROPE3},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
}


def _reference(**settings):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SIZES, **settings}, attn_implementation="eager")
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():  # biases start at 0 and norms at 1, which would hide them
        for name, p in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                p.add_(0.1 * torch.randn_like(p))
    return model


def _logits(model, tokens, mask=None):
    with torch.no_grad():
        given = None if mask is None else torch.tensor(np.asarray(mask, np.int64))
        out = model(torch.tensor(np.asarray(tokens, np.int64)), attention_mask=given,
                    output_hidden_states=True)
    return out.logits.numpy(), [h.numpy() for h in out.hidden_states]


def _old_spelling(folder):
    """Rewrites config.json as transformers 4 wrote it."""
    file = folder / "config.json"
    raw = json.loads(file.read_text())
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope.pop("rope_theta")
    raw["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    raw["torch_dtype"] = raw.pop("dtype")
    file.write_text(json.dumps(raw))


@pytest.mark.parametrize("case", CASES)
def test_logits_match(case, tmp_path, tokens, apply):
    reference = _reference(**CASES[case])
    reference.save_pretrained(tmp_path)
    model, params, _ = load_hf(tmp_path)
    logits, hidden = apply(model, params, tokens, None, True)
    wanted, stream = _logits(reference, tokens)
    assert np.abs(wanted).max() > 1
    assert np.abs(np.asarray(logits) - wanted).max() < 1e-4
    # The reference normalises its last hidden state, so that one is left out.
    assert np.abs(np.asarray(hidden[:-1]) - np.stack(stream[1:-1])).max() < 1e-4
    _old_spelling(tmp_path)
    again, _, _ = load_hf(tmp_path)
    assert again.config == model.config


def test_sharded_checkpoint(tmp_path, tokens, apply):
    reference = _reference(num_key_value_heads=2)
    reference.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    model, params, _ = load_hf(tmp_path)
    assert np.abs(apply(model, params, tokens) - _logits(reference, tokens)[0]).max() < 1e-4


def test_left_padded_batch(tmp_path, tokens, apply):
    reference = _reference(num_key_value_heads=2)
    reference.save_pretrained(tmp_path)
    model, params, _ = load_hf(tmp_path)
    mask = jnp.ones(tokens.shape, bool).at[1, :4].set(False)
    found, wanted = apply(model, params, tokens, mask), _logits(reference, tokens[1:, 4:])[0]
    assert np.abs(found[1:, 4:] - wanted).max() < 1e-4


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_what_we_save(tmp_path, config, params, tokens, apply, tied):
    import dataclasses

    from rabit_jax.models.decoder import Decoder

    model = Decoder(dataclasses.replace(config, tied_head=tied))
    params = {n: p for n, p in params.items() if not (tied and n == "head")}
    save_hf(tmp_path / "m", model, params)
    reference, info = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "m", output_loading_info=True, attn_implementation="eager")
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert reference.dtype == torch.float32
    assert reference.generation_config.eos_token_id == 2
    assert np.abs(apply(model, params, tokens) - _logits(reference, tokens)[0]).max() < 1e-4


def test_greedy_text_matches(tmp_path, tokens):
    reference = _reference(num_key_value_heads=2)
    reference.save_pretrained(tmp_path)
    model, params, _ = load_hf(tmp_path)
    mask = np.ones(tokens.shape, np.int64)
    mask[1, :3] = 0
    wanted = reference.generate(
        torch.tensor(np.asarray(tokens, np.int64)), attention_mask=torch.tensor(mask),
        max_new_tokens=12, do_sample=False, pad_token_id=0)[:, tokens.shape[1]:]
    found = generate(model, params, tokens, jnp.asarray(mask, bool), max_new_tokens=12)
    np.testing.assert_array_equal(found, wanted.numpy())
