"""One battery over every weight representation: what any `Weight` promises, whatever it stores.

To add a representation, add a line to `MAKERS`: a function of no arguments that returns a node of
`LAYERS` stacked layers, `[LAYERS, I, O]`.
"""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax.formats.packed_file import stored_parts
from rabit_jax.tree import is_weight
from rabit_jax.types import Weight
from rabit_jax.weights.codebook import CodebookSpec
from rabit_jax.weights.dual_binary import DualBinarySpec
from rabit_jax.weights.frozen_path import FrozenPathSpec
from rabit_jax.weights.group_uniform import GroupUniformSpec
from rabit_jax.weights.independent_sign import IndependentSign
from rabit_jax.weights.low_rank_sign import LowRankSignSpec
from rabit_jax.weights.representations import abstract_packed, is_packed_node
from rabit_jax.weights.residual_sign import ResidualSign, ResidualSignSpec
from rabit_jax.weights.scaled_weight import scaled
from rabit_jax.weights.seam import linear
from rabit_jax.weights.sum_weight import residual
from rabit_jax.weights.uniform_residual import UniformResidualSpec

LAYERS, I, O = 2, 40, 24


def scales(k, rng):
    size = 0.8 * 0.45 ** np.arange(k)[:, None]
    g = size * np.exp(0.1 * rng.normal(size=(LAYERS, k, O)))
    h = np.exp(0.1 * rng.normal(size=(LAYERS, k, I)))
    return jnp.asarray(g, jnp.float32), jnp.asarray(h, jnp.float32)


def coupled(k, dtype="float32"):
    rng = np.random.default_rng(k)
    return ResidualSign(jnp.asarray(rng.normal(size=(LAYERS, I, O)), dtype), *scales(k, rng))


def independent(k):
    rng = np.random.default_rng(k)
    latents = jnp.asarray(rng.normal(size=(LAYERS, k, I, O)), jnp.float32)
    return IndependentSign(latents, *scales(k, rng))


def fitted(spec, packed=False):
    w = np.random.default_rng(5).normal(size=(LAYERS, I, O))
    node = spec.init(jnp.asarray(w, jnp.float32))
    return node.pack("w") if packed else node


LOW_RANK = LowRankSignSpec(rank=8)
RANK_AND_SIGN = residual(LOW_RANK, ResidualSignSpec(k=1))
GROUPS = GroupUniformSpec(group=16)
UNIFORM_GROUPS = UniformResidualSpec(k=2, rounds=3, group=16)

