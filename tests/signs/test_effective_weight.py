"""Forward and backward of `effective_weight` against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax.signs.ste import coupled_signs, disordered, effective_weight, flips

TIE = 1e-5
EACH_K = pytest.mark.parametrize("k", [1, 2, 3, 4])


@EACH_K
@pytest.mark.parametrize("lead, latent_dtype", [((), "float32"), ((2, 3), "bfloat16")])
def test_forward_is_the_loop(k, lead, latent_dtype, make_node, coupled64):
    node = make_node(k, lead=lead, dtype=latent_dtype)
    signs, terms, margins = coupled64(node.latent, node.g, node.h)
    clear = margins.min(axis=-3) > TIE
    assert clear.mean() > 0.99
    got = np.asarray(jax.jit(coupled_signs)(node.latent, node.g, node.h))
    assert got.dtype == bool and got.shape == signs.shape
    clear_k = np.broadcast_to(np.expand_dims(clear, -3), got.shape)
    np.testing.assert_array_equal(got[clear_k], signs[clear_k] > 0)

    out = jax.jit(effective_weight)(node.latent, node.g, node.h)
    want = terms.sum(axis=-3)
    assert out.dtype == jnp.float32 and out.shape == node.latent.shape
    np.testing.assert_allclose(np.asarray(out)[clear], want[clear], rtol=0, atol=1e-6)


@EACH_K
def test_bfloat16_output_is_rounded_once(k, make_node, coupled64):
    node = make_node(k, 40, 30)
    _, terms, margins = coupled64(node.latent, node.g, node.h)
    clear = margins.min(axis=-3) > TIE
    out = jax.jit(effective_weight, static_argnums=3)(node.latent, node.g, node.h, jnp.bfloat16)
    assert out.dtype == jnp.bfloat16
    want = np.asarray(jnp.asarray(terms.sum(axis=-3), jnp.bfloat16), np.float64)
    got = np.asarray(out, np.float64)
    assert (got == want)[clear].mean() > 0.99
    np.testing.assert_allclose(got[clear], want[clear], rtol=2**-7, atol=1e-6)


def test_two_paths_are_nearest_rounding_to_four_levels(make_node):
    node = make_node(2, 100, 90, decay=0.3)
    w, g, h = (np.asarray(x, np.float64) for x in (node.latent, node.g, node.h))
    a, b = np.outer(h[0], g[0]), np.outer(h[1], g[1])
    assert (a > b).all() and (b > 0).all()
    levels = np.stack([-a - b, -a + b, a - b, a + b])
    distance = np.abs(levels - w)
    nearest = np.take_along_axis(levels, distance.argmin(axis=0)[None], axis=0)[0]
    two = np.sort(distance, axis=0)[:2]
    clear = two[1] - two[0] > 1e-5
    assert clear.mean() > 0.99
    got = np.asarray(jax.jit(effective_weight)(node.latent, node.g, node.h))
    np.testing.assert_allclose(got[clear], nearest[clear], atol=1e-6)


@pytest.mark.parametrize("k", [3, 4])
def test_more_paths_are_nearest_rounding_while_scales_exceed_the_sum_of_the_rest(k, make_node):
    node = make_node(k, 40, 30, decay=0.35)
    w, g, h = (np.asarray(x, np.float64) for x in (node.latent, node.g, node.h))
    a = h[:, :, None] * g[:, None, :]
    assert all((a[n] >= a[n + 1 :].sum(axis=0)).all() for n in range(k - 1))
    code = 1 - 2 * ((np.arange(2**k)[:, None] >> np.arange(k)) & 1)
    levels = np.einsum("ck,kio->cio", code, a)
    distance = np.abs(levels - w)
    nearest = np.take_along_axis(levels, distance.argmin(axis=0)[None], axis=0)[0]
    two = np.sort(distance, axis=0)[:2]
    clear = two[1] - two[0] > 1e-5
    assert clear.mean() > 0.99
    got = np.asarray(jax.jit(effective_weight)(node.latent, node.g, node.h))
    np.testing.assert_allclose(got[clear], nearest[clear], atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sign_of_zero_is_plus_one(dtype):
    w = jnp.asarray([[0.0, -0.0, 1.0, -1.0]], dtype)
    g, h = jnp.ones((2, 4)).at[1].set(0.25), jnp.ones((2, 1))
    positive = np.asarray(coupled_signs(w, g, h))[:, 0]
    np.testing.assert_array_equal(positive[0], [True, True, True, False])
    np.testing.assert_array_equal(positive[1], [False, False, True, True])  # residuals -1, -1, 0, 0
    np.testing.assert_array_equal(
        np.asarray(effective_weight(w, g, h))[0], [0.75, 0.75, 1.25, -0.75]
    )


@pytest.mark.parametrize("k", [2, 4])
def test_signs_are_the_same_bits_however_compiled(k, make_node):
    node = make_node(k, 256, 512)
    w, g, h = node.latent, node.g, node.h
    eager = coupled_signs(w, g, h)
    compiled = jax.jit(coupled_signs)(w, g, h)
    np.testing.assert_array_equal(eager, compiled)
    signs = np.where(eager, 1.0, -1.0)
    want = np.einsum("kio,ki,ko->io", signs, np.asarray(h), np.asarray(g))
    got = jax.jit(effective_weight)(w, g, h)
    np.testing.assert_allclose(got, want, atol=1e-6)
    grad_g = jax.jit(jax.grad(lambda g: jnp.sum(effective_weight(w, g, h))))(g)
    held = np.einsum("kio,ki->ko", signs, np.asarray(h, np.float64))
    np.testing.assert_allclose(grad_g, held, atol=2e-4)


@EACH_K
@pytest.mark.parametrize(
    "lead, latent_dtype, dtype",
    [
        ((), "float32", "float32"), ((2, 3), "bfloat16", "float32"), ((2,), "float32", "bfloat16"),
    ],
)
def test_backward_is_the_written_formulas(k, lead, latent_dtype, dtype, make_node, coupled64):
    node = make_node(k, lead=lead, dtype=latent_dtype)
    rng = np.random.default_rng(7)
    cotangent = jnp.asarray(rng.normal(size=node.shape), dtype)

    @jax.jit
    def pull(cotangent):
        forward = lambda *a: effective_weight(*a, jnp.dtype(dtype))  # noqa: E731
        return jax.vjp(forward, node.latent, node.g, node.h)[1](cotangent)

    dw, dg, dh = pull(cotangent)
    assert (dw.dtype, dg.dtype, dh.dtype) == (node.latent.dtype, jnp.float32, jnp.float32)

    # The latent receives G itself, not an approximation of it.
    np.testing.assert_array_equal(np.asarray(dw), np.asarray(cotangent.astype(latent_dtype)))

    # Off near-ties the signs of the oracle are those of the package; ties are left out of G.
    signs, _, margins = coupled64(node.latent, node.g, node.h)
    clear = margins.min(axis=-3) > TIE
    _, dg, dh = pull(jnp.where(clear, cotangent, 0))
    grad = np.where(clear, np.asarray(cotangent, np.float64), 0)
    g, h = np.asarray(node.g, np.float64), np.asarray(node.h, np.float64)
    for n in range(k):
        b = signs[..., n, :, :]
        want_g = (grad * b * h[..., n, :, None]).sum(axis=-2)
        want_h = (grad * b * g[..., n, None, :]).sum(axis=-1)
        np.testing.assert_allclose(np.asarray(dg)[..., n, :], want_g, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(np.asarray(dh)[..., n, :], want_h, rtol=1e-5, atol=1e-5)


@EACH_K
def test_scale_gradients_are_central_differences_with_signs_held(k, make_node, coupled64):
    node = make_node(k, 7, 6)
    signs, _, margins = coupled64(node.latent, node.g, node.h)
    assert margins.min() > TIE
    c = np.random.default_rng(3).normal(size=node.shape)

    def loss(g, h):
        return np.sum(np.sin(c * np.einsum("kio,ki,ko->io", signs, h, g)))

    def jax_loss(g, h):
        return jnp.sum(jnp.sin(jnp.asarray(c, jnp.float32) * effective_weight(node.latent, g, h)))

    got = jax.jit(jax.grad(jax_loss, argnums=(0, 1)))(node.g, node.h)
    at = [np.asarray(node.g, np.float64), np.asarray(node.h, np.float64)]
    eps = 1e-5
    for which in (0, 1):
        want = np.zeros_like(at[which])
        for index in np.ndindex(*want.shape):
            sides = []
            for step in (eps, -eps):
                moved = [a.copy() for a in at]
                moved[which][index] += step
                sides.append(loss(*moved))
            want[index] = (sides[0] - sides[1]) / (2 * eps)
        np.testing.assert_allclose(got[which], want, rtol=1e-4, atol=1e-4)


@EACH_K
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_residuals_are_the_inputs_only(k, dtype, make_node):
    node = make_node(k, lead=(3,), dtype="bfloat16")
    inputs = (node.latent, node.g, node.h)
    saved = jax.eval_shape(
        lambda *a: jax.vjp(lambda *b: effective_weight(*b, jnp.dtype(dtype)), *a)[1], *inputs
    )
    assert sorted((x.shape, str(x.dtype)) for x in jax.tree.leaves(saved)) == sorted(
        (x.shape, str(x.dtype)) for x in inputs
    )


def test_scan_remat_and_jit_change_nothing(make_node):
    node = make_node(2, 16, 16, lead=(3,))
    x = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)

    def block(x, layer):
        return jnp.tanh(x @ effective_weight(*layer))

    def scanned(leaves):
        step = jax.checkpoint(lambda x, layer: (block(x, layer), None))
        return jnp.sum(jax.lax.scan(step, x, leaves)[0] ** 2)

    def unrolled(leaves):
        y = x
        for n in range(3):
            y = block(y, tuple(leaf[n] for leaf in leaves))
        return jnp.sum(y**2)

    leaves = (node.latent, node.g, node.h)
    got, want = (jax.jit(jax.value_and_grad(f))(leaves) for f in (scanned, unrolled))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


def test_flips_and_disordered_are_counts():
    before = jnp.zeros((2, 3, 4), bool)
    after = before.at[0, 1, 2].set(True).at[1].set(True)
    np.testing.assert_allclose(flips(before, after), [1 / 12, 1.0])
    g = jnp.asarray([[1.0, 1.0, 1.0, -1.0], [0.5, 1.5, 1.0, 0.5]])
    h = jnp.ones((2, 3))
    np.testing.assert_allclose(disordered(g, h), 0.75)  # b > a, b == a and a < 0
    np.testing.assert_allclose(disordered(g[:1], h[:1]), 0.25)
