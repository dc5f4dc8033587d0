"""One battery over every weight representation: what any `Weight` promises, whatever it stores.

To add a representation, add a line to `MAKERS`: a function of no arguments that returns a node of
`LAYERS` stacked layers, `[LAYERS, I, O]`.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax.weights import IndependentSign, PackedSign, ResidualSign, Weight, is_weight, linear

LAYERS, I, O = 2, 40, 24


def scales(k, rng):
    size = 0.8 * 0.45 ** np.arange(k)[:, None]
    g = size * np.exp(0.1 * rng.normal(size=(LAYERS, k, O)))
    h = np.exp(0.1 * rng.normal(size=(LAYERS, k, I)))
    return jnp.asarray(g, jnp.float32), jnp.asarray(h, jnp.float32)


def residual(k, dtype="float32"):
    rng = np.random.default_rng(k)
    return ResidualSign(jnp.asarray(rng.normal(size=(LAYERS, I, O)), dtype), *scales(k, rng))


def independent(k):
    rng = np.random.default_rng(k)
    latents = jnp.asarray(rng.normal(size=(LAYERS, k, I, O)), jnp.float32)
    return IndependentSign(latents, *scales(k, rng))


MAKERS = {
    **{f"residual-{k}": lambda k=k: residual(k) for k in (1, 2, 3, 4)},
    "residual-2-bfloat16": lambda: residual(2, "bfloat16"),
    "independent-2": lambda: independent(2),
    "packed-1": lambda: residual(1).pack("w"),
    "packed-3": lambda: residual(3).pack("w"),
}


def layer(tree, n):
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)[n]), tree)


@pytest.fixture(params=MAKERS, scope="module")
def case(request):
    """One representation: the stack, its packed form, its first layer, and their dense matrices."""
    stack = MAKERS[request.param]()
    node = layer(stack, 0)
    dense64 = np.asarray(node.dense(), np.float64)
    return SimpleNamespace(stack=stack, node=node, dense64=dense64, packed=stack.pack("w"))


X = np.random.default_rng(9).normal(size=(3, 5, I)).astype(np.float32)


def near(got, want, tolerance):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)


def test_it_is_a_weight_and_a_tree_of_arrays(case):
    assert is_weight(case.node) and isinstance(case.node, Weight)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(case.node))


def test_shape_is_that_of_the_dense_matrix(case):
    assert case.stack.shape == case.stack.dense().shape == (LAYERS, I, O)
    assert case.node.shape == (I, O) and case.node.dense().dtype == jnp.float32


def test_matmul_is_the_product_with_the_dense_matrix(case):
    want = X.astype(np.float64) @ case.dense64
    near(jax.jit(lambda x, w: w.matmul(x))(X, case.node), want, 1e-6)
    near(linear(jnp.asarray(X), case.node), want, 1e-6)
    near(linear(jnp.asarray(X[0, 0]), case.node), want[0, 0], 1e-6)


def test_matmul_keeps_bfloat16(case):
    x = jnp.asarray(X, jnp.bfloat16)
    y = jax.jit(linear)(x, case.node)
    assert y.dtype == jnp.bfloat16
    near(y, np.asarray(x, np.float64) @ case.dense64, 5e-3)


def test_paths_sum_to_the_dense_matrix(case):
    terms = [np.asarray(term, np.float64) for term in case.stack.paths()]
    assert len(terms) == case.stack.k and all(term.shape == case.stack.shape for term in terms)
    near(sum(terms), case.stack.dense(), 1e-6)


def test_each_path_is_its_signs_between_its_scales(case):
    signs = np.asarray(case.node.signs(), np.float64)
    g, h = (np.asarray(a, np.float64) for a in (case.node.g, case.node.h))
    assert set(np.unique(signs)) == {-1, 1}
    np.testing.assert_array_equal(case.node.positive(), signs > 0)
    for n, term in enumerate(case.node.paths()):
        near(term, h[n][:, None] * signs[n] * g[n][None, :], 1e-6)


def test_roles_name_every_leaf(case):
    roles = case.node.roles()
    assert jax.tree.structure(roles) == jax.tree.structure(case.node)
    names = {jnp.dtype(jnp.uint8): "sign"}
    for role, leaf in zip(jax.tree.leaves(roles), jax.tree.leaves(case.node), strict=True):
        large = leaf.size >= I * O
        assert role == names.get(leaf.dtype, "latent" if large else "scale")


def test_packing_keeps_signs_and_weight_and_is_done_once(case):
    assert isinstance(case.packed, PackedSign)
    assert case.packed.pack("w") is case.packed
    np.testing.assert_array_equal(case.packed.signs(), case.stack.signs())
    near(case.packed.dense(), case.stack.dense(), 1e-3)


def test_a_slice_of_a_stack_is_the_layer(case):
    stack_dense, stack_signs = np.asarray(case.stack.dense()), np.asarray(case.stack.signs())
    for n in range(LAYERS):
        one = layer(case.stack, n)
        np.testing.assert_array_equal(one.dense(), stack_dense[n])
        np.testing.assert_array_equal(one.signs(), stack_signs[n])
        np.testing.assert_array_equal(one.pack("w").bits, np.asarray(case.packed.bits)[n])


def test_scan_over_a_stack_multiplies_by_each_layer(case):
    y = jax.jit(lambda s: jax.lax.scan(lambda c, w: (c, linear(X, w)), 0, s)[1])(case.stack)
    near(y, X.astype(np.float64)[None] @ np.asarray(case.stack.dense(), np.float64)[:, None], 1e-6)


def test_jit_changes_nothing(case):
    near(jax.jit(lambda n: n.dense())(case.node), case.dense64, 1e-7)
    np.testing.assert_array_equal(jax.jit(lambda n: n.signs())(case.node), case.node.signs())


def test_sizes_need_shapes_only(case):
    abstract = jax.eval_shape(lambda: case.stack)
    assert abstract.shape == case.stack.shape
    assert abstract.bits_per_weight() == case.packed.bits_per_weight()
    held = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(case.packed))
    assert abstract.deployed_bytes() == held
