"""`rb256`, the bit layout of packed sign matrices.

Row-major over outputs; each row is a sequence of 32-byte blocks and each block holds 256 inputs:

    bit p (least significant first) of byte j of block c  =  input 256 c + 32 p + j

A bit of 1 stands for +1, a bit of 0 for -1. The last block is padded with 0. The
eight bits of a byte belong to inputs that lie 32 apart, so eight masks of one 32-byte block give
the inputs in their natural order, without any permutation.

A file stores whole blocks as they are and the inputs beyond them in a shorter block, of 64, 128 or
192 inputs in n = 8, 16 or 24 bytes with the same order: bit p of its byte j is input n p + j of it.

Read as little-endian uint32 words, bit 8 b + p of word m of block c is input
256 c + 32 p + 4 m + b. Bits of activations that `pack_bits` packs are in the same order.
"""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

T = TypeVar("T", np.ndarray, jax.Array)
BLOCK = 256
BLOCK_BYTES = 32
WORD = 32  # inputs of a word
TAIL = 64
TILE = 16  # outputs that the native CPU kernel multiplies together


def packed_bytes(inputs: int) -> int:
    """Bytes of one packed row of `inputs` signs: `32 ceil(inputs / 256)`."""
    return -(-inputs // BLOCK) * BLOCK_BYTES


def pack_bits(positive: jax.Array) -> jax.Array:
    """Bool `[..., o, i]`, True for +1 -> uint8 `[..., o, 32 ceil(i / 256)]`."""
    pad = -positive.shape[-1] % BLOCK
    padded = jnp.pad(positive, [(0, 0)] * (positive.ndim - 1) + [(0, pad)])
    planes = padded.reshape(*padded.shape[:-1], -1, 8, BLOCK_BYTES).astype(jnp.uint8)
    packed = sum((planes[..., p, :] << p for p in range(8)), start=jnp.uint8(0))
    return packed.reshape(*packed.shape[:-2], -1)


def unpack_bits(bits: jax.Array, inputs: int) -> jax.Array:
    """uint8 `[..., o, 32 ceil(i / 256)]` -> uint8 0 or 1 `[..., o, i]`; inverse of `pack_bits`."""
    blocks = bits.reshape(*bits.shape[:-1], -1, 1, BLOCK_BYTES)
    shifts = jnp.arange(8, dtype=jnp.uint8).reshape((1,) * (blocks.ndim - 2) + (8, 1))
    planes = (blocks >> shifts) & jnp.uint8(1)
    return planes.reshape(*bits.shape[:-1], -1)[..., :inputs]


def stored_bytes(inputs: int) -> int:
    """Bytes of one row of `inputs` signs in a file: `8 ceil(inputs / 64)`."""
    return -(-inputs // TAIL) * (TAIL // 8)


def to_stored(bits: T, inputs: int) -> T:
    """Rows as a file stores them: uint8 `[..., 32 ceil(i / 256)]` -> `[..., 8 ceil(i / 64)]`.

    Of NumPy as of JAX, in which the native kernel's tiles end so too.
    """
    return _with_tail(bits, inputs, stored_bytes(inputs))


def from_stored(stored: T, inputs: int) -> T:
    """Inverse of `to_stored`; the padding is 0."""
    return _with_tail(stored, inputs, packed_bytes(inputs))


def _with_tail(bits: T, inputs: int, size: int) -> T:
    """Rows whose last block is as long as it takes to make them `size` bytes; what is cut off of
    it, or added, is padding."""
    xp: Any = np if isinstance(bits, np.ndarray) else jnp
    whole, lead = inputs // BLOCK * BLOCK_BYTES, bits.shape[:-1]
    tail, width = bits[..., whole:], size - whole
    shifts = xp.arange(8, dtype=xp.uint8).reshape((1,) * len(lead) + (8, 1))
    signs = (tail[..., None, :] >> shifts & xp.uint8(1)).reshape(*lead, 8 * tail.shape[-1])
    signs = signs[..., : 8 * width]
    signs = xp.pad(signs, [(0, 0)] * len(lead) + [(0, 8 * width - signs.shape[-1])])
    planes = signs.reshape(*lead, 8, width) << shifts
    return xp.concatenate([bits[..., :whole], planes.sum(axis=-2, dtype=xp.uint8)], axis=-1)


def to_words(bits: jax.Array) -> jax.Array:
    """uint8 `[..., o, n]` -> uint32 `[..., n / 4, o]`: words of each row, outputs last.

    The form in which a CPU multiplies: its vector unit runs along the outputs.
    """
    words = jax.lax.bitcast_convert_type(bits.reshape(*bits.shape[:-1], -1, 4), jnp.uint32)
    return jnp.swapaxes(words, -1, -2)


def from_words(words: jax.Array) -> jax.Array:
    """uint32 `[..., w, o]` -> uint8 `[..., o, 4 w]`; inverse of `to_words`."""
    rows = jax.lax.bitcast_convert_type(jnp.swapaxes(words, -1, -2), jnp.uint8)
    return rows.reshape(*rows.shape[:-2], -1)


def as_rows(bits: jax.Array, rows: tuple[int, ...] = (), inputs: int = 0) -> jax.Array:
    """`rb256` bytes `[..., k, o, n]` of bytes, of words `[..., k, w, o]`, or of tiles
    `[..., t, k, w, 16]` of matrices with `rows` outputs each and so many inputs."""
    if bits.dtype == jnp.uint8:
        return bits
    return from_tiles(bits, rows, inputs) if bits.ndim == 5 else from_words(bits)


def to_tiles(bits: jax.Array, rows: tuple[int, ...], inputs: int) -> jax.Array:
    """uint8 `[..., k, o, n]` -> uint32 `[..., t, k, w, 16]`: words of 16 outputs side by side.

    The form that the native CPU kernel reads as one stream; like a file it ends in a shorter block,
    so `w = 2 ceil(i / 64)`. `rows` are the outputs of the matrices that are joined along o; each
    begins a tile, and missing outputs are rows of 0.
    """
    bits = to_stored(bits, inputs)
    *lead, k, _, n = bits.shape
    ends = np.cumsum(rows)[:-1]
    parts = [jnp.pad(part, [(0, 0)] * (part.ndim - 2) + [(0, -part.shape[-2] % TILE), (0, 0)])
             for part in jnp.split(bits, ends, axis=-2)]
    words = jax.lax.bitcast_convert_type(
        jnp.concatenate(parts, axis=-2).reshape(*lead, k, -1, TILE, n // 4, 4), jnp.uint32)
    axes = range(len(lead)), len(lead)
    return words.transpose(*axes[0], *(axes[1] + a for a in (1, 0, 3, 2)))


def from_tiles(tiles: jax.Array, rows: tuple[int, ...], inputs: int) -> jax.Array:
    """uint32 `[..., t, k, w, 16]` -> uint8 `[..., k, o, 32 ceil(i / 256)]`; inverse of `to_tiles`.
    """
    lead = tiles.ndim - 4
    ordered = tiles.transpose(*range(lead), *(lead + a for a in (1, 0, 3, 2)))
    whole = jax.lax.bitcast_convert_type(ordered, jnp.uint8)
    whole = whole.reshape(*tiles.shape[:lead], tiles.shape[-3], -1, 4 * tiles.shape[-2])
    starts = np.cumsum([0, *(-(-n // TILE) * TILE for n in rows)])
    found = jnp.concatenate([whole[..., start : start + n, :]
                             for start, n in zip(starts, rows, strict=False)], axis=-2)
    return from_stored(found, inputs)


def in_groups(x: jax.Array, group: int) -> jax.Array:
    """`[..., i]` in an order in which `pack_bits` gives whole words to each group of inputs.

    A word of rb256 holds inputs of all eight parts of its block, so of several groups where these
    are smaller than a block. Here input `4 (p v + j) + b` of a group of `v` words lies where
    bit 8 b + p of word j of these v is.

    Args:
      x: anything along the inputs; what is missing at the end is 0.
      group: inputs of a group, a multiple of 32.

    Returns:
      `[..., 256 ceil(n v / 8)]` for n groups.
    """
    words, lead = group // WORD, x.shape[:-1]
    x = jnp.pad(x, [(0, 0)] * len(lead) + [(0, -x.shape[-1] % group)])
    x = jnp.moveaxis(x.reshape(*lead, -1, 8, words, 4), -3, -2).reshape(*lead, -1, 8, 4)
    x = jnp.pad(x, [(0, 0)] * len(lead) + [(0, -x.shape[-3] % 8), (0, 0), (0, 0)])
    return jnp.swapaxes(x.reshape(*lead, -1, 8, 8, 4), -3, -2).reshape(*lead, -1)


def from_groups(x: jax.Array, group: int, inputs: int) -> jax.Array:
    """The inverse of `in_groups`, `[..., i]`."""
    words, lead = group // WORD, x.shape[:-1]
    x = jnp.swapaxes(x.reshape(*lead, -1, 8, 8, 4), -3, -2).reshape(*lead, -1, 8, 4)
    x = x[..., : -(-inputs // group) * words, :, :].reshape(*lead, -1, words, 8, 4)
    return jnp.moveaxis(x, -3, -2).reshape(*lead, -1)[..., :inputs]


def to_table_tiles(table: jax.Array) -> jax.Array:
    """int8 `[..., o, i]` -> int8 `[..., t, ceil(i / 4), 16, 4]`, padded with 0."""
    *lead, o, i = table.shape
    padded = jnp.pad(table, [(0, 0)] * len(lead) + [(0, -o % TILE), (0, -i % 4)])
    return padded.reshape(*lead, -1, TILE, padded.shape[-1] // 4, 4).swapaxes(-3, -2)
