"""The text of a run: documents, tokeniser, tokens, batches."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rabit_jax import BadInput
from rabit_jax.data import (
    TokenText,
    batch,
    documents,
    load_tokenizer,
    save_tokenizer,
    tokenise,
    train_tokenizer,
    unseen_documents,
    windows,
)
from rabit_jax.experiments.settings import RunConfig
from rabit_jax.models import find_folder
from rabit_jax.train.sharding import batch_sharding


class Text:
    """Documents and tokens of a run, each read when first asked for."""

    def __init__(self, config: RunConfig, mesh: Mesh):
        """Reads nothing yet."""
        self.config, self.mesh = config, mesh

    @cached_property
    def documents(self) -> tuple[list[str], list[str]]:
        """Training and evaluation documents."""
        return documents(self.config.data)

    @cached_property
    def tokenizer(self) -> Any:
        """The teacher's tokeniser; if it is trained here, a byte-level BPE of the training text."""
        if path := self.config.teacher.path:
            found = load_tokenizer(find_folder(path))
            if found is None:
                raise BadInput(
                    f"teacher.path {path} has no tokeniser: add its tokenizer.json to the folder"
                )
            return found
        data = self.config.data
        digest = hashlib.sha256("\0".join(self.documents[0]).encode()).hexdigest()[:16]
        place = Path(data.cache) / f"tokenizer-{data.vocab_size}-{digest}"
        if not (place / "tokenizer.json").exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=place.parent) as temporary:
                new = Path(temporary) / "new"
                save_tokenizer(train_tokenizer(self.documents[0], data.vocab_size), new)
                if place.exists():
                    shutil.rmtree(place)
                new.rename(place)
        return load_tokenizer(place)

    @cached_property
    def train(self) -> TokenText:
        """Tokens of the training documents."""
        return tokenise(self.documents[0], self.tokenizer, self.config.data.cache)

    @cached_property
    def held_out(self) -> TokenText:
        """Tokens of the evaluation documents."""
        return tokenise(self.documents[1], self.tokenizer, self.config.data.cache)

    @cached_property
    def unseen(self) -> TokenText | None:
        """Tokens of the source that training never sees, if the config names one."""
        train, held_out = self.documents
        found = unseen_documents(self.config.data, [*train, *held_out])
        return tokenise(found, self.tokenizer, self.config.data.cache) if found else None

    def windows(self, text: TokenText | None = None) -> np.ndarray:
        """Windows `[n, t]` of a text; by default of the evaluation text."""
        text = text or self.held_out
        found = windows(text.tokens, self.config.evaluate.context)
        return found[: self.config.evaluate.windows or None]

    def batches(self, section: Any, seed: int) -> Callable[[int], dict]:
        """Step -> batch on the mesh, for a section with `batch_size` and `length`."""
        where = batch_sharding(self.mesh)

        def at(step: int) -> dict:
            rows = batch(self.train.tokens, step, section.batch_size, section.length, seed)
            return jax.device_put({"tokens": rows}, where)

        return at
