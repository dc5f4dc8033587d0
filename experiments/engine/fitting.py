"""A training stage of a run: the library's loop with the run's text, checkpoints and metrics.

And what such a stage leaves for those after it: a tree of arrays, the only checkpoint of a folder.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import jax

from rabit_jax import BadInput, hosts
from rabit_jax.atomic import remove
from rabit_jax.experiments.engine.folder import RunFolder
from rabit_jax.experiments.engine.settings import EndToEnd, Qat, RunConfig, Training
from rabit_jax.experiments.engine.signals import stopping_between_steps
from rabit_jax.experiments.engine.text import Text
from rabit_jax.experiments.planning.flops import flops_of
from rabit_jax.experiments.planning.targets import known_chip
from rabit_jax.models.decoder import Decoder
from rabit_jax.progress import progress, say
from rabit_jax.train.checkpoints import Checkpoints, abstract
from rabit_jax.train.loop import Loop, Profile, Record, Watch, train, whole
from rabit_jax.train.losses import distillation_loss, nested_loss
from rabit_jax.train.step import Loss, TrainState
from rabit_jax.train.trainer import Trainer
from rabit_jax.types import Array, Batch, Params
from rabit_jax.weights.mixed_stack import sign_paths


def distillation(model: Decoder, section: EndToEnd | Qat, chunk: int) -> Loss:
    """What a stage of distillation minimises: `distillation_loss`, or `nested_loss` where the
    section nests paths.

    Under a budget it may be that no layer has as many paths as the largest number in `nested`; a
    number that none has stands for the whole model.
    """
    def loss(params: Params, teacher: Params, batch: Batch) -> dict[str, Array]:
        if not section.nested:
            return distillation_loss(model, params, teacher, batch, section.gamma, chunk)
        most, weights = max(sign_paths(params)), {}
        for n, weight in section.prefixes.items():
            weights[min(n, most)] = weights.get(min(n, most), 0.0) + weight
        return nested_loss(model, params, teacher, batch, section.gamma, weights, chunk)

    return loss


@dataclass(frozen=True)
class Measure:
    """What a command asks to be measured of its trainings.

    Attributes:
      traced: the first and the last step of each training to be traced; None traces nothing.
      peak_flops: FLOP/s of one device, for `mfu`; None takes what is known of the device.
    """

    traced: tuple[int, int] | None = None
    peak_flops: float | None = None


class Trains(Protocol):
    """What training needs of a run."""

    config: RunConfig
    folder: RunFolder
    text: Text
    stopped: bool
    measure: Measure


def fit(
    run: Trains, stage: str, section: Training, trainer: Trainer, resume: bool,
    watch: Watch | None = None, notice: Callable[[Record], str | None] = lambda record: None,
    batches: Callable[[int], Batch] | None = None,
) -> TrainState:
    """Train one stage with checkpoints, metrics and a progress bar.

    `notice` reads the record of the first step; what it returns is printed as one line. `batches`
    are those of the training text unless others are given.
    """
    tokens = section.batch_size * section.length
    with Checkpoints(run.folder.checkpoints(stage)) as kept:
        state = trainer.state
        if resume and kept.begun():
            # Else the fresh state would stand beside the restored one.
            target = abstract(state)
            jax.tree.map(lambda leaf: leaf.delete(), state)
            found = kept.restore_last(target, whole)
            assert found is not None
            state = found[1]
        begin, asked = int(state.step), 0
        if resume:
            say(f"{stage}: continuing after step {begin}")
            run.folder.metrics.forget((stage,), begin)
        with (
            stopping_between_steps(run, "at the next step"),
            progress(stage, section.steps, start=begin) as bar,
        ):
            def shown(step: int, record: Record) -> None:
                bar.update(
                    step, loss=record["loss"], tokens_per_second=record["tokens_per_second"]
                )
                if step == 1 and (line := notice(record)):
                    say(f"warning: {stage}: {line}")

            def stop() -> bool:
                # Of several processes each asks at the same steps, for the answer costs a wait.
                nonlocal asked
                asked += 1
                if hosts.several() and asked % section.log_every:
                    return False
                run.stopped = hosts.any_asks(run.stopped)
                return run.stopped

            loop = Loop(
                stage,
                section.steps,
                tokens,
                log=run.folder.metrics.log,
                log_every=section.log_every,
                save_every=section.save_every,
                schedule=trainer.schedule,
                watch=watch,
                progress=shown,
                stop=stop,
                health=trainer.health,
            )
            batches = batches or run.text.batches(section, run.config.seed)
            if run.measure.traced:
                first, last = run.measure.traced
                profile = Profile(run.folder.path / "profile" / stage, first, last)
                loop = dataclasses.replace(loop, profile=profile)
            ideal = ideal_seconds(run.measure, trainer, state, batches)
            loop = dataclasses.replace(loop, ideal_seconds=ideal)
            return train(
                loop, trainer.step, state, trainer.frozen, trainer.teacher, batches, kept
            )


def ideal_seconds(
    measure: Measure, trainer: Trainer, state: TrainState, batches: Callable[[int], Batch]
) -> float | None:
    """Seconds of one step whose products run at the peak FLOP/s of their dtype on all devices.

    What is computed again and what the optimiser computes is not counted. None where the peak is
    neither given nor known; nothing is traced then.
    """
    chip = known_chip(jax.devices()[0].device_kind)
    if chip is None and measure.peak_flops is None:
        return None
    traced = trainer.step.trace(state, trainer.frozen, trainer.teacher, batches(0))  # pyright: ignore
    found = flops_of(traced.jaxpr.jaxpr).model

    def peak(dtype: str) -> float:
        own = chip and (chip.flops32 if "32" in dtype else chip.flops16)
        return measure.peak_flops or own or math.inf

    devices = len(jax.tree.leaves(state)[0].sharding.device_set)
    return sum(n / peak(dtype) for dtype, n in found.items()) / devices


def keep(folder: RunFolder, name: str, tree: Params) -> None:
    """Save a tree as the only checkpoint of its folder; an earlier attempt's is removed."""
    hosts.first_does(lambda: remove(folder.checkpoints(name)))
    with Checkpoints(folder.checkpoints(name)) as made:
        made.save(0, tree)


def kept(folder: RunFolder, name: str, target: Params, stage: str) -> Params:
    """What `keep` saved, in the shapes and shardings of `target`.

    Raises:
      BadInput: it cannot be read or is damaged; the message names the stage that makes it.
    """
    with Checkpoints(folder.checkpoints(name)) as made:
        try:
            return made.restore(0, target)
        except BadInput as error:
            raise BadInput(f"{error}; --force {stage} makes it again") from error
