"""Whole decoding steps from random weights, packed against dense, through one engine."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import PyTree

from rabit_jax.errors import BadInput
from rabit_jax.experiments.bench import random_weights
from rabit_jax.experiments.bench.shapes import (
    LARGEST_BATCH,
    MODELS,
    model_config,
    numbers,
    positive,
)
from rabit_jax.kernels.bench.machine import free_memory, last_level_cache
from rabit_jax.models.block import Slots, project, rotary_attention
from rabit_jax.models.cache import (
    Stores,
    check_bits,
    empty_stores,
    encode,
    of_kind,
    ring_places,
    ring_slots,
    windowed,
    with_kind,
)
from rabit_jax.models.config import ModelConfig
from rabit_jax.models.decoder import param_shapes
from rabit_jax.models.engine import Cache, head_logits, over_layers, step
from rabit_jax.models.prepared import (
    Engine,
    byte_activations,
    layer_at,
    multiply,
    prepare,
)
from rabit_jax.models.rotary import seen_from
from rabit_jax.progress import progress, say
from rabit_jax.tree import tree_bytes
from rabit_jax.types import Json, Shape
from rabit_jax.weights.sign_paths import PackedSign

T = TypeVar("T")
EXAMPLES = """examples:
  python -m experiments.bench decode --model tinyllama-1.1b --batch 1,2,4,8,16 --save
  python -m experiments.bench decode --model llama2-7b --layers 4 --context 128
