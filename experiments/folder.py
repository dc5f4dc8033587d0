"""The run folder: which stages are complete, metrics, TensorBoard."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from experiments.config import difference, dump_yaml, load_config
from experiments.settings import RunConfig
from rabit_jax import BadInput


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class RunFolder:
    """`runs/<name>`: `config.yaml`, `metrics.jsonl`, `checkpoints/`, `stages/` and what the stages
    make.

    A stage is complete when `stages/<stage>.json` exists; it holds the hash of the stage's inputs,
    an id that is new each time it is carried out (so that what depends on it follows), seconds and
    result.
    """

    def __init__(self, config: RunConfig):
        """The folder of a config; nothing is written yet."""
        self.path = Path(config.output) / config.name
        self.config = config
        self._board: Any = None

    def open(self, resume: bool) -> None:
        """Create the folder and write the resolved config.

        Raises:
          BadInput: `resume` with a config that differs from the one in the folder.
        """
        written = self.path / "config.yaml"
        if resume and written.exists():
            before = load_config(RunConfig, written)
            if changed := difference(before, self.config):
                listed = "; ".join(changed.splitlines())
                raise BadInput(
                    f"cannot resume {self.path}: its config differs ({listed}); "
                    "take the change back, or run without --resume to redo what it affects"
                )
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(written, dump_yaml(self.config))

    def completed(self, stage: str, key: str) -> dict | None:
        """The record of a complete stage whose inputs had the same hash."""
        try:
            record = json.loads((self.path / "stages" / f"{stage}.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return record if record.get("key") == key else None

    def began(self, stage: str) -> str | None:
        """The hash of the inputs with which an unfinished stage was started."""
        path = self.path / "stages" / f"{stage}.started"
        return path.read_text() if path.exists() else None

    def begin(self, stage: str, key: str, resume: bool) -> bool:
        """Note that a stage starts; True if it continues an unfinished one with the same inputs.

        Otherwise what an earlier attempt left (checkpoints, metrics) is removed.
        """
        continues = resume and self.began(stage) == key
        (self.path / "stages" / f"{stage}.json").unlink(missing_ok=True)
        if not continues:
            shutil.rmtree(self.checkpoints(stage), ignore_errors=True)
            self.keep_metrics(
                lambda line: line.get("stage") != stage and line.get("during") != stage
            )
        write_text(self.path / "stages" / f"{stage}.started", key)
        return continues

    def complete(self, stage: str, key: str, seconds: float, result: Any, peak_memory: int) -> dict:
        """Record a finished stage."""
        record = {
            "key": key,
            "id": uuid.uuid4().hex,
            "seconds": seconds,
            "peak_memory_bytes": peak_memory,
            "result": result,
        }
        write_text(self.path / "stages" / f"{stage}.json", json.dumps(record, indent=1))
        (self.path / "stages" / f"{stage}.started").unlink(missing_ok=True)
        return record

    def checkpoints(self, stage: str) -> Path:
        """Folder of a stage's checkpoints."""
        return self.path / "checkpoints" / stage

    def log(self, record: dict) -> None:
        """Append a line to metrics.jsonl and to TensorBoard."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        for name, value in record.items():
            if isinstance(value, int | float) and name not in ("step", "tokens"):
                self.board.add_scalar(f"{record['stage']}/{name}", value, record["step"])

    @property
    def board(self) -> Any:
        """The TensorBoard writer, opened at the first line."""
        if self._board is None:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(self.path / "tensorboard"))
        return self._board

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

    def keep_metrics(self, wanted: Any) -> None:
        """Rewrite metrics.jsonl with the lines for which `wanted(line)` holds."""
        if (self.path / "metrics.jsonl").exists():
            kept = [json.dumps(line) + "\n" for line in self.metrics() if wanted(line)]
            write_text(self.path / "metrics.jsonl", "".join(kept))

    def close(self) -> None:
        """Flush TensorBoard."""
        if self._board is not None:
            self._board.close()
