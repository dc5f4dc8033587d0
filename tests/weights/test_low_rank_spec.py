"""`LowRankSignSpec`: the rank of a bit budget, and Dual-SVID against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax import BadInput, convert, describe
from rabit_jax.weights.conversion import LLAMA_LINEARS
from rabit_jax.weights.low_rank_sign import LowRankSignSpec, low_rank_bits, rank_for_bits

L, I, O, R = 2, 48, 64, 16


def sign(x):
    return np.where(x >= 0, 1.0, -1.0)


def rank1_64(m):
    u, s, v = np.linalg.svd(m, full_matrices=False)
    return np.abs(u[:, 0]) * np.sqrt(s[0]), np.abs(v[0]) * np.sqrt(s[0])


def dual_svid64(w, rank):
    """`U'`, `V'` and `diag(h) sign(U') diag(l) sign(V') diag(g)`."""
    u, s, v = np.linalg.svd(w, full_matrices=False)
    u, v = u[:, :rank] * np.sqrt(s[:rank]), np.sqrt(s[:rank])[:, None] * v[:rank]
    (h, l_u), (l_v, g) = rank1_64(np.abs(u)), rank1_64(np.abs(v))
    return u, v, np.diag(h) @ sign(u) @ np.diag(l_u * l_v) @ sign(v) @ np.diag(g)


def relative_error(w, got):
    return np.sum((w - np.asarray(got, np.float64)) ** 2) / np.sum(w**2)


def near(got, want, tolerance):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)


@pytest.fixture(scope="module")
def kernel():
    """Two layers with unlike rows, unlike columns and falling singular values."""
    rng = np.random.default_rng(2)
    w = rng.normal(size=(L, I, O)) + 3 * rng.normal(size=(L, I, 4)) @ rng.normal(size=(L, 4, O))
    w *= np.exp(0.5 * rng.normal(size=(L, I, 1))) * np.exp(0.5 * rng.normal(size=(L, 1, O)))
    return (0.05 * w).astype(np.float32)


@pytest.fixture(scope="module")
def node(kernel):
    return LowRankSignSpec(rank=R).init(jnp.asarray(kernel))


def test_the_start_is_the_dual_svid_of_the_matrix_and_of_what_is_left(node, kernel):
    assert node.ste == "smooth" and node.shape == kernel.shape and node.u.shape == (L, 2, I, R)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(node))
    assert all((np.asarray(s) > 0).all() for s in (node.h, node.l, node.g))
    terms = [np.asarray(term, np.float64) for term in node.paths()]
    u, v = (np.asarray(a, np.float64) for a in (node.u, node.v))
    for n in range(L):
        rest = kernel[n].astype(np.float64)
        for c in range(2):
            want_u, want_v, want = dual_svid64(rest, R)
            near(terms[c][n], want, 1e-3)
            # Latents up to the sign that a pair of singular vectors leaves open.
            near(u[n, c] @ v[n, c], want_u @ want_v, 1e-4)
            near(np.abs(u[n, c]), np.abs(want_u), 1e-3)
            near(np.abs(v[n, c]), np.abs(want_v), 1e-3)
            rest = rest - want
        assert relative_error(kernel[n], node.dense()[n]) < 0.8 * relative_error(
            kernel[n], terms[0][n]
        )


def test_the_start_beats_random_signs_with_their_best_rank_scales(node, kernel):
    rng = np.random.default_rng(7)
    w = kernel[0].astype(np.float64)

    def random_error():
        # The factors as many as both copies have, the rank scales by least squares.
        u, v = sign(rng.normal(size=(I, 2 * R))), sign(rng.normal(size=(2 * R, O)))
        l = np.linalg.solve((u.T @ u) * (v @ v.T), np.einsum("ir,io,ro->r", u, w, v))
        return relative_error(w, (u * l) @ v)

    assert relative_error(w, node.dense()[0]) < 0.6 * min(random_error() for _ in range(20))


def test_without_the_twin_there_is_one_copy(node, kernel):
    one = LowRankSignSpec(rank=R, twin=False, ste="clipped").init(jnp.asarray(kernel))
    assert one.k == 1 and one.ste == "clipped"
    near(one.dense(), next(node.paths()), 1e-5)


@pytest.mark.parametrize(("rank", "twin"), [(1, False), (R, False), (R, True)])
def test_a_positive_matrix_of_rank_1_is_met_exactly_and_a_zero_one_packs(rank, twin):
    rng = np.random.default_rng(5)
    w = np.outer(rng.uniform(0.2, 2, I), rng.uniform(0.2, 2, O)).astype(np.float32)
    node = LowRankSignSpec(rank=rank, twin=twin).init(jnp.stack([w, jnp.zeros((I, O))]))
    near(node.dense()[0], w, 1e-4)
    packed = node.pack("w").dense()
    near(packed[0], w, 2e-3)
    assert np.abs(np.asarray(packed[1])).max() < 1e-8


@pytest.mark.parametrize(
    ("i", "o", "bits", "copies", "rank"),
    [
        # (4096 * 11008 * e - 32 * 15104) / (2 * 15120) = 1475.05, 804.08, 133.12
        (4096, 11008, 1.0, 2, 1472), (4096, 11008, 0.55, 2, 800), (4096, 11008, 0.1, 2, 128),
        # (4096^2 - 16 * 8192) / 8208 = 2028.04; (4096^2 * 0.1 - 32 * 8192) / 16416 = 86.2
        (4096, 4096, 1.0, 1, 2024), (4096, 4096, 0.1, 2, 80),
        # less than 8, more than a side, a side below 8
        (64, 96, 0.1, 2, 8), (512, 512, 8.0, 1, 512), (4, 100, 1.0, 1, 4),
    ],
)
def test_the_rank_that_the_bits_pay_for(i, o, bits, copies, rank):
    assert rank_for_bits(i, o, bits, copies) == rank
    w = jax.ShapeDtypeStruct((3, i, o), jnp.float32)
    node = jax.eval_shape(LowRankSignSpec(bits=bits, twin=copies == 2).init, w)
    assert node.u.shape == (3, copies, i, rank) and node.v.shape == (3, copies, rank, o)
    if min(i, o) > 512:
        assert node.bits_per_weight() <= bits < low_rank_bits((i, o), rank + 8, copies)


@pytest.mark.parametrize("copies", [1, 2])
def test_the_bits_of_a_rank_give_back_the_rank(copies):
    for rank in range(8, 504, 8):
        shape = (5120, 13824)
        assert rank_for_bits(*shape, low_rank_bits(shape, rank, copies), copies) == rank


def test_llama2_13b_at_a_tenth_of_a_bit_is_0_8_gb(llama_shapes):
    d, f = 5120, 13824
    params = llama_shapes(40, d, f)
    rules = [(LLAMA_LINEARS, LowRankSignSpec(bits=0.1))]
    found = describe(jax.eval_shape(lambda p: convert(p, rules), params))
    assert 0.80e9 < found.deployed_bytes < 0.84e9
    assert 0.09 < found.bits_per_weight <= 0.1
    # 256 divides every side, so that nothing is padded.
    assert found.stored_bits_per_weight == pytest.approx(found.bits_per_weight, rel=1e-12)
    assert {row.shape[1:]: row.k for row in found.quantised} == {(d, d): 2, (d, f): 2, (f, d): 2}


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"bits": 0.0}, "bits is 0.0"), ({"bits": float("nan")}, "bits is nan"),
     ({"rank": -8}, "rank is -8"),
     ({"ste": "scaled"}, "ste is 'scaled': choose smooth, clipped or identity")],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(BadInput, match=message):
        LowRankSignSpec(**settings)


def test_a_rank_beyond_the_matrix_is_refused():
    with pytest.raises(BadInput, match=r"rank is 64: a matrix \[48, 64\] has no more than 48"):
        LowRankSignSpec(rank=64).init(jnp.zeros((I, O)))