MAKERS = {
    **{f"residual-{k}": lambda k=k: coupled(k) for k in (1, 2, 3, 4)},
    "residual-2-bfloat16": lambda: coupled(2, "bfloat16"),
    "independent-2": lambda: independent(2),
    "grouped-2": lambda: fitted(ResidualSignSpec(k=2, rounds=3, group=16)),
    "grouped-2-packed": lambda: fitted(ResidualSignSpec(k=2, rounds=3, group=16), packed=True),
    "packed-1": lambda: coupled(1).pack("w"),
    "packed-3": lambda: coupled(3).pack("w"),
    "frozen-1": lambda: fitted(FrozenPathSpec(k=1, rounds=2)),
    "frozen-3": lambda: fitted(FrozenPathSpec(k=3, rounds=2)),
    "uniform-2": lambda: fitted(UniformResidualSpec(k=2, rounds=3)),
    "uniform-2-groups": lambda: fitted(UNIFORM_GROUPS),
    "uniform-2-groups-packed": lambda: fitted(UNIFORM_GROUPS, packed=True),
    "low-rank": lambda: fitted(LOW_RANK),
    "low-rank-packed": lambda: fitted(LOW_RANK, packed=True),
    "dual-binary": lambda: fitted(DualBinarySpec(group=16)),
    "dual-binary-packed": lambda: fitted(DualBinarySpec(group=16), packed=True),
    "group-uniform": lambda: fitted(GROUPS),
    "group-uniform-packed": lambda: fitted(GROUPS, packed=True),
    "codebook": lambda: fitted(CodebookSpec(iterations=3)),
    "codebook-packed": lambda: fitted(CodebookSpec(iterations=3), packed=True),
    "sum": lambda: fitted(RANK_AND_SIGN),
    "sum-packed": lambda: fitted(RANK_AND_SIGN, packed=True),
    "scaled-groups": lambda: fitted(scaled(GROUPS)),
    "scaled-groups-packed": lambda: fitted(scaled(GROUPS), packed=True),
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


@pytest.fixture
def signed(case):
    if not hasattr(case.node, "signs"):
        pytest.skip(f"{type(case.node).__name__} has no signs [k, i, o]")
    return case


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
    near(linear(jnp.asarray(X[0, 0]), case.node), want[0, 0], 2e-6)


def test_matmul_keeps_bfloat16(case):
    x = jnp.asarray(X, jnp.bfloat16)
    y = jax.jit(linear)(x, case.node)
    assert y.dtype == jnp.bfloat16
    near(y, np.asarray(x, np.float64) @ case.dense64, 5e-3)


def test_paths_sum_to_the_dense_matrix(case):
    terms = [np.asarray(term, np.float64) for term in case.stack.paths()]
    assert len(terms) == getattr(case.stack, "k", len(terms))
    assert all(term.shape == case.stack.shape for term in terms)
    near(sum(terms), case.stack.dense(), 1e-6)


def test_each_path_is_its_signs_between_its_scales(signed):
    case = signed
    node = case.node.free() if hasattr(case.node, "free") else case.node
    if not hasattr(node, "g") or node.g.ndim > node.h.ndim:
        pytest.skip("the output scales belong to groups, see test_grouped_sign.py")
    signs = np.asarray(node.signs(), np.float64)
    g, h = (np.asarray(a, np.float64) for a in (node.g, node.h))
    assert set(np.unique(signs)) == {-1, 1}
    np.testing.assert_array_equal(case.node.positive(), signs > 0)
    for n, term in enumerate(case.node.paths()):
        near(term, h[n][:, None] * signs[n] * g[n][None, :], 1e-6)


def test_roles_name_every_leaf(case):
    roles = case.node.roles()
    assert jax.tree.structure(roles) == jax.tree.structure(case.node)
    for role, leaf in zip(jax.tree.leaves(roles), jax.tree.leaves(case.node), strict=True):
        trains = jnp.issubdtype(leaf.dtype, jnp.floating)
        assert role in (("latent", "scale", "level") if trains else ("sign", "code"))
        assert role != "scale" or bool((leaf > 0).all())
        assert leaf.size < I * O or role != "scale"


def test_packing_keeps_the_weight_and_is_done_once(case):
    assert is_packed_node(case.packed)
    assert all(leaf.dtype in (jnp.uint8, jnp.float16) for leaf in jax.tree.leaves(case.packed))
    same = jax.tree.map(lambda a, b: bool((a == b).all()), case.packed.pack("w"), case.packed)
    assert all(jax.tree.leaves(same))
    near(case.packed.dense(), case.stack.dense(), 1e-3)


def test_packing_keeps_every_sign(signed):
    np.testing.assert_array_equal(signed.packed.signs(), signed.stack.signs())


def test_the_header_outlines_the_packed_arrays(case):
    header = json.loads(json.dumps(case.packed.header()))
    one = abstract_packed(header)
    assert one.shape == (I, O) and (header["in"], header["out"]) == (I, O)
    assert jax.tree.structure(one) == jax.tree.structure(case.packed)
    for wanted, found in zip(jax.tree.leaves(one), jax.tree.leaves(case.packed), strict=True):
        assert found.shape == (LAYERS, *wanted.shape) and found.dtype == wanted.dtype


def test_a_slice_of_a_stack_is_the_layer(case):
    stack_dense = np.asarray(case.stack.dense())
    for n in range(LAYERS):
        one = layer(case.stack, n)
        near(one.dense(), stack_dense[n], 1e-7)
        packed = layer(case.packed, n)
        jax.tree.map(np.testing.assert_array_equal, one.pack("w"), packed)


def test_scan_over_a_stack_multiplies_by_each_layer(case):
    y = jax.jit(lambda s: jax.lax.scan(lambda c, w: (c, linear(X, w)), 0, s)[1])(case.stack)
    near(y, X.astype(np.float64)[None] @ np.asarray(case.stack.dense(), np.float64)[:, None], 1e-6)


def test_jit_changes_nothing(case):
    near(jax.jit(lambda n: n.dense())(case.node), case.dense64, 1e-6)
    if hasattr(case.node, "positive"):
        jitted = jax.jit(lambda n: n.positive())(case.node)
        np.testing.assert_array_equal(jitted, case.node.positive())


def test_sizes_need_shapes_only(case):
    abstract = jax.eval_shape(lambda: case.stack)
    assert abstract.shape == case.stack.shape
    assert abstract.bits_per_weight() == pytest.approx(case.packed.bits_per_weight())
    held = sum(array.nbytes for array in stored_parts(case.packed).values())
    assert abstract.deployed_bytes() == case.packed.deployed_bytes() == held
    assert abstract.cost() == case.packed.cost() and abstract.cost().bytes == held
