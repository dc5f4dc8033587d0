"""The packed products, one linear at a time, against dense ones in the same run.

All of one shape and batch take turns, call by call, so that whatever disturbs the machine disturbs
all alike; microseconds is the median over the repetitions, spread their interquartile range. Each
call reads other weights, of which every row holds more than four times the last-level cache; on a
GPU one call is a program of several products, and its time is that of the GPU's kernels together,
as the profiler has it, without the gaps between them. gb_per_s counts packed bits and scales, or
the dense matrix. bandwidth_share is gb_per_s over what a big copy reads and writes per second in
the same run; a cache line that is only read can exceed 1. ratio_to_bf16 and ratio_to_f32 are time
dense / time of the row. error is |y - y64| / |y64| on a sample of the outputs, y64 in float64 from
the same weights and activations, which are bfloat16 in dense_bf16, else float32 on a CPU and
bfloat16 on other devices. Dense matrices are multiplied as the decode engine multiplies them, in
the fastest form that XLA has; the linears of a model are those that it joins.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rabit_jax.errors import BadInput
from rabit_jax.experiments.bench import random_weights
from rabit_jax.experiments.bench.shapes import (
    LARGEST_BATCH,
    MODELS,
    Shape,
    numbers,
    parse_shapes,
    positive,
)
from rabit_jax.kernels.bench import torch_cases
from rabit_jax.kernels.bench.case import Case, activations
from rabit_jax.kernels.bench.machine import Copy, call_seconds, free_memory, last_level_cache
from rabit_jax.kernels.bench.torch_cases import TorchCase
from rabit_jax.kernels.layout import to_words
from rabit_jax.kernels.matmul import IMPLS, chosen, laid_bits
from rabit_jax.models.prepared import Rows, multiply
from rabit_jax.progress import progress, say
from rabit_jax.types import Array, Json
from rabit_jax.weights.laid import LaidLowRank, LaidSign

EXAMPLES = """examples:
  python -m experiments.bench kernels --shapes llama2-7b --batch 1,2,4,8
  python -m experiments.bench kernels --shapes 4096x11008 --k 1,2,3 --impl all --json > kernels.json
