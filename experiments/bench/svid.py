"""Iterative residual SVID by warm-started power iterations, against the same rounds with full SVDs.

Gaussian matrices; both sides start greedily and run all rounds. The reference takes, for every path
in every round, a full SVD of the absolute residual (LAPACK through NumPy) and keeps its first
triple. The first row is the big shape: one full SVD is timed and multiplied by k (1 + rounds), the
elementwise work of the reference is left out (extrapolated true, no error of its own; one SVD of
4096x11008 takes a minute or more on two cores). The second row runs all rounds of both sides at a
smaller shape. seconds is one run after compilation, rounds are those that ran.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import jax
import numpy as np

from rabit_jax.errors import BadInput
from rabit_jax.progress import say
from rabit_jax.signs.iterative_svid import Svid, svid
from rabit_jax.types import Json

T = TypeVar("T")
EXAMPLES = """examples:
  python -m experiments.bench svid
  python -m experiments.bench svid --json > svid.json
  python -m experiments.bench svid --shape 2048x5504 --check-shape 512x1376 --rounds 5
"""
COLUMNS = {name: name for name in (
    "shape", "k", "rounds", "seconds", "reference_seconds", "speedup", "relative_error",
    "reference_relative_error", "extrapolated")}


def shape_of(text: str) -> tuple[int, int]:
    """`"4096x11008"` -> `(4096, 11008)`; raises what argparse turns into an error."""
    sizes = text.lower().split("x")
    if len(sizes) != 2 or not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is no shape, wanted two sizes like 4096x11008")
    return int(sizes[0]), int(sizes[1])


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("--shape", type=shape_of, default=(4096, 11008),
        help="shape of the timed matrix; its reference is extrapolated (default 4096x11008)")
    add("--check-shape", type=shape_of, default=(1024, 2752),
        help="shape at which the reference runs all its rounds (default 1024x2752)")
    add("--rounds", type=int, default=10, help="refinement rounds (default 10)")
    add("--k", type=int, choices=(1, 2), default=2,
        help="sign paths; the reference is the published form, which for k > 2 ends at a different "
             "error (default 2)")


def gaussian(shape: tuple[int, int]) -> np.ndarray:
    """A standard normal matrix, float32, the same every time."""
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def time_svid(w: np.ndarray, k: int, rounds: int) -> tuple[float, Svid]:
    """Seconds of `svid` with tolerance 0, compilation left out, and its fit."""
    run = jax.jit(partial(svid, k=k, rounds=rounds, tolerance=0.0)).lower(w).compile()
    w = jax.block_until_ready(jax.device_put(w))
    return timed(lambda: jax.block_until_ready(run(w)))


def rank1(m: np.ndarray) -> np.ndarray:
    """The best rank-1 approximation of a non-negative `[i, o]` by a full SVD."""
    u, s, vt = np.linalg.svd(m, full_matrices=False)
    return np.abs(u[:, :1]) * s[0] @ np.abs(vt[:1])


def reference(w: np.ndarray, k: int, rounds: int) -> float:
    """The published rounds with full SVDs; returns the relative error `|W - W_hat|^2 / |W|^2`.

    Each pass sets `W_hat_i = sign(E_i) * rank1(|E_i|)` with `E_i = W - sum_{j != i} W_hat_j`, path
    by path; the first pass, from `W_hat = 0`, is the greedy start.
    """
    terms = np.zeros((k, *w.shape), np.float32)
    for _ in range(1 + rounds):
        for i in range(k):
            e = w - (terms.sum(axis=0) - terms[i])
            terms[i] = np.where(e >= 0, 1, -1) * rank1(np.abs(e))
    left = np.square(w - terms.sum(axis=0), dtype=np.float64)
    return float(left.sum() / np.square(w, dtype=np.float64).sum())


def timed(function: Callable[..., T], *arguments: object) -> tuple[float, T]:
    """Seconds of a call, and its result."""
    begin = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - begin, result


def row(shape: tuple[int, int], k: int, rounds: int, extrapolate: bool) -> Json:
    """Measure one shape; see the head of this file for the two kinds of reference."""
    w = gaussian(shape)
    seconds, fit = time_svid(w, k, rounds)
    error, ran = float(fit.error), int(fit.rounds)
    say(f"svid of {shape}, {ran} rounds: {seconds:.2f} s, relative error {error:.5f}")
    if extrapolate:
        one, _ = timed(rank1, np.abs(w))
        count, found = k * (1 + rounds), None
        taken = one * count
        say(f"one full SVD: {one:.1f} s, times {count} (extrapolated): {taken:.0f} s")
    else:
        taken, found = timed(reference, w, k, rounds)
        say(f"the same with full SVDs: {taken:.1f} s, relative error {found:.5f}")
    return {
        "shape": list(shape), "k": k, "rounds": ran, "seconds": seconds,
        "reference_seconds": taken, "speedup": taken / seconds,
        "relative_error": error, "reference_relative_error": found, "extrapolated": extrapolate,
    }


def measure(options: argparse.Namespace) -> list[Json]:
    """Measure; the big shape, then the one at which the reference runs in full.

    Raises:
      BadInput: an option out of its range.
    """
    if options.rounds < 0:
        raise BadInput(f"--rounds is {options.rounds}, wanted 0 or more")
    check = row(options.check_shape, options.k, options.rounds, extrapolate=False)
    return [row(options.shape, options.k, options.rounds, extrapolate=True), check]


def remarks(rows: Sequence[Json]) -> list[str]:
    """The line below the table."""
    return ["where extrapolated, the reference is one full SVD times k (1 + rounds)"]
