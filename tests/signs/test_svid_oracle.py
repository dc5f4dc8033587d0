"""SVID against the scalar-scale Gaussian: an independent iteration on a grid of quantiles."""

import numpy as np
import pytest
from scipy.stats import norm


def scalar_iteration(q, rounds):
    """k = 2 with scalar scales: `(a, b, relative MSE, corr(W_1, W_2))` after each round."""
    sign = lambda x: np.where(x >= 0, 1.0, -1.0)  # noqa: E731
    found = []
    b1, a = sign(q), np.mean(np.abs(q))
    b2, b = sign(q - a * b1), np.mean(np.abs(q - a * b1))
    for _ in range(rounds + 1):
        error = np.mean((q - a * b1 - b * b2) ** 2) / np.mean(q**2)
        found.append((a, b, error, np.corrcoef(a * b1, b * b2)[0, 1]))
        e = q - b * b2
        b1, a = sign(e), np.mean(np.abs(e))
        e = q - a * b1
        b2, b = sign(e), np.mean(np.abs(e))
    return found


def quantiles(n):
    return norm.ppf((np.arange(n) + 0.5) / n)


def test_the_oracle_gives_the_published_figures():
    found = scalar_iteration(quantiles(400_000), 200)
    errors = [round_[2] for round_ in found]
    expected = {0: 0.1305, 1: 0.1221, 2: 0.1192, 3: 0.1182, 5: 0.1176, 10: 0.1175}
    for rounds, error in expected.items():
        assert errors[rounds] == pytest.approx(error, abs=1e-4)
    assert found[0][:2] == pytest.approx((0.798, 0.483), abs=1e-3)
    assert found[0][3] == pytest.approx(-0.150, abs=1e-3)
    assert found[10][3] == pytest.approx(-0.346, abs=1e-3)
    # The limit is the four-level Lloyd-Max quantiser of the Gaussian.
    assert found[-1][:2] == pytest.approx((0.9816, 0.5288), abs=2e-4)


@pytest.mark.parametrize("rounds", [0, 1, 2, 3, 5, 10])
def test_svid_of_a_circulant_matrix_is_the_scalar_iteration(rounds, fit, coupled64):
    # Every row and every column holds the same numbers, so the best rank-1 scales are constant.
    q = quantiles(256)
    n = np.arange(len(q))
    w = q[(n[:, None] + n[None, :]) % len(q)].astype(np.float32)
    a, b, error, correlation = scalar_iteration(w[0].astype(np.float64), rounds)[-1]
    got = fit(w, 2, rounds=rounds)
    assert got.rounds == rounds
    scales = got.h[:, :, None] * got.g[:, None, :]
    np.testing.assert_allclose(scales[0], a, atol=1e-4)
    np.testing.assert_allclose(scales[1], b, atol=1e-4)
    assert got.error == pytest.approx(error, abs=1e-4)
    _, terms, _ = coupled64(w, got.g, got.h)
    found = np.corrcoef(terms[0].ravel(), terms[1].ravel())[0, 1]
    assert found == pytest.approx(correlation, abs=1e-4)


@pytest.mark.parametrize("k, bound", [(3, 0.038), (4, 0.016)])
def test_more_paths_on_a_gaussian_after_ten_rounds(k, bound, fit):
    w = np.random.default_rng(k).normal(size=(256, 256))
    got = fit(w, k, rounds=10)
    assert got.error <= bound
    assert got.error < fit(w, k, rounds=0).error
