"""Files written whole or not at all, removed for certain, and told apart by their contents."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from rabit_jax.models import find_folder


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
    """Names and contents of a given teacher's files; of large ones the size and the first 64 kB."""
    found = []
    for file in sorted(find_folder(teacher).glob("*")):
        if file.is_file():
            with open(file, "rb") as content:
                head = hashlib.sha256(content.read(1 << 16)).hexdigest()
            found.append((file.name, file.stat().st_size, head))
    return found
