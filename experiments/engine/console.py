"""How a command speaks and ends: tables, signals, exit codes, errors in one sentence.

Everything goes to stderr, so that stdout is free for results; `table(..., stdout=True)` is the
one exception. Progress and plain lines are those of `rabit_jax.progress`.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rabit_jax.errors import BadInput, ToldByFirst, first_line
from rabit_jax.experiments.engine import streams
from rabit_jax.experiments.engine.launch import BEGINS_AGAIN, ENDED, GOES_ON, cluster, refusal
from rabit_jax.experiments.engine.signals import CONTINUE, RESUMABLE
from rabit_jax.models.cache import BITS
from rabit_jax.progress import Value, number, say
from rabit_jax.workspaces import disk_full

# What every command ends with; `--help` prints it, `main_guard` does it.
EXIT_CODES = """exit codes:
  0 done, 1 a crash (of an ablation: a cell failed), 2 bad input or a full disk (one sentence on
  stderr), 75 stopped by Ctrl-C, SIGTERM or a closed terminal: run, ptq and ablate go on and
  evaluate starts again by the same command; 130 other commands stopped; 141 what read stdout has
  ended"""


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Value]], stdout: bool = False
) -> None:
    """Print a table; numbers are right-aligned with four significant digits, None is `-`."""
    drawn = Table(title=Text(title), title_justify="left")
    for index, name in enumerate(columns):
        numeric = all(isinstance(row[index], int | float | None) for row in rows)
        drawn.add_column(Text(name), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(number(value)) for value in row))
    console = _Console(stderr=not stdout, highlight=False)
    if not console.is_terminal:
        console = _Console(stderr=not stdout, highlight=False, width=200)
    console.print(drawn)


class _Console(Console):
    """A console that leaves a pipe without a reader to `main_guard`."""

    def on_broken_pipe(self) -> None:
        """Raise the error again; rich itself would end the process with code 1."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def main_guard(
    function: Callable[[], int | None], resumable: bool = False, several: bool = False
) -> int:
    """Run a command's main and return its exit code: what it returns, or 2, 75, 130 or 141.

    2 for `BadInput`, a full disk and a file that the system refuses (one sentence on stderr); when
    interrupted 75 if the command is `resumable`, else 130; 141, without a word, where what reads
    stdout has ended; any other exception is a bug and propagates, or gives 1 in one of several
    processes. A command that knows nothing of `several` processes is refused where the environment
    names them, for each would write the same files.
    """
    # Of transformers a command uses the tokenizers; it would say on stderr that torch is missing.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    again = ", then continue with --resume" if resumable else ""
    hooks = sys.excepthook, threading.excepthook, sys.unraisablehook
    _quiet_about_full_disks()
    full = False
    try:
        code = _outcome(function if several else partial(_alone, function), resumable)
        if sys.stdout:
            sys.stdout.flush()  # so that a full disk or a reader that has ended is found here
        return code
    except Exception as error:
        if streams.unread(error):
            return streams.UNREAD
        full = disk_full(error)
        sentence = f"{_full(error)}: free some space{again}" if full else _refused(error)
        if not sentence:
            if not (several and cluster()):
                raise
            traceback.print_exc()  # and no orderly end, which waits for the other processes
            return 1
        say(f"error: {BadInput(sentence)}", always=True)
        return 2
    finally:
        # What is still to be flushed to a full disk fails later, and need not be said again.
        if not full:
            sys.excepthook, threading.excepthook, sys.unraisablehook = hooks


def _alone(function: Callable[[], int | None]) -> int | None:
    """What a command returns that runs in one process; raises BadInput as one of several."""
    if why := refusal():
        raise BadInput(why)
    return function()


def _outcome(function: Callable[[], int | None], resumable: bool) -> int:
    try:
        return function() or 0
    except ToldByFirst:
        return 2
    except BadInput as error:
        say(f"error: {error}", always=True)
        return 2
    except (RuntimeError, ValueError) as error:  # JAX's errors of one collective are of both types
        if not (cluster() and any(word in str(error) for word in LOST)):
            raise
        then = GOES_ON if resumable else BEGINS_AGAIN
        say(f"{ENDED}; {then} ({first_line(error)[:150]})", always=True)
        return RESUMABLE
    except KeyboardInterrupt:
        if not resumable:
            say("stopped")
            return 130
        say(CONTINUE)
        return RESUMABLE


# In errors of collectives whose other side has gone.
LOST = ("Gloo", "coordination", "UNAVAILABLE", "NCCL", "Connection")


def _full(error: BaseException | None) -> str:
    """That the disk is full, and for which file where an error on the way knows it."""
    while error is not None:
        if name := getattr(error, "filename", None):
            return f"the disk is full, {_short(name)} cannot be written"
        error = error.__cause__ or error.__context__
    return "the disk is full"


