"""How a command speaks and ends: tables, signals, exit codes, errors in one sentence.

Everything goes to stderr, so that stdout is free for results; `table(..., stdout=True)` is the
one exception. Progress and plain lines are those of `rabit_jax.progress`.
"""

from __future__ import annotations

import argparse
import errno
import os
from collections.abc import Callable, Sequence
from typing import NoReturn

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rabit_jax.errors import BadInput
from rabit_jax.experiments.engine.signals import CONTINUE, RESUMABLE
from rabit_jax.progress import Value, number, say

# What every command ends with; `--help` prints it, `main_guard` does it.
EXIT_CODES = """exit codes:
  0 done, 1 a crash (of an ablation: a cell failed), 2 bad input or a full disk (one sentence on
  stderr), 75 stopped by Ctrl-C or SIGTERM: run, ptq and ablate
  go on and evaluate starts again by the same command; 130 other commands stopped"""


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
    console = Console(stderr=not stdout, highlight=False)
    if not console.is_terminal:
        console = Console(stderr=not stdout, highlight=False, width=200)
    console.print(drawn)


def main_guard(function: Callable[[], int | None], resumable: bool = False) -> int:
    """Run a command's main and return its exit code: what it returns, or 2, 75 or 130.

    2 for `BadInput` and a full disk (one sentence on stderr); when interrupted 75 if the command
    is `resumable`, else 130; any other exception is a bug and propagates.
    """
    # Of transformers a command uses the tokenizers; it would say on stderr that torch is missing.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    again = ", then continue with --resume" if resumable else ""
    try:
        return function() or 0
    except BadInput as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        if not resumable:
            say("stopped")
            return 130
        say(CONTINUE)
        return RESUMABLE
    except Exception as error:
        if not _disk_full(error):
            raise
        say(f"error: the disk is full: free some space{again}")
        return 2


def _disk_full(error: BaseException | None) -> bool:
    """Whether the error or what caused it is ENOSPC; storage libraries give it only as text."""
    while error is not None:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


class Parser(argparse.ArgumentParser):
    """A parser whose errors are `BadInput`: one sentence, exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Raise `BadInput` with the message."""
        raise BadInput(f"{message}; `{self.prog} --help` lists the options")
