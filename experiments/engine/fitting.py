"""A training stage of a run: the library's loop with the run's text, checkpoints and metrics.

And what such a stage leaves for those after it: a tree of arrays, the only checkpoint of a folder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import jax

from rabit_jax import BadInput, hosts
from rabit_jax.atomic import remove
from rabit_jax.experiments.engine.folder import RunFolder
from rabit_jax.experiments.engine.settings import RunConfig, Training
from rabit_jax.experiments.engine.signals import stopping_between_steps
from rabit_jax.experiments.engine.text import Text
from rabit_jax.progress import progress, say
from rabit_jax.train.checkpoints import Checkpoints, abstract
from rabit_jax.train.loop import Loop, Record, Watch, train, whole
from rabit_jax.train.step import TrainState
from rabit_jax.train.trainer import Trainer
from rabit_jax.types import Params


class Trains(Protocol):
    """What training needs of a run."""

    config: RunConfig
    folder: RunFolder
    text: Text
    stopped: bool


def fit(
    run: Trains, stage: str, section: Training, trainer: Trainer, resume: bool,
    watch: Watch | None = None, notice: Callable[[Record], str | None] = lambda record: None,
) -> TrainState:
    """Train one stage with checkpoints, metrics and a progress bar.

    `notice` reads the record of the first step; what it returns is printed as one line.
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
            )
            batches = run.text.batches(section, run.config.seed)
            return train(
                loop, trainer.step, state, trainer.frozen, trainer.teacher, batches, kept
            )


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
