"""Records of stages: JSON with a checksum, and the digests of the files that a stage left.

A record that is damaged is set aside with one line and its stage is done again; a file that is
damaged is named and never used.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

from rabit_jax import BadInput, __version__
from rabit_jax.atomic import digest, free_name, write_text
from rabit_jax.json_text import parse, seal, unseal
from rabit_jax.progress import say
from rabit_jax.types import Json

Record: TypeAlias = Json


def write_record(file: Path, record: Record) -> None:
    """Write a record together with its checksum."""
    write_text(file, seal(record, indent=1))


def read_record(file: Path, wanted: Mapping[str, type] | None = None) -> Record | None:
    """What `write_record` wrote; None where there is none.

    A file that is damaged is renamed to `<name>.damaged`, with one line on stderr. Records of
    earlier versions have no checksum.

    Args:
      file: the record.
      wanted: types of the fields that it must have.
    """
    if not file.is_file():
        return None
    try:
        content = unseal(file.read_text(encoding="utf-8"))
        if all(isinstance(content.get(name), kind) for name, kind in (wanted or {}).items()):
            return content
    except ValueError:
        pass
    aside = free_name(file.with_name(f"{file.name}.damaged"))
    file.rename(aside)
    say(f"{file} is damaged: set aside as {aside.name}, and what it records is done again")
    return None


def refuse_later(run_folder: Path) -> None:
    """Raises BadInput for the folder of a run on which a later version of this package has worked:
    what that wrote may mean something else here, and would be done again in its place."""
    for file in filter(Path.is_file, sorted((run_folder / "stages").glob("*"))):
        try:
            wrote = parse(file.read_text(encoding="utf-8"))["versions"]["rabit_jax"]
            later = _numbers(wrote) > _numbers(__version__)
        except (OSError, ValueError, LookupError, TypeError):
            continue  # no record, a damaged one, or one of 0.1
        if later:
            raise BadInput(
                f"{run_folder} was written by version {wrote} of rabit_jax and this is "
                f"{__version__}, which may read it wrongly: install that version, or set name or "
                "output to another place")


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)[:3]]


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The digest of each file, by its path relative to `folder`."""
    return {name: digest(folder / name) for name in names}


def check_files(run_folder: Path, stage: str, place: str) -> None:
    """Verify what a stage of a run left at `place`, a file or folder in the run's folder.

    Raises:
      BadInput: a file is missing or differs from the digest in the stage's record. Nothing is
        raised where there is no record, or one of an earlier version, which holds no digests.
    """
    record = read_record(run_folder / "stages" / f"{stage}.json") or {}
    for name, wanted in (record.get("digests") or {}).items():
        if name != place and not name.startswith(f"{place}/"):
            continue
        file = run_folder / name
        if not file.is_file() or digest(file) != wanted:
            raise BadInput(
                f"{file} is damaged: its checksum is not the one in stages/{stage}.json; "
                f"--force {stage} in that run makes it again"
            )
