"""Generation against full forward passes, and sampling against NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax.errors import BadInput
from rabit_jax.models.decoder import Decoder
from rabit_jax.models.generation import generate, pick, stream
from rabit_jax.models.prepared import prepare


@pytest.fixture(scope="module")
def greedy(model, params, apply):
    """Argmax of a pass over the whole sequence, again for every new token.

    The places still to come hold zeros, which a causal model cannot see; so one length compiles.
    """
    def run(tokens, steps):
        end = tokens.shape[1]
        text = np.pad(np.asarray(tokens), ((0, 0), (0, 21 - end)))
        for t in range(end, end + steps):
            text[:, t] = np.asarray(apply(model, params, text)[:, t - 1]).argmax(-1)
        return text[:, end : end + steps]

    return run


def test_greedy_is_the_argmax_of_full_passes(model, params, tokens, greedy):
    found = generate(model, params, tokens, max_new_tokens=10)
    assert found.shape == (2, 10) and found.dtype == jnp.int32
    np.testing.assert_array_equal(found, greedy(tokens, 10))


def test_left_padding_changes_no_text(model, params, tokens, greedy):
    short = tokens[1:, 4:]
    batch = jnp.stack([tokens[0], jnp.pad(short[0], (4, 0), constant_values=7)])
    mask = jnp.ones((2, 9), bool).at[1, :4].set(False)
    found = generate(model, params, batch, mask, max_new_tokens=8)
    np.testing.assert_array_equal(found[:1], greedy(tokens[:1], 8))
    np.testing.assert_array_equal(found[1:], greedy(short, 8))


def test_rows_end_at_eos_and_are_filled(model, params, tokens):
    free = np.asarray(generate(model, params, tokens, max_new_tokens=10))
    other, eos = 60, int(free[0, 3])
    found = np.asarray(generate(model, params, tokens, max_new_tokens=10, eos_ids=(other, eos)))
    for row, plain in zip(found, free, strict=True):
        ends = np.flatnonzero(np.isin(plain, (other, eos)))
        stop = ends[0] + 1 if ends.size else 10
        np.testing.assert_array_equal(row[:stop], plain[:stop])
        assert (row[stop:] == other).all()
    assert (found[0, 4:] == other).all()


def test_sampling_is_fixed_by_the_key(model, params, tokens, greedy):
    def sample(seed, **settings):
        return np.asarray(generate(model, params, tokens, max_new_tokens=12, temperature=1.0,
                                   key=jax.random.key(seed), **settings))

    np.testing.assert_array_equal(sample(0), sample(0))
    assert not np.array_equal(sample(0), sample(1))
    # Uniform logits: a key that stood still would repeat one token, or one row.
    flat = np.asarray(generate(model, jax.tree.map(np.zeros_like, jax.device_get(params)), tokens,
                               max_new_tokens=12, temperature=1.0, key=jax.random.key(0)))
    assert min(len(set(row)) for row in flat) > 6 and not np.array_equal(*flat)
    # A nucleus that holds one token is greedy.
    np.testing.assert_array_equal(sample(3, top_p=1e-6), greedy(tokens, 12))


@pytest.mark.parametrize("temperature", [1e-300, 1e-38, 1e-7])
def test_temperatures_that_float32_cannot_divide_by_are_greedy(model, params, tokens, temperature):
    """Scaled logits would overflow, and the first infinity would win."""
    settings = {"max_new_tokens": 4, "temperature": temperature, "key": jax.random.key(0)}
    np.testing.assert_array_equal(generate(model, params, tokens, **settings),
                                  generate(model, params, tokens, max_new_tokens=4))


@pytest.mark.parametrize("settings", [
    pytest.param({}, marks=pytest.mark.more),
    {"temperature": 0.9, "top_p": 0.9, "key": jax.random.key(4)},
], ids=["greedy", "nucleus"])
def test_stream_gives_what_generate_gives(model, params, tokens, settings):
    settings = {"max_new_tokens": 12, **settings}
    engine = prepare(model.config, params)
    whole = np.asarray(generate(model, params, tokens, **settings))
    chunks = list(stream(model, engine, tokens, chunk=5, **settings))
    assert [chunk.shape for chunk in chunks] == [(2, 1), (2, 5), (2, 5), (2, 1)]
    np.testing.assert_array_equal(np.concatenate(chunks, axis=1), whole)
    # With an end token: no more is given than the longest row needs.
    eos = (int(whole[0, 3]), int(whole[1, 6]))
    ended = np.asarray(generate(model, engine, tokens, **settings, eos_ids=eos))
    chunks = list(stream(model, engine, tokens, chunk=5, **settings, eos_ids=eos))
    found = np.concatenate(chunks, axis=1)
    longest = max(np.flatnonzero(np.isin(row, eos))[0] for row in ended) + 1
    assert found.shape == (2, longest)
    np.testing.assert_array_equal(found, ended[:, :longest])
    assert (ended[:, longest:] == eos[0]).all()


def test_weights_that_give_nan_are_told(model, params, tokens):
    free = np.asarray(generate(model, params, tokens, max_new_tokens=10))
    n = next(n for n in range(2, 9) if free[0, n] not in [*free[0, :n], *np.ravel(tokens)]
             and free[0, n] not in free[1])
    token = int(free[0, n])
    table = params["embed"]["embedding"]
    broken = {**params, "embed": {"embedding": table.at[token].set(jnp.nan)}}
    # The token is read by the step after it, the one that gives token n + 2.
    with pytest.raises(BadInput, match=f"NaN or infinity at new token {n + 2}: "):
        generate(model, broken, tokens, max_new_tokens=10)
    # A row that has ended there does no harm to the others.
    found = np.asarray(generate(model, broken, tokens, max_new_tokens=10, eos_ids=(token,)))
    np.testing.assert_array_equal(found[1], free[1])
    with pytest.raises(BadInput, match="at new token 1: the weights are damaged"):
        generate(model, jax.tree.map(lambda a: a * jnp.nan, params), tokens, max_new_tokens=10)


def test_stream_checks_its_input_at_once(model, params):
    with pytest.raises(BadInput, match="empty prompt"):
        stream(model, params, np.zeros((1, 0), np.int32))


@pytest.mark.parametrize("mode, temperature, top_p", [
    ("sample", 1.0, 1.0), ("sample", 0.5, 1.0), ("nucleus", 1.0, 0.7), ("nucleus", 2.0, 0.6),
])
def test_frequencies_match_numpy(mode, temperature, top_p):
    """40,000 draws: a frequency's standard deviation is at most 0.0025."""
    logits = np.random.default_rng(0).normal(size=10).astype(np.float32) * 1.5
    p = np.exp(logits.astype(np.float64) / temperature)
    p /= p.sum()
    order = np.argsort(-p)
    kept, total = [], 0.0
    for i in order:
        if total >= top_p:
            break
        kept.append(i)
        total += p[i]
    wanted = np.zeros(10)
    wanted[kept] = p[kept] / total
    draws = pick(jnp.tile(logits, (40000, 1)), jax.random.key(5), mode, jnp.float32(temperature),
                 jnp.float32(top_p))
    found = np.bincount(np.asarray(draws), minlength=10) / 40000
    np.testing.assert_allclose(found, wanted, atol=0.011)
    assert (found[wanted == 0] == 0).all()


