"""Activations of one byte with a scale for each 256 inputs: the error, NaN, and all kernels alike.

That the integers are those of NumPy bit by bit is in test_native.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax.errors import BadInput
from rabit_jax.kernels.activations import rounded_blocks
from rabit_jax.kernels.cpu import calls
from rabit_jax.kernels.cpu.library import library
from rabit_jax.kernels.layout import to_tiles
from rabit_jax.kernels.matmul import packed_matmul

native = pytest.mark.skipif(library() is None, reason="no native CPU kernel on this machine")
ISAS = library().isas if library() else ()


def called(p, x, isa=None, layer=0):
    """The native kernel's product with one limb."""
    tiles = to_tiles(p.bits, p.rows, x.shape[-1])
    return np.asarray(calls.signs_matmul(x, tiles, p.g, p.h, layer, p.rows, 1, isa=isa))


def bound(p):
    """Half a step for each input of each path in float64: `sum_k |g_k| sum_c n_c scale_c / 2`."""
    u = np.abs(np.asarray(p.x, float)[:, None, None] * np.asarray(p.h[0], float))  # [b, k, m, i]
    blocks = [u[..., start : start + 256] for start in range(0, u.shape[-1], 256)]
    room = sum(c.max(axis=-1) / 127 / 2 * c.shape[-1] for c in blocks)
    member = np.repeat(np.arange(len(p.rows)), p.rows)
    return np.einsum("bko,ko->bo", room[:, :, member], np.abs(np.asarray(p.g[0], float)))


@native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("i, rows, k", [(33, (5,), 1), (576, (40, 7), 3), (2048, (17,), 2)])
def test_an_output_is_off_by_half_a_step_of_each_input_at_most(problem, isa, i, rows, k):
    p = problem(5, i, rows, k, outlier=40.0)
    error = np.abs(called(p, p.x, isa) - p.want[0])
    assert (error <= bound(p) * 1.001).all()
    # Errors of roundings to the nearest are independent and do not add up to that.
    assert 0 < np.sqrt((error**2).mean()) < 2 * (bound(p) / np.sqrt(3 * k * i)).mean()


@native
def test_an_outlier_coarsens_its_block_alone(problem):
    p = problem(1, 1024, (64,), k=1)
    with_outlier = jnp.asarray(np.where(np.arange(1024) == 5, 1e4, np.asarray(p.x)))
    sign = np.sign(np.asarray(called(p, with_outlier) - called(p, p.x)))
    # What is left of the other blocks is what they were: take the outlier's own block away.
    rest = jnp.asarray(np.where(np.arange(1024) < 256, 0, np.asarray(p.x)))
    alone = jnp.asarray(np.where(np.arange(1024) < 256, np.asarray(with_outlier), 0))
    np.testing.assert_allclose(called(p, with_outlier), called(p, rest) + called(p, alone),
                               rtol=1e-5, atol=1e-2)
    assert (np.abs(sign) == 1).all()


@native
@pytest.mark.parametrize("isa", ISAS)
def test_what_is_not_finite_stays_in_its_row(problem, isa):
    p = problem(9, 700, (20,))
    for value in (np.nan, np.inf, -np.inf):
        x = np.array(p.x)
        x[3, 600] = value
        y = called(p, x, isa)
        assert not np.isfinite(y[3]).any()
        assert np.isnan(value) <= np.isnan(y[3]).all()
        np.testing.assert_array_equal(np.delete(y, 3, 0), np.delete(called(p, p.x, isa), 3, 0))


@native
def test_paths_with_activations_of_their_own(problem):
    p = problem(3, 300, (8,), k=2)
    tiles = to_tiles(p.bits, p.rows, 300)
    scaled = p.x[:, None] * p.h[0, :, 0].astype(jnp.float32)[None]
    y = calls.signs_matmul(scaled, tiles, p.g, None, 0, p.rows, 1)
    np.testing.assert_array_equal(y, called(p, p.x))


@native
def test_the_largest_blocks_do_not_overflow():
    x = np.full((8, 32768), 1.0, np.float32)
    ones = np.full((1, 1, 1, 4096), 255, np.uint8)
    g, h = np.ones((1, 1, 1), np.float32), np.ones((1, 1, 1, 32768), np.float32)
    tiles = to_tiles(jnp.asarray(ones), (1,), 32768)
    for isa in ISAS:
        for value in (1.0, -1.0):
            for rows in (1, 2, 4, 8):
                y = calls.signs_matmul(value * x[:rows], tiles, g, h, 0, (1,), 1, isa=isa)
                np.testing.assert_allclose(y, 32768 * value, rtol=1e-6)


@native
def test_groups_of_inputs_are_refused(problem):
    p = problem(1, 512, (8,))
    tiles, g = to_tiles(p.bits, p.rows, 512), jnp.stack([p.g, p.g], axis=2)
    with pytest.raises(BadInput, match="limbs is 1 and g has 2 groups of inputs: wanted one"):
        calls.signs_matmul(p.x, tiles, g, p.h, 0, p.rows, 1, group=8)


@pytest.mark.parametrize("impl", ["cpu", pytest.param("native", marks=native)])
@pytest.mark.parametrize("i, rows, k", [(300, (40,), 2), (704, (17, 3), 3)])
def test_kernels_round_as_the_reference_does(problem, relative, impl, i, rows, k):
    p = problem(4, i, rows, k, outlier=20.0)
    tiles = to_tiles(p.bits, rows, i)
    given = {"layer": 0, "rows": rows, "limbs": 1}
    want = packed_matmul(p.x, p.bits, p.g, p.h, impl="reference", **given)
    bits = tiles if impl == "native" else p.bits
    found = packed_matmul(p.x, bits, p.g, p.h, impl=impl, **given)
    assert relative(found, want) < (1e-6 if impl == "native" else 2e-4)
    assert 2e-3 < relative(found, p.want[0]) < 3e-2  # and both round
    exact = packed_matmul(p.x, p.bits, p.g, p.h, impl="reference", **given | {"limbs": 2})
    assert relative(exact, p.want[0]) < 1e-5


@pytest.mark.parametrize("compiled", [False, True])
def test_rounded_blocks_are_those_of_numpy_bit_by_bit(compiled):
    f32 = np.float32
    u = np.random.default_rng(0).standard_normal((4, 2, 600)).astype(f32)
    u[0, 0, 7], u[1], u[2] = 60, 0, u[2] * f32(1e-33)
    want = np.empty_like(u)
    for start in range(0, 600, 256):
        part = u[..., start : start + 256]
        top = np.abs(part).max(axis=-1, keepdims=True)
        scale = np.where(top < f32(1e-30), f32(1), top * (f32(1) / f32(127)))
        want[..., start : start + 256] = scale * np.round(part * (f32(1) / scale))
    run = jax.jit(rounded_blocks) if compiled else rounded_blocks
    np.testing.assert_array_equal(run(jnp.asarray(u)), want)
    u[3, 1, 599] = np.nan
    found = np.asarray(run(jnp.asarray(u)))
    assert np.isnan(found[3, 1, 512:]).all() and np.isnan(found).sum() == 88
