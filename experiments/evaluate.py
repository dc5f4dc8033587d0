"""Zero- and few-shot tasks of lm-evaluation-harness, and perplexities, of a dense or packed model.

The table, or with --json one JSON object, goes to stdout, everything else to stderr. Tasks are
those of the harness (pip install 'lm-eval<0.5'); their stderr, where it is not in closed form,
comes from 1000 resamples. Perplexities are taken in non-overlapping windows of --context tokens,
each scored from its own past alone, as published figures are. Texts:

  wikitext2   the test part of WikiText-2 (raw), its lines joined by blank lines
  c4          256 windows drawn with seed 0 from the first validation shard of C4 (GPTQ's `c4`)
  c4-new      the first 1100 documents of that shard joined by spaces, at most 256 windows
  file:PATH   a UTF-8 text file, or JSON, CSV or Parquet with a column "text"
"""

from __future__ import annotations

from rabit_jax.experiments.engine.launch import BEGINS_AGAIN, supervised
from rabit_jax.experiments.engine.signals import AGAIN, watch

if __name__ == "__main__":
    supervised(BEGINS_AGAIN)  # before any thread begins
    watch(AGAIN)  # before the imports below, which take seconds

import argparse
import importlib.metadata
import json
import os
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax

from rabit_jax import hosts
from rabit_jax.atomic import write_text
from rabit_jax.errors import BadInput
from rabit_jax.evaluate.texts import check_name, read_text
from rabit_jax.experiments.engine.console import (
    EXIT_CODES,
    Parser,
    common_options,
    main_guard,
    paths_option,
    table,
)
from rabit_jax.experiments.engine.evaluation import (
    Subject,
    begin_token,
    load_subject,
    load_tasks,
    perplexity_rows,
    task_rows,
)
from rabit_jax.experiments.engine.launch import finish, start
from rabit_jax.experiments.engine.machine import report
from rabit_jax.experiments.engine.settings import Hosts
from rabit_jax.formats.folder import find_folder, is_run_folder
from rabit_jax.types import Json
from rabit_jax.weights.description import describe

COLUMNS = ("name", "metric", "value", "stderr", "shots", "samples", "context")
EXAMPLES = """\
examples:
  python -m experiments.evaluate --model runs/quickstart/packed --ppl file:my.txt --context 128
  python -m experiments.evaluate --model path/to/packed --ppl wikitext2,c4 --context 4096 \\
      --tasks arc_easy,arc_challenge,hellaswag,piqa,winogrande --json > packed.json
  python -m experiments.evaluate --model runs/mine --tasks arc_easy --limit 20
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, or 2 for bad input (one sentence on stderr)."""
    arguments = sys.argv[1:] if argv is None else argv
    return finish(main_guard(lambda: run(arguments), several=True))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = Parser(prog="python -m experiments.evaluate", description=__doc__,
                   epilog=f"{EXAMPLES}\n{EXIT_CODES}",
                   formatter_class=argparse.RawDescriptionHelpFormatter)
    common_options(found)
    paths_option(found)
    add = found.add_argument
    add("--model", required=True, metavar="DIR",
        help="model folder, dense or packed, a hub id, or a run folder for its trained student or "
             "else its packed model")
    add("--tasks", type=_names, default=(), metavar="A,B", help="tasks, groups or patterns")
    add("--ppl", type=_names, default=(), metavar="A,B", help="texts, see above")
    add("--context", type=int, default=2048, metavar="N",
        help="tokens of a window of a perplexity; default %(default)s")
    add("--begin", action=argparse.BooleanOptionalAction, default=None,
        help="the begin token first in every window; default: for Gemma, which needs it")
    add("--batch-size", type=int, default=8, metavar="N",
        help="sequences at once, a multiple of the number of devices; default %(default)s")
    add("--limit", type=int, metavar="N",
        help="only the first N documents of a task and windows of a text: for a look, not a figure")
    add("--num-fewshot", type=int, metavar="N",
        help="examples before each question; default: as each task has it")
    add("--max-length", type=int, metavar="N",
        help="most tokens of a sequence in tasks; default: the model's positions")
    add("--chat", action="store_true", help="apply the tokenizer's chat template in tasks")
    add("--include-path", metavar="DIR", help="folder with task files of your own")
    add("--json", action="store_true", help="one JSON object on stdout, no table")
    add("--output", metavar="FILE", help="write that object to a new file as well")
    return found


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def run(arguments: Sequence[str]) -> None:
    """Evaluate and print the result to stdout; of several processes the first prints.

    Raises:
      BadInput: an option, name, file, model or data set that cannot be used.
    """
    options = parser().parse_args(arguments)
    limits = Hosts()
    start(limits.start_timeout, limits.heartbeat)
    hosts.first_does(lambda: check(options))
    # Before data are fetched for a name that is mistyped.
    hosts.first_before_others(lambda: fetch_model(options.model))
    tasks = load_tasks(options.tasks, options.include_path) if options.tasks else None
    texts = {name: hosts.first_before_others(partial(read_text, name)) for name in options.ppl}
    subject = load_subject(options.model, options.paths)
    check_model(options, subject)
    begin = begin_token(subject, options.begin) if texts else None
    rows = []
    for name, documents in texts.items():
        rows += perplexity_rows(subject, name, documents, context=options.context,
                                batch_size=options.batch_size, limit=options.limit, begin=begin)
    if tasks:
        rows += task_rows(subject, tasks, batch_size=options.batch_size,
                          max_length=options.max_length, num_fewshot=options.num_fewshot,
                          limit=options.limit, chat=options.chat)
    result = report(shlex.join(["python", "-m", "experiments.evaluate", *arguments]), rows)
    result |= {"model": str(options.model), "limit": options.limit, "begin": begin is not None}
    size = describe(subject.params)
    result["size"] = {
        "bits_per_weight": size.bits_per_weight if size.quantised else None,
        "whole_model_bits_per_weight": size.whole_model_bits_per_weight,
        "whole_model_ratio": size.whole_model_ratio,
    }
    if tasks:
        result["versions"]["lm-eval"] = importlib.metadata.version("lm-eval")
    hosts.first_does(lambda: show(options, result, size.size))


