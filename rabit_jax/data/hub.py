"""Text of a dataset on the Hugging Face hub, or of a local dataset folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rabit_jax.errors import BadInput

# Readers of `datasets` by the ending of a file, that of a compression left out.
READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
PACKED = (".gz", ".zst", ".xz", ".bz2")


def hub_documents(
    hub: str,
    config: str = "",
    split: str = "train",
    file: str = "",
    column: str = "text",
    streaming: bool = True,
) -> Iterator[str]:
    """The texts of one split, row by row; no more than one row is held in memory.

    Args:
      hub: Dataset id, or a local dataset folder.
      config: Name of the dataset's configuration, such as "en" for C4.
      split: Split that is read.
      file: Path inside the dataset; where given, that file alone is read, downloaded as it is and
        kept under HF_HOME, whatever its configuration and split.
      column: Column that holds the text.
      streaming: Read a split while it downloads; otherwise it is kept under HF_HOME first.

    Raises:
      BadInput: No such dataset, no way to reach it, or no text in that column. Every failure of
        the library becomes one sentence.
    """
    name = f"file {file!r}" if file else f"split {split!r}"
    try:
        rows = _file_rows(hub, file) if file else _split_rows(hub, config, split, streaming)
        yield from _column(rows, f"{name} of dataset {hub!r}", column)
    except BadInput:
        raise
    except Exception as error:  # the library raises dozens of types, its transports more
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInput(
            f"cannot read {name} of dataset {hub!r} ({type(error).__name__}: {reason});"
            " check the name, the configuration and the network, or use data.source=embedded"
        ) from error


def _split_rows(hub: str, config: str, split: str, streaming: bool) -> Iterable[dict]:
    import datasets

    return datasets.load_dataset(hub, config or None, split=split, streaming=streaming)


def _file_rows(hub: str, file: str) -> Iterable[dict]:
    """Rows of one file. `datasets` would not find a file again offline, the hub's cache does."""
    import datasets

    return datasets.load_dataset(
        _reader(file), data_files=str(_fetched(hub, file)), split="train", streaming=True
    )


def _fetched(hub: str, file: str) -> Path:
    if Path(hub).is_dir():
        return Path(hub) / file
    import huggingface_hub

    return Path(huggingface_hub.hf_hub_download(hub, file, repo_type="dataset"))


def _reader(file: str) -> str:
    path = Path(file)
    ending = Path(path.stem).suffix if path.suffix in PACKED else path.suffix
    if ending not in READERS:
        raise BadInput(
            f"cannot tell the format of {file!r} of a dataset; wanted a name that ends in one of"
            f" {', '.join(READERS)}, packed or not ({', '.join(PACKED)})"
        )
    return READERS[ending]


def _column(rows: Iterable[dict[str, Any]], name: str, column: str) -> Iterator[str]:
    for row in rows:
        if not isinstance(row.get(column), str):
            raise BadInput(
                f"{name} has no text in column {column!r}; set data.hub_text_column (of a part of a"
                f" mix: hub_column) to one of {', '.join(map(str, row))}"
            )
        yield row[column]
