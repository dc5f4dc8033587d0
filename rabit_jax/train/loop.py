"""The training loop: batches in, metrics out, checkpoints on the way."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, ParamSpec, TypeVar

import jax
import numpy as np
import optax

from rabit_jax.errors import BadInput
from rabit_jax.hosts import on_mesh
from rabit_jax.progress import say
from rabit_jax.train.checkpoints import Checkpoints, abstract, all_finite
from rabit_jax.train.health import Fault, Health
from rabit_jax.train.step import Metrics, Step, TrainState
from rabit_jax.types import Batch, Params

P = ParamSpec("P")
T = TypeVar("T")
Record = dict[str, float | int | str | None]

@dataclass(frozen=True)
class Watch(Generic[T]):
    """Measurements between steps, which do not count for the throughput.

    Attributes:
      every: steps between measurements; the first and the last step are always measured.
      before: `trainable -> snapshot`, called before a measured step.
      after: `(step, trainable, snapshot) -> None`, called after it.
    """

    every: int
    before: Callable[[Params], T]
    after: Callable[[int, Params, T], None]


@dataclass(frozen=True)
class Loop:
    """Settings of one training stage.

    Attributes:
      stage: name in the logs.
      steps: total number of steps.
      tokens_per_step: tokens of one batch, for the throughput.
      log: called with the record of each logged step.
      log_every: steps between records.
      save_every: steps between checkpoints; 0 saves only at the end.
      schedule: step -> learning rate, for the log.
      watch: measurements between steps.
      progress: called with `(steps done, record)`.
      stop: called after each step; True ends the loop after a checkpoint.
      health: of the trainer, whose step it tests; None where it tests nothing.
      ideal_seconds: of a step whose products run at the devices' peak FLOP/s, for the log's `mfu`;
        None where the peak is not known.
      profile: steps to be traced; None traces nothing.
    """

    stage: str
    steps: int
    tokens_per_step: int
    log: Callable[[Record], None] = lambda record: None
    log_every: int = 10
    save_every: int = 0
    schedule: optax.Schedule = lambda step: 0.0
    watch: Watch | None = None
    progress: Callable[[int, Record], None] = lambda step, record: None
    stop: Callable[[], bool] = lambda: False
    health: Health | None = None
    ideal_seconds: float | None = None
    profile: Profile | None = None


@dataclass(frozen=True)
class Profile:
    """Steps that are traced for the profiler of JAX, which TensorBoard and XProf show.

    Attributes:
      folder: where the trace is written.
      first, last: numbers of the first and the last step, from 1; a training that begins later or
        ends earlier is traced as far as it goes.
    """

    folder: Path
    first: int
    last: int


def train(
    loop: Loop,
    step: Step,
    state: TrainState,
    frozen: Params,
    teacher: Params | None,
    batches: Callable[[int], Batch],
    checkpoints: Checkpoints | None = None,
    resume: bool = False,
) -> TrainState:
    """Run `step(state, frozen, teacher, batches(s))` for s = 0 .. steps - 1.

    Batch s depends on s alone, so a resumed run sees the same batches as an uninterrupted one and
    ends in the same state, bit for bit. A fault that asks for it (see `rabit_jax.train.health`)
    puts the last checkpoint in place of the state; the steps since then count as done.

    Args:
      loop: settings.
      step: jitted; it may donate its first argument.
      state: state to start from; with `resume`, the newest whole checkpoint replaces it.
      frozen: params that do not train.
      teacher: params of the teacher, or None.
      batches: step -> batch on its devices.
      checkpoints: where to save; None saves no checkpoint.
      resume: continue from `checkpoints`.

    Returns:
      The state after the last step.

    Raises:
      BadInput: a fault that stops; the loss, the gradient or the state that is to be saved is not
        finite; nothing to roll back to. The last good checkpoint is kept.
      KeyboardInterrupt: `loop.stop()` returned True; the state has been saved.
    """
    if checkpoints and resume and (
        found := checkpoints.restore_last(abstract(state), whole)
    ):
        state = found[1]
    done = int(state.step)
    clock = _Clock(loop.tokens_per_step)
    faults, tracing = _Faults(loop, checkpoints), _Tracing(loop, done)
    pending = None
    while done < loop.steps:
        watch = loop.watch
        if watch and done % watch.every and done != loop.steps - 1:
            watch = None
        snapshot = clock.pause(watch.before, state.trainable) if watch else None
        tracing.before(done + 1)
        with jax.profiler.StepTraceAnnotation(loop.stage, step_num=done + 1):
            state, metrics = step(state, frozen, teacher, clock.read(batches, done))
        done += 1
        tracing.after(done, metrics)
        fault = _report(loop, pending, clock)
        if fault and faults.met(done - 1, fault):
            state, done, pending = clock.pause(faults.back, state, done - 1), done - 1, None
            continue
        pending = (done, metrics)
        clock.tick(metrics)
        saving = checkpoints and (
            done == loop.steps or (loop.save_every and done % loop.save_every == 0)
        )
        stopping = loop.stop()
        if watch or saving or stopping or done == loop.steps:
            fault = _report(loop, pending, clock)
            pending = None
            if faults.met(done, fault):
                state = clock.pause(faults.back, state, done)
        if saving or stopping or done == loop.steps:
            clock.pause(_check_state, loop, done, state)
        if watch:
            clock.pause(watch.after, done, state.trainable, snapshot)
        if checkpoints and (saving or stopping):
            clock.pause(checkpoints.save, done, state)
        if stopping and done < loop.steps:
            if checkpoints:
                checkpoints.wait()
            raise KeyboardInterrupt
    if checkpoints:
        checkpoints.wait()
    return state


class _Faults:
    """Says what is at fault, counts, and goes back to a checkpoint."""

    def __init__(self, loop: Loop, checkpoints: Checkpoints | None):
        self.loop, self.checkpoints = loop, checkpoints
        self.row = 0  # skipped or rolled back steps in a row
        self.seen: dict[str, int] = {}  # warnings by kind
        self.returns: dict[int, int] = {}  # rollbacks by the step of the checkpoint

    def met(self, step: int, fault: Fault | None) -> bool:
        """Log the fault of a step; True where the state is to be rolled back.

        Raises:
          BadInput: it stops the run, or one too many steps in a row were at fault.
        """
        if fault is None or fault.action == "warn":
            self.row = 0
        if fault is None:
            return False
        loop, kind, action = self.loop, fault.group.kind, fault.action
        loop.log({"stage": "health", "during": loop.stage, "step": step,
                  "tokens": step * loop.tokens_per_step, **fault.record()})
        if action == "stop":
            raise BadInput(
                f"stage {loop.stage}: at step {step} {fault}; the checkpoints before it are kept: "
                f"lower the learning rate or the clipping norm, or set health.{kind} to another "
                "action"
            )
        self.seen[kind] = count = self.seen.get(kind, 0) + 1
        if action != "warn" or count & (count - 1) == 0:  # warnings 1, 2, 4, 8, ...
            done = {"warn": "", "skip": "; the step is skipped", "rollback": ""}[action]
            say(f"warning: {loop.stage}: at step {step} {fault}{done}")
        if action == "warn":
            return False
        self.row += 1
        self._check(step, self.row, "steps in a row were at fault")
        return action == "rollback"

    def back(self, state: TrainState, step: int) -> TrainState:
        """The state of the last checkpoint, with `step` steps counted as done.

        Raises:
          BadInput: there is no checkpoint, or it was gone back to too often.
        """
        stage, target = self.loop.stage, abstract(state)
        jax.tree.map(lambda leaf: leaf.delete(), state)  # else both states are in memory
        found = self.checkpoints and self.checkpoints.restore_last(target, whole)
        if not found:
            raise BadInput(
                f"stage {stage}: at step {step} there is no checkpoint to roll back to: lower "
                "save_every, or choose skip or stop as the action"
            )
        last, state = found
        self.returns[last] = count = self.returns.get(last, 0) + 1
        self._check(step, count, f"rollbacks to the checkpoint of step {last} were needed")
        say(f"{stage}: rolled back to the checkpoint of step {last}, going on after step {step}")
        counted = on_mesh(np.asarray(step, np.int32), target.step.sharding)
        return dataclasses.replace(state, step=counted)

    def _check(self, step: int, count: int, what: str) -> None:
        patience = self.loop.health.config.patience if self.loop.health else 1
        if count > patience:
            raise BadInput(
                f"stage {self.loop.stage}: at step {step} {count} {what}, more than "
                f"health.patience ({patience}) allows; the checkpoints are kept: lower the "
                "learning rate or the clipping norm"
            )


def whole(state: TrainState) -> bool:
    """Whether training can go on from a state: all that trains, and its moments, is finite."""
    return bool(all_finite((state.trainable, state.opt_state)))


def _check_state(loop: Loop, done: int, state: TrainState) -> None:
    """Raise BadInput where the update has made a state that is not finite."""
    if not whole(state):
        raise BadInput(
            f"stage {loop.stage}: the update of step {done} has made weights or moments that are "
            "not finite, so the state is not saved; the checkpoints before it are kept: lower the "
            "learning rate or the clipping norm"
        )


def _report(loop: Loop, pending: tuple[int, Metrics] | None, clock: _Clock) -> Fault | None:
    """Check and log the metrics of a step; returns its fault. They are read one step late, so that
    the device never waits for the host."""
    if pending is None:
        return None
    done, metrics = pending
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    fault = loop.health.read(values) if loop.health else None
    if fault and fault.action in ("stop", "rollback"):
        return fault  # what the step gave is of no use
    if not fault and not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
        raise BadInput(
            f"stage {loop.stage}: loss {values['loss']} and gradient norm {values['grad_norm']} "
            f"at step {done} are not finite; the checkpoints before it are kept: lower the "
            "learning rate or the clipping norm"
        )
    updates = int(values.pop("updates", done))
    record: Record = {
        "stage": loop.stage,
        "step": done,
        "tokens": done * loop.tokens_per_step,
        **values,
        "lr": float(np.asarray(loop.schedule(max(updates - 1, 0)))),
        "tokens_per_second": clock.rate(),
        "mfu": clock.share(loop.ideal_seconds),
        "input_wait": clock.input_wait(),
        "device_memory": peak_device_memory(),
    }
    loop.progress(done, record)
    finite = math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])
    if finite and (done % loop.log_every == 0 or done in (1, loop.steps)):
        loop.log(record)
    return fault


def peak_device_memory() -> int | None:
    """Most bytes that any local device has held at once; None where the backend does not tell."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found),
               default=None)


