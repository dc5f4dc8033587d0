"""Text of local files."""

from __future__ import annotations

import difflib
import glob
from collections.abc import Iterator
from pathlib import Path

from rabit_jax.errors import BadInput

PIECE = 32 * 1024  # characters in one document of a file that is cut up


def file_documents(patterns: tuple[str, ...]) -> Iterator[str]:
    """A small file is one document, a big one is cut at blank lines or ends of lines."""
    paths = dict.fromkeys(path for pattern in patterns for path in matches(pattern))
    for path in paths:
        yield from pieces(_read(path))


def matches(pattern: str) -> list[Path]:
    """The files that a path or a glob names, in order; BadInput names the nearest if none."""
    whole = Path(pattern).expanduser()
    if whole.is_file():
        return [whole]
    found = sorted(map(Path, glob.glob(str(whole), recursive=True)))
    if paths := [path for path in found if path.is_file()]:
        return paths
    raise BadInput(f"no file matches {pattern!r}{_nearest(whole)}; correct the path or glob")


def _nearest(path: Path) -> str:
    folder = path if path.is_dir() else path.parent
    if not folder.is_dir():
        return ""
    files = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    near = difflib.get_close_matches(path.name, files, n=1, cutoff=0.0)
    return f" (the nearest file there is {str(folder / near[0])!r})" if near else ""


def _read(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise BadInput(f"cannot read {str(path)!r}: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{str(path)!r} is not UTF-8 text at byte {error.start}"
            f" (0x{error.object[error.start]:02x}); convert it to UTF-8"
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def pieces(text: str, size: int = PIECE) -> Iterator[str]:
    """`text` in order and complete, in pieces of at most `size` characters.

    A piece ends at the last blank line in its second half; where there is none, at the last end
    of a line there, at the last space, or else right at `size`.
    """
    start = 0
    while len(text) - start > size:
        end = start + size
        for mark in ("\n\n", "\n", " "):
            found = text.rfind(mark, start + size // 2, end)
            if found >= 0:
                end = found + len(mark)
                break
        yield text[start:end]
        start = end
    yield text[start:]
