"""Packed decoding and prefill against llama.cpp, in turns in one run, with as many threads.

Both sides have random weights of the same sizes, or are files of one real model: --packed names
folders of ours and --gguf files of llama.cpp. In every round each of them runs once, in turn, so
that whatever disturbs the machine disturbs all alike; tokens_per_second is the median of the
rounds, best the fastest. bytes_per_token counts weights and the cache that one step reads;
bandwidth_share is their rate over that of a big copy, which is measured in turns as well. llama.cpp
is built from the sources in the package llama-cpp-python, into .cache/llama.cpp. Its rows share
the prompt in one cache, ours have a cache for each row.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rabit_jax.errors import BadInput
from rabit_jax.experiments.bench import llama_cpp
from rabit_jax.experiments.bench.decode import decode_tokens, random_engine
from rabit_jax.experiments.bench.shapes import model_config, numbers, positive
from rabit_jax.formats.gguf import hf_config
from rabit_jax.formats.gguf_file import read_gguf
from rabit_jax.formats.hf_config import from_hf
from rabit_jax.formats.packed_model import load_packed
from rabit_jax.kernels.bench.machine import Copy, last_level_cache
from rabit_jax.kernels.cpu.library import status
from rabit_jax.models.config import ModelConfig
from rabit_jax.models.engine import init_cache, step
from rabit_jax.models.prepared import Engine, byte_activations, prepare
from rabit_jax.progress import progress, say
from rabit_jax.tree import tree_bytes
from rabit_jax.types import Json

EXAMPLES = """examples:
  python -m experiments.bench peers --save
  python -m experiments.bench peers --model smollm2-135m --types TQ2_0 --batch 1,4 --context 128
  python -m experiments.bench peers --packed runs/mine/packed --gguf mine-Q2_K.gguf --batch 1
"""
BASE = "TQ2_0"  # what ratios are to, where it runs
COLUMNS = {
    "model": "model", "phase": "phase", "batch": "batch", "context": "context", "impl": "impl",
    "tokens_per_second": "tokens/s", "best": "best", "ratio": "x base",
    "bytes_per_token": "bytes/token", "bandwidth_share": "of copy",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("--model", metavar="NAME", default="tinyllama-1.1b", help="whose sizes (default "
        "tinyllama-1.1b)")
    add("--types", metavar="NAMES", default="TQ2_0,Q2_K,IQ2_XXS",
        help=f"of llama.cpp: {', '.join(llama_cpp.MIXES)} (default TQ2_0,Q2_K,IQ2_XXS)")
    add("--batch", metavar="NUMBERS", default="1,2,4,8,16",
        help="rows decoded at once, at the first context; others take one row "
             "(default 1,2,4,8,16)")
    add("--context", metavar="NUMBERS", default="128,2048",
        help="tokens before those that are generated (default 128,2048)")
    add("--prefill", type=int, default=512, help="tokens of the prompt (default 512)")
    add("--k", type=int, default=2, help="our sign paths, 1 to 4 (default 2)")
    add("--packed", default="", metavar="DIR,DIR",
        help="packed model folders in place of random weights")
    add("--gguf", default="", metavar="FILE,FILE",
        help="llama.cpp's files of the same model, in place of random weights")
    add("--tokens", type=int, default=16, help="generated in each round (default 16)")
    add("--rounds", type=int, default=5, help="turns of each (default 5)")
    add("--dense", action="store_true", help="also our dense float32 and bfloat16 models")


@dataclass
class Ours:
    """One of our engines and the seconds of its calls, by phase, batch and context."""

    name: str
    engine: Engine
    speeds: dict[tuple[str, int, int], list[float]] = field(default_factory=dict)

    @property
    def config(self) -> ModelConfig:
        """The decoder's."""
        return self.engine.config

    def decode(self, batch: int, context: int, tokens: int) -> None:
        """Generate `tokens` tokens in each row after `context` random ones."""
        c = self.config
        slots = context + tokens
        cache = init_cache(c, batch, slots)
        cache |= {"valid": jnp.asarray(np.tile(np.arange(slots) < context, (batch, 1))),
                  "length": jnp.int32(context)}
        token = jnp.zeros(batch, jnp.int32)
        self._time(("decode", batch, context), batch * tokens,
                   lambda: decode_tokens(self.engine, token, cache, tokens)[0])

    def prefill(self, tokens: int) -> None:
        """Read a prompt of `tokens` tokens."""
        prompt = jnp.asarray(np.arange(tokens)[None] % self.engine.config.vocab_size, jnp.int32)
        self._time(("prefill", 1, tokens), tokens, lambda: read(self.engine, prompt))

    def bytes(self, phase: str, batch: int, context: int) -> int | None:
        """Bytes that a decoding step reads, for each row of it."""
        if phase != "decode":
            return None
        c = self.engine.config
        cache = jax.eval_shape(partial(init_cache, c, batch, context))
        weights = tree_bytes((self.engine.products, self.engine.embed
                              if self.engine.head is None else self.engine.head))
        return (weights + tree_bytes((cache["k"], cache["v"]))) // batch

    def _time(self, key: tuple[str, int, int], tokens: int, call: Callable[[], object]) -> None:
        begin = time.perf_counter()
        jax.block_until_ready(call())
        self.speeds.setdefault(key, []).append(tokens / (time.perf_counter() - begin))


