"""The step: accumulation, gradients, the loop, resuming."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax import BadInput
from rabit_jax.train import loop as loop_module
from rabit_jax.train.checkpoints import Checkpoints, abstract
from rabit_jax.train.loop import Loop, train
from rabit_jax.train.optimizer import OptimizerConfig, partition, roles
from rabit_jax.train.step import gradients, next_tokens, real_tokens
from rabit_jax.train.trainer import make_trainer

FREEZE = ("embedding", "head")


def same(a, b):
    return all(
        bool((x == y).all()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.parametrize("accumulate", [pytest.param(2, marks=pytest.mark.more), 4])
def test_accumulated_gradient_is_that_of_the_whole_ragged_batch(
    loss, student, teacher, batches, accumulate
):
    trainable, frozen = partition(student, roles(student), FREEZE)
    whole, metrics = gradients(loss, trainable, frozen, teacher, batches(0), 1)
    pieces, summed = gradients(loss, trainable, frozen, teacher, batches(0), accumulate)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(pieces), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * float(jnp.abs(a).max()) + 1e-9)
    np.testing.assert_allclose(metrics["loss"], summed["loss"], rtol=1e-5)


def test_loss_is_a_mean_over_real_tokens(loss, student, teacher, batches):
    trainable, frozen = partition(student, roles(student), FREEZE)
    batch = batches(0)
    _, metrics = gradients(loss, trainable, frozen, teacher, batch, 1)
    np.testing.assert_allclose(
        metrics["loss"], loss(student, teacher, batch)["loss"] / batch["mask"].sum(), rtol=1e-6
    )
    assert real_tokens(batch) == batch["mask"].sum()
    assert next_tokens(batch) == (batch["mask"][:, 1:] & batch["mask"][:, :-1]).sum()
    assert next_tokens({"tokens": batch["tokens"]}) == 8 * 11


def test_training_lowers_the_loss_and_leaves_the_given_params_alone(
    build, student, teacher, batches
):
    before = jax.tree.map(np.array, (student, teacher))
    trainer = build(steps=30)
    log = []
    train(
        Loop("qat", 30, 96, log=log.append, log_every=1),
        trainer.step,
        trainer.state,
        trainer.frozen,
        trainer.teacher,
        lambda s: trainer.place(batches(0)),
    )
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    assert [line["step"] for line in log] == list(range(1, 31)) and log[4]["tokens"] == 480
    assert same(before, (student, teacher))


def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(build, batches, tmp_path):
    def run(folder, resume=False, stop_after=None):
        trainer = build(steps=12)
        seen = []
        loop = Loop(
            "qat",
            12,
            96,
            log=seen.append,
            log_every=1,
            save_every=5,
            stop=lambda: stop_after is not None and len(seen) >= stop_after,
        )
        with Checkpoints(folder) as kept:
            return train(
                loop,
                trainer.step,
                trainer.state,
                trainer.frozen,
                trainer.teacher,
                lambda s: trainer.place(batches(s)),
                kept,
                resume,
            )

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", stop_after=6)
    assert same(whole, run(tmp_path / "parts", resume=True))


def test_a_loss_that_is_not_finite_stops_with_its_step_and_keeps_the_checkpoint(
    build, batches, tmp_path
):
    trainer = build(steps=12)

    def poisoned(state, frozen, teacher, batch):
        state, metrics = trainer.step(state, frozen, teacher, batch)
        return state, {**metrics, "loss": jnp.where(state.step == 7, jnp.nan, metrics["loss"])}

    with Checkpoints(tmp_path) as kept:
        with pytest.raises(BadInput, match="step 7"):
            train(
                Loop("qat", 12, 96, save_every=3),
                poisoned,
                trainer.state,
                trainer.frozen,
                trainer.teacher,
                lambda s: trainer.place(batches(s)),
                kept,
            )
        assert kept.steps() == [3, 6]
        step, _ = kept.restore_last(abstract(build(steps=12).state))
    assert step == 6


def test_an_update_that_is_not_finite_is_never_saved(build, batches, tmp_path):
    """Loss and gradient of the step are finite; what the update made of the weights is not."""
    trainer = build(steps=12)

    def overshooting(state, frozen, teacher, batch):
        state, metrics = trainer.step(state, frozen, teacher, batch)
        factor = jnp.where(state.step == 4, jnp.inf, 1.0)
        return state.replace(trainable=jax.tree.map(lambda w: w * factor, state.trainable)), metrics

    with Checkpoints(tmp_path) as kept:
        with pytest.raises(BadInput, match="update of step 4.*not finite.*not saved"):
            train(
                Loop("qat", 12, 96, save_every=1), overshooting, trainer.state, trainer.frozen,
                trainer.teacher, lambda s: trainer.place(batches(s)), kept,
            )
        assert kept.steps() == [2, 3]


def test_everything_frozen_is_refused(loss):
    params = {"layers": {"kernel": jnp.ones((2, 2))}}
    with pytest.raises(BadInput, match="nothing to train"):
        make_trainer(loss, params, OptimizerConfig(freeze=("matrix",)), 3)


def test_batches_that_do_not_divide_are_refused_with_a_sentence(build, batches, meshes):
    trainer = build(meshes(2, 2), accumulate=3)
    with pytest.raises(BadInput, match="accumulate is 3 for a batch of 8 rows"):
        trainer.step(trainer.state, trainer.frozen, trainer.teacher, trainer.place(batches(0)))
    with pytest.raises(BadInput, match="7 rows of tokens for 2 parts"):
        trainer.place({name: array[:7] for name, array in batches(0).items()})


def test_speed_is_counted_from_the_end_of_the_first_step(monkeypatch):
    """Steps are dispatched before they are done: one of 7 seconds, then four of 2."""
    now = [0.0]

    class Running:
        def block_until_ready(self):
            now[0] += 7.0
            return self

    monkeypatch.setattr(loop_module.time, "perf_counter", lambda: now[0])
    clock = loop_module._Clock(tokens_per_step=100)
    clock.tick({"loss": Running()})
    for _ in range(4):
        now[0] += 2.0
        clock.tick({"loss": Running()})
    assert clock.rate() == 100 / 2.0 and clock.share(0.5) == 0.25
