"""Log-probabilities of continuations: batched by length in few shapes, reduced on the device."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int32

from rabit_jax.errors import BadInput
from rabit_jax.models.decoder import Decoder, check_tokens
from rabit_jax.train.losses import chunk_sums, head_of
from rabit_jax.types import Params

# Most continuations that share a row because they differ in their last token only.
CHOICES = 8
# The shortest sequence, and the fewest scored positions, that a program is compiled for.
SHORTEST, FEWEST = 32, 16


class Request(NamedTuple):
    """Tokens of a context and its continuation; the last `scored` of them are the continuation."""

    tokens: Sequence[int]
    scored: int


class Score(NamedTuple):
    """`sum_s log p(w_s | w_<s)` over the continuation, in nats, and whether each w_s is the
    likeliest token."""

    logprob: float
    greedy: bool


@dataclass(frozen=True)
class Batch:
    """One call: b rows of t tokens, n scored positions, c continuations of each row.

    Attributes:
      tokens: padded on the right, where causal attention never looks.
      first: the first of the n positions of each row whose next token may be scored.
      labels: the next tokens.
      mask: which labels count.
      members: for each row that is not padding the indices of its requests, at most c.
    """

    tokens: Int32[np.ndarray, "b t"]
    first: Int32[np.ndarray, " b"]
    labels: Int32[np.ndarray, "b n c"]
    mask: Bool[np.ndarray, "b n c"]
    members: list[list[int]]


def score(
    model: nn.Module,
    params: Params,
    requests: Sequence[Request],
    *,
    batch_size: int,
    chunk: int = 256,
    longest: int | None = None,
    batch_sharding: jax.sharding.Sharding | None = None,
) -> Iterator[list[tuple[int, Score]]]:
    """Scores continuations batch by batch, the longest first.

    The last token of a request is only predicted, so requests that differ only in it share one row:
    the answers "A" to "D" to a question cost one forward pass. Lengths are rounded up to powers of
    two and scored positions to powers of four, so that few programs are compiled. The head is
    applied to the scored positions only, `chunk` of them at a time, and only sums leave the device.

    Args:
      model: causal, with methods `features(tokens) -> ([b, t, d], hidden)` and
        `head(features) -> logits`.
      params: tree of arrays and weight nodes; they keep their devices and shardings.
      requests: at least 2 tokens each, and at least one before the scored ones.
      batch_size: rows per call; on a mesh a multiple of the devices on data and fsdp.
      chunk: positions per vocabulary projection.
      longest: most tokens of a padded row; None for no limit.
      batch_sharding: sharding of the rows on a mesh; None for one device.

    Returns:
      An iterator over lists of `(index of the request, its score)`, each index once.

    Raises:
      BadInput: a token outside of a decoder's vocabulary, or logits that are not finite.

    Example:
      >>> pairs = score(model, params, [Request([5, 9, 2], 1)], batch_size=8)
      >>> dict(pair for batch in pairs for pair in batch)[0].logprob
    """
    if isinstance(model, Decoder):
        ends = [end for one in requests for end in (min(one.tokens), max(one.tokens))]
        check_tokens(np.asarray([ends], np.int64), model.config.vocab_size)
    for batch in batches(requests, batch_size, longest):
        arrays = (batch.tokens, batch.first, batch.labels, batch.mask)
        if batch_sharding is not None:
            arrays = jax.device_put(arrays, batch_sharding)
        nats, missed = jax.device_get(_sums(model, params, *arrays, chunk=chunk))
        if not np.isfinite(nats).all():
            raise BadInput("the logits hold NaN or infinity: the weights are damaged or overflow "
                           "the dtype of the model, pack or load them again")
        yield [
            (index, Score(-float(nats[row, column]), not missed[row, column]))
            for row, members in enumerate(batch.members)
            for column, index in enumerate(members)
        ]


def batches(
    requests: Sequence[Request], batch_size: int, longest: int | None = None
) -> Iterator[Batch]:
    """Cuts requests into batches of rows, the longest row first."""
    shared: dict[tuple[int, ...], list[int]] = {}
    for index, request in enumerate(requests):
        shared.setdefault(tuple(request.tokens[:-1]), []).append(index)
    rows = [
        (read, indices[start : start + CHOICES])
        for read, indices in sorted(shared.items(), key=lambda item: (-len(item[0]), item[0]))
        for start in range(0, len(indices), CHOICES)
    ]
    for start in range(0, len(rows), batch_size):
        yield _batch(rows[start : start + batch_size], requests, batch_size, longest)


def _batch(
    rows: list[tuple[tuple[int, ...], list[int]]], requests: Sequence[Request], b: int,
    longest: int | None,
) -> Batch:
    members = [indices for _, indices in rows]
    t = _rounded(len(rows[0][0]), SHORTEST, 2)
    t = max(min(t, longest or t), len(rows[0][0]))
    n = min(_rounded(max(requests[i].scored for m in members for i in m), FEWEST, 4), t)
    c = 1 if max(map(len, members)) == 1 else CHOICES
    tokens, first = np.zeros((b, t), np.int32), np.zeros(b, np.int32)
    labels, mask = np.zeros((b, n, c), np.int32), np.zeros((b, n, c), bool)
    for row, (read, indices) in enumerate(rows):
        tokens[row, : len(read)] = read
        start = first[row] = max(len(read) - n, 0)
        for column, index in enumerate(indices):
            whole, scored = requests[index]
            labels[row, : len(read) - start, column] = whole[start + 1 :]
            mask[row, len(read) - scored - start : len(read) - start, column] = True
    return Batch(tokens, first, labels, mask, members)


def _rounded(number: int, least: int, base: int) -> int:
    """The smallest of `least, least base, least base^2, ...` that holds `number`."""
    while least < number:
        least *= base
    return least


@functools.partial(jax.jit, static_argnames=("model", "chunk"))
def _sums(model, params, tokens, first, labels, mask, chunk):
    """Nats, and labels that are not the likeliest token, of each continuation: `[b, c]`."""
    head = head_of(model, params)
    features, _ = model.apply({"params": params}, tokens, method="features")
    at = first[:, None] + jnp.arange(labels.shape[1], dtype=jnp.int32)[None]
    features = jnp.take_along_axis(features, at[..., None], axis=1)

    def piece(features, labels, mask):
        logits = head(features).astype(jnp.float32)
        chosen = jnp.take_along_axis(logits, labels, axis=-1)
        nats = jax.nn.logsumexp(logits, axis=-1, keepdims=True) - chosen
        missed = jnp.argmax(logits, axis=-1)[..., None] != labels
        return (jnp.sum(nats, axis=1, where=mask),
                jnp.sum(missed, axis=1, where=mask, dtype=jnp.int32))

    return chunk_sums(piece, (features, labels, mask), chunk)
