"""Write a checkpoint of random weights with a published model's shapes.

It stands in for the model where time, memory and disk are to be measured and its licence or its
13 GB are not at hand; its perplexity means nothing.

    python -m experiments.bench.synthetic_checkpoint --model llama2-7b --output runs/synthetic-7b
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import shutil
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from flax.traverse_util import unflatten_dict
from jax.typing import DTypeLike

from rabit_jax.data.embedded import embedded_documents
from rabit_jax.data.tokenizer import train_tokenizer
from rabit_jax.errors import BadInput
from rabit_jax.experiments.bench.shapes import MODELS, model_config
from rabit_jax.experiments.engine.console import common_options, main_guard
from rabit_jax.formats.families import tensor_names
from rabit_jax.formats.hf import save_hf
from rabit_jax.models.config import ModelConfig
from rabit_jax.models.decoder import param_shapes
from rabit_jax.progress import progress
from rabit_jax.types import Json

SHARD_BYTES = 10**9
OUTLIERS, GAIN = 4, 8.0
EXAMPLES = """\
examples:
  python -m experiments.bench.synthetic_checkpoint --model llama2-7b --output runs/synthetic-7b
  python -m experiments.bench.synthetic_checkpoint --model llama2-7b --layers 2 --output runs/two
"""


@dataclasses.dataclass(frozen=True)
class RandomParam:
    """A parameter whose values are drawn when they are asked for; no two layers are alike.

    Normal with deviation `std`, norm scales 1; of the inputs of a kernel, and of the channels of a
    norm, `OUTLIERS` are `GAIN` times larger.

    Attributes:
      path: of the parameter.
      shape: `[l, ...]` within the blocks, else `[...]`.
      std: standard deviation.
      seed: of the whole checkpoint.
    """

    path: str
    shape: tuple[int, ...]
    std: float
    seed: int

    def __getitem__(self, layers: int | slice) -> np.ndarray:
        """One layer or several of a stack, float32."""
        if isinstance(layers, int):
            return self._draw(layers, self.shape[1:])
        return np.stack([self._draw(n, self.shape[1:]) for n in range(self.shape[0])[layers]])

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        """The whole parameter, float32."""
        stacked = self.path.startswith("layers/")
        return self[:] if stacked else self._draw(0, self.shape)

    def _draw(self, layer: int, shape: tuple[int, ...]) -> np.ndarray:
        rng = np.random.default_rng([self.seed, zlib.crc32(self.path.encode()), layer])
        if self.path.endswith("scale"):
            value = np.ones(shape, np.float32)
        else:
            value = rng.standard_normal(shape, np.float32)
            value *= self.std
        if self.path.startswith("layers/") and not self.path.endswith("bias"):
            value[rng.choice(shape[0], min(OUTLIERS, shape[0]), replace=False)] *= GAIN
        return value


def random_checkpoint(config: ModelConfig, seed: int) -> Json:
    """A params tree of `RandomParam`, with the deviations of a fresh model."""
    last = ("o/kernel", "down/kernel")
    std, residual = config.initializer_range, math.sqrt(2 * config.n_layers)
    flat = {path: RandomParam(path, shape, std / residual if path.endswith(last) else std, seed)
            for path, shape in param_shapes(config).items()}
    return unflatten_dict(flat, sep="/")


def write(name: str, folder: Path, layers: int | None, seed: int) -> None:
    """Write the folder; see the command's help."""
    changes = {} if layers is None else {"n_layers": layers}
    config = model_config(name, bos_id=0, eos_ids=(0,), **changes)
    shapes = param_shapes(config)
    needed = 2 * sum(math.prod(shape) for shape in shapes.values())
    place = next(parent for parent in folder.absolute().parents if parent.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise BadInput(f"the checkpoint takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free "
                       f"in {place}: choose fewer --layers or another --output")
    tokenizer = train_tokenizer(embedded_documents(), config.vocab_size)
    count = sum(len(list(tensor_names(path, shape))) for path, shape in shapes.items())
    with progress(f"{name}, tensors", count) as bar:
        save_hf(folder, config, random_checkpoint(config, seed), tokenizer, dtype="bfloat16",
                shard_bytes=SHARD_BYTES, done=bar.update)
    print(f"{folder}: {needed / 1e9:.2f} GB, {config.n_layers} layers")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog="python -m experiments.bench.synthetic_checkpoint", description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common_options(found)
    found.add_argument("--model", required=True, choices=list(MODELS),
                       help="model with these shapes")
    found.add_argument("--output", required=True, type=Path, metavar="DIR", help="model folder")
    found.add_argument("--layers", type=int, metavar="N", help="number of blocks (default all)")
    found.add_argument("--seed", type=int, default=0, help="seed of the weights (default 0)")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = parser().parse_args(argv)
    return main_guard(lambda: write(args.model, args.output, args.layers, args.seed))


if __name__ == "__main__":
    sys.exit(main())
