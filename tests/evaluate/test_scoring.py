"""Continuations against a float64 hand computation from full logits."""

from functools import partial

import jax
import numpy as np
import pytest

from rabit_jax import pack
from rabit_jax.errors import BadInput
from rabit_jax.evaluate.scoring import CHOICES, FEWEST, SHORTEST, Request, batches, score
from rabit_jax.train.sharding import AXES, batch_sharding, make_mesh, param_shardings
from rabit_jax.weights.conversion import dense

ROWS = 20  # more than there are requests: one shape for all calls


@partial(jax.jit, static_argnums=0)
def full_logits(model, params, tokens):
    return model.apply({"params": params}, tokens)


@pytest.fixture(scope="module")
def requests():
    """Lengths 2 to 40; several that differ in their last token alone; one the model would say."""
    rng = np.random.default_rng(0)
    found = [Request(rng.integers(0, 53, n).tolist(), scored)
             for n, scored in [(2, 1), (9, 4), (40, 39), (33, 1), (21, 18)]]
    shared = found[1].tokens[:-1]
    return found + [Request([*shared, last], 1 + last % 3) for last in range(10)]


def by_hand(model, params, requests):
    """sum_s log softmax(z_{s-1})[w_s], and whether every w_s is the argmax of z_{s-1}."""
    padded = np.zeros((ROWS, 40), np.int32)
    for row, (tokens, _) in zip(padded, requests, strict=False):
        row[: len(tokens)] = tokens
    logits = np.asarray(full_logits(model, params, padded), np.float64)
    out = []
    for (tokens, scored), z in zip(requests, logits, strict=False):
        steps = range(len(tokens) - scored, len(tokens))
        log_p = [z[s - 1, tokens[s]] - np.log(np.exp(z[s - 1]).sum()) for s in steps]
        out.append((sum(log_p), all(z[s - 1].argmax() == tokens[s] for s in steps)))
    return out


def collected(pairs, count):
    found = dict(pair for batch in pairs for pair in batch)
    assert sorted(found) == list(range(count))
    return [found[n] for n in range(count)]


def agree(found, wanted):
    np.testing.assert_allclose([f.logprob for f in found], [w[0] for w in wanted], rtol=1e-5)
    assert [f.greedy for f in found] == [w[1] for w in wanted]


@pytest.mark.parametrize("batch_size, chunk, grid", [(4, 6, None), (ROWS, 256, (2, 2, 2))])
def test_against_hand_computation(model, teacher, requests, batch_size, chunk, grid):
    # Two more: what the model itself says after the first request, and the wrong end of it.
    start = np.zeros((ROWS, 40), np.int32)
    start[0, :2] = requests[0].tokens
    said = [*requests[0].tokens, int(full_logits(model, teacher, start)[0, 1].argmax())]
    requests = [*requests, Request(said, 1), Request([*said[:-1], (said[-1] + 1) % 53], 1)]
    params, rows = teacher, None
    if grid:
        mesh = make_mesh(dict(zip(AXES, grid, strict=True)))
        params, rows = jax.device_put(teacher, param_shardings(teacher, mesh)), batch_sharding(mesh)
    found = collected(score(model, params, requests, batch_size=batch_size, chunk=chunk,
                            batch_sharding=rows), len(requests))
    agree(found, by_hand(model, teacher, requests))
    assert [found[-2].greedy, found[-1].greedy] == [True, False]


@pytest.mark.more
def test_weight_nodes_score_like_their_matrices(model, teacher, make_student, requests):
    student = make_student(teacher, 2)
    for params in (student, pack(student)):
        found = collected(score(model, params, requests, batch_size=ROWS), len(requests))
        agree(found, by_hand(model, dense(params), requests))


def test_few_shapes_and_shared_rows(requests):
    found = list(batches(requests, 4))
    assert sum(len(batch.members) for batch in found) == 6  # 10 + 1 requests in 2 rows
    assert max(len(members) for batch in found for members in batch.members) == CHOICES
    for batch in found:
        assert batch.tokens.shape[0] == 4 and batch.tokens.shape[1] in (SHORTEST, 2 * SHORTEST)
        assert batch.labels.shape[1] in (FEWEST, 4 * FEWEST, batch.tokens.shape[1])
        assert batch.labels.shape[2] in (1, CHOICES)
    assert next(batches(requests, 4, longest=39)).tokens.shape[1] == 39


class Spy:
    """A decoder that stops at the head and says how many positions it was to project."""

    def __init__(self, model):
        self.model = model

    def apply(self, variables, x, method):
        if method == "head":
            raise ValueError(f"{x.shape[1]} positions")
        return self.model.apply(variables, x, method=method)


def test_the_head_reads_scored_positions_in_chunks(model, teacher, requests):
    one, many = requests[3], requests[2]
    assert (one.scored, many.scored) == (1, 39)
    for request, chunk, positions in [(one, 256, FEWEST), (many, 256, 40), (many, 6, 6)]:
        with pytest.raises(ValueError, match=f"^{positions} positions"):
            list(score(Spy(model), teacher, [request], batch_size=1, chunk=chunk, longest=40))


def test_damaged_weights(model, teacher, requests):
    broken = {**teacher, "final_norm": {"scale": np.full(16, np.nan, np.float32)}}
    with pytest.raises(BadInput, match="NaN or infinity"):
        collected(score(model, broken, requests, batch_size=4, chunk=6), len(requests))
