"""The console scripts `rabit-bench` and `rabit-kernels-bench`: `python -m experiments.bench`.

A module of its own because it is installed and the benchmarks are not: their results belong to a
checkout, and only where that is at hand (or installed with `pip install -e .`) can they run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from rabit_jax.errors import BadInput
from rabit_jax.experiments.engine.console import main_guard


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks; exit code 2 and one sentence where this installation has none."""
    if importlib.util.find_spec("rabit_jax.experiments.bench") is None:
        return main_guard(_refuse)
    # Not in the installed package, so it cannot be imported before it is known to be there.
    from rabit_jax.experiments.bench.__main__ import main as bench

    return bench(argv)


def _refuse() -> None:
    raise BadInput("the benchmarks are not part of the installed package: clone the repository and "
                   "run `python -m experiments.bench` in its root, or `pip install -e .` there")