def test_the_last_position_can_be_used(config, params, tokens):
    c = dataclasses.replace(config, max_position=12, dtype="bfloat16", remat=True)
    assert generate(Decoder(c), params, tokens, max_new_tokens=3).shape == (2, 3)
    with pytest.raises(BadInput, match="the model has 12 positions"):
        generate(Decoder(c), params, tokens, max_new_tokens=4)


@pytest.mark.parametrize("change, message", [
    ({"tokens": np.zeros((1, 0), np.int32)}, "empty prompt"),
    ({"tokens": np.zeros((0, 4), np.int32)}, "empty prompt"),
    ({"tokens": np.array([[3, 99]])}, "vocabulary has 0..60"),
    ({"mask": np.array([[True, False]])}, "padded on the left"),
    ({"mask": np.array([[True]])}, "wanted the same shape"),
    ({"max_new_tokens": 0}, "makes at least 1"),
    ({"temperature": -1.0}, "wanted 0 <= temperature"),
    ({"temperature": float("inf")}, "wanted 0 <= temperature"),
    ({"top_p": 0.0}, "0 < top_p <= 1"),
    ({"temperature": 1.0}, "wants a key"),
])
def test_bad_input(model, params, change, message):
    call = {"tokens": np.array([[3, 4]]), "max_new_tokens": 2} | change
    with pytest.raises(BadInput, match=message):
        generate(model, params, **call)
