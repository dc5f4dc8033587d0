"""A full-precision model in, a 2-bit model out.

Stages of task qat: teacher, calibrate, init, qat, evaluate, pack, generate; of task ptq: quantise,
where the config asks for them tune, end_to_end and pack, then score_teacher, score_init,
score_tuned, score_packed.

    python -m experiments.run --config quickstart           a config that comes with the package
    python -m experiments.run --config my.yaml qat.steps=400 init.spec.k=3
    python -m experiments.run --config my.yaml --dry-run    resolved config and param table
    python -m experiments.run --config my.yaml --plan h100:8    memory and time on devices not here
    python -m experiments.run --config my.yaml --resume     continue after Ctrl-C or a crash

A stage whose inputs and settings have not changed since it was completed is skipped.
"""

from __future__ import annotations

from rabit_jax.experiments.engine.launch import supervised
from rabit_jax.experiments.engine.signals import CONTINUE, watch

if __name__ == "__main__":
    supervised()  # before any thread begins
    watch(CONTINUE)  # before the imports below, which take seconds

import argparse
import dataclasses
import sys

import jax

from rabit_jax import BadInput, convert, describe, hosts
from rabit_jax.experiments.engine.config import (
    config_parser,
    dump_yaml,
    load_config,
    shipped_model,
)
from rabit_jax.experiments.engine.console import main_guard
from rabit_jax.experiments.engine.fitting import Measure
from rabit_jax.experiments.engine.folder import RunFolder
from rabit_jax.experiments.engine.inputs import Inputs, abstract_params, check_settings
from rabit_jax.experiments.engine.launch import cluster, start
from rabit_jax.experiments.engine.launch import finish as finished
from rabit_jax.experiments.engine.settings import RunConfig
from rabit_jax.experiments.engine.stages import run_stages
from rabit_jax.experiments.engine.tasks import STAGE_NAMES, opened, task_stages
from rabit_jax.experiments.report.results import finish
from rabit_jax.progress import say
from rabit_jax.train.sharding import make_mesh


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    command = sys.argv[1:] if argv is None else argv
    arguments = parser().parse_intermixed_args(command)
    made_by = " ".join(["python -m experiments.run", *command])
    code = main_guard(lambda: execute(arguments, made_by), resumable=True, several=True)
    return finished(code)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = config_parser("python -m experiments.run", __doc__ or "")
    add = found.add_argument
    add("--dry-run", action="store_true", help="print the resolved config and the param table")
    add("--plan", metavar="DEVICES",
        help="compile the run's programs for these devices, which need not be here, and print the "
             "memory, FLOPs and time that they take: cpu:8, h100:8, a100-80gb:4, v5e:8x8; exit "
             "code 3 where something does not fit")
    add("--json", action="store_true", help="with --plan: one JSON object on stdout")
    add("--resume", action="store_true", help="continue an unfinished stage from its checkpoint")
    add("--profile", nargs="?", const="11:13", metavar="FIRST:LAST",
        help="trace these steps of each training for the JAX profiler, into profile/ of the run "
             "folder (default 11:13, behind compilation)")
    add("--peak-flops", type=float, metavar="FLOPS",
        help="FLOP/s of one device, for mfu in the metrics, where the device is not a known one")
    add("--until", choices=STAGE_NAMES, metavar="STAGE",
        help="end after this stage, without summary and report")
    add("--force", action="append", default=[], choices=STAGE_NAMES, metavar="STAGE",
        help=f"redo a stage and what depends on it: {', '.join(STAGE_NAMES)}")
    return found


def execute(arguments: argparse.Namespace, made_by: str) -> int:
    """The run itself; `made_by` is the command that the summary names."""
    found = cluster()
    if found and found.process and (arguments.plan or arguments.dry_run):
        return 0  # process 0 prints it
    if arguments.plan:
        from rabit_jax.experiments.planning.plan import plan  # no run needs it

        return plan(arguments.config, arguments.overrides, arguments.plan, arguments.json)
    config = load_config(RunConfig, arguments.config, arguments.overrides)
    until = arguments.until
    stages = task_stages(config, [*arguments.force, *([until] if until else [])])
    if arguments.dry_run:
        dry_run(config)
        return 0
    measured = Measure(traced_steps(arguments.profile), arguments.peak_flops)
    start(config.hosts.start_timeout, config.hosts.heartbeat)
    folder = RunFolder(config)

    def lock() -> None:  # before text is read, which may take long
        if folder.exists():
            folder.lock()
        else:
            folder.check()

    try:
        hosts.first_does(lock)
        with opened(config, folder) as run:
            run.measure = measured
            hosts.first_does(lambda: folder.open(arguments.resume))
            last = until or stages[-1].name
            records = run_stages(run, stages, arguments.resume, set(arguments.force), last)
            if last != stages[-1].name:
                say(f"{last}: complete in {folder.path}, the stages after it are left out")
                return 0
            finish(run, records, made_by)
    finally:
        folder.close()
    return 0


def traced_steps(text: str | None) -> tuple[int, int] | None:
    """The first and last step of `FIRST:LAST`.

    Raises:
      BadInput: it has another form.
    """
    if text is None:
        return None
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise BadInput(f"--profile is {text!r}: give the first and the last step as in 11:13")
    return int(first), int(last)


def dry_run(config: RunConfig) -> None:
    """Print the resolved config and the param table of the student, or refuse what a run would.

    Nothing else is done: no text is read but for a tokenizer that the run would train. It needs
    neither the devices of the mesh nor the hub, where the teacher's config.json comes with the
    package.
    """
    try:
        make_mesh(config.mesh)
    except BadInput as error:
        say(f"not on this machine: {error}")
    teacher = dataclasses.replace(config.teacher, path=shipped_model(config.teacher.path))
    here = dataclasses.replace(config, teacher=teacher, mesh={"tensor": len(jax.devices())})
    shape = Inputs(here, RunFolder(here)).model_config
    check_settings(here, shape)
    params = abstract_params(shape)
    student = jax.eval_shape(lambda p: convert(p, config.init.rules()), params)
    print(dump_yaml(config))
    print(describe(student))


if __name__ == "__main__":
    sys.exit(main())
