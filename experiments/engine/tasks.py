"""The tasks of `experiments.run`: their stages, and the state that the stages share."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

from rabit_jax import BadInput, hosts
from rabit_jax.experiments.engine import end_to_end, ptq, qat, scores, tuning
from rabit_jax.experiments.engine.folder import RunFolder
from rabit_jax.experiments.engine.inputs import Inputs
from rabit_jax.experiments.engine.job import Job
from rabit_jax.experiments.engine.settings import RunConfig
from rabit_jax.experiments.engine.stages import Stage
from rabit_jax.formats.checkpoint import open_checkpoint

PTQ = (ptq.QUANTISE, ptq.START, tuning.STAGE, end_to_end.STAGE, end_to_end.PACK, *scores.SCORES)
TASKS: dict[str, tuple[Stage[Any], ...]] = {"qat": qat.STAGES, "ptq": PTQ}
STAGE_NAMES = tuple(dict.fromkeys(stage.name for stages in TASKS.values() for stage in stages))


def task_stages(config: RunConfig, named: Collection[str]) -> list[Stage[Any]]:
    """The stages that a config asks for.

    Args:
      config: of the run.
      named: stages that the command line names.

    Raises:
      BadInput: the task has no such stage, or settings that it cannot carry out.
    """
    if config.task == "ptq" and not config.teacher.path:
        raise BadInput("task ptq trains nothing: set teacher.path to the model to be packed")
    stages = [stage for stage in TASKS[config.task] if stage.wanted(config)]
    names = [stage.name for stage in stages]
    if unknown := [name for name in named if name not in names]:
        raise BadInput(
            f"task {config.task} has no stages named {', '.join(unknown)}: name one of "
            f"{', '.join(names)}"
        )
    return stages


@contextlib.contextmanager
def opened(config: RunConfig, folder: RunFolder) -> Iterator[Inputs | Job]:
    """What the stages of a task share, once its text and settings have been checked.

    Raises:
      BadInput: what the run could not carry out; nothing is written by then.
    """
    # Checks read text and leave tokens in the cache, models of the hub are fetched to one.
    if config.task == "qat":
        run = Inputs(config, folder)
        hosts.first_before_others(run.check)
        yield run
        return
    with contextlib.ExitStack() as stack:
        opening = open_checkpoint(config.teacher.path)
        job = Job(config, folder, hosts.first_before_others(lambda: stack.enter_context(opening)))
        hosts.first_before_others(job.check)
        yield job