@dataclass
class Theirs:
    """One file of llama.cpp, the same way."""

    name: str
    file: Path
    config: ModelConfig
    speeds: dict[tuple[str, int, int], list[float]] = field(default_factory=dict)

    def decode(self, batch: int, context: int, tokens: int) -> None:
        """As `Ours.decode`."""
        (found,) = llama_cpp.speed(self.file, threads(), context, tokens, [batch])
        self.speeds.setdefault(("decode", batch, context), []).append(found["speed_tg"])

    def prefill(self, tokens: int) -> None:
        """As `Ours.prefill`."""
        (found,) = llama_cpp.speed(self.file, threads(), tokens, 1, [1])
        self.speeds.setdefault(("prefill", 1, tokens), []).append(found["speed_pp"])

    def bytes(self, phase: str, batch: int, context: int) -> int | None:
        """As `Ours.bytes`; the embedding, of which single rows are read, is counted too."""
        if phase != "decode":
            return None
        c = self.config
        cache = 2 * 2 * c.n_layers * c.n_kv_heads * c.head_dim  # of one token, in 16 bits
        return (self.file.stat().st_size + cache * context) // batch


def theirs(model: str, config: ModelConfig, types: Sequence[str]) -> list[Theirs]:
    """Files of llama.cpp with random weights of the same sizes, one for each of its types."""
    return [Theirs(f"llama.cpp {name}", llama_cpp.model_file(model, config, name), config)
            for name in types]


@jax.jit
def read(engine: Engine, prompt: jax.Array) -> jax.Array:
    """The likeliest token after a prompt `[1, t]`."""
    cache = init_cache(engine.config, 1, prompt.shape[1])
    return jnp.argmax(step(engine, prompt, cache)[0], axis=-1)


def measure(options: argparse.Namespace) -> list[Json]:
    """The rows that the command line asks for.

    Raises:
      BadInput: an option out of its range, or llama.cpp cannot be built or run.
    """
    folders, files = (list(filter(None, text.split(",")))
                      for text in (options.packed, options.gguf))
    types = options.types.split(",")
    for name in types:
        if name not in llama_cpp.MIXES:
            raise BadInput(f"--types has {name!r}: choose {', '.join(llama_cpp.MIXES)}")
    real: list[Ours | Theirs] = []
    for folder in folders:
        real += packed_folder(folder)
    real += map(gguf_file, files)
    config = real[0].config if real else model_config(options.model)
    batches = numbers("batch", options.batch, 256)
    contexts = numbers("context", options.context, config.max_position)
    rounds, tokens = positive("rounds", options.rounds), positive("tokens", options.tokens)
    k = positive("k", options.k)
    llama_cpp.programs()
    say(f"ours: {status()}; {threads()} threads each")
    sides = real or [*ours(config, k, options.dense), *theirs(options.model, config, types)]
    cases = [("decode", batch, contexts[0]) for batch in batches]
    cases += [("decode", 1, context) for context in contexts[1:]]
    cases += [("prefill", 1, options.prefill)] if options.prefill else []
    bandwidth = statistics.median(take_turns(sides, cases, rounds, tokens))
    return rows("files" if real else options.model, sides, cases, bandwidth)


