"""A checkpoint of one mesh goes on on another: 8 devices, then 1, then 4."""

import jax
import numpy as np
import pytest

from rabit_jax.train.checkpoints import Checkpoints, abstract

GRIDS = [(2, 2, 2), (1, 1, 1), (1, 2, 2)]  # data, tensor, fsdp


def losses(trainer, state, batches, steps):
    """The losses of the next steps from a copy of a state, which stays."""
    state, found = jax.tree.map(lambda leaf: leaf.copy(), state), []
    for step in steps:
        state, metrics = trainer.step(
            state, trainer.frozen, trainer.teacher, trainer.place(batches(step)))
        found.append(float(metrics["loss"]))
    return found, state


@pytest.mark.more
def test_a_state_goes_on_on_other_meshes(build, batches, meshes, tmp_path):
    """The next loss is that of the mesh that saved it, and the state is bitwise the same."""
    trainer = build(meshes(*GRIDS[0]))
    _, state = losses(trainer, trainer.state, batches, range(2))
    for n, grid in enumerate(GRIDS[1:], 1):
        wanted, _ = losses(trainer, state, batches, [n + 1])
        saved = jax.tree.map(np.array, state)
        with Checkpoints(tmp_path / str(n)) as kept:
            kept.save(n, state)
        trainer = build(meshes(*grid))
        with Checkpoints(tmp_path / str(n)) as kept:
            step, state = kept.restore_last(abstract(trainer.state))
        assert step == n
        assert jax.tree.all(jax.tree.map(lambda a, b: (np.asarray(a) == b).all(), state, saved))
        assert jax.tree.all(jax.tree.map(
            lambda a, b: a.sharding == b.sharding, state, trainer.state))
        found, state = losses(trainer, state, batches, [n + 1])
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
