"""Benchmark of the packed products and of decoding: `python -m kernels.bench`.

Three modes. Without one of the two flags: single linears, packed against dense bfloat16 and
float32. With --decode: tokens per second of a whole model from random weights, through the engine
that generates text. With --aot: every GPU kernel compiled without a GPU, and what is in it.

With --json stdout holds one JSON object `{"device", "date", "versions", "command", "rows"}` and
nothing else; without it a table. Progress goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rabit_jax.experiments.bench import decode as bench_decode
from rabit_jax.kernels.bench import products as bench_matmul
from rabit_jax.kernels.bench.machine import driver
from rabit_jax.kernels.bench.shapes import MODELS, model_config, parse_shapes

EXAMPLES = """examples:
  python -m kernels.bench --shapes llama2-7b --batch 1,2,4,8
  python -m kernels.bench --shapes 4096x11008 --k 1,2,3 --impl all --json > products.json
  python -m kernels.bench --decode --model tinyllama-1.1b --batch 1,2,4,8,16 --save
  python -m kernels.bench --decode --model llama2-7b --layers 4 --context 128
  python -m kernels.bench --aot sm_89,sm_90
"""
RESULTS = Path(bench_matmul.__file__).parents[1] / "results"
LARGEST_BATCH = 4096
# The options of each mode and what they are without being given.
DEFAULTS = {
    "products": {"shapes": "llama2-7b", "batch": "1", "k": "2", "impl": "auto",
                 "lowrank": "0.1,0.55,1.0", "repeats": 15},
    "decode": {"model": "tinyllama-1.1b", "batch": "1", "k": "2", "context": "128,2048",
               "layers": None, "tokens": 8, "repeats": 5},
    "aot": {},
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    from rabit_jax.experiments.engine.console import EXIT_CODES, Parser

    top = Parser(prog="python -m kernels.bench", description=__doc__,
                 epilog=f"{EXAMPLES}\n{EXIT_CODES}",
                 formatter_class=argparse.RawDescriptionHelpFormatter)
    add = top.add_argument
    add("--decode", action="store_true", help="tokens per second of a whole model")
    add("--aot", metavar="ARCHS", help="compile every GPU kernel for these, such as sm_89,sm_90")
    add("--shapes", metavar="NAMES", help="linears to measure: inputs x outputs such as 4096x11008,"
        f" or all of a block of {', '.join(MODELS)} (default llama2-7b)")
    add("--impl", metavar="NAMES", help="auto, all, or names of implementations (default auto)")
    add("--lowrank", metavar="BITS", help="bits per weight of LittleBit's rows, or none (default "
        "0.1,0.55,1.0)")
    add("--batch", metavar="NUMBERS", help="batch sizes (default 1)")
    add("--k", metavar="NUMBERS", help="sign paths, 1 to 4 (default 2)")
    add("--repeats", type=int, help="timed calls of each row (default 15; with --decode 5)")
    add("--model", metavar="NAME", help="with --decode: the model (default tinyllama-1.1b)")
    add("--context", metavar="NUMBERS", help="with --decode: tokens before the last one that is "
        "generated (default 128,2048)")
    add("--layers", type=int, help="with --decode: so many layers of it only")
    add("--tokens", type=int, help="with --decode: tokens of each timed call (default 8)")
    add("--json", action="store_true", help="one JSON object on stdout, no table")
    add("--save", action="store_true", help="also write it to kernels/results/<device>.json")
    return top


def run(arguments: Sequence[str]) -> None:
    """Run one mode and print its result to stdout.

    Raises:
      BadInput: an unknown option, one of another mode, or a value out of its range.
    """
    from rabit_jax.experiments.engine.machine import report

    asked = parser().parse_args(arguments)
    mode, options = settle(asked)
    rows = {"products": products, "decode": decode, "aot": aot}[mode](options)
    result = report(shlex.join(["python", "-m", "kernels.bench", *arguments]), rows)
    if asked.save:
        save(result, mode)
    if asked.json:
        print(json.dumps(result))
    else:
        show(mode, result)


def settle(asked: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The mode, and its options with defaults filled in.

    Raises:
      BadInput: both modes, or an option that the mode does not have.
    """
    from rabit_jax.errors import BadInput

    if asked.decode and asked.aot is not None:
        raise BadInput("--decode and --aot are two modes: give one of them")
    mode = "decode" if asked.decode else "products" if asked.aot is None else "aot"
    names = {name for options in DEFAULTS.values() for name in options}
    given = {name: value for name in names if (value := getattr(asked, name)) is not None}
    for name in sorted(given.keys() - DEFAULTS[mode].keys()):
        owners = [other for other, options in DEFAULTS.items() if name in options]
        raise BadInput(f"--{name} belongs to {' and '.join(owners)}, found it with {mode}: leave "
                       "it out")
    archs = {"archs": asked.aot} if mode == "aot" else {}
    return mode, {**DEFAULTS[mode], **given, **archs}


