"""The run engine: a task is a list of stages, and a stage is skipped while its inputs are the same.

`stages/<name>.json` in the run folder is the record of a complete stage: the hash of its inputs
(`key`) and the inputs themselves, its id (that hash, or a new one where the stage was forced, so
that what depends on it follows), seconds, versions, device, result, and sizes and digests of the
files that it left. `stages/<name>.started` holds key, inputs and versions of a stage that was begun
and is not complete.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, Protocol, TypeAlias, TypeVar

from rabit_jax import BadInput, hosts
from rabit_jax.atomic import remove
from rabit_jax.experiments.engine.config import difference, section_hash, to_dict
from rabit_jax.experiments.engine.folder import RunFolder
from rabit_jax.experiments.engine.machine import device, peak_memory, versions
from rabit_jax.experiments.engine.pieces import DamagedPiece, Pieces
from rabit_jax.experiments.engine.records import Record, digests, read_record, write_record
from rabit_jax.experiments.engine.settings import RunConfig
from rabit_jax.formats.model_card import CARD
from rabit_jax.progress import say

# The oldest version of this package whose stages gave the results that they give today. It is part
# of every key: raise it when a stage changes what it computes, and old records are redone.
RESULTS_OF = "0.1.0"

FIELDS = {"key": str, "id": str, "files": dict, "result": dict}  # of every record
Ids: TypeAlias = dict[str, str]  # id of each stage that is complete, by name


@dataclass(frozen=True)
class Read:
    """What a stage depends on, by the names that messages use.

    Attributes:
      label: opens the hash: the stage or the task.
      values: JSON, dataclasses or digests by name.
      flat: whether the values stand in the hash side by side; earlier versions had it either way.
      changed: what version 0.1 computed otherwise in the middle of this stage, as a sentence; a
        stage that it began is then not gone on with. Empty where nothing changed.
    """

    label: str
    values: Mapping[str, object]
    flat: bool = False
    changed: str = ""

    @property
    def key(self) -> str:
        """The hash."""
        values = list(self.values.values())
        return section_hash(RESULTS_OF, self.label, *(values if self.flat else [values]))

    def record(self) -> Record:
        """Key and values as JSON."""
        return {"key": self.key, "inputs": {"version": RESULTS_OF, **to_dict(dict(self.values))}}


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
      inputs: `(run, ids) -> everything that the result depends on`, with its key.
      leaves: files and folders, relative to the run folder, that later stages read. The stage is
        complete only while they have the sizes that its record lists.
      pieces: folder of a stage that works piece by piece. The pieces are kept while the key stays
        the same, with `--resume` or without it.
      metrics: names of the stage's lines in metrics.jsonl, where it has several.
      wanted: whether a config asks for the stage at all.
    """

    name: str
    work: Callable[[R, bool], Record]
    inputs: Callable[[R, Ids], Read]
    leaves: tuple[str, ...] = ()
    pieces: str = ""
    metrics: tuple[str, ...] = ()
    wanted: Callable[[RunConfig], bool] = lambda config: True


def run_stages(
    run: R, stages: Sequence[Stage[R]], resume: bool, forced: Collection[str], until: str
) -> dict[str, Record]:
    """Carry out or skip every stage in order up to `until`; returns their records by name.

    A stage that works piece by piece and one of whose pieces turns out to be damaged, in its own
    work or in that of a later stage, starts again, once.

    Raises:
      BadInput: `resume`, and an unfinished stage cannot go on as its inputs have changed.
      KeyboardInterrupt: `run.stopped` has become true.
    """
    left, mended = set(forced), set()
    while True:
        try:
            return _run_stages(run, stages, resume, left, until)
        except DamagedPiece as error:
            owner = next((stage for stage in stages if stage.pieces
                          and run.folder.path / stage.pieces == error.folder), None)
            if owner is None or owner.name in mended or not error.everywhere:
                raise
            mended.add(owner.name)
            say(f"{error.found}: stage {owner.name} starts again")
            hosts.first_does(partial(_start_again, run.folder.path, owner))
            run.forget()


def _start_again(path: Path, stage: Stage) -> None:
    """Remove the pieces and the record of a stage."""
    remove(path / stage.pieces)
    remove(_record(path, stage))


def _run_stages(
    run: R, stages: Sequence[Stage[R]], resume: bool, forced: set[str], until: str
) -> dict[str, Record]:
    """As `run_stages`, up to the first damaged piece; what was forced is taken out of `forced`."""
    records: dict[str, Record] = {}
    ids: Ids = {}
    for stage in stages:
        name, again = stage.name, stage.name in forced
        read = stage.inputs(run, ids)
        record = hosts.first_does(partial(_found, run.folder, stage, read, again))
        if record:
            say(f"{name}: complete with the same inputs, skipped (--force {name} redoes it)")
        else:
            if resume and not again:
                hosts.first_does(partial(_check_resumable, run.folder, stages, stage, read))
            record = _carry_out(run, stage, read, resume, again)
            forced.discard(name)
        records[name], ids[name] = record, record["id"]
        if hosts.any_asks(run.stopped):
            raise KeyboardInterrupt
        if name == until:
            break
    return records


