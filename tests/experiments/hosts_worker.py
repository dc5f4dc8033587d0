"""One process of a command to which something happens: `hosts_worker.py FATE COMMAND ARGUMENTS`.

FATE is one of
  lives
  dies:STAGE:STEP   killed where it logs that step, which every process does at the same place
  breaks:STAGE:STEP ended by an error of the program there
  sees:PIECE        this process alone finds that piece damaged, the first time
"""

from rabit_jax.experiments.engine.launch import supervised

if __name__ == "__main__":
    supervised()

import importlib
import os
import signal
import sys
from collections.abc import Callable
from functools import partial

from rabit_jax.experiments.engine.metrics import Metrics
from rabit_jax.experiments.engine.pieces import DamagedPiece, Pieces


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def broken() -> None:
    raise ZeroDivisionError("a bug")


def until_line(end: Callable[[], None], stage: str, step: str) -> None:
    log = Metrics.log

    def until(self, line):
        if line["step"] == int(step) and line["stage"] == stage:
            end()
        log(self, line)

    Metrics.log = until


def see(piece: str) -> None:
    check, seen = Pieces._check, []

    def checked(self, name, total):
        if name == piece and not seen:
            seen.append(name)
            raise DamagedPiece(self.folder / name, "as this process sees it")
        check(self, name, total)

    Pieces._check = checked


def main() -> int:
    fate, *details = sys.argv[1].split(":")
    {"lives": lambda: None, "dies": partial(until_line, killed), "sees": see,
     "breaks": partial(until_line, broken)}[fate](*details)
    command = importlib.import_module(f"rabit_jax.experiments.{sys.argv[2]}")
    return command.main(sys.argv[3:])


if __name__ == "__main__":
    sys.exit(main())
