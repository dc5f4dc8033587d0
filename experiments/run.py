"""A full-precision model in, a 2-bit model out.

Stages: teacher, calibrate, init, QAT, evaluate, pack, generate.

    python -m experiments.run --config quickstart           a config that comes with the package
    python -m experiments.run --config my.yaml qat.steps=400 init.spec.k=3
    python -m experiments.run --config my.yaml --dry-run    resolved config and param table
    python -m experiments.run --config my.yaml --resume     continue after Ctrl-C or a crash

A stage whose inputs and settings have not changed since it was completed is skipped.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
import uuid
from collections.abc import Callable

import jax

from rabit_jax import BadInput, __version__, convert, describe
from rabit_jax.experiments import ptq
from rabit_jax.experiments.engine import stages
from rabit_jax.experiments.engine.config import (
    SHIPPED,
    config_parser,
    dump_yaml,
    load_config,
    section_hash,
)
from rabit_jax.experiments.engine.console import main_guard, table, watch_signals
from rabit_jax.experiments.engine.folder import RunFolder
from rabit_jax.experiments.engine.inputs import Inputs, abstract_params
from rabit_jax.experiments.engine.machine import device, peak_memory, versions
from rabit_jax.experiments.engine.settings import RunConfig
from rabit_jax.experiments.report.summary import costs, summarise, table_rows, write_results
from rabit_jax.formats.folder import fingerprint
from rabit_jax.progress import say
from rabit_jax.train.sharding import make_mesh

STAGES: dict[str, Callable] = {
    "teacher": stages.teacher,
    "calibrate": stages.calibration,
    "init": stages.init,
    "qat": stages.qat,
    "evaluate": stages.evaluate,
    "pack": stages.packing,
    "generate": stages.samples,
}
LAST = "generate"


def stage_key(run: Inputs, name: str, ids: dict[str, str]) -> str:
    """Hash of all that a stage's result depends on; `ids` are those of the stages before it."""
    c, text = run.config, run.text.train.digest
    held_out = [t.digest for t in (run.text.held_out, run.text.unseen) if t]
    parts = {
        "teacher": lambda: (
            fingerprint(c.teacher.path)
            if c.teacher.path
            else (c.teacher, c.model, c.compute, c.seed, text)
        ),
        "calibrate": lambda: (c.calibrate, c.init, c.compute, c.seed, text, ids["teacher"]),
        "init": lambda: (c.init, c.seed, c.evaluate, held_out, ids["calibrate"]),
        "qat": lambda: (c.qat, c.compute, c.seed, c.evaluate, text, held_out, ids["init"]),
        "evaluate": lambda: (c.evaluate, held_out, ids["qat"]),
        "pack": lambda: (c.evaluate, held_out, ids["qat"]),
        "generate": lambda: (c.generate, c.seed, ids["pack"]),
    }
    return section_hash(__version__, name, parts[name]())


def run_stages(run: Inputs, resume: bool, forced: set[str], until: str) -> dict[str, dict]:
    """Carry out or skip every stage in order up to `until`; returns their records."""
    records: dict[str, dict] = {}
    ids: dict[str, str] = {}
    for name, stage in STAGES.items():
        key = stage_key(run, name, ids)
        record = None if name in forced else run.folder.completed(name, key)
        if record:
            say(f"{name}: complete with the same inputs, skipped (--force {name} redoes it)")
        else:
            if resume and name not in forced:
                check_resumable(run.folder, name, key)
            continues = run.folder.begin(name, key, resume and name not in forced)
            begin = time.perf_counter()
            result = stage(run, continues)
            record = run.folder.complete(
                name,
                {
                    "key": key,
                    "id": uuid.uuid4().hex if name in forced else key,
                    "seconds": time.perf_counter() - begin,
                    "peak_memory_bytes": peak_memory(),
                    "versions": versions(),
                    "device": device(),
                    "result": result,
                },
            )
            run.forget()
        records[name], ids[name] = record, record["id"]
        if run.stopped:
            raise KeyboardInterrupt
        if name == until:
            break
    return records


