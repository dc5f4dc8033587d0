"""Generation in batches until a stop string, for the tasks of lm-evaluation-harness."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from rabit_jax.errors import BadInput
from rabit_jax.models.decoder import Decoder
from rabit_jax.models.generation import stream
from rabit_jax.models.prepared import Engine, prepare
from rabit_jax.types import Array, Json, Params, Tokenizer

NEW_TOKENS = 256  # the default of the harness
SHORTEST = 32
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# Settings without effect on greedy text, and settings without effect at these values.
SAMPLING = frozenset({"temperature", "top_p", "top_k", "min_p", "typical_p"})
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "top_k": 0}


class Settings(NamedTuple):
    """How a text is continued, and the stop strings before which it is cut."""

    until: tuple[str, ...]
    new_tokens: int
    temperature: float
    top_p: float


def settings_of(given: Json, max_length: int) -> Settings:
    """The settings for a task's `generation_kwargs`.

    As in the harness, text is greedy unless `do_sample` is true or, if that is not given, the
    temperature is above 0; the default length is 256 new tokens.

    Raises:
      BadInput: a setting that would change the text and is not implemented, or a length that leaves
        no token for the prompt.
    """
    left = dict(given)
    until = left.pop("until", None) or ()
    lengths = [left.pop(name, None) for name in LENGTHS]
    new_tokens = int(next((n for n in lengths if n is not None), NEW_TOKENS))
    if not 0 < new_tokens < max_length:
        raise BadInput(f"a task asks for {new_tokens} new tokens, wanted 1 to {max_length - 1} for "
                       f"sequences of at most {max_length}: leave the task out")
    temperature, top_p = float(left.get("temperature") or 0), float(left.pop("top_p", 1.0))
    sampled = left.pop("do_sample", None)
    if sampled is None:
        sampled = temperature > 0
    left = {name: v for name, v in left.items() if v is not None and v != NEUTRAL.get(name)}
    odd = sorted(set(left) - (SAMPLING if not sampled else {"temperature"}))
    if odd:
        raise BadInput(f"a task sets {odd[0]} to {left[odd[0]]!r} for generation, which is not "
                       f"implemented: set until, {LENGTHS[0]}, do_sample, temperature and top_p")
    if sampled and temperature <= 0:
        raise BadInput(f"a task samples at temperature {temperature}, wanted one above 0")
    until = (until,) if isinstance(until, str) else tuple(until)
    return Settings(tuple(stop for stop in until if stop), new_tokens,
                    temperature if sampled else 0.0, top_p if sampled else 1.0)


class BatchGenerator:
    """A model that continues batches of prompts.

    On a mesh without tensor parallelism every device gets the model and its share of the prompts;
    otherwise all devices compute the same rows together.

    Args:
      model: the decoder.
      params: its params, on the mesh if there is one; they are prepared at first use.
      eos_ids: tokens that end a text.
      mesh: the mesh of the params, or None.
      seed: seed of sampling; the same seed and requests give the same texts.
    """

    def __init__(
        self, model: Decoder, params: Params, eos_ids: tuple[int, ...], mesh: Mesh | None, seed: int
    ) -> None:
        self.model, self.params, self.eos_ids, self.mesh = model, params, eos_ids, mesh
        self.key, self.calls = jax.random.key(seed), 0

    @functools.cached_property
    def engines(self) -> list[Engine]:
        """The params prepared for decoding, once for each device that decodes on its own."""
        engine = prepare(self.model.config, self.params)
        if self.mesh is None or self.mesh.shape["tensor"] > 1:
            return [engine]
        return [jax.device_put(engine, device) for device in self.mesh.devices.flat]

    def generate(
        self, prompts: Sequence[list[int]], settings: Settings, tokenizer: Tokenizer,
        batch_size: int,
    ) -> list[str]:
        """The texts that continue the prompts, each cut before its first stop string.

        Args:
          prompts: token ids of at most `batch_size` prompts.
          settings: how to continue them.
          tokenizer: the model's.
          batch_size: rows per call. So many rows are always computed, of a length that is rounded
            up to a power of two, so that few programs are compiled.
        """
        key, self.calls = jax.random.fold_in(self.key, self.calls), self.calls + 1
        tokens, mask = _padded(prompts, batch_size)
        parts = [np.array_split(a, len(self.engines)) for a in (tokens, mask)]
        real = np.array_split(np.arange(batch_size) < len(prompts), len(self.engines))

        def run(n: int) -> list[str]:
            return self._texts(self.engines[n], parts[0][n], parts[1][n], int(real[n].sum()),
                               settings, tokenizer, jax.random.fold_in(key, n))

        if len(self.engines) == 1:
            return run(0)
        with ThreadPoolExecutor(len(self.engines)) as pool:
            return [text for texts in pool.map(run, range(len(self.engines))) for text in texts]

    def _texts(
        self, engine: Engine, tokens: np.ndarray, mask: np.ndarray, real: int, settings: Settings,
        tokenizer: Tokenizer, key: Array,
    ) -> list[str]:
        """Texts of the first `real` rows, computed on one device."""
        if not real:
            return []
        made, ends = np.zeros((real, 0), np.int32), self._ends(settings.until, tokenizer)
        chunks = stream(
            self.model, engine, tokens, mask, settings.new_tokens, settings.temperature,
            settings.top_p, key, ends,
        )
        for new in chunks:
            made = np.concatenate([made, new[:real]], axis=1)
            if all(_over(row, ends, settings.until, tokenizer) for row in made):
                break
        return [_cut(_decoded(row, ends, tokenizer), settings.until) for row in made]

    def _ends(self, until: Sequence[str], tokenizer: Tokenizer) -> tuple[int, ...]:
        """Tokens that end a text: the model's own, and stop strings that are a special token, such
        as "<|im_end|>", because decoding omits those from the text."""
        added = tokenizer.get_added_vocab()
        return tuple(sorted({*self.eos_ids, *(added[stop] for stop in until if stop in added)}))


def _over(row: np.ndarray, ends: Sequence[int], until: Sequence[str], tokenizer: Tokenizer) -> bool:
    """Whether the text of a row is complete, so that further tokens would not change it."""
    if np.isin(row, ends).any():
        return True
    text = _decoded(row, ends, tokenizer)
    return _cut(text, until) != text


def _decoded(row: np.ndarray, ends: Sequence[int], tokenizer: Tokenizer) -> str:
    """The text of a row up to the first token that ends it."""
    found = np.flatnonzero(np.isin(row, ends))
    row = row[: found[0]] if found.size else row
    return str(tokenizer.decode(row.tolist(), skip_special_tokens=True))


def _cut(text: str, until: Sequence[str]) -> str:
    """The text before the first stop string."""
    return text[: min((at for at in map(text.find, until) if at >= 0), default=len(text))]


def _padded(prompts: Sequence[list[int]], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask `[rows, t]`: prompts padded on the left, then rows of a single token."""
    t = SHORTEST
    while t < max(map(len, prompts)):
        t *= 2
    tokens, mask = np.zeros((rows, t), np.int32), np.zeros((rows, t), bool)
    mask[:, -1] = True
    for row, prompt in enumerate(prompts):
        tokens[row, t - len(prompt) :], mask[row, t - len(prompt) :] = prompt, True
    return tokens, mask
