"""What a key-value cache of 8 or 4 bits costs: perplexity, bytes, and time of a token.

Every window is read through the decode engine in pieces of 256 tokens, so that each piece attends
to the keys and values of the cache, its own included, as generated text does.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from rabit_jax.errors import BadInput
from rabit_jax.evaluate.texts import check_name, read_text, text_windows
from rabit_jax.experiments.bench.shapes import numbers, positive
from rabit_jax.experiments.engine.evaluation import load_subject
from rabit_jax.formats.tokenizer import check_ids
from rabit_jax.models.block import native_attention, rms_norm
from rabit_jax.models.cache import PIECE, check_bits, of_kind
from rabit_jax.models.config import ModelConfig
from rabit_jax.models.engine import Cache, advance, head_logits, init_cache, step
from rabit_jax.models.prepared import Engine, prepare
from rabit_jax.progress import progress
from rabit_jax.tree import tree_bytes
from rabit_jax.types import Array, Json

EXAMPLES = """examples:
  python -m experiments.bench cache --model runs/mine/packed --text file:my.txt --context 8192
  RABIT_NATIVE=0 python -m experiments.bench cache --model model.gguf --text wikitext2 \\
      --cache-bits 16,8
"""
COLUMNS = {"cache_bits": "bits", "context": "context", "windows": "windows", "ppl": "perplexity",
           "bytes": "bytes", "bytes_ratio": "of 16 bits", "milliseconds": "ms a token",
           "attention": "attention"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="as for experiments.evaluate")
    add("--text", required=True, metavar="NAME", help="as --ppl of experiments.evaluate")
    add("--context", type=int, default=8192, help="tokens of a window (default %(default)s)")
    add("--windows", type=int, default=1, help="windows of the text (default %(default)s)")
    add("--cache-bits", metavar="NUMBERS", default="16,8,4",
        help="bits of keys and values (default %(default)s)")
    add("--repeats", type=int, default=9,
        help="timed tokens at the end of a window (default %(default)s)")


def measure(options: argparse.Namespace) -> list[Json]:
    """A row for each number of bits.

    Raises:
      BadInput: an option out of its range, or a model or text that cannot be used.
    """
    bits = numbers("cache-bits", options.cache_bits, 16)
    for one in bits:
        check_bits(one)
    windows, repeats = positive("windows", options.windows), positive("repeats", options.repeats)
    context = positive("context", options.context)
    if context < 2:
        raise BadInput("--context is 1, wanted at least 2 tokens")
    check_name(options.text)
    documents = read_text(options.text)
    subject = load_subject(options.model)
    config = subject.model.config
    if context > config.max_position:
        raise BadInput(f"--context is {context}, the model has {config.max_position} positions: "
                       "give a smaller one")
    cut = text_windows(options.text, documents, subject.tokenizer, context, windows,
                       lambda done, total: None, None)
    check_ids(cut.tokens, subject.tokenizer, config.vocab_size)
    engine = prepare(config, subject.params)
    rows = []
    with progress("windows", len(bits) * len(cut.tokens)) as bar:
        for one in bits:
            own, nats = dataclasses.replace(engine, cache_bits=one), []
            for row in cut.tokens:
                found, cache = window_nats(own, jnp.asarray(row, jnp.int32)[None])
                nats.append(found)
                bar.update(len(rows) * len(cut.tokens) + len(nats), cache_bits=one)
            loss = sum(nats) / (len(nats) * (context - 1))
            rows.append({
                "model": str(options.model), "cache_bits": one, "context": context,
                "windows": len(nats), "nats_per_token": loss, "ppl": float(np.exp(loss)),
                "bytes": tree_bytes((cache["k"], cache["v"])),
                "milliseconds": 1e3 * token_seconds(own, cache, context, repeats),
                "repeats": repeats, "attention": how(own, cache),
            })
    # Floats of a CPU are of 32 bits: the ratio is to what 16 bits would take.
    c = engine.config
    first = init_bytes(c, context)
    return [{**row, "bytes_ratio": row["bytes"] / first} for row in rows]


def init_bytes(config: ModelConfig, context: int) -> float:
    """Bytes of the keys and values of one sequence in 16 bits."""
    cache = jax.eval_shape(partial(init_cache, config, 1, context))
    return sum(2.0 * a.size for a in jax.tree.leaves((cache["k"], cache["v"])))


def window_nats(engine: Engine, tokens: Int[Array, "1 t"]) -> tuple[float, Cache]:
    """Summed cross-entropy of the tokens behind the first, and the cache that holds them all."""
    t = tokens.shape[1]
    cache, total = init_cache(engine.config, 1, t, engine.cache_bits), 0.0
    for begin in range(0, t, PIECE):
        piece = tokens[:, begin : begin + PIECE]
        labels = tokens[:, begin + 1 : begin + 1 + piece.shape[1]]
        labels = jnp.pad(labels, ((0, 0), (0, piece.shape[1] - labels.shape[1])),
                         constant_values=-1)
        nats, cache = _piece_nats(engine, piece, labels, cache)
        total += float(nats)
    return total, cache


@partial(jax.jit, donate_argnums=3)
def _piece_nats(
    engine: Engine, tokens: Int[Array, "1 t"], labels: Int[Array, "1 t"], cache: Cache
) -> tuple[Float[Array, ""], Cache]:
    """Cross-entropy of a piece, where a label of -1 counts nothing, and the cache with it."""
    x, cache = advance(engine, tokens, cache, jnp.ones(tokens.shape, bool))
    logits = head_logits(engine, rms_norm(x, engine.final_norm, engine.config)[0])
    logs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logs, jnp.maximum(labels[0], 0)[:, None], axis=-1)[:, 0]
    return -jnp.sum(jnp.where(labels[0] >= 0, chosen, 0)), cache


def token_seconds(engine: Engine, cache: Cache, context: int, repeats: int) -> float:
    """Median seconds of the last token of a context, after a first call that compiles."""
    run = jax.jit(step, donate_argnums=2)
    seconds = []
    for _ in range(repeats + 1):
        cache = {**cache, "length": jnp.int32(context - 1)}
        token = jnp.zeros((1, 1), jnp.int32)
        jax.block_until_ready((cache, token))
        begin = time.perf_counter()
        logits, cache = run(engine, token, cache)
        jax.block_until_ready(logits)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


def how(engine: Engine, cache: Cache) -> str:
    """What attends to the cache when tokens come one by one."""
    c = engine.config
    store = of_kind(cache["k"], any(c.local_layers) and c.window is not None)
    return "native" if native_attention((1, 1, c.n_heads, c.head_dim), store) else "XLA"


def remarks(rows: Sequence[Json]) -> list[str]:
    """Lines below the table."""
    return [f"ms a token: median of {rows[0]['repeats']} whole steps at the end of the context; of "
            "16 bits: bytes over those of keys and values in 16 bits"]
