"""Files and folders that exist whole or not at all: written beside their place, then renamed.

A name that exists is complete, whatever stopped the process that wrote it, a loss of power too: the
content is on the disk before the name is. What a failed attempt has left is removed on the way out,
and what a killed process has left by the next one that writes in the same folder. Permissions are
those that the umask gives a new file.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from rabit_jax.workspaces import workspace

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of renameat2


def publish(new: Path, target: Path) -> None:
    """Rename a finished file or folder to `target`, in place of what is there.

    A folder that `target` held comes back where the new one cannot take its place.
    """
    for folder, _, names in os.walk(new):
        for name in names:
            _flush(Path(folder) / name)
        _flush(Path(folder))
    _flush(new)
    if target.is_dir():
        _replace_folder(new, target)
    else:
        try:
            os.replace(new, target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            _replace_folder(new, target)  # another process has just made one
    _flush(target.parent)


def _replace_folder(new: Path, target: Path) -> None:
    if _exchanged(new, target):
        shutil.rmtree(new, ignore_errors=True)
        return
    with workspace(target) as place:
        old = place / "old"
        target.rename(old)
        try:
            new.rename(target)
        except OSError:
            old.rename(target)
            raise


def _exchanged(one: Path, other: Path) -> bool:
    """Whether two names have changed places in one step, so that neither was ever away: only Linux
    can, and not on every file system."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    return rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


def _flush(place: Path) -> None:
    """Wait until a file or folder is on the disk, on a file system that can say so."""
    if place.is_symlink():
        return
    opened = os.open(place, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(opened)


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yields a path to write a file or folder at; it becomes `target` when the block ends.

    Where the block raises, `target` stays as it was. A link is followed: what it points to is
    replaced, on the disk where that lies.

    >>> with replacing(Path("states.bin")) as new, open(new, "wb") as file:
    ...     file.write(b"...")
    """
    target = Path(os.path.realpath(target)) if target.is_symlink() else target
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
    with replacing(target) as new:
        new.touch()
        usual = new.stat().st_mode  # safetensors leaves a file that only its owner can read
        try:
            save_file(dict(tensors), new, metadata=None if metadata is None else dict(metadata))
        except SafetensorError as error:
            raise _of_system(error) from error
        _order_header(new)
        new.chmod(usual)


def _of_system(error: SafetensorError) -> Exception:
    """The OSError that an error of the library tells of, or the error itself."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else error


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


def digest(file: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def free_name(file: Path) -> Path:
    """The path itself, or with a number behind it where it is taken."""
    found, count = file, 1
    while found.exists() or found.is_symlink():
        count += 1
        found = file.with_name(f"{file.name}-{count}")
    return found


def remove(target: Path) -> None:
    """Remove a file or folder; nothing there is fine, anything that stays is an error."""
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)
