"""Post-training quantisation: `experiments.run` with the config `ptq`, unless another is named.

    python -m experiments.ptq teacher.path=FOLDER
    python -m experiments.ptq teacher.path=FOLDER --resume     at the block that it had reached
"""

from __future__ import annotations

from rabit_jax.experiments.engine.launch import supervised
from rabit_jax.experiments.engine.signals import CONTINUE, watch

if __name__ == "__main__":
    supervised()  # before any thread begins
    watch(CONTINUE)  # before the imports below, which take seconds

import sys

from rabit_jax.experiments import run


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    command = sys.argv[1:] if argv is None else argv
    named = any(part == "--config" or part.startswith("--config=") for part in command)
    return run.main(command if named else ["--config", "ptq", *command])


if __name__ == "__main__":
    sys.exit(main())
