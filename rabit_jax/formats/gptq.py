"""Packed models as folders in GPTQ's layout, which transformers, vLLM and others load.

    W_hat[i, o] = scales[m, o] (q[i, o] - zeros[m, o]),   m = g_idx[i] = floor(i / group)

Each linear layer of the blocks is four tensors. Codes q of b bits lie along the inputs in
`qweight`, int32 `[i b / 32, o]`, and the zero points along the outputs in `qzeros`, int32
`[n, o b / 32]`: streams of b-bit numbers, the lowest bit first. `scales` is float16 `[n, o]`,
`g_idx` int32 `[i]`. `checkpoint_format` "gptq" stores zero points less 1, "gptq_v2" as they are.

Layout: https://github.com/ModelCloud/GPTQModel (qlinear/torch.py), after arXiv 2210.17323.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from rabit_jax.errors import BadInput
from rabit_jax.formats.exact_levels import levels_of
from rabit_jax.formats.folder import json_files
from rabit_jax.formats.hf import Made, StoredTensor, stored_tensors, write_sharded
from rabit_jax.formats.hf_config import to_hf
from rabit_jax.models.config import ModelConfig
from rabit_jax.models.decoder import Decoder, check_params, param_shapes
from rabit_jax.tree import leaves
from rabit_jax.types import Json, Params, Tokenizer

BITS = (2, 3, 4, 8)  # that the loaders know


class Layout(NamedTuple):
    """What all matrices of a folder share.

    Attributes:
      bits: of a code.
      group: inputs that share a scale and a zero point; -1 where all of an output do.
      symmetric: whether every zero point is `2^(bits - 1)`.
      version: `checkpoint_format`.
    """

    bits: int
    group: int
    symmetric: bool
    version: str

    def in_vllm(self) -> bool:
        """Whether vLLM 0.33 has a kernel for it (its auto_gptq.py and marlin_utils.py)."""
        return self.symmetric and self.bits in (4, 8) and self.group in (-1, 32, 64, 128)

    def config(self) -> Json:
        """The `quantization_config` of config.json."""
        return {"quant_method": "gptq", "bits": self.bits, "group_size": self.group,
                "desc_act": False, "sym": self.symmetric, "lm_head": False, "pack_dtype": "int32",
                "true_sequential": True, "checkpoint_format": self.version}


def save_gptq(
    folder: str | Path, model: Decoder | ModelConfig, params: Params,
    tokenizer: Tokenizer | None = None, dtype: DTypeLike = "float16",
    generation: Json | None = None,
    card: Callable[[Layout], Mapping[str, str]] = lambda layout: {},
    done: Callable[[int], None] = lambda count: None,
    bits: int | None = None,
) -> Layout:
    """Writes a folder in GPTQ's layout, of the fewest bits that hold all matrices exactly.

    Args:
      folder: where to write; a model folder of that name is replaced.
      model: the decoder or its config.
      params: its params, all matrices of the blocks packed.
      tokenizer: of transformers.
      dtype: of the other tensors, and of the products where it is loaded.
      generation: content of generation_config.json besides the begin and end tokens.
      card: makes further text files by name, such as a README.md.
      done: called after each tensor with the number of tensors that are ready.
      bits: of a code, one of `BITS`: more than the fewest suit a loader that knows few of them.

    Returns:
      The layout that was chosen.

    Raises:
      BadInput: a matrix that is no integers times one 16-bit scale per group (the message says what
        it is), groups that differ or do not divide the inputs, sizes that do not fill whole words;
        too few `bits`; a folder that cannot be written.
    """
    config = model.config if isinstance(model, Decoder) else model
    config = dataclasses.replace(config, dtype=jnp.dtype(dtype).name)
    flat, tensors = dict(leaves(params)), stored_tensors(config)
    check_params(flat, param_shapes(config))
    linears = {name.removesuffix(".weight"): one for name, one in tensors.items()
               if one.path.startswith("layers/") and one.path.endswith("/kernel")}
    layout = _layout(((name, _levels(one, flat, name)) for name, one in linears.items()),
                     BITS if bits is None else (bits,))
    made: dict[str, Made] = {}
    for name, one in linears.items():
        made |= _parts(name, one, flat, layout)
    size = jnp.dtype(config.dtype).itemsize
    made |= {name: Made(size * math.prod(one.shape), partial(one.value, flat, config.dtype))
             for name, one in tensors.items() if name.removesuffix(".weight") not in linears}
    raw = {**to_hf(config), "quantization_config": layout.config()}
    write_sharded(folder, made, {**json_files(raw, generation), **card(layout)}, tokenizer,
                  done=done)
    return layout


class _Matrix(NamedTuple):
    """Integers int16 `[o, i]`, steps float16 `[o, n]`, inputs of a group."""

    integers: np.ndarray
    steps: np.ndarray
    group: int

    def by_group(self) -> np.ndarray:
        """Integers `[o, n, group]`."""
        o, i = self.integers.shape
        return self.integers.reshape(o, -1, min(self.group, i))


def _levels(tensor: StoredTensor, params: Params, name: str) -> _Matrix:
    levels = levels_of(tensor.leaf(params), name)
    return _Matrix(levels.whole(name), levels.steps, levels.group)


def _layout(matrices: Iterable[tuple[str, _Matrix]], sizes: Sequence[int]) -> Layout:
    """The layout of the fewest bits among `sizes` for these matrices.

    Zero points that differ are stored as they are: GPTQModel reads the older version only where
    they do not, or where it wrote the folder itself.
    """
    groups: dict[int, str] = {}
    low = high = 0  # of all integers
    spans: dict[int, list[bool]] = {bits: [] for bits in sizes}
    for name, levels in matrices:
        o, i = levels.integers.shape
        if levels.group < i and i % levels.group:
            raise BadInput(f"{name} has {i} inputs, no multiple of its groups of {levels.group}: "
                           "quantise with a group that divides them")
        groups.setdefault(levels.group if levels.group < i else -1, name)
        least, most = (f(levels.by_group(), axis=2) for f in (np.min, np.max))
        low, high = min(low, int(least.min())), max(high, int(most.max()))
        for bits in sizes:
            zeros = _zeros(least, most, bits)
            spans[bits].append(zeros is not None and not (i * bits % 32 or o * bits % 32))
    if len(groups) > 1:
        (one, first), (other, second) = list(groups.items())[:2]
        raise BadInput(f"{first} has groups of {one} inputs and {second} of {other} (-1 is all of "
                       "them): the layout has one group size, quantise all matrices with the same")
    for bits in sizes:
        half = 2 ** (bits - 1)
        if all(spans[bits]):
            symmetric = -half <= low and high < half
            return Layout(bits, next(iter(groups)), symmetric, "gptq" if symmetric else "gptq_v2")
    raise BadInput(f"the levels reach from {low} to {high} steps, or the sizes of a matrix do not "
                   f"fill words of 32 bits: {' or '.join(map(str, sizes))} bits do not hold them")


def _zeros(least: np.ndarray, most: np.ndarray, bits: int) -> np.ndarray | None:
    """Zero points `[o, n]` that make codes of these bits; None where there are none."""
    top = 2**bits - 1
    zeros = np.maximum(-least, 0)
    return zeros if (zeros + most <= top).all() and zeros.max() <= top else None


def _parts(name: str, tensor: StoredTensor, params: Params, layout: Layout) -> dict[str, Made]:
    """The four tensors of one linear layer."""
    o, i = tensor.shape
    n = 1 if layout.group == -1 else i // layout.group
    make = {
        "qweight": (4 * (i * layout.bits // 32) * o, lambda own, zeros: stream(
            (own.integers + np.repeat(zeros, i // n, axis=1)).T, layout.bits)),
        "qzeros": (4 * n * (o * layout.bits // 32), lambda own, zeros: stream(
            zeros - (layout.version == "gptq"), layout.bits).T),
        "scales": (2 * n * o, lambda own, zeros: own.steps.T),
        "g_idx": (4 * i, lambda own, zeros: np.arange(i, dtype=np.int32) // (i // n)),
    }

    def made(part: Callable[[_Matrix, np.ndarray], np.ndarray]) -> np.ndarray:
        own = _levels(tensor, params, name)
        blocks = own.by_group()
        zeros = _zeros(blocks.min(axis=2), blocks.max(axis=2), layout.bits)
        assert zeros is not None
        if layout.symmetric:
            zeros = np.full_like(zeros, 2 ** (layout.bits - 1))
        return np.ascontiguousarray(part(own, zeros))

    return {f"{name}.{part}": Made(size, partial(made, method))
            for part, (size, method) in make.items()}


def stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes `[rows, columns]` -> int32 `[rows bits / 32, columns]`: down each column a stream of
    numbers of so many bits, the lowest first."""
    wide = codes.astype(np.uint8)
    planes = wide[:, None, :] >> np.arange(bits, dtype=np.uint8)[None, :, None] & 1
    packed = np.packbits(planes.reshape(-1, codes.shape[1]), axis=0, bitorder="little")
    return np.ascontiguousarray(packed.T).view("<i4").T
