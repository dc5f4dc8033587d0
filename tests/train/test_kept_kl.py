"""KL to the teacher's likeliest tokens, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax.train.losses import likeliest, summed_kept_kl, summed_kl

B, T, D, V = 2, 7, 6, 19


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    return {
        "student": rng.normal(size=(B, T, D)).astype(np.float32),
        "teacher": rng.normal(size=(B, T, D)).astype(np.float32),
        "heads": [rng.normal(size=(D, V)).astype(np.float32) for _ in range(2)],
        "mask": np.arange(T)[None] < np.asarray([[7], [4]]),
    }


def head(matrix):
    return lambda x: x @ matrix


def log_softmax(features, matrix):
    z = np.asarray(features, np.float64) @ np.asarray(matrix, np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def reference(case, top):
    """The sum and the mass that is not kept, of every position."""
    log_q = log_softmax(case["student"], case["heads"][0])
    log_p = log_softmax(case["teacher"], case["heads"][1])
    order = np.argsort(-log_p, axis=-1, kind="stable")
    kept, others = order[..., :top], order[..., top:]
    p, q = np.exp(log_p), np.exp(log_q)
    pick = np.take_along_axis
    total = (pick(p, kept, -1) * (pick(log_p, kept, -1) - pick(log_q, kept, -1))).sum(-1)
    rest, rest_q = pick(p, others, -1).sum(-1), pick(q, others, -1).sum(-1)
    if top < V:
        total += rest * np.log(rest / rest_q)
    return float((total * case["mask"]).sum()), rest


@pytest.mark.parametrize("top", [1, 5, V])
@pytest.mark.parametrize("chunk", [0, 3])
def test_it_is_the_kl_of_the_kept_tokens_and_the_rest_as_one(case, top, chunk):
    taught = likeliest(head(case["heads"][1]), jnp.asarray(case["teacher"]), top, chunk)
    assert taught["ids"].shape == (B, T, top)
    wanted, rest = reference(case, top)
    np.testing.assert_allclose(np.exp(taught["log_rest"]), rest, atol=1e-6)
    found = summed_kept_kl(
        head(case["heads"][0]), jnp.asarray(case["student"]), taught, jnp.asarray(case["mask"]),
        chunk)
    np.testing.assert_allclose(found, wanted, rtol=2e-5)


def test_it_is_a_lower_bound_that_is_exact_with_all_tokens(case):
    heads = [head(matrix) for matrix in case["heads"]]
    student, teacher, mask = (jnp.asarray(case[n]) for n in ("student", "teacher", "mask"))

    def kept(top, student):
        return summed_kept_kl(heads[0], student, likeliest(heads[1], teacher, top), mask)

    def exact(student):
        return summed_kl(*heads, student, teacher, mask)

    values = [float(kept(top, student)) for top in (1, 4, 10, V)]
    assert values == sorted(values) and values[0] < float(exact(student))
    np.testing.assert_allclose(values[-1], exact(student), rtol=1e-5)
    a, b = (jax.grad(f)(student) for f in (lambda s: kept(V, s), exact))
    np.testing.assert_allclose(a, b, atol=1e-6)
    # The distribution of the kept tokens is all it asks for: the teacher itself gives 0.
    itself = summed_kept_kl(heads[1], teacher, likeliest(heads[1], teacher, 3), mask)
    np.testing.assert_allclose(itself, 0, atol=1e-5)


def test_gradients_stay_finite_where_the_kept_tokens_have_all_of_the_mass():
    taught = {"ids": jnp.zeros((1, 1, 1), jnp.int32), "log_p": jnp.zeros((1, 1, 1)),
              "log_rest": jnp.full((1, 1), float(np.finfo(np.float32).min))}
    mask = jnp.ones((1, 1))
    sharp = jnp.asarray([[300.0, 0.0, 0.0]])
    gradient = jax.grad(lambda m: summed_kept_kl(head(m), jnp.ones((1, 1, 1)), taught, mask))(sharp)
    assert bool(jnp.isfinite(gradient).all())