def fetch_model(path: str) -> None:
    """Fetch a model of the hub, or refuse a name that is no model's; a run folder is read later."""
    if not is_run_folder(Path(os.path.expanduser(path))):
        find_folder(path)


def show(options: argparse.Namespace, result: Json, size: str) -> None:
    """Print the result, and write it where the options ask for that."""
    text, rows = json.dumps(result, allow_nan=False), result["rows"]
    try:  # first, for stdout may be a pipe that nobody reads any more
        if options.output:
            write_text(Path(options.output), text + "\n")
    finally:  # what took hours is shown where the disk is full
        if options.json:
            print(text)
        else:
            only = f", the first {options.limit} of each only" if options.limit else ""
            table(f"{options.model}{only}: {result['device']}, {result['date']}", COLUMNS,
                  [[row[name] for name in COLUMNS] for row in rows], stdout=True)
            print(f"bits per weight: {size}")


def check(options: argparse.Namespace) -> None:
    """Raise BadInput for what can be seen before anything is read."""
    if not options.tasks and not options.ppl:
        raise BadInput("nothing to evaluate: name --tasks, --ppl or both")
    if options.tasks and hosts.several():
        raise BadInput("--tasks runs in one process, --ppl in several too: evaluate the tasks by a "
                       "command that is started once")
    least = {"context": 2, "batch_size": 1, "limit": 1, "num_fewshot": 0, "max_length": 2}
    for name, bound in least.items():
        value = getattr(options, name)
        if value is not None and value < bound:
            raise BadInput(f"--{name.replace('_', '-')} is {value}, wanted at least {bound}")
    devices = len(jax.devices())
    if options.batch_size % devices:
        raise BadInput(f"--batch-size is {options.batch_size} for {devices} devices: make it a "
                       f"multiple of {devices}")
    if options.output == "":
        raise BadInput("--output is empty: name a file, or leave it out")
    if options.output and os.path.lexists(options.output):
        raise BadInput(f"--output {options.output} exists: remove it or name another file")
    if options.output:
        place = next(p for p in Path(options.output).absolute().parents if p.exists())
        if not place.is_dir() or not os.access(place, os.W_OK):
            raise BadInput(f"--output {options.output} cannot be written, {place} is no folder of "
                           "yours: name another file")
    if options.include_path and not Path(options.include_path).is_dir():
        raise BadInput(f"--include-path {options.include_path} is no folder: name one with the "
                       "YAML files of your tasks")
    for name in options.ppl:
        check_name(name)


def check_model(options: argparse.Namespace, subject: Subject) -> None:
    """Raise BadInput where the model does not go with the options."""
    most = subject.model.config.max_position
    for name, used in (("context", options.ppl), ("max_length", options.max_length)):
        value = getattr(options, name)
        if used and value > most:
            raise BadInput(f"--{name.replace('_', '-')} is {value}, the model has {most} "
                           "positions: give a smaller one")
    if options.chat and not subject.tokenizer.chat_template:
        raise BadInput(f"the tokenizer of {options.model} has no chat template: leave out --chat")


if __name__ == "__main__":
    sys.exit(main())
