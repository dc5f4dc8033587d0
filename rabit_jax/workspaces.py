"""Temporary folders that vanish with their process, also where it is killed; the user's cache.

As long as a process lives it holds a lock in each of its temporary folders; one without a holder is
removed by the next process that writes beside it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rabit_jax.errors import BadInput

LOCK = ".rabit-jax-lock"  # in every temporary folder; locked while its process lives
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a quota, a limit on files
_open: set[Path] = set()


def disk_full(error: BaseException | None) -> bool:
    """Whether the error or what caused it is a full disk, a quota or a limit on files.

    Storage libraries give the reason only as text.
    """
    while error is not None:
        text = str(error)
        if getattr(error, "errno", None) in FULL or any(os.strerror(n) in text for n in FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def naming(place: Path) -> Iterator[None]:
    """Inside, an error of the system that names no file names this one, and a full disk is an
    OSError whatever the library that reports it raises."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(place)
        raise
    except Exception as error:
        if not disk_full(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(place)) from error


@contextlib.contextmanager
def workspace(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`, on the same disk; parent folders are made.

    An error of a full disk names `target` where it would name a file in the folder, or none.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(target.parent)
    with contextlib.ExitStack() as stack:
        place, lock = _locked_folder(target)
        stack.callback(os.close, lock)
        stack.enter_context(vanishing(place))
        stack.callback(shutil.rmtree, place, ignore_errors=True)
        try:
            yield place
        except OSError as error:
            if error.errno in FULL and str(error.filename or place).startswith(str(place)):
                error.filename = str(target)
            raise


def _locked_folder(target: Path) -> tuple[Path, int]:
    """A new temporary folder and the descriptor of its lock."""
    while True:
        place = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{shortened(target.name)}."))
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


def shortened(name: str, most: int = 200) -> str:
    """The beginning of a file's name, at most so many bytes: a name may have 255."""
    return name.encode(errors="surrogateescape")[:most].decode(errors="ignore")


def user_cache() -> Path:
    """`rabit_jax` in `$XDG_CACHE_HOME`, or in `~/.cache`; it need not exist.

    Raises:
      BadInput: this user has no home folder, as in containers that run under any number.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if home.startswith("~"):
        raise BadInput("there is no home folder to keep a cache in (HOME is not set): set "
                       "XDG_CACHE_HOME to a folder that can be written")
    return Path(home) / "rabit_jax"


@functools.cache
def _remove_stale(folder: Path) -> None:
    """Remove, once in a process, the temporary folders that killed processes have left."""
    for lock in folder.glob(f".*/{LOCK}"):
        with contextlib.suppress(OSError), open(lock, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)


@contextlib.contextmanager
def vanishing(place: Path) -> Iterator[None]:
    """Inside, a signal that ends the process removes this file or folder; nothing else does."""
    _open.add(place)
    try:
        yield
    finally:
        _open.discard(place)


def remove_workspaces() -> None:
    """Remove what is `vanishing` in this process, which is about to end without unwinding."""
    for place in list(_open):
        if place.is_dir():
            shutil.rmtree(place, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                place.unlink()
