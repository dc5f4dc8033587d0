"""The console scripts of the long commands: signals are watched before the heavy imports.

`rabit-run` is `python -m experiments.run`, and so on.
"""

from __future__ import annotations

from rabit_jax.experiments.engine.signals import AGAIN, CELLS, CONTINUE, watch


def run() -> int:
    """`rabit-run`."""
    watch(CONTINUE)
    from rabit_jax.experiments.run import main

    return main()


def ptq() -> int:
    """`rabit-ptq`."""
    watch(CONTINUE)
    from rabit_jax.experiments.ptq import main

    return main()


def ablate() -> int:
    """`rabit-ablate`."""
    watch(CELLS)
    from rabit_jax.experiments.ablate import main

    return main()


def evaluate() -> int:
    """`rabit-evaluate`."""
    watch(AGAIN)
    from rabit_jax.experiments.evaluate import main

    return main()
