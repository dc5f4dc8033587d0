"""Caches of codes against float64 NumPy, and rings against caches that keep every key."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from rabit_jax.errors import BadInput
from rabit_jax.models import cache as cache_module
from rabit_jax.models.block import Slots
from rabit_jax.models.cache import (
    ByKind,
    Codes,
    decoded,
    encode,
    pattern,
    ring_places,
    ring_slots,
)
from rabit_jax.models.decoder import Decoder
from rabit_jax.models.engine import init_cache, step
from rabit_jax.models.generation import generate
from rabit_jax.models.prepared import prepare
from rabit_jax.tree import tree_bytes

STEP = jax.jit(step)


def nearest(x, bits):
    """The values of the codes nearest to `x`, in float64, for scales in float16."""
    x = np.asarray(x, np.float64)
    if bits == 8:
        s = np.maximum(np.abs(x).max(-1, keepdims=True) / 127, 2.0**-14)
        s = s.astype(np.float16).astype(np.float64)
        return np.clip(np.round(x / s), -127, 127) * s
    h = x.shape[-1]
    groups = x.reshape(*x.shape[:-1], -1, 32 if h % 64 == 0 else h // 2)
    low = groups.min(-1, keepdims=True).astype(np.float16).astype(np.float64)
    s = np.maximum((groups.max(-1, keepdims=True) - low) / 15, 2.0**-14)
    s = s.astype(np.float16).astype(np.float64)
    return (np.clip(np.round((groups - low) / s), 0, 15) * s + low).reshape(x.shape)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("h", [8, 48, 64, 256])
def test_codes_are_the_nearest_in_float64(bits, h):
    x = np.random.default_rng(h).standard_normal((3, 5, h)) * [[[0.01]], [[1]], [[30]]]
    x[1, 0] = 0
    codes = encode(jnp.asarray(x, jnp.float32), bits)
    assert codes.shape == x.shape
    found, want = np.asarray(decoded(codes), np.float64), nearest(np.float32(x), bits)
    # A value halfway between two codes may go to either: then it errs no more than the other.
    x = np.float32(x)
    np.testing.assert_allclose(np.abs(found - x), np.abs(want - x), atol=2e-3 * np.abs(x).max())
    assert (np.abs(found - want) < 1e-6 * np.abs(x).max()).mean() > 0.99
    per_value = codes.codes.nbytes + codes.scale.nbytes
    m = h // 32 if h % 64 == 0 else 2
    assert per_value == (15 * (h + 2) if bits == 8 else 15 * (h // 2 + 4 * m))


@pytest.mark.parametrize("bits", [8, 4])
def test_extreme_values_stay_finite_and_near(bits):
    x = jnp.array([[0.0] * 64, [1e-9] * 64, [6e4] * 64, [-6e4, 6e4] * 32, [1e30] * 64])
    found = np.asarray(decoded(encode(x, bits)))
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[:4], x[:4], rtol=0.07, atol=6e-5)


@pytest.fixture(scope="module")
def local(small, random_params):
    """Windows of five keys in two of three layers."""
    config = dataclasses.replace(
        small, n_layers=3, head_dim=16, window=5, local_layers=(True, False, True),
        local_rope_theta=500.0, max_position=256)
    tree = jax.tree.map(lambda a: 0.3 * a, unflatten_dict(random_params(config), sep="/"))
    return config, tree


@pytest.fixture(autouse=True)
def _short_pieces(monkeypatch):
    """Rings that go round within a test."""
    monkeypatch.setattr(cache_module, "PIECE", 4)
    monkeypatch.setattr("rabit_jax.models.engine.PIECE", 4)


def logits_of(engine, tokens, prompt, slots, mask=None):
    """Logits after the prompt and after each further token."""
    run = jax.jit(lambda *arguments: step(*arguments))  # compiled again after a patch
    cache = init_cache(engine.config, tokens.shape[0], slots, engine.cache_bits)
    first = None if mask is None else mask[:, :prompt]
    logits, cache = run(engine, tokens[:, :prompt], cache, first)
    found = [logits]
    for t in range(prompt, tokens.shape[1]):
        logits, cache = run(engine, tokens[:, t : t + 1], cache)
        found.append(logits)
    return np.stack(found, 1), cache


@pytest.mark.parametrize("weights, prompt", [
    ("dense", 10), ("packed", 3), pytest.param("dense", 17, marks=pytest.mark.more)])
def test_a_ring_gives_what_the_whole_sequence_gives(local, apply, weights, prompt, random_packed):
    config, tree = local
    tree = tree if weights == "dense" else random_packed(config, 1)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 24)).astype(np.int32)
    mask = np.arange(24)[None] >= np.array([[0], [2]])
    engine = prepare(config, tree)
    found, cache = logits_of(engine, tokens, prompt, 24, mask)
    want = np.asarray(apply(Decoder(config), tree, tokens, mask))[:, prompt - 1 :]
    np.testing.assert_allclose(found, want, atol=1e-4 if weights == "dense" else 2e-3 * want.std())
    assert isinstance(cache["k"], ByKind)
    assert cache["k"].local.shape[3] == ring_slots(config, 24) == 5 + 4 - 1
    assert cache["k"].full.shape[:4] == (1, 2, config.n_kv_heads, 24)


def test_places_of_a_ring():
    for last in range(20):
        held = {}
        for place in range(last + 1):
            held[place % 7] = place
        found = np.asarray(ring_places(jnp.int32(last), 7))
        assert [p if p >= 0 else None for p in found] == [held.get(slot) for slot in range(7)]


def test_the_period_of_layers():
    for flags, want in (([0] * 6, 1), ([1, 0] * 3, 2), ([1, 1, 0, 1, 1, 0, 1], 3), ([1, 0, 0], 3)):
        assert pattern(np.array(flags, bool)) == want


@pytest.mark.parametrize("bits", [pytest.param(8, marks=pytest.mark.more), 4])
def test_attention_to_codes_is_attention_to_their_values(local, apply, bits, monkeypatch):
    """With the native kernel and without it, and with keys and values rounded beforehand."""
    config, tree = local
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 14)).astype(np.int32)
    engine = prepare(config, tree, cache_bits=bits)
    found, cache = logits_of(engine, tokens, 6, 16)
    assert isinstance(cache["k"].full, Codes)
    monkeypatch.setattr("rabit_jax.models.block.native_attention", lambda q, cache: False)
    other, _ = logits_of(engine, tokens, 6, 16)
    np.testing.assert_allclose(found, other, atol=1e-4)

    append = Slots.append

    def rounded(self, k, v):
        return append(self, *(jnp.asarray(decoded(encode(a, bits)), a.dtype) for a in (k, v)))

    monkeypatch.setattr(Slots, "append", rounded)
    want, _ = logits_of(prepare(config, tree), tokens, 6, 16)
    np.testing.assert_allclose(found, want, atol=1e-4)
    exact = np.asarray(apply(Decoder(config), tree, tokens))[:, 5:]
    error = np.abs(found - exact).mean() / exact.std()
    assert 1e-6 < error < (0.02 if bits == 8 else 0.2)


@pytest.mark.parametrize("bits", [8, pytest.param(4, marks=pytest.mark.more)])
def test_generate_takes_the_bits_of_the_engine(local, bits):
    config, tree = local
    prompt = np.array([[3, 4, 6, 7, 8, 9]], np.int32)
    new = generate(Decoder(config), prepare(config, tree, cache_bits=bits), prompt,
                   max_new_tokens=5)
    engine = prepare(config, tree, cache_bits=bits)
    logits, cache = STEP(engine, prompt, init_cache(engine.config, 1, 11, bits))
    for token in np.asarray(new)[0]:
        assert int(jnp.argmax(logits[0])) == int(token)
        logits, cache = STEP(engine, np.array([[token]], np.int32), cache)


def test_a_cache_of_codes_is_written_in_place(small, random_packed):
    for bits in (8, 4):
        engine = prepare(small, random_packed(small, 1), cache_bits=bits)
        cache = init_cache(engine.config, 1, 512, bits)
        plan = jax.jit(step, donate_argnums=2).lower(
            engine, jnp.zeros((1, 1), jnp.int32), cache).compile().memory_analysis()
        size = tree_bytes((cache["k"], cache["v"]))
        assert plan.alias_size_in_bytes >= size
        floats = init_cache(engine.config, 1, 512)
        assert size < tree_bytes((floats["k"], floats["v"])) / 3


def test_bits_that_there_are_not_are_refused(local):
    with pytest.raises(BadInput, match="cache_bits is 5, wanted 16, 8 or 4"):
        prepare(*local, cache_bits=5)
