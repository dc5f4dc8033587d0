"""Files and folders that exist whole or not at all: written beside their place, then renamed.

A name that exists is complete, whatever stopped the process that wrote it. What a failed attempt
has left is removed on the way out, and what a killed process has left by the next one that writes
in the same folder: as long as a process lives it holds a lock in its temporary folders.
Permissions are those that the umask gives a new file.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

LOCK = ".rabit-jax-lock"  # in every temporary folder; locked while its process lives
_open: set[Path] = set()


@contextlib.contextmanager
def workspace(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`, on the same disk; parent folders are made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(target.parent)
    with contextlib.ExitStack() as stack:
        place, lock = _locked_folder(target)
        stack.callback(os.close, lock)
        _open.add(place)
        stack.callback(_open.discard, place)
        stack.callback(shutil.rmtree, place, ignore_errors=True)
        yield place


def _locked_folder(target: Path) -> tuple[Path, int]:
    """A new temporary folder and the descriptor of its lock."""
    while True:
        place = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name[:200]}."))
        try:
            lock = os.open(place / LOCK, os.O_RDWR | os.O_CREAT)
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
        except FileNotFoundError:
            continue
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
        if (place / LOCK).exists():
            return place, lock
        os.close(lock)  # Another process took it for stale before it was locked.


@functools.cache
def _remove_stale(folder: Path) -> None:
    """Remove, once in a process, the temporary folders that killed processes have left."""
    for lock in folder.glob(f".*/{LOCK}"):
        with contextlib.suppress(OSError), open(lock, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)


def remove_workspaces() -> None:
    """Remove the temporary folders of this process, which is about to end without unwinding."""
    for place in list(_open):
        shutil.rmtree(place, ignore_errors=True)


def publish(new: Path, target: Path) -> None:
    """Rename a finished file or folder to `target`, in place of what is there.

    A folder that `target` held comes back where the new one cannot take its place.
    """
    if not target.is_dir():
        os.replace(new, target)
        return
    with workspace(target) as place:
        old = place / "old"
        target.rename(old)
        try:
            new.rename(target)
        except OSError:
            old.rename(target)
            raise


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yields a path to write a file or folder at; it becomes `target` when the block ends.

    Where the block raises, `target` stays as it was.

    >>> with replacing(Path("states.bin")) as new, open(new, "wb") as file:
    ...     file.write(b"...")
    """
    with workspace(target) as place:
        new = place / "new"
        yield new
        publish(new, target)


def write_text(target: Path, text: str) -> None:
    """Write a text file in UTF-8; parent folders are made."""
    with replacing(target) as new:
        new.write_text(text, encoding="utf-8")


def write_tensors(
    target: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file; the same content gives the same bytes.

    Raises:
      OSError, SafetensorError: the file cannot be written.
    """
    from safetensors.numpy import save_file  # takes NumPy with it, which not every command needs

    with replacing(target) as new:
        new.touch()
        usual = new.stat().st_mode  # safetensors leaves a file that only its owner can read
        save_file(dict(tensors), new, metadata=None if metadata is None else dict(metadata))
        _order_header(new)
        new.chmod(usual)


def _order_header(file: Path) -> None:
    """Put the keys of a safetensors header in order; the library has them in a random one."""
    with open(file, "r+b") as content:
        length = int.from_bytes(content.read(8), "little")
        header = json.loads(content.read(length))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(dict(sorted(header.items())), separators=(",", ":"), ensure_ascii=False)
        ordered = text.encode()
        if len(ordered) <= length:  # else the library escapes a character that Python does not
            content.seek(8)
            content.write(ordered.ljust(length))


def remove(target: Path) -> None:
    """Remove a file or folder; nothing there is fine, anything that stays is an error."""
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)
