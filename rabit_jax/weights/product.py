"""The dense product `x W` of activations and a matrix, in the form that this host multiplies fast.

XLA's CPU backend multiplies bfloat16 by the matrix tiles of recent Intel CPUs (AMX), but only into
float32, and not over the first axis of a matrix; any other product of bfloat16 it widens. On such a
host the forward and both backward products are written the way that reaches the tiles, elsewhere as
`x @ W`. The result is the same but for the order of sums.
"""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from rabit_jax.types import Array

F32 = jnp.float32
NAME = "product"  # by which a policy of `jax.checkpoint` knows the results

# What `jax.checkpoint` keeps of the products with matrices, those of activations left out.
KEPT = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(NAME))


def product(x: Float[Array, "... i"], w: Float[Array, "i o"]) -> Float[Array, "... o"]:
    """`x W` in the dtype of x, to which W is rounded; sums are float32."""
    w = jnp.asarray(w, x.dtype)
    return checkpoint_name(_tiled(x, w, x.dtype), NAME) if _has_tiles(x, w) else x @ w


def wide_product(x: Float[Array, "... i"], w: Float[Array, "i o"]) -> Float[Array, "... o"]:
    """`x W` in float32, with W rounded to the dtype of x."""
    w = jnp.asarray(w, x.dtype)
    if _has_tiles(x, w):
        return checkpoint_name(_tiled(x, w, F32), NAME)
    return jnp.matmul(x, w, preferred_element_type=F32)


def _has_tiles(x: Array, w: Array) -> bool:
    return (x.dtype == jnp.bfloat16 and w.ndim == 2 and x.ndim > 1
            and jax.default_backend() == "cpu" and amx())


@functools.cache
def amx() -> bool:
    """Whether the CPU has tiles for bfloat16 (Intel's AMX), by Linux's word."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return False


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _tiled(x: Array, w: Array, dtype: jnp.dtype) -> Array:
    return jnp.matmul(x, w, preferred_element_type=F32).astype(dtype)


def _forward(x: Array, w: Array, dtype: jnp.dtype) -> tuple[Array, tuple[Array, Array]]:
    return _tiled(x, w, dtype), (x, w)


def _backward(dtype: jnp.dtype, kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = kept
    dy = dy.astype(x.dtype)
    dx = jnp.einsum("...o,io->...i", dy, w, preferred_element_type=F32)
    # Over two axes, since a sum over the first one alone is not taken for one of tiles.
    flat_x, flat_dy = (a.reshape(-1, *a.shape[-2:]) for a in (x, dy))
    dw = jnp.einsum("bti,bto->io", flat_x, flat_dy, preferred_element_type=F32)
    return dx.astype(x.dtype), dw.astype(w.dtype)


_tiled.defvjp(_forward, _backward)
