"""Continuous batching: sequences of different lengths and settings that are continued together.

`read` puts a prompt into a cache of one sequence, piece by piece, `read_together` several short
ones; `admit` gives a prompt a row of the batch; `decode` makes some tokens for all rows; `resize`
moves the rows into a batch of another size. All are pure functions. Sequences begin at slot 0 of
their row and padding stands behind them, so a query sees the slots up to its own position and no
mask is kept.

Axes: b rows of the batch, t time, n key heads, h head_dim, s cache slots, l layers, v vocabulary,
e end tokens, m tokens made by one call, p prompts read together, r reported alternatives.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Bool, Float, Int

from rabit_jax.models.block import Slots, rms_norm
from rabit_jax.models.cache import (
    ByKind,
    Store,
    Stores,
    empty_stores,
    ring_places,
    ring_slots,
    windowed,
)
from rabit_jax.models.config import ModelConfig
from rabit_jax.models.engine import head_logits, through
from rabit_jax.models.generation import COLDEST
from rabit_jax.models.prepared import Engine
from rabit_jax.models.rotary import Context, View, angles, frequencies, local_frequencies
from rabit_jax.tree import pytree_dataclass
from rabit_jax.types import Array

ALTERNATIVES = 20  # tokens whose log-probabilities are reported beside that of the chosen one
NOTHING = -1  # in place of a token where a row made none


@pytree_dataclass
class Sampling:
    """How each row chooses its tokens.

    Attributes:
      key: PRNG keys; the token after `n` others is drawn with `fold_in(key, n)`, so that a row's
        text depends on its own key and logits alone.
      temperature: 0 takes the likeliest token; else samples from `softmax(logits / temperature)`.
      top_p: samples only from the likeliest tokens whose probability reaches it.
      report: whether log-probabilities are computed.
    """

    key: Array
    temperature: Float[Array, " b"]
    top_p: Float[Array, " b"]
    report: Bool[Array, " b"]


@pytree_dataclass
class Sequences:
    """The rows of a batch. A row with `left == 0` is free, or has ended: nothing reads it.

    Attributes:
      k, v: the cache.
      slots: of its layers without a window.
      length: tokens in the cache, and so the slot that is written next.
      token: the last token that was chosen, which is not in the cache yet.
      left: how many tokens are still to be made.
      made: how many have been made.
      sampling: how they are chosen.
    """

    k: Stores
    v: Stores
    length: Int[Array, " b"]
    token: Int[Array, " b"]
    left: Int[Array, " b"]
    made: Int[Array, " b"]
    sampling: Sampling
    slots: int = struct.field(pytree_node=False)


@pytree_dataclass
class Made:
    """What one call made.

    Attributes:
      tokens: `NOTHING` where a row made none.
      logprob: natural logarithm of each token's probability at temperature 1; 0 in rows that do not
        report.
      top, top_logprobs: the likeliest tokens, and the logarithms of theirs.
      broken: rows that ended because their logits were not finite.
    """

    tokens: Int[Array, "b m"]
    logprob: Float[Array, "b m"]
    top: Int[Array, "b m r"]
    top_logprobs: Float[Array, "b m r"]
    broken: Bool[Array, " b"]


@pytree_dataclass
class Cache:
    """Keys and values of one sequence, `[l, 1, n, s, h]` each, and the slots of its layers without
    a window."""

    k: Stores
    v: Stores
    slots: int = struct.field(pytree_node=False)


class Places(Slots):
    """`Slots` of which each row writes at its own place: `start` is `[b]`."""

    __slots__ = ()

    def _write(self, cache: Array, new: Array) -> Array:
        """`cache[layer, b, :, start[b]] = new[b, :, 0]`, in place."""
        start = self.start % cache.shape[3] if self.ring else self.start
        # A free row may stand behind its last slot, where nothing is written.
        return cache.at[self.layer, jnp.arange(new.shape[0]), :, start].set(
            new[:, :, 0], mode="drop", unique_indices=True)


def empty(config: ModelConfig, rows: int, slots: int, bits: int = 16) -> Sequences:
    """Free rows; take the config and the `cache_bits` of the engine."""
    k, v = (empty_stores(config, rows, slots, bits) for _ in "kv")
    sampling = Sampling(
        jax.random.split(jax.random.key(0), rows), jnp.zeros(rows), jnp.ones(rows),
        jnp.zeros(rows, bool))
    # An array for each field, because calls donate them.
    length, token, left, made = (jnp.zeros(rows, jnp.int32) for _ in range(4))
    return Sequences(k, v, length, token, left, made, sampling, slots)


def empty_cache(config: ModelConfig, slots: int, bits: int = 16) -> Cache:
    """The cache of a sequence without tokens."""
    k, v = (empty_stores(config, 1, slots, bits) for _ in "kv")
    return Cache(k, v, slots)


@functools.partial(jax.jit, donate_argnames="cache")
def read(
    engine: Engine, cache: Cache, tokens: Int[Array, "1 t"], start: Int[Array, ""],
    count: Int[Array, ""],
) -> tuple[Float[Array, "1 v"], Cache]:
    """Reads a piece of a prompt.

    Args:
      engine: from `prepare`.
      cache: holds the pieces before; `start + t` must not exceed its slots.
      tokens: the piece, padded behind, of at most `cache.PIECE` tokens.
      start: tokens of the pieces before.
      count: real tokens of this piece, at least 1.

    Returns:
      float32 logits of the last real token, and the cache with the piece in it.
    """
    position = start + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    context = seen_behind(engine.config, position, cache.slots)
    x, k, v = through(engine, tokens, context, cache.k, cache.v, start)
    last = jax.lax.dynamic_index_in_dim(x, count - 1, axis=1, keepdims=False)
    return _logits(engine, last), Cache(k, v, cache.slots)


@jax.jit
def read_together(
    engine: Engine, tokens: Int[Array, " t"], prompt: Int[Array, " t"], start: Int[Array, " p"],
    count: Int[Array, " p"],
) -> tuple[Float[Array, "p v"], Bool[Array, ""], Cache]:
    """Reads several whole prompts, one behind the other in one sequence.

    Each sees itself alone, so nothing is computed but their own tokens and the padding behind the
    last.

    Args:
      engine: from `prepare`.
      tokens: of all prompts, padded behind, at most `cache.PIECE`.
      prompt: number of the prompt of each token; padding belongs to the last.
      start: where each prompt begins.
      count: its tokens, at least 1.

    Returns:
      float32 logits of the last token of each prompt; whether all are finite, for what is not in
      one prompt would be in all; and the cache of the sequence, for `one_of`.
    """
    c, t = engine.config, tokens.shape[0]
    place = jnp.arange(t, dtype=jnp.int32)
    position = (place - start[prompt])[None]
    behind = place[:, None] - place[None, :]
    allowed = ((behind >= 0) & (prompt[:, None] == prompt[None, :]))[None, None]
    context = Context(View(*angles(position, frequencies(c)), allowed))
    if windowed(c):
        assert c.window is not None
        near = allowed & (behind < c.window)[None, None]
        context = Context(context.full, View(*angles(position, local_frequencies(c)), near))
    k, v = (empty_stores(c, 1, t, engine.cache_bits) for _ in "kv")
    x, k, v = through(engine, tokens[None], context, k, v, jnp.int32(0))
    logits = _logits(engine, x[0, start + count - 1])
    return logits, jnp.isfinite(logits).all(), Cache(k, v, t)


@functools.partial(jax.jit, static_argnames=("config", "slots"))
def one_of(
    config: ModelConfig, logits: Float[Array, "p v"], cache: Cache, prompt: Int[Array, ""],
    start: Int[Array, " p"], count: Int[Array, " p"], slots: int,
) -> tuple[Float[Array, "1 v"], Cache]:
    """The logits of one of the prompts of `read_together`, and a cache of so many slots, no fewer
    than its own, that holds it alone. The config is that of the engine."""
    own = jnp.arange(cache.slots) < count[prompt]

    def moved(a: Array, slots: int) -> Array:
        a = jnp.roll(a, -start[prompt], axis=3)
        return _resized(jnp.where(own[:, None], a, jnp.zeros((), a.dtype)), slots)

    k, v = (_by_kind(config, stores, slots, moved) for stores in (cache.k, cache.v))
    return logits[prompt][None], Cache(k, v, slots)


@functools.partial(jax.jit, donate_argnames="batch")
def admit(
    batch: Sequences, row: Int[Array, ""], cache: Cache, logits: Float[Array, "1 v"],
    length: Int[Array, ""], sampling: Sampling, most: Int[Array, ""], ends: Int[Array, " e"],
) -> tuple[Sequences, Made]:
    """Gives a prompt that was read a row, and chooses its first token.

    Args:
      batch: its caches have at least as many slots as `cache`.
      row: a free row.
      cache, logits: of the whole prompt, from `read` or `one_of`.
      length: tokens of the prompt.
      sampling: of the new row, with an axis of one.
      most: how many tokens are to be made, at least 1.
      ends: tokens that end a row.

    Returns:
      The batch, and the first token as `Made` of one row.
    """
    # A ring that is smaller than that of the batch has not gone round yet.
    def joined(old: Stores, new: Stores) -> Stores:
        return jax.tree.map(
            lambda a, b: jax.lax.dynamic_update_slice(a, b, (0, row, 0, 0, 0)), old, new)

    k, v = joined(batch.k, cache.k), joined(batch.v, cache.v)
    first = jnp.zeros(1, jnp.int32)
    token, made, left = _choose(logits, sampling, first, most[None], ends)
    put = functools.partial(jax.tree.map, lambda old, new: old.at[row].set(new))
    return Sequences(
        k, v, put(batch.length, length), put(batch.token, token[0]), put(batch.left, left[0]),
        put(batch.made, 1), put(batch.sampling, jax.tree.map(lambda a: a[0], sampling)),
        batch.slots,
    ), Made(made.tokens[:, None], made.logprob[:, None], made.top[:, None],
            made.top_logprobs[:, None], made.broken)


@functools.partial(jax.jit, static_argnames="steps", donate_argnames="batch")
def decode(
    engine: Engine, batch: Sequences, ends: Int[Array, " e"], steps: int
) -> tuple[Sequences, Made]:
    """At most `steps` tokens more for each row that is not at its end.

    Every such row must have so many free slots. Free rows are computed with the others, which costs
    their share and changes nothing.
    """
    def unfinished(carry: tuple[Array, Sequences, Made]) -> Array:
        return (carry[0] < steps) & (carry[1].left > 0).any()

    def further(carry: tuple[Array, Sequences, Made]) -> tuple[Array, Sequences, Made]:
        count, batch, all_made = carry
        batch, made = _step(engine, batch, ends)
        def put(name: str) -> Array:
            return getattr(all_made, name).at[:, count].set(getattr(made, name))

        return count + 1, batch, Made(
            put("tokens"), put("logprob"), put("top"), put("top_logprobs"),
            all_made.broken | made.broken)

    rows, r = batch.token.shape[0], min(ALTERNATIVES, engine.config.vocab_size)
    nothing = Made(
        jnp.full((rows, steps), NOTHING, jnp.int32), jnp.zeros((rows, steps)),
        jnp.zeros((rows, steps, r), jnp.int32), jnp.zeros((rows, steps, r)),
        jnp.zeros(rows, bool))
    _, batch, made = jax.lax.while_loop(unfinished, further, (jnp.int32(0), batch, nothing))
    return batch, made


@functools.partial(jax.jit, static_argnames=("config", "slots"))
def resize(
    config: ModelConfig, batch: Sequences, source: Int[Array, " c"], kept: Int[Array, ""],
    slots: int,
) -> Sequences:
    """A batch of c rows with `slots` slots: row i is row `source[i]`, free from `kept` on.

    No kept row may hold more tokens than there are slots. The config is that of the engine.
    """
    def moved(a: Array, slots: int) -> Array:
        return _resized(a[:, source], slots)

    rows = jax.tree.map(lambda a: a[source], dataclasses.replace(batch, k=None, v=None))
    left = jnp.where(jnp.arange(source.shape[0]) < kept, rows.left, 0)
    k, v = (_by_kind(config, stores, slots, moved) for stores in (batch.k, batch.v))
    return dataclasses.replace(rows, k=k, v=v, left=left, slots=slots)


def _by_kind(
    config: ModelConfig, stores: Stores, slots: int, move: Callable[[Array, int], Array]
) -> Stores:
    """`move(array, slots)` for all arrays of the stores, those of rings with the slots of a ring.

    A ring changes its size only where it has not gone round.
    """
    def moved(store: Store, slots: int) -> Store:
        return jax.tree.map(lambda a: move(a, slots), store)

    if not isinstance(stores, ByKind):
        return moved(stores, slots)
    full = None if stores.full is None else moved(stores.full, slots)
    return ByKind(full, moved(stores.local, ring_slots(config, slots)))


def _resized(a: Array, slots: int) -> Array:
    """`[l, b, n, s, ...]` with so many slots; zeros fill those behind."""
    a = a[:, :, :, :slots]
    return jnp.pad(a, ((0, 0), (0, 0), (0, 0), (0, slots - a.shape[3]), (0, 0)))


@functools.partial(jax.jit, donate_argnames="batch")
def stop(batch: Sequences, row: Int[Array, ""]) -> Sequences:
    """The batch with a row ended."""
    return dataclasses.replace(batch, left=batch.left.at[row].set(0))


def _step(engine: Engine, batch: Sequences, ends: Array) -> tuple[Sequences, Made]:
    """One token more for each row that is not at its end."""
    context = seen_behind(engine.config, batch.length[:, None], batch.slots)
    x, k, v = through(engine, batch.token[:, None], context, batch.k, batch.v, batch.length, Places)
    token, made, left = _choose(_logits(engine, x[:, 0]), batch.sampling, batch.made, batch.left,
                                ends)
    runs = (batch.left > 0).astype(jnp.int32)
    return dataclasses.replace(
        batch, k=k, v=v, length=batch.length + runs, token=token, left=left,
        made=batch.made + runs), made


def seen_behind(config: ModelConfig, position: Int[Array, "b t"], slots: int) -> Context:
    """The context of queries that see the slots of their row up to their own position, which are
    consecutive in a row.

        full: key <= position;   local: also key > position - window
    """
    behind = position[:, None, :, None] - jnp.arange(slots, dtype=jnp.int32)[None, None, None]
    allowed = behind >= 0
    full = View(*angles(position, frequencies(config)), allowed)
    if config.window is None or not any(config.local_layers):
        return Context(full)
    places = ring_places(position[:, -1], ring_slots(config, slots))[:, None, None, :]
    behind = position[:, None, :, None] - places
    near = (behind >= 0) & (behind < config.window) & (places >= 0)
    return Context(full, View(*angles(position, local_frequencies(config)), near))


def _logits(engine: Engine, x: Float[Array, "b d"]) -> Float[Array, "b v"]:
    return head_logits(engine, rms_norm(x, engine.final_norm, engine.config))


def _choose(
    logits: Float[Array, "b v"], sampling: Sampling, count: Int[Array, " b"],
    left: Int[Array, " b"], ends: Int[Array, " e"],
) -> tuple[Int[Array, " b"], Made, Int[Array, " b"]]:
    """The next token of each row, what is told of it (without the axis m), and what is left then.

    `count` is how many tokens each row has made before.
    """
    runs = left > 0
    broken = runs & ~jnp.isfinite(logits).all(axis=-1)
    token = pick_by_row(logits, sampling, count)
    ended = (token[:, None] == ends[None]).any(axis=1) | broken
    r = min(ALTERNATIVES, logits.shape[-1])

    def told() -> tuple[Array, Array, Array]:
        logs = jax.nn.log_softmax(logits, axis=-1)
        top_logs, top = jax.lax.top_k(logs, r)
        own = jnp.take_along_axis(logs, token[:, None], axis=1)[:, 0]
        return own, top.astype(jnp.int32), top_logs

    def untold() -> tuple[Array, Array, Array]:
        rows = token.shape[0]
        return jnp.zeros(rows), jnp.zeros((rows, r), jnp.int32), jnp.zeros((rows, r))

    own, top, top_logs = jax.lax.cond((runs & sampling.report).any(), told, untold)
    made = Made(jnp.where(runs & ~broken, token, NOTHING), own, top, top_logs, broken)
    return token, made, jnp.where(runs & ~ended, left - 1, 0)


def pick_by_row(
    logits: Float[Array, "b v"], sampling: Sampling, count: Int[Array, " b"]
) -> Int[Array, " b"]:
    """One token for each row by its own settings.

        argmax_v (logits_v / temperature + G_v),  G_v = -log(-log(U_v))

    over the tokens that `top_p` keeps, with one G for each token of the vocabulary, so that what
    other rows want changes nothing. Tokens as likely as the last kept one are kept too. Source of
    the Gumbel-max draw: Maddison et al., A* Sampling, arXiv 1411.0030.
    """
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    warm = sampling.temperature > 0

    def drawn() -> Array:
        heat = jnp.maximum(sampling.temperature, COLDEST)
        scaled = logits / heat[:, None]
        narrow = (warm & (sampling.top_p < 1)).any()
        scaled = jax.lax.cond(narrow, _nucleus, lambda a, p: a, scaled, sampling.top_p)
        keys = jax.vmap(jax.random.fold_in)(sampling.key, count)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
        token = jnp.argmax(scaled + noise, axis=-1).astype(jnp.int32)
        return jnp.where(warm, token, likeliest)

    return jax.lax.cond(warm.any(), drawn, lambda: likeliest)


def _nucleus(logits: Float[Array, "b v"], top_p: Float[Array, " b"]) -> Float[Array, "b v"]:
    """The logits with -inf for all but the likeliest tokens whose probability reaches `top_p`."""
    ranked = jnp.sort(logits, axis=-1, descending=True)
    p = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(p, axis=-1) - p
    # With top_p = 1 all stay, whatever rounding does to the sum; the likeliest always stays.
    keep = (before < top_p[:, None]) | (top_p[:, None] >= 1) | (jnp.arange(p.shape[-1]) == 0)[None]
    least = jnp.min(jnp.where(keep, ranked, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)