"""
# The config of a model, its k (None: dense) and the bits of its head (None: as the others).
Kind: TypeAlias = tuple[ModelConfig, int | None, int | None]
PARTS = ("step", "block linears", "attention", "head")
MEMORY_SHARE = 0.8  # of the free memory, for all models at once
ROTATIONS = 4
COLUMNS = {
    "model": "model", "layers": "layers", "batch": "batch", "context": "context", "impl": "impl",
    "part": "part", "tokens_per_second": "tokens/s", "milliseconds": "ms", "spread": "spread",
    "ratio_to_bf16": "x bf16", "ratio_to_f32": "x f32", "bytes": "bytes",
    "bytes_over_bf16": "bytes/bf16",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("--model", metavar="NAME", default="tinyllama-1.1b",
        help=f"whose sizes: {', '.join(MODELS)} (default tinyllama-1.1b)")
    add("--layers", type=int, help="how many of its layers (default all)")
    add("--batch", metavar="NUMBERS", default="1", help="batch sizes (default 1)")
    add("--k", metavar="NUMBERS", default="2", help="sign paths, 1 to 4 (default 2)")
    add("--context", metavar="NUMBERS", default="128,2048",
        help="tokens before the last one that is generated (default 128,2048)")
    add("--cache-bits", metavar="NUMBERS", default="16",
        help="of keys and values, 16, 8 or 4: the packed models with each, 16 in every case "
             "(default 16)")
    add("--tokens", type=int, default=8, help="tokens of each timed call (default 8)")
    add("--repeats", type=int, default=5, help="timed calls of each row (default 5)")


def measure(options: argparse.Namespace) -> list[Json]:
    """The rows that the command line asks for.

    Raises:
      BadInput: an option out of its range, or too little memory for all models at once.
    """
    changes = {} if options.layers is None else {"n_layers": positive("layers", options.layers)}
    config = model_config(options.model, **changes)
    return decode_rows(
        options.model, config, numbers("batch", options.batch, LARGEST_BATCH),
        numbers("context", options.context, config.max_position), numbers("k", options.k, 4),
        numbers("cache-bits", options.cache_bits, 16), positive("tokens", options.tokens),
        positive("repeats", options.repeats))


def random_engine(config: ModelConfig, k: int | None, head_bits: int | None = None) -> Engine:
    """What `prepare` gives for a model of random weights, made without the params before it.

    Args:
      config: the decoder's.
      k: sign paths of the packed block linears; None means dense ones.
      head_bits: as for `prepare`.
    """
    found: dict[tuple[Shape, np.dtype], jax.Array] = {}

    def fill(leaf):
        kind = leaf.shape, leaf.dtype
        if kind in found:
            return random_weights.another(found[kind])
        return found.setdefault(kind, random_weights.random_like(leaf))

    return jax.tree.map(fill, abstract_engine(config, k, head_bits))


def abstract_engine(config: ModelConfig, k: int | None, head_bits: int | None = None) -> Engine:
    """The shapes and dtypes of `random_engine`."""

    def param(path, shape):
        if k is None or not (path.startswith("layers/") and path.endswith("/kernel")):
            return jax.ShapeDtypeStruct(shape, config.dtype)
        l, i, o = shape
        one = PackedSign.abstract({"in": i, "out": o, "k": k})
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct((l, *a.shape), a.dtype), one)

    params = {path: param(path, shape) for path, shape in param_shapes(config).items()}
    return jax.eval_shape(
        partial(prepare, config, head_bits=head_bits), unflatten_dict(params, sep="/"))


def decode_rows(
    model: str, config: ModelConfig, batches: Sequence[int], contexts: Sequence[int],
    ks: Sequence[int], cache_bits: Sequence[int], tokens: int, repeats: int,
) -> list[Json]:
    """The rows of a model at all batches and contexts.

    Args:
      model: its name, for the rows.
      config: its sizes.
      batches: rows decoded at once.
      contexts: tokens before the last one.
      ks: sign paths, one packed model for each.
      cache_bits: of keys and values, each for the packed models besides 16.
      tokens: of one timed call.
      repeats: timed calls of each model and part.

    Raises:
      BadInput: a context too short for the tokens, or too little memory for all models at once.
    """
    if min(contexts) < tokens:
        raise BadInput(f"--context is {min(contexts)}, wanted at least the {tokens} tokens of one "
                       "timed call, see --tokens")
    packed_dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    kinds: dict[str, Kind] = {
        f"dense_{name}": (replace(config, dtype=dtype), None, None)
        for name, dtype in (("bf16", "bfloat16"), ("f32", "float32"))}
    for k in ks:
        own = replace(config, dtype=packed_dtype)
        kinds |= {f"packed_k{k}": (own, k, None), f"packed_k{k}_head8": (own, k, 8)}
    for bits in cache_bits:
        check_bits(bits)
    engines = make(kinds)
    engines |= {f"packed_k{k}_head8_act8": byte_activations(engines[f"packed_k{k}_head8"])
                for k in ks}
    engines |= {f"packed_k{k}_cache{bits}": replace(engines[f"packed_k{k}"], cache_bits=bits)
                for k in ks for bits in cache_bits if bits != 16}
    places, rows = [(b, c) for b in batches for c in contexts], []
    with progress("decoding", total=len(places) * repeats) as bar:
        for n, (batch, context) in enumerate(places):
            cases = {name: Decoding(engine, batch, context, tokens)
                     for name, engine in engines.items()}
            for done in range(repeats):
                for case in cases.values():
                    case.run()
                bar.update(n * repeats + done + 1, batch=batch, context=context)
            common = {"model": model, "layers": config.n_layers, "batch": batch,
                      "context": context}
            rows += [{**common, **row} for row in rows_of(cases, tokens)]
    return rows


def make(kinds: dict[str, Kind]) -> dict[str, Engine]:
    """The engines by name.

    Raises:
      BadInput: together they take more than `MEMORY_SHARE` of the free memory.
    """
    sizes = {name: tree_bytes(abstract_engine(*kind)) for name, kind in kinds.items()}
    free, total = free_memory(), sum(sizes.values())
    if total > MEMORY_SHARE * free:
        listed = ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in sizes.items())
        raise BadInput(f"the models take {listed}, and {free / 1e9:.1f} GB are free: take fewer "
                       "layers with --layers")
    engines = {name: random_engine(*kind) for name, kind in kinds.items()}
    cache, _ = last_level_cache()
    for name, engine in engines.items():
        if (size := tree_bytes(engine.products)) <= ROTATIONS * cache:
            say(f"{name}: the block linears take {size / 1e6:.0f} MB, no more than {ROTATIONS} "
                f"last-level caches of {cache / 1e6:.0f} MB; part of them may stay there")
    return jax.block_until_ready(engines)


class Decoding:
    """One engine at one batch and context: compiled programs and the seconds of their calls."""

    def __init__(self, engine: Engine, batch: int, context: int, tokens: int) -> None:

        self.engine, self.batch, self.context, self.tokens = engine, batch, context, tokens
        c = engine.config
        self.k, self.v = (random_stores(c, batch, context, engine.cache_bits) for _ in "kv")
        self.heads = {n: random_weights.normal((batch, 1, m, c.head_dim), 1.0, c.dtype)
                      for n, m in (("q", c.n_heads), ("k", c.n_kv_heads), ("v", c.n_kv_heads))}
        self.x = random_weights.normal((batch, 1, c.d_model), 1.0, c.dtype)
        self.token = jnp.zeros(batch, jnp.int32)
        self.seconds: dict[str, list[float]] = {part: [] for part in PARTS}
        self.run()
        self.seconds = {part: [] for part in PARTS}

    def run(self) -> None:
        """One timed call of each part."""
        timed = {"step": self._step, "block linears": self._linears,
                 "attention": self._attention, "head": self._head}
        for part, call in timed.items():
            self.seconds[part].append(call())

    def bytes(self) -> dict[str, int]:
        """Bytes that each part reads."""
        engine = self.engine
        found = {
            "block linears": tree_bytes(engine.products),
            "attention": tree_bytes((self.k, self.v)),
            "head": tree_bytes(engine.embed if engine.head is None else engine.head),
        }
        return {"step": sum(found.values()), **found}

    def _step(self) -> float:
        """Seconds of one token of each row, within a loop of `tokens` of them."""
        start = self.context - self.tokens
        valid = np.tile(np.arange(self.context) < start, (self.batch, 1))
        cache = {"k": self.k, "v": self.v, "valid": jnp.asarray(valid), "length": jnp.int32(start)}
        seconds, (_, cache) = clock(
            decode_tokens, self.engine, self.token, cache, self.tokens)
        self.k, self.v = cache["k"], cache["v"]
        return seconds / self.tokens

    def _linears(self) -> float:
        return clock(block_linears, self.engine, self.x)[0]

    def _attention(self) -> float:
        start = jnp.int32(self.context - 1)
        seconds, (_, self.k, self.v) = clock(
            attention, self.engine, self.heads, self.k, self.v, start, self.context)
        return seconds

    def _head(self) -> float:
        return clock(head, self.engine, self.x[:, 0])[0]


def random_stores(config: ModelConfig, batch: int, context: int, bits: int) -> Stores:
    """Keys or values of all layers, drawn from the normal distribution and kept in `bits`."""
    outline = jax.eval_shape(lambda: empty_stores(config, batch, context, 16))
    stores = jax.tree.map(lambda a: random_weights.normal(a.shape, 1.0, a.dtype), outline)
    if bits == 16:
        return stores
    # Layer by layer, so that no second cache of floats is made.
    return jax.tree.map(lambda a: jax.jit(lambda x: jax.lax.map(
        lambda one: encode(one, bits), x), donate_argnums=0)(a), stores)


def clock(function: Callable[..., T], *arguments: PyTree) -> tuple[float, T]:
    """Seconds of a call until its result is there, and the result."""
    jax.block_until_ready(arguments)
    begin = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return time.perf_counter() - begin, result


def rows_of(cases: dict[str, Decoding], tokens: int) -> list[Json]:
    """The rows of one batch and context; "dense_bf16" and "dense_f32" must be among the cases."""
    medians = {name: {part: statistics.median(times) for part, times in case.seconds.items()}
               for name, case in cases.items()}
    sizes = {name: case.bytes() for name, case in cases.items()}
    rows = []
    for name, case in cases.items():
        for part in PARTS:
            seconds, size = medians[name][part], sizes[name][part]
            lower, upper = np.percentile(case.seconds[part], (25, 75))
            rows.append({
                "impl": name, "part": part, "milliseconds": seconds * 1e3,
                "tokens_per_second": case.batch / seconds if part == "step" else None,
                "ratio_to_bf16": medians["dense_bf16"][part] / seconds,
                "ratio_to_f32": medians["dense_f32"][part] / seconds,
                "spread": float(upper - lower) * 1e3,
                "repeats": len(case.seconds[part]), "tokens": tokens, "bytes": size,
                "bytes_over_bf16": size / sizes["dense_bf16"][part],
            })
    return rows


def remarks(rows: Sequence[Json]) -> list[str]:
    """Lines below the table: how the figures were taken, and where dense float32 overtakes."""
    repeats, tokens = rows[0]["repeats"], rows[0]["tokens"]
    lines = [f"ms: median of {repeats} calls of {tokens} tokens that took turns, spread: their "
             "interquartile range; x: time of the dense model over time of the row"]
    steps = [row for row in rows if row["part"] == "step" and row["impl"].startswith("packed")]
    for impl, context in dict.fromkeys((row["impl"], row["context"]) for row in steps):
        here = sorted((row["batch"], row["ratio_to_f32"]) for row in steps
                      if (row["impl"], row["context"]) == (impl, context))
        slower = [batch for batch, ratio in here if ratio < 1]
        found = f"at batch {slower[0]}" if slower else f"at no batch up to {here[-1][0]}"
        lines.append(f"context {context}: dense_f32 overtakes {impl} {found}")
    return lines


@partial(jax.jit, static_argnums=3, donate_argnums=2)
def decode_tokens(engine: Engine, token: jax.Array, cache: Cache, count: int) -> tuple:
    """`count` more tokens, the likeliest each: the last `[b]`, and the cache."""
    def one(_, state):
        logits, cache = step(engine, state[0][:, None], state[1])
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

    return jax.lax.fori_loop(0, count, one, (token, cache))


@jax.jit
def block_linears(engine: Engine, x: jax.Array) -> jax.Array:
    """The linears of all blocks in turn, without attention: `x: [b, 1, d]` -> the same."""
    def block(layer, x):
        attn, mlp = (layer_at(engine, layer.number)[side] for side in ("attn", "mlp"))
        multiplied = partial(project, config=engine.config, multiply=multiply)
        q, k, v = multiplied(attn, ("q", "k", "v"), x)
        # A trace of k and v, or the compiler would leave them out.
        trace = 1e-3 * (jnp.mean(k, axis=-1, keepdims=True) + jnp.mean(v, axis=-1, keepdims=True))
        x = multiplied(attn, ("o",), q)[0] + trace
        gate, up = multiplied(mlp, ("gate", "up"), x)
        x = multiplied(mlp, ("down",), jax.nn.silu(gate) * up)[0]
        # Kept at size 1 through any number of layers, as norms and residuals do.
        size = jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True))
        return (x.astype(jnp.float32) / (size + 1e-6)).astype(x.dtype)

    return over_layers(engine, block, x)


@partial(jax.jit, donate_argnums=(2, 3), static_argnums=5)
def attention(
    engine: Engine, heads: dict[str, jax.Array], k: Stores, v: Stores, start: jax.Array,
    slots: int,
) -> tuple[jax.Array, Stores, Stores]:
    """Rotation, cache and attention of all blocks for one token at slot `start`.

    Args:
      engine: for its config and how it goes through its layers.
      heads: `q`, `k`, `v` `[b, 1, heads, h]` of the new token.
      k, v: the cache.
      start: int32 scalar.
      slots: of the cache.

    Returns:
      `[b, 1, n g h]` and the cache.
    """
    c, places, ring = engine.config, jnp.arange(slots), None
    if windowed(c):
        own = ring_places(start, ring_slots(c, slots))
        ring = own, own[None] >= 0
    context = seen_from(c, start[None, None], start[None], places, places[None] >= 0, ring=ring)

    def block(layer, carry):
        # Each layer's queries are the result of the layer before it, so that the compiler can
        # neither leave out nor move any of them.
        q, k, v = carry
        here = Slots(of_kind(k, layer.local), of_kind(v, layer.local), layer.own, start,
                     layer.local)
        y, here = rotary_attention(
            q, heads["k"], heads["v"], context.view(layer.local), c, here)
        return y, with_kind(k, layer.local, here.k), with_kind(v, layer.local, here.v)

    y, k, v = over_layers(engine, block, (heads["q"], k, v))
    return y.reshape(*y.shape[:2], -1), k, v


@jax.jit
def head(engine: Engine, x: jax.Array) -> jax.Array:
    """The likeliest token `[b]` of `x: [b, d]`."""
    return jnp.argmax(head_logits(engine, x), axis=-1)
