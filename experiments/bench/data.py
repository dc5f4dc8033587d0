"""Loading: what cutting a batch takes of a training step, and how fast text becomes tokens.

The text is a file of random tokens, mapped into memory as the token cache is. Every batch is cut
and put on the device as in training. share_of_step is load_seconds over step_seconds, the fastest
distillation step of a small student on this device with the same number of tokens: real models take
longer. first_seconds is that of the first batch of an epoch, which draws the order of all windows.
tokenise_mb_per_s is the speed at which a tokeniser of 2,048 tokens fills the token cache.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from rabit_jax.data.embedded import embedded_documents
from rabit_jax.data.tokenizer import train_tokenizer
from rabit_jax.data.tokens import batch, tokenise
from rabit_jax.errors import BadInput
from rabit_jax.experiments.bench import step
from rabit_jax.progress import progress, say
from rabit_jax.types import Json
from rabit_jax.workspaces import workspace

EXAMPLES = """examples:
  python -m experiments.bench data
  python -m experiments.bench data --text 1e9 --json > data.json
"""
COLUMNS = {name: name for name in (
    "batch", "length", "load_seconds", "first_seconds", "step_seconds", "share_of_step",
    "tokenise_mb_per_s")}
SHAPES = ((8, 256), (4, 512), (32, 512))  # batch and length
MOST_SHARE = 0.02
TEMPORARY = Path(tempfile.gettempdir()) / "rabit-bench-data"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("--text", type=float, default=1e8, help="tokens of the text (default 1e8, 200 MB)")
    add("--batches", type=int, default=50, help="timed batches of each shape (default 50)")


def measure(options: argparse.Namespace) -> list[Json]:
    """Measure; one row per shape of a batch.

    Raises:
      BadInput: an option out of its range.
    """
    if options.batches < 1 or options.text < 1e5:
        raise BadInput("--batches must be at least 1 and --text at least 1e5")
    speed = tokenise_speed()
    rows = []
    with workspace(TEMPORARY) as folder, progress("batches", len(SHAPES)) as bar:
        text = random_text(folder / "tokens.bin", int(options.text))
        for done, (rows_of_batch, length) in enumerate(SHAPES, 1):
            first, usual = load_seconds(text, rows_of_batch, length, options.batches)
            least = step_seconds(rows_of_batch * length)
            rows.append({"batch": rows_of_batch, "length": length, "load_seconds": usual,
                         "first_seconds": first, "step_seconds": least,
                         "share_of_step": usual / least, "tokenise_mb_per_s": speed})
            bar.update(done)
    return rows


def random_text(file: Path, count: int) -> np.ndarray:
    """A memory map of random uint16 tokens."""
    rng = np.random.default_rng(0)
    with open(file, "wb") as out:
        for begin in range(0, count, 1 << 24):
            part = rng.integers(0, 1 << 16, min(1 << 24, count - begin), np.uint16)
            out.write(part.tobytes())
    return np.memmap(file, np.uint16, "r")


def load_seconds(text: np.ndarray, rows: int, length: int, batches: int) -> tuple[float, float]:
    """Seconds of the first batch, and the median of the others."""
    found = []
    for number in range(batches + 1):
        begin = time.perf_counter()
        jax.block_until_ready(jax.device_put(batch(text, number, rows, length, seed=rows)))
        found.append(time.perf_counter() - begin)
    return found[0], statistics.median(found[1:])


@functools.cache
def step_seconds(tokens: int) -> float:
    """Of the fastest step of a student of width 256 and two blocks."""
    options = argparse.Namespace(width=256, layers=2, tokens=tokens, vocab=4096, steps=4,
                                 dtype="float32", k=2, gamma=0.0)
    student = step.build(options, ("residual",))["residual"]
    return min(student.run() for _ in range(options.steps))


def tokenise_speed() -> float:
    """MB of text a second, from documents in memory to the cache on disk."""
    texts = embedded_documents()
    size = sum(len(text.encode()) for text in texts)
    tokenizer = train_tokenizer(texts, 2048)
    with workspace(TEMPORARY) as cache:
        begin = time.perf_counter()
        tokenise(texts, tokenizer, cache)
        seconds = time.perf_counter() - begin
    say(f"tokenised {size / 1e6:.1f} MB in {seconds:.2f} s")
    return size / 1e6 / seconds


def remarks(rows: Sequence[Json]) -> list[str]:
    """The largest share, and whether it is below what it may be."""
    worst = max(row["share_of_step"] for row in rows)
    how = "at most" if worst <= MOST_SHARE else "MORE THAN"
    return [f"loading takes {100 * worst:.3g}% of a step, {how} the {100 * MOST_SHARE:g}% that it "
            "may take"]
