"""Random packed products and their float64 answer, sign by sign."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from rabit_jax.kernels.layout import pack_bits


def _problem(batch, i, rows, k=2, layers=1, outlier=0.0, seed=0, dtype="float32", spread=1.0):
    """Activations, packed weights of m = len(rows) joined matrices, and `y` of every layer.

    Returns a namespace of x `[b, i]`, bits `[l, k, o, bytes]`, g `[l, k, o]`, h `[l, k, m, i]`,
    rows, and want, float64 `[l, b, o]`. An `outlier` is set in every row of x, so many times
    larger than the rest; scales spread over a factor `spread`.
    """
    rng = np.random.default_rng(seed)
    o, m = sum(rows), len(rows)
    signs = rng.choice([-1.0, 1.0], (layers, k, o, i))
    g = np.float16(rng.uniform(0.5, 1.5, (layers, k, o)) * spread ** rng.uniform(-1, 1, o))
    h = np.float16(rng.uniform(0.5, 1.5, (layers, k, m, i)))
    x = rng.normal(size=(batch, i))
    if outlier:
        x[np.arange(batch), rng.integers(i, size=batch)] = outlier
    x = jnp.asarray(x, dtype)
    member = np.repeat(np.arange(m), rows)
    scaled = np.asarray(x, np.float64)[None, :, None, None] * h.astype(np.float64)[:, None]
    want = np.einsum("lkoi,lbkoi,lko->lbo", signs, scaled[:, :, :, member], g.astype(np.float64),
                     optimize=True)
    return SimpleNamespace(x=x, bits=pack_bits(jnp.asarray(signs > 0)), g=jnp.asarray(g),
                           h=jnp.asarray(h), rows=tuple(rows), want=want)


@pytest.fixture(scope="session")
def problem():
    """`problem(batch, i, rows, k, layers, outlier, seed, dtype, spread)`."""
    return _problem


def _relative(found, want):
    found, want = np.asarray(found, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(found - want) / np.linalg.norm(want)


@pytest.fixture(scope="session")
def relative():
    """`relative(found, want)`: norm of the difference over the norm of `want`."""
    return _relative


def _scaled(p, layer):
    return p.x.astype(jnp.float32)[:, None, None] * p.h[layer].astype(jnp.float32)[None]


@pytest.fixture(scope="session")
def scaled():
    """`scaled(p, layer)`: `u [b, k, m, i]` of a layer of a problem."""
    return _scaled


@functools.cache
def _compiled(module, rows, limbs, interpret=True):
    return jax.jit(lambda u, bits, g, layer: module.signs_matmul(
        u, bits, g, layer, rows, limbs, interpret=interpret))


@pytest.fixture(scope="session")
def compiled_pallas():
    """`compiled_pallas(module, rows, limbs, interpret)` -> `f(u, bits, g, layer)`, jitted, so that
    the layer is traced."""
    return _compiled


@pytest.fixture(scope="session")
def run_pallas():
    """`run_pallas(module, p, layer, limbs, interpret)`: the product of a layer of a problem."""
    def run(module, p, layer, limbs, interpret=True):
        product = _compiled(module, p.rows, limbs, interpret)
        return product(_scaled(p, layer), p.bits, p.g, jnp.int32(layer))

    return run


@pytest.fixture(scope="session")
def lowers_pallas():
    """`lowers_pallas(module, batch, rows, i)`: asserts that any host compiles for a GPU."""
    def check(module, batch, rows, i):
        o, shape = sum(rows), jax.ShapeDtypeStruct
        u = shape((batch, 2, len(rows), i), jnp.float32)
        bits, g = shape((3, 2, o, -(-i // 256) * 32), jnp.uint8), shape((3, 2, o), jnp.float16)
        h200 = jax.sharding.AbstractDevice("NVIDIA H200", None, "cuda")
        with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=h200)):
            text = _compiled(module, rows, 2, False).trace(u, bits, g, shape((), jnp.int32)).lower(
                lowering_platforms=("cuda",)).as_text()
        assert "triton" in text
        # The stacked bits reach the kernel as they are: no layer of them is copied.
        assert f"tensor<{2 * o}x{-(-i // 256) * 32}xui8>" not in text

    return check
