"""Files written whole or not at all, removed for certain, and told apart by their contents."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from rabit_jax.formats.folder import find_folder

ENDS = 1 << 16


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a file or folder; nothing there is fine, anything that stays is an error."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def given_files(teacher: str) -> list:
    """Names and contents of a given teacher's files but its card.

    Of a large file it is the size and the first and last 64 kB: reading all of a model would take
    minutes at every start.
    """
    found = []
    for file in sorted(find_folder(teacher).glob("*")):
        if not file.is_file() or file.name == "README.md":
            continue
        size = file.stat().st_size
        with open(file, "rb") as content:
            digest = hashlib.sha256(content.read(ENDS))
            content.seek(max(ENDS, size - ENDS))
            digest.update(content.read())
        found.append((file.name, size, digest.hexdigest()))
    return found
