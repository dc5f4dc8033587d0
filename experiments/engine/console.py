"""What a run says to a person: progress, plain lines and tables, and how a command ends.

Everything goes to stderr, so that stdout is free for results; `table(..., stdout=True)` is the
one exception. On a terminal progress is a bar, elsewhere at most a line every ten seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from rabit_jax.errors import BadInput

# What every command ends with; `--help` prints it, `main_guard` does it.
EXIT_CODES = """exit codes:
  0 done, 1 a crash (of an ablation: a cell failed), 2 bad input or a full disk (one sentence on
  stderr), 75 stopped but resumable, 130 stopped"""
LINE_SECONDS = 10.0
DRAW_SECONDS = 0.1
LARGE = 10**9  # bytes of a model whose reading is shown
_stderr = Console(stderr=True, highlight=False)


class Progress(Protocol):
    """What `progress` yields."""

    def update(self, step: int, **fields: Any) -> None:
        """Say that `step` steps are done; `loss=`, `tokens_per_second=` and others are shown.

        Values are read (and a device array waited for) only when something is drawn.
        """


def say(text: str) -> None:
    """Print one plain line to stderr, above a progress bar if there is one."""
    _stderr.print(Text(text), soft_wrap=True)


@contextlib.contextmanager
def progress(description: str, total: int, start: int = 0) -> Iterator[Progress]:
    """Show the steps from `start` to `total`: a bar, done/total, fields and the time left.

    >>> with progress("QAT", total=300) as bar:
    ...     bar.update(1, loss=2.31, tokens_per_second=5200.0)
    """
    if not _stderr.is_terminal:
        lines = _Lines(description, total, start)
        yield lines
        lines.finish()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[shown]}", markup=False),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=_stderr) as bar:
        task = bar.add_task(description, total=total, completed=start, shown="")
        yield _Drawn(bar, task)


def watch_signals(run: Any, when: str) -> None:
    """Ctrl-C or SIGTERM sets `run.stopped`, which the run reads between steps; a second ends it.

    Args:
      run: has an attribute `stopped`, False so far.
      when: where the run will stop, such as "after this block".
    """

    def stop(*_: Any) -> None:
        if run.stopped:
            raise KeyboardInterrupt
        run.stopped = True
        say(f"stopping {when} (again to stop at once)")

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


@contextlib.contextmanager
def loading(model: str) -> Iterator[Callable[[int, int], None]]:
    """What `load_hf` and `load_model` take as `done`: a bar for models that take seconds to read.

    >>> with loading("org/name") as done:
    ...     model, params, tokenizer = load_model("org/name", done)
    """
    with contextlib.ExitStack() as stack:
        bar: Progress | None = None

        def done(ready: int, total: int) -> None:
            nonlocal bar
            if total < LARGE:
                return
            if bar is None:
                bar = stack.enter_context(progress(f"load {model}, MB", total // 10**6))
            bar.update(ready // 10**6)

        yield done


class _Drawn:
    """Progress on a terminal."""

    def __init__(self, bar: Bar, task: Any) -> None:
        self.bar, self.task, self.total, self.drawn = bar, task, bar.tasks[-1].total, 0.0

    def update(self, step: int, **fields: Any) -> None:
        now = time.monotonic()
        if now - self.drawn >= DRAW_SECONDS or step == self.total:
            self.drawn = now
            self.bar.update(self.task, completed=step, shown=_fields(fields))


class _Lines:
    """Progress in a log: a line every LINE_SECONDS and one at the end."""

    def __init__(self, description: str, total: int, start: int) -> None:
        self.description, self.total, self.start, self.step = description, total, start, start
        self.began = self.printed = time.monotonic()
        self.fields: dict[str, Any] = {}

    def update(self, step: int, **fields: Any) -> None:
        self.step, self.fields = step, fields
        now = time.monotonic()
        if now - self.printed >= LINE_SECONDS and step < self.total:
            self.printed = now
            left = (now - self.began) / max(step - self.start, 1) * (self.total - step)
            self._print(f"{_duration(left)} left")

    def finish(self) -> None:
        self._print(f"took {_duration(time.monotonic() - self.began)}")

    def _print(self, ending: str) -> None:
        parts = (f"{self.description}: {self.step}/{self.total}", _fields(self.fields), ending)
        say(", ".join(part for part in parts if part))


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], stdout: bool = False
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


def number(value: Any) -> str:
    """Return a value for people: 12,345 and 0.1305 and 6.25e-05; None is `-`."""
    if value is None or isinstance(value, bool | str):
        return "-" if value is None else str(value)
    if isinstance(value, int) or (float(value).is_integer() and 1e4 <= abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{float(value):,.0f}" if 1e4 <= abs(value) < 1e15 else f"{float(value):.4g}"


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
        say("stopped; the same command with --resume continues from the last checkpoint")
        return 75
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


def _fields(fields: dict[str, Any]) -> str:
    shown = []
    for name, value in fields.items():
        if name == "tokens_per_second":
            shown.append(f"{float(value):,.0f} tokens/s")
        else:
            shown.append(f"{name} {number(value)}")
    return ", ".join(shown)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are `BadInput`: one sentence, exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Raise `BadInput` with the message."""
        raise BadInput(f"{message}; `{self.prog} --help` lists the options")
