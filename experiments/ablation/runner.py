"""Runs the cells of an ablation, each in a process of its own: so many at once, stopped on a
signal so that they can go on."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rabit_jax import BadInput
from rabit_jax.atomic import remove, write_text
from rabit_jax.experiments.ablation.cells import Cell
from rabit_jax.experiments.engine.config import dump_yaml, load_config, section_hash
from rabit_jax.experiments.engine.settings import RunConfig
from rabit_jax.formats.folder import fingerprint
from rabit_jax.progress import number, progress, say

RUN = (sys.executable, "-m", "rabit_jax.experiments.run")
LOG = "log.txt"
RESUMABLE = 75
POLL_SECONDS = 0.05


def complete(cell: Cell) -> bool:
    """Whether the cell's run has ended with this config and with the teacher as it is now."""
    if cell.kind == "teacher":
        whole = (cell.folder / "stages" / "teacher.json", cell.folder / "teacher")
    else:
        whole = (cell.folder / "summary.json",)
    return all(path.exists() for path in whole) and _started_alike(cell)


def _started_alike(cell: Cell) -> bool:
    """Whether what lies in the cell's folder was started with this config and this teacher."""
    try:
        if load_config(RunConfig, cell.folder / "config.yaml") != cell.config:
            return False
        with open(cell.file, encoding="utf-8") as file:
            return _teacher(cell) in ("", file.readline())
    except (BadInput, OSError):
        return False


def _teacher(cell: Cell) -> str:
    """First line of the cell's YAML: a digest of its teacher's files, "" where it has none here.

    The path alone would not tell a teacher trained anew, with another `run.seed` say.
    """
    path = cell.config.teacher.path
    if not path or not Path(path).expanduser().is_dir():
        return ""
    return f"# teacher {section_hash(fingerprint(path))[:16]}\n"


