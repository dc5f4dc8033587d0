"""Runs the plain form of the Triton kernels in Triton's interpreter and prints their errors.

A process of its own: Triton reads TRITON_INTERPRET when it is imported, and torch holds the arrays.
Arguments: cases as JSON; prints `[relative error, largest error of any output]` of each as JSON.
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax.numpy as jnp
import numpy as np
import torch

from rabit_jax.kernels.gpu import triton_b1, triton_int8
from rabit_jax.kernels.layout import pack_bits


def case(batch, k, rows, i, layers=2, outlier=1.0):
    """Random activations, signs and scales, and their product of layer 1 in float64."""
    rng = np.random.default_rng([batch, k, len(rows), i])
    signs = np.where(rng.random((layers, k, sum(rows), i)) < 0.5, 1.0, -1.0)
    u = rng.normal(size=(batch, k, len(rows), i)).astype(np.float32)
    u[..., i // 3] *= outlier
    g = rng.uniform(0.5, 2, (layers, k, sum(rows))).astype(np.float16)
    member = np.repeat(np.arange(len(rows)), rows)
    want = np.einsum("koi,bkoi,ko->bo", signs[1], u[:, :, member].astype(np.float64),
                     g[1].astype(np.float64))
    return jnp.asarray(u), pack_bits(jnp.asarray(signs > 0)), jnp.asarray(g), want


def run(kernel, arrays, constants, grid, shape):
    tensors = [torch.from_numpy(np.array(array)) for array in arrays]
    y = torch.full(shape, float("nan"))
    kernel[grid](*tensors, y, **{**constants, "ASM": False})
    return y.numpy().astype(np.float64).sum(0)


def product(impl, u, bits, g, rows, limbs, parts):
    layer = jnp.ones(1, jnp.int32)
    if impl == "triton_int8":
        _, constants, grid = triton_int8.plan(u.shape[0], bits.shape, rows, limbs)
        made = triton_int8.columns_of(u, limbs, bits.shape[-1])
        kernel = triton_int8.int8_partials
    else:
        constants, grid = triton_b1.plan(u.shape[0], bits.shape, rows, limbs)
        made, kernel = triton_b1.fragments(u, limbs, bits.shape[-1]), triton_b1.b1_partials
    if parts:
        constants["SPLITS"], grid = parts, (grid[0], bits.shape[1] * parts, grid[2])
    shape = (grid[1], u.shape[0], g.shape[-1])
    return run(kernel, (layer, bits, *made, g), constants, grid, shape)


def error(impl, batch, k, rows, i, limbs, parts, outlier):
    u, bits, g, want = case(batch, k, tuple(rows), i, outlier=outlier)
    y = product(impl, u, bits, g, tuple(rows), limbs, parts)
    wrong = np.abs(y - want).max(0) / np.sqrt(np.mean(want**2))
    return [float(np.linalg.norm(y - want) / np.linalg.norm(want)), float(wrong.max())]


if __name__ == "__main__":
    print(json.dumps([error(*one) for one in json.loads(sys.argv[1])]))
