"""Benchmarks: `python -m experiments.bench NAME [options] [--json]`; `--help` lists them.

With `--json` stdout holds one JSON object `{"device", "date", "versions", "command", "rows"}` and
nothing else; without it a table. Progress goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from rabit_jax.experiments.bench import step as bench_step
from rabit_jax.experiments.bench import svid as bench_svid
from rabit_jax.experiments.engine.console import EXIT_CODES, Parser, main_guard, table
from rabit_jax.experiments.engine.machine import report

BENCHMARKS = {"step": bench_step, "svid": bench_svid}
EXAMPLES = """examples:
  python -m experiments.bench step --json > step.json
  python -m experiments.bench svid
  python -m experiments.bench step --help
"""


def parser() -> argparse.ArgumentParser:
    """The command line: one subcommand per benchmark, each with its own options and examples."""
    top = Parser(prog="python -m experiments.bench", description=__doc__,
                 epilog=EXAMPLES + "\n" + EXIT_CODES,
                 formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, module in BENCHMARKS.items():
        sub = commands.add_parser(
            name, help=module.__doc__.splitlines()[0], description=module.__doc__,
            epilog=f"{module.EXAMPLES}\n{EXIT_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter)
        module.add_options(sub)
        sub.add_argument("--json", action="store_true", help="one JSON object on stdout, no table")
    return top


def run(arguments: Sequence[str]) -> None:
    """Run one benchmark and print its result to stdout.

    Raises:
      BadInput: an unknown benchmark or option, or a value out of its range.
    """
    options = parser().parse_args(arguments)
    command = shlex.join(["python", "-m", "experiments.bench", *arguments])
    result = report(command, BENCHMARKS[options.name].measure(options))
    if options.json:
        print(json.dumps(result))
        return
    columns = list(result["rows"][0])
    cells = [[_cell(row[name]) for name in columns] for row in result["rows"]]
    table(f"{options.name}: {result['device']}, {result['date']}", columns, cells, stdout=True)


def _cell(value: Any) -> Any:
    return "x".join(map(str, value)) if isinstance(value, list) else value


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 2 for bad input, 130 when stopped."""
    return main_guard(lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