def read(cell: Cell) -> dict[str, Any] | None:
    """The summary of a complete cell."""
    if not cell.config or not complete(cell):
        return None
    try:
        found = json.loads((cell.folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def last_line(cell: Cell) -> str:
    """The last line that the cell's run has said, "" if none."""
    try:
        lines = (cell.folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[int]:
    """Hold the ablation's folder; yields the descriptor of the lock, for the cells to inherit.

    Cells that outlive a killed ablation keep the lock, so no two processes write one cell.

    Raises:
      BadInput: another process holds the folder, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        raise BadInput(
            f"cannot write the folder {folder} ({error.strerror or error}); set output to another "
            "place"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BadInput(
                f"another ablation, or a cell that a killed one has left, works in {folder}: wait "
                f"for it or stop it (fuser {folder / '.lock'} tells its process)"
            ) from None
        yield file.fileno()


@dataclass
class _Running:
    cell: Cell
    process: subprocess.Popen
    began: float


class Runner:
    """Starts cells, watches them, and remembers how they ended.

    Attributes:
      lock: a descriptor that the cells inherit, see `claimed`.
      stopped: a signal has come.
      codes: exit codes of the cells that were not completed.
    """

    def __init__(self, command: Sequence[str] = RUN, jobs: int = 1):
        """Nothing is started yet.

        Args:
          command: what a cell is run with; `--config FILE` and `--resume` are appended.
          jobs: cells at once, each on its share of the processor's cores.

        Raises:
          BadInput: fewer than one job.
        """
        if jobs < 1:
            raise BadInput(f"--jobs is {jobs}: it must be at least 1")
        self.command, self.jobs = tuple(command), jobs
        self.lock: int | None = None
        self.stopped = False
        self.codes: list[int] = []
        self._slots: dict[int, _Running] = {}

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """While inside, Ctrl-C and SIGTERM stop the cells; a second time stops them at once."""

        def stop(*_) -> None:
            first, self.stopped = not self.stopped, True
            self._interrupt()
            if first:
                say("stopping the cells at their next step or stage (again to stop them at once)")

        # The cells have sessions of their own: a terminal that closes would not reach them.
        closing = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
        kept = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM, *closing)}
        try:
            yield
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)

    def _interrupt(self) -> None:
        for running in list(self._slots.values()):
            running.process.send_signal(signal.SIGINT)

    def run(
        self, title: str, cells: Sequence[Cell], finished: Callable[[], None] = lambda: None
    ) -> None:
        """Run what is not complete, in order; a failing cell does not keep the others back.

        Args:
          title: of the progress bar.
          cells: complete ones are skipped, and those that have no config yet.
          finished: called after every cell.
        """
        cells = [cell for cell in cells if cell.config]
        waiting = [cell for cell in cells if not complete(cell)]
        if not waiting or self.stopped:
            return
        done = len(cells) - len(waiting)
        try:
            with progress(title, len(cells), start=done) as bar:
                while self._slots or (waiting and not self.stopped):
                    self._fill(waiting)
                    if ended := self._ended():
                        self._fill(waiting)
                        done += len(ended)
                        bar.update(done)
                        finished()
                    else:
                        time.sleep(POLL_SECONDS)
        finally:
            # Left in any other way than by the loop's end, no cell goes on unseen.
            self._interrupt()
            for running in self._slots.values():
                running.process.wait()

    def _fill(self, waiting: list[Cell]) -> None:
        """Start waiting cells while there is room."""
        for slot in range(self.jobs):
            if waiting and slot not in self._slots and not self.stopped:
                self._start(waiting.pop(0), slot)

    def _start(self, cell: Cell, slot: int) -> None:
        # The run refuses to resume with another config; without --resume it keeps what still fits.
        fresh = not (cell.folder / "config.yaml").exists()
        resume = fresh or _started_alike(cell)
        if not resume:
            remove(cell.folder / "summary.json")
        write_text(cell.file, _teacher(cell) + dump_yaml(cell.config))
        cell.folder.mkdir(parents=True, exist_ok=True)
        arguments = ["--config", str(cell.file)]
        arguments += ["--resume"] if resume else []
        arguments += ["--until", "teacher"] if cell.kind == "teacher" else []
        environment = dict(os.environ)
        if self.jobs > 1:  # On a GPU the first process would take most of the memory for itself.
            environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        with open(cell.folder / LOG, "ab" if resume else "wb") as log, _pinned(slot, self.jobs):
            process = subprocess.Popen(
                [*self.command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=() if self.lock is None else (self.lock,),
                # A terminal's Ctrl-C goes to this process alone, which passes it on.
                start_new_session=True,
            )
        self._slots[slot] = _Running(cell, process, time.monotonic())
        if self.stopped:  # The signal came while the process was being started.
            process.send_signal(signal.SIGINT)

    def _ended(self) -> list[Cell]:
        """The cells that have ended since the last look."""
        ended = []
        for slot, running in list(self._slots.items()):
            code = running.process.poll()
            if code is not None:
                del self._slots[slot]
                self._note(running, code)
                ended.append(running.cell)
        return ended

    def _note(self, running: _Running, code: int) -> None:
        cell, seconds = running.cell, time.monotonic() - running.began
        if code == 0 and complete(cell):
            ppl = (read(cell) or {}).get("qat", {}).get("ppl")
            found = "" if ppl is None else f"perplexity {number(ppl)}, "
            say(f"{described(cell)}: {found}{seconds:.0f} s")
            return
        if self.stopped and code != 0:
            code = RESUMABLE  # Stopped while it was starting, perhaps, but whatever it was resumes.
        self.codes.append(code or 1)
        how = "stopped" if code == RESUMABLE else f"failed, exit code {code}"
        said = last_line(cell) or "it said nothing"
        say(f"{described(cell)}: {how}: {said} ({cell.folder / LOG})")

    @property
    def code(self) -> int:
        """Exit code: 1 after a crash, 2 after bad input, 75 after a stop, else 0."""
        known = {0, 2, RESUMABLE}
        if any(code not in known for code in self.codes):
            return 1
        return 2 if 2 in self.codes else RESUMABLE if self.stopped or self.codes else 0


def described(cell: Cell) -> str:
    """A cell in words."""
    if cell.kind == "teacher":
        return "teacher"
    value = f", trial of {cell.value:g}" if cell.kind == "search" else ""
    return f"{cell.row}, seed {cell.seed}{value}"


@contextlib.contextmanager
def _pinned(slot: int, jobs: int) -> Iterator[None]:
    """While inside, this process (and what it starts) has the slot's share of its cores.

    Set here and not between fork and exec: JAX warns of code that runs there.
    """
    if jobs == 1 or not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // jobs)
    begin = slot * share % len(cores)
    try:
        os.sched_setaffinity(0, cores[begin : begin + share])
        yield
    finally:
        os.sched_setaffinity(0, cores)
