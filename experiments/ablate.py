"""A grid of overrides x seeds, every cell an ordinary run with the same teacher.

    python -m experiments.ablate --config experiments/configs/ablation_small.yaml
    python -m experiments.ablate --config my.yaml seeds=0,1 run.qat.steps=400 --jobs 2
    python -m experiments.ablate --config my.yaml --dry-run   list the cells, check their settings
    python -m experiments.ablate --config my.yaml --table     write the tables of complete cells

The same command continues where it was stopped; complete cells are not run again. To repeat one,
remove its folder. ablation.csv, .md and .html are written after every cell.
"""

from __future__ import annotations

from rabit_jax.experiments.engine.signals import CELLS, watch

if __name__ == "__main__":
    watch(CELLS)  # before the imports below, which take seconds

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rabit_jax import BadInput
from rabit_jax.atomic import write_text
from rabit_jax.experiments.ablation.cells import Plan, differing, make_plan
from rabit_jax.experiments.ablation.figures import figures
from rabit_jax.experiments.ablation.results import Results, collect
from rabit_jax.experiments.ablation.runner import RUN, Runner, complete, locked
from rabit_jax.experiments.ablation.tables import (
    comma_separated,
    page,
    report_tables,
    results_table,
)
from rabit_jax.experiments.engine.config import config_parser, dump_yaml
from rabit_jax.experiments.engine.console import main_guard, table
from rabit_jax.experiments.engine.folder import RunFolder
from rabit_jax.experiments.engine.records import refuse_later
from rabit_jax.experiments.engine.settings import RunConfig
from rabit_jax.experiments.engine.tasks import opened, task_stages
from rabit_jax.progress import number, say


def execute(arguments: argparse.Namespace, command: Sequence[str]) -> int:
    """Run the ablation, or what its options ask for instead; returns the exit code."""
    plan = make_plan(arguments.config, arguments.overrides)
    made_by = shlex.join(
        ["python", "-m", "experiments.ablate", "--config", arguments.config, *arguments.overrides]
    )
    if arguments.dry_run:
        dry_run(plan)
        return 0
    for runs in ("teacher", "search/*/*", "cells/*/*"):
        for folder in sorted(plan.folder.glob(runs)):
            refuse_later(folder)
    if arguments.table:
        if not plan.folder.is_dir():
            raise BadInput(f"there is no folder {plan.folder}: run the ablation without --table")
        show(write_tables(plan, made_by), plan.folder)
        return 0
    imported = (part for name in arguments.imported for part in ("--import", name))
    runner = Runner((*command, *imported), arguments.jobs)
    with locked(plan.folder) as runner.lock:
        write_text(plan.folder / "config.yaml", dump_yaml(plan.ablation))
        with runner.signals():
            run_all(plan, runner, made_by)
            results = write_tables(plan, made_by)
    show(results, plan.folder)
    missing = sum(found is None for _, found in (*results.trials, *results.cells))
    if not missing:
        return 0
    if runner.stopped:
        say(f"stopped with {missing} cells missing; the same command goes on from there")
    return runner.code or 1


def run_all(plan: Plan, runner: Runner, made_by: str) -> None:
    """The teacher, then the searches, then the cells seed by seed."""
    if plan.teacher:
        if not complete(plan.teacher):
            say(f"teacher: its progress is in {plan.teacher.folder}")
        runner.run("teacher", [plan.teacher])
        if not complete(plan.teacher):
            return
    for title in ("search", "cells"):
        cells = plan.trials() if title == "search" else plan.cells(collect(plan).chosen)
        runner.run(title, cells, lambda: write_tables(plan, made_by))


def write_tables(plan: Plan, made_by: str) -> Results:
    """Write ablation.csv, .md, .html and figures/ from the cells that are complete."""
    results = collect(plan)
    tables, drawn = report_tables(results, made_by), figures(results)
    for name, figure in drawn.items():
        write_text(plan.folder / "figures" / f"{name}.svg", figure)
    write_text(plan.folder / "ablation.csv", comma_separated(results))
    for kind in ("md", "html"):
        text = page(kind, plan.ablation.name, tables, drawn)
        write_text(plan.folder / f"ablation.{kind}", text)
    return results


def show(results: Results, folder: Path) -> None:
    """The results table and where to read more."""
    found = results_table(results)
    table(f"{results.plan.ablation.name}: {found.title}", found.columns, found.rows, stdout=True)
    print(f"report: {folder / 'ablation.html'}\ntables: {folder / 'ablation.md'}, ablation.csv")


def dry_run(plan: Plan) -> None:
    """Print the cells, and refuse what a run would refuse; nothing is written."""
    search = plan.ablation.search
    # Any choice of the search will do: steps and tokens are the same for all.
    chosen = {row.label: search.values[0] for row in plan.rows} if search else {}
    changes = {row.label: "; ".join(differing(plan, row)) for row in plan.rows}
    rows, total = [], 0
    for cell in (*plan.trials(), *plan.cells(chosen)):
        assert cell.config
        steps, tokens = budget(cell.config)
        total += tokens
        change = changes[cell.row]
        if search and cell.kind == "search":
            change = f"{search.key}={cell.value:g}"
        rows.append((cell.row, str(cell.seed), cell.kind, steps, tokens, change or "-"))
    columns = ("row", "seed", "kind", "steps", "tokens", "against run")
    table(f"{plan.ablation.name}: {len(rows)} cells", columns, rows, stdout=True)
    print(f"training tokens of all cells: {number(total)}")
    for row in plan.rows:
        try:
            # With the config of the row, not of a cell: the shared teacher may not be there yet.
            task_stages(row.config, ())
            with opened(row.config, RunFolder(row.config)):
                pass
        except BadInput as error:
            raise BadInput(f"row {row.label!r}: {error}") from None


def budget(config: RunConfig) -> tuple[int, int]:
    """Steps and tokens that a cell trains for; of task ptq those of every block, and of the stage
    end to end where there is one."""
    if config.task == "qat":
        qat = config.qat
        return qat.steps, qat.steps * qat.batch_size * qat.length
    tune, whole = config.tune, config.end_to_end
    windows = tune.epochs * (tune.sequences - tune.held_out)
    steps = windows // tune.batch_size + whole.steps
    return steps, windows * tune.length + whole.steps * whole.batch_size * whole.length


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = config_parser("python -m experiments.ablate", __doc__ or "")
    found.add_argument(
        "--jobs", type=int, default=1, help="cells at once, each on its share of the cores"
    )
    found.add_argument(
        "--dry-run", action="store_true", help="print the cells and check their settings"
    )
    found.add_argument(
        "--table", action="store_true", help="only write the tables of the cells that are complete"
    )
    return found


def main(argv: list[str] | None = None, command: Sequence[str] = RUN) -> int:
    """Entry point; returns the exit code. `command` runs a cell."""
    arguments = parser().parse_intermixed_args(sys.argv[1:] if argv is None else argv)
    return main_guard(lambda: execute(arguments, command))


if __name__ == "__main__":
    sys.exit(main())
