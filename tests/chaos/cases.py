"""The tiny runs that are killed: their commands, and what of them must come out the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.experiments.conftest import settings, story

TEACHER = "training"  # the kind of run whose teacher the block-wise run takes
# Of a line of metrics.jsonl: what depends on the machine.
CLOCKS = ("tokens_per_second", "seconds", "calibrate_seconds", "peak_memory_bytes", "mfu",
          "input_wait", "device_memory")


@dataclass(frozen=True)
class Case:
    """One kind of run.

    Attributes:
      module: of the command.
      config: `folder -> settings` of a run that writes in the folder alone.
      options: of the command, the same at every start.
    """

    module: str
    config: Callable[[Path], dict]
    options: tuple[str, ...] = ("--resume",)


def prepare(place: Path) -> None:
    """Write the texts, which every run of a place shares."""
    place.mkdir(parents=True, exist_ok=True)
    (place / "train.txt").write_text(story(0, 500))
    (place / "eval.txt").write_text(story(1, 60))


def base(folder: Path) -> dict:
    """The settings of `tests/experiments/conftest.py`, made smaller."""
    found = settings(folder.parent)
    training = {"batch_size": 4, "length": 16, "save_every": 2, "log_every": 1, "watch_every": 50}
    found |= {"name": "run", "output": str(folder / "runs")}
    found["data"] |= {"cache": str(folder / "cache"), "unseen_files": []}
    found["model"] |= {"d_model": 64, "head_dim": 16, "d_hidden": 64}
    found["teacher"] = {**training, "steps": 12, "optimizer": {"lr": 3e-3}}
    found["qat"] = {**training, "steps": 16, "optimizer": {"lr": 1e-3}}
    found["calibrate"] = {"sequences": 8, "batch_size": 4, "length": 16}
    found["init"] = {"spec": {"rounds": 2}}
    found["evaluate"] = {"context": 16, "windows": 8, "diagnostic_windows": 4, "baselines": False,
                         "watch_windows": 4}
    found["generate"] = {"prompts": ["The file"], "max_new_tokens": 2}
    return found


def blockwise(folder: Path) -> dict:
    """A post-training of the teacher that the undisturbed training has left."""
    found = base(folder)
    for name in ("model", "qat", "generate"):
        found.pop(name)
    found |= {"task": "ptq", "teacher": {"path": str(teacher(folder.parent))}}
    found["evaluate"] = {"context": 16, "windows": 8, "batch_size": 4,
                         "models": ["teacher", "init", "tuned", "packed"]}
    found["tune"] = {"epochs": 2, "sequences": 12, "length": 16, "held_out": 4, "batch_size": 4}
    found["end_to_end"] = {"steps": 8, "batch_size": 4, "length": 16, "save_every": 2,
                           "log_every": 1}
    return found


def ablation(folder: Path) -> dict:
    """Two rows behind one teacher."""
    run = base(folder)
    run.pop("name"), run.pop("output")
    run["teacher"]["steps"], run["qat"]["steps"] = 6, 6
    return {"name": "small", "output": str(folder / "runs"), "run": run, "seeds": [0],
            "rows": {"coupled": [], "independent": ["init.spec.type=independent"]}}


def teacher(place: Path) -> Path:
    """Of the undisturbed training."""
    return place / f"{TEACHER}-reference" / "runs" / "run" / "teacher"


CASES = {
    "training": Case("experiments.run", base),
    "blockwise": Case("experiments.run", blockwise),
    "ablation": Case("experiments.ablate", ablation, ()),
}


def write_config(case: Case, folder: Path) -> Path:
    """The YAML of a run in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(case.config(folder)))
    return file


def outcome(case: Case, folder: Path) -> dict[str, str]:
    """What a finished run has left, by name: digests of its models, and every line of metrics."""
    found = {}
    for file in sorted(folder.glob("runs/**/*.safetensors")):
        name = str(file.relative_to(folder))
        if "/blocks/" not in name and "/tune/" not in name:
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    for file in sorted(folder.glob("runs/**/metrics.jsonl")):
        for text in file.read_text().splitlines():
            line = {k: v for k, v in json.loads(text).items() if k not in CLOCKS}
            key = f"{file.relative_to(folder)}: {line['stage']} {line['step']}"
            found[f"{key} again" if key in found else key] = json.dumps(line, sort_keys=True)
    return found
