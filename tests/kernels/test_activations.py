"""Fixed point against NumPy integers: limbs and planes add up to the rounded activation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax.kernels.activations import bit_planes, limbs
from rabit_jax.kernels.layout import unpack_bits


@pytest.fixture(scope="module")
def rows():
    """Normal, with an outlier, all alike, zero, tiny and huge rows, `[6, 300]` float32."""
    u = np.random.default_rng(0).normal(size=(6, 300)).astype(np.float32)
    u[1, 7] = 60.0
    u[2] = -3.5
    u[3] = 0.0
    u[4] *= 1e-25
    u[5] *= 1e30
    return u


def rounding(bits):
    """Half a unit; 24 bits are all that float32 has, so its division adds its own rounding."""
    return 0.51 if bits < 24 else 1.1


@pytest.mark.parametrize("n", [1, 2, 3])
def test_limbs_are_the_rounded_row_in_radix_256(rows, n):
    q, scale, totals = map(np.asarray, limbs(jnp.asarray(rows), n))
    assert q.dtype == np.int8 and q.shape == (6, n, 300) and q[:, 0].min() >= -127
    v = sum(q[:, l].astype(np.int64) * 256 ** (n - 1 - l) for l in range(n))
    error = np.abs(v * scale[:, None].astype(np.float64) - rows)
    assert (error <= rounding(8 * n) * scale[:, None]).all()
    np.testing.assert_array_equal(totals, q.sum(axis=2, dtype=np.int64))
    sums = sum(totals[:, l].astype(np.int64) * 256 ** (n - 1 - l) for l in range(n))
    np.testing.assert_array_equal(sums, v.sum(axis=1))
    top = np.abs(rows).max(axis=1)
    np.testing.assert_allclose(scale[top > 0], top[top > 0] / np.abs(v).max(axis=1)[top > 0],
                               rtol=1e-6)


@pytest.mark.parametrize("n", [16, 24])
def test_planes_are_the_twos_complement_of_the_rounded_row(rows, n):
    words, scale, totals = map(np.asarray, bit_planes(jnp.asarray(rows), n))
    assert words.dtype == np.uint32 and words.shape == (6, n, 16)
    bits = np.asarray(unpack_bits(jnp.asarray(words.view(np.uint8)), 300)).astype(np.int64)
    weights = 2 ** np.arange(n, dtype=np.int64)
    weights[-1] *= -1
    v = np.einsum("bpi,p->bi", bits, weights)
    error = np.abs(v * scale[:, None].astype(np.float64) - rows)
    assert (error <= rounding(n) * scale[:, None]).all()
    sums = sum(totals[:, j].astype(np.int64) << 16 * j for j in range(totals.shape[1]))
    np.testing.assert_array_equal(sums, v.sum(axis=1))


def test_padding_holds_no_bit(rows):
    words = np.asarray(bit_planes(jnp.asarray(rows), 16).words)
    beyond = np.asarray(unpack_bits(jnp.asarray(words.view(np.uint8)), 512))[..., 300:]
    assert not beyond.any()


@pytest.mark.parametrize("make", [lambda u: limbs(u, 2), lambda u: bit_planes(u, 16)])
def test_nan_and_infinity_show_in_the_scale_of_their_row_alone(rows, make):
    rows = rows.copy()
    rows[0, 3], rows[1, 3] = np.nan, np.inf
    scale = np.asarray(jax.jit(make)(jnp.asarray(rows)).scale)
    assert np.isnan(scale[0]) and np.isinf(scale[1]) and np.isfinite(scale[2:]).all()
