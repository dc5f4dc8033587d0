"""Losses in sequence chunks: the float32 logits of a whole batch are never held.

With a 128k vocabulary the logits of 4 x 4096 tokens would take 8.4 GB. Each chunk of positions
projects to the vocabulary, reduces, and is recomputed in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

F32 = jnp.float32
Head = Callable[[jax.Array], jax.Array]


def chunk_sums(function: Callable, arrays: tuple[jax.Array, ...], chunk: int) -> Any:
    """Sum `function(*pieces)` over pieces of `chunk` positions of arrays `[b, t, ...]`.

    The last piece is padded with zeros, so `function` must weigh positions by a mask among
    `arrays`. Each piece is rematerialised in the backward pass.
    """
    arrays = tuple(jnp.asarray(a) for a in arrays)
    length = arrays[0].shape[1]
    chunk = min(chunk, length) if chunk else length
    pad = -length % chunk

    def split(a):
        a = jnp.pad(a, [(0, 0), (0, pad)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(a.shape[0], -1, chunk, *a.shape[2:]), 1, 0)

    piece = jax.checkpoint(lambda arguments: function(*arguments))
    if pad == 0 and chunk == length:
        return piece(arrays)
    start = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype),
        jax.eval_shape(
            piece,
            tuple(jax.ShapeDtypeStruct((a.shape[0], chunk, *a.shape[2:]), a.dtype) for a in arrays),
        ),
    )
    total, _ = jax.lax.scan(
        lambda total, pieces: (jax.tree.map(jnp.add, total, piece(pieces)), None),
        start,
        tuple(split(a) for a in arrays),
    )
    return total


def summed_cross_entropy(
    head: Head, features: jax.Array, labels: jax.Array, mask: jax.Array, chunk: int = 256
) -> tuple[jax.Array, jax.Array]:
    """`(sum_t mask_t (log sum_v exp(z_tv) - z_t[label_t]), sum_t mask_t)` in nats.

    Args:
      head: `[b, c, d] -> [b, c, v]` float32 logits.
      features: `[b, t, d]`, position t already aligned with its label.
      labels: `[b, t]` int32.
      mask: `[b, t]` bool or float, what counts.
      chunk: positions per piece; 0 takes all at once.

    Returns:
      Scalar float32 sum and the number of scored tokens, float32.
    """

    def piece(features, labels, mask):
        logits = head(features).astype(F32)
        chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        return jnp.sum((jax.nn.logsumexp(logits, axis=-1) - chosen) * mask)

    mask = mask.astype(F32)
    return chunk_sums(piece, (features, labels, mask), chunk), jnp.sum(mask)


def summed_kl(
    student_head: Head,
    teacher_head: Head,
    student: jax.Array,
    teacher: jax.Array,
    mask: jax.Array,
    chunk: int = 256,
) -> jax.Array:
    """`sum_t mask_t KL(teacher_t || student_t)` in nats, scalar float32.

    Args:
      student_head: `[b, c, d] -> [b, c, v]`.
      teacher_head: the same for the teacher.
      student: features `[b, t, d]`.
      teacher: features `[b, t, d]`; no gradient flows to them.
      mask: `[b, t]`.
      chunk: positions per piece; 0 takes all at once.
    """

    def piece(student, teacher, mask):
        log_q = jax.nn.log_softmax(student_head(student).astype(F32), axis=-1)
        log_p = jax.nn.log_softmax(teacher_head(teacher).astype(F32), axis=-1)
        return jnp.sum(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1) * mask)

    return chunk_sums(piece, (student, jax.lax.stop_gradient(teacher), mask.astype(F32)), chunk)


def summed_hidden_error(student: jax.Array, teacher: jax.Array, mask: jax.Array) -> jax.Array:
    """`sum_l sum_t mask_t mean_d (s_ltd - t_ltd)^2` for hidden states `[l, b, t, d]`, float32."""
    error = jnp.square(student.astype(F32) - jax.lax.stop_gradient(teacher).astype(F32))
    return jnp.sum(jnp.mean(error, axis=-1) * mask.astype(F32)[None])


def _real(batch: dict) -> jax.Array:
    mask = batch.get("mask")
    return jnp.ones(batch["tokens"].shape, bool) if mask is None else mask


def _head(model: Any, params: Any) -> Head:
    return lambda features: model.apply({"params": params}, features, method="head")


def next_token_loss(
    model: Any, params: Any, batch: dict, chunk: int = 256, labels: str = "data", key: Any = None
) -> tuple[jax.Array, jax.Array]:
    """Summed next-token cross-entropy of a model: `(sum in nats, scored tokens)`.

    Position t predicts token t+1; a pair counts where both are real tokens.

    Args:
      model: decoder with methods `features` and `head`.
      params: its params.
      batch: `tokens: [b, t]`, optionally `mask: [b, t]`.
      chunk: positions per piece of the vocabulary projection.
      labels: "data", or "sampled" from the model's own predictive distribution.
      key: PRNG key, needed for sampled labels.
    """
    features, _ = model.apply(
        {"params": params}, batch["tokens"], batch.get("mask"), method="features"
    )
    return features_loss(_head(model, params), features, batch, chunk, labels, key)


def features_loss(
    head: Head, features: jax.Array, batch: dict, chunk: int, labels: str = "data", key: Any = None
) -> tuple[jax.Array, jax.Array]:
    """`next_token_loss` from what the head reads, `features: [b, t, d]` of the whole batch."""
    tokens, mask = batch["tokens"], _real(batch)
    features, scored = features[:, :-1], mask[:, 1:] & mask[:, :-1]
    wanted = tokens[:, 1:] if labels == "data" else sample_labels(head, features, key, chunk)
    return summed_cross_entropy(head, features, wanted, scored, chunk)


def sample_labels(head: Head, features: jax.Array, key: jax.Array, chunk: int) -> jax.Array:
    """Draw one label per position from the model's own distribution: `[b, t, d]` -> `[b, t]`
    int32."""
    chunk = min(chunk, features.shape[1]) if chunk else features.shape[1]
    pieces = [features[:, i : i + chunk] for i in range(0, features.shape[1], chunk)]
    keys = jax.random.split(key, len(pieces))
    drawn = [
        jax.random.categorical(k, head(jax.lax.stop_gradient(piece)))
        for k, piece in zip(keys, pieces, strict=True)
    ]
    return jax.lax.stop_gradient(jnp.concatenate(drawn, axis=1))


def distillation_loss(
    model: Any, params: Any, teacher: Any, batch: dict, gamma: float, chunk: int = 256
) -> dict[str, jax.Array]:
    """Sums over the real tokens of a batch of the QAT objective (arXiv 2602.05367, section 4).

        loss = KL(teacher || student) + gamma * sum_l MSE(hidden_l)

    Both terms are returned as sums over tokens (the MSE as a mean over channels, summed over
    layers); the caller divides by the number of tokens. So `gamma` weighs per-token quantities: the
    published gamma = 100 stands beside a KL summed over 4096 positions, which is 0.024 here.

    Returns:
      `{"loss", "kl", "hidden_mse"}`, scalar float32 sums.
    """
    tokens, mask = batch["tokens"], _real(batch)

    def run(params):
        return model.apply(
            {"params": params},
            tokens,
            batch.get("mask"),
            hidden_states=gamma > 0,
            method="features",
        )

    student, student_hidden = run(params)
    taught, taught_hidden = jax.lax.stop_gradient(run(teacher))
    kl = summed_kl(_head(model, params), _head(model, teacher), student, taught, mask, chunk)
    hidden = (
        summed_hidden_error(student_hidden, taught_hidden, mask)
        if gamma > 0
        else jnp.zeros((), F32)
    )
    return {"loss": kl + gamma * hidden, "kl": kl, "hidden_mse": hidden}
