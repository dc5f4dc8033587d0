"""The console scripts of the commands: signals are watched before the heavy imports.

`rabit-run` is `python -m experiments.run`, and so on.
"""

from __future__ import annotations

import importlib

from rabit_jax.experiments.engine.launch import BEGINS_AGAIN, GOES_ON, supervised
from rabit_jax.experiments.engine.signals import (
    AGAIN,
    CELLS,
    CONTINUE,
    ENDED,
    RESUMABLE,
    STOPPED,
    watch,
)


def run(argv: list[str] | None = None) -> int:
    """`rabit-run`."""
    return _start("run", CONTINUE, argv, several=GOES_ON)


def ptq(argv: list[str] | None = None) -> int:
    """`rabit-ptq`."""
    return _start("ptq", CONTINUE, argv, several=GOES_ON)


def ablate(argv: list[str] | None = None) -> int:
    """`rabit-ablate`."""
    return _start("ablate", CELLS, argv)


def evaluate(argv: list[str] | None = None) -> int:
    """`rabit-evaluate`."""
    return _start("evaluate", AGAIN, argv, several=BEGINS_AGAIN)


def generate(argv: list[str] | None = None) -> int:
    """`rabit-generate`."""
    return _start("generate", STOPPED, argv, ENDED)


def serve(argv: list[str] | None = None) -> int:
    """`rabit-serve`."""
    return _start("serve", STOPPED, argv, ENDED)


def export(argv: list[str] | None = None) -> int:
    """`rabit-export`."""
    return _start("export", STOPPED, argv, ENDED)


def push(argv: list[str] | None = None) -> int:
    """`rabit-push`."""
    return _start("push", STOPPED, argv, ENDED)


def _start(
    name: str, stopped: str, argv: list[str] | None, code: int = RESUMABLE, several: str = ""
) -> int:
    """Watch signals, then import and run a command; `stopped` is what one that ends it prints.

    A command that may be several processes has in `several` what it says to do where another one
    ends. With `argv` it is a call from Python, whose process goes on after a signal.
    """
    if argv is None:
        if several:
            supervised(several)
        watch(stopped, code)
    return importlib.import_module(f"rabit_jax.experiments.{name}").main(argv)
