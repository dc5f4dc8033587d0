"""Runs the cells of an ablation, each in a process of its own and several at once.

A signal stops them so that the same command continues them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rabit_jax import BadInput
from rabit_jax.atomic import remove, write_text
from rabit_jax.experiments.ablation.cells import Cell
from rabit_jax.experiments.engine.config import dump_yaml, load_config, section_hash
from rabit_jax.experiments.engine.settings import RunConfig
from rabit_jax.experiments.engine.signals import RESUMABLE, SIGNALS, again, handling
from rabit_jax.formats.folder import fingerprint
from rabit_jax.json_text import parse
from rabit_jax.locks import locked as held
from rabit_jax.progress import number, progress, say
from rabit_jax.types import Json

RUN = (sys.executable, "-m", "rabit_jax.experiments.run")
LOG = "log.txt"
POLL_SECONDS = 0.05
Summary = Json  # `summary.json` as it is read: nested dicts of numbers, strings and nulls


def complete(cell: Cell) -> bool:
    """Whether the cell's run has ended with this config and with the teacher as it is now."""
    if cell.kind == "teacher":
        outputs = (cell.folder / "stages" / "teacher.json", cell.folder / "teacher")
        ended = all(path.exists() for path in outputs)
    else:
        ended = _summary(cell) is not None
    return ended and _same_inputs(cell)


def _same_inputs(cell: Cell) -> bool:
    """Whether the run in the cell's folder was started with this config and this teacher."""
    if not cell.config:
        return False
    try:
        if load_config(RunConfig, cell.folder / "config.yaml") != cell.config:
            return False
        with open(cell.file, encoding="utf-8") as file:
            return _teacher_digest(cell.config) in ("", file.readline())
    except (BadInput, OSError):
        return False


def _teacher_digest(config: RunConfig) -> str:
    """First line of a cell's YAML: a digest of its teacher's files, "" where it has none here.

    The path alone does not distinguish a teacher that was trained again with another `run.seed`.
    """
    path = config.teacher.path
    if not path or not Path(os.path.expanduser(path)).is_dir():
        return ""
    return f"# teacher {section_hash(fingerprint(path))[:16]}\n"


def read_summary(cell: Cell) -> Summary | None:
    """The summary of a complete cell, None for any other."""
    found = _summary(cell)
    return _as_trained(found) if found is not None and _same_inputs(cell) else None


