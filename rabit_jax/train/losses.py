"""Losses computed in chunks of positions, so that the logits of a batch are never held at once.

With a 128k vocabulary the float32 logits of 4 x 4096 tokens would take 8.4 GB. Each chunk of
positions is projected to the vocabulary and reduced to a sum and its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.core import eval_jaxpr
from jaxtyping import Bool, Float, Int, Shaped

from rabit_jax.types import Array, Batch, Params
from rabit_jax.weights.mixed_stack import first_paths
from rabit_jax.weights.shardings import gather_ends

F32 = jnp.float32
Head = Callable[[Array], Array]
Sums = TypeVar("Sums")


def chunk_sums(
    function: Callable[..., Sums], arrays: tuple[Shaped[Array, "b t ..."], ...], chunk: int
) -> Sums:
    """Sum `function(*pieces)` over pieces of `chunk` positions of arrays `[b, t, ...]`.

    The last piece is padded with zeros, so `function` must weight positions by a mask among
    `arrays`. A `chunk` of 0 takes all positions at once.

    Of a scalar the gradient is computed piece by piece beside the sum and scaled in the backward
    pass, so that logits are never computed twice; only for what is differentiated. Derivatives are
    of first order, in reverse mode.
    """
    arrays = tuple(jnp.asarray(a) for a in arrays)
    length = arrays[0].shape[1]
    chunk = min(chunk, length) if chunk else length
    # A rule for the gradient sees arguments alone, so what is closed over becomes some.
    pieces = (jax.ShapeDtypeStruct((a.shape[0], chunk, *a.shape[2:]), a.dtype) for a in arrays)
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*pieces)
    tree = jax.tree.structure(shape)

    def whole(*arguments: Array) -> Sums:
        own, consts = arguments[: len(arrays)], arguments[len(arrays) :]
        return jax.tree.unflatten(tree, eval_jaxpr(closed.jaxpr, consts, *own))

    return _summed(whole, chunk, arrays, tuple(closed.consts))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed(
    function: Callable[..., Sums], chunk: int, arrays: tuple[Array, ...], consts: tuple[Array, ...]
) -> Sums:
    """`chunk_sums` of `function(*pieces, *consts)`."""
    return _scanned(lambda *pieces: (function(*pieces, *consts), ()), chunk, arrays)[0]


Gradients = tuple[tuple[Array | None, ...], tuple[Array | None, ...]]


def _summed_forward(
    function: Callable[..., Array], chunk: int, arrays: tuple[Any, ...], consts: tuple[Any, ...]
) -> tuple[Array, Gradients]:
    """The sum, and its gradient by each argument; None where it is not differentiated."""
    n, wanted = len(arrays), [i for i, a in enumerate((*arrays, *consts)) if a.perturbed]
    arrays, consts = tuple(a.value for a in arrays), tuple(a.value for a in consts)

    def piece(*pieces: Array) -> tuple[tuple[Array, dict[int, Array]], dict[int, Array]]:
        own = dict(enumerate((*pieces, *consts)))
        total, found = jax.value_and_grad(lambda some: function(*(own | some).values()))(
            {i: own[i] for i in wanted})
        of_consts = {i: g for i, g in found.items() if i >= n}
        return (total, of_consts), {i: g for i, g in found.items() if i < n}

    (total, of_consts), of_arrays = _scanned(piece, chunk, arrays)
    return total, (tuple(of_arrays.get(i) for i in range(n)),
                   tuple(of_consts.get(n + i) for i in range(len(consts))))


def _summed_backward(
    function: Callable[..., Array], chunk: int, gradients: Gradients, cotangent: Array
) -> Gradients:
    return jax.tree.map(lambda g: (g * cotangent).astype(g.dtype), gradients)


_summed.defvjp(_summed_forward, _summed_backward, symbolic_zeros=True)


def _scanned(
    function: Callable[..., tuple[Sums, Any]], chunk: int, arrays: tuple[Array, ...]
) -> tuple[Sums, Any]:
    """The sums of `function(*pieces) -> (to add, [b, c, ...] to put side by side)`."""
    length = arrays[0].shape[1]
    pad = -length % chunk
    if pad == 0 and chunk == length:
        return function(*arrays)

    def split(a: Array) -> Array:
        a = jnp.pad(a, [(0, 0), (0, pad)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(a.shape[0], -1, chunk, *a.shape[2:]), 1, 0)

    def joined(a: Array) -> Array:
        a = jnp.moveaxis(a, 0, 1)
        return a.reshape(a.shape[0], -1, *a.shape[3:])[:, :length]

    pieces = tuple(split(a) for a in arrays)
    start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype),
                         jax.eval_shape(lambda first: function(*first)[0], [a[0] for a in pieces]))

    def add(total: Sums, own: tuple[Array, ...]) -> tuple[Sums, Any]:
        more, beside = function(*own)
        return jax.tree.map(jnp.add, total, more), beside

    total, beside = jax.lax.scan(add, start, pieces)
    return total, jax.tree.map(joined, beside)


def summed_cross_entropy(
    head: Head,
    features: Float[Array, "b t d"],
    labels: Int[Array, "b t"],
    mask: Shaped[Array, "b t"],
    chunk: int = 256,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`(sum_t mask_t (log sum_v exp(z_tv) - z_t[label_t]), sum_t mask_t)` in nats.

    Args:
      head: features `[b, c, d]` -> logits `[b, c, v]`.
      features: input of the head, position t aligned with its label.
      labels: token that each position should predict.
      mask: bool or float weight of each position.
      chunk: positions per piece; 0 takes all at once.

    Returns:
      Scalar float32 sum and the number of scored tokens, float32.
    """

    def piece(features, labels, mask):
        logits = head(features).astype(F32)
        chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        return jnp.sum((jax.nn.logsumexp(logits, axis=-1) - chosen) * mask)

    mask = mask.astype(F32)
    with jax.named_scope("cross_entropy"):
        return chunk_sums(piece, (features, labels, mask), chunk), jnp.sum(mask)


