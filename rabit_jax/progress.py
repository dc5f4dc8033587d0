"""Progress on stderr: a bar on a terminal, elsewhere a line every ten seconds and one at the end.

stdout is left to results.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import IO, SupportsFloat, TypeAlias, cast

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

LINE_SECONDS = 10.0
DRAW_SECONDS = 0.1
LARGE = 10**9  # bytes of a model whose reading is shown
Value: TypeAlias = SupportsFloat | str | None
COUNTS = ("documents", "tokens")  # fields that read "12 documents", not "documents 12"


class _Stderr:
    """The stderr of the moment, for a console. Work goes on where it takes nothing any more: its
    disk is full, its reader has ended, its terminal was closed."""

    @property
    def _now(self) -> IO[str] | None:
        # While a bar is drawn sys.stderr itself prints above it, by this same console.
        return getattr(sys.stderr, "rich_proxied_file", sys.stderr)

    @property
    def encoding(self) -> str:
        return getattr(self._now, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        now = self._now
        return now is not None and now.isatty()

    def write(self, text: str) -> int:
        now = self._now
        with contextlib.suppress(OSError, ValueError):
            return now.write(text) if now else 0
        return 0

    def flush(self) -> None:
        now = self._now
        with contextlib.suppress(OSError, ValueError):
            if now:
                now.flush()


_file = _Stderr()
_stderr = Console(file=cast(IO[str], _file), highlight=False)


def silence() -> None:
    """Show no more progress and no more lines: another process of the run does so."""
    _stderr.quiet = True


def say(text: str, always: bool = False) -> None:
    """Print one plain line to stderr, above a progress bar if there is one.

    `always` prints it in a silent process as well.
    """
    if always and _stderr.quiet:
        _file.write(f"{text}\n")
    _stderr.print(Text(text), soft_wrap=True)


def number(value: Value) -> str:
    """A value for people: 12,345 and 0.1305 and 6.25e-05; None is `-`."""
    if value is None or isinstance(value, bool | str):
        return "-" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    real = float(value)
    return f"{real:,.0f}" if 1e4 <= abs(real) < 1e15 else f"{real:.4g}"


class Progress:
    """What `progress` yields; this class itself shows nothing."""

    def update(self, step: int, **fields: Value) -> None:
        """Note that `step` steps are done; `loss=`, `tokens_per_second=` and others are shown.

        Values are read (and a device array waited for) only when something is drawn.
        """


@contextlib.contextmanager
def progress(
    description: str, total: int | None, start: int = 0, counted: bool = True, hidden: bool = False
) -> Iterator[Progress]:
    """Show the steps from `start` to `total`: done/total, the fields and the time left.

    Args:
      description: opens the line.
      total: of the steps; None where it is not known.
      start: steps that an earlier process has done.
      counted: whether done/total is shown; without it the fields have to say where things stand.
      hidden: show nothing.

    >>> with progress("QAT", total=300) as bar:
    ...     bar.update(1, loss=2.31, tokens_per_second=5200.0)
    """
    if hidden:
        yield Progress()
    elif not _stderr.is_terminal:
        lines = _Lines(description, total, start, counted)
        yield lines
        lines.finish()
    else:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[shown]}", markup=False),
            TimeRemainingColumn(),
        )
        with RichProgress(*columns, console=_stderr) as bar:
            task = bar.add_task(description, total=total, completed=start, shown="")
            yield _Drawn(bar, task, total, counted)


@contextlib.contextmanager
def reading(
    description: str, least: int, unit: int = 1, counted: bool = True
) -> Iterator[Callable[..., None]]:
    """Progress that is shown only where much is read.

    Yields a function `done(read, total, **fields)` of bytes; total is None where nobody knows it.

    Args:
      description: opens the line.
      least: bytes from which on something is shown.
      unit: bytes of a step.
      counted: as in `progress`.
    """
    with contextlib.ExitStack() as stack:
        bar: Progress | None = None

        def done(read: int, total: int | None, **fields: Value) -> None:
            nonlocal bar
            if bar is None and max(read, total or 0) >= least:
                steps = None if total is None else total // unit
                bar = stack.enter_context(progress(description, steps, counted=counted))
            if bar is not None:
                bar.update(read // unit, **fields)

        yield done


@contextlib.contextmanager
def loading(model: str) -> Iterator[Callable[..., None]]:
    """What `load_hf` and `load_model` take as `done`: a bar for models that take seconds to read.

    >>> with loading("org/name") as done:
    ...     model, params, tokenizer = load_model("org/name", done)
    """
    with reading(f"load {model}, MB", LARGE, unit=10**6) as done:
        yield done


class _Drawn(Progress):
    """Progress on a terminal."""

    def __init__(self, bar: RichProgress, task: TaskID, total: int | None, counted: bool) -> None:
        self.bar, self.task, self.total, self.counted = bar, task, total, counted
        self.drawn = 0.0

    def update(self, step: int, **fields: Value) -> None:
        now = time.monotonic()
        if now - self.drawn >= DRAW_SECONDS or step == self.total:
            self.drawn = now
            shown = _line(step, self.total, self.counted, fields)
            self.bar.update(self.task, completed=step, shown=shown)


class _Lines(Progress):
    """Progress in a log: a line every LINE_SECONDS and one at the end."""

    def __init__(self, description: str, total: int | None, start: int, counted: bool) -> None:
        self.description, self.total, self.counted = description, total, counted
        self.start = self.step = start
        self.began = self.printed = time.monotonic()
        self.fields: dict[str, Value] = {}

    def update(self, step: int, **fields: Value) -> None:
        self.step, self.fields = step, fields
        now = time.monotonic()
        if now - self.printed >= LINE_SECONDS and (self.total is None or step < self.total):
            self.printed = now
            self._print(self._left(now))

    def finish(self) -> None:
        self._print(f"took {_duration(time.monotonic() - self.began)}")

    def _left(self, now: float) -> str:
        if self.total is None:
            return ""
        rest = (now - self.began) / max(self.step - self.start, 1) * (self.total - self.step)
        return f"{_duration(rest)} left"

    def _print(self, ending: str) -> None:
        parts = (_line(self.step, self.total, self.counted, self.fields), ending)
        say(f"{self.description}: {', '.join(part for part in parts if part)}")


def _line(step: int, total: int | None, counted: bool, fields: dict[str, Value]) -> str:
    shown = [f"{step}" if total is None else f"{step}/{total}"] if counted else []
    for name, value in fields.items():
        if name == "tokens_per_second" and value is not None:
            shown.append(f"{float(value):,.0f} tokens/s")
        elif name in COUNTS:
            shown.append(f"{number(value)} {name}")
        else:
            shown.append(f"{name} {number(value)}")
    return ", ".join(shown)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"
