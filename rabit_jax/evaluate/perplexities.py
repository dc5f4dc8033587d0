"""Perplexity and bits per byte in non-overlapping windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Int32

from rabit_jax.errors import BadInput
from rabit_jax.hosts import on_mesh
from rabit_jax.models.decoder import Decoder, check_tokens
from rabit_jax.train.losses import head_of, summed_cross_entropy
from rabit_jax.types import Array, Params, Shape


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
      ppl: `exp(nats_per_token)`; inf if a float cannot hold it.
      nats_per_token: mean cross-entropy of the scored tokens.
      bits_per_byte: `nats_per_token / ln 2 / (bytes of text per token)`, comparable between
        tokenizers; None if the bytes were not given.
      tokens: number of scored tokens.
      context: length t of the windows; perplexities of different contexts are not comparable.
    """

    ppl: float
    nats_per_token: float
    bits_per_byte: float | None
    tokens: int
    context: int


def perplexity(
    model: nn.Module,
    params: Params,
    windows: Int[np.ndarray, "n t"],
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

    Each window scores its tokens 1 .. t-1, each from the tokens before it in the window. Logits are
    float32 and computed for `chunk` positions at a time; the sums of the batches are added in
    float64 on the host.

    Args:
      model: has methods `features(tokens) -> ([b, t, d], hidden)` and `head(features) -> logits`.
      params: tree of arrays and weight nodes; they keep their devices and shardings.
      windows: windows of the text, t >= 2.
      batch_size: windows per call b; on a mesh a multiple of the devices on data and fsdp. The last
        batch is padded with rows that do not count.
      chunk: positions per vocabulary projection.
      text_bytes: UTF-8 bytes of the text that the windows were cut from.
      total_tokens: tokens of that whole text. Each scored token counts as
        `text_bytes / total_tokens` bytes, since single tokens need not be whole characters.
      progress: called with (windows done, n) after each batch.
      batch_sharding: sharding of batches `[b, t]` on a mesh; None for one device.

    Raises:
      BadInput: windows that are not int `[n, t]` with n >= 1 and t >= 2, or only one of
        `text_bytes` and `total_tokens`.

    Example:
      >>> perplexity(model, params, tokens[: n * 512].reshape(n, 512), batch_size=8).ppl
    """
    _check(windows, batch_size, text_bytes, total_tokens)
    if isinstance(model, Decoder):
        check_tokens(windows, model.config.vocab_size)
    n, context = windows.shape
    nats, done = 0.0, 0
    for tokens, real in padded_batches(windows, batch_size):
        if batch_sharding is not None:
            tokens, real = on_mesh((tokens, real), batch_sharding)
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
    bits = mean / math.log(2) * total_tokens / text_bytes if text_bytes and total_tokens else None
    return Perplexity(ppl, mean, bits, scored, context)


def unigram_entropy(tokens: Int[np.ndarray, ...], vocab: int) -> float:
    """Entropy in nats of the token frequencies, `- sum_v p_v ln p_v`.

    This is the cross-entropy of a model that predicts the frequencies whatever the context.

    Args:
      tokens: ids below `vocab`.
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
    model: nn.Module,
    params: Params,
    features: Float[Array, "b t d"],
    tokens: Int[Array, "b t"],
    real: Bool[Array, "b 1"],
    chunk: int,
) -> Float[Array, ""]:
    """Summed cross-entropy in nats of tokens 1 .. t-1 of the rows that `real` marks.

    `features` are the inputs of the head, so `params` need not hold the blocks.
    """
    labels = jnp.roll(tokens, -1, axis=1)
    mask = real & (jnp.arange(tokens.shape[1]) < tokens.shape[1] - 1)[None]
    return summed_cross_entropy(head_of(model, params), features, labels, mask, chunk)[0]


def padded_batches(
    windows: Int[np.ndarray, "n t"], batch_size: int
) -> Iterator[tuple[Int32[np.ndarray, "b t"], Bool[np.ndarray, "b 1"]]]:
    """`(batch, real)` for each batch of windows; `real` is False for rows of padding."""
    for start in range(0, len(windows), batch_size):
        rows = windows[start : start + batch_size].astype(np.int32)
        missing = batch_size - len(rows)
        real = np.arange(batch_size)[:, None] < len(rows)
        yield np.pad(rows, ((0, missing), (0, 0))), real


def _check(
    windows: object, batch_size: int, text_bytes: int | None, total_tokens: int | None
) -> None:
    shape: Shape = getattr(windows, "shape", ())
    dtype = getattr(windows, "dtype", np.dtype(object))
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