def summed_kl(
    student_head: Head,
    teacher_head: Head,
    student: Float[Array, "b t d"],
    teacher: Float[Array, "b t e"],
    mask: Shaped[Array, "b t"],
    chunk: int = 256,
) -> Float[Array, ""]:
    """`sum_t mask_t KL(teacher_t || student_t)` in nats, scalar float32.

    Args:
      student_head: features `[b, c, d]` -> logits `[b, c, v]`.
      teacher_head: features `[b, c, e]` -> logits `[b, c, v]`.
      student: features of the student.
      teacher: features of the teacher; no gradient flows to them or to its head.
      mask: bool or float weight of each position.
      chunk: positions per piece; 0 takes all at once.
    """

    def piece(student, teacher, mask):
        log_q = jax.nn.log_softmax(student_head(student).astype(F32), axis=-1)
        taught = jax.lax.stop_gradient(teacher_head(teacher))
        log_p = jax.nn.log_softmax(taught.astype(F32), axis=-1)
        return jnp.sum(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1) * mask)

    with jax.named_scope("kl"):
        taught = jax.lax.stop_gradient(teacher)
        return chunk_sums(piece, (student, taught, mask.astype(F32)), chunk)


def likeliest(
    head: Head, features: Float[Array, "b t d"], top: int, chunk: int = 256
) -> dict[str, Shaped[Array, "b t *k"]]:
    """What `summed_kept_kl` needs of a teacher: its `top` likeliest tokens at each position.

    Returns:
      `ids: [b, t, k]` int32, `log_p: [b, t, k]` float32 in nats, descending, and
      `log_rest: [b, t]` float32, the logarithm of the mass of all other tokens.
    """

    def piece(features: Array) -> dict[str, Array]:
        logits = head(features).astype(F32)
        log_p, ids = jax.lax.top_k(logits, top)
        total = jax.nn.logsumexp(logits, axis=-1)
        return {"ids": ids.astype(jnp.int32), "log_p": log_p - total[..., None],
                "log_rest": _log_rest(logits, ids) - total}

    length = features.shape[1]
    size = min(chunk, length) if chunk else length
    pieces = [piece(features[:, i : i + size]) for i in range(0, length, size)]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *pieces)


