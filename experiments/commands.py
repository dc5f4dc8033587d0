"""The console scripts of the long commands: signals are watched before the heavy imports.

`rabit-run` is `python -m experiments.run`, and so on.
"""

from __future__ import annotations

from rabit_jax.experiments.engine.signals import AGAIN, CELLS, CONTINUE, watch


def _watch(argv: list[str] | None, message: str) -> None:
    """Watch in a command; with `argv` it is a call from Python, whose process goes on."""
    if argv is None:
        watch(message)


def run(argv: list[str] | None = None) -> int:
    """`rabit-run`."""
    _watch(argv, CONTINUE)
    from rabit_jax.experiments.run import main

    return main(argv)


def ptq(argv: list[str] | None = None) -> int:
    """`rabit-ptq`."""
    _watch(argv, CONTINUE)
    from rabit_jax.experiments.ptq import main

    return main(argv)


def ablate(argv: list[str] | None = None) -> int:
    """`rabit-ablate`."""
    _watch(argv, CELLS)
    from rabit_jax.experiments.ablate import main

    return main(argv)


def evaluate(argv: list[str] | None = None) -> int:
    """`rabit-evaluate`."""
    _watch(argv, AGAIN)
    from rabit_jax.experiments.evaluate import main

    return main(argv)
