"""Stands in for `python -m experiments.run` in the tests of ablations: writes what a run leaves.

Its numbers follow from the config alone. The file `orders.json` in the working folder may tell a
cell, by the end of its folder's path, to do something else: crash, refuse, stop its parent, wait.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import yaml


def numbers(config):
    """What a run with this config measures."""
    lr, seed = config["qat"]["optimizer"]["lr"], config["seed"]
    ppl = 40 + abs(lr - 3e-3) * 1000 + seed + 5 * (config["init"]["spec"]["rounds"] == 0)
    unseen = {"ppl": ppl + 10, "bits_per_byte": 2.0}
    return {
        "seed": seed,
        "teacher": {"ppl": 30.0, "bits_per_byte": 1.0, "context": 32, "unseen": {"ppl": 35.0}},
        "init": {"ppl": 90.0},
        "qat": {"ppl": ppl, "bits_per_byte": 1.5, "context": 32, "kl": 0.1, "unseen": unseen},
        "packed": {"bits_per_weight": 2.25, "stored_bits_per_weight": 2.3},
        "gap_closed": 0.5,
        "diagnostics": {"qat": {"mean": {"path_correlation": -0.1, "slope": 0.9}}},
        "flip_rate": 1e-4,
        "cost": {"multiplications": 1000, "additions": 2_000_000, "lookups": 0, "bytes": 1e6},
        "tokens": {"qat": 2048},
        "seconds": {"qat": 1.5},
        "device": "a <device> & more",
        "versions": {"python": "3.11.7"},
    }


def curves(config):
    """Lines of metrics.jsonl."""
    steps = range(1, config["qat"]["steps"] + 1, 4)
    return [
        {"stage": "diagnostics", "during": "qat", "step": s, "tokens": 256 * s,
         "nats_per_token": 5.0 - 0.1 * s + 0.01 * config["seed"], "path_correlation": -0.1,
         "residual_alignment": 0.5, "flip_rate": 1e-3 / s}
        for s in steps
    ]  # fmt: skip


def main(arguments):
    file = Path(arguments[arguments.index("--config") + 1])
    config = yaml.safe_load(file.read_text())
    folder = Path(config["output"]) / config["name"]
    folder.mkdir(parents=True, exist_ok=True)
    with open("started.txt", "a") as log:
        log.write(f"{folder} {' '.join(arguments[2:])} {len(os.sched_getaffinity(0))}\n")
    stopped = []
    signal.signal(signal.SIGINT, lambda *_: stopped.append(1))
    (folder / "config.yaml").write_text(file.read_text())
    orders = json.loads(Path("orders.json").read_text()) if Path("orders.json").exists() else {}
    order = next((order for end, order in orders.items() if str(folder).endswith(end)), None)
    if order == "crash":
        raise ZeroDivisionError("a | bug")
    if order == "refuse":
        print("error: the mesh does not fit", file=sys.stderr)
        return 2
    if order in ("stop", "kill"):
        os.kill(os.getppid(), signal.SIGTERM if order == "stop" else signal.SIGKILL)
    if order in ("stop", "kill", "wait"):
        for _ in range(3000):
            time.sleep(0.02)
            if order == "kill" and Path("go").exists():
                break
            if stopped:
                print("stopped; --resume continues")
                return 75
    if "teacher" in arguments:
        (folder / "stages").mkdir(exist_ok=True)
        (folder / "stages" / "teacher.json").write_text("{}")
        (folder / "teacher").mkdir(exist_ok=True)
        (folder / "teacher" / "config.json").write_text(json.dumps({"seed": config["seed"]}))
        return 0
    lines = [json.dumps(line) + "\n" for line in curves(config)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "summary.json").write_text(json.dumps(numbers(config)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