def _log_rest(logits: Float[Array, "b t v"], ids: Int[Array, "b t k"]) -> Float[Array, "b t"]:
    """`log sum exp` of the logits that `ids` does not name; the least float32 where it names all.

    The sum is over those themselves: 1 less the sum of the others would be rounding noise where
    they have nearly all of the mass.
    """
    least = jnp.finfo(F32).min
    others = jnp.put_along_axis(logits, ids, least, axis=-1, inplace=False)
    return jnp.maximum(jax.nn.logsumexp(others, axis=-1), least)


def summed_kept_kl(
    head: Head, student: Float[Array, "b t d"], taught: Mapping[str, Shaped[Array, "b t *k"]],
    mask: Shaped[Array, "b t"], chunk: int = 256,
) -> Float[Array, ""]:
    """KL to a teacher of whom the k likeliest tokens are known, scalar float32 in nats.

        sum_t mask_t (sum_{v in K_t} p_v (log p_v - log q_v) + r (log r - log s))

    K are the kept tokens, `r = 1 - sum_{v in K} p_v` and s the student's mass outside of K. So
    every kept term is that of the exact KL, and all other tokens count as one. The exact KL is
    larger by `r KL(p / r || q / s)` over those, never smaller.

    Args:
      head: features `[b, c, d]` -> logits `[b, c, v]`.
      student: features of the student.
      taught: from `likeliest`.
      mask: bool or float weight of each position.
      chunk: positions per piece; 0 takes all at once.
    """

    def piece(student, ids, log_p, log_rest, mask):
        logits = head(student).astype(F32)
        total = jax.nn.logsumexp(logits, axis=-1)
        log_q = jnp.take_along_axis(logits, ids, axis=-1) - total[..., None]
        kept = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
        rest = jnp.exp(log_rest)
        outside = rest * (log_rest - (_log_rest(logits, ids) - total))
        return jnp.sum((kept + jnp.where(rest > 0, outside, 0)) * mask)

    with jax.named_scope("kl"):
        arrays = (student, taught["ids"], taught["log_p"], taught["log_rest"], mask.astype(F32))
        return chunk_sums(piece, arrays, chunk)


def kept_distillation_loss(
    model: nn.Module, params: Params, batch: Batch, chunk: int = 256
) -> dict[str, Float[Array, ""]]:
    """`distillation_loss` with gamma = 0 and no teacher: `batch` holds the arrays of `likeliest`.

    Returns:
      `{"loss", "kl", "hidden_mse"}`, scalar float32 sums over real tokens; the last is 0.
    """
    with jax.named_scope("student"):
        student, _ = _features(model, params, batch)
    kl = summed_kept_kl(head_of(model, params), student, batch, _real(batch), chunk)
    return {"loss": kl, "kl": kl, "hidden_mse": jnp.zeros((), F32)}


def summed_hidden_error(
    student: Float[Array, "l b t d"], teacher: Float[Array, "l b t d"], mask: Shaped[Array, "b t"]
) -> Float[Array, ""]:
    """`sum_t mask_t mean_l |s_lt - y_lt|^2 / |y_lt|^2` for hidden states `[l, b, t, d]`, float32.

    Relative to the teacher's y at every token of every layer, because residual streams differ by
    orders of magnitude between models, layers and tokens (the first token of a Llama is a thousand
    times larger than the others): a plain mean would be the error of those few tokens. A token
    whose y is 0 counts 0. No gradient flows to the teacher.
    """
    with jax.named_scope("hidden_error"):
        y = jax.lax.stop_gradient(teacher).astype(F32)
        size = jnp.sum(jnp.square(y), axis=-1)
        error = jnp.sum(jnp.square(student.astype(F32) - y), axis=-1)
        relative = jnp.where(size > 0, error / jnp.where(size > 0, size, 1), 0)
        return jnp.sum(jnp.mean(relative, axis=0) * mask.astype(F32))


