"""The metrics of a run: metrics.jsonl, TensorBoard and, where asked for, Weights & Biases."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from rabit_jax import hosts
from rabit_jax.atomic import write_text
from rabit_jax.errors import BadInput
from rabit_jax.json_text import parse
from rabit_jax.progress import say
from rabit_jax.types import Json
from rabit_jax.workspaces import naming

Line: TypeAlias = Json  # a line of metrics.jsonl: stage, step, tokens and numbers
FLUSH_SECONDS = 30  # after which TensorBoard sees what was logged


class Metrics:
    """Writes every line to all places.

    A line has `stage` and `step`; where it was measured during another stage, `during` names that.

    Attributes:
      file: metrics.jsonl.
      wandb: where lines are sent as well; None sends nothing.
    """

    def __init__(self, folder: Path):
        """Nothing is opened before the first line."""
        self.folder, self.file = folder, folder / "metrics.jsonl"
        self.wandb: WandbLog | None = None
        self._boards: dict[str, _Board] = {}

    def log(self, line: Line) -> None:
        """Append a line, in the process that writes."""
        if not hosts.first():
            return
        with naming(self.file), open(self.file, "a+b") as file:
            # Behind a line that a full disk or a loss of power has cut: the new one stays whole.
            cut = file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n"
            file.write(b"\n" * bool(cut) + json.dumps(line).encode() + b"\n")
        stage, step = line["stage"], line["step"]
        numbers = {n: v for n, v in line.items() if isinstance(v, int | float) and n != "step"}
        owner = _owner(line)
        if owner not in self._boards:
            self._boards[owner] = _Board(self.folder / "tensorboard" / owner)
        shown = {f"{stage}/{name}": value for name, value in numbers.items() if name != "tokens"}
        self._boards[owner].add(step, shown)
        if self.wandb:
            self.wandb.add(stage, step, numbers)

    def lines(self) -> list[Line]:
        """All whole lines; one that was cut by a crash or is damaged is left out."""
        return [line for _, line in self._read() if line is not None]

    def _read(self) -> Iterator[tuple[str, Line | None]]:
        """Each line as text, and as read; None where it is no line of metrics."""
        if self.file.exists():
            for text in self.file.read_text(encoding="utf-8", errors="replace").splitlines():
                yield text, _parsed(text)

    def forget(self, stages: Collection[str] = (), after: int = -1) -> None:
        """Drop the lines of these stages after a step; damaged lines are set aside in any case.

        Those go to `metrics.damaged` beside the file, and one line on stderr says so.
        """
        if not self.file.exists() or not hosts.first():
            return
        found = list(self._read())
        kept = [line for _, line in found if line is not None
                and (_owner(line) not in stages or line["step"] <= after)]
        if damaged := [text for text, line in found if line is None]:
            aside = self.file.with_suffix(".damaged")
            with open(aside, "a", encoding="utf-8") as file:
                file.writelines(f"{text}\n" for text in damaged)
            say(f"{self.file}: {len(damaged)} damaged lines were set aside in {aside.name}")
        if len(kept) < len(found):
            write_text(self.file, "".join(json.dumps(line) + "\n" for line in kept))

    def close(self) -> None:
        """Flush TensorBoard and Weights & Biases."""
        with contextlib.ExitStack() as stack:  # one that fails does not keep the others open
            for board in self._boards.values():
                stack.callback(board.close)
            if self.wandb:
                stack.callback(self.wandb.close)


class _Board:
    """The TensorBoard file of a stage, opened at its first line.

    It is written here and not by SummaryWriter, whose thread ends without a word where the disk is
    full: whoever logs would then wait for it for ever.
    """

    def __init__(self, folder: Path):
        from tensorboardX.event_file_writer import EventsWriter

        self.folder, self.flushed = folder, -float("inf")
        with naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self.writer = EventsWriter(str(folder / "events"))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values of one step."""
        # Generated, which pyright cannot see.
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore

        found = [Summary.Value(tag=name, simple_value=float(v)) for name, v in values.items()]
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=found))
        with naming(self.folder):
            self.writer.write_event(event)
            if time.monotonic() - self.flushed > FLUSH_SECONDS:
                self.writer.flush()
                self.flushed = time.monotonic()

    def close(self) -> None:
        """Write what is left."""
        with naming(self.folder):
            self.writer.close()


def _owner(line: Line) -> str:
    return line.get("during", line["stage"])


def _parsed(text: str) -> Line | None:
    try:
        line = parse(text)
    except ValueError:
        return None
    if not isinstance(line, dict):
        return None
    kinds = {"stage": str, "during": str, "step": int, "tokens": int | float}
    sound = all(isinstance(line.get(name), kind) for name, kind in kinds.items()
                if name in ("stage", "step") or name in line)
    return line if sound and "\ufffd" not in text else None


class WandbLog:
    """One run on Weights & Biases for a run folder, opened at its first line.

    Stages count their steps from 0, so each has its own step axis `<stage>/step`. The id is kept in
    `<folder>/wandb-id`: with `--resume` the same run goes on there, without it a new one begins.
    Lines between the last checkpoint and a stop are sent again by a resumed run.
    """

    def __init__(self, folder: Path, project: str, config: Json, resume: bool):
        """Nothing is sent yet; raises BadInput where wandb is not installed."""
        try:
            self.wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise BadInput(
                f"the config asks for Weights & Biases, which cannot be imported ({error}): "
                "`pip install wandb`, or leave the setting `wandb` out"
            ) from None
        self.folder, self.project, self.config, self.resume = folder, project, config, resume
        self.run: Any = None
        self.stages: set[str] = set()

    def add(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Send the values of one step of a stage."""
        if self.run is None:
            self.run = self._open()
        known = {f"{stage}/{name}": value for name, value in values.items()}
        if stage not in self.stages:
            self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self.stages.add(stage)
        self.run.log({**known, f"{stage}/step": step})

    def _open(self) -> Any:
        kept = self.folder / "wandb-id"
        name = kept.read_text().strip() if self.resume and kept.exists() else None
        try:
            run = self.wandb.init(
                project=self.project, name=self.folder.name, config=self.config,
                dir=str(self.folder), id=name, resume="allow",
            )
        except Exception as error:  # Its errors of login and network have no common class.
            raise BadInput(
                f"Weights & Biases cannot be reached ({error}): `wandb login`, set "
                "WANDB_MODE=offline, or leave the setting `wandb` out"
            ) from error
        write_text(kept, run.id)
        return run

    def close(self) -> None:
        """Send what is left; in a `finally` after an exception the run counts as failed."""
        if self.run is not None:
            self.run.finish(exit_code=0 if sys.exc_info()[0] is None else 1)
