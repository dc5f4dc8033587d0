"""SVID against full SVDs in float64, the preconditioner, the stop and the edges."""

import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax.signs.iterative_svid import svid
from rabit_jax.weights.residual_sign import ResidualSign

I, O = 96, 160


@pytest.fixture(scope="module")
def gaussian():
    return np.random.default_rng(0).normal(size=(I, O)).astype(np.float32)


@pytest.fixture(scope="module")
def heavy():
    return np.random.default_rng(1).standard_t(3, size=(I, O)).astype(np.float32)


@pytest.fixture(scope="module")
def published(gaussian, svid64):
    """The published iteration on the Gaussian, by k."""
    return {1: svid64(gaussian, 1, 5), 2: svid64(gaussian, 2, 16)}


@pytest.mark.parametrize("k", [1, 2])
def test_svid_is_the_published_iteration_with_full_svds(k, gaussian, fit, published):
    want = published[k]
    for rounds in (0, 1, 5):
        got = fit(gaussian, k, rounds=rounds)
        assert got.error == pytest.approx(want.errors[rounds], rel=1e-3)
        for i in range(k):
            h, g = want.pairs[rounds][i]
            size = np.outer(h, g)
            found = np.outer(got.h[i].astype(np.float64), got.g[i])
            assert np.linalg.norm(found - size) <= 1e-3 * np.linalg.norm(size)


def test_with_a_heavy_tail_svid_is_no_worse_than_the_published_iteration(heavy, fit, svid64):
    # Some elements have b > a here, where the published signs are not those of the latent.
    want = svid64(heavy, 2, 8).errors
    assert fit(heavy, 2, rounds=0).error == pytest.approx(want[0], rel=1e-3)
    for rounds in (1, 8):
        assert fit(heavy, 2, rounds=rounds).error < want[rounds] * (1 + 1e-3)


def test_refitted_signs_are_those_that_the_latent_gives_back(gaussian, fit, published):
    got = fit(gaussian, 2, rounds=5)
    node = ResidualSign(jnp.asarray(gaussian), jnp.asarray(got.g), jnp.asarray(got.h))
    differ = np.asarray(node.signs()) != np.stack(published[2].signs[5])
    assert differ.mean() < 1e-3


@pytest.mark.parametrize("k", [2, 3])
def test_the_preconditioner_is_undone_in_the_scales(k, gaussian, fit, coupled64):
    rng = np.random.default_rng(5)
    d_in, d_out = np.exp(0.7 * rng.normal(size=I)), np.exp(0.7 * rng.normal(size=O))
    got = fit(gaussian, k, d_in, d_out, rounds=6)
    inner = fit(d_in[:, None] * gaussian * d_out, k, rounds=6)
    outer = got.h[:, :, None] * got.g[:, None, :]
    want = (inner.h / d_in)[:, :, None] * (inner.g / d_out)[:, None, :]
    assert np.linalg.norm(outer - want) <= 1e-3 * np.linalg.norm(want)
    np.testing.assert_allclose(got.h, inner.h / d_in, rtol=5e-3)

    # It pays in its own metric, and the error that is reported is the plain one.
    _, terms, _ = coupled64(gaussian, got.g, got.h)
    _, plain_terms, _ = coupled64(gaussian, *fit(gaussian, k, rounds=6)[:2])
    weighted = [
        np.sum((d_in[:, None] * (gaussian - t.sum(0)) * d_out) ** 2) for t in (terms, plain_terms)
    ]
    assert weighted[0] < 0.9 * weighted[1]
    plain = np.sum((gaussian - terms.sum(0)) ** 2) / np.sum(gaussian.astype(np.float64) ** 2)
    assert got.error == pytest.approx(plain, rel=1e-5)


