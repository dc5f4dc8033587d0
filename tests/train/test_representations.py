"""Every representation under the one trainer: it learns, keeps its bits, restores, and shards."""

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
    convert,
    linear,
    residual,
    scaled,
)
from rabit_jax.train.checkpoints import Checkpoints, abstract
from rabit_jax.train.optimizer import OptimizerConfig
from rabit_jax.train.sharding import param_shardings
from rabit_jax.train.trainer import make_trainer

LAYERS, I, O = 2, 64, 32
PATH = "layers/mlp/up/kernel"
SPECS = {
    "residual": ResidualSignSpec(k=2, rounds=2),
    "residual, smooth": ResidualSignSpec(k=2, rounds=2, ste="smooth"),
    "grouped": ResidualSignSpec(k=2, rounds=2, group=16),
    "independent": IndependentSignSpec(k=2, rounds=2),
    "frozen path": FrozenPathSpec(k=2, rounds=2),
    "uniform": UniformResidualSpec(k=2, rounds=2),
    "low rank": LowRankSignSpec(rank=8),
    "group uniform": GroupUniformSpec(group=16),
    "dual binary": DualBinarySpec(group=16),
    "codebook": CodebookSpec(iterations=2),
    "sum": residual(LowRankSignSpec(rank=8), ResidualSignSpec(k=1, rounds=0)),
    "scaled": scaled(GroupUniformSpec(group=16)),
}


def kernels(seed=0):
    w = np.random.default_rng(seed).normal(size=(LAYERS, I, O)) / 8
    return {"layers": {"mlp": {"up": {"kernel": jnp.asarray(w, jnp.float32)}}}}


def node(params):
    return params["layers"]["mlp"]["up"]["kernel"]


def loss(params, teacher, batch):
    """Summed squared error of both layers against the teacher's, on one input a token."""

    def one(_, weights):
        student, taught = weights
        return _, jnp.mean(jnp.square(linear(batch["x"], student) - batch["x"] @ taught), axis=-1)

    errors = jax.lax.scan(one, 0, (node(params), node(teacher)))[1]
    return {"loss": jnp.sum(errors)}


def batch_at(step):
    # Inputs from few directions leave the weights room to make up for each other's rounding.
    directions = np.random.default_rng(99).normal(size=(8, I))
    x = np.random.default_rng(step).normal(size=(8, 4, 8)) @ directions / 3
    return {"x": x.astype(np.float32), "tokens": np.zeros((8, 4), np.int32)}


@pytest.fixture(params=SPECS, scope="module")
def student(request):
    return convert(kernels(), [(PATH, SPECS[request.param])])


def test_it_learns_keeps_its_bits_and_is_restored(student, tmp_path, meshes):
    optimizer = OptimizerConfig(name="adamw", lr=2e-3)
    trainer = make_trainer(loss, student, optimizer, 60, teacher=kernels(), mesh=meshes(1, 1))
    state, seen = trainer.state, []
    for step in range(60):
        batch = trainer.place(batch_at(step))
        state, metrics = trainer.step(state, trainer.frozen, trainer.teacher, batch)
        seen.append(float(metrics["loss"]))
    assert np.mean(seen[-10:]) < 0.9 * np.mean(seen[:5])
    trained = trainer.params(state)
    for before, after in zip(jax.tree.leaves(student), jax.tree.leaves(trained), strict=True):
        fixed = not jnp.issubdtype(before.dtype, jnp.floating)
        assert bool((before == after).all()) == fixed and before.dtype == after.dtype
    with Checkpoints(tmp_path / "kept") as kept:
        kept.save(0, trained)
        found = kept.restore(0, abstract(trained))
    assert jax.tree.structure(found) == jax.tree.structure(trained)
    jax.tree.map(np.testing.assert_array_equal, found, trained)


def test_it_is_split_like_the_kernel_and_computes_the_same(student, meshes):
    mesh = meshes(2, 4)
    where = param_shardings(student, mesh)
    placed = jax.device_put(student, where)
    split = [s for s in jax.tree.leaves(where) if "tensor" in jax.tree.leaves(tuple(s.spec))]
    assert split, "no leaf is split over the outputs"
    np.testing.assert_allclose(
        jax.jit(lambda p: node(p).dense())(placed), node(student).dense(), atol=1e-6
    )
    for sharding, leaf in zip(jax.tree.leaves(where), jax.tree.leaves(student), strict=True):
        if leaf.shape[-2:] == (I, O):  # a large array is never whole on a device
            assert sharding.shard_shape(leaf.shape)[-1] == O // 4
