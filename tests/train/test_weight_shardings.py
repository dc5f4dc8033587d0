"""Every representation on two meshes: each device's shard, the optimiser's state, the products.

To add a representation, add a line to `SPECS`. Nothing is fitted here: the arrays are random, in
the shapes that the spec makes.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax import (
    CodebookSpec,
    DualBinarySpec,
    FrozenPathSpec,
    GroupUniformSpec,
    IndependentSignSpec,
    LowRankSignSpec,
    ResidualSignSpec,
    UniformResidualSpec,
    linear,
    residual,
    scaled,
)
from rabit_jax.train.optimizer import OptimizerConfig, make_optimizer, partition, roles
from rabit_jax.train.sharding import like_params, param_shardings
from rabit_jax.tree import leaves
from rabit_jax.weights.leaves import declaration
from rabit_jax.weights.representations import SPECS as ALL_SPECS
from rabit_jax.weights.reshaped import Reshaped
from rabit_jax.weights.sign_paths import PackedSign

LAYERS, HEADS = 2, 8
SIZES = {"distinct": (1024, 48), "square": (256, 256)}
MESHES = {"data 2, tensor 4": (2, 4), "tensor 8": (1, 8)}
SPECS = {
    "residual": ResidualSignSpec(k=3),
    "independent": IndependentSignSpec(k=2),
    "frozen path": FrozenPathSpec(k=3),
    "uniform": UniformResidualSpec(k=2),
    "low rank": LowRankSignSpec(rank=8),
    "group uniform": GroupUniformSpec(bits=3, group=128),
    "dual binary": DualBinarySpec(group=128),
    "codebook": CodebookSpec(stages=3, bits=3),
    "sum": residual(LowRankSignSpec(rank=16), ResidualSignSpec(k=1)),
    "scaled": scaled(GroupUniformSpec(group=64)),
    "reshaped": ResidualSignSpec(k=2),
}
# The axis of the matrix that each kernel of the tree is split along.
SPLIT = {"layers/attn/q/kernel": "o", "layers/attn/o/kernel": "i", "layers/mlp/up/kernel": "o",
         "layers/mlp/down/kernel": "i", "block/out_proj/kernel": ""}


def filled(node, seed):
    """The abstract node with random arrays, as its roles ask for them."""
    rng = np.random.default_rng(seed)

    def array(declared, one):
        if one.dtype == jnp.uint8:
            # Codes of a codebook are below its 8 entries; of packed bits any byte will do.
            return jnp.asarray(rng.integers(0, 256 if "/8" in declared.axes else 8, one.shape),
                               one.dtype)
        if one.dtype == jnp.bool_:
            return jnp.asarray(rng.random(one.shape) < 0.5)
        values = rng.normal(size=one.shape)
        return jnp.asarray(np.exp(0.3 * values) if declared.role == "scale" else values, one.dtype)

    return jax.tree.map(array, declaration(node), node)


def nodes_of(name, i, o):
    """`(trained, packed)` of one spec, `[LAYERS, i, o]`, with random arrays."""
    kernel = jax.ShapeDtypeStruct((LAYERS, i, o), jnp.float32)
    trained = filled(jax.eval_shape(SPECS[name].init, kernel), 1)
    packed = trained.pack("w")
    if name == "reshaped":
        shape = (HEADS, i // HEADS), (HEADS, o // HEADS)
        trained, packed = (Reshaped(node, *shape) for node in (trained, packed))
    return trained, packed


@pytest.fixture(params=SPECS, scope="module")
def name(request):
    return request.param


@pytest.fixture(params=SIZES, scope="module")
def params(request, name):
    trained, packed = nodes_of(name, *SIZES[request.param])
    return {
        "layers": {
            "attn": {"q": {"kernel": trained}, "o": {"kernel": trained}},
            "mlp": {"up": {"kernel": packed}, "down": {"kernel": packed}},
        },
        "block": {"out_proj": {"kernel": trained}},
    }


@pytest.fixture(params=MESHES)
def mesh(request, meshes):
    return meshes(*MESHES[request.param])


def wanted_shard(array, axes, side, count, place):
    """The slice of `array` that device `place` of `count` holds, where axis `side` is split."""
    axes = ["l"] * (array.ndim - len(axes.split())) + axes.split()
    index = [slice(None)] * array.ndim
    for n, axis in enumerate(axes):
        unit = 32 if axis.endswith("/8") else 1  # bytes of a block of packed signs
        whole = array.shape[n] // unit
        if side and axis in (side, f"{side}/8") and whole % count == 0:
            step = whole // count * unit
            index[n] = slice(place * step, (place + 1) * step)
    return array[tuple(index)]


def test_the_battery_holds_every_representation():
    assert {type(spec) for spec in SPECS.values()} == set(ALL_SPECS)


def test_declared_axes_are_those_of_the_arrays(params):
    for path, node in leaves(params):
        matrix = getattr(node, "matrix", node)
        i, o = matrix.shape[-2:]
        want = {"i": i, "o": o, "i/8": i // 8 if i % 256 == 0 else None,
                "o/8": 32 * -(-o // 256)}
        for one, array in zip(jax.tree.leaves(declaration(node)), jax.tree.leaves(node),
                              strict=True):
            assert array.shape[0] == LAYERS and array.ndim == 1 + len(one.names), path
            for axis, length in zip(one.names, array.shape[1:], strict=True):
                assert length == want.get(axis, length), (path, one)


def test_every_device_holds_the_slice_of_its_axes(name, params, mesh):
    count = mesh.shape["tensor"]
    placed = dict(leaves(jax.device_put(params, param_shardings(params, mesh))))
    for path, node in leaves(params):
        arrays, shards = jax.tree.leaves(node), jax.tree.leaves(placed[path])
        split = 0
        for one, array, found in zip(jax.tree.leaves(declaration(node)), arrays, shards,
                                     strict=True):
            whole = np.asarray(array)
            for shard in found.addressable_shards:
                (*_, place), = np.argwhere(mesh.devices == shard.device)
                want = wanted_shard(whole, one.axes, SPLIT[path], count, place)
                assert shard.data.shape == want.shape, (path, one)
                np.testing.assert_array_equal(shard.data, want)
            split += found.addressable_shards[0].data.size < array.size
        # A codebook has one entry for d inputs, and 256 inputs are one block of packed signs.
        if path.startswith("layers/attn") and (name, SPLIT[path]) != ("codebook", "i"):
            assert split, path
        assert not split or SPLIT[path], path


def test_large_arrays_are_split_on_both_sides(params, mesh):
    """Nothing that grows with `i o` is whole on a device, but codes, which have no axis i."""
    for path, side in SPLIT.items():
        node = dict(leaves(params))[path]
        where = jax.tree.leaves(dict(leaves(param_shardings(params, mesh)))[path])
        for one, array, sharding in zip(jax.tree.leaves(declaration(node)),
                                        jax.tree.leaves(node), where, strict=True):
            large = side and side in one.names and array.size >= LAYERS * 2**13
            assert not large or "tensor" in sharding.spec, (path, one)


def test_the_optimiser_state_follows(params, mesh):
    trained = {"layers": {"attn": params["layers"]["attn"]}}
    names = roles(trained)
    where, _ = partition(param_shardings(trained, mesh), names, ())
    trainable, _ = partition(trained, names, ())
    names, _ = partition(names, names, ())
    known = dict(jax.tree_util.tree_leaves_with_path(where))
    for optimizer in ("adamw", "muon"):
        config = OptimizerConfig(name=optimizer)
        state = jax.eval_shape(make_optimizer(config, names, 10).init, trainable)
        found = like_params(state, trainable, where, mesh)
        followed = set()
        for path, sharding in jax.tree_util.tree_leaves_with_path(found):
            text = jax.tree_util.keystr(path)
            mine = [own for own in known if text.endswith(jax.tree_util.keystr(own))]
            assert sharding == known[mine[0]] if mine else sharding.is_fully_replicated, text
            followed |= set(mine)
        assert followed == set(known)


@jax.jit
def computed(params, x):
    """All dense matrices, and the product of the first layer of each; `x: [b, i]`."""
    dense, products = {}, {}
    for path, node in leaves(params):
        inputs = node.inputs if isinstance(node, Reshaped) else x.shape[1:]
        first = jax.tree.map(lambda a: a[0], node)
        dense[path], products[path] = node.dense(), linear(x.reshape(-1, *inputs), first)
    return dense, products


@pytest.mark.parametrize(
    "mesh", [n if n[0] == "d" else pytest.param(n, marks=pytest.mark.more) for n in MESHES],
    indirect=True,
)
def test_dense_and_products_are_those_of_one_device(params, mesh):
    params = {"layers": params["layers"]}
    node = params["layers"]["attn"]["q"]["kernel"]
    i = getattr(node, "matrix", node).shape[1]
    x = jnp.asarray(np.random.default_rng(2).normal(size=(4, i)), jnp.float32)
    dense, products = computed(params, x)
    others = computed(jax.device_put(params, param_shardings(params, mesh)), x)
    for path in dense:
        np.testing.assert_allclose(others[0][path], dense[path], rtol=1e-5, atol=1e-5)
        atol = 1e-4 * float(jnp.abs(products[path]).max())
        np.testing.assert_allclose(others[1][path], products[path], rtol=1e-4, atol=atol)


def sharded_axes(tree, mesh):
    """`{path of each array: the axes of its sharding}`."""
    flat = jax.tree_util.tree_leaves_with_path(param_shardings(tree, mesh))
    return {jax.tree_util.keystr(p, simple=True, separator="/"): tuple(s.spec) for p, s in flat}


@pytest.mark.parametrize("path", [
    "layers/attn/out_o/kernel", "layers/foo/kernel", "foo/kernel", "layers_3/attn/q/kernel",
    "layers_3/attn/q_proj/kernel", "Dense_0/kernel", "attention/out_proj/kernel",
    "encoder/layers/attn/q/kernel", "subhead/kernel", "pos_embed/pos_embedding",
])
def test_kernels_of_other_models_are_whole(path, meshes):
    node = ResidualSignSpec(k=2)
    array = jnp.ones((64, 64))
    for kernel in (array, jax.eval_shape(node.init, array)):
        tree = kernel
        for key in reversed(path.split("/")):
            tree = {key: tree}
        found = sharded_axes(tree, meshes(2, 4))
        assert found and all(set(axes) <= {None} for axes in found.values()), found


def test_packed_rows_are_split_between_blocks_alone(meshes):
    """1024 inputs are 4 blocks: one for each of 4 devices, but 8 devices share none of them."""
    for i, tensor, axes in ((1024, 4, "tensor"), (1024, 8, None), (1000, 4, "tensor"),
                            (768, 4, None), (40, 4, None)):
        node = PackedSign.abstract({"in": i, "out": 16, "k": 2})
        found = sharded_axes({"layers": {"mlp": {"down": {"kernel": node}}}},
                             meshes(8 // tensor, tensor))
        assert found["layers/mlp/down/kernel/bits"] == (None, None, axes)
        assert found["layers/mlp/down/kernel/h"] == (None, "tensor")
        assert found["layers/mlp/down/kernel/g"] == (None, None)


def test_a_reshaped_kernel_is_split_between_its_first_axes_alone(meshes):
    """6 heads are not split over 4 devices, though their 96 outputs could be."""
    matrix = jax.eval_shape(ResidualSignSpec(k=2).init, jnp.ones((64, 96)))
    for heads, axis in ((6, None), (8, "tensor"), (12, "tensor")):
        node = Reshaped(matrix, (64,), (heads, 96 // heads))
        found = sharded_axes({"layers": {"attn": {"q": {"kernel": node}}}}, meshes(2, 4))
        assert found["layers/attn/q/kernel/matrix/latent"] == (None, axis)
        assert found["layers/attn/q/kernel/matrix/g"] == (None, axis)
        assert found["layers/attn/q/kernel/matrix/h"] == (None, None)