def _carry_out(run: R, stage: Stage[R], read: Read, resume: bool, forced: bool) -> Record:
    """Do the work of a stage and record it."""
    def started() -> bool:
        if forced and stage.pieces:
            remove(run.folder.path / stage.pieces)
        return begin(run.folder, stage, read, resume and not forced)

    continues = hosts.first_does(started)
    start = time.perf_counter()
    result = stage.work(run, continues)
    record = {
        **read.record(),
        "id": uuid.uuid4().hex if forced else read.key,
        "seconds": time.perf_counter() - start,
        "peak_memory_bytes": peak_memory(),
        "versions": versions(),
        "device": device(),
        "result": result,
    }
    run.forget()
    return hosts.first_does(lambda: complete(run.folder, stage, record))


def _found(folder: RunFolder, stage: Stage, read: Read, again: bool) -> Record | None:
    """The record of a stage that need not be done; other stages' claims to its files go."""
    _disown(folder.path, stage)
    return None if again else completed(folder, stage, read.key)


def completed(folder: RunFolder, stage: Stage, key: str) -> Record | None:
    """The record of a complete stage with the same inputs whose files are all still there."""
    record = read_record(_record(folder.path, stage), FIELDS)
    if record is None or record["key"] != key or record["files"] != _sizes(folder.path, stage):
        return None
    return record


def begin(folder: RunFolder, stage: Stage, read: Read, resume: bool) -> bool:
    """Note that a stage starts; True if it continues an unfinished attempt with the same inputs.

    Otherwise what that attempt has left (pieces, checkpoints, metrics) is removed, and the packed
    model with it where the stage leaves files that a packed model is made of. Summary and report
    go in both cases.

    Raises:
      BadInput: `resume`, and the pieces that are there were made with another key.
    """
    if stage.pieces:
        continues = Pieces(folder.path / stage.pieces).claim(read.key, resume)
    else:
        continues = resume and _started(folder.path, stage).get("key") == read.key
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
    started = {**read.record(), "versions": versions()}
    write_record(folder.path / "stages" / f"{stage.name}.started", started)
    return continues


def complete(folder: RunFolder, stage: Stage, record: Record) -> Record:
    """Record a finished stage together with the files that it left."""
    sizes = _sizes(folder.path, stage)
    # Checkpoints and packed models hold checksums of their own.
    plain = [name for name in sizes if not name.startswith(("checkpoints/", "packed/"))]
    record = {**record, "files": sizes, "digests": digests(folder.path, plain)}
    write_record(_record(folder.path, stage), record)
    remove(folder.path / "stages" / f"{stage.name}.started")
    return record


def _check_resumable(
    folder: RunFolder, stages: Sequence[Stage], stage: Stage, read: Read
) -> None:
    """Raise BadInput where resuming would have to throw an unfinished stage away.

    A stage that is done again with the same inputs, because its record or files were damaged,
    changes nothing for those after it.
    """
    unfinished = next((one for one in stages if _started(folder.path, one)), None)
    if unfinished is None:
        return
    if unfinished is stage:
        before = _started(folder.path, stage)
    else:
        before = read_record(_record(folder.path, stage), FIELDS)
    if unfinished is stage and read.changed and before and "inputs" not in before:
        raise BadInput(
            f"cannot resume {folder.path}: version 0.1 began stage {stage.name}, and "
            f"{read.changed}; run without --resume to start that stage again, or go on with 0.1")
    if before is None or before.get("key") == read.key:
        return
    reader = "it" if unfinished is stage else f"stage {stage.name}"
    raise BadInput(
        f"cannot resume {folder.path}: since stage {unfinished.name} was stopped, what {reader} "
        f"reads has changed ({_changes(before, read)}); put it back, or run without --resume to "
        "start that stage again"
    )


def _changes(before: Record, read: Read) -> str:
    """The names of the inputs that differ, with their values where these are settings."""
    old, new = before.get("inputs"), read.record()["inputs"]
    if not isinstance(old, dict):
        return "an earlier version of this package began it, which did not note what it reads"
    found = []
    for line in difference(old, new).splitlines():
        key = line.partition(": ")[0]
        found.append(key if " " in key else line)
    return "; ".join(found) or "its record is damaged"


def _disown(path: Path, stage: Stage) -> None:
    """Remove the records of other stages whose files this one writes: they are another task's."""
    for file in (path / "stages").glob("*.json"):
        files = (read_record(file, {"files": dict}) or {}).get("files", {})
        written = {place for place in stage.leaves for name in files
                   if name == place or name.startswith(f"{place}/")}
        if written and file.stem != stage.name:
            remove(file)


def _started(path: Path, stage: Stage) -> Record:
    """Key and inputs with which an unfinished stage was begun; empty where there is none."""
    file = path / "stages" / f"{stage.name}.started"
    if not file.exists():
        return {}
    text = file.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("{"):
        return {"key": text}  # as 0.1 wrote it
    return read_record(file, {"key": str, "inputs": dict}) or {}


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