"""
ROTATIONS = 4  # a row's weights exceed this many last-level caches
MEMORY_SHARE = 0.5  # of the free memory, for all weights of one shape and batch
GPU_PRODUCTS = 16  # of a traced call
GPU_ONLY = ("pallas", "triton")
MANY = 1 << 30  # bytes up to which a GPU's call reads each weight once
KEYS = ("shape", "k", "batch", "impl", "microseconds", "gb_per_s", "bandwidth_share",
        "ratio_to_bf16", "ratio_to_f32", "error")
COLUMNS = {
    "linear": "linear", "shape": "shape", "k": "k", "batch": "batch", "impl": "impl",
    "microseconds": "us", "spread": "spread", "gb_per_s": "GB/s", "bandwidth_share": "of copy",
    "ratio_to_bf16": "x bf16", "ratio_to_f32": "x f32", "error": "error",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("--shapes", metavar="NAMES", default="llama2-7b",
        help="linears to measure: inputs x outputs such as 4096x11008, or all of a block of "
             f"{', '.join(MODELS)} (default llama2-7b)")
    add("--impl", metavar="NAMES", default="auto",
        help="auto, all, or names of implementations (default auto)")
    add("--lowrank", metavar="BITS", default="0.1,0.55,1.0",
        help="bits per weight of LittleBit's rows, or none (default 0.1,0.55,1.0)")
    add("--batch", metavar="NUMBERS", default="1", help="batch sizes (default 1)")
    add("--k", metavar="NUMBERS", default="2", help="sign paths, 1 to 4 (default 2)")
    add("--repeats", type=int, default=15, help="timed calls of each row (default 15)")


def measure(options: argparse.Namespace) -> list[Json]:
    """The rows that the command line asks for.

    Raises:
      BadInput: an option out of its range, or not enough memory for one weight of each kind.
    """
    return product_rows(
        parse_shapes(options.shapes), numbers("batch", options.batch, LARGEST_BATCH),
        numbers("k", options.k, 4), impls(options.impl), bits_per_weight(options.lowrank),
        positive("repeats", options.repeats))


def impls(text: str) -> list[str]:
    """`"auto"`, `"all"` or names of `matmul.IMPLS`.

    Raises:
      BadInput: another name.
    """
    if text == "all":
        return list(IMPLS)
    for name in text.split(","):
        if name not in ("auto", *IMPLS):
            raise BadInput(f"--impl has {name!r}: choose auto, all, {', '.join(IMPLS)}")
    return text.split(",")


def bits_per_weight(text: str) -> list[float]:
    """`"0.1,1.0"` -> numbers above 0 and at most 4; "none" -> nothing.

    Raises:
      BadInput: anything else.
    """
    parts = [] if text == "none" else text.split(",")
    for part in parts:
        if not re.fullmatch(r"\d+\.?\d*|\.\d+", part) or not 0 < float(part) <= 4:
            raise BadInput(f"--lowrank has {part!r}, wanted bits per weight above 0 and at most 4, "
                           "or none")
    return list(dict.fromkeys(map(float, parts)))


def product_rows(
    shapes: Sequence[Shape], batches: Sequence[int], ks: Sequence[int], impls: Sequence[str],
    bits: Sequence[float], repeats: int,
) -> list[Json]:
    """The rows of all shapes and batches.

    Args:
      shapes: from `parse_shapes`.
      batches: rows of the activations.
      ks: sign paths.
      impls: names of `matmul.IMPLS`, or "auto".
      bits: bits per weight of LittleBit's low-rank weights.
      repeats: timed calls of each row.

    Returns:
      Rows by contract. One that a device or batch cannot do has null figures and its reason under
      `refused`.

    Raises:
      BadInput: not enough memory for one weight of each kind.
    """
    cache, source = last_level_cache()
    say(f"last-level cache {cache / 1e6:.0f} MB ({source}); a call that does nothing takes "
        f"{call_seconds() * 1e6:.1f} us, included in every row")
    for line in dict.fromkeys(torch_cases.missing().values()):
        say(line)
    copy, rows = Copy(cache), []
    groups = [(shape, batch) for shape in shapes for batch in batches]
    with progress("products", total=len(groups) * repeats) as bar:
        for n, (shape, batch) in enumerate(groups):
            def tell(done, n=n, shape=shape, batch=batch):
                bar.update(n * repeats + done, linear=shape.name, batch=batch)

            # Made in the call, so that one group's weights are gone before the next are made.
            rows += group_rows(shape, batch, [
                *build(shape, batch, ks, impls, bits),
                *torch_cases.cases(shape.inputs, shape.outputs, batch),
            ], cache, copy, repeats, tell)
    return rows


def build(
    shape: Shape, batch: int, ks: Sequence[int], impls: Sequence[str], bits: Sequence[float]
) -> list[Case]:
    """The cases of one shape and batch, dense ones first, each with one weight."""
    on_cpu = jax.default_backend() == "cpu"
    products = 1 if on_cpu else GPU_PRODUCTS

    def case(impl, k, product, exact, weight, dtype):
        xs = tuple(activations(batch, shape.inputs, dtype, n) for n in range(products))
        return Case(impl, k, product, exact, weight, xs, k is not None, not on_cpu)

    dtype = jnp.float32 if on_cpu else jnp.bfloat16
    found = [case(name, None, _dense, random_weights.exact_dense,
                  random_weights.dense(shape.inputs, shape.outputs, d), d)
             for name, d in (("dense_bf16", "bfloat16"), ("dense_f32", "float32"))]
    for k in ks:
        for impl in dict.fromkeys(resolve(name, batch, shape.inputs, on_cpu) for name in impls):
            weight = random_weights.signs(shape, k, layout_of(impl, on_cpu))
            found.append(case(impl, k, partial(_at, impl=impl), random_weights.exact_signs,
                              weight, dtype))
    for b in bits:
        found.append(case(f"lowrank_{b:g}", random_weights.COPIES, partial(_at, impl=None),
                          random_weights.exact_low_rank,
                          random_weights.low_rank(shape, b, layout_of("native", on_cpu)), dtype))
    return found


def layout_of(impl: str, on_cpu: bool) -> random_weights.Lay:
    """The form of bits that `lay` gives an implementation: on a CPU tiles or words, else rows."""
    if not on_cpu or impl.startswith(GPU_ONLY):
        return lambda bits, rows, inputs: bits
    if impl == "cpu":
        return lambda bits, rows, inputs: jax.jit(to_words)(bits)
    return jax.jit(partial(laid_bits, platform="cpu"), static_argnums=(1, 2))


def _at(
    x: jax.Array, weight: LaidSign | LaidLowRank, layer: jax.Array, impl: str | None
) -> jax.Array:
    return weight.matmul_at(x, layer, impl)


def _dense(x: jax.Array, weight: Array | Rows, layer: jax.Array) -> jax.Array:
    return multiply(x, weight)


def resolve(impl: str, batch: int, inputs: int, words: bool) -> str:
    """The name of `matmul.IMPLS` that "auto" stands for on this device."""
    return chosen(batch, inputs, words) if impl == "auto" else impl


def group_rows(
    shape: Shape, batch: int, cases: Sequence[Case | TorchCase], cache: int, copy: Copy,
    repeats: int, tell: Callable,
) -> list[Json]:
    """Check, rotate and time the cases of one shape and batch, taking turns with the copy."""
    able, refused = [], {}
    for n, case in enumerate(cases):
        try:
            case.check()
            able.append(case)
        except BadInput as error:
            refused[n] = str(error)
    rotate(able, cache)
    errors = {case: case.error() for case in able}
    for n, case in enumerate(cases):
        if case in errors and not np.isfinite(errors[case]):
            able.remove(case)
            refused[n] = "the product is not finite"
    copies = time_cases(able, copy, repeats, tell)
    bandwidth = copy.bytes / statistics.median(copies)
    medians = {case.impl: statistics.median(case.seconds) for case in able}
    common = {"linear": shape.name, "shape": [shape.inputs, shape.outputs], "batch": batch}
    rows = []
    for n, case in enumerate(cases):
        if n in refused:
            figures = dict.fromkeys(KEYS[4:]) | {"refused": refused[n]}
        else:
            figures = row(case, bandwidth, medians) | {"error": errors[case]}
        rows.append({**common, "k": case.k, "impl": case.impl, **figures})
    return rows


def row(case: Case | TorchCase, bandwidth: float, medians: dict[str, float]) -> Json:
    """The figures of one measured case; `bandwidth` in bytes per second, `medians` in seconds."""
    seconds = statistics.median(case.seconds)
    lower, upper = np.percentile(case.seconds, (25, 75))
    speed = case.bytes / seconds
    return {
        "microseconds": seconds * 1e6, "spread": (upper - lower) * 1e6,
        "repeats": len(case.seconds), "bytes": case.bytes,
        "rotation_bytes": case.bytes * case.copies,
        "gb_per_s": speed / 1e9, "bandwidth_share": speed / bandwidth,
        "ratio_to_bf16": medians["dense_bf16"] / seconds,
        "ratio_to_f32": medians["dense_f32"] / seconds,
    }


def rotate(cases: Sequence[Case | TorchCase], cache: int) -> None:
    """Give each case its rotation, see `copies_of`; say where memory did not allow it."""
    products = [len(case.xs) for case in cases]
    wanted, given = copies_of([case.bytes for case in cases], products, cache, free_memory())
    if given != wanted:
        least = min(case.bytes * n for case, n in zip(cases, given, strict=True)) / cache
        say(f"weights rotate over {least:.1f} last-level caches instead of {ROTATIONS}: more "
            f"would take over {MEMORY_SHARE:.0%} of the free memory")
    for case, copies in zip(cases, given, strict=True):
        case.rotate(copies)


def copies_of(
    sizes: Sequence[int], products: Sequence[int], cache: int, free: int
) -> tuple[list[int], list[int]]:
    """How many weights each case needs, and how many it gets.

    Args:
      sizes: bytes of one weight.
      products: how many weights one call reads.
      cache: bytes of the last-level cache.
      free: bytes of memory for arrays.

    Returns:
      The least numbers with `sizes * number > ROTATIONS * cache` and, up to `MANY` bytes, no
      weight twice in a call; and the same, shrunk by one factor where the sum exceeds its share.

    Raises:
      BadInput: one weight of each exceeds that share.
    """
    wanted = [max(ROTATIONS * cache // size + 1, min(n, MANY // size), 1)
              for size, n in zip(sizes, products, strict=True)]
    total, limit = sum(map(int.__mul__, sizes, wanted)), MEMORY_SHARE * free
    if sum(sizes) > limit:
        raise BadInput(f"one weight of each kind takes {sum(sizes) / 1e9:.2f} GB, more than half "
                       f"of the {free / 1e9:.2f} GB that are free: choose a smaller shape")
    given = [max(1, int(n * min(1.0, limit / total))) for n in wanted]
    return wanted, given


def time_cases(
    cases: Sequence[Case | TorchCase], copy: Copy, repeats: int, tell: Callable
) -> list[float]:
    """Run all cases and the copy in turns after one round that is not counted.

    Returns:
      The seconds of the copies; those of a case are in its `seconds`.
    """
    for case in cases:
        case.run()
    copies = []
    for done in range(repeats):
        copies.append(copy.run())
        for case in cases:
            case.seconds.append(case.run())
        tell(done + 1)
    return copies


def remarks(rows: Sequence[Json]) -> list[str]:
    """Lines below the table: how the figures were taken, and what could not be measured and why."""
    lines, refused = [], {}
    counts = sorted({row["repeats"] for row in rows if row.get("refused") is None})
    lines.append(f"us: median of {', '.join(map(str, counts))} calls that took turns, spread: "
                 "their interquartile range; x: time of the dense product over time of the row")
    for row in rows:
        if row.get("refused") is not None:
            batches = refused.setdefault((row["impl"], row["refused"]), {})
            batches[row["batch"]] = None
    for (impl, reason), batches in refused.items():
        lines.append(f"{impl}, batch {', '.join(map(str, batches))}: {reason}")
    return lines
