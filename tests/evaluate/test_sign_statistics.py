"""Sign flips, order of the scales and the histogram, against cases made by hand."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax.errors import BadInput
from rabit_jax.evaluate.sign_statistics import (
    disordered_share,
    flip_rate,
    mean_flip_rate,
    snapshot,
    weight_histogram,
)
from rabit_jax.weights.conversion import pack
from rabit_jax.weights.residual_sign import ResidualSign


def node(latent, a):
    """A ResidualSign with scalar scales `a: [k]`."""
    latent = jnp.asarray(latent, jnp.float32)
    *lead, i, o = latent.shape
    a = jnp.asarray(a, jnp.float32)[:, None]
    g = jnp.broadcast_to(a, (*lead, len(a), o)) if lead else a * jnp.ones((1, o))
    return ResidualSign(latent, g, jnp.ones((*lead, len(a), i)))


def test_flips_made_by_hand():
    # Levels of a = 2, b = 1: the first path's sign is that of w, the second's that of |w| - 2.
    w = np.full((2, 3, 4), 2.5)
    moved = w.copy()
    moved[0, 0, 0] = 1.5        # second sign only
    moved[1, 0, :2] = -1.5      # w - 2 s goes from +.5 to +.5: first sign only
    moved[1, 2, 3] = -2.5       # both signs
    params = {"big": {"kernel": node(w, [2, 1])}, "small": node(np.ones((1, 4)), [1]), "norm": w}
    after = {**params, "big": {"kernel": node(moved, [2, 1])}}
    signs = snapshot(params)
    assert signs["big/kernel"].shape == (2, 2, 3, 4) and signs["big/kernel"].dtype == bool
    rates = flip_rate(signs, snapshot(after))
    np.testing.assert_allclose(rates["big/kernel"], np.array([[0, 1], [3, 2 - 1]]) / 12, rtol=1e-6)
    np.testing.assert_array_equal(rates["small"], [0])
    assert mean_flip_rate(signs, snapshot(after)) == pytest.approx(5 / (2 * 2 * 12 + 4))


def test_packed_signs_are_the_same(teacher, make_student):
    student = make_student(teacher, 2)
    assert mean_flip_rate(snapshot(student), snapshot(pack(student))) == 0


def test_trees_without_signs():
    plain = {"w": jnp.ones((2, 2))}
    assert snapshot(plain) == {}
    assert mean_flip_rate({}, {}) is None
    assert disordered_share(plain) is None


def test_snapshots_of_different_models_do_not_compare():
    one, two = (snapshot({name: node(np.ones((2, 2)), [1])}) for name in "wv")
    with pytest.raises(BadInput, match="differ at"):
        flip_rate(one, two)


def test_disordered_share_by_hand():
    # a = h_1 g_1, b = h_2 g_2 element by element:      a       b
    g = jnp.asarray([[1.0, 2.0, -1.0], [0.5, 2.0, 0.5]])
    h = jnp.asarray([[1.0, 3.0], [1.0, 1.0]])
    # row h = (1, 1): .5 < 1, 2 = 2 (bad), a < 0 (bad); row h = (3, 1): fine, fine, bad
    params = {"a": ResidualSign(jnp.ones((2, 3)), g, h), "b": node(np.ones((2, 3, 4)), [2, 1])}
    assert disordered_share(params) == pytest.approx(3 / (6 + 24))
    assert disordered_share({"b": params["b"]}) == 0
    assert disordered_share({"b": node(np.ones((2, 2)), [1, 1])}) == 1
    assert disordered_share({"c": node(np.ones((2, 2)), [1])}) == 0


def test_disordered_share_of_half_precision_scales_does_not_underflow():
    small = ResidualSign(jnp.ones((4, 4)), jnp.asarray([[1e-4] * 4, [5e-5] * 4]),
                         jnp.full((2, 4), 1e-4))
    assert disordered_share({"w": small}) == 0
    half = pack({"w": small})
    assert half["w"].g.dtype == jnp.float16
    assert disordered_share(half) == 0


def test_histogram():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(2, 64, 32)).astype(np.float32)
    g = np.array([[0.9], [0.5]]) * np.exp(0.1 * rng.normal(size=(2, 2, 32)))
    h = np.exp(0.1 * rng.normal(size=(2, 2, 64)))
    weight = ResidualSign(*(jnp.asarray(a, jnp.float32) for a in (w, g, h)))
    found = weight_histogram({"layers": {"up": {"kernel": weight}}}, "layers/up/kernel", 1, bins=40)
    assert json.loads(json.dumps(found)) == found
    a, b = (np.outer(h[1, n], g[1, n]) for n in (0, 1))
    ratio = w[1] / a
    counts = [
        np.sum((ratio >= low) & (ratio < high))
        for low, high in zip(found["edges"][:-1], found["edges"][1:], strict=True)
    ]
    assert found["layer"] == "layers/up[1]" and len(found["weights"]) == 40
    # A weight may sit on an edge to within rounding.
    assert np.abs(np.subtract(counts, found["weights"])).sum() <= 2
    assert 0.998 <= sum(found["weights"]) / ratio.size <= 1
    gap = np.mean(b / a)
    np.testing.assert_allclose(found["levels"], [-1 - gap, -1 + gap, 1 - gap, 1 + gap], rtol=1e-6)


def test_histogram_of_an_unstacked_weight_and_bad_input():
    params = {"w": node(np.arange(6.0).reshape(2, 3) - 2.5, [2, 1]), "norm": jnp.ones(3)}
    found = weight_histogram(params, "w", bins=4)
    assert found["layer"] == "w" and found["levels"] == [-1.5, -0.5, 0.5, 1.5]
    for path, layer, message in [("norm", None, "the weights are w"), ("w", 0, "does not select")]:
        with pytest.raises(BadInput, match=message):
            weight_histogram(params, path, layer)
    with pytest.raises(BadInput, match="does not select"):
        weight_histogram({"w": node(np.ones((2, 3, 4)), [1])}, "w", 2)
