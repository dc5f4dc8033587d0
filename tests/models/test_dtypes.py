"""Checkpoints of every dtype on a CPU: logits, gradients and text near those of float32."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rabit_jax import generate, load_model, save_hf
from rabit_jax.formats.packed_model import save_packed
from rabit_jax.models.config import compute_dtype
from rabit_jax.models.decoder import Decoder
from rabit_jax.train.losses import next_token_loss

# The largest difference of a logit relative to the largest logit.
NEAR = {"float16": 2e-2, "bfloat16": 5e-2, "float32": 1e-6}


def _mixed(folder):
    """Every other tensor of the file in another of the three dtypes."""
    kinds = [np.float32, np.float16, ml_dtypes.bfloat16]
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensors[name].astype(kinds[n % 3]) for n, name in enumerate(sorted(tensors))},
              folder / "model.safetensors")


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dtype", NEAR)
def test_checkpoints_of_every_dtype(tmp_path, model, params, tokens, apply, dtype, mixed):
    wanted = np.asarray(apply(model, params, tokens))
    save_hf(tmp_path / "m", model, params, dtype=dtype)
    if mixed:
        _mixed(tmp_path / "m")
    own, read, _ = load_model(tmp_path / "m")
    assert own.config.dtype == dtype
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(read))
    found = apply(own, read, tokens)
    assert found.dtype == jnp.float32
    near = NEAR["bfloat16" if mixed else dtype]
    assert np.abs(np.asarray(found) - wanted).max() < near * np.abs(wanted).max()
    if mixed and dtype == "float16":
        new = generate(own, read, np.asarray(tokens), max_new_tokens=4)
        assert ((0 <= new) & (new < own.config.vocab_size)).all()


def test_a_float16_model_computes_in_float32_on_a_cpu(model, params, tokens, apply):
    """Its products, its states and its gradients; wide values do not overflow."""
    half = Decoder(dataclasses.replace(model.config, dtype="float16"))
    assert compute_dtype(half.config) == "float32"
    wide = jax.tree.map(lambda a: a, params)
    wide["embed"] = {"embedding": 3e5 * params["embed"]["embedding"]}
    found, hidden = apply(half, wide, tokens, None, True)
    assert hidden.dtype == jnp.float32 and np.abs(hidden).max() > 1e5
    np.testing.assert_array_equal(found, apply(model, wide, tokens))

    def loss(p, model):
        return next_token_loss(model, p, {"tokens": tokens}, chunk=4)[0]

    for mine, wanted in zip(*(jax.tree.leaves(jax.jit(jax.grad(loss), static_argnums=1)(params, m))
                              for m in (half, model)), strict=True):
        np.testing.assert_array_equal(mine, wanted)


def test_a_packed_float16_model(tmp_path, small, random_packed, tokens, apply):
    half = dataclasses.replace(small, dtype="float16")
    own, read, _ = load_model(save_packed(tmp_path / "p", half, random_packed(small)))
    wanted, found = apply(Decoder(small), read, tokens), apply(own, read, tokens)
    assert own.config.dtype == "float16"
    np.testing.assert_array_equal(found, wanted)
