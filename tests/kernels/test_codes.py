"""The product with levels per group against float64 NumPy, tile by tile and layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax.errors import BadInput
from rabit_jax.kernels import tiles
from rabit_jax.kernels.codes import code_bytes, codes_matmul, lay_codes
from rabit_jax.kernels.layout import pack_bits


def case(bits, i, o, group, layers=2):
    """Laid codes, levels, and the float64 matrices `[l, i, o]` that they stand for."""
    rng = np.random.default_rng(bits)
    q = rng.integers(0, 2**bits, (layers, o, i))
    planes = jnp.stack([pack_bits(jnp.asarray(q >> p & 1, bool)) for p in range(bits)], axis=-3)
    n = -(-i // group)
    s, c = rng.uniform(0.5, 2, (layers, n, o)), rng.normal(size=(layers, n, o))
    s, c = (jnp.asarray(v, jnp.float16) for v in (s, c))
    wide = (np.repeat(np.asarray(v, np.float64), group, axis=1)[:, :i] for v in (s, c))
    step, low = wide
    return lay_codes(planes, i), s, c, step * q.swapaxes(1, 2) + low


@pytest.mark.parametrize(("bits", "i", "o", "group"), [
    (8, 40, 61, 40), (8, 300, 61, 64), (5, 33, 7, 16), (4, 33, 61, 33), (2, 300, 10, 128),
    (1, 1, 3, 1), (4, 64, 1, 64),
])
def test_the_product_is_that_of_float64(bits, i, o, group, monkeypatch):
    # Tiles of 8 rows, the last of which overlaps the one before it.
    monkeypatch.setattr(tiles, "TILE", 8 * i)
    codes, s, c, dense = case(bits, i, o, group)
    assert codes.shape == (2, o, code_bytes(i, bits)) and codes.dtype == jnp.uint8
    x = np.random.default_rng(9).normal(size=(2, 3, i)).astype(np.float32)
    for layer in range(2):
        y = jax.jit(lambda x, n: codes_matmul(x, codes, s, c, group=group, layer=n))(x, layer)
        want = x.astype(np.float64) @ dense[layer]
        assert y.dtype == jnp.float32 and y.shape == (2, 3, o)
        assert np.linalg.norm(y - want) < 1e-6 * np.linalg.norm(want)
    y = codes_matmul(jnp.asarray(x[0, 0], jnp.bfloat16), codes, s, c, group=group)
    assert y.dtype == jnp.bfloat16 and y.shape == (o,)


def test_half_a_byte_for_four_bits():
    codes, *_ = case(4, 33, 5, 33)
    rng = np.random.default_rng(4)
    q = rng.integers(0, 16, (2, 5, 33))
    low, high = np.asarray(codes) & 15, np.asarray(codes) >> 4
    np.testing.assert_array_equal(low, q[..., :17])
    np.testing.assert_array_equal(high[..., :16], q[..., 17:])


@pytest.mark.parametrize("change", [
    {"s": np.ones((2, 2, 5), np.float16)}, {"codes": np.ones((2, 5, 16), np.uint8)},
    {"codes": np.ones((1, 5, 20), np.uint8)},
])
def test_shapes_that_do_not_fit_are_refused(change):
    codes, s, c, _ = case(8, 40, 5, 40)
    given = {"codes": codes, "s": s, "c": c, **change}
    if given["codes"].shape[0] == 1:
        given = {**given, "s": s, "c": c}
    with pytest.raises(BadInput, match="do not fit x"):
        codes_matmul(jnp.ones(40), given["codes"], given["s"], given["c"], group=40)
