"""Benchmarks: `python -m experiments.bench NAME [options] [--json]`; `--help` lists them.

With `--json` stdout holds one JSON object `{"device", "date", "versions", "command", "rows"}` and
nothing else; without it a table. Progress goes to stderr.
"""

from __future__ import annotations

from rabit_jax.experiments.engine.signals import ENDED, STOPPED, watch

if __name__ == "__main__":
    watch(STOPPED, ENDED)  # before the imports below, which take seconds

import argparse
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rabit_jax.atomic import write_text
from rabit_jax.experiments.bench import (
    cache,
    data,
    decode,
    kernels,
    mesh,
    peers,
    server,
    step,
    svid,
)
from rabit_jax.experiments.engine.console import (
    EXIT_CODES,
    Parser,
    common_options,
    main_guard,
    table,
)
from rabit_jax.experiments.engine.machine import report
from rabit_jax.formats.folder import read_json
from rabit_jax.kernels.bench import aot
from rabit_jax.kernels.bench.machine import driver
from rabit_jax.progress import Value, say
from rabit_jax.types import Json

# Each is a module with EXAMPLES, add_options(parser), measure(options) -> rows, COLUMNS (key of a
# row -> head of its column in the table) and remarks(rows) -> lines below the table.
BENCHMARKS = {"step": step, "svid": svid, "kernels": kernels, "decode": decode, "aot": aot,
              "peers": peers, "server": server, "cache": cache, "data": data, "mesh": mesh}
# Those whose results are kept, and the key of each in the file of its device.
SAVED = {"kernels": "products", "decode": "decode", "aot": "aot", "peers": "peers"}
RESULTS = Path(aot.__file__).parents[1] / "results"
EXAMPLES = """examples:
  python -m experiments.bench step --json > step.json
  python -m experiments.bench svid
  python -m experiments.bench kernels --shapes llama2-7b --batch 1,2,4,8
  python -m experiments.bench decode --model tinyllama-1.1b --context 128,2048
  python -m experiments.bench aot --archs sm_89,sm_90
  python -m experiments.bench peers --model tinyllama-1.1b --batch 1,4,16
  python -m experiments.bench data --text 1e9
  python -m experiments.bench server --url http://127.0.0.1:8000/v1 --streams 1,4,8
  python -m experiments.bench cache --model runs/mine/packed --text file:my.txt --context 8192
  python -m experiments.bench mesh
"""


def parser() -> argparse.ArgumentParser:
    """The command line: one subcommand per benchmark, each with its own options and examples."""
    top = Parser(prog="python -m experiments.bench", description=__doc__,
                 epilog=f"{EXAMPLES}\n{EXIT_CODES}",
                 formatter_class=argparse.RawDescriptionHelpFormatter)
    common_options(top)
    commands = top.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, module in BENCHMARKS.items():
        text = module.__doc__ or ""
        sub = commands.add_parser(
            name, help=text.splitlines()[0], description=text,
            epilog=f"{module.EXAMPLES}\n{EXIT_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter)
        module.add_options(sub)
        sub.add_argument("--json", action="store_true", help="one JSON object on stdout, no table")
        if name in SAVED:
            sub.add_argument("--save", action="store_true",
                             help="also write it to kernels/results/<device>.json")
    return top


def run(arguments: Sequence[str]) -> None:
    """Run one benchmark and print its result to stdout.

    Raises:
      BadInput: an unknown benchmark or option, or a value out of its range.
    """
    options = parser().parse_args(arguments)
    command = shlex.join(["python", "-m", "experiments.bench", *arguments])
    result = report(command, BENCHMARKS[options.name].measure(options))
    try:
        if options.name in SAVED and options.save:
            save(result, SAVED[options.name])
    finally:  # what took long is shown where the disk is full
        if options.json:
            print(json.dumps(result))
        else:
            show(options.name, result)


def show(name: str, result: Json) -> None:
    """Print the table of the rows that were measured to stdout, and the remarks below it."""
    module = BENCHMARKS[name]
    measured = [row for row in result["rows"] if row.get("refused") is None]
    cells = [[_cell(row[key]) for key in module.COLUMNS] for row in measured]
    table(f"{name}: {result['device']}, {result['date']}", list(module.COLUMNS.values()), cells,
          stdout=True)
    for line in module.remarks(result["rows"]):
        print(line)


def _cell(value: Value | list) -> Value:
    return "x".join(map(str, value)) if isinstance(value, list) else value


def save(result: Json, key: str) -> None:
    """Write the result into the file of its device, beside those of the other benchmarks.

    The file holds `{"products": ..., "decode": ..., "aot": ...}`, each the JSON object of a run
    with the version of the driver. A result replaces the one that its key held before.
    """
    name = re.sub(r"[^a-z0-9]+", "-", result["device"].lower()).strip("-")
    file = RESULTS / f"{name}.json"
    held = read_json(file) if file.exists() else {}
    held[key] = {**result, "driver": driver()}
    write_text(file, json.dumps(held, indent=1) + "\n")
    say(f"saved {key} to {file}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 2 for bad input, 130 when stopped."""
    return main_guard(lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
