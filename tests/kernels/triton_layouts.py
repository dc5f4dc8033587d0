"""How the Triton kernels' activations are laid, by plain array operations: what their own are
compared with."""

import jax
import jax.numpy as jnp

from rabit_jax.kernels.activations import RADIX, bit_planes
from rabit_jax.kernels.activations import limbs as to_limbs
from rabit_jax.kernels.gpu.triton_int8 import tiles


def lay_inputs(u: jax.Array, row_bytes: int, block: int) -> jax.Array:
    """`[..., i]` -> `[..., 8 block ceil(row_bytes / block)]`, what blocks of a row's bytes meet.

    The last block of a row ends where the row ends. Where it begins before the one before it ends,
    its first inputs come for the second time and are 0 here.
    """
    whole = row_bytes // block * block * 8
    rest = -(-row_bytes // block) * block * 8 - whole
    repeated = max(rest - (8 * row_bytes - whole), 0) if whole else 0
    lead = [(0, 0)] * (u.ndim - 1)
    padded = jnp.pad(u, [*lead, (0, 8 * row_bytes - u.shape[-1])])
    last = padded[..., whole:]
    last = jnp.pad(last, [*lead, (repeated, rest - repeated - last.shape[-1])])
    return jnp.concatenate([padded[..., :whole], last], axis=-1)


def fragments(
    u: jax.Array, limbs: int, row_bytes: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`u: [b, k, m, i]` -> the kernel's planes int32 `[k, m, b, n, c, 256]`, total int32
    `[k, m, b, n]` and scale float32 `[k, m, b]`, n groups of 16 planes and c blocks of 512 inputs.

    Element `128 s + 16 p + 4 t + 2 k + h` of a block is word `4 t + 2 s + k` of plane `p + 8 h`.
    """
    made = bit_planes(lay_inputs(u, row_bytes, 64), 8 * limbs)
    words = jax.lax.bitcast_convert_type(made.words, jnp.int32)
    groups = made.totals.shape[-1]
    words = jnp.pad(words, [(0, 0)] * 3 + [(0, 16 * groups - words.shape[3]), (0, 0)])
    # b k m n h p c t s k -> k m b n c s p t k h
    words = words.reshape(*words.shape[:3], groups, 2, 8, -1, 4, 2, 2)
    words = words.transpose(1, 2, 0, 3, 6, 8, 5, 7, 9, 4)
    planes = words.reshape(*words.shape[:5], 256)
    return planes, jnp.moveaxis(made.totals, 0, 2), jnp.moveaxis(made.scale, 0, 2)


def columns_of(u: jax.Array, limbs: int, row_bytes: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`u: [b, k, m, i]` -> the kernel's q int8 `[k, m, c, inputs]`, total int32 and scale float32
    `[k, m, c]`: `Tiles.per_row` columns for each row, and columns of 0 to fill the chunks."""
    cut = tiles(u.shape[0], limbs, row_bytes)
    made = to_limbs(lay_inputs(u, row_bytes, cut.block), limbs)
    weights = jnp.asarray([float(RADIX) ** (limbs - 1 - n) for n in range(limbs)], jnp.float32)
    scale = made.scale[..., None] * weights.reshape(1, 1, 1, -1)
    more = [(0, cut.chunks * cut.columns // cut.per_row - u.shape[0]), (0, cut.per_row - limbs)]

    def lay(array):
        array = jnp.moveaxis(array, 0, 2)
        array = jnp.pad(array, [(0, 0), (0, 0), *more, *[(0, 0)] * (array.ndim - 4)])
        return array.reshape(*array.shape[:2], -1, *array.shape[4:])

    return lay(made.q), lay(made.totals), lay(scale)
