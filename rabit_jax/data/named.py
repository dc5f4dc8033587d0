"""The datasets that published figures name: where they lie, and what one document is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from rabit_jax.data.hub import hub_documents
from rabit_jax.errors import BadInput


@dataclass(frozen=True)
class Named:
    """A dataset of the hub.

    Attributes:
      hub: Its id.
      config: Its configuration.
      files: The one file that stands for a split; a split without one is read whole.
      splits: Splits that it has.
      joined: The rows of a split are lines of one running text: joined by a blank line to a single
        document, as published perplexities are taken. Otherwise each row is a document.
    """

    hub: str
    config: str = ""
    files: dict[str, str] = field(default_factory=dict)
    splits: tuple[str, ...] = ("train", "validation")
    joined: bool = False

NAMED = {
    "wikitext2": Named(
        hub="Salesforce/wikitext",
        config="wikitext-2-raw-v1",
        splits=("train", "validation", "test"),
        joined=True,
    ),
    "c4": Named(  # one shard of each split: 356,317 and 45,576 web pages
        hub="allenai/c4",
        files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
    ),
}


def named_text(name: str, split: str) -> Iterator[str]:
    """The documents of a split of a named dataset.

    It is downloaded once and kept under HF_HOME; nothing but one document is held in memory.

    Args:
      name: A key of `NAMED`.
      split: One of its splits.

    Raises:
      BadInput: An unknown name or split, at once; a dataset that is neither stored nor within
        reach, when the first document is asked for.

    Example:
      >>> text = "".join(named_text("wikitext2", "test"))  # doctest: +SKIP
    """
    check_name(name, split)
    return _documents(name, split)


def check_name(name: str, split: str) -> None:
    """Raises BadInput for a dataset or a split that `NAMED` does not have."""
    if name not in NAMED:
        raise BadInput(f"no dataset is named {name!r}; choose one of {', '.join(NAMED)}")
    if split not in NAMED[name].splits:
        raise BadInput(
            f"dataset {name!r} has no split {split!r}; choose one of"
            f" {', '.join(NAMED[name].splits)}"
        )


def _documents(name: str, split: str) -> Iterator[str]:
    found = NAMED[name]
    try:
        rows = hub_documents(
            found.hub, found.config, split, found.files.get(split, ""), streaming=False
        )
        if found.joined:
            yield "\n\n".join(rows)
        else:
            yield from rows
    except BadInput as error:
        raise BadInput(
            f"{name!r} is not on this machine: {error.__cause__ or error}; run once with a network"
            " (it is kept under HF_HOME), copy HF_HOME from a machine that has it, or use"
            " data.source=files"
        ) from error
