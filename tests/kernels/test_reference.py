"""The reference product against float64 NumPy, and what it may hold in memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax.kernels.layout import pack_bits
from rabit_jax.kernels.matmul import packed_matmul as any_matmul

packed_matmul = functools.partial(any_matmul, impl="reference")


def case(k, i, o):
    rng = np.random.default_rng(k)
    signs = np.where(rng.random((k, o, i)) < 0.5, 1.0, -1.0)
    g, h = rng.uniform(0.5, 2, (k, o)), rng.uniform(0.5, 2, (k, i))
    g, h = jnp.asarray(g, jnp.float16), jnp.asarray(h, jnp.float16)
    dense = np.einsum("koi,ko,ki->io", signs, np.asarray(g, np.float64), np.asarray(h, np.float64))
    return pack_bits(jnp.asarray(signs > 0)), g, h, dense


@pytest.mark.parametrize(
    "dtype, tolerance", [("float32", 1e-6), ("bfloat16", 4e-3), ("float16", 1e-3)]
)
@pytest.mark.parametrize("k, i, o", [(2, 300, 31), (4, 512, 1)])
def test_the_product_is_that_of_float64(k, i, o, dtype, tolerance):
    bits, g, h, dense = case(k, i, o)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, i)), dtype)
    y = packed_matmul(x, bits, g, h)
    assert y.dtype == x.dtype and y.shape == (2, 3, o)
    want = np.asarray(x, np.float64) @ dense
    error = np.linalg.norm(np.asarray(y, np.float64) - want) / np.linalg.norm(want)
    assert error < tolerance
    assert packed_matmul(x[0, 0], bits, g, h).shape == (o,)


def test_sums_are_float32_when_products_are_bfloat16():
    # Path 1 gives 4,098 and path 2 gives -4,092; rounded to bfloat16 each would be 4,096 in size.
    x = jnp.ones((1, 4096), jnp.bfloat16).at[0, 0].set(3)
    positive = jnp.ones((2, 1, 4096), bool).at[1, 0, 1:].set(False)
    ones = jnp.ones((2, 1), jnp.float16), jnp.ones((2, 4096), jnp.float16)
    assert float(packed_matmul(x, pack_bits(positive), *ones)[0, 0]) == 6


def walk(jaxpr):
    """Every equation of a jaxpr and of those inside it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for param in eqn.params.values():
            for inner in param if isinstance(param, (list, tuple)) else [param]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from walk(inner)


@pytest.mark.parametrize("k", [2, 4])
def test_no_more_than_one_path_of_signs_is_ever_unpacked(k):
    i, o = 512, 48
    bits, g, h, _ = case(k, i, o)
    jaxpr = jax.make_jaxpr(packed_matmul)(jnp.ones((3, i)), bits, g, h).jaxpr
    equations = list(walk(jaxpr))
    scans = [eqn for eqn in equations if eqn.primitive.name == "scan"]
    assert [eqn.params["length"] for eqn in scans] == [k]
    largest = max(var.aval.size for eqn in equations for var in eqn.outvars)
    assert largest == i * o


def test_products_ask_for_float32_sums():
    # XLA on CPU may keep more precision than it is asked for, so this is read off the program.
    bits, g, h, _ = case(2, 512, 48)
    jaxpr = jax.make_jaxpr(packed_matmul)(jnp.ones((3, 512), jnp.bfloat16), bits, g, h).jaxpr
    dots = [eqn for eqn in walk(jaxpr) if eqn.primitive.name == "dot_general"]
    assert [eqn.outvars[0].aval.dtype for eqn in dots] == [jnp.float32]
    assert all(var.aval.dtype == jnp.bfloat16 for var in dots[0].invars)
