"""Sizes on a command line: published models, the linears of their blocks, lists of numbers."""

from __future__ import annotations

import re
from typing import NamedTuple

from rabit_jax.errors import BadInput
from rabit_jax.models.block import linear_shapes
from rabit_jax.models.config import ModelConfig
from rabit_jax.models.prepared import GROUPS
from rabit_jax.types import Json

# Sizes as published in each model's config.json. Gemma 3 has other activations and norms than the
# decoder of this framework; the shapes of its linears, its head and its cache are its own.
MODELS: dict[str, Json] = {
    "llama2-7b": {
        "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "head_dim": 128,
        "d_hidden": 11008, "vocab_size": 32000, "max_position": 4096,
    },
    "llama2-13b": {
        "d_model": 5120, "n_layers": 40, "n_heads": 40, "n_kv_heads": 40, "head_dim": 128,
        "d_hidden": 13824, "vocab_size": 32000, "max_position": 4096,
    },
    "llama3-8b": {
        "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "head_dim": 128,
        "d_hidden": 14336, "vocab_size": 128256, "max_position": 8192, "rope_theta": 500000.0,
    },
    "llama3.2-1b": {
        "d_model": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "head_dim": 64,
        "d_hidden": 8192, "vocab_size": 128256, "max_position": 131072, "rope_theta": 500000.0,
        "tied_head": True,
    },
    "tinyllama-1.1b": {
        "d_model": 2048, "n_layers": 22, "n_heads": 32, "n_kv_heads": 4, "head_dim": 64,
        "d_hidden": 5632, "vocab_size": 32000, "max_position": 2048,
    },
    "smollm2-135m": {
        "d_model": 576, "n_layers": 30, "n_heads": 9, "n_kv_heads": 3, "head_dim": 64,
        "d_hidden": 1536, "vocab_size": 49152, "max_position": 8192, "rope_theta": 100000.0,
        "tied_head": True,
    },
    "gemma3-1b": {
        "d_model": 1152, "n_layers": 26, "n_heads": 4, "n_kv_heads": 1, "head_dim": 256,
        "d_hidden": 6912, "vocab_size": 262144, "max_position": 32768, "rope_theta": 1000000.0,
        "tied_head": True,
    },
}
LARGEST, LARGEST_BATCH = 1 << 20, 4096


class Shape(NamedTuple):
    """One product: `inputs` to `sum(rows)` outputs, of as many joined matrices as there are rows.

    `name` tells a person which linear of which model it is; `limbs` are the bytes of fixed point
    per activation, see `activations`.
    """

    name: str
    inputs: int
    rows: tuple[int, ...]
    limbs: int = 2

    @property
    def outputs(self) -> int:
        """Outputs of all joined matrices."""
        return sum(self.rows)


def model_config(name: str, **changes: object) -> ModelConfig:
    """The `ModelConfig` of a name of `MODELS`, with `changes`.

    Raises:
      BadInput: an unknown name.
    """
    if name not in MODELS:
        raise BadInput(f"model is {name!r}: choose {', '.join(MODELS)}")
    return ModelConfig(**{**MODELS[name], **changes})


def linears(config: ModelConfig, model: str) -> list[Shape]:
    """The products of a block as the decode engine joins them: q, k, v; o; gate, up; down."""
    shapes = linear_shapes(config)
    return [Shape(f"{model} {'+'.join(names)}", shapes[names[0]][0],
                  tuple(shapes[name][1] for name in names), limbs)
            for names, limbs in GROUPS.items()]


def parse_shapes(text: str) -> list[Shape]:
    """`"tinyllama-1.1b,4096x11008"` -> shapes; MxN is inputs x outputs.

    Raises:
      BadInput: neither a model nor two sizes from 1 to `LARGEST`.
    """
    found = []
    for name in text.split(","):
        if name in MODELS:
            found += linears(model_config(name), name)
            continue
        sizes = re.fullmatch(r"(\d{1,7})x(\d{1,7})", name)
        if not sizes or not all(1 <= int(size) <= LARGEST for size in sizes.groups()):
            raise BadInput(f"shape is {name!r}: choose {', '.join(MODELS)}, or inputs x outputs "
                           "such as 4096x11008")
        found.append(Shape(name, int(sizes[1]), (int(sizes[2]),)))
    return list(dict.fromkeys(found))


def numbers(name: str, text: str, largest: int) -> list[int]:
    """`"1,2,4"` -> whole numbers from 1 to `largest`, without repetition.

    Raises:
      BadInput: anything else.
    """
    for part in text.split(","):
        if not re.fullmatch(r"\d{1,9}", part) or not 1 <= int(part) <= largest:
            raise BadInput(f"--{name} has {part!r}, wanted whole numbers from 1 to {largest} with "
                           "commas between")
    return list(dict.fromkeys(map(int, text.split(","))))


def positive(name: str, value: int) -> int:
    """The value.

    Raises:
      BadInput: it is below 1.
    """
    if value < 1:
        raise BadInput(f"--{name} is {value}, wanted a positive integer")
    return value