def _summary(cell: Cell) -> Summary | None:
    """What the run has written; None where it is not there or damaged: the run writes it again."""
    try:  # as Python writes it: a perplexity that is not finite is a result
        found = parse((cell.folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _as_trained(summary: dict[str, object]) -> Summary:
    """The summary with what training made under `qat`, also where blocks were tuned (task ptq): the
    packed model where it was scored, else the tuned one."""
    if summary.get("task") != "ptq":
        return summary
    scored = (summary.get(name) for name in ("packed", "tuned"))
    made = next((s for s in scored if isinstance(s, dict) and s.get("ppl") is not None), None)
    return {**summary, "qat": made}


def lookup(summary: object, key: str) -> float | None:
    """The number under a dotted key; None where a part of it is missing, null or no number."""
    for name in key.split("."):
        summary = summary.get(name) if isinstance(summary, Mapping) else None
    if isinstance(summary, bool) or not isinstance(summary, int | float):
        return None
    return summary


def last_line(cell: Cell) -> str:
    """The last line in the log of the cell's run, "" if there is none."""
    try:
        lines = (cell.folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Lock the ablation's folder; yields the descriptor of the lock, for the cells to inherit.

    Cells that outlive a killed ablation keep the lock, so no two processes write one cell.

    Raises:
      BadInput: another process has locked the folder, or it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context(held(folder / ".lock", f"the ablation {folder}"))
        except OSError as error:
            raise BadInput(
                f"cannot write the folder {folder} ({error.strerror or error}); set output to "
                "another place"
            ) from error
        yield lock


@dataclass
class _Running:
    cell: Cell
    process: subprocess.Popen
    began: float


class Runner:
    """Starts cells, waits for them and keeps their exit codes.

    Attributes:
      lock: a descriptor that the cells inherit, see `locked`.
      stopped: whether a signal has come.
      codes: exit codes of the cells that did not complete.
    """

    def __init__(self, command: Sequence[str] = RUN, jobs: int = 1):
        """A runner that has not started any cell.

        Args:
          command: the command of a cell; `--config FILE` and `--resume` are appended.
          jobs: number of cells at once, each on its share of the processor's cores.

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
        """Inside, a signal stops the cells, which have sessions of their own; a second one stops
        them at once."""

        def stop(number: int, _: object) -> None:
            if not self.stopped:
                self.stopped = True
                self._interrupt()
                say("stopping the cells at their next step or stage (again to stop them at once)")
            elif again(number):
                self._interrupt()

        with handling(stop, SIGNALS):
            yield

    def _interrupt(self) -> None:
        for running in list(self._slots.values()):
            running.process.send_signal(signal.SIGINT)

    def run(
        self, title: str, cells: Sequence[Cell], finished: Callable[[], object] = lambda: None
    ) -> None:
        """Run the incomplete cells in order; after one that fails the others still run.

        Args:
          title: of the progress bar.
          cells: complete ones, and those that have no config yet, are skipped.
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
                    if ended := self._take_ended():
                        self._fill(waiting)
                        done += ended
                        bar.update(done)
                        finished()
                    else:
                        time.sleep(POLL_SECONDS)
        finally:
            # Whatever ends the loop, no cell is left running unattended.
            self._interrupt()
            for running in self._slots.values():
                running.process.wait()

    def _fill(self, waiting: list[Cell]) -> None:
        """Start waiting cells in the free slots."""
        for slot in range(self.jobs):
            if waiting and slot not in self._slots and not self.stopped:
                self._start(waiting.pop(0), slot)

    def _start(self, cell: Cell, slot: int) -> None:
        resume = _prepare(cell)
        arguments = ["--config", str(cell.file), *(["--resume"] if resume else [])]
        arguments += ["--until", "teacher"] if cell.kind == "teacher" else []
        # On a GPU the first of several processes would take most of the memory for itself.
        shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if self.jobs > 1 else {}
        with open(cell.folder / LOG, "ab" if resume else "wb") as log, _pinned(slot, self.jobs):
            process = subprocess.Popen(
                [*self.command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**shared, **os.environ},
                pass_fds=() if self.lock is None else (self.lock,),
                # A terminal's Ctrl-C goes to this process alone, which passes it on.
                start_new_session=True,
            )
        self._slots[slot] = _Running(cell, process, time.monotonic())
        if self.stopped:  # The signal came while the process was being started.
            process.send_signal(signal.SIGINT)

    def _take_ended(self) -> int:
        """Free the slots of the cells that have ended; returns how many there were."""
        ended = {slot: code for slot, running in self._slots.items()
                 if (code := running.process.poll()) is not None}  # fmt: skip
        for slot, code in ended.items():
            self._report(self._slots.pop(slot), code)
        return len(ended)

    def _report(self, running: _Running, code: int) -> None:
        cell, seconds = running.cell, time.monotonic() - running.began
        if code == 0 and complete(cell):
            ppl = lookup(read_summary(cell), "qat.ppl")
            found = "" if ppl is None else f"perplexity {number(ppl)}, "
            say(f"{cell_name(cell)}: {found}{seconds:.0f} s")
            return
        if self.stopped and code != 0:
            code = RESUMABLE  # A cell that was stopped while it started can be resumed as well.
        self.codes.append(code or 1)
        how = "stopped" if code == RESUMABLE else f"failed, exit code {code}"
        last = last_line(cell) or "it printed nothing"
        say(f"{cell_name(cell)}: {how}: {last} ({cell.folder / LOG})")

    @property
    def code(self) -> int:
        """Exit code: 1 after a crash, 2 after bad input, 75 after a stop, else 0."""
        known = {0, 2, RESUMABLE}
        if any(code not in known for code in self.codes):
            return 1
        return 2 if 2 in self.codes else RESUMABLE if self.stopped or self.codes else 0


def _prepare(cell: Cell) -> bool:
    """Write the cell's config; returns whether its run resumes what is in the folder.

    A run refuses to resume with another config; without --resume it keeps the stages whose inputs
    are unchanged.
    """
    assert cell.config
    resume = not (cell.folder / "config.yaml").exists() or _same_inputs(cell)
    if not resume:
        remove(cell.folder / "summary.json")
    write_text(cell.file, _teacher_digest(cell.config) + dump_yaml(cell.config))
    cell.folder.mkdir(parents=True, exist_ok=True)
    return resume


def cell_name(cell: Cell) -> str:
    """How messages and tables name a cell."""
    if cell.kind == "teacher":
        return "teacher"
    value = f", trial of {cell.value:g}" if cell.kind == "search" else ""
    return f"{cell.row}, seed {cell.seed}{value}"


@contextlib.contextmanager
def _pinned(slot: int, jobs: int) -> Iterator[None]:
    """Inside, this process and those that it starts have the slot's share of its cores.

    It is set here and not between fork and exec, because JAX warns of code that runs there.
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
