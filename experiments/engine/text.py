"""The text of a run: documents, tokeniser, tokens, batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from rabit_jax import BadInput, hosts
from rabit_jax.atomic import digest, replacing
from rabit_jax.data.conversations import rendering
from rabit_jax.data.hub_stream import hub_stream
from rabit_jax.data.mix import has_conversations
from rabit_jax.data.sources import documents, mixed, unseen_documents
from rabit_jax.data.tokenizer import train_tokenizer
from rabit_jax.data.tokens import (
    TokenText,
    batch,
    tokenise,
    tokenise_stream,
    windows,
    writing_to,
)
from rabit_jax.experiments.engine.records import digests, read_record, write_record
from rabit_jax.experiments.engine.settings import RunConfig
from rabit_jax.formats.checkpoint import folder_config
from rabit_jax.formats.folder import find_folder
from rabit_jax.formats.tokenizer import (
    check_ids,
    load_tokenizer,
    read_tokenizer,
    save_tokenizer,
    tokens_beyond,
)
from rabit_jax.progress import say
from rabit_jax.train.sharding import batch_sharding
from rabit_jax.types import Array

STREAMS = {"mix": mixed, "hub": hub_stream}  # sources whose documents are never held in memory
SUMS = "checksums.json"  # of the files of a tokeniser that was trained here


class Section(Protocol):
    """A section of the config that says how batches are cut."""

    @property
    def batch_size(self) -> int:
        """Sequences of a batch."""
        ...

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        ...


class Text:
    """Documents and tokens of a run, each read when first asked for."""

    def __init__(self, config: RunConfig, mesh: Mesh | None):
        """Reads nothing yet; without a mesh it has rows, but no batches."""
        self.config, self.mesh = config, mesh

    @cached_property
    def documents(self) -> tuple[list[str], list[str]]:
        """Training and evaluation documents; a mix and a dataset have none in memory."""
        return documents(self.config.data)

    @cached_property
    def tokenizer(self) -> Any:
        """The teacher's tokeniser; if it is trained here, a byte-level BPE of the training text."""
        if path := self.config.teacher.path:
            folder = find_folder(path)
            found = read_tokenizer(folder, folder_config(folder))
            if found is None:
                raise BadInput(
                    f"teacher.path {path} has no tokeniser: add its tokenizer.json to the folder"
                )
            return found
        data = self.config.data
        if data.source in STREAMS:
            parts, recipe = STREAMS[data.source](data, "train")
            texts, key = (t for part, _ in parts() for t in part), json.dumps(recipe)
        else:
            texts = self.documents[0]
            key = "\0".join(texts)
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]
        place = Path(data.cache) / f"tokenizer-{data.vocab_size}-{digest}"
        if not _sound(place):
            with writing_to(data.cache), replacing(place) as new:
                save_tokenizer(train_tokenizer(texts, data.vocab_size), new)
                files = [file.name for file in new.iterdir()]
                write_record(new / SUMS, digests(new, sorted(files)))
        return load_tokenizer(place)

    @cached_property
    def train(self) -> TokenText:
        """Tokens of the training text."""
        return self._tokens("train", lambda: self.documents[0])

    @cached_property
    def held_out(self) -> TokenText:
        """Tokens of the evaluation text."""
        return self._tokens("eval", lambda: self.documents[1])

    @cached_property
    def unseen(self) -> TokenText | None:
        """Tokens of the text of another source, if the config names one."""
        data = self.config.data
        if not (data.mix_unseen or data.unseen_files):
            return None
        # The stream of a dataset refuses such documents where it comes upon them.
        seen = [] if data.source in STREAMS else sum(self.documents, [])
        return self._tokens("unseen", lambda: unseen_documents(data, seen))

    def _tokens(
        self, side: Literal["train", "eval", "unseen"], texts: Callable[[], list[str]]
    ) -> TokenText:
        data = self.config.data
        what = {"train": "training text", "eval": "evaluation text", "unseen": "unseen text"}[side]
        if data.source == "mix":
            tokenizer = self.tokenizer
            render, template = None, ""
            if has_conversations((*data.mix, *data.mix_eval, *data.mix_unseen)):
                render, template = rendering(tokenizer), str(tokenizer.chat_template)
            found = tokenise_stream(
                *mixed(data, side, render, template), tokenizer, data.cache, what)
        elif data.source == "hub" and side != "unseen":
            found = tokenise_stream(
                *hub_stream(data, side), self.tokenizer, data.cache, what)
        else:
            found = tokenise(texts(), self.tokenizer, data.cache, what)
        self._check_ids(found)
        # what stages depend on: the same text with begin tokens is another input
        return replace(found, digest=f"{found.digest}-begin") if data.begin else found

    def _check_ids(self, text: TokenText) -> None:
        """Raises BadInput for a token that the teacher's table has no row for."""
        if path := self.config.teacher.path:
            size = folder_config(find_folder(path)).vocab_size
            if tokens_beyond(self.tokenizer, size):  # else no text can hold one
                check_ids(text.tokens, self.tokenizer, size)

    def _begun(self, rows: np.ndarray) -> np.ndarray:
        """Windows `[n, t]` with the begin token first, where the config asks for it."""
        if not self.config.data.begin:
            return rows
        begin = self.tokenizer.bos_token_id
        if begin is None:
            raise BadInput("data.begin is true but the tokeniser has no begin token; leave it out")
        rows = rows.copy()
        rows[:, 0] = begin
        return rows

    def windows(self, text: TokenText | None = None) -> np.ndarray:
        """Windows `[n, t]` of a text; by default those of the evaluation text that the config's
        `evaluate.part` names.

        Raises:
          BadInput: a text without a window, or one window to be divided into parts.
        """
        settings = self.config.evaluate
        what = "the evaluation text" if text is None or text is self.held_out else \
            "the unseen text (data.unseen_files or data.mix_unseen)"
        found = windows((text or self.held_out).tokens, settings.context, what)
        if (text is None or text is self.held_out) and settings.part != "all":
            begin = len(found) - -(-len(found) // 4)
            if begin == 0:
                raise BadInput(
                    f"the evaluation text has one window of {settings.context} tokens, and a "
                    "search needs windows of its own beside those of the tables; give more "
                    "evaluation text or a shorter evaluate.context"
                )
            found = found[begin:] if settings.part == "search" else found[:begin]
        return self._begun(found[: settings.windows or None])

    def batches(self, section: Section, seed: int) -> Callable[[int], dict[str, Array]]:
        """Step -> batch on the mesh, for a section with `batch_size` and `length`."""
        where = batch_sharding(self.mesh) if self.mesh else None

        def at(step: int) -> dict[str, Array]:
            if where is None or not hosts.several():
                return jax.device_put({"tokens": self.rows(section, step, seed)}, where)
            # Each process reads the rows of its own devices.
            return {"tokens": jax.make_array_from_callback(
                (section.batch_size, section.length), where,
                lambda index: self.rows(section, step, seed, (index or (slice(None),))[0]))}

        return at

    def rows(
        self, section: Section, step: int, seed: int, part: slice = slice(None)
    ) -> np.ndarray:
        """The batch `[b, t]` of one step, or some rows of it, on the host."""
        return self._begun(
            batch(self.train.tokens, step, section.batch_size, section.length, seed, part)
        )


def _sound(place: Path) -> bool:
    """Whether a tokeniser in the cache is there and has the bytes that were written.

    One of version 0.1 has no checksums and is taken as it is.
    """
    if not (place / "tokenizer.json").exists():
        return False
    if not (place / SUMS).exists():
        return True
    sums = read_record(place / SUMS) or {}
    if sums and all((place / n).is_file() and digest(place / n) == s for n, s in sums.items()):
        return True
    say(f"the tokeniser {place} is damaged; training it again")
    return False
