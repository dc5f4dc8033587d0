"""The one exception type for mistakes that a user can put right, and short forms of others."""

from __future__ import annotations


class BadInput(ValueError):
    """Input that cannot be used: a wrong config, file, rule or shape.

    The message is one sentence that says what was found, what was wanted and what to do. The
    command line prints it to stderr and exits with code 2, without a traceback.
    """


class ToldByFirst(BadInput):
    """The error of the first of several processes, raised in the others; it is printed there."""


def check_choice(name: str, found: object, choices: tuple[str, ...]) -> None:
    """Raise BadInput where a setting is none of its choices, at least two."""
    if found not in choices:
        raise BadInput(f"{name} is {found!r}: choose {', '.join(choices[:-1])} or {choices[-1]}")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's type where the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
