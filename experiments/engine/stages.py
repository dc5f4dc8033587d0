"""The run engine: a task is a list of stages, and a stage is skipped while its inputs are the same.

`stages/<name>.json` in the run folder is the record of a complete stage: the hash of its inputs
(`key`), its id (that hash, or a new one where the stage was forced, so that what depends on it
follows), seconds, versions, device, result, and the sizes of the files that it left.
`stages/<name>.started` holds the key of a stage that was begun and is not complete.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeAlias, TypeVar

from rabit_jax import BadInput
from rabit_jax.atomic import remove, write_text
from rabit_jax.experiments.engine.config import section_hash
from rabit_jax.experiments.engine.folder import RunFolder
from rabit_jax.experiments.engine.machine import device, peak_memory, versions
from rabit_jax.experiments.engine.pieces import Pieces, Record
from rabit_jax.experiments.engine.settings import RunConfig
from rabit_jax.formats.model_card import CARD
from rabit_jax.progress import say

# The oldest version of this package whose stages gave the results that they give today. It is part
# of every key: raise it when a stage changes what it computes, and old records are redone.
RESULTS_OF = "0.1.0"

Ids: TypeAlias = dict[str, str]  # id of each stage that is complete, by name


class Run(Protocol):
    """What the engine needs of the state that the stages of a task share."""

    config: RunConfig
    folder: RunFolder
    stopped: bool

    def forget(self) -> None:
        """Drop what was loaded, so that the next stage reads what the last one wrote."""


R = TypeVar("R", bound=Run)


@dataclass(frozen=True)
class Stage(Generic[R]):
    """One stage of a task.

    Attributes:
      name: in records, on the command line and, unless `metrics` says otherwise, in metrics.jsonl.
      work: `(run, continues) -> result`; `continues` is True where an unfinished attempt with the
        same inputs goes on. The result is JSON, and a summary is made of the results.
      inputs: `(run, ids) -> everything that the result depends on`, which is hashed to the key.
      leaves: files and folders, relative to the run folder, that later stages read. The stage is
        complete only while they have the sizes that its record lists.
      pieces: folder of a stage that works piece by piece. The pieces are kept while the key stays
        the same, with `--resume` or without it.
      metrics: names of the stage's lines in metrics.jsonl, where it has several.
      wanted: whether a config asks for the stage at all.
    """

    name: str
    work: Callable[[R, bool], Record]
    inputs: Callable[[R, Ids], tuple]
    leaves: tuple[str, ...] = ()
    pieces: str = ""
    metrics: tuple[str, ...] = ()
    wanted: Callable[[RunConfig], bool] = lambda config: True


def run_stages(
    run: R, stages: Sequence[Stage[R]], resume: bool, forced: Collection[str], until: str
) -> dict[str, Record]:
    """Carry out or skip every stage in order up to `until`; returns their records by name.

    Raises:
      BadInput: `resume`, and an unfinished stage cannot go on as its inputs have changed.
      KeyboardInterrupt: `run.stopped` has become true.
    """
    records: dict[str, Record] = {}
    ids: Ids = {}
    for stage in stages:
        name, again = stage.name, stage.name in forced
        key = section_hash(RESULTS_OF, *stage.inputs(run, ids))
        _disown(run.folder.path, stage)
        record = None if again else completed(run.folder, stage, key)
        if record:
            say(f"{name}: complete with the same inputs, skipped (--force {name} redoes it)")
        else:
            if resume and not again:
                _check_resumable(run.folder, stages, stage, key)
            record = _carry_out(run, stage, key, resume, again)
        records[name], ids[name] = record, record["id"]
        if run.stopped:
            raise KeyboardInterrupt
        if name == until:
            break
    return records


def _carry_out(run: R, stage: Stage[R], key: str, resume: bool, forced: bool) -> Record:
    """Do the work of a stage and record it."""
    if forced and stage.pieces:
        remove(run.folder.path / stage.pieces)
    continues = begin(run.folder, stage, key, resume and not forced)
    start = time.perf_counter()
    result = stage.work(run, continues)
    record = {
        "key": key,
        "id": uuid.uuid4().hex if forced else key,
        "seconds": time.perf_counter() - start,
        "peak_memory_bytes": peak_memory(),
        "versions": versions(),
        "device": device(),
        "result": result,
    }
    run.forget()
    return complete(run.folder, stage, record)


def completed(folder: RunFolder, stage: Stage, key: str) -> Record | None:
    """The record of a complete stage with the same inputs whose files are all still there."""
    try:
        record = json.loads(_record(folder.path, stage).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    if record.get("key") != key or record["files"] != _sizes(folder.path, stage):
        return None
    return record


def begin(folder: RunFolder, stage: Stage, key: str, resume: bool) -> bool:
    """Note that a stage starts; True if it continues an unfinished attempt with the same inputs.

    Otherwise what that attempt has left (pieces, checkpoints, metrics) is removed, and the packed
    model with it where the stage leaves files that a packed model is made of. Summary and report
    go in both cases.

    Raises:
      BadInput: `resume`, and the pieces that are there were made with another key.
    """
    if stage.pieces:
        continues = Pieces(folder.path / stage.pieces).claim(key, resume)
    else:
        continues = resume and _started(folder.path, stage) == key
    stale = [f"stages/{stage.name}.json", "summary.json", "report.html"]
    if not continues:
        names = stage.metrics or (stage.name,)
        stale += [f"checkpoints/{stage.name}", *(f"tensorboard/{name}" for name in names)]
        folder.metrics.forget(names)
        if stage.leaves:
            # Post-training in the same folder would take what this run packs for its own.
            stale += ["packed", "blocks/packed.json"]
    for name in stale:
        remove(folder.path / name)
    write_text(folder.path / "stages" / f"{stage.name}.started", key)
    return continues


def complete(folder: RunFolder, stage: Stage, record: Record) -> Record:
    """Record a finished stage together with the files that it left."""
    record = {**record, "files": _sizes(folder.path, stage)}
    write_text(_record(folder.path, stage), json.dumps(record, indent=1))
    remove(folder.path / "stages" / f"{stage.name}.started")
    return record


def _check_resumable(
    folder: RunFolder, stages: Sequence[Stage], stage: Stage, key: str
) -> None:
    """Raise BadInput where resuming would have to throw an unfinished stage away."""
    unfinished = next((one for one in stages if _started(folder.path, one)), None)
    if unfinished is None or (unfinished is stage and _started(folder.path, stage) == key):
        return
    reader = "it" if unfinished is stage else f"stage {stage.name}"
    raise BadInput(
        f"cannot resume {folder.path}: since stage {unfinished.name} was stopped, what {reader} "
        "reads has changed (text, model files or the version of this package); put it back, or "
        "run without --resume to start that stage again"
    )


def _disown(path: Path, stage: Stage) -> None:
    """Remove the records of other stages whose files this one writes: they are another task's."""
    for file in (path / "stages").glob("*.json"):
        try:
            files = json.loads(file.read_text(encoding="utf-8")).get("files", {})
        except json.JSONDecodeError:
            continue
        written = {place for place in stage.leaves for name in files
                   if name == place or name.startswith(f"{place}/")}
        if written and file.stem != stage.name:
            remove(file)


def _started(path: Path, stage: Stage) -> str | None:
    """The key with which an unfinished stage was begun."""
    file = path / "stages" / f"{stage.name}.started"
    return file.read_text() if file.exists() else None


def _record(path: Path, stage: Stage) -> Path:
    return path / "stages" / f"{stage.name}.json"


def _sizes(path: Path, stage: Stage) -> dict[str, int]:
    """Sizes of the files that a stage leaves, by path.

    The model card is not among them: it is written from the summary, and edited by hand.
    """
    places = [path / place for place in stage.leaves]
    files = [f for p in places for f in ([p] if p.is_file() else sorted(p.rglob("*")))]
    kept = (f for f in files if f.is_file() and f.name != CARD)
    return {str(f.relative_to(path)): f.stat().st_size for f in kept}
