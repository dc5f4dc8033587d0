"""Where text comes from, and which documents are held out for evaluation."""

import difflib
import glob
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rabit_jax.data.embedded import embedded_documents
from rabit_jax.errors import BadInput

SOURCES = ("embedded", "files", "hub")
PIECE = 32 * 1024  # characters in one document of a file that is cut up


@dataclass(frozen=True)
class DataConfig:
    """What to train and evaluate on, and how it becomes tokens.

    Attributes:
      source: "embedded" (text every Python carries), "files" or "hub".
      files: Paths or globs of UTF-8 training text, for source "files".
      eval_files: Paths or globs of evaluation text; where given, all evaluation text is theirs.
      unseen_files: Paths or globs of text from a source that training never sees, scored apart.
      hub: Dataset id, or a local dataset folder, for source "hub".
      hub_config: Name of the dataset's configuration, such as "en" for C4.
      hub_split: Split that is read for training.
      hub_eval_split: Split that is read for evaluation; "" holds documents of `hub_split` out.
      hub_text_column: Column that holds the text.
      streaming: Read a hub dataset as it downloads instead of storing it first.
      max_documents: Most documents read from each place; 0 reads all, and all are held in memory.
      eval_fraction: Expected share of documents held out where evaluation has no place of its own.
      vocab_size: Size of the tokeniser where one is trained.
      seed: Chooses the documents held out.
      cache: Folder of the token cache.
    """

    source: str = "embedded"
    files: tuple[str, ...] = ()
    eval_files: tuple[str, ...] = ()
    unseen_files: tuple[str, ...] = ()
    hub: str = ""
    hub_config: str = ""
    hub_split: str = "train"
    hub_eval_split: str = ""
    hub_text_column: str = "text"
    streaming: bool = True
    max_documents: int = 0
    eval_fraction: float = 0.05
    vocab_size: int = 2048
    seed: int = 0
    cache: str = ".cache/tokens"


def documents(config: DataConfig) -> tuple[list[str], list[str]]:
    """Training and evaluation documents; none is in both, and none is in either twice.

    Without a place of its own for evaluation, a document is held out where

        sha256(seed, text) / 2^256 < eval_fraction,

    so adding a document moves no other (where that holds none out, the one with the least hash is).

    Args:
      config: The source and the split.

    Returns:
      `(train, evaluation)`, each in the order of the source.

    Raises:
      BadInput: Unknown source, a pattern without files, text that is not UTF-8, a dataset that
        cannot be read, or nothing left on one side.
    """
    _check(config)
    train = _unique(_training(config))
    held = _evaluation(config)
    if held is None:
        return _split(train, config)
    held = _unique(held)
    train = _without(train, held)
    if not train or not held:
        raise BadInput(
            f"found {len(train)} training and {len(held)} evaluation documents once evaluation"
            " text is taken out of training, wanted at least 1 of each; give more text"
        )
    return train, held


def unseen_documents(config: DataConfig, seen: Iterable[str]) -> list[str]:
    """The documents of `unseen_files`; none where the config names no such files.

    Raises:
      BadInput: A pattern without files, text that is not UTF-8, or a document that is in `seen`.
    """
    found = _unique(_first(_file_documents(config.unseen_files), config.max_documents))
    if both := set(found) & set(seen):
        raise BadInput(
            f"{len(both)} of {len(found)} documents of data.unseen_files are in the training or"
            " evaluation text too; name files of another source"
        )
    return found


def _check(config: DataConfig) -> None:
    if config.source not in SOURCES:
        raise BadInput(f"data.source is {config.source!r}; choose one of {', '.join(SOURCES)}")
    if not 0 < config.eval_fraction < 1:
        raise BadInput(f"data.eval_fraction is {config.eval_fraction}; it must lie between 0 and 1")
    if config.max_documents < 0:
        raise BadInput(f"data.max_documents is {config.max_documents}; use 0 for all, or more")
    if config.source == "files" and not config.files:
        raise BadInput("data.source is 'files' but data.files is empty; list paths or globs there")
    if config.source == "hub" and not config.hub:
        raise BadInput("data.source is 'hub' but data.hub is empty; give a dataset id there")


def _training(config: DataConfig) -> list[str]:
    if config.source == "files":
        return _first(_file_documents(config.files), config.max_documents)
    if config.source == "hub":
        return _hub_documents(config, config.hub_split)
    return _first(embedded_documents(), config.max_documents)


def _evaluation(config: DataConfig) -> list[str] | None:
    if config.eval_files:
        return _first(_file_documents(config.eval_files), config.max_documents)
    if config.source == "hub" and config.hub_eval_split:
        return _hub_documents(config, config.hub_eval_split)
    return None


def _split(texts: list[str], config: DataConfig) -> tuple[list[str], list[str]]:
    if len(texts) < 2:
        raise BadInput(
            f"found {len(texts)} different documents, wanted at least 2 to hold one out for"
            " evaluation; give more text, or evaluation text of its own in data.eval_files"
        )
    ranks = {text: _rank(text, config.seed) for text in texts}
    held = [text for text in texts if ranks[text] < config.eval_fraction]
    held = held or [min(texts, key=ranks.__getitem__)]
    if len(held) == len(texts):
        raise BadInput(
            f"data.eval_fraction {config.eval_fraction} holds out all {len(texts)} documents;"
            " lower it or give more text"
        )
    return _without(texts, held), held


def _rank(text: str, seed: int) -> float:
    """A number in [0, 1) that depends on the text and the seed alone."""
    digest = hashlib.sha256(f"{seed}\n{text}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _unique(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(text for text in texts if text.strip()))


def _without(texts: list[str], held: list[str]) -> list[str]:
    chosen = set(held)
    return [text for text in texts if text not in chosen]


def _first(texts: Iterable[str], most: int) -> list[str]:
    return list(itertools.islice(texts, most or None))


def _file_documents(patterns: tuple[str, ...]) -> Iterator[str]:
    """A small file is one document, a big one is cut at blank lines or ends of lines."""
    paths = dict.fromkeys(path for pattern in patterns for path in _matches(pattern))
    for path in paths:
        yield from _pieces(_read(path))


def _matches(pattern: str) -> list[Path]:
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


def _pieces(text: str, size: int = PIECE) -> Iterator[str]:
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


def _hub_documents(config: DataConfig, split: str) -> list[str]:
    """Texts of one split; every failure of the library becomes one sentence."""
    try:
        import datasets

        rows = datasets.load_dataset(
            config.hub, config.hub_config or None, split=split, streaming=config.streaming
        )
        return _first(_column(rows, config, split), config.max_documents)
    except BadInput:
        raise
    except Exception as error:  # the library raises dozens of types, its transports more
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInput(
            f"cannot read split {split!r} of dataset {config.hub!r}"
            f" ({type(error).__name__}: {reason}); check the name, the configuration and the"
            " network, or use data.source=embedded"
        ) from error


def _column(rows: Iterable[dict], config: DataConfig, split: str) -> Iterator[str]:
    column = config.hub_text_column
    for row in rows:
        if not isinstance(row.get(column), str):
            raise BadInput(
                f"split {split!r} of dataset {config.hub!r} has no text in column {column!r}; set"
                f" data.hub_text_column to one of {', '.join(map(str, row))}"
            )
        yield row[column]
