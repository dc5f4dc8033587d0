"""Perplexity against a float64 hand computation from full logits."""

import math
from functools import partial

import jax
import numpy as np
import pytest

from rabit_jax.errors import BadInput
from rabit_jax.evaluate.perplexities import perplexity, unigram_entropy
from rabit_jax.train.sharding import batch_sharding, make_mesh, param_shardings
from rabit_jax.weights.conversion import dense


@pytest.fixture(scope="module")
def windows():
    return np.random.default_rng(0).integers(0, 53, (5, 11))


@partial(jax.jit, static_argnums=0)
def full_logits(model, params, tokens):
    return model.apply({"params": params}, tokens)


def nats_by_hand(model, params, windows):
    """Mean of -log softmax(z_{s-1})[w_s] over windows and s = 1 .. t-1."""
    losses = []
    logits = np.asarray(full_logits(model, params, windows.astype(np.int32)), np.float64)
    for window, z in zip(windows, logits, strict=True):
        for s in range(1, len(window)):
            losses.append(np.log(np.sum(np.exp(z[s - 1]))) - z[s - 1, window[s]])
    return np.mean(losses)


@pytest.mark.parametrize("batch_size, chunk", [(2, 4), (8, 256)])
def test_against_hand_computation(model, teacher, windows, batch_size, chunk):
    calls = []
    found = perplexity(
        model, teacher, windows, batch_size=batch_size, chunk=chunk, text_bytes=300,
        total_tokens=60, progress=lambda *at: calls.append(at),
    )
    nats = nats_by_hand(model, teacher, windows)
    assert found.nats_per_token == pytest.approx(nats, rel=1e-6)
    assert found.ppl == pytest.approx(math.exp(nats), rel=1e-5)
    # 60 tokens for 300 bytes: each of the 50 scored tokens stands for 5 bytes.
    assert found.bits_per_byte == pytest.approx(50 * nats / math.log(2) / 250, rel=1e-6)
    assert (found.tokens, found.context) == (50, 11)
    assert calls[-1] == (5, 5) and len(calls) == -(-5 // batch_size)


def test_without_bytes_there_are_no_bits_per_byte(model, teacher, windows):
    found = perplexity(model, teacher, windows, batch_size=2, chunk=4)
    assert found.bits_per_byte is None


def test_weight_nodes_score_like_their_matrices(model, teacher, make_student, windows):
    student = make_student(teacher, 2)
    found = perplexity(model, student, windows, batch_size=5, chunk=0)
    want = nats_by_hand(model, dense(student), windows)
    assert found.nats_per_token == pytest.approx(want, rel=1e-5)


def test_on_a_mesh(model, teacher, windows):
    mesh = make_mesh({"data": 4, "tensor": 2})
    placed = jax.device_put(teacher, param_shardings(teacher, mesh))
    found = perplexity(model, placed, windows, batch_size=4, batch_sharding=batch_sharding(mesh))
    assert found.nats_per_token == pytest.approx(nats_by_hand(model, teacher, windows), rel=1e-5)


class Spy:
    """A decoder that notes how many positions at once it is asked to project."""

    def __init__(self, model):
        self.model, self.positions = model, []

    def apply(self, variables, x, method):
        if method == "head":
            self.positions.append(x.shape[1])
        return self.model.apply(variables, x, method=method)


def test_logits_are_made_in_chunks(model, teacher, windows):
    spy = Spy(model)
    perplexity(spy, teacher, windows, batch_size=2, chunk=4)
    assert set(spy.positions) == {4}


def test_a_hopeless_model_has_infinite_perplexity(model, teacher, windows):
    kernel = np.zeros((16, 53), np.float32)
    kernel[:, 0] = 1e5 * np.asarray(teacher["final_norm"]["scale"])
    hopeless = {**teacher, "head": {"kernel": kernel}}
    found = perplexity(model, hopeless, windows, batch_size=2, chunk=4)
    assert found.ppl == math.inf and math.isfinite(found.nats_per_token)


def test_unigram_entropy():
    assert unigram_entropy(np.arange(8).reshape(2, 4), 10) == pytest.approx(math.log(8))
    by_hand = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert unigram_entropy(np.array([3, 3, 1, 3]), 4) == pytest.approx(by_hand)
    assert unigram_entropy(np.array([2]), 3) == 0


def test_bad_input(model, teacher, windows):
    cases = [
        (windows[0], {}, r"wanted int \[n, t\]"),
        (windows[:, :1], {}, r"wanted int \[n, t\]"),
        (windows[:0], {}, r"wanted int \[n, t\]"),
        (windows.astype(float), {}, r"wanted int \[n, t\]"),
        (windows, {"text_bytes": 10}, "needs both"),
        (windows, {"batch_size": 0}, "batch_size 0"),
    ]
    for bad, settings, message in cases:
        with pytest.raises(BadInput, match=message):
            perplexity(model, teacher, bad, **{"batch_size": 2, **settings})
    for ids in (np.array([], int), np.array([4]), np.array([-1])):
        with pytest.raises(BadInput, match=r"0\.\.3"):
            unigram_entropy(ids, 4)
