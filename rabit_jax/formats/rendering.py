"""The jinja2 environment of every page and model card, and how they escape text.

It is short because escaping is decided in one place only. Templates lie in a folder `templates`
beside the code that fills them.
"""

from __future__ import annotations

import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

SHARED = Path(__file__).with_name("templates")


def environment(*folders: Path) -> Environment:
    """The templates of the folders, and the macros that all Markdown shares.

    A template `*.html.j2` escapes every value. One of `*.md.j2` passes its values through the
    filters `plain` and `code`. A name that the caller has not given raises `UndefinedError`.
    """
    made = Environment(
        loader=FileSystemLoader([*folders, SHARED]),
        undefined=StrictUndefined,
        autoescape=select_autoescape(["html.j2"]),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters.update(plain=plain, code=code)
    return made


def plain(text: object) -> str:
    """Text that Markdown shows as it is, in a table too: one line, no tags, links or code.

    >>> plain("a | <b>")
    'a \\\\| &lt;b>'
    """
    line = " ".join(str(text).split())
    return re.sub(r"[|`]|(?<=\])\(", r"\\\g<0>", line).replace("<", "&lt;")


def code(text: object) -> str:
    """Text as inline code of Markdown, fenced by more backticks than it holds in a row.

    >>> code("k=2")
    '`k=2`'
    """
    line = " ".join(str(text).split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    return f"{fence}{line}{fence}" if len(fence) == 1 else f"{fence} {line} {fence}"
