"""One writer for a folder: a lock of the operating system, with its holder's name inside.

The system gives a lock up when its process ends, however that happens, so none outlives a
`kill -9`. The file that carries it names the host, the process and the command that hold it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from rabit_jax.errors import BadInput

# What file systems without locks answer; a run there goes on without one.
_WITHOUT = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@contextlib.contextmanager
def locked(file: Path, what: str | Path) -> Iterator[int]:
    """Hold the lock of `file` inside the block; the file is removed when it ends.

    Args:
      file: where the lock lies; parent folders are made.
      what: that it protects, for the message.

    Yields:
      The descriptor of the lock. A process that inherits it holds the lock as well.

    Raises:
      BadInput: another process holds it; the message says which, on what host.
      OSError: the file cannot be written.
    """
    descriptor = _acquired(file, what)
    try:
        os.ftruncate(descriptor, 0)
        holder = f"{socket.gethostname()} {os.getpid()} {shlex.join(sys.argv)}\n"
        os.pwrite(descriptor, holder.encode(errors="replace"), 0)
        yield descriptor
    finally:
        # Before the lock is given up: whoever waits for this file sees that it has gone.
        file.unlink(missing_ok=True)
        os.close(descriptor)


def _acquired(file: Path, what: str | Path) -> int:
    file.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _WITHOUT:
                return descriptor
            holder = os.pread(descriptor, 4096, 0).decode(errors="replace")
            os.close(descriptor)
            raise BadInput(_held(file, what, holder)) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor
        os.close(descriptor)  # Its last holder removed it in between.


def _held(file: Path, what: str | Path, holder: str) -> str:
    host, _, rest = holder.strip().partition(" ")
    pid, _, command = rest.partition(" ")
    who = f"process {pid} on {host} ({command[:200]})" if pid else "another process"
    return (
        f"{what} is being written by {who}, or by a process that it started: wait until that has "
        f"ended, or stop it; `fuser {file}` there prints who holds it"
    )
