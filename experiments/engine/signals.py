"""Ctrl-C, SIGTERM and a terminal that closes, from the first line of a long command on.

Python runs a signal's handler in the main thread between two bytecodes. That is too late while a
library compiles or reads, and an exception that the handler raises inside a callback of JAX is
lost. So a thread of its own waits for signals, and either asks the run to stop between two steps
or ends the process. Ending it is safe at any moment: files are written whole or not at all, and
the processes that it has started end with it.

Only the standard library and files that need no more are imported here: the imports of a command
take seconds, and signals are watched before them.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from rabit_jax.experiments.engine import streams
from rabit_jax.experiments.engine.launch import RESUMABLE, STARTED
from rabit_jax.workspaces import remove_workspaces

AGAIN = "stopped; the same command starts again, nothing was written"
CELLS = "stopped; the same command goes on from there"
CONTINUE = "stopped; the same command with --resume continues from the last checkpoint"
STOPPED, ENDED = "stopped", 130  # of commands that have nothing to go on with: message, exit code
TOGETHER = 1.0  # seconds: a scheduler signals a command and its parent, which hands it on
# What is answered; `nohup` lets a process ignore that its terminal closes.
SIGNALS = (signal.SIGINT, signal.SIGTERM,
           *(() if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)))


class Stoppable(Protocol):
    """A run that reads `stopped` between its steps."""

    stopped: bool


class _Watch:
    """What a signal does: ends the process with `message`, or `ask` where that is set."""

    def __init__(self) -> None:
        self.message: str | None = None  # None: nobody watches, as in a test or a notebook
        self.code = RESUMABLE
        self.ask: Callable[[int], None] | None = None
        self.stopping = False  # whether a run was asked to stop, after which this process ends


_watch = _Watch()


def watch(message: str, code: int = RESUMABLE) -> None:
    """Let signals end this process at once, with `message` and the exit code.

    Called in the first line of a command; `stopping_between_steps` puts the end off.
    """
    streams.prepare()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    _watch.message, _watch.code = message, code
    atexit.register(_ignore)
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_wait, args=(reader,), name="signals", daemon=True).start()


def _ignore() -> None:
    """The command has come to its end, and its exit code stands: Python would give signals their
    default back now, and one in the second that JAX takes to go would end it with another."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _wait(reader: int) -> None:
    """The thread: one byte comes for every signal, its number."""
    last = -math.inf
    while found := os.read(reader, 1):
        now = time.monotonic()
        if found[0] in SIGNALS and (now - last > TOGETHER or STARTED not in os.environ):
            _answer(found[0])
            last = now


def _answer(number: int) -> None:
    if _watch.stopping and not again(number):
        return  # also where the run has saved, and what is left is to end
    if _watch.ask:
        _watch.ask(number)
    else:
        end(_watch.message or "stopped")


def again(number: int) -> bool:
    """Whether a signal that is not the first asks to stop at once.

    Of a terminal that closes the shell and the system both tell, and a session that is ended gets
    SIGTERM and SIGHUP: such a second one is no impatience.
    """
    return number != signal.SIGHUP


def end(message: str) -> None:
    """End the process now, with the exit code that is watched for; temporary files are removed, and
    the processes that it has started get SIGTERM."""
    remove_workspaces()
    # A progress bar has hidden the cursor of a terminal.
    streams.tell(("\033[?25h\n" if os.isatty(2) else "") + f"{message}\n")
    try:
        found = _descendants()
        # The main thread may wait for one of them: it is not to go on before this process ends.
        sys.setswitchinterval(1.0)
        for process in found:
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGTERM)
    finally:
        os._exit(_watch.code)


def _descendants() -> list[int]:
    """Processes that this one has started, and those that they have; none without /proc."""
    parents = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, LookupError, ValueError):  # it has ended
            # pid (name) state parent ..., and a name may hold anything
            fields = file.read_text(errors="replace").rpartition(")")[2].split()
            parents[int(file.parent.name)] = int(fields[1])
    found = [os.getpid()]
    for process in found:
        found += [one for one, parent in parents.items() if parent == process]
    return found[1:]


@contextlib.contextmanager
def stopping_between_steps(run: Stoppable, when: str) -> Iterator[None]:
    """Inside, the first signal sets `run.stopped`, and the second ends the process, see `again`.

    Args:
      run: what is to be stopped.
      when: where the run will stop, such as "after this block".
    """

    def ask(number: int) -> None:
        if not run.stopped:
            # Told first: the run may end as soon as it sees that it is to stop.
            streams.tell(f"stopping {when} (again to stop at once)\n")
            run.stopped = _watch.stopping = True
        elif again(number):
            end(CONTINUE)

    def handler(number: int, _: object) -> None:
        if run.stopped and again(number):
            raise KeyboardInterrupt
        ask(number)

    if _watch.message is not None:
        _watch.ask = ask
        try:
            yield
        finally:
            _watch.ask = None
        return
    # Not a command but a call in Python, whose process must not be ended.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with handling(handler, SIGNALS):
        yield


@contextlib.contextmanager
def handling(handler: Callable[..., object], numbers: tuple[signal.Signals, ...]) -> Iterator[None]:
    """Inside, a handler in the main thread answers these signals, and nobody else."""
    before, _watch.ask = _watch.ask, lambda _: None
    kept = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in kept.items():
            signal.signal(number, old)
        _watch.ask = before


@contextlib.contextmanager
def interrupted_by_keys() -> Iterator[None]:
    """Inside, Ctrl-C raises KeyboardInterrupt in the main thread; other signals end the process."""

    def handler(number: int, _: object) -> None:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        end(_watch.message or STOPPED)

    if _watch.message is None:  # A call in Python, where Ctrl-C does that by itself.
        yield
        return
    with handling(handler, SIGNALS):
        yield
