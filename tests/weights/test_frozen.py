"""`FrozenPath` against float64 NumPy: fixed signs stay, the last path and all scales train."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax.signs.ste import STE
from rabit_jax.train.optimizer import partition, roles
from rabit_jax.weights.frozen_path import FrozenPath, FrozenPathSpec
from rabit_jax.weights.residual_sign import ResidualSignSpec

I, O = 24, 20


def make(k, lead=(), ste="identity"):
    rng = np.random.default_rng(k)
    positive = rng.integers(0, 2, (*lead, k, I, O)).astype(bool)
    latent = np.where(positive[..., -1, :, :], 1, -1) * np.exp(rng.normal(size=(*lead, I, O)))
    g, h = (np.exp(0.3 * rng.normal(size=(*lead, k, n))) for n in (O, I))
    arrays = (jnp.asarray(a, jnp.float32) for a in (latent, g, h))
    return FrozenPath(jnp.asarray(positive[..., :-1, :, :]), *arrays, ste), positive


@pytest.mark.parametrize(("k", "lead"), [(1, ()), (2, (3,)), (3, ())])
@pytest.mark.parametrize("ste", STE)
def test_forward_and_backward_are_the_written_formulas(k, lead, ste, slope64):
    node, positive = make(k, lead, ste)
    signs = np.where(positive, 1.0, -1.0)
    v, g, h = (np.asarray(x, np.float64) for x in (node.latent, node.g, node.h))
    np.testing.assert_array_equal(node.signs(), signs)
    want = np.einsum("...kio,...ki,...ko->...io", signs, h, g)
    np.testing.assert_allclose(node.dense(), want, atol=1e-5)

    cotangent = np.random.default_rng(2).normal(size=node.shape).astype(np.float32)

    def loss(latent, g, h):
        return jnp.sum(node.replace(latent=latent, g=g, h=h).dense() * cotangent)

    dv, dg, dh = jax.jit(jax.grad(loss, (0, 1, 2)))(node.latent, node.g, node.h)
    slope = slope64(ste, v, h[..., -1, :, None] * g[..., -1, None, :])
    np.testing.assert_allclose(dv, slope * cotangent, rtol=2e-5, atol=1e-6)
    want_g = np.einsum("...io,...kio,...ki->...ko", cotangent, signs, h)
    want_h = np.einsum("...io,...kio,...ko->...ki", cotangent, signs, g)
    np.testing.assert_allclose(dg, want_g, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dh, want_h, rtol=1e-4, atol=1e-4)


def test_fixed_signs_are_never_trained():
    tree = {"layers": {"w": {"kernel": make(2)[0]}}}
    trainable, frozen = partition(tree, roles(tree), ())
    assert [leaf.dtype for leaf in jax.tree.leaves(frozen)] == [bool]
    assert len(jax.tree.leaves(trainable)) == 3


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_start_is_that_of_the_coupled_form(k):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(2, 40, 56)), jnp.float32)
    fit = {"k": k, "rounds": 2}
    coupled, node = ResidualSignSpec(**fit).init(w), FrozenPathSpec(**fit).init(w)
    np.testing.assert_array_equal(node.positive(), coupled.positive())
    np.testing.assert_array_equal(node.dense(), coupled.dense())
    # The latent is what the earlier paths leave, so a small step of it flips what is nearly zero.
    rest = np.asarray(w, np.float64) - sum(
        np.asarray(term, np.float64) for term in list(coupled.paths())[:-1]
    )
    np.testing.assert_allclose(node.latent, rest, atol=1e-5)
