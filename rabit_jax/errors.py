"""The one exception type for mistakes that a user can put right, and short forms of others."""

from __future__ import annotations

from pathlib import Path

LONGEST = 1500  # characters of a message


class BadInput(ValueError):
    """Input that cannot be used: a wrong config, file, rule or shape.

    The message is one sentence that says what was found, what was wanted and what to do. The
    command line prints it to stderr and exits with code 2, without a traceback.

    Names that a damaged file gives may be of any length and hold line breaks, and libraries quote
    what they could not read: the message is one line all the same, of at most `LONGEST` characters.
    """

    def __init__(self, message: object = ""):
        line = " ".join(str(message).splitlines())
        super().__init__(line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}...")


class ToldByFirst(BadInput):
    """The error of the first of several processes, raised in the others; it is printed there."""


def check_choice(name: str, found: object, choices: tuple[str, ...]) -> None:
    """Raise BadInput where a setting is none of its choices, at least two."""
    if found not in choices:
        raise BadInput(f"{name} is {found!r}: choose {', '.join(choices[:-1])} or {choices[-1]}")


def check_regular(path: Path) -> None:
    """Raise OSError where a path leads to something that is no file, such as a pipe, on which a
    reader waits for ever, or a device, which never ends."""
    if path.exists() and not path.is_file():
        raise OSError("it is no file")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's type where the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
