"""Rounding to 16 bits, checksums and versions of packed files."""

import hashlib

import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax.errors import BadInput
from rabit_jax.formats.packed_file import check_version, checksum, nearest_16bit


def test_sixteen_bits_are_the_closer_of_two():
    rng = np.random.default_rng(0)
    small = rng.normal(size=1000).astype(np.float32)
    brain = (small * 1e-6).astype(jnp.bfloat16)
    assert nearest_16bit(small, "x").dtype == np.float16
    assert nearest_16bit(small * 65536, "x").dtype == jnp.bfloat16
    np.testing.assert_array_equal(nearest_16bit(brain, "x"), brain)
    np.testing.assert_array_equal(nearest_16bit(small.astype(np.float16), "x"),
                                  small.astype(np.float16))
    for bad in (np.nan, np.inf, np.finfo(np.float32).max):
        with pytest.raises(BadInput, match="^final_norm/scale holds a value"):
            nearest_16bit(np.array([1, bad], np.float32), "final_norm/scale")


def test_checksums_cover_dtype_shape_and_bytes():
    value = np.arange(6, dtype=np.float16).reshape(2, 3)
    wanted = hashlib.sha256(b"float16[2, 3]" + value.tobytes()).hexdigest()
    assert checksum(value) == checksum(np.asfortranarray(value)) == wanted
    others = [value.T, value.reshape(3, 2), value.view(jnp.bfloat16), value[::-1]]
    assert len({wanted, *map(checksum, others)}) == 5


def test_versions():
    check_version({"format": "rb256", "version": "4"}, "file")
    check_version({"format": "rb256", "version": 3}, "config.json")
    for found in ({}, {"format": "rb256", "version": 11}, {"format": "rb512", "version": 4}):
        with pytest.raises(BadInput, match="^file has format .* version 3 and 4"):
            check_version(found, "file")
