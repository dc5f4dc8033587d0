"""Sequences that share a batch against the same sequences alone, and draws against NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from rabit_jax.models import serving
from rabit_jax.models.decoder import Decoder
from rabit_jax.models.generation import generate
from rabit_jax.models.prepared import prepare

ENDS = np.array([2, 5], np.int32)
PROMPTS = ([3, 4, 6], [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24], [30])
NEW = 14


def sampling(seed=0, temperature=0.0, top_p=1.0, report=False):
    return serving.Sampling(
        jax.random.key(seed)[None], np.float32([temperature]), np.float32([top_p]),
        np.array([report]))


def read(engine, ids, slots=32, piece=16):
    """Logits and cache of a prompt, read in pieces that are padded behind."""
    cache, logits = serving.empty_cache(engine.config, slots), None
    for start in range(0, len(ids), piece):
        part = ids[start : start + piece]
        tokens = np.full((1, piece), 60, np.int32)  # what stands behind means nothing
        tokens[0, : len(part)] = part
        logits, cache = serving.read(engine, cache, tokens, np.int32(start), np.int32(len(part)))
    return logits, cache


def admit(engine, batch, row, ids, settings=None, most=NEW, ends=ENDS, slots=32):
    logits, cache = read(engine, ids, slots)
    return serving.admit(batch, np.int32(row), cache, logits, np.int32(len(ids)),
                         settings or sampling(), np.int32(most), ends)


def took(texts, made, rows):
    """Adds what was made in each row to its text."""
    for row, text in rows.items():
        tokens = np.asarray(made.tokens[row])
        texts[text] += tokens[tokens != serving.NOTHING].tolist()


@pytest.fixture(scope="module")
def kinds(small, random_params, random_packed):
    """Configs with params: dense, packed, and with windows of four keys in one layer."""
    tree = jax.tree.map(lambda a: 0.3 * a, unflatten_dict(random_params(small), sep="/"))
    local = dataclasses.replace(small, window=4, local_layers=(True, False),
                                local_rope_theta=500.0)
    return {"dense": (small, tree), "packed": (small, random_packed(small, 2)),
            "local": (local, tree)}


def alone(config, engine, prompts):
    """The tokens that `generate` makes for each prompt, to its end."""
    longest = max(map(len, prompts))
    tokens = np.array([[0] * (longest - len(ids)) + ids for ids in prompts])
    mask = np.arange(longest)[None] >= longest - np.array([[len(ids)] for ids in prompts])
    rows = np.asarray(generate(Decoder(config), engine, tokens, mask, NEW, eos_ids=tuple(ENDS)))
    stops = [np.flatnonzero(np.isin(row, ENDS)) for row in rows]
    return [row[: stop[0] + 1 if stop.size else NEW].tolist()
            for row, stop in zip(rows, stops, strict=True)]


@pytest.mark.parametrize("kind", ["dense", "local", "packed"])
def test_prompts_that_are_read_together_are_as_if_alone(kinds, kind):
    engine = prepare(*kinds[kind])
    ids = np.concatenate(PROMPTS)
    tokens = np.pad(ids, (0, 32 - len(ids)), constant_values=60).astype(np.int32)
    count = np.array([len(one) for one in PROMPTS], np.int32)
    start = np.array([0, 3, 21], np.int32)
    prompt = np.array([0] * 3 + [1] * 18 + [2] * 11, np.int32)
    together, finite, cache = serving.read_together(engine, tokens, prompt, start, count)
    assert finite
    for n, one in enumerate(PROMPTS):
        want, own = read(engine, one)
        logits, found = serving.one_of(
            engine.config, together, cache, np.int32(n), start, count, 32)
        np.testing.assert_allclose(logits, want, atol=2e-4 * float(jnp.abs(want).max()))
        assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, own)
        for a, b in zip(jax.tree.leaves((found.k, found.v)), jax.tree.leaves((own.k, own.v)),
                        strict=True):
            assert not a[..., len(one):, :].any()
            np.testing.assert_allclose(a[..., : len(one), :], b[..., : len(one), :], atol=1e-3)


def test_a_prompt_that_overflows_is_told_of(kinds):
    config, tree = kinds["dense"]
    table = tree["embed"]["embedding"]
    tree = {**tree, "embed": {"embedding": table.at[30].set(jnp.nan)}}
    tokens, prompt = np.array([3, 4, 30], np.int32), np.array([0, 0, 1], np.int32)
    start, count = np.array([0, 2], np.int32), np.array([2, 1], np.int32)
    for engine, finite in ((prepare(config, tree), False), (prepare(*kinds["dense"]), True)):
        assert serving.read_together(engine, tokens, prompt, start, count)[1] == finite


@pytest.mark.parametrize("kind, rows, slots", [
    ("dense", 5, 48), ("local", 3, 32), pytest.param("packed", 3, 32, marks=pytest.mark.more)])
def test_each_row_is_continued_as_if_alone(kinds, kind, rows, slots):
    """Rows come one after another, change places and the size of the batch, and end apart."""
    config, tree = kinds[kind]
    engine = prepare(config, tree)
    batch, texts = serving.empty(engine.config, 3, 32), [[], [], []]
    for n, ids in enumerate(PROMPTS):
        batch, made = admit(engine, batch, n, ids)
        took(texts, made, {0: n})
        batch, made = serving.decode(engine, batch, ENDS, 2)
        took(texts, made, {row: row for row in range(n + 1)})
    source = np.zeros(rows, np.int32)
    source[:3] = 2, 0, 1
    batch = serving.resize(engine.config, batch, source, np.int32(3), slots)
    while np.asarray(batch.left).any():
        batch, made = serving.decode(engine, batch, ENDS, 2)
        took(texts, made, {0: 2, 1: 0, 2: 1})
        assert (np.asarray(made.tokens[3:]) == serving.NOTHING).all()
    assert texts == alone(config, engine, PROMPTS)
    assert sum(map(len, texts)) > 20


def test_a_stopped_row_makes_nothing_and_a_row_can_be_taken_again(kinds):
    engine = prepare(*kinds["dense"])
    batch = serving.empty(engine.config, 2, 32)
    batch, first = admit(engine, batch, 0, PROMPTS[1], most=12, ends=ENDS[:0])
    batch, _ = admit(engine, batch, 1, PROMPTS[0], most=12, ends=ENDS[:0])
    batch = serving.stop(batch, np.int32(0))
    batch, made = serving.decode(engine, batch, ENDS[:0], 5)
    assert (made.tokens[0] == serving.NOTHING).all() and (made.tokens[1] >= 0).all()
    batch, again = admit(engine, batch, 0, PROMPTS[1], most=12, ends=ENDS[:0])
    assert int(again.tokens[0, 0]) == int(first.tokens[0, 0])


def test_log_probabilities_are_those_of_whole_passes(kinds, apply):
    config, tree = kinds["dense"]
    engine, ids = prepare(config, tree), PROMPTS[0]
    batch = serving.empty(engine.config, 2, 32)
    batch, one = admit(engine, batch, 1, ids, sampling(3, 1.3, 0.9, report=True), 6, ENDS[:0])
    batch, more = serving.decode(engine, batch, ENDS[:0], 5)
    tokens = [int(one.tokens[0, 0]), *np.asarray(more.tokens[1]).tolist()]
    whole = np.asarray(apply(Decoder(config), tree, np.array([[*ids, *tokens]])), np.float64)[0]
    for n, token in enumerate(tokens):
        logits = whole[len(ids) - 1 + n]
        logs = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        made, row, m = (one, 0, 0) if n == 0 else (more, 1, n - 1)
        np.testing.assert_allclose(made.logprob[row, m], logs[token], atol=1e-4)
        order = np.argsort(-logs)[: serving.ALTERNATIVES]
        np.testing.assert_array_equal(made.top[row, m], order)
        np.testing.assert_allclose(made.top_logprobs[row, m], logs[order], atol=1e-4)


def test_draws_are_fixed_by_the_row_and_not_by_its_neighbours(kinds):
    engine = prepare(*kinds["dense"])

    def text(row, *neighbours):
        batch = serving.empty(engine.config, 2, 32)
        for other, settings in neighbours:
            batch, _ = admit(engine, batch, other, PROMPTS[2], settings, ends=ENDS[:0])
        batch, one = admit(engine, batch, row, PROMPTS[0], sampling(7, 1.0), ends=ENDS[:0])
        batch, made = serving.decode(engine, batch, ENDS[:0], 5)
        return [int(one.tokens[0, 0]), *np.asarray(made.tokens[row]).tolist()]

    own = text(0)
    assert len(set(own)) > 3
    assert text(1, (0, sampling(1, 2.0, 0.5, report=True))) == own


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7), (2.0, 0.6)])
def test_frequencies_match_numpy(temperature, top_p):
    """40,000 draws: a frequency's standard deviation is at most 0.0025."""
    logits = np.random.default_rng(0).normal(size=10).astype(np.float32) * 1.5
    p = np.exp(logits.astype(np.float64) / temperature)
    p /= p.sum()
    kept, total = [], 0.0
    for i in np.argsort(-p):
        if total < top_p:
            kept.append(i)
            total += p[i]
    wanted = np.zeros(10)
    wanted[kept] = p[kept] / total
    n = 40000
    settings = serving.Sampling(
        jnp.broadcast_to(jax.random.key(5), n), jnp.full(n, temperature), jnp.full(n, top_p),
        jnp.zeros(n, bool))
    draws = jax.jit(serving.pick_by_row)(jnp.tile(logits, (n, 1)), settings, jnp.arange(n))
    found = np.bincount(np.asarray(draws), minlength=10) / n
    np.testing.assert_allclose(found, wanted, atol=0.011)
    assert (found[wanted == 0] == 0).all()


def test_a_row_with_broken_logits_ends_and_harms_no_other(kinds):
    config, tree = kinds["dense"]
    engine = prepare(config, tree)
    bad = np.full((1, config.vocab_size), np.nan, np.float32)
    batch = serving.empty(engine.config, 2, 32)
    batch, fine = admit(engine, batch, 0, PROMPTS[0], ends=ENDS[:0])
    _, cache = read(engine, PROMPTS[2])
    batch, made = serving.admit(batch, np.int32(1), cache, bad, np.int32(1), sampling(),
                                np.int32(NEW), ENDS[:0])
    assert bool(made.broken[0]) and int(made.tokens[0, 0]) == serving.NOTHING
    assert not bool(fine.broken[0]) and np.asarray(batch.left).tolist() == [NEW - 1, 0]


def test_the_cache_is_written_in_place(kinds):
    engine = prepare(*kinds["packed"])
    batch = serving.empty(engine.config, 2, 512)
    plan = serving.decode.lower(engine, batch, ENDS, 4).compile().memory_analysis()
    assert plan.alias_size_in_bytes >= 2 * batch.k.nbytes
    # Work space for one layer's keys and values, no other copy.
    assert plan.temp_size_in_bytes < 1.5 * batch.k.nbytes
