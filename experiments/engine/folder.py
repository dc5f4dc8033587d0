"""The run folder: which stages are complete, metrics, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rabit_jax import BadInput
from rabit_jax.atomic import remove, write_text
from rabit_jax.experiments.engine.config import difference, dump_yaml, load_config, to_dict
from rabit_jax.experiments.engine.log_wandb import WandbLog
from rabit_jax.experiments.engine.settings import RunConfig
from rabit_jax.formats.model_card import CARD
from rabit_jax.progress import say

# What a stage leaves on disk and later ones read: it is complete only while these are whole.
LEAVES = {
    "teacher": ("teacher",),
    "calibrate": ("calibration.safetensors",),
    "init": ("checkpoints/init",),
    "qat": ("checkpoints/student",),
    "pack": ("packed",),
}


class RunFolder:
    """`runs/<name>`: `config.yaml`, `metrics.jsonl`, `checkpoints/`, `stages/` and what the stages
    make.

    A stage is complete when `stages/<stage>.json` exists and the files it lists are there. It holds
    the hash of the stage's inputs, its id (that hash, or a new one where the stage was forced, so
    that what depends on it follows), seconds, versions and result.
    """

    def __init__(self, config: RunConfig):
        """The folder of a config; nothing is written yet."""
        self.path = Path(config.output) / config.name
        self.config = config
        self._boards: dict[str, Any] = {}
        self._wandb: WandbLog | None = None

    def open(self, resume: bool) -> None:
        """Create the folder and write the resolved config.

        Raises:
          BadInput: `resume` with a config that differs from the one in the folder, a folder that
            is no run's or cannot be written, or Weights & Biases is asked for and not installed.
        """
        if project := self.config.wandb:
            self._wandb = WandbLog(self.path, project, to_dict(self.config), resume)
        written = self.path / "config.yaml"
        changed = self._changed(written) if written.exists() else ""
        if resume and changed:
            raise BadInput(
                f"cannot resume {self.path}: its config differs ({changed}); "
                "take the change back, or run without --resume to redo what it affects"
            )
        if changed:
            say(f"{self.path} holds a run with another config ({changed}); stages that the change "
                "affects are redone in it, name=... starts a run beside it")
        own = {path.split("/")[0] for paths in LEAVES.values() for path in paths}
        taken = sorted(name for name in own if (self.path / name).exists())
        if taken and not written.exists():
            raise BadInput(
                f"{self.path} holds {', '.join(taken)} but no config.yaml, so it is not the folder "
                "of a run: set name or output to another place"
            )
        try:
            write_text(written, dump_yaml(self.config))
        except OSError as error:
            raise BadInput(
                f"cannot write the run folder {self.path} ({error.strerror or error}); "
                "set output to another place"
            ) from error

    def _changed(self, written: Path) -> str:
        """How the config in the folder differs from this one, "" where it does not."""
        try:
            before = load_config(RunConfig, written)
        except BadInput as error:
            return str(error)
        return "; ".join(difference(before, self.config).splitlines())

    def completed(self, stage: str, key: str) -> dict | None:
        """The record of a complete stage with the same inputs whose files are all still there."""
        try:
            record = json.loads((self.path / "stages" / f"{stage}.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        if record.get("key") != key:
            return None
        return record if record["files"] == self._sizes(stage) else None

    def _sizes(self, stage: str) -> dict[str, int]:
        """Sizes of the files that a stage leaves, by path.

        Without the model card: it is written again from the summary, and edited by hand.
        """
        places = [self.path / place for place in LEAVES.get(stage, ())]
        files = [f for p in places for f in ([p] if p.is_file() else sorted(p.rglob("*")))]
        kept = (f for f in files if f.is_file() and f.name != CARD)
        return {str(f.relative_to(self.path)): f.stat().st_size for f in kept}

    def began(self, stage: str) -> str | None:
        """The hash of the inputs with which an unfinished stage was started."""
        path = self.path / "stages" / f"{stage}.started"
        return path.read_text() if path.exists() else None

    def begin(self, stage: str, key: str, resume: bool) -> bool:
        """Note that a stage starts; True if it continues an unfinished one with the same inputs.

        Otherwise what an earlier attempt left (checkpoints, metrics) is removed. Results that the
        stage makes stale (summary, report, packed model) go in both cases.
        """
        continues = resume and self.began(stage) == key
        stale = [f"stages/{stage}.json", "summary.json", "report.html"]
        if stage not in ("evaluate", "generate"):
            # Post-training in the same folder would take what this run packs for its own.
            stale += ["packed", "blocks/packed.json"]
        if not continues:
            stale += [f"checkpoints/{stage}", f"tensorboard/{stage}"]
            self.keep_metrics(stage, 0)
        for name in stale:
            remove(self.path / name)
        write_text(self.path / "stages" / f"{stage}.started", key)
        return continues

    def complete(self, stage: str, record: dict) -> dict:
        """Record a finished stage with the files that it left."""
        record = {**record, "files": self._sizes(stage)}
        write_text(self.path / "stages" / f"{stage}.json", json.dumps(record, indent=1))
        remove(self.path / "stages" / f"{stage}.started")
        return record

    def checkpoints(self, stage: str) -> Path:
        """Folder of a stage's checkpoints."""
        return self.path / "checkpoints" / stage

    def log(self, record: dict) -> None:
        """Append a line to metrics.jsonl, to TensorBoard and, where asked for, to wandb."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        board = self._board(record.get("during", record["stage"]))
        stage, step = record["stage"], record["step"]
        numbers = {n: v for n, v in record.items() if isinstance(v, int | float) and n != "step"}
        for name, value in numbers.items():
            if name != "tokens":
                board.add_scalar(f"{stage}/{name}", value, step)
        if self._wandb:
            self._wandb.add(stage, step, numbers)

    def _board(self, stage: str) -> Any:
        """The TensorBoard writer of a stage, opened at its first line."""
        if stage not in self._boards:
            from tensorboardX import SummaryWriter

            self._boards[stage] = SummaryWriter(str(self.path / "tensorboard" / stage))
        return self._boards[stage]

    def metrics(self) -> list[dict]:
        """All whole lines of metrics.jsonl; a line cut by a crash is dropped."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return found

    def keep_metrics(self, stage: str, step: int) -> None:
        """Drop the lines of a stage after a step, and any line cut by a crash."""
        if (self.path / "metrics.jsonl").exists():
            kept = [
                json.dumps(line) + "\n"
                for line in self.metrics()
                if line.get("during", line["stage"]) != stage or line["step"] <= step
            ]
            write_text(self.path / "metrics.jsonl", "".join(kept))

    def close(self) -> None:
        """Flush TensorBoard and Weights & Biases."""
        if self._wandb:
            self._wandb.close()
        for board in self._boards.values():
            board.close()
