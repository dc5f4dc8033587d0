"""Eight simulated devices against one: statistics, initialisation, losses, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax import LLAMA_LINEARS, BadInput, ResidualSignSpec, calibrate, convert
from rabit_jax.train.losses import next_token_loss
from rabit_jax.train.optimizer import merge, partition, roles
from rabit_jax.train.sharding import batch_sharding, make_mesh, param_shardings
from rabit_jax.train.step import gradients
from rabit_jax.tree import weights_of

GRIDS = [(8, 1), (1, 8), (2, 4), (1, 1, 8), (2, 2, 2)]  # data, tensor, fsdp
RULES = [(LLAMA_LINEARS, ResidualSignSpec(k=2, rounds=10, tolerance=0.0))]
FREEZE = ("embedding", "head")


def measure(model, params, mesh, batches):
    def loss(params, batch):
        return next_token_loss(model, params, batch, chunk=5)[0]

    where = param_shardings(params, mesh)
    placed = jax.device_put(params, where)
    rows = [jax.device_put(batches(s), batch_sharding(mesh)) for s in range(2)]
    stats = calibrate(
        loss, placed, rows, RULES, shardings=where, batch_sharding=batch_sharding(mesh)
    )
    return stats, convert(placed, RULES, stats)


@pytest.mark.parametrize(
    "shape", [pytest.param(g, marks=pytest.mark.more) for g in GRIDS[:4]] + GRIDS[4:]
)
def test_statistics_and_initialisation_are_those_of_one_device(
    model, teacher, batches, meshes, shape
):
    one_stats, one = measure(model, teacher, meshes(1, 1), batches)
    stats, student = measure(model, teacher, meshes(*shape), batches)
    for path in one_stats:
        np.testing.assert_allclose(stats[path].s_in, one_stats[path].s_in, rtol=1e-5)
        np.testing.assert_allclose(stats[path].s_out, one_stats[path].s_out, rtol=1e-5)
    nodes, others = weights_of(one), weights_of(student)
    for path, node in nodes.items():
        other = others[path]
        np.testing.assert_allclose(other.g, node.g, rtol=1e-4)
        np.testing.assert_allclose(other.h, node.h, rtol=1e-4)
        # A sign may differ only where the residual that it is the sign of is a near-tie.
        a = np.asarray(node.h[:, 0, :, None] * node.g[:, 0, None, :])
        first, latent = np.asarray(node.signs())[:, 0], np.asarray(node.latent)
        residual = np.stack([latent, latent - first * a], axis=1)
        differs = np.asarray(node.signs()) != np.asarray(other.signs())
        assert (np.abs(residual)[differs] < 1e-3 * a.mean()).all()


def test_latents_live_where_the_kernels_do(model, teacher, batches, meshes):
    mesh = meshes(2, 4)
    _, student = measure(model, teacher, mesh, batches)
    node = student["layers"]["mlp"]["up"]["kernel"]
    assert node.latent.sharding.spec == jax.sharding.PartitionSpec(None, None, "tensor")
    assert node.latent.addressable_shards[0].data.shape == (2, 32, 16)


@pytest.mark.parametrize("grids", [pytest.param(GRIDS[:4], marks=pytest.mark.more), GRIDS[4:]])
def test_loss_and_every_gradient_from_the_same_state(
    build, loss, teacher, batches, meshes, grids
):
    """At steps 0, 20 and 50 of one run; trajectories themselves part, since rounding flips
    signs."""
    trainer = build(meshes(1, 1), steps=51)
    state, snapshots = trainer.state, {}
    for step in range(51):
        if step in (0, 20, 50):
            snapshots[step] = jax.tree.map(np.array, trainer.params(state))
        state, _ = trainer.step(
            state, trainer.frozen, trainer.teacher, trainer.place(batches(step))
        )

    run = jax.jit(lambda a, b, c, d: gradients(loss, a, b, c, d, 1))  # compiled once for each mesh

    def measured(params, step, mesh):
        where = param_shardings(params, mesh)
        names = roles(params)
        trainable, frozen = partition(jax.device_put(params, where), names, FREEZE)
        taught = jax.device_put(teacher, param_shardings(teacher, mesh))
        return run(
            trainable, frozen, taught, jax.device_put(batches(100 + step), batch_sharding(mesh))
        )

    for step, params in snapshots.items():
        grads, metrics = measured(params, step, meshes(1, 1))
        for shape in grids:
            others, found = measured(params, step, meshes(*shape))
            np.testing.assert_allclose(found["loss"], metrics["loss"], rtol=1e-5)
            for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(others), strict=True):
                np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * float(jnp.abs(a).max()))


@pytest.mark.parametrize(
    "shape", [pytest.param(g, marks=pytest.mark.more) for g in GRIDS[:4]] + GRIDS[4:]
)
def test_a_step_runs_on_the_mesh_and_keeps_its_shardings(build, batches, meshes, shape):
    trainer = build(meshes(*shape), accumulate=1)
    before = jax.tree.map(lambda x: x.sharding, trainer.state)
    state, metrics = trainer.step(
        trainer.state, trainer.frozen, trainer.teacher, trainer.place(batches(0))
    )
    assert jax.tree.map(lambda x: x.sharding, state) == before and np.isfinite(metrics["loss"])
    trainable = merge(state.trainable, trainer.frozen)
    wanted = param_shardings(trainable, meshes(*shape))
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, trainable, wanted))
    latent = state.trainable["layers"]["mlp"]["up"]["kernel"].latent
    moment = [x for x in jax.tree.leaves(state.opt_state) if x.shape == latent.shape]
    assert moment and all(m.sharding == latent.sharding for m in moment)


@pytest.mark.more
def test_accumulation_on_a_mesh_is_that_of_one_device(build, batches, meshes):
    found = []
    for shape in ((1, 1), (2, 2, 2)):
        trainer = build(meshes(*shape), accumulate=2)
        batch = trainer.place(batches(0))
        _, metrics = trainer.step(trainer.state, trainer.frozen, trainer.teacher, batch)
        found.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


@pytest.mark.parametrize(
    "axes, said",
    [
        ({"data": 3}, "8 devices"),
        ({"model": 2}, "'model'"),
        ({"data": 2, "tensor": 2}, "8 devices"),
    ],
)
def test_a_mesh_that_does_not_fit(axes, said):
    with pytest.raises(BadInput, match=said):
        make_mesh(axes)
    assert dict(make_mesh({"tensor": 2}).shape) == {"data": 4, "fsdp": 1, "tensor": 2}
    assert dict(make_mesh({"fsdp": 8}).shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert dict(make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
