"""The one exception type for mistakes that a user can put right, and short forms of others."""

from __future__ import annotations


class BadInput(ValueError):
    """Input that cannot be used: a wrong config, file, rule or shape.

    The message is one sentence that says what was found, what was wanted and what to do. The
    command line prints it to stderr and exits with code 2, without a traceback.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's type where the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
