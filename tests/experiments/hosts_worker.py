"""One process of a run that may end itself: `hosts_worker.py STEP ARGUMENTS OF experiments.run`.

It is killed where it logs STEP, which every process does at the same place; 0 lets it live.
"""

from rabit_jax.experiments.engine.launch import supervised

if __name__ == "__main__":
    supervised()

import os
import signal
import sys

from rabit_jax.experiments import run
from rabit_jax.experiments.engine.metrics import Metrics


def main() -> int:
    last, log = int(sys.argv[1]), Metrics.log

    def until(self, line):
        if line["step"] == last and line["stage"] == "qat":
            os.kill(os.getpid(), signal.SIGKILL)
        log(self, line)

    Metrics.log = until
    return run.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
