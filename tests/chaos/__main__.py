"""Kills runs at random moments, tears files, resumes, and compares with undisturbed runs.

    python -m tests.chaos                    at least 50 kills over three kinds of runs
    python -m tests.chaos --kills 6 --seed 3 --only training

A training (`task: qat`), a block-wise run (`task: ptq` with tuning and end to end) and an ablation,
all tiny, are each done once undisturbed. Then each is started again and again in a fresh folder,
killed by SIGKILL, SIGTERM or SIGINT, now and then with the newest file torn (cut or a bit flipped),
and resumed by the same command until it ends. Every attempt must end with the exit code that its
signal allows, and what is there at the end must equal the undisturbed run to the bit.

Exit code: 0 all rounds agreed, 1 one did not (its folder is kept and named).
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rabit_jax.progress import progress, say
from tests.chaos.cases import CASES, TEACHER, prepare
from tests.chaos.rounds import Chaos, Disagreement

SHARES = {"training": 0.5, "blockwise": 0.34, "ablation": 0.16}  # of the kills


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    found = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__,
                                    formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--kills", type=int, default=51, help="at least how many (51)")
    found.add_argument("--seed", type=int, default=0, help="of moments, signals and damage (0)")
    found.add_argument("--only", choices=list(CASES), action="append", help="these kinds alone")
    found.add_argument("--folder", type=Path, help="where to work; kept (a temporary one)")
    arguments = found.parse_args(argv)
    if arguments.folder:
        return chaos(arguments.folder.absolute(), arguments)
    place = Path(tempfile.mkdtemp(prefix="rabit-chaos-"))
    code = chaos(place, arguments)
    if code:
        say(f"everything is kept in {place}")
    else:
        shutil.rmtree(place)
    return code


def chaos(place: Path, arguments: argparse.Namespace) -> int:
    """Reference runs, then rounds until every kind has had its kills, two kinds at once."""
    names = arguments.only or list(CASES)
    total = sum(SHARES[name] for name in names)
    wanted = {name: math.ceil(arguments.kills * SHARES[name] / total) for name in names}
    say(f"seed {arguments.seed}, kills: " + ", ".join(f"{n} {k}" for n, k in wanted.items()))
    prepare(place)
    kinds = {name: Chaos(name, place, arguments.seed) for name in CASES}
    try:
        for name in CASES:  # the first one trains the teacher of the second
            if name in names or name == TEACHER and "blockwise" in names:
                kinds[name].reference()
        with progress("kills", sum(wanted.values())) as bar, ThreadPoolExecutor(2) as pool:
            def shown() -> None:
                bar.update(sum(kind.kills for kind in kinds.values()),
                           runs=sum(kind.rounds for kind in kinds.values()),
                           torn=sum(kind.torn for kind in kinds.values()))

            for done in [pool.submit(kinds[name].until, wanted[name], shown) for name in names]:
                done.result()
    except Disagreement as error:
        say(f"seed {arguments.seed}: {error}")
        return 1
    kills, rounds, torn = (sum(getattr(kind, n) for kind in kinds.values())
                           for n in ("kills", "rounds", "torn"))
    say(f"seed {arguments.seed}: {kills} kills and {torn} torn files in {rounds} runs, all of them "
        "equal to the undisturbed ones to the bit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
