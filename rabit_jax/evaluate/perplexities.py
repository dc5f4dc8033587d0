"""Perplexity and bits per byte in non-overlapping windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rabit_jax.errors import BadInput
from rabit_jax.train.losses import summed_cross_entropy


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
      ppl: `exp(nats_per_token)`; inf where a float cannot hold it.
      nats_per_token: mean cross-entropy of the scored tokens.
      bits_per_byte: `nats_per_token / ln 2 / (bytes of text per token)`, comparable between
        tokenisers; None where the bytes were not given.
      tokens: how many tokens were scored.
      context: length t of the windows; perplexities of different contexts do not compare.
    """

    ppl: float
    nats_per_token: float
    bits_per_byte: float | None
    tokens: int
    context: int


def perplexity(
    model: nn.Module,
    params: Any,
    windows: np.ndarray,
    *,
    batch_size: int,
    chunk: int = 256,
    text_bytes: int | None = None,
    total_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    batch_sharding: jax.sharding.Sharding | None = None,
) -> Perplexity:
    """Perplexity over non-overlapping windows, the convention of published figures.

        nats_per_token = - 1 / (n (t - 1)) sum_w sum_{s=1..t-1} log p(w_s | w_0 .. w_{s-1})

    Each window scores its tokens 1 .. t-1 from its own past alone. Logits are float32 and are made
    for `chunk` positions at a time; the sums of the batches are added in float64 on the host.

    Args:
      model: has `features(tokens) -> ([b, t, d], hidden)` and `head(features) -> logits`.
      params: tree of arrays and weight nodes; stays on the devices and in the shards it is in.
      windows: int `[n, t]`, t >= 2.
      batch_size: windows per call b; on a mesh a multiple of the devices on the data axis. The last
        batch is padded with rows that do not count.
      chunk: positions per vocabulary projection.
      text_bytes: UTF-8 bytes of the text that the windows were cut from.
      total_tokens: tokens of that whole text. The scored tokens stand for
        `text_bytes / total_tokens` bytes each, since single tokens need not be whole characters.
      progress: called with (windows done, n) after each batch.
      batch_sharding: where batches `[b, t]` live on a mesh; None for one device.

    Raises:
      BadInput: windows that are no int `[n, t]` with n >= 1, t >= 2, or only one of `text_bytes`
        and `total_tokens`.

    Example:
      >>> perplexity(model, params, tokens[: n * 512].reshape(n, 512), batch_size=8).ppl
    """
    _check(windows, batch_size, text_bytes, total_tokens)
    n, context = windows.shape
    nats, done = 0.0, 0
    for tokens, real in padded_batches(windows, batch_size):
        if batch_sharding is not None:
            tokens, real = jax.device_put((tokens, real), batch_sharding)
        nats += float(_summed_nats(model, params, tokens, real, chunk))
        done = min(done + batch_size, n)
        if progress:
            progress(done, n)
    return from_nats(nats, n, context, text_bytes, total_tokens)


def from_nats(
    nats: float, n: int, context: int, text_bytes: int | None, total_tokens: int | None
) -> Perplexity:
    """The `Perplexity` of n windows of `context` tokens whose cross-entropies sum to `nats`."""
    scored = n * (context - 1)
    mean = nats / scored
    ppl = math.exp(mean) if mean < 700 else (math.inf if mean == mean else math.nan)
    bits = mean / math.log(2) * total_tokens / text_bytes if text_bytes else None
    return Perplexity(ppl, mean, bits, scored, context)


def unigram_entropy(tokens: np.ndarray, vocab: int) -> float:
    """Entropy in nats of the token frequencies, `- sum_v p_v ln p_v`.

    A model that knows how often tokens occur and nothing of their context scores this.

    Args:
      tokens: int ids below `vocab`, any shape.
      vocab: size v of the vocabulary.

    Raises:
      BadInput: no token, or an id outside the vocabulary.
    """
    ids = np.asarray(tokens).reshape(-1)
    if not ids.size or ids.min() < 0 or ids.max() >= vocab:
        raise BadInput(f"entropy found {_span(ids)}, wanted at least one, all in 0..{vocab - 1}")
    counts = np.bincount(ids, minlength=vocab)
    p = counts[counts > 0] / ids.size
    return float(-np.sum(p * np.log(p)))


@partial(jax.jit, static_argnames=("model", "chunk"))
def _summed_nats(model, params, tokens, real, chunk):
    features, _ = model.apply({"params": params}, tokens, method="features")
    return features_nats(model, params, features, tokens, real, chunk)


def features_nats(
    model: nn.Module, params: Any, features: jax.Array, tokens: jax.Array, real: jax.Array,
    chunk: int,
) -> jax.Array:
    """Cross-entropy in nats of tokens 1 .. t-1 of the rows that `real: [b, 1]` marks, float32.

    `features: [b, t, d]` are what the head reads, so `params` need none of the blocks.
    """
    labels = jnp.roll(tokens, -1, axis=1)
    mask = real & (jnp.arange(tokens.shape[1]) < tokens.shape[1] - 1)[None]

    def head(features):
        return model.apply({"params": params}, features, method="head")

    return summed_cross_entropy(head, features, labels, mask, chunk)[0]


def padded_batches(
    windows: np.ndarray, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Windows `[n, t]` as int32 batches `[b, t]`, and bool `[b, 1]`: False for rows of padding."""
    for start in range(0, len(windows), batch_size):
        rows = windows[start : start + batch_size].astype(np.int32)
        missing = batch_size - len(rows)
        real = np.arange(batch_size)[:, None] < len(rows)
        yield np.pad(rows, ((0, missing), (0, 0))), real


def _check(windows, batch_size, text_bytes, total_tokens) -> None:
    shape, dtype = np.shape(windows), getattr(windows, "dtype", np.dtype(object))
    if not np.issubdtype(dtype, np.integer) or len(shape) != 2 or shape[0] < 1 or shape[1] < 2:
        raise BadInput(
            f"perplexity got windows {dtype}{list(shape)}, wanted int [n, t] with n >= 1 and "
            "t >= 2: give it a longer text or a shorter context"
        )
    if batch_size < 1:
        raise BadInput(f"perplexity got batch_size {batch_size}, wanted at least 1")
    if bool(text_bytes) != bool(total_tokens):
        raise BadInput(
            f"perplexity got text_bytes {text_bytes} and total_tokens {total_tokens}: "
            "bits per byte needs both"
        )


def _span(ids: np.ndarray) -> str:
    return f"{ids.size} ids in {ids.min()}..{ids.max()}" if ids.size else "no ids"
