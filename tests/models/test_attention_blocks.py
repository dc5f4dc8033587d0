"""Attention in blocks of queries against the whole matrix of scores, in float64 and float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax import BadInput
from rabit_jax.models.block import attention, attention_in_blocks
from rabit_jax.models.config import ModelConfig
from rabit_jax.models.decoder import Decoder
from tests.small_models import TINY

B, T, N, G, H = 2, 11, 2, 3, 8


def reference(q, k, v, allowed, scale, cap):
    """Attention of one query after another in float64 NumPy."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out = np.zeros_like(q)
    for b in range(B):
        for t in range(T):
            seen = allowed[b % len(allowed), 0, t]
            for n in range(N * G):
                score = k[b, n // G][seen] @ q[b, t, n] * scale
                score = cap * np.tanh(score / cap) if cap else score
                share = np.exp(score - score.max(initial=-np.inf))
                if seen.any():
                    out[b, t, n] = share @ v[b, n // G][seen] / share.sum()
    return out


def inputs():
    rng = np.random.default_rng(0)
    q = rng.normal(size=(B, T, N * G, H)).astype(np.float32)
    k, v = (rng.normal(size=(B, N, T, H)).astype(np.float32) for _ in range(2))
    allowed = np.tril(np.ones((T, T), bool))[None, None] & np.ones((B, 1, 1, 1), bool)
    allowed[1, :, :, -3:] = False  # padding
    return q, k, v, allowed


def config(block, cap=None):
    return dataclasses.replace(
        ModelConfig(vocab_size=8, d_model=16, n_layers=1, n_heads=N * G, n_kv_heads=N, head_dim=H,
                    d_hidden=16), attention_block=block, attention_softcap=cap)


def gradients(q, k, v, allowed, dy, scale, cap):
    """Of `sum(dy attention(q, k, v))` by q, k and v, one query after another in float64 NumPy."""
    q, k, v, dy = (np.asarray(a, np.float64) for a in (q, k, v, dy))
    dq, dk, dv = (np.zeros_like(a) for a in (q, k, v))
    for b, t, n in np.ndindex(B, T, N * G):
        seen, m = np.flatnonzero(allowed[b, 0, t]), n // G
        score = k[b, m, seen] @ q[b, t, n] * scale
        slope = 1 - np.tanh(score / cap) ** 2 if cap else 1.0
        score = cap * np.tanh(score / cap) if cap else score
        share = np.exp(score - score.max())
        share /= share.sum()
        dshare = v[b, m, seen] @ dy[b, t, n]
        dscore = share * (dshare - share @ dshare) * slope * scale
        dq[b, t, n] += dscore @ k[b, m, seen]
        dk[b, m, seen] += np.outer(dscore, q[b, t, n])
        dv[b, m, seen] += np.outer(share, dy[b, t, n])
    return dq, dk, dv


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_gradients_are_those_of_softmax_in_both_directions(cap, dtype, tolerance):
    *arrays, allowed = inputs()
    arrays = tuple(jnp.asarray(a, dtype) for a in arrays)
    rng = np.random.default_rng(1)
    dy = jnp.asarray(rng.normal(size=arrays[0].shape), dtype)
    moves = tuple(jnp.asarray(rng.normal(size=a.shape), dtype) for a in arrays)
    given = [np.asarray(a.astype(jnp.float32)) for a in (*arrays, dy, *moves)]
    wanted = gradients(*given[:3], allowed, given[3], H**-0.5, cap)

    def run(*arrays):
        return attention(*arrays, jnp.asarray(allowed), config(0, cap))

    found = jax.vjp(run, *arrays)[1](dy)
    for one, grad in zip(found, wanted, strict=True):
        error = np.asarray(one.astype(jnp.float32)) - grad
        assert np.abs(error).max() < tolerance * np.abs(grad).max()
    # Forward mode: <dy, J m> = <J^T dy, m>.
    pushed = jnp.vdot(dy.astype(jnp.float32), jax.jvp(run, arrays, moves)[1].astype(jnp.float32))
    pulled = sum(np.sum(grad * move) for grad, move in zip(wanted, given[4:], strict=True))
    size = sum(np.sum(np.abs(grad * move)) for grad, move in zip(wanted, given[4:], strict=True))
    assert abs(float(pushed) - pulled) < tolerance * size


@pytest.mark.parametrize("block", [1, 4, 10])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_forward_and_backward_are_those_of_the_whole_matrix(block, cap):
    q, k, v, allowed = inputs()
    wanted = reference(q, k, v, allowed, H**-0.5, cap)
    y = attention_in_blocks(q, k, v, jnp.asarray(allowed), config(block, cap))
    np.testing.assert_allclose(y, wanted, atol=2e-6)

    with jax.enable_x64(True):
        wide = [jnp.asarray(a, jnp.float64) for a in (q, k, v)]
        weights = np.random.default_rng(1).normal(size=wanted.shape)

        def loss(how, arrays):
            y = how(*arrays, jnp.asarray(allowed), config(block, cap))
            return jnp.sum(y * weights)

        whole = jax.grad(lambda arrays: loss(attention, arrays))(wide)
        pieces = jax.grad(lambda arrays: loss(attention_in_blocks, arrays))(wide)
    for a, b in zip(whole, pieces, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6 * np.abs(a).max())


def test_a_shared_mask_and_bfloat16(block=4):
    q, k, v, allowed = inputs()
    q, k, v = (jnp.asarray(a, jnp.bfloat16) for a in (q, k, v))
    mask = jnp.asarray(allowed[:1])
    found = attention_in_blocks(q, k, v, mask, config(block))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, attention(q, k, v, mask, config(block)))


def test_no_array_of_the_program_has_all_scores():
    """Neither the forward nor the backward pass holds `t x s` scores of a head."""
    q, k, v, allowed = inputs()

    def loss(block, arrays):
        how = attention_in_blocks if block else attention
        return jnp.sum(how(*arrays, jnp.asarray(allowed), config(block)))

    def largest(block):
        text = jax.jit(jax.grad(lambda arrays: loss(block, arrays))).lower((q, k, v)).as_text()
        return f"{T}x{T}xf32" in text

    assert largest(0) and not largest(4)


def test_a_decoder_gives_the_same_logits_and_gradients(params, tokens):
    mask = np.ones(tokens.shape, bool)
    mask[1, :2] = False

    def loss(changes, params):
        model = Decoder(dataclasses.replace(TINY, remat=True, **changes))
        return jnp.sum(model.apply({"params": params}, tokens, mask) ** 2)

    whole = jax.grad(lambda p: loss({}, p))(params)
    for changes in ({"attention_block": 4}, {"remat_keep": "products"}):
        found = jax.grad(lambda p, c=changes: loss(c, p))(params)
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(found), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(a).max()) + 1e-7)


@pytest.mark.parametrize("wrong", [{"attention_block": -1}, {"remat_keep": "all"}])
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(BadInput, match=next(iter(wrong))):
        dataclasses.replace(TINY, **wrong)