def packed_folder(folder: str) -> list[Ours]:
    """The engine of a packed folder, as `generate` runs it, and with `--activation-bits 8`.

    Raises:
      BadInput: not a packed model.
    """
    model, params, _ = load_packed(folder)
    return with_8_bits(Ours(f"rabit_jax {folder}", prepare(model.config, params)))


def with_8_bits(side: Ours) -> list[Ours]:
    """A side, and the same weights with activations of 8 bits, as llama.cpp has them."""
    return [side, Ours(f"{side.name}, 8-bit activations", byte_activations(side.engine))]


def gguf_file(file: str) -> Theirs:
    """A file of llama.cpp.

    Raises:
      BadInput: not a GGUF file of a model family that we know.
    """
    path = Path(file)
    return Theirs(f"llama.cpp {path.name}", path, from_hf(hf_config(read_gguf(path))))


def threads() -> int:
    """As many as this process has cores, which XLA takes too."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ours(config: ModelConfig, k: int, dense: bool) -> list[Ours]:
    """Our engines by name: of a bfloat16 model, as most are published, and of a float32 one, whose
    prompts are multiplied in float32; their heads are rounded to 8 bits, where no other is named,
    and activations have 16, where no other is named.
    """
    wide, short = replace(config, dtype="float32"), replace(config, dtype="bfloat16")
    found = [
        Ours("rabit_jax packed, f32", random_engine(wide, k, 8)),
        *with_8_bits(Ours("rabit_jax packed", random_engine(short, k, 8))),
        Ours("rabit_jax packed, bf16 head", random_engine(short, k)),
    ]
    if dense:
        found += [Ours("rabit_jax dense f32", random_engine(wide, None)),
                  Ours("rabit_jax dense bf16", random_engine(short, None))]
    return found


def take_turns(
    sides: Sequence[Ours | Theirs], cases: Sequence[tuple[str, int, int]], rounds: int, tokens: int
) -> list[float]:
    """Run every case on every side, round by round; returns the copy's bytes per second."""
    copy, copies = Copy(last_level_cache()[0]), []
    with progress("peers", total=len(cases) * (rounds + 1) * len(sides)) as bar:
        done = 0
        for phase, batch, context in cases:
            # The first round compiles and reads files, and is not counted.
            for turn in range(rounds + 1):
                copies.append(copy.bytes / copy.run())
                for side in sides:
                    if phase == "prefill":
                        side.prefill(context)
                    else:
                        side.decode(batch, context, tokens)
                    if turn == 0:
                        side.speeds[phase, batch, context].clear()
                    done += 1
                    bar.update(done, side=side.name, batch=batch, context=context)
    return copies


def rows(
    model: str, sides: Sequence[Ours | Theirs], cases: Sequence[tuple[str, int, int]],
    bandwidth: float,
) -> list[Json]:
    """A row of each case and side; `bandwidth` in bytes per second."""
    base = next((side for side in sides if side.name.startswith(f"llama.cpp {BASE}")), sides[-1])
    found = []
    for case in cases:
        phase, batch, context = case
        medians = {side.name: statistics.median(side.speeds[case]) for side in sides}
        for side in sides:
            size, speed = side.bytes(*case), medians[side.name]
            found.append({
                "model": model, "phase": phase, "batch": batch, "context": context,
                "impl": side.name, "tokens_per_second": speed, "best": max(side.speeds[case]),
                "rounds": len(side.speeds[case]), "base": base.name,
                "ratio": speed / medians[base.name], "bytes_per_token": size,
                "bandwidth_share": None if size is None else size * speed / bandwidth,
                "copy_gb_per_s": bandwidth / 1e9,
                **{f"ratio_to_{kind}": speed / medians[dense] if dense in medians else None
                   for kind, dense in (("f32", "rabit_jax dense f32"),
                                       ("bf16", "rabit_jax dense bf16"))},
            })
    return found


def remarks(rows: Sequence[Json]) -> list[str]:
    """Lines below the table."""
    first = rows[0]
    return [f"median of {first['rounds']} rounds in which all took turns; x base: over "
            f"{first['base']}; a copy moves {first['copy_gb_per_s']:.1f} GB/s here"]