def products(options: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the single linears."""
    return bench_matmul.measure(
        parse_shapes(options["shapes"]), numbers("batch", options["batch"], LARGEST_BATCH),
        numbers("k", options["k"], 4), impls(options["impl"]), bits(options["lowrank"]),
        positive("repeats", options["repeats"]))


def decode(options: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of whole steps and their parts."""
    changes = {} if options["layers"] is None else {
        "n_layers": positive("layers", options["layers"])}
    config = model_config(options["model"], **changes)
    tokens = positive("tokens", options["tokens"])
    return bench_decode.measure(
        options["model"], config, numbers("batch", options["batch"], LARGEST_BATCH),
        numbers("context", options["context"], config.max_position),
        numbers("k", options["k"], 4), tokens, positive("repeats", options["repeats"]))


def aot(options: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the kernels compiled for other devices."""
    from rabit_jax.kernels.bench.aot import report

    return report(options["archs"].split(","))


def impls(text: str) -> list[str]:
    """`"auto"`, `"all"` or names of `matmul.IMPLS`.

    Raises:
      BadInput: another name.
    """
    from rabit_jax.errors import BadInput
    from rabit_jax.kernels.matmul import IMPLS

    if text == "all":
        return list(IMPLS)
    for name in text.split(","):
        if name not in ("auto", *IMPLS):
            raise BadInput(f"--impl has {name!r}: choose auto, all, {', '.join(IMPLS)}")
    return text.split(",")


def bits(text: str) -> list[float]:
    """`"0.1,1.0"` -> numbers above 0 and at most 4; "none" -> nothing.

    Raises:
      BadInput: anything else.
    """
    from rabit_jax.errors import BadInput

    parts = [] if text == "none" else text.split(",")
    for part in parts:
        if not re.fullmatch(r"\d+\.?\d*|\.\d+", part) or not 0 < float(part) <= 4:
            raise BadInput(f"--lowrank has {part!r}, wanted bits per weight above 0 and at most 4, "
                           "or none")
    return list(dict.fromkeys(map(float, parts)))


def numbers(name: str, text: str, largest: int) -> list[int]:
    """`"1,2,4"` -> whole numbers from 1 to `largest`, without repetition.

    Raises:
      BadInput: anything else.
    """
    from rabit_jax.errors import BadInput

    for part in text.split(","):
        if not re.fullmatch(r"\d{1,9}", part) or not 1 <= int(part) <= largest:
            raise BadInput(f"--{name} has {part!r}, wanted whole numbers from 1 to {largest} with "
                           "commas between")
    return list(dict.fromkeys(map(int, text.split(","))))


def positive(name: str, value: int) -> int:
    """The value.

    Raises:
      BadInput: it is below 1.
    """
    from rabit_jax.errors import BadInput

    if value < 1:
        raise BadInput(f"--{name} is {value}, wanted a positive integer")
    return value


def show(mode: str, result: dict[str, Any]) -> None:
    """Print a table to stdout, and the lines that belong below it."""
    if mode == "aot":
        from rabit_jax.kernels.bench.aot import table

        print(table(result["rows"]))
        return
    from rabit_jax.experiments.engine.console import table

    module = {"products": bench_matmul, "decode": bench_decode}[mode]
    measured = [row for row in result["rows"] if row.get("refused") is None]
    cells = [[_cell(row[name]) for name in module.COLUMNS] for row in measured]
    table(f"{mode}: {result['device']}, {result['date']}", list(module.COLUMNS.values()), cells,
          stdout=True)
    for line in module.remarks(result["rows"]):
        print(line)


def _cell(value: Any) -> Any:
    return "x".join(map(str, value)) if isinstance(value, list) else value


def save(result: dict[str, Any], mode: str) -> None:
    """Write the result into the file of its device, beside those of the other modes.

    The file holds `{"products": ..., "decode": ..., "aot": ...}`, each the JSON object of a run
    with the version of the driver; a mode replaces what it wrote before.
    """
    from rabit_jax.progress import say

    name = re.sub(r"[^a-z0-9]+", "-", result["device"].lower()).strip("-")
    file = RESULTS / f"{name}.json"
    held = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    held[mode] = {**result, "driver": driver()}
    RESULTS.mkdir(exist_ok=True)
    file.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    say(f"saved {mode} to {file}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 2 for bad input, 130 when stopped."""
    from rabit_jax.experiments.engine.console import main_guard

    return main_guard(lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
