"""English text that every Python carries: the standard library's reference text and docstrings.

One document per reference topic (`pydoc_data`) and one per source file (all its docstrings in
order), cleaned to prose and without repeated paragraphs. Sources are parsed, never imported. No
network is needed; the exact text depends on the version of Python.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

SKIPPED = {"site-packages", "dist-packages", "__pycache__", "lib-dynload", "test", "tests"}
SKIPPED |= {"idlelib", "pydoc_data"}
SHORTEST = 200  # characters: a shorter document is one or two stray sentences
SHINGLE = 8  # words
COMMON = frozenset(
    "a an and are as at be by can for from has have if in is it its may no not of on only or other "
    "return returns set should that the then there they this to use used when which will with you"
    .split()
)
BLANK = re.compile(r"\n\s*\n")
WORD = re.compile(r"[a-z0-9]+")
BULLET = re.compile(r"([*+-]|\d+[.)]|\(?[a-z0-9]\))\s")


def embedded_documents() -> list[str]:
    """The cleaned documents, in a fixed order; about 1.6 MB of English in all.

    A paragraph is left out where more than half of its runs of eight words have been seen before,
    in any document, so a split by document shares no paragraph between its two sides.

    Returns:
      One string per document, paragraphs separated by a blank line, each at least 200 characters.
      Empty where this Python ships neither reference text nor sources.

    Example:
      >>> sum(map(len, embedded_documents())) > 1_000_000
      True
    """
    return list(_corpus())


@functools.cache
def _corpus() -> tuple[str, ...]:
    root = Path(sysconfig.get_path("stdlib"))
    texts = [*_topics(), *(_docstrings(path) for path in _sources(root))]
    return tuple(_unrepeated(map(_paragraphs, texts)))


def _topics() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return []
    return [topics[name] for name in sorted(topics)]


def _sources(root: Path) -> list[Path]:
    names = {path: path.relative_to(root).parts for path in root.rglob("*.py")}
    kept = (path for path in names if SKIPPED.isdisjoint(names[path]))
    return sorted(kept, key=names.__getitem__)


def _docstrings(path: Path) -> str:
    """All docstrings of a source file in source order; empty where it does not parse."""
    try:
        with warnings.catch_warnings():  # old escapes in the sources warn when parsed
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return ""
    return "\n\n".join(_walk(tree))


def _walk(node: ast.AST) -> Iterator[str]:
    """Docstrings under `node`; only statements that hold statements are entered."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        if text := ast.get_docstring(node):
            yield text
    for field in ("body", "handlers", "orelse", "finalbody"):
        inner = getattr(node, field, ())
        for child in inner if isinstance(inner, list) else ():
            if not isinstance(child, ast.Expr):
                yield from _walk(child)


def _paragraphs(text: str) -> list[str]:
    text = text.encode("utf-8", "ignore").decode()  # a literal may hold lone surrogates
    cleaned = (_paragraph(part) for part in BLANK.split(inspect.cleandoc(text)))
    return [part for part in cleaned if _is_english(part)]


def _paragraph(text: str) -> str:
    """One paragraph without doctests and rules, wrapped lines joined, runs of space made one."""
    lines: list[str] = []
    wrapped = False
    for raw in text.splitlines():
        line = " ".join(raw.split())
        if line.startswith(">>>"):
            break  # what follows, up to the next blank line, is code and its output
        if not any(map(str.isalnum, line)):
            continue
        if wrapped and not BULLET.match(line):
            lines[-1] += " " + line
        else:
            lines.append(line)
        wrapped = len(raw) >= 55
    return "\n".join(lines)


def _is_english(text: str) -> bool:
    """Mostly ASCII letters, and for a sentence at least one common word in ten."""
    letters = sum(c.isascii() and (c.isalpha() or c in " \n") for c in text)
    if letters < 0.8 * len(text) or "::=" in text:
        return False
    words = WORD.findall(text.lower())
    if len(words) < 4:
        return len(words) > 1 and text[0].isupper()
    return 10 * sum(word in COMMON for word in words) >= len(words)


def _unrepeated(documents: Iterable[list[str]]) -> Iterator[str]:
    """Documents without paragraphs seen before, in any of them, and without the very short."""
    seen: set[tuple[str, ...]] = set()
    for paragraphs in documents:
        text = "\n\n".join(part for part in paragraphs if _is_new(part, seen))
        if len(text) >= SHORTEST:
            yield text


def _is_new(paragraph: str, seen: set[tuple[str, ...]]) -> bool:
    words = WORD.findall(paragraph.lower())
    starts = range(max(1, len(words) - SHINGLE + 1))
    runs = {tuple(words[start : start + SHINGLE]) for start in starts}
    repeated = len(runs & seen)
    seen |= runs
    return 2 * repeated <= len(runs) and repeated < len(runs)
