"""Faults injected into a training: where they are found, and what is done about them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax import BadInput
from rabit_jax.train.checkpoints import Checkpoints
from rabit_jax.train.health import HealthConfig
from rabit_jax.train.loop import Loop, train
from rabit_jax.train.optimizer import OptimizerConfig
from rabit_jax.train.step import TrainState
from rabit_jax.train.trainer import make_trainer

STEPS = 10
FAULTS = ("loss", "gradient", "spike")


def same(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(bool(np.array_equal(x, y)) for x, y in pairs)


@pytest.fixture
def faulty(loss, student, teacher, batches, meshes):
    """`faulty(folder, {step: fault}, **health)`: a training that meets faults; a fault is "loss",
    "gradient" (infinite in g of q, layer 1, the loss finite) or "spike"."""

    def poisoned(params, taught, batch):
        found = dict(loss(params, taught, batch))
        g = params["layers"]["attn"]["q"]["kernel"].g[1, 0, 0]
        on = {name: batch[name][0] for name in FAULTS}
        # sqrt(0) has the value 0 and an infinite slope
        root = jnp.sqrt(on["gradient"] * (g - jax.lax.stop_gradient(g)) + 1 - on["gradient"])
        found["loss"] = found["loss"] * (1 + 99 * on["spike"]) + root + jnp.where(
            on["loss"] > 0, jnp.nan, 0.0)
        return found

    def run(folder, faults, steps=STEPS, lr=2e-3, warmup=0.02, build=False, resume=False,
            stop_after=None, **health):
        trainer = make_trainer(
            poisoned, student, OptimizerConfig("adamw", lr=lr, freeze=("embedding", "head"),
                                               schedule="constant", warmup=warmup),
            steps, teacher=teacher, mesh=meshes(1, 1), health=HealthConfig(**health))
        if build:
            return trainer

        def batch(step):
            names = {n: np.zeros(8, np.float32) for n in FAULTS}
            if fault := faults.get(step + 1):
                names[fault] += 1
            return trainer.place({**batches(step), **names})

        lines, states = [], {}

        def step(state, frozen, taught, data):
            before = int(state.step)
            state, metrics = trainer.step(state, frozen, taught, data)
            states[before + 1] = jax.tree.map(np.array, state)
            return state, metrics

        loop = Loop("qat", steps, 96, log=lines.append, log_every=1, save_every=3,
                    health=trainer.health,
                    stop=lambda: stop_after is not None and len(lines) >= stop_after)
        with Checkpoints(folder) as kept:
            final = train(loop, step, trainer.state, trainer.frozen, trainer.teacher, batch, kept,
                          resume)
        return final, lines, states

    return run


def of_health(lines):
    return [line for line in lines if line["stage"] == "health"]


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_what_is_not_finite_stops_by_default_and_names_step_and_matrix(faulty, tmp_path, fault):
    place = {"loss": "the loss is not finite",
             "gradient": "gradient of layers/attn/q/kernel/g, layer 1 is not finite"}[fault]
    with pytest.raises(BadInput, match=f"at step 5 .*{place}"):
        faulty(tmp_path, {5: fault})
    with Checkpoints(tmp_path) as kept:
        assert kept.steps() == [3]


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_skipped_step_leaves_the_state_bit_for_bit_and_counts_the_data(
    faulty, tmp_path, capsys, fault
):
    final, lines, states = faulty(tmp_path, {5: fault}, nonfinite="skip")
    kept = [jax.tree.leaves((states[n].trainable, states[n].opt_state)) for n in (4, 5, 6)]
    assert same(kept[0], kept[1]) and not same(kept[1], kept[2])
    assert [int(states[n].step) for n in (4, 5, 6)] == [4, 5, 6] and int(final.step) == STEPS
    (line,) = of_health(lines)
    assert (line["step"], line["kind"], line["action"]) == (5, "nonfinite", "skip")
    assert "at step 5" in capsys.readouterr().err
    steps = [one["step"] for one in lines if one["stage"] == "qat"]
    assert steps == [n for n in range(1, STEPS + 1) if n != 5]


@pytest.mark.more
def test_skipping_is_resumed_bit_for_bit(faulty, tmp_path):
    settings = {"nonfinite": "skip", "spike": "skip"}
    whole, _, _ = faulty(tmp_path / "whole", {5: "loss", 8: "gradient"}, **settings)
    with pytest.raises(KeyboardInterrupt):
        faulty(tmp_path / "parts", {5: "loss", 8: "gradient"}, stop_after=5, **settings)
    again, _, _ = faulty(
        tmp_path / "parts", {5: "loss", 8: "gradient"}, resume=True, **settings)
    assert same(whole, again)


@pytest.mark.parametrize("step", [5, *(pytest.param(n, marks=pytest.mark.more)
                                       for n in (6, STEPS))])
def test_a_rollback_goes_on_from_the_last_checkpoint_behind_the_fault(faulty, tmp_path, step):
    final, lines, states = faulty(tmp_path, {step: "gradient"}, nonfinite="rollback")
    (line,) = of_health(lines)
    assert (line["step"], line["action"]) == (step, "rollback")
    last = (step - 1) // 3 * 3
    reference = make_reference(faulty, tmp_path, states, last, step)
    assert same(final.trainable, reference.trainable) and int(final.step) == STEPS


def make_reference(faulty, tmp_path, states, last, step):
    """The state of step `last`, then the batches behind `step`, by the same compiled step."""
    trainer = faulty(tmp_path, {}, build=True, nonfinite="rollback")
    place = jax.tree.map(lambda x: x.sharding, trainer.state)
    state = jax.device_put(states[last], place)
    from tests.train.conftest import ragged

    for n in range(step, STEPS):
        zeros = {k: np.zeros(8, np.float32) for k in FAULTS}
        state, _ = trainer.step(state, trainer.frozen, trainer.teacher,
                                trainer.place({**ragged(n), **zeros}))
    return state


def test_without_a_checkpoint_or_with_endless_faults_the_run_stops(faulty, tmp_path):
    with pytest.raises(BadInput, match="no checkpoint to roll back to"):
        faulty(tmp_path / "a", {2: "loss"}, nonfinite="rollback")
    every = dict.fromkeys(range(4, 11), "loss")
    with pytest.raises(BadInput, match="3 steps in a row were at fault.*patience"):
        faulty(tmp_path / "b", every, nonfinite="skip", patience=2)


@pytest.mark.more
def test_a_spike_is_found_once_enough_steps_were_seen(faulty, tmp_path):
    _, lines, states = faulty(
        tmp_path, {20: "spike", 55: "spike"}, steps=57, spike="skip", spike_factor=5.0)
    (line,) = of_health(lines)
    assert (line["step"], line["kind"]) == (55, "spike")
    assert same(states[54].trainable, states[55].trainable)
    assert same(states[54].opt_state.loss, states[55].opt_state.loss)
    losses = [one["loss"] for one in lines if one["stage"] == "qat"][:54]
    mean = 0.0
    for n, loss in enumerate(losses, 1):
        mean += (loss - mean) / min(n, 50)
    np.testing.assert_allclose(states[54].opt_state.loss.mean, mean, rtol=1e-4)


def test_a_storm_of_sign_flips_names_the_matrix(faulty, tmp_path):
    """Updates of the size of the weights turn a large share of the signs."""
    _, lines, states = faulty(tmp_path, {}, steps=4, lr=0.1, flips="warn", flips_share=0.1)
    line = next(line for line in of_health(lines) if line["step"] > 1)
    before, after = (states[n].trainable for n in (line["step"] - 1, line["step"]))
    part = line["path"].split("/")[1:3]
    nodes = [tree["layers"][part[0]][part[1]]["kernel"] for tree in (before, after)]
    signs = [np.asarray(node.positive())[line["layer"]] for node in nodes]
    share = (signs[0] != signs[1]).mean(axis=(1, 2)).max()
    np.testing.assert_allclose(line["value"], share, rtol=1e-6)


def test_a_scale_that_leaves_its_range_is_warned_of(faulty, tmp_path, capsys):
    trainer = faulty(tmp_path, {}, build=True)
    spoiled = jax.tree.map(jnp.copy, trainer.state)
    node = spoiled.trainable["layers"]["mlp"]["down"]["kernel"]
    node = node.replace(h=node.h.at[1, 0, 3].set(1e6))
    spoiled.trainable["layers"]["mlp"]["down"]["kernel"] = node
    from tests.train.conftest import ragged

    zeros = {k: np.zeros(8, np.float32) for k in FAULTS}
    _, metrics = trainer.step(spoiled, trainer.frozen, trainer.teacher,
                              trainer.place({**ragged(0), **zeros}))
    fault = trainer.health.read({name: float(value) for name, value in metrics.items()})
    assert (fault.group.path, fault.layer) == ("layers/mlp/down/kernel/h", 1)
    assert fault.action == "warn" and fault.value == pytest.approx(1e6, rel=0.01)


def test_paths_that_a_layer_lacks_are_no_fault(faulty, tmp_path):
    from tests.train.conftest import ragged

    trainer = faulty(tmp_path, {}, build=True)
    start = jax.tree.map(np.array, trainer.state)  # a step donates its state
    node = start.trainable["layers"]["mlp"]["down"]["kernel"]
    zeros = {k: np.zeros(8, np.float32) for k in FAULTS}
    batch = trainer.place({**ragged(0), **zeros})

    def fault(**scales):
        state = jax.tree.map(jnp.asarray, start)
        state.trainable["layers"]["mlp"]["down"]["kernel"] = node.replace(**scales)
        _, metrics = trainer.step(state, trainer.frozen, trainer.teacher, batch)
        return trainer.health.read({name: float(value) for name, value in metrics.items()})

    g, h = node.g.copy(), node.h.copy()
    g[1, 1] = h[1, 1] = 0  # layer 1 has one path
    assert fault(g=g, h=h) is None
    h[0, 1, 3] = 1e6
    found = fault(g=g, h=h)
    assert (found.group.path, found.layer) == ("layers/mlp/down/kernel/h", 0)


def test_checkpoints_of_a_training_without_spikes_are_those_of_before(faulty, tmp_path):
    """The running mean is no part of the state where nothing asks for it; not even as None, which
    a checkpoint would list."""
    assert [f.name for f in dataclasses.fields(TrainState)] == ["step", "trainable", "opt_state"]
    plain, watching = (faulty(tmp_path, {}, build=True, **settings).state
                       for settings in ({}, {"spike": "warn"}))
    assert jax.tree.structure(plain.opt_state) == jax.tree.structure(watching.opt_state.state)


@pytest.mark.parametrize("wrong", [{"nonfinite": "warn"}, {"spike_factor": 1.0}, {"patience": 0},
                                   {"flips_share": 1.5}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(BadInput, match=next(iter(wrong))):
        HealthConfig(**wrong)
