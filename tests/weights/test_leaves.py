"""The declaration of leaves, and weights and specs that a user defines outside of the package."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax import BadInput, convert, dense, describe, linear, pack
from rabit_jax.train.optimizer import OptimizerConfig
from rabit_jax.train.sharding import make_mesh, param_shardings
from rabit_jax.train.trainer import make_trainer
from rabit_jax.tree import pytree_dataclass
from rabit_jax.types import Array
from rabit_jax.weights.axes import axis_size
from rabit_jax.weights.costs import dense_cost
from rabit_jax.weights.independent_sign import IndependentSign
from rabit_jax.weights.leaves import WeightNode, declaration, leaf
from rabit_jax.weights.representations import PACKED_TYPES, abstract_packed
from rabit_jax.weights.residual_sign import ResidualSign

PATH = "layers/mlp/up/kernel"


@pytest.mark.parametrize("axis, size", [
    ("i", 300), ("2", 2), ("i//group", 3), ("2^b", 16), ("k-1", 1), ("i/8", 64), ("i//d/8", 32),
])
def test_sizes_of_axes(axis, size):
    assert axis_size(axis, {"i": 300, "group": 128, "b": 4, "k": 2, "d": 4}) == size


@pytree_dataclass
class Halves(WeightNode):
    """`W_hat = W / 2`, whose leaf is declared."""

    w: Array = leaf("latent", "i o")

    def paths(self):
        yield self.w / 2

    def cost(self):
        return dense_cost(self.shape)

    def pack(self, name):
        return PackedHalves(self.w.astype(jnp.float16))


@pytree_dataclass
class PackedHalves(Halves):
    """Its deployed form."""

    w: Array = leaf("level", "i o")

    def pack(self, name):
        return self


Halves.packed = PackedHalves


@pytree_dataclass
class Bare:
    """A weight by protocol alone, which names its roles and declares no axes."""

    w: Array

    shape = property(lambda self: self.w.shape)

    def matmul(self, x):
        return x @ self.w

    def dense(self):
        return self.w

    def roles(self):
        return Bare("latent")

    def pack(self, name):
        return self


@dataclass(frozen=True)
class FakeSpec:
    """A spec of a user's own module, in no list."""

    node: type

    def init(self, w, stats=None, key=None):
        return self.node(w + 0)

    def dense(self, node):
        return node.dense()


def kernels():
    w = np.random.default_rng(0).normal(size=(2, 16, 24))
    return {"layers": {"mlp": {"up": {"kernel": jnp.asarray(w, jnp.float32)}}}}


@pytest.mark.parametrize("node, axes", [(Halves, (None, None, "tensor")), (Bare, (None,) * 3)])
def test_a_spec_of_ones_own_converts_trains_packs_and_shards(node, axes):
    params, mesh = kernels(), make_mesh({"tensor": 8})
    student = convert(params, [(PATH, FakeSpec(node))])
    where = param_shardings(student, mesh)["layers"]["mlp"]["up"]["kernel"]
    assert where.w.spec == jax.sharding.PartitionSpec(*axes)

    def loss(params, teacher, batch):
        first = jax.tree.map(lambda a: a[0], params["layers"]["mlp"]["up"]["kernel"])
        return {"loss": jnp.sum(jnp.square(linear(batch["tokens"].astype(jnp.float32), first)))}

    trainer = make_trainer(loss, student, OptimizerConfig(name="adamw"), 3, mesh=mesh)
    batch = trainer.place({"tokens": np.ones((8, 16), np.int32)})
    state, _ = trainer.step(trainer.state, trainer.frozen, None, batch)
    trained = trainer.params(state)
    before, after = (dense(p)["layers"]["mlp"]["up"]["kernel"] for p in (student, trained))
    assert bool((before[0] != after[0]).all()) and bool((before[1] == after[1]).all())
    small = dense(pack(trained))["layers"]["mlp"]["up"]["kernel"]
    np.testing.assert_allclose(small, after, rtol=1e-3, atol=1e-4)


def test_sizes_follow_from_the_declaration():
    (row,) = describe(convert(kernels(), [(PATH, FakeSpec(Halves))])).rows
    assert row.bits_per_weight == 16 and row.deployed_bytes == 2 * 2 * 16 * 24
    assert row.trained_bytes == 4 * 2 * 16 * 24 and row.shape == (2, 16, 24)


@pytree_dataclass
class Undeclared(WeightNode):
    w: Array


def test_an_array_without_declaration_is_named():
    with pytest.raises(BadInput, match=r"Undeclared.w is an array of unknown role and axes"):
        declaration(Undeclared(jnp.ones((2, 2))))


HEADERS = {
    "sign": {"in": 40, "out": 24, "k": 2},
    "low_rank": {"in": 40, "out": 24, "rank": 8, "copies": 2},
    "group_uniform": {"in": 40, "out": 24, "bits": 2, "group": 16},
    "dual_binary": {"in": 40, "out": 24, "group": 16},
    "codebook": {"in": 40, "out": 24, "stages": 2, "bits": 4, "dim": 4},
    "grouped_sign": {"in": 40, "out": 24, "k": 2, "group": 16},
    "uniform_sign": {"in": 40, "out": 24, "k": 2, "group": 16},
}
HEADERS["scaled"] = {"in": 40, "out": 24, "inner": HEADERS["sign"] | {"type": "sign"}}
HEADERS["sum"] = {"in": 40, "out": 24, "terms": [HEADERS["sign"] | {"type": "sign"}]}
HEADERS["table"] = {"in": 24, "out": 40, "matrix": HEADERS["sign"] | {"type": "sign"}}
HEADERS["reshaped"] = {"in": 40, "out": 24, "inputs": [40], "outputs": [4, 6],
                       "matrix": HEADERS["sign"] | {"type": "sign"}}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_are_read_and_every_damaged_field_is_refused(kind):
    assert set(HEADERS) == set(PACKED_TYPES)
    header = HEADERS[kind] | {"type": kind}
    assert abstract_packed(header).header() == header
    for name in HEADERS[kind]:
        if kind == "reshaped" and name in ("in", "out"):
            continue  # these repeat what the matrix tells
        damaged = [{k: v for k, v in header.items() if k != name}]
        damaged += [header | {name: value} for value in (0, -3, 2.5, "40", None, [], {})]
        for one in damaged:
            with pytest.raises(BadInput):
                abstract_packed(one)


def test_parts_of_another_shape_are_refused():
    other = {"type": "sign", "in": 40, "out": 25, "k": 1}
    for kind, held in (("scaled", {"inner": other}), ("sum", {"terms": [other, other]})):
        with pytest.raises(BadInput, match="is damaged"):
            abstract_packed(HEADERS[kind] | {"type": kind} | held)


def test_structures_of_classes_with_the_same_static_fields_differ():
    # JAX compares nodes of register_dataclass by their static fields alone, and a compiled function
    # may then take the program of one representation for the other.
    one = ResidualSign(jnp.ones((8, 8)), g=jnp.ones((1, 8)), h=jnp.ones((1, 8)))
    other = IndependentSign(jnp.ones((8, 8)), g=jnp.ones((1, 8)), h=jnp.ones((1, 8)))
    assert one.ste == other.ste
    assert jax.tree.structure(one) != jax.tree.structure(other)
    assert jax.tree.structure(one) == jax.tree.structure(one.replace(latent=jnp.zeros((8, 8))))
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(one)]
    assert paths == [".latent", ".g", ".h"]  # the names that checkpoints have
