"""The native CPU kernel against integers and float64 in NumPy, on every instruction set."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax.errors import BadInput
from rabit_jax.kernels.codes import codes_matmul, laid_codes
from rabit_jax.kernels.codes import rows_at as codes_rows
from rabit_jax.kernels.cpu import calls
from rabit_jax.kernels.cpu.library import library
from rabit_jax.kernels.grouped_signs import (
    evenly_spaced,
    grouped_signs_matmul,
    laid_grouped_signs,
    rows_at,
)
from rabit_jax.kernels.layout import (
    from_groups,
    from_tiles,
    in_groups,
    pack_bits,
    to_stored,
    to_table_tiles,
    to_tiles,
)

pytestmark = pytest.mark.skipif(library() is None, reason="no native CPU kernel on this machine")
ISAS = library().isas if library() else ()
# inputs, outputs of each member, k, limbs: tails of blocks, of tiles and of members
SHAPES = [(1, (1,), 1, 2), (257, (17, 3, 40), 3, 3), (300, (8,), 2, 2), (1000, (33, 15), 4, 2),
          (64, (5, 16), 2, 1), (513, (20,), 2, 3), (32, (1,), 1, 1), (1000, (33, 15), 4, 1),
          (704, (17, 3, 40), 3, 1)]
BATCHES = (1, 2, 3, 7, 9, 65)
F32 = np.float32


def made(i, rows, k, batch, layers=2):
    """x, signs `[l, k, o, i]`, g, h of a random problem with a large, a zero and a tiny row."""
    rng = np.random.default_rng(i + k)
    o, m = sum(rows), len(rows)
    signs = rng.integers(0, 2, (layers, k, o, i)).astype(bool)
    g = rng.uniform(0.5, 1.5, (layers, k, o)).astype(np.float16)
    h = (rng.uniform(0.5, 1.5, (layers, k, m, i)) * rng.choice([-1, 1], (layers, k, m, i)))
    h = h.astype(np.float16)
    h.flat[0] = 3e-7  # a subnormal of float16
    x = rng.standard_normal((batch, i)).astype(F32)
    x[0, i // 2] *= 60
    if batch > 2:
        x[1], x[2] = 0, x[2] * F32(1e-33)
    return x, signs, g, h


def fixed(u, largest):
    """int64 `v` and float32 `scale`, by the definition of `activations` with reciprocals."""
    top = np.abs(u).max(axis=-1)
    scale = np.where(top < F32(1e-30), F32(1), top * (F32(1) / F32(largest)))
    q = u * (F32(1) / scale)[:, None]
    return np.clip(np.round(q), -largest, largest).astype(np.int64), scale


def integer_product(x, signs, g, h, rows, limbs):
    """The float32 result bit by bit: exact sums, then `y += (g scale) sum`, paths in turn.

    One limb has a scale for each block of 256 inputs: `y += g sum_c scale_c sum`.
    """
    y, ends = np.zeros((len(x), g.shape[-1]), F32), np.cumsum(rows)
    for k in range(len(signs)):
        for m, (start, end) in enumerate(zip(ends - rows, ends, strict=True)):
            u, size = x * h[k, m].astype(F32), g[k, start:end].astype(F32)
            b = 2 * signs[k, start:end].astype(np.int64) - 1
            if limbs > 1:
                v, scale = fixed(u, 2 ** (8 * limbs - 1) - 1)
                y[:, start:end] += size * scale[:, None] * (v @ b.T).astype(F32)
                continue
            total = np.zeros((len(x), end - start), F32)
            for block in range(0, x.shape[1], 256):
                part = slice(block, block + 256)
                v, scale = fixed(u[:, part], 127)
                total += scale[:, None] * (v @ b[:, part].T).astype(F32)
            y[:, start:end] += size * total
    return y


def float_product(x, signs, g, h, rows):
    member = np.repeat(np.arange(len(rows)), rows)
    w = np.einsum("koi,ko,koi->oi", 2.0 * signs - 1, g.astype(float), h[:, member].astype(float))
    return x.astype(float) @ w.T, np.abs(x.astype(float)) @ np.abs(w).T


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("i, rows, k, limbs", SHAPES)
def test_integers_are_those_of_numpy_bit_by_bit(isa, i, rows, k, limbs):
    for batch in BATCHES:
        x, signs, g, h = made(i, rows, k, batch)
        want = integer_product(x, signs[1], g[1], h[1], rows, limbs)
        bits = pack_bits(jnp.asarray(signs))
        for laid in (bits, to_tiles(bits, rows, i)):
            for dtype in (np.float16, F32):
                y = calls.signs_matmul(x, laid, g.astype(dtype), h.astype(dtype), 1, rows, limbs,
                                       isa=isa)
                np.testing.assert_array_equal(y, want)


@pytest.mark.parametrize("i, rows, k, limbs", SHAPES)
def test_floats_are_those_of_float64_and_alike_on_every_instruction_set(i, rows, k, limbs):
    for batch in (1, 13, 65):
        x, signs, g, h = made(i, rows, k, batch)
        bits = pack_bits(jnp.asarray(signs))
        want, size = float_product(x, signs[1], g[1], h[1], rows)
        found = [np.asarray(calls.signs_matmul(x, laid, g, h, 1, rows, limbs, calls.FLOAT32, isa))
                 for isa in ISAS for laid in (bits, to_tiles(bits, rows, i))]
        # An error of one rounding for each product and sum.
        assert (np.abs(found[0] - want) <= 3e-7 * np.sqrt(i + 8) * size + 1e-37).all()
        for other in found[1:]:
            np.testing.assert_array_equal(other, found[0])


@pytest.mark.parametrize("i, rows, k, limbs", SHAPES)
def test_bfloat16_rounds_both_factors_once(i, rows, k, limbs):
    isa = ISAS[0]
    if not library().bfloat16[0]:
        pytest.skip("this machine multiplies no bfloat16")
    for batch in (1, 13, 65):
        x, signs, g, h = made(i, rows, k, batch)
        want, size = float_product(x, signs[1], g[1], h[1], rows)
        tiles = to_tiles(pack_bits(jnp.asarray(signs)), rows, i)
        y = calls.signs_matmul(x, tiles, g, h, 1, rows, limbs, calls.BFLOAT16, isa)
        assert (np.abs(y - want) <= 2 * 2.0**-8 * size + 1e-37).all()
        assert i < 3 or not (np.abs(y - want) <= 1e-6 * size).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("i, o", [(5, 3), (1001, 77), (512, 48)])
@pytest.mark.parametrize("limbs", [1, 2, 3])
def test_tables_are_those_of_numpy_bit_by_bit(isa, i, o, limbs):
    rng = np.random.default_rng(i)
    table = rng.integers(-128, 128, (o, i)).astype(np.int8)
    table[0] = -128
    scale = rng.uniform(0.5, 1.5, o).astype(np.float16)
    largest = 127 * 256 ** (limbs - 1) - (128 if limbs > 1 else 0)
    for batch in (1, 3, 17):
        x = rng.standard_normal((batch, i)).astype(F32)
        v, one = fixed(x, largest)
        want = scale.astype(F32) * one[:, None] * (v @ table.T.astype(np.int64)).astype(F32)
        tiles = to_table_tiles(jnp.asarray(table))[None]
        y = calls.table_matmul(x, tiles, scale[None, None], limbs, isa)
        np.testing.assert_array_equal(y, want)


def test_the_largest_sums_do_not_overflow():
    x = np.full((2, 32768), 1.0, F32)
    ones = to_tiles(pack_bits(jnp.ones((1, 1, 1, 32768), bool)), (1,), 32768)
    g, h = np.ones((1, 1, 1), F32), np.ones((1, 1, 1, 32768), F32)
    table = to_table_tiles(jnp.full((1, 1, 32768), -128, jnp.int8))
    for isa in ISAS:
        for limbs in (1, 2, 3):
            y = calls.signs_matmul(x, ones, g, h, 0, (1,), limbs, isa=isa)
            assert np.abs(np.asarray(y) - 32768).max() < 0.01
            y = calls.table_matmul(x, table, g, limbs, isa)
            assert np.abs(np.asarray(y) + 128 * 32768).max() < 1


def test_each_path_may_have_its_own_activations():
    x, signs, g, h = made(300, (8,), 2, 3)
    tiles = to_tiles(pack_bits(jnp.asarray(signs)), (8,), 300)
    scaled = x[:, None] * h[0, :, 0].astype(F32)
    y = calls.signs_matmul(scaled, tiles, g, None, 0, (8,), 2)
    np.testing.assert_array_equal(y, calls.signs_matmul(x, tiles, g, h, 0, (8,), 2))


@pytest.mark.parametrize("how", [calls.INTEGERS, calls.FLOAT32])
def test_nan_stays_in_its_row(how):
    x, signs, g, h = made(300, (8,), 2, 4)
    tiles = to_tiles(pack_bits(jnp.asarray(signs)), (8,), 300)
    x[3, 7] = np.nan
    y = np.asarray(calls.signs_matmul(x, tiles, g, h, 0, (8,), 2, how))
    assert np.isnan(y[3]).all() and np.isfinite(y[:3]).all()


def test_vmap_multiplies_one_by_one():
    x, signs, g, h = made(64, (16,), 1, 5)
    bits = pack_bits(jnp.asarray(signs))

    def one(x):
        return calls.signs_matmul(x[None], bits, g, h, 0, (16,), 2)[0]

    np.testing.assert_array_equal(jax.vmap(one)(jnp.asarray(x)),
                                  calls.signs_matmul(x, bits, g, h, 0, (16,), 2))


def test_tiles_hold_words_of_16_outputs_and_turn_back():
    rows = (17, 3)
    bits = np.random.default_rng(0).integers(0, 256, (2, 3, 20, 64), np.uint8)
    tiles = np.asarray(to_tiles(jnp.asarray(bits), rows, 512))
    assert tiles.shape == (2, 3, 3, 16, 16)
    # The second member begins a tile: output 18 is the second of tile 2.
    assert tiles[1, 2, 0, 5, 1] == bits[1, 0, 18, 20:24].view(np.uint32)[0]
    assert not tiles[:, 1, :, :, 1:].any() and not tiles[:, 2, :, :, 3:].any()
    np.testing.assert_array_equal(from_tiles(jnp.asarray(tiles), rows, 512), bits)


@pytest.mark.parametrize("i, words", [(576, 18), (300, 10), (64, 2), (1, 2), (250, 8), (512, 16)])
def test_tiles_end_in_a_block_as_short_as_that_of_a_file(i, words):
    signs = np.random.default_rng(i).integers(0, 2, (2, 17, i)).astype(bool)
    bits = pack_bits(jnp.asarray(signs))
    tiles = np.asarray(to_tiles(bits, (17,), i))
    assert tiles.shape == (2, 2, words, 16)
    np.testing.assert_array_equal(from_tiles(jnp.asarray(tiles), (17,), i), bits)
    stored = to_stored(np.asarray(bits), i).view(np.uint32)  # [k, o, words]
    np.testing.assert_array_equal(tiles[0].transpose(0, 2, 1), stored[:, :16])


def test_more_inputs_than_integers_sum_exactly_are_refused_and_floats_chosen():
    assert calls.arithmetic(1, 32768, 2, 2, False, "avx512") == calls.INTEGERS
    assert calls.arithmetic(1, 32769, 2, 2, False, "avx512") == calls.FLOAT32
    with pytest.raises(BadInput, match="integers got 32769 inputs"):
        calls.signs_matmul(np.ones((1, 32769), F32), None, None, None, 0, (1,), 2)


@pytest.mark.parametrize("isa", calls.COSTS)
def test_few_rows_are_integers_and_many_are_floats(isa):
    for k in range(1, 5):
        hows = [calls.arithmetic(batch, 2048, k, 2, True, isa) for batch in range(1, 200)]
        assert hows[0] == calls.INTEGERS and hows[-1] == calls.BFLOAT16
        assert hows == sorted(hows)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [8, 4])
def test_attention_to_codes_is_that_of_their_values_in_float64(isa, bits):
    """Two layers, several pieces of slots, a row with slots of its own."""
    rng = np.random.default_rng(bits)
    l, b, n, g, s, h = 2, 2, 2, 3, 300, 64
    q = rng.standard_normal((b, n * g, h)).astype(F32)
    keys, values = (code(rng, (l, b, n, s, h), bits) for _ in "kv")
    allowed = rng.random((b, s)) < 0.7
    allowed[1, 40:] = False
    found = calls.attention(q, keys[0], values[0], jnp.int32(1), allowed, 0.2, 30.0, isa)
    k, v = keys[1][1], values[1][1]
    scores = np.einsum("bngh,bnsh->bngs", np.float64(q).reshape(b, n, g, h) * 0.2, k)
    scores = np.where(allowed[:, None, None], 30 * np.tanh(scores / 30), -np.inf)
    share = np.exp(scores - scores.max(-1, keepdims=True))
    share /= share.sum(-1, keepdims=True)
    want = np.einsum("bngs,bnsh->bngh", share, v).reshape(b, n * g, h)
    np.testing.assert_allclose(found, want, atol=2e-5)


def code(rng, shape, bits):
    """Random codes with the bits of their scales, and their values in float64."""
    *lead, h = shape
    if bits == 8:
        codes = rng.integers(-127, 128, shape).astype(np.int8)
        s = rng.uniform(0.005, 0.02, (*lead, 1)).astype(np.float16)
        return (codes, s.view(np.uint16)), np.float64(codes) * np.float64(s)
    codes = rng.integers(0, 16, shape).astype(np.uint8)
    both = rng.uniform(0.05, 0.2, (*lead, 4)).astype(np.float16)
    both[..., 2:] *= -8
    step, low = (np.repeat(np.float64(part), h // 2, axis=-1) for part in np.split(both, 2, -1))
    packed = codes[..., : h // 2] | codes[..., h // 2 :] << 4
    return (packed, both.view(np.uint16)), np.float64(codes) * step + low


def grouped(i, group, k, batch, o=41, layers=2):
    """x, signs `[l, k, o, i]`, g `[l, k, n, o]`, h `[l, k, i]`, c `[l, n, o]` at random."""
    x, signs, _, h = made(i, (o,), k, batch, layers)
    rng, n = np.random.default_rng(group), -(-i // group)
    g = rng.uniform(0.5, 1.5, (layers, k, n, o)).astype(np.float16)
    return x, signs, g, h[:, :, 0], rng.standard_normal((layers, n, o)).astype(F32)


GROUPS = [(576, 64, 2), (300, 32, 1), (1000, 128, 4), (513, 96, 3), (600, 256, 2), (1100, 512, 2)]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("i, group, k", GROUPS)
def test_groups_are_integers_of_numpy_bit_by_bit(isa, i, group, k):
    for batch in (1, 3, 9):
        x, signs, g, h, _ = grouped(i, group, k, batch)
        tiles = laid_grouped_signs(pack_bits(jnp.asarray(signs)), i, group, "cpu")
        want = np.zeros((batch, g.shape[-1]), F32)
        for path in range(k):
            v, scale = fixed(x * h[1, path].astype(F32), 2**15 - 1)
            for n, start in enumerate(range(0, i, group)):
                part = slice(start, start + group)
                sums = v[:, part] @ (2 * signs[1, path, :, part].astype(np.int64) - 1).T
                want += g[1, path, n].astype(F32) * scale[:, None] * sums.astype(F32)
        y = calls.signs_matmul(in_groups(jnp.asarray(x), group), tiles, g,
                               in_groups(jnp.asarray(h), group)[:, :, None], 1, (41,), 2, isa=isa,
                               group=group // 32)
        np.testing.assert_array_equal(y, want)


@pytest.mark.parametrize("i, group, k", [*GROUPS, (300, 1000, 2), (300, 300, 3)])
@pytest.mark.parametrize("with_h, with_c", [(True, False), (False, True)])
def test_groups_in_tiles_are_those_of_float64(i, group, k, with_h, with_c):
    for batch, bound in ((1, 1e-4), (13, 1e-4), (200, 1e-6)):  # fixed point, then floats
        x, signs, g, h, c = grouped(i, group, k, batch)
        size, low = (np.repeat(v[1].astype(float), group, axis=-2)[..., :i, :] for v in (g, c))
        w = np.einsum("koi,kio->kio", 2.0 * signs[1] - 1, size)
        w = (w * h[1].astype(float)[..., None] if with_h else w).sum(axis=0) + with_c * low
        bits = pack_bits(jnp.asarray(signs))
        tiles = laid_grouped_signs(bits, i, group, "cpu")
        given = (g, h if with_h else None, c if with_c else None)
        assert tiles.dtype == jnp.uint32 and bits.dtype == jnp.uint8
        room = np.abs(x) @ np.abs(w)
        for laid in (tiles, bits):
            y = grouped_signs_matmul(jnp.asarray(x), laid, *given, group=group, layer=1)
            # Fixed point is exact to half a step of the largest activation.
            step = np.abs(x).max(axis=1, keepdims=True) * np.abs(w).sum(axis=0) * 2e-5
            assert (np.abs(y - x.astype(float) @ w) <= 3 * (bound * room + step) + 1e-30).all()
            rows = rows_at(laid[1:], *(None if v is None else jnp.asarray(v[1:]) for v in given),
                           jnp.array([3, 40]), i, group)
            np.testing.assert_allclose(rows, w.T[[3, 40]], rtol=1e-6, atol=1e-6)


def test_groups_have_words_of_their_own_and_turn_back():
    places = np.asarray(in_groups(jnp.arange(1, 577), 64)).reshape(3, 8, 8, 4)  # c, p, m, b
    words = places.transpose(0, 2, 1, 3).reshape(24, 32)
    for word, inputs in enumerate(words[:18]):
        assert ((inputs - 1) // 64 == word // 2).all()
    assert (words[18:] == 0).all()
    np.testing.assert_array_equal(from_groups(jnp.asarray(places.reshape(-1)), 64, 576),
                                  np.arange(1, 577))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("i, group", [(1001, 64), (576, 576), (300, 32), (5, 100)])
def test_grouped_codes_of_a_byte_are_those_of_float64(isa, i, group):
    rng = np.random.default_rng(i)
    o, n = 35, -(-i // group)
    codes = rng.integers(0, 256, (2, o, i)).astype(np.uint8)
    s, c = (rng.standard_normal((2, n, o)).astype(np.float16) for _ in range(2))
    x = rng.standard_normal((3, i)).astype(F32)
    step, low = (np.repeat(v[1].astype(float), group, axis=0)[:i] for v in (s, c))
    w = step * codes[1].T + low
    tiles = laid_codes(jnp.asarray(codes), i, group, "cpu")
    assert tiles.dtype == jnp.int8
    y = codes_matmul(jnp.asarray(x), tiles, s, c, group=group, layer=1)
    np.testing.assert_allclose(y, x @ w, atol=2e-4 * np.abs(x @ w).max())
    np.testing.assert_array_equal(codes_rows(tiles[1:], jnp.array([0, 34]), i), codes[1][[0, 34]])
    # The table alone, bit by bit.
    v, scale = fixed(x, 127 * 256 - 128)
    want = np.zeros((3, o), F32)
    for m, start in enumerate(range(0, i, group)):
        part = slice(start, start + group)
        sums = v[:, part] @ (codes[1][:, part].astype(np.int64) - 128).T
        want += s[1, m].astype(F32) * scale[:, None] * sums.astype(F32)
    found = calls.table_matmul(x, tiles, s, isa=isa, group=group if n > 1 else 0, layer=1)
    np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_levels_as_signs_are_the_same_matrix(bits):
    rng = np.random.default_rng(bits)
    i, o, group = 96, 20, 32
    codes = rng.integers(0, 2**bits, (1, o, i))
    s, c = (rng.standard_normal((1, 3, o)).astype(np.float16) for _ in range(2))
    planes = pack_bits(jnp.asarray(np.stack([codes >> p & 1 for p in range(bits)], 1).astype(bool)))
    step, low = (np.repeat(v[0].astype(float), group, axis=0) for v in (s, c))
    signs, g, offset = evenly_spaced(planes, jnp.asarray(s), jnp.asarray(c))
    rows = rows_at(signs, g, None, offset, jnp.arange(o), i, group)
    np.testing.assert_allclose(rows, (step * codes[0].T + low).T, rtol=1e-5, atol=1e-5)
