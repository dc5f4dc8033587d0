"""Text generation: prefill, then one token at a time from a key-value cache, all on the device."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from rabit_jax.errors import BadInput
from rabit_jax.models.decoder import Decoder, config_of
from rabit_jax.models.engine import Cache, init_cache, step
from rabit_jax.models.prepared import Engine, prepare
from rabit_jax.tree import pytree_dataclass
from rabit_jax.types import Array, Params

# Tokens that the device makes before the host sees them.
CHUNK = 16
HOTTEST = 1e6  # a temperature that already takes every token alike
COLDEST = 1e-6  # logits divided by less could overflow; below it the likeliest token is sure


class Choice(NamedTuple):
    """Static settings of the compiled loop: the mode of `pick`, and the tokens that end a row."""

    mode: str
    eos: tuple[int, ...]


@pytree_dataclass
class State:
    """The state of the loop after a token.

    Attributes:
      count: how many new tokens there are.
      token: the last one of each row.
      done: which rows have ended.
      broken: which new token had logits that are not finite, counted from 1; 0 for none.
      cache: of `step`.
      key: for the next token.
    """

    count: Int[Array, ""]
    token: Int[Array, " b"]
    done: Bool[Array, " b"]
    broken: Int[Array, ""]
    cache: Cache
    key: Array


def generate(
    model: Decoder,
    params: Params | Engine,
    tokens: Int[Array | np.ndarray, "b t"],
    mask: Bool[Array | np.ndarray, "b t"] | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: Array | None = None,
    eos_ids: Sequence[int] = (),
) -> Int[Array, "b n"]:
    """Continues a batch of prompts; params may be dense, in training form, packed or prepared.

    Args:
      model: the decoder; `model.config.eos_ids` holds its own end tokens.
      params: its params tree, or what `prepare` made of it: for more than one call, prepare once.
      tokens: prompts, shorter ones padded on the left.
      mask: True for real tokens; None means all real.
      max_new_tokens: number of tokens to append, at least 1.
      temperature: 0 takes the likeliest token; else samples from `softmax(logits / temperature)`.
      top_p: samples only from the smallest set of likeliest tokens whose probability reaches it.
      key: for sampling; the same key gives the same text.
      eos_ids: a row ends at any of these, and the loop when all rows have ended.

    Returns:
      int32, `n = max_new_tokens`; after its end a row is filled with the first of `eos_ids`, or
      with 0.

    Raises:
      BadInput: an empty prompt, padding on the right, token ids outside the vocabulary, more
        tokens than the model has positions, settings out of range, params that do not fit the
        model, or logits that are not finite.

    Example:
      >>> engine = prepare(model.config, params)
      >>> generate(model, engine, jnp.array([[1, 5, 9]]), max_new_tokens=4).shape
      (1, 4)
    """
    settings = (max_new_tokens, temperature, top_p, key, eos_ids)
    chunks = stream(model, params, tokens, mask, *settings, chunk=max_new_tokens)
    out = np.concatenate(list(chunks), axis=1)
    fill = _fill(tuple(eos_ids))
    missing = max_new_tokens - out.shape[1]
    return jnp.asarray(np.pad(out, ((0, 0), (0, missing)), constant_values=fill))


def stream(
    model: Decoder,
    params: Params | Engine,
    tokens: Int[Array | np.ndarray, "b t"],
    mask: Bool[Array | np.ndarray, "b t"] | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: Array | None = None,
    eos_ids: Sequence[int] = (),
    chunk: int = CHUNK,
) -> Iterator[np.ndarray]:
    """The tokens of `generate` as they come: the first after the prefill, then chunk by chunk.

    Args:
      chunk: how many tokens the device makes before the host sees them.
      model, params, tokens, mask, max_new_tokens, temperature, top_p, key, eos_ids: as for
        `generate`.

    Returns:
      An iterator over int32 `[b, n]`, n = 1 at first and then at most `chunk`; it ends with
      `max_new_tokens` or when all rows have ended. Rows that end before others are filled.

    Raises:
      BadInput: as `generate`; logits that are not finite raise at the chunk that holds them.

    Example:
      >>> for new in stream(model, params, tokens, eos_ids=model.config.eos_ids):
      ...     print(new.tolist())
    """
    prompt, real = _prompt(model, tokens, mask, max_new_tokens)
    if not 0 <= temperature <= HOTTEST or not 0 < top_p <= 1:
        raise BadInput(f"temperature {temperature} and top_p {top_p}: wanted 0 <= temperature <= "
                       f"{HOTTEST:g} and 0 < top_p <= 1")
    if chunk < 1:
        raise BadInput(f"chunk is {chunk}, wanted at least 1 token")
    if temperature > 0 and key is None:
        raise BadInput("sampling with temperature > 0 wants a key, such as jax.random.key(0)")
    key = jax.random.key(0) if key is None else key
    if not isinstance(key, jax.Array):
        raise BadInput(f"key is {key!r}, wanted a key such as jax.random.key(0)")
    try:
        ends = tuple(map(operator.index, eos_ids))
    except TypeError:
        raise BadInput(f"eos_ids are {eos_ids!r}, wanted a list of token ids") from None
    mode = "greedy" if temperature < COLDEST else ("sample" if top_p == 1 else "nucleus")
    choice = Choice(mode, ends)
    engine = params if isinstance(params, Engine) else prepare(model.config, params)
    heat = jnp.float32(temperature), jnp.float32(top_p)
    return _chunks(engine, prompt, real, key, heat, choice, max_new_tokens, chunk)


def _chunks(
    engine: Engine, tokens: np.ndarray, mask: np.ndarray, key: Array,
    heat: tuple[Array, Array], choice: Choice, most: int, chunk: int,
) -> Iterator[np.ndarray]:
    """The body of `stream`; `heat` is temperature and top_p."""
    state = _prefill(engine, tokens, mask, key, heat, choice, tokens.shape[1] + most)
    new, made, done = _fetch(engine, state.token[:, None], state)
    yield new
    while made < most and not done:
        stop, before = np.int32(min(made + chunk, most)), made
        new, state = _extend(engine, state, heat, stop, choice, chunk)
        new, made, done = _fetch(engine, new, state)
        yield new[:, : made - before]


@functools.partial(jax.jit, static_argnames=("choice", "slots"))
def _prefill(
    engine: Engine, tokens: Array, mask: Array, key: Array,
    heat: tuple[Array, Array], choice: Choice, slots: int,
) -> State:
    """The state after the first new token."""
    b = tokens.shape[0]
    zero = jnp.int32(0)
    cache = init_cache(engine.config, b, slots, engine.cache_bits)
    empty = State(zero, jnp.zeros(b, jnp.int32), jnp.zeros(b, bool), zero, cache, key)
    return _advance(engine, empty, tokens, mask, heat, choice)


@functools.partial(jax.jit, static_argnames=("choice", "chunk"), donate_argnames="state")
def _extend(
    engine: Engine, state: State, heat: tuple[Array, Array], stop: Array,
    choice: Choice, chunk: int,
) -> tuple[Array, State]:
    """At most `chunk` more tokens, `[b, chunk]` int32, until the count is `stop`; the new state.

    The cache is donated: the loop writes it in place from one call to the next.
    """
    first = state.count
    new = jnp.full((state.token.shape[0], chunk), _fill(choice.eos), jnp.int32)

    def unfinished(carry: tuple[Array, State]) -> Array:
        state = carry[1]
        return (state.count < stop) & ~state.done.all() & (state.broken == 0)

    def extend(carry: tuple[Array, State]) -> tuple[Array, State]:
        new, state = carry
        after = _advance(engine, state, state.token[:, None], None, heat, choice)
        at = (0, state.count - first)
        return jax.lax.dynamic_update_slice(new, after.token[:, None], at), after

    return jax.lax.while_loop(unfinished, extend, (new, state))


def _advance(
    engine: Engine, state: State, tokens: Array, mask: Array | None,
    heat: tuple[Array, Array], choice: Choice,
) -> State:
    """The state after `tokens: [b, t]` are in the cache and one more token is chosen."""
    key, now = jax.random.split(state.key)
    logits, cache = step(engine, tokens, state.cache, mask)
    token = jnp.where(state.done, _fill(choice.eos), pick(logits, now, choice.mode, *heat))
    count = state.count + 1
    finite = jnp.isfinite(logits).all(axis=-1) | state.done
    broken = jnp.where(finite.all(), state.broken, count)
    ended = (token[:, None] == jnp.array(choice.eos, jnp.int32)[None]).any(axis=1)
    return State(count, token, state.done | ended, broken, cache, key)


def _fill(eos: tuple[int, ...]) -> int:
    return eos[0] if eos else 0


def _fetch(engine: Engine, new: Array, state: State) -> tuple[np.ndarray, int, bool]:
    """New tokens, the count of all new tokens, and whether all rows have ended, on the host.

    Raises:
      BadInput: logits that were not finite.
    """
    found = jax.device_get((new, state.count, state.done, state.broken))
    tokens, count, done, broken = map(np.asarray, found)
    if broken:
        raise BadInput(f"the logits hold NaN or infinity at new token {broken}: the weights are "
                       f"damaged or overflow {engine.config.dtype}, pack or load them again")
    return tokens, int(count), bool(done.all())


def _prompt(
    model: Decoder, tokens: ArrayLike, mask: ArrayLike | None, max_new_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """The prompts and their mask as `[b, t]` int32 and bool, checked."""
    c = config_of(model)
    try:
        tokens = np.asarray(tokens)
    except ValueError:
        raise BadInput("prompts are lists of different lengths, wanted [b, t]: pad them on the "
                       "left and give a mask") from None
    if tokens.dtype.kind not in "iu" and tokens.size:
        raise BadInput(f"a prompt is {_kind(tokens)}, wanted token ids [b, t]: encode it first, "
                       "such as tokenizer([text], return_tensors='np')['input_ids']")
    if tokens.ndim != 2 or not tokens.size:
        raise BadInput(f"empty prompt: tokens have shape {tokens.shape}, wanted [b, t] with at "
                       "least one token in each row")
    mask = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask, bool)
    if mask.shape != tokens.shape or not mask[:, -1].all():
        raise BadInput(f"mask {mask.shape} for prompts {tokens.shape}: wanted the same shape, rows "
                       "padded on the left and none empty")
    if tokens.min() < 0 or tokens.max() >= c.vocab_size:
        raise BadInput(f"prompt holds token id {tokens.max()} or {tokens.min()}, the vocabulary "
                       f"has 0..{c.vocab_size - 1}; use the model's own tokenizer")
    longest = int(mask.sum(axis=1).max())
    if not isinstance(max_new_tokens, int | np.integer):
        raise BadInput(f"max_new_tokens is {max_new_tokens!r}, wanted an integer")
    if max_new_tokens < 1 or longest + max_new_tokens > c.max_position:
        raise BadInput(f"{longest} prompt tokens and {max_new_tokens} new ones, the model has "
                       f"{c.max_position} positions and makes at least 1; ask for fewer")
    return tokens.astype(np.int32), mask


def _kind(tokens: np.ndarray) -> str:
    return "text" if tokens.dtype.kind in "US" else f"of {tokens.dtype}"


def pick(
    logits: Float[Array, "b v"], key: Array, mode: str, temperature: Array, top_p: Array
) -> Int[Array, " b"]:
    """One token for each row of float32 logits.

    `mode` is "greedy" (argmax), "sample" (all of `softmax(logits / temperature)`) or "nucleus"
    (its likeliest tokens until their probability reaches `top_p`, renormalised).
    """
    if mode == "greedy":
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature
    if mode == "sample":
        return jax.random.categorical(key, logits).astype(jnp.int32)
    order = jnp.argsort(logits, axis=-1, descending=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    p = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(p, axis=-1) - p
    # The likeliest token always stays, whatever rounding does to its `before`.
    keep = (before < top_p) | (jnp.arange(p.shape[-1]) == 0)[None]
    rank = jax.random.categorical(key, jnp.where(keep, ranked, -jnp.inf))
    return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)
