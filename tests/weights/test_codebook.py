"""`Codebook` and its packed form against float64 NumPy loops."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax.errors import BadInput
from rabit_jax.formats.packed_file import stored_parts
from rabit_jax.weights.codebook import Codebook, PackedCodebook

STAGES, BITS, DIM, O = 2, 3, 4, 12
ENTRIES = 2**BITS
dense_of = jax.jit(lambda node: node.dense())
product = jax.jit(lambda node, x: node.matmul(x))


def make(i=42, lead=(2,), stages=STAGES):
    """Random codes and tables; d = 4 does not divide 42."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, ENTRIES, (*lead, stages, -(-i // DIM), O)).astype(np.uint8)
    books = rng.normal(size=(*lead, stages, ENTRIES, DIM)) * 0.5 ** np.arange(stages)[:, None, None]
    g = rng.uniform(0.5, 2, (*lead, O))
    return Codebook(
        jnp.asarray(codes), jnp.asarray(books, jnp.float32), jnp.asarray(g, jnp.float32), i
    )


def loops64(node):
    """The term of each stage `[stages, ..., i, o]` in float64, element by element."""
    codes = np.asarray(node.codes)
    books, g = (np.asarray(a, np.float64) for a in (node.codebooks, node.g))
    terms = np.zeros((node.k, *node.shape))
    for s, *l, r, c in np.ndindex(*terms.shape):
        entry = codes[(*l, s, r // DIM, c)]
        terms[(s, *l, r, c)] = g[(*l, c)] * books[(*l, s, entry, r % DIM)]
    return terms


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)], ids=str)
def test_forward_reads_the_written_entries(lead):
    node = make(lead=lead)
    terms = loops64(node)
    assert node.shape == (*lead, 42, O) and node.k == STAGES
    np.testing.assert_allclose(dense_of(node), terms.sum(0), rtol=0, atol=2e-6)
    paths = list(node.paths())
    assert len(paths) == node.k
    for got, want in zip(paths, terms, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_matmul_rounds_the_weight_once():
    node = make(lead=())
    x = jax.random.normal(jax.random.key(0), (3, 42))
    want = np.asarray(x, np.float64) @ loops64(node).sum(0)
    np.testing.assert_allclose(product(node, x), want, atol=1e-4)
    half = x.astype(jnp.bfloat16)
    np.testing.assert_array_equal(node.matmul(half), half @ dense_of(node).astype(jnp.bfloat16))


def test_gradients_of_tables_and_scales_are_exact():
    node = make()
    cotangent = np.random.default_rng(3).normal(size=node.shape).astype(np.float32)

    @jax.jit
    @jax.grad
    def gradient(trained):
        return jnp.sum(node.replace(**trained).dense() * cotangent)

    got = gradient({"codebooks": node.codebooks, "g": node.g})
    codes, g = np.asarray(node.codes), np.asarray(node.g, np.float64)
    books, dg = np.zeros(node.codebooks.shape), np.zeros(node.g.shape)
    terms = loops64(node)
    for l, r, c in np.ndindex(*node.shape):
        slope = np.float64(cotangent[l, r, c])
        dg[l, c] += slope * terms[:, l, r, c].sum() / g[l, c]
        for s in range(STAGES):
            books[l, s, codes[l, s, r // DIM, c], r % DIM] += slope * g[l, c]
    np.testing.assert_allclose(got["codebooks"], books, rtol=0, atol=5e-5)
    np.testing.assert_allclose(got["g"], dg, rtol=0, atol=5e-5)


def test_packing_keeps_the_codes_and_rounds_the_tables():
    node = make(i=1100)  # 275 vectors: codes are padded to 512
    packed = node.pack("w")
    assert isinstance(packed, PackedCodebook) and packed.pack("w") is packed
    assert packed.bits.dtype == jnp.uint8 and packed.bits.shape == (2, STAGES, BITS, O, 64)
    assert packed.codebooks.dtype == packed.g.dtype == jnp.float16
    np.testing.assert_array_equal(packed.codes(), node.codes)
    assert packed.shape == node.shape and packed.k == node.k
    bound = 1.01 * 2.0**-10 * sum(np.abs(term) for term in node.paths()) + 1e-6
    assert (np.abs(dense_of(packed) - dense_of(node)) <= bound).all()
    np.testing.assert_allclose(sum(packed.paths()), dense_of(packed), rtol=0, atol=1e-6)
    one = jax.tree.map(lambda a: a[1], packed)
    x = jax.random.normal(jax.random.key(0), (3, 1100))
    want = np.asarray(x, np.float64) @ np.asarray(dense_of(packed), np.float64)[1]
    np.testing.assert_allclose(product(one, x), want, atol=5e-4)
    assert product(one, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize(("i", "padding"), [(1024, 0), (1100, 45), (42, 53)])
def test_sizes_are_those_of_the_bytes(i, padding):
    node = make(i=i)
    packed = node.pack("w")
    held = sum(array.nbytes for array in stored_parts(packed).values())
    m = -(-i // DIM)
    codes, rest = STAGES * BITS * m * O, 16 * STAGES * ENTRIES * DIM + 16 * O
    assert 8 * held == 2 * (codes + STAGES * BITS * padding * O + rest)
    additions, lookups = 2 * STAGES * i * O, 2 * STAGES * m * O
    for weight in (node, packed, jax.eval_shape(lambda: node), jax.eval_shape(lambda: packed)):
        assert weight.shape == (2, i, O)
        assert weight.deployed_bytes() == held
        assert weight.bits_per_weight() == pytest.approx((codes + rest) / (i * O), rel=1e-12)
        assert weight.cost() == (2 * (i * O + O), additions, lookups, held)


def test_the_header_gives_back_the_shapes():
    packed = make(lead=()).pack("w")
    header = json.loads(json.dumps(packed.header()))
    assert header == {
        "type": "codebook", "in": 42, "out": O, "stages": STAGES, "bits": BITS, "dim": DIM
    }  # fmt: skip
    assert PackedCodebook.abstract(header) == jax.eval_shape(lambda: packed)
    assert make().pack("w").header() == header


@pytest.mark.parametrize(
    ("leaf", "at", "value"),
    [("g", (1, 5), 0.0), ("g", (1, 5), -1.0), ("g", (1, 5), 1e6),
     ("codebooks", (1, 0, 2, 3), np.nan), ("codebooks", (1, 0, 2, 3), 7e4)],
    ids=str,
)  # fmt: skip
def test_values_out_of_the_float16_range_are_refused_by_name(leaf, at, value):
    node = make()
    spoilt = node.replace(**{leaf: getattr(node, leaf).at[at].set(value)})
    where = ", ".join(map(str, at))
    with pytest.raises(BadInput, match=rf"^layers/q/kernel: \w+ {leaf}\[{where}\]"):
        spoilt.pack("layers/q/kernel")


def test_roles_name_every_leaf():
    assert jax.tree.leaves(make().roles()) == ["code", "level", "scale"]
    assert jax.tree.leaves(make().pack("w").roles()) == ["code", "level", "scale"]