class _Tracing:
    """Begins and ends the trace of a loop whose first step is behind `done` steps."""

    def __init__(self, loop: Loop, done: int):
        self.profile, self.steps, self.running = loop.profile, loop.steps, False
        if self.profile and (done >= self.profile.last or loop.steps < self.profile.first):
            say(f"{loop.stage}: no trace, since none of the steps {self.profile.first} to "
                f"{self.profile.last} is run here")
            self.profile = None

    def before(self, step: int) -> None:
        if self.profile and not self.running and step >= self.profile.first:
            jax.profiler.start_trace(str(self.profile.folder))
            self.running = True

    def after(self, step: int, metrics: Metrics) -> None:
        if self.profile and self.running and step >= min(self.profile.last, self.steps):
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
            say(f"trace of steps up to {step} in {self.profile.folder}: `pip install xprof`, then "
                f"`tensorboard --logdir {self.profile.folder}`")
            self.profile = None


class _Clock:
    """Tokens per second over the steps since compilation, without the pauses."""

    def __init__(self, tokens_per_step: int):
        self.tokens_per_step = tokens_per_step
        self.steps, self.start, self.paused, self.waited = 0, math.nan, 0.0, 0.0

    def tick(self, metrics: Metrics) -> None:
        if math.isnan(self.start):
            # Metrics are read when their step is done, so the time begins where the first one is.
            jax.block_until_ready(metrics)
            self.start, self.paused, self.waited = time.perf_counter(), 0.0, 0.0
        else:
            self.steps += 1

    def read(self, batches: Callable[[int], Batch], step: int) -> Batch:
        """A batch; the time until it is there counts as waiting for input."""
        begin = time.perf_counter()
        found = batches(step)
        self.waited += time.perf_counter() - begin
        return found

    def elapsed(self) -> float:
        """Seconds since the first step, without the pauses."""
        return time.perf_counter() - self.start - self.paused

    def input_wait(self) -> float:
        """Share of the time that the host waited for batches, during which a device may be busy."""
        return self.waited / self.elapsed() if self.steps else 0.0

    def share(self, ideal: float | None) -> float | None:
        """Share of the time that all steps would have taken with `ideal` seconds each."""
        return ideal * self.steps / self.elapsed() if self.steps and ideal is not None else None

    def pause(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        begin = time.perf_counter()
        result = function(*args, **kwargs)
        self.paused += time.perf_counter() - begin
        return result

    def rate(self) -> float:
        if not self.steps:
            return 0.0
        return self.steps * self.tokens_per_step / self.elapsed()
