"""Rounds of kills: one run in a fresh folder, from its start to its end however often it is hit."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.chaos.cases import CASES, outcome, write_config

ROOT = Path(__file__).parents[2]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
RESUMABLE = 75
# What a torn write may hit; the last of each is what a machine that lost its power leaves behind.
TEARABLE = ("runs/**/checkpoints/qat/*/**/*", "runs/**/checkpoints/teacher/*/**/*",
            "runs/**/checkpoints/end_to_end/*/**/*", "runs/**/stages/*", "runs/**/metrics.jsonl",
            "runs/*/blocks/*", "runs/*/tune/*", "cache/*")

# Lines of stages that work piece by piece; one is missing where the kill comes between the piece
# and its line. None may be there twice, or be another.
ONE_BY_ONE = ("forward", "head", "init", "tune", "pack", "perplexity")


class Disagreement(Exception):
    """A run that was killed did not end as the undisturbed one."""


class Chaos:
    """The rounds of one kind of run.

    Attributes:
      kills, torn, rounds: how many there were.
    """

    def __init__(self, name: str, place: Path, seed: int):
        """Nothing is started yet."""
        self.name, self.case, self.place = name, CASES[name], place
        self.random = random.Random(f"{seed} {name}")
        self.kills = self.torn = self.rounds = 0
        self.seconds, self.wanted = 0.0, {}
        self.folder: Path | None = None
        self.lost = 0  # how often a line of metrics was torn in this round

    def reference(self) -> None:
        """The undisturbed run; done twice for its time, the first one compiles."""
        folder = self.place / f"{self.name}-reference"
        for again in (folder, self.place / f"{self.name}-again"):
            begin = time.monotonic()
            process = self._start(again)
            if code := process.wait():
                raise Disagreement(f"the undisturbed run ended with {code}: {_log(again)}")
            self.seconds = time.monotonic() - begin
        self.wanted = outcome(self.case, folder)
        self._compare(self.place / f"{self.name}-again")

    def until(self, kills: int, shown: Callable[[], object]) -> None:
        """Rounds with at least that many kills; the last one comes to its end."""
        while self.kills < kills:
            self.attempt()
            shown()
        if self.folder is not None:
            if code := self._start(self.folder).wait():
                raise Disagreement(
                    f"{self._where()}, the last start ended with {code}: {_log(self.folder)}"
                )
            self._ended(0)
            shown()

    def attempt(self) -> None:
        """Start or resume the run, kill it at a random moment unless it ends before."""
        if self.folder is None:
            self.folder, self.lost = self.place / f"{self.name}-{self.rounds}", 0
        process = self._start(self.folder)
        number = self.random.choice(SIGNALS)
        try:
            code = process.wait(self.random.uniform(0.1, 1.2) * self.seconds)
        except subprocess.TimeoutExpired:
            code = self._kill(process, number)
            self.kills += 1
            self.seconds *= 1.03
            if code and self.random.random() < 0.5:
                self._tear()
        else:
            if code:
                raise Disagreement(
                    f"{self._where()}, it ended by itself with {code}: {_log(self.folder)}"
                )
            # Other work on the machine comes and goes: some five kills to one run that ends.
            self.seconds *= 0.85
        self._ended(code)

    def _ended(self, code: int) -> None:
        """Compare a run that came to its end."""
        if code == 0 and self.folder is not None:
            self._compare(self.folder)
            self.folder, self.rounds = None, self.rounds + 1

    def _where(self) -> str:
        return f"{self.name}, after kill {self.kills}, in {self.folder}"

    def _kill(self, process: subprocess.Popen, number: signal.Signals) -> int:
        """Send the signal, now and then to all processes of the run; its exit code."""
        children = list(_children(process.pid)) if number == signal.SIGKILL else []
        process.send_signal(number)
        if self.random.random() < 0.5:
            for child in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, number)
        if number != signal.SIGKILL and self.random.random() < 0.3:
            time.sleep(self.random.uniform(0, 0.2))
            process.send_signal(number)
        code = process.wait(600)
        while any(map(_alive, children)):
            time.sleep(0.1)  # a cell outlives its ablation, which waits for it by its lock
        # A signal before the first line of the command ends it as it ends any program.
        if code not in (0, RESUMABLE, -number):
            raise Disagreement(
                f"{self._where()}, after {number.name} it ended with {code}: {_log(self.folder)}"
            )
        return code

    def _tear(self) -> None:
        """Cut the newest file of one kind, or flip a bit of it."""
        assert self.folder
        kinds = [found for pattern in TEARABLE
                 if (found := [f for f in self.folder.glob(pattern)
                               if f.is_file() and not f.is_symlink() and f.stat().st_size])]
        if not kinds:
            return
        file = max(self.random.choice(kinds), key=lambda f: f.stat().st_mtime_ns)
        content = bytearray(file.read_bytes())
        at = self.random.randrange(len(content))
        if self.random.random() < 0.5:
            del content[at:]
        else:
            content[at] ^= 1 << self.random.randrange(8)
        file.write_bytes(content)
        self.torn += 1
        self.lost += file.name == "metrics.jsonl"
        with open(self.folder / "torn.txt", "a") as log:
            log.write(f"kill {self.kills}: {file.relative_to(self.folder)}, {len(content)} bytes\n")

    def _start(self, folder: Path) -> subprocess.Popen:
        config = write_config(self.case, folder)
        environment = {
            "JAX_COMPILATION_CACHE_DIR": str(self.place / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1", "JAX_PLATFORMS": "cpu",
            "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **os.environ,
            "XLA_FLAGS": ""}  # one device, whatever the tests have
        with open(folder / "log.txt", "ab") as log:
            log.write(b"--- attempt\n")
            log.flush()
            return subprocess.Popen(
                [sys.executable, "-m", self.case.module, "--config", str(config),
                 *self.case.options],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, env=environment)

    def _compare(self, folder: Path) -> None:
        """Raise Disagreement where a finished run differs from the undisturbed one."""
        found, changed = outcome(self.case, folder), 0
        for name in sorted({*self.wanted, *found}):
            if found.get(name) == self.wanted.get(name):
                continue
            line = name.partition("metrics.jsonl: ")[2]
            if line and name not in found and (self.lost or line.startswith(ONE_BY_ONE)):
                continue
            changed += bool(line)  # lines have no checksum: a flipped bit may leave JSON behind
            if not line or changed > self.lost:
                raise Disagreement(f"{self.name}, kill {self.kills}: {name} in {folder} is "
                                   f"{found.get(name)}, undisturbed it is {self.wanted.get(name)}")
        if "reference" not in folder.name:
            shutil.rmtree(folder)


def _children(pid: int) -> Iterator[int]:
    """The processes that a process has started, and those that they have."""
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield from _children(int(child))
            yield int(child)


def _alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody waits for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _log(folder: Path | None) -> str:
    text = (folder / "log.txt").read_text(errors="replace") if folder else ""
    return text.rpartition("--- attempt")[2].strip()[-1500:]