def _real(batch: Batch) -> Bool[Array, "b t"]:
    mask = batch.get("mask")
    return jnp.ones(batch["tokens"].shape, bool) if mask is None else mask


def head_of(model: nn.Module, params: Params) -> Head:
    """The vocabulary projection of a decoder: features `[b, t, d]` -> logits `[b, t, v]`.

    On a mesh it is gathered over fsdp once for all chunks of positions.
    """
    params = gather_ends(params)
    return lambda features: cast(Array, model.apply({"params": params}, features, method="head"))


def _features(
    model: nn.Module, params: Params, batch: Batch, **options: Any
) -> tuple[Float[Array, "b t d"], Float[Array, "l b t d"]]:
    """`(inputs of the head, hidden states of the layers)`, the latter with `hidden_states=True`."""
    tokens, mask = batch["tokens"], batch.get("mask")
    found = model.apply({"params": params}, tokens, mask, method="features", **options)
    return cast(tuple[Array, Array], found)


def next_token_loss(
    model: nn.Module,
    params: Params,
    batch: Batch,
    chunk: int = 256,
    labels: str = "data",
    key: Array | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Summed next-token cross-entropy of a model: `(sum in nats, scored tokens)`.

    Position t predicts token t+1; a pair counts where both are real tokens.

    Args:
      model: decoder with methods `features` and `head`.
      params: its params.
      batch: `tokens: [b, t]`, optionally `mask: [b, t]`.
      chunk: positions per piece of the vocabulary projection.
      labels: "data" for the tokens of the batch, or "sampled" for labels drawn from the model's
        own predictive distribution.
      key: PRNG key for sampled labels.
    """
    features, _ = _features(model, params, batch)
    return features_loss(head_of(model, params), features, batch, chunk, labels, key)


def features_loss(
    head: Head,
    features: Float[Array, "b t d"],
    batch: Batch,
    chunk: int,
    labels: str = "data",
    key: Array | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`next_token_loss` from the head and its inputs, the features of the whole batch."""
    tokens, mask = batch["tokens"], _real(batch)
    features, scored = features[:, :-1], mask[:, 1:] & mask[:, :-1]
    if labels == "data":
        wanted = tokens[:, 1:]
    else:
        wanted = sample_labels(head, features, cast(Array, key), chunk)
    return summed_cross_entropy(head, features, wanted, scored, chunk)


def sample_labels(
    head: Head, features: Float[Array, "b t d"], key: Array, chunk: int
) -> Int[Array, "b t"]:
    """One label per position, drawn from the model's own predictive distribution."""
    chunk = min(chunk, features.shape[1]) if chunk else features.shape[1]
    pieces = [features[:, i : i + chunk] for i in range(0, features.shape[1], chunk)]
    keys = jax.random.split(key, len(pieces))
    drawn = [
        jax.random.categorical(k, head(jax.lax.stop_gradient(piece)))
        for k, piece in zip(keys, pieces, strict=True)
    ]
    return jax.lax.stop_gradient(jnp.concatenate(drawn, axis=1))


def distillation_loss(
    model: nn.Module, params: Params, teacher: Params, batch: Batch, gamma: float, chunk: int = 256
) -> dict[str, Float[Array, ""]]:
    """The QAT objective (arXiv 2602.05367, section 4), summed over the real tokens of a batch.

        loss = KL(teacher || student) + gamma * mean_l |s_l - y_l|^2 / |y_l|^2

    s and y are the hidden states of student and teacher; the published term is a plain mean square,
    see `summed_hidden_error`. Both terms are sums over tokens, which the caller divides by the
    number of tokens, so `gamma` weights quantities per token. No gradient flows to the teacher.

    Returns:
      `{"loss", "kl", "hidden_mse"}`, scalar float32 sums; "hidden_mse" is the second term without
      its weight.
    """
    return _to_teacher(model, [params], teacher, batch, gamma, chunk)[0]


def nested_loss(
    model: nn.Module, params: Params, teacher: Params, batch: Batch, gamma: float,
    weights: Mapping[int, float], chunk: int = 256,
) -> dict[str, Float[Array, ""]]:
    """`distillation_loss` of the models of the first sign paths, summed by weight.

        loss = sum_n w_n L(first n paths) / sum_n w_n

    One latent is trained so that each prefix of its paths is a model of its own, see
    `weights.mixed_stack.first_paths`. The teacher runs once. Source of losses on nested prefixes:
    Kusupati et al., Matryoshka Representation Learning, arXiv 2205.13147.

    Args:
      model, params, teacher, batch, gamma, chunk: as for `distillation_loss`.
      weights: `{n: w_n}`, of numbers of paths that the params have.

    Returns:
      As `distillation_loss`: "kl" and "hidden_mse" are those of the most paths, and `kl_<n>` those
      of the others.
    """
    order = sorted(weights)
    students = [first_paths(params, n) for n in order]
    found = _to_teacher(model, students, teacher, batch, gamma, chunk)
    total = sum(weights.values())
    loss = sum((weights[n] / total * own["loss"] for n, own in zip(order, found, strict=True)),
               jnp.zeros((), F32))
    others = {f"kl_{n}": own["kl"] for n, own in zip(order[:-1], found[:-1], strict=True)}
    return {**found[-1], "loss": loss, **others}


def _to_teacher(
    model: nn.Module, students: Sequence[Params], teacher: Params, batch: Batch, gamma: float,
    chunk: int,
) -> list[dict[str, Float[Array, ""]]]:
    """`distillation_loss` of several students, for which the teacher runs once."""
    mask, teacher = _real(batch), jax.lax.stop_gradient(teacher)
    with jax.named_scope("teacher"):
        taught, taught_hidden = _features(model, teacher, batch, hidden_states=gamma > 0)
    found = []
    for params in students:
        heads = head_of(model, params), head_of(model, teacher)
        with jax.named_scope("student"):
            student, student_hidden = _features(model, params, batch, hidden_states=gamma > 0)
        kl, hidden = summed_kl(*heads, student, taught, mask, chunk), jnp.zeros((), F32)
        if gamma > 0:
            hidden = summed_hidden_error(student_hidden, taught_hidden, mask)
        found.append({"loss": kl + gamma * hidden, "kl": kl, "hidden_mse": hidden})
    return found


def dominant_term(kl: float, hidden: float, gamma: float, ratio: float = 100.0) -> str | None:
    """A sentence where one term of `distillation_loss` is `ratio` times the other, else None.

    Args:
      kl: value of the first term.
      hidden: value of the second, without its weight.
      gamma: that weight; with 0 there is one term and nothing to compare.
      ratio: how many times larger counts as dominant.
    """
    weighted = gamma * hidden
    if gamma == 0 or max(kl, weighted) <= ratio * max(min(kl, weighted), 0.0):
        return None
    large, small = ("the hidden-state error", "the KL") if weighted > kl else (
        "the KL", "the hidden-state error")
    return (
        f"the loss is {kl:.4g} of KL and {weighted:.4g} of hidden-state error (gamma {gamma:g}): "
        f"{large} is more than {ratio:g} times {small}, which will hardly matter; "
        f"{'lower' if weighted > kl else 'raise'} gamma"
    )
