"""stdin, stdout and stderr of a command: closed ones are opened, lost ones end no work.

Only the standard library is imported here: a command calls it before its imports, which take
seconds.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import select
import sys

UNREAD = 141  # exit code: whoever read stdout has ended, as a shell names the signal of that pipe
ANY = "backslashreplace"  # characters that an encoding lacks are written as \xe9, as on stderr


def prepare() -> None:
    """Make the three fit to be written to until the process ends; the first line of a command.

    One that is closed is opened on /dev/null. Otherwise the next file that is opened would get its
    number, and what libraries and signals write to number 2 would go into that file.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", errors=ANY, closefd=False))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=ANY)
    atexit.register(settle)


def settle() -> None:
    """Write out what is buffered; what a stream does not take any more is dropped.

    Python itself writes it out at the very end and exits with 120 where that fails.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)


def unread(error: BaseException) -> bool:
    """Whether an error is that of writing to stdout when its reader, such as `head`, has ended."""
    if not isinstance(error, BrokenPipeError):
        return False
    try:
        pipe = select.poll()
        pipe.register(sys.stdout.fileno(), 0)
        return bool(pipe.poll(0))  # that its other end is closed is always told
    except (OSError, ValueError, AttributeError):
        return False  # it is no file


def tell(text: str) -> None:
    """Write to stderr at once, from any thread or handler; where nobody reads it, no matter."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode(errors=ANY))
