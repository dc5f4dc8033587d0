"""Runs the plain form of the Triton kernels in Triton's interpreter and prints their errors.

A process of its own: Triton reads TRITON_INTERPRET when it is imported, and torch holds the arrays.
Arguments: cases as JSON; prints of each, as JSON, `[relative error, largest error of any output,
whether the activations are laid as plain array operations lay them]`.
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax.numpy as jnp
import numpy as np
import torch

from rabit_jax.kernels.gpu import triton_activations, triton_b1, triton_dense, triton_int8
from rabit_jax.kernels.layout import pack_bits, unpack_bits
from tests.kernels import triton_layouts


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


def laid(kernel, u, want, parts, constants, grid):
    """What a kernel makes of activations, and whether it is what is wanted.

    The kernel's totals are of parts of the inputs, which lie along axis `parts[0]` of the wanted.

    XLA divides by the scale with another rounding, so that a value now and then is one unit off. Of
    values that lie elsewhere half of the bits would differ.
    """
    shapes = [array.shape for array in want]
    shapes[1] = (*shapes[1][: parts[0]], parts[1], *shapes[1][parts[0] :])
    outs = [torch.full(shape, 77, dtype=getattr(torch, array.dtype.name))
            for shape, array in zip(shapes, want, strict=True)]
    kernel[grid](torch.from_numpy(np.array(u)), *outs, **constants)
    values, total, scale = found = [out.numpy() for out in outs]
    bits, wanted = (np.unpackbits(np.array(a).view(np.uint8)) for a in (values, want[0]))
    close = np.allclose(total.sum(parts[0]), want[1], rtol=0.01, atol=100)
    same = np.mean(bits != wanted) < 0.05 and close and np.allclose(scale, want[2], rtol=1e-6)
    return found, bool(same)


def product(impl, u, bits, g, rows, limbs, parts):
    layer, row_bytes = jnp.ones(1, jnp.int32), bits.shape[-1]
    if impl == "triton_int8":
        cut, constants, grid = triton_int8.plan(u.shape[0], bits.shape, rows, limbs)
        own, places = triton_activations.limb_plan(
            u.shape, limbs, row_bytes, cut.block, cut.chunks * cut.columns, cut.per_row)
        made, same = laid(
            triton_activations.lay_limbs, u, triton_layouts.columns_of(u, limbs, row_bytes),
            (2, places[0]), own, places)
        kernel = triton_int8.int8_partials
    else:
        constants, grid = triton_b1.plan(u.shape[0], bits.shape, rows, limbs)
        want = triton_layouts.fragments(u, limbs, row_bytes)
        made, same = laid(
            triton_activations.lay_planes, u, want, (4, want[0].shape[4]),
            triton_activations.plane_constants(u.shape, limbs, row_bytes),
            (want[0].shape[4], u.shape[1] * u.shape[2], u.shape[0]))
        kernel = triton_b1.b1_partials
    if parts:
        constants["SPLITS"], grid = parts, (grid[0], bits.shape[1] * parts, grid[2])
    shape = (grid[1], u.shape[0], g.shape[-1])
    return run(kernel, (layer, bits, *made, g), constants, grid, shape), same


def dense(bits, g, rows, i):
    """The matrix of layer 1 with input scales, and how far it is off the one of float64."""
    h = np.random.default_rng(1).uniform(0.5, 2, (*g.shape[:2], len(rows), i)).astype(np.float16)
    constants, grid = triton_dense.plan(bits.shape, i, rows)
    w = torch.full((sum(rows), i), float("nan"))
    tensors = [torch.from_numpy(np.array(a)) for a in (np.ones(1, np.int32), bits, g, h)]
    triton_dense.dense_rows[grid](*tensors, w, **constants)
    member = np.repeat(np.arange(len(rows)), rows)
    signs = np.asarray(unpack_bits(bits[1], i), np.float64) * 2 - 1
    want = np.einsum("koi,ko,koi->oi", signs, np.asarray(g[1], np.float64),
                     h[1][:, member].astype(np.float64))
    return float(np.linalg.norm(w.numpy() - want) / np.linalg.norm(want))


def error(impl, batch, k, rows, i, limbs, parts, outlier):
    u, bits, g, want = case(batch, k, tuple(rows), i, outlier=outlier)
    if impl == "triton_dense":
        wrong = dense(bits, g, tuple(rows), i)
        return [wrong, wrong, True]
    y, same = product(impl, u, bits, g, tuple(rows), limbs, parts)
    wrong = np.abs(y - want).max(0) / np.sqrt(np.mean(want**2))
    error = float(np.linalg.norm(y - want) / np.linalg.norm(want))
    return [error, float(wrong.max()), same]


if __name__ == "__main__":
    print(json.dumps([error(*one) for one in json.loads(sys.argv[1])]))