def check_resumable(folder: RunFolder, name: str, key: str) -> None:
    """Raise BadInput where resuming would have to throw an unfinished stage away."""
    unfinished = next((stage for stage in STAGES if folder.began(stage)), None)
    if unfinished and (unfinished != name or folder.began(name) != key):
        raise BadInput(
            f"cannot resume {folder.path}: since stage {unfinished} was stopped, what stage {name} "
            "reads has changed (text, model files or the version of this package); put it back, or "
            "run without --resume to start that stage again"
        )


def dry_run(config: RunConfig) -> None:
    """Print the resolved config and the param table of the student; nothing else is done.

    It needs neither the devices of the mesh nor the hub, where the teacher's config.json comes
    with the package.
    """
    try:
        make_mesh(config.mesh)
    except BadInput as error:
        say(f"not on this machine: {error}")
    teacher = dataclasses.replace(config.teacher, path=shipped_model(config.teacher.path))
    here = dataclasses.replace(config, teacher=teacher, mesh={"tensor": len(jax.devices())})
    params = abstract_params(Inputs(here, RunFolder(here)).model_config)
    student = jax.eval_shape(lambda p: convert(p, config.init.rules()), params)
    print(dump_yaml(config))
    print(describe(student))


def shipped_model(path: str) -> str:
    """The folder under `configs/models` that holds the config.json of a hub id, or `path`."""
    folder = SHIPPED / "models" / path
    return str(folder) if path and (folder / "config.json").is_file() else path


def execute(arguments: argparse.Namespace) -> int:
    """The run itself."""
    config = load_config(RunConfig, arguments.config, arguments.overrides)
    if config.task == "ptq":
        ptq.check_config(config, arguments)
    if arguments.dry_run:
        dry_run(config)
        return 0
    if config.task == "ptq":
        return ptq.execute(config, arguments)
    folder = RunFolder(config)
    run = Inputs(config, folder)
    run.check()
    folder.open(arguments.resume)
    watch_signals(run, "at the next step or stage")
    try:
        records = run_stages(run, arguments.resume, set(arguments.force), arguments.until)
        if arguments.until != LAST:
            say(f"{arguments.until}: complete in {folder.path}, the stages after it are left out")
            return 0
        command = " ".join(["python -m experiments.run", *arguments.command])
        summary = summarise(run, records, command)
        report = write_results(run, summary, records["generate"]["result"]["samples"])
    finally:
        folder.close()
    show(summary)
    print(f"report: {report}\npacked model: {folder.path / 'packed'}")
    return 0


def show(summary: dict) -> None:
    """The results table and the numbers one looks for first."""
    rows = table_rows(summary)
    table(
        f"{summary['name']}, context {summary['teacher']['context']}",
        ("model", "perplexity", "bits per byte", "over teacher", "bits per weight"),
        [
            (
                r["name"],
                r["ppl"],
                r["bits_per_byte"],
                f"{100 * r['ppl_over_teacher']:+.1f}%",
                r["bits_per_weight"],
            )
            for r in rows
        ],
        stdout=True,
    )
    closed = summary["gap_closed"]
    print(f"gap to the teacher closed by QAT: {'-' if closed is None else f'{100 * closed:.0f}%'}")
    print(costs(summary))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = config_parser("python -m experiments.run", __doc__)
    found.add_argument(
        "--dry-run", action="store_true", help="print the resolved config and the param table"
    )
    found.add_argument(
        "--resume", action="store_true", help="continue an unfinished stage from its checkpoint"
    )
    found.add_argument(
        "--until",
        default=LAST,
        choices=list(STAGES),
        metavar="STAGE",
        help="end after this stage, without summary and report",
    )
    found.add_argument(
        "--force",
        action="append",
        default=[],
        choices=list(STAGES),
        metavar="STAGE",
        help=f"redo a stage and what depends on it: {', '.join(STAGES)}",
    )
    return found


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    command = sys.argv[1:] if argv is None else argv
    arguments = parser().parse_intermixed_args(command)
    arguments.command = command
    return main_guard(lambda: execute(arguments), resumable=True)


if __name__ == "__main__":
    sys.exit(main())
