"""The `rb256` layout against an explicit loop."""

import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax.kernels import layout
from rabit_jax.kernels.layout import pack_bits, packed_bytes, unpack_bits


@pytest.mark.parametrize("inputs", [1, 33, 256, 300, 512])
def test_bit_p_of_byte_j_of_block_c_is_input_256c_32p_j(inputs):
    positive = np.random.default_rng(inputs).random((2, 3, inputs)) < 0.5
    blocks = -(-inputs // 256)
    want = np.zeros((2, 3, 32 * blocks), np.uint8)
    for a, b, n in zip(*np.nonzero(positive), strict=True):
        c, p, j = n // 256, n % 256 // 32, n % 32
        want[a, b, 32 * c + j] |= 1 << p
    bits = pack_bits(jnp.asarray(positive))
    assert bits.dtype == jnp.uint8 and packed_bytes(inputs) == 32 * blocks
    np.testing.assert_array_equal(bits, want)
    back = unpack_bits(jnp.asarray(want), inputs)
    assert back.dtype == jnp.uint8
    np.testing.assert_array_equal(back, positive)


@pytest.mark.parametrize("n", [0, 31, 32, 255, 256, 300])
def test_a_single_sign_sets_a_single_bit(n):
    bits = np.asarray(pack_bits(jnp.arange(301)[None] == n))[0]
    assert np.flatnonzero(bits).tolist() == [32 * (n // 256) + n % 32]
    assert bits.max() == 1 << (n % 256 // 32)


def test_padding_is_zero():
    bits = np.asarray(pack_bits(jnp.ones((1, 40), bool)))[0]
    assert bits.tolist() == [3] * 8 + [1] * 24


@pytest.mark.parametrize("inputs", [1, 63, 64, 65, 128, 200, 255, 256, 257, 448, 576, 768])
def test_a_file_pads_rows_to_64_inputs(inputs):
    positive = np.random.default_rng(inputs).integers(0, 2, (2, 3, inputs)).astype(bool)
    bits = np.asarray(layout.pack_bits(jnp.asarray(positive)))
    stored = layout.to_stored(bits, inputs)
    assert stored.shape == (2, 3, 8 * -(-inputs // 64)) == (2, 3, layout.stored_bytes(inputs))
    np.testing.assert_array_equal(layout.from_stored(stored, inputs), bits)
    # The last block has n = 8, 16, 24 or 32 bytes: bit p of byte j is its input n p + j.
    whole = inputs // 256
    size = stored.shape[-1] - 32 * whole
    for n in range(256 * whole, inputs):
        p, j = divmod(n - 256 * whole, size)
        byte = stored[..., 32 * whole + j]
        np.testing.assert_array_equal(byte >> p & 1, positive[..., n])