def test_the_rounds_stop_when_one_gains_less_than_the_tolerance(gaussian, fit, published):
    w, errors = gaussian, np.asarray(published[2].errors)
    gains = (errors[:-1] - errors[1:]) / errors[1:]
    tolerance = 0.004
    below = np.flatnonzero(gains <= tolerance)[0]
    assert abs(gains[below] / tolerance - 1) > 0.02 < gains[below - 1] / tolerance - 1
    got = fit(w, 2, tolerance=tolerance)
    assert got.rounds == below + 1
    assert got.error == pytest.approx(errors[below + 1], rel=1e-3)
    assert fit(w, 2, rounds=3, tolerance=tolerance).rounds == 3
    assert fit(w, 2, rounds=0).rounds == 0


def test_a_heavy_tail_needs_more_rounds_than_a_gaussian(gaussian, heavy, fit):
    assert fit(heavy, 2, tolerance=1e-3).rounds > 1.5 * fit(gaussian, 2, tolerance=1e-3).rounds
    errors = [fit(heavy, 2, rounds=rounds).error for rounds in (10, 20, 40)]
    assert errors[0] > 1.02 * errors[1] > 1.02**2 * errors[2] * 0.99


@pytest.mark.parametrize("k", [3, 4])
def test_more_rounds_never_keep_a_worse_fit(k, heavy, fit):
    errors = [float(fit(heavy, k, rounds=rounds).error) for rounds in (0, 1, 2, 4, 8, 16)]
    assert all(b <= a * (1 + 1e-6) for a, b in zip(errors, errors[1:], strict=False))


@pytest.mark.parametrize("k", [2, 4])
def test_the_best_round_is_kept(k, fit):
    # The first path fits this exactly; later rounds only move the rounding error up and down.
    rng = np.random.default_rng(1)
    # No factor below 1% of the mean: those are floored, so that 16 bits hold them.
    factors = [rng.uniform(0.2, 2, n) * rng.choice([-1, 1], n) for n in (I, O)]
    w = np.outer(*factors)
    errors = [float(fit(w, k, rounds=rounds).error) for rounds in range(8)]
    assert errors[0] < 1e-12
    assert all(b <= a for a, b in zip(errors, errors[1:], strict=False))


def test_the_preconditioner_is_optional(gaussian, fit):
    w = jnp.asarray(gaussian)
    got, want = svid(w, 1, rounds=2, tolerance=0.0), fit(gaussian, 1, rounds=2)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def check_packable(w, got):
    for scale in (got.g, got.h):
        assert np.isfinite(scale).all() and (scale > 0).all()
    ResidualSign(*(jnp.asarray(a) for a in (w, got.g, got.h))).pack("w")


def test_dead_rows_and_columns_keep_scales_that_can_be_packed(gaussian, fit):
    # 0.02 is the usual size of a trained weight.
    w = 0.02 * gaussian
    w[3] = w[50] = w[:, 7] = w[:, 100] = 0
    for k in (1, 2, 3):
        got = fit(w, k, rounds=3)
        assert np.isfinite(got.error)
        check_packable(w, got)


def test_a_dead_row_stays_small(gaussian, fit):
    w = 0.02 * gaussian
    w[3] = 0
    got = fit(w, 2, rounds=3)
    node = ResidualSign(*(jnp.asarray(a) for a in (w, got.g, got.h)))
    assert np.abs(np.asarray(node.dense()[3])).max() < 1e-2 * 0.02


def test_a_matrix_of_one_magnitude_leaves_no_nan(gaussian, fit):
    # The first path is exact and the second has nothing left to fit.
    w = np.where(gaussian >= 0, 0.5, -0.5)
    for k in (1, 2):
        got = fit(w, k, rounds=2)
        assert np.isfinite(got.g).all() and np.isfinite(got.h).all()
        assert got.error < 1e-6


def test_a_matrix_of_zeros_leaves_no_nan(fit):
    got = fit(np.zeros((I, O)), 2, rounds=2)
    assert np.isfinite(got.g).all() and np.isfinite(got.h).all()
