"""Many rows at once: the paths joined to one dense matrix, which the device's own product reads.

Writing and reading that matrix is paid once per call; k products with sign matrices would cost k
times the multiplications.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rabit_jax.kernels.layout import from_words, unpack_bits


def packed_matmul(
    x: jax.Array, bits: jax.Array, g: jax.Array, h: jax.Array, layer: jax.Array,
    rows: tuple[int, ...],
) -> jax.Array:
    """`x: [b, i]`, `bits: [l, k, o, bytes]` or words, `g: [l, k, o]`, `h: [l, k, m, i]` ->
    float32 `[b, o]`; the matrix is rounded once to `x.dtype`."""
    bits, g, h = (jax.lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in (bits, g, h))
    tile = dense_tile(bits, g, h, rows, x.dtype)
    # Else some devices would round float32 to 10 bits of mantissa.
    return jnp.einsum("bi,oi->bo", x, tile, precision="highest",
                      preferred_element_type=jnp.float32)


def dense_tile(
    bits: jax.Array, g: jax.Array, h: jax.Array, rows: tuple[int, ...], dtype: jax.typing.DTypeLike
) -> jax.Array:
    """`W_hat^T = sum_k diag(g_k) B_k diag(h_k)`, summed in float32 -> `[o, i]`."""
    ends = [sum(rows[: m + 1]) for m in range(len(rows))]

    def add_path(total, path):
        path_bits, path_g, path_h = path
        positive = unpack_bits(as_rows(path_bits), path_h.shape[-1])
        sizes = [g_m[:, None].astype(jnp.float32) * h_m[None].astype(jnp.float32)
                 for g_m, h_m in zip(jnp.split(path_g, ends[:-1]), path_h, strict=True)]
        size = jnp.concatenate(sizes)
        return total + jnp.where(positive == 1, size, -size), None

    zero = jnp.zeros((g.shape[-1], h.shape[-1]), jnp.float32)
    return jax.lax.scan(add_path, zero, (bits, g, h))[0].astype(dtype)


def as_rows(bits: jax.Array) -> jax.Array:
    """`rb256` bytes `[..., o, bytes]` of bytes or of words `[..., w, o]`."""
    return from_words(bits) if bits.dtype == jnp.uint32 else bits