def _short(name: object) -> str:
    text = str(name)
    return text if len(text) <= 300 else f"{text[:300]}..."


# Answers of the system that no command can prevent: a path of the user's that it does not take, or
# a file or device that went away or fell ill under a command.
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR,
            errno.EISDIR, errno.ENOENT, errno.EEXIST, errno.EBUSY, errno.EIO, errno.ESTALE,
            errno.ENXIO, errno.ENODEV, errno.EMFILE, errno.ENFILE)


def _refused(error: Exception) -> str:
    """What the system refused to do with a file, "" where the error is of another kind."""
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        found = error.object[max(0, error.start - 40) : error.end + 40]
        return (f"a name or a text holds bytes that are no UTF-8 ({found!r}): rename the file, or "
                "convert the text")
    if not isinstance(error, OSError) or error.errno not in _REFUSED:
        return ""
    name = _short(error.filename or "a file")
    return (f"cannot use {name} ({error.strerror}): correct the path, or see that this user may "
            "read and write there")


def _quiet_about_full_disks() -> None:
    """Print no traceback of what a full disk makes of other threads and of files at the end.

    The main thread raises the error once. Writes of TensorStore that are still under way then
    report to the event loop of a save that has ended.
    """

    def known(error: BaseException | None) -> bool:
        closed = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
        return closed or disk_full(error)

    def of_task(record: logging.LogRecord) -> bool:
        return not (record.exc_info and known(record.exc_info[1]))

    logging.getLogger("asyncio").addFilter(of_task)
    plain, of_thread, unraisable = sys.excepthook, threading.excepthook, sys.unraisablehook
    sys.excepthook = lambda kind, error, trace: known(error) or plain(kind, error, trace)
    threading.excepthook = lambda args: known(args.exc_value) or of_thread(args)
    sys.unraisablehook = lambda args: known(args.exc_value) or unraisable(args)


def common_options(parser: argparse.ArgumentParser) -> None:
    """Add what every command takes: `--version`, `--import MODULE` and shell completion."""
    parser.add_argument("--version", action=_Version, nargs=0,
                        help="print versions and device, and end")
    parser.add_argument("--import", action=_Import, metavar="MODULE", dest="imported", default=[],
                        help="import a module of yours first, such as one that defines a weight "
                             "representation; may be given several times")
    parser.add_argument("--print-completion", action=_Completion, metavar="SHELL",
                        choices=("bash", "zsh", "tcsh"),
                        help="print the completion of the installed command for bash, zsh or tcsh")


def paths_option(parser: argparse.ArgumentParser) -> None:
    """Add `--paths`, for commands that read a packed model."""
    parser.add_argument("--paths", type=int, metavar="N",
                        help="read the first N sign paths of each packed matrix of the blocks "
                             "alone, a smaller model where training was nested (qat.nested); "
                             "default: all")


def cache_option(parser: argparse.ArgumentParser) -> None:
    """Add `--cache-bits`, for commands that write text."""
    parser.add_argument("--cache-bits", type=int, choices=BITS, default=16,
                        help="keys and values of the text so far in 16, 8 or 4 bits; 16 is the "
                             "model's dtype, which on a CPU is float32; default %(default)s")


def activation_option(parser: argparse.ArgumentParser) -> None:
    """Add `--activation-bits`, for commands that write text."""
    parser.add_argument("--activation-bits", type=int, choices=(16, 8), default=16,
                        help="what packed sign matrices of the blocks multiply, in 16 or 8 bits; "
                             "8, with a scale for each 256 inputs, is faster on a CPU and rounds "
                             "more; long prompts are not rounded; default %(default)s")


class _Completion(argparse.Action):
    """Prints the completion script of the installed command, such as `rabit-run`."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
        option_string: str | None = None,
    ) -> None:
        import shtab

        parser.prog = f"rabit-{parser.prog.rpartition('.')[2]}"
        print(shtab.complete(parser, values))
        parser.exit()


class _Import(argparse.Action):
    """Imports a module when the option is read; the working directory is searched as well."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
        option_string: str | None = None,
    ) -> None:
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # A console script does not search it.
        try:
            importlib.import_module(values)
        except Exception as error:  # A module of the user's raises whatever it raises.
            parser.error(f"--import {values}: {type(error).__name__}: {first_line(error)}")
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), values])


class _Version(argparse.Action):
    """Prints what a report of a fault should name."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object,
        option_string: str | None = None,
    ) -> None:
        from rabit_jax.experiments.engine.machine import version_lines

        print(version_lines())
        parser.exit()


class Parser(argparse.ArgumentParser):
    """A parser whose errors are `BadInput`: one sentence, exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Raise `BadInput` with the message."""
        raise BadInput(f"{message}; `{self.prog} --help` lists the options")
