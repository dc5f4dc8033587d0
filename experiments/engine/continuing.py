"""Text from a model as it comes: tokens in chunks, whole characters, tokens per second."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np

from rabit_jax.errors import BadInput
from rabit_jax.formats.packed_model import load_model
from rabit_jax.models.decoder import Decoder
from rabit_jax.models.generation import stream
from rabit_jax.models.prepared import Engine
from rabit_jax.progress import loading
from rabit_jax.types import Params, Tokenizer


def load_for_text(path: str, paths: int | None) -> tuple[Decoder, Params, Tokenizer]:
    """The model of a folder or hub id, with a bar while it is read, and its tokenizer.

    Raises:
      BadInput: no such model, or one without a tokenizer.
    """
    with loading(path) as done:
        model, params, tokenizer = load_model(path, done, paths)
    if tokenizer is None:
        raise BadInput(f"{path} holds no tokenizer, so text cannot be read or written: put "
                       "the model's tokenizer.json and tokenizer_config.json there")
    return model, params, tokenizer


@dataclass
class Speed:
    """Tokens and seconds of one or more answers, of the prompt and of new text.

    The first new token of an answer comes out of the reading and is not counted again.
    """

    read: int = 0
    read_seconds: float = 0.0
    written: int = 0
    written_seconds: float = 0.0

    def __str__(self) -> str:
        prefill = _rate("prefill", self.read, self.read_seconds)
        decode = _rate("decode", self.written, self.written_seconds)
        return f"{prefill}; {decode} (compilation not included)"


def _rate(label: str, tokens: int, seconds: float) -> str:
    if not tokens:
        return f"{label}: 0 tokens"
    return f"{label}: {tokens} tokens in {seconds:.2f} s, {tokens / seconds:,.1f} tokens/s"


@dataclass
class Writer:
    """A model with its way of choosing tokens; it measures its speed.

    Attributes:
      model, engine: the decoder and what `prepare` made of its params.
      max_new_tokens, temperature, top_p, key: as for `rabit_jax.models.stream`.
      speed: of all that was written so far.
    """

    model: Decoder
    engine: Engine
    max_new_tokens: int
    temperature: float
    top_p: float
    key: jax.Array
    speed: Speed = field(default_factory=Speed)

    def write(self, ids: Sequence[Sequence[int]], multiple: int = 1) -> Iterator[list[list[int]]]:
        """New tokens behind each prompt, in chunks: the first, then several at once.

        A row's end token is its last; after it the row gives empty lists. The prompts are padded to
        a multiple of `multiple` tokens, so that few lengths are compiled.

        Raises:
          BadInput: as `stream`.
        """
        tokens, mask = pad_left(ids, multiple)
        eos, speed = self.model.config.eos_ids, self.speed
        chunks = stream(self.model, self.engine, jnp.asarray(tokens), jnp.asarray(mask),
                        self.max_new_tokens, self.temperature, self.top_p, self.key, eos)
        ended = [False] * len(ids)
        for n in itertools.count():
            with Stopwatch() as watch:
                chunk = next(chunks, None)
            if chunk is None:
                return
            rows = [[] if end else until_end(row, eos)
                    for row, end in zip(chunk.tolist(), ended, strict=True)]
            ended = [end or row[-1] in eos for row, end in zip(rows, ended, strict=True)]
            if n == 0:
                speed.read += sum(map(len, ids))
                speed.read_seconds += watch.seconds
            else:
                speed.written += sum(map(len, rows))
                speed.written_seconds += watch.seconds
            yield rows


class Text:
    """The text of new tokens, in whole characters: a character may be spread over tokens.

    Args:
      tokenizer: of transformers.
      old: ids of the prompt; new text is decoded behind it, for some tokenizers drop a first space.
      eos_ids: end tokens, which give no text.
    """

    def __init__(self, tokenizer: Tokenizer, old: Sequence[int], eos_ids: Sequence[int]) -> None:
        self.tokenizer, self.eos_ids, self.ids = tokenizer, eos_ids, list(old)
        self.start = self.shown = len(self._decode())

    def add(self, new: Sequence[int]) -> str:
        """What can be shown now that was not shown before."""
        self.ids += [token for token in new if token not in self.eos_ids]
        # An unfinished character is decoded as one or more replacement characters.
        return self._show(self._decode().rstrip("\ufffd"))

    def rest(self) -> str:
        """What was held back, once no more tokens come."""
        return self._show(self._decode())

    def whole(self) -> str:
        """All of the new text."""
        return self._decode()[self.start :]

    def _decode(self) -> str:
        return str(self.tokenizer.decode(self.ids, skip_special_tokens=True,
                                         clean_up_tokenization_spaces=False))

    def _show(self, text: str) -> str:
        new = text[self.shown :]
        self.shown += len(new)
        return new


def pad_left(ids: Sequence[Sequence[int]], multiple: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Token lists as int32 `[b, t]`, padded with 0 on the left, and the mask of real tokens.

    t is the longest list, rounded up to a multiple of `multiple`.
    """
    lengths = np.array([len(row) for row in ids])
    longest = -(-int(lengths.max()) // multiple) * multiple
    mask = np.arange(longest)[None] >= longest - lengths[:, None]
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = np.concatenate([np.asarray(row, np.int32) for row in ids])
    return tokens, mask


def until_end(row: list[int], eos_ids: Sequence[int]) -> list[int]:
    """The tokens up to and with the first that is in `eos_ids`; all where none is."""
    ends = [n for n, token in enumerate(row) if token in eos_ids]
    return row[: ends[0] + 1] if ends else row


class Stopwatch:
    """Seconds from the last compilation inside the block, or else from its start, to its end."""

    EVENT = "/jax/core/compile/backend_compile_duration"

    def __enter__(self) -> Stopwatch:
        self.start = time.perf_counter()
        jax.monitoring.register_event_duration_secs_listener(self._heard)
        return self

    def _heard(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == self.EVENT:
            self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self.start
        jax.monitoring.unregister_event_duration_listener(self._heard)
