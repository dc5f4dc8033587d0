"""`IndependentSign` against float64 NumPy: forward, both straight-through rules, start, packing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax import BadInput, IndependentSign, IndependentSignSpec, ResidualSignSpec, Stats
from rabit_jax.signs.ste import STE
from rabit_jax.weights.independent_sign import independent_weight

I, O = 24, 20
EACH_K = pytest.mark.parametrize("k", [1, 2, 3, 4])
EACH_LEAD = pytest.mark.parametrize("lead", [(), (2,), (2, 3)], ids=str)
EACH_STE = pytest.mark.parametrize("ste", STE)


def make(k, lead=(), ste="identity", dtype="float32", seed=0):
    rng = np.random.default_rng(seed + 10 * k)
    latents = rng.normal(size=(*lead, k, I, O))
    latents[..., 0, :2] = [0.0, -0.0]
    g = rng.uniform(0.5, 1.5, (*lead, k, O)) * 0.5 ** np.arange(k)[:, None]
    h = rng.uniform(0.5, 1.5, (*lead, k, I))
    arrays = (jnp.asarray(latents, dtype), jnp.asarray(g, jnp.float32), jnp.asarray(h, jnp.float32))
    return IndependentSign(*arrays, ste)


def as64(node):
    """Signs `[..., k, i, o]` with sign(0) = +1, g and h in float64."""
    latents, g, h = (np.asarray(a).astype(np.float64) for a in (node.latents, node.g, node.h))
    return np.where(latents >= 0, 1.0, -1.0), g, h


@EACH_K
@EACH_LEAD
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_forward_is_the_sum_of_scaled_signs(k, lead, dtype):
    node = make(k, lead, dtype=dtype)
    signs, g, h = as64(node)
    want = np.einsum("...kio,...ki,...ko->...io", signs, h, g)
    np.testing.assert_allclose(node.dense(), want, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(node.signs(), signs)
    out = independent_weight(node.latents, node.g, node.h, dtype=jnp.bfloat16)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float64), want, rtol=2**-8, atol=1e-6)


@EACH_K
@EACH_LEAD
@EACH_STE
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_backward_is_the_written_formulas(k, lead, ste, dtype, slope64):
    node = make(k, lead, ste, dtype)
    cotangent = np.random.default_rng(3).normal(size=node.shape).astype(np.float32)
    got = jax.grad(lambda node: jnp.sum(node.dense() * cotangent))(node)
    signs, g, h = as64(node)
    grad = cotangent.astype(np.float64)
    close = {"rtol": 1e-5, "atol": 1e-5}
    want_g = np.einsum("...io,...kio,...ki->...ko", grad, signs, h)
    want_h = np.einsum("...io,...kio,...ko->...ki", grad, signs, g)
    np.testing.assert_allclose(got.g, want_g, **close)
    np.testing.assert_allclose(got.h, want_h, **close)

    scale = slope64(ste, node.latents, h[..., :, None] * g[..., None, :])
    assert got.latents.dtype == node.latents.dtype
    rounding = 2**-8 if dtype == "bfloat16" else 1e-5
    np.testing.assert_allclose(
        np.asarray(got.latents, np.float64), scale * grad[..., None, :, :], rtol=rounding, atol=1e-7
    )


@EACH_STE
def test_residuals_are_the_inputs_only(ste):
    node = make(2, (3,), ste, "bfloat16")
    inputs = (node.latents, node.g, node.h)
    saved = jax.eval_shape(
        lambda *a: jax.vjp(lambda *b: independent_weight(*b, ste), *a)[1], *inputs
    )
    assert sorted((x.shape, str(x.dtype)) for x in jax.tree.leaves(saved)) == sorted(
        (x.shape, str(x.dtype)) for x in inputs
    )


@EACH_STE
def test_matmul_trains_through_scan_remat_and_jit(ste):
    node = make(2, (3,), ste)
    x = jax.random.normal(jax.random.key(0), (5, I))
    back = jax.random.normal(jax.random.key(1), (O, I))

    def block(x, layer):
        return jnp.tanh(layer.matmul(x) @ back)

    def scanned(node):
        step = jax.checkpoint(lambda x, layer: (block(x, layer), None))
        return jnp.sum(jax.lax.scan(step, x, node)[0] ** 2)

    def unrolled(node):
        y = x
        for n in range(3):
            y = block(y, jax.tree.map(lambda leaf, n=n: leaf[n], node))
        return jnp.sum(y**2)

    got, want = jax.jit(jax.grad(scanned))(node), jax.grad(unrolled)(node)
    assert got.ste == ste
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize(("k", "lead"), [(1, ()), (2, (2,)), (3, ())], ids=str)
def test_the_start_is_that_of_the_coupled_form(k, lead):
    rng = np.random.default_rng(k)
    w = jnp.asarray(rng.normal(size=(*lead, 40, 56)), jnp.float32)
    sizes = (np.exp(rng.normal(size=(*lead, n))) for n in (40, 56))
    stats = Stats(*(jnp.asarray(s, jnp.float32) for s in sizes))
    fit = {"k": k, "a_in": 0.5, "a_out": 0.7, "shrinkage": 0.1, "rounds": 2}
    coupled = ResidualSignSpec(**fit).init(w, stats)
    node = IndependentSignSpec(**fit, ste="scaled").init(w, stats)
    assert node.ste == "scaled" and node.shape == w.shape and node.latents.dtype == jnp.float32
    for name in ("g", "h"):
        np.testing.assert_array_equal(getattr(node, name), getattr(coupled, name))
    np.testing.assert_array_equal(node.positive(), coupled.positive())
    np.testing.assert_array_equal(node.dense(), coupled.dense())

    # Latent i is W less the terms before it, so latents and terms tell the same story.
    terms = np.stack([np.asarray(term, np.float64) for term in coupled.paths()], axis=-3)
    before = np.concatenate([np.zeros_like(terms[..., :1, :, :]), terms[..., :-1, :, :]], axis=-3)
    want = np.asarray(w, np.float64)[..., None, :, :] - np.cumsum(before, axis=-3)
    np.testing.assert_array_equal(node.latents[..., 0, :, :], w)
    np.testing.assert_allclose(node.latents, want, rtol=0, atol=2e-6)


def test_it_packs_like_the_coupled_form_and_counts_the_same_bits():
    w = jax.random.normal(jax.random.key(0), (2, 300, 40))
    coupled = ResidualSignSpec(k=2, rounds=0).init(w)
    node = IndependentSignSpec(k=2, rounds=0).init(w)
    packed = node.pack("w")
    jax.tree.map(np.testing.assert_array_equal, packed, coupled.pack("w"))
    two_roundings = 2**-10 * sum(np.abs(term) for term in node.paths()) + 1e-6
    assert np.all(np.abs(packed.dense() - node.dense()) <= two_roundings)
    assert node.deployed_bytes() == packed.deployed_bytes()
    assert node.bits_per_weight() == pytest.approx(2 + 32 * 340 / (300 * 40))

    moved = node.replace(latents=node.latents.at[1, 1, 290, 7].multiply(-1))
    changed = np.argwhere(np.asarray(moved.pack("w").positive() != packed.positive()))
    np.testing.assert_array_equal(changed, [[1, 1, 290, 7]])


def test_a_scale_that_16_bits_cannot_hold_is_named():
    node = make(2, (2,))
    with pytest.raises(BadInput, match=r"layers/attn/q/kernel: scale h\[1, 0, 5\]"):
        node.replace(h=node.h.at[1, 0, 5].set(1e-7)).pack("layers/attn/q/kernel")


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"k": 5}, "k is 5"), ({"rounds": -1}, "rounds -1"), ({"shrinkage": 2.0}, "shrinkage 2.0"),
     ({"ste": "hard"}, "ste is 'hard': choose identity, scaled, clipped or smooth")],
    ids=str,
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(BadInput, match=message):
        IndependentSignSpec(**setting)
