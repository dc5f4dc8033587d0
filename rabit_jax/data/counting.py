"""Progress of reading much text, on stderr: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

SLOW = 4 << 20  # bytes of text above which a bar appears
DRAW_SECONDS = 0.2
LINE_SECONDS = 10.0


@contextlib.contextmanager
def counting(what: str, size: int | None) -> Iterator[Callable[[int, int, int], None]]:
    """Yields a function to call with the bytes, documents and tokens read so far.

    Args:
      what: Begins the line, such as "tokenising the training text".
      size: Bytes in all; None where nobody knows, then the bar only moves.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn())
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task(what, total=size)
    told = time.monotonic()
    started = False

    def count(read: int, documents: int, tokens: int) -> None:
        nonlocal told, started
        now = time.monotonic()
        if now - told < (DRAW_SECONDS if console.is_terminal else LINE_SECONDS) or read < SLOW:
            return
        told = now
        line = f"{what}: {documents:,} documents, {tokens:,} tokens"
        if not console.is_terminal:
            console.print(line, soft_wrap=True)
            return
        if not started:
            bar.start()
            started = True
        bar.update(task, completed=read, description=line)

    try:
        yield count
    finally:
        if started:
            bar.stop()
