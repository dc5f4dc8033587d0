"""Packed weights whose scales train: the same matrix, exact gradients, the same bits back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax import (
    LLAMA_ENDS,
    BadInput,
    CodebookSpec,
    ResidualSignSpec,
    convert,
    pack,
    residual,
)
from rabit_jax.tree import is_weight
from rabit_jax.weights.dual_binary import DualBinarySpec
from rabit_jax.weights.fixed import FixedWeight, fixed
from rabit_jax.weights.group_uniform import GroupUniformSpec
from rabit_jax.weights.low_rank_sign import LowRankSignSpec
from rabit_jax.weights.scaled_weight import scaled
from rabit_jax.weights.sign_paths import PackedSign

L, I, O = 2, 40, 24
SPECS = {
    "signs": ResidualSignSpec(k=2, rounds=2),
    "groups": scaled(GroupUniformSpec(group=16)),
    "grouped signs": ResidualSignSpec(k=2, rounds=2, group=16),
    "dual": DualBinarySpec(group=16),
    "codes": CodebookSpec(bits=3, iterations=2),
    "sum": residual(LowRankSignSpec(rank=8), ResidualSignSpec(k=1, rounds=2)),
}


@pytest.fixture(params=SPECS, scope="module")
def packed(request):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(L, I, O)), jnp.float32)
    return {"w": SPECS[request.param].init(w, None, jax.random.key(0)).pack("w"),
            "norm": jnp.ones((L, I))}


def test_it_is_the_packed_matrix_and_packs_to_the_same_arrays(packed):
    student = fixed(packed)
    node = student["w"]
    assert isinstance(node, FixedWeight) and is_weight(node) and node.shape == (L, I, O)
    np.testing.assert_allclose(node.dense(), packed["w"].dense(), rtol=1e-6, atol=1e-7)
    one = jax.tree.map(lambda a: a[0], node)
    x = np.random.default_rng(1).normal(size=(3, I)).astype(np.float32)
    np.testing.assert_allclose(one.matmul(x), x @ np.asarray(one.dense()), rtol=1e-4, atol=1e-4)
    assert node.bits_per_weight() == packed["w"].bits_per_weight()
    assert node.deployed_bytes() == packed["w"].deployed_bytes()
    assert node.cost() == packed["w"].cost()
    again = pack(student)
    assert jax.tree.structure(again) == jax.tree.structure(packed)
    jax.tree.map(np.testing.assert_array_equal, again, packed)


def test_scales_and_levels_are_float32_and_have_exact_gradients(packed):
    """Against differences: W_hat is linear, or for low ranks multilinear, in each array."""
    node = fixed(packed)["w"]
    g = np.random.default_rng(2).normal(size=(L, I, O)).astype(np.float32)

    def objective(node):
        return jnp.sum(node.dense() * g)

    flat, structure = jax.tree.flatten(node)
    names = jax.tree.leaves(node.roles())
    for n, (leaf, role) in enumerate(zip(flat, names, strict=True)):
        if role in ("sign", "code"):
            assert leaf.dtype == jnp.uint8
            continue
        assert leaf.dtype == jnp.float32

        def at(leaf, n=n):
            return objective(jax.tree.unflatten(structure, [*flat[:n], leaf, *flat[n + 1 :]]))

        gradient = np.float64(jax.grad(at)(leaf))
        way = np.random.default_rng(n).normal(size=leaf.shape).astype(np.float32)
        step = float(np.abs(leaf).mean())
        slope = (float(at(leaf + step * way)) - float(at(leaf - step * way))) / (2 * step)
        assert (gradient * way).sum() == pytest.approx(slope, rel=2e-3, abs=2e-3), (n, role)


def test_signs_against_the_closed_form():
    rng = np.random.default_rng(3)
    w = jnp.asarray(rng.normal(size=(I, O)), jnp.float32)
    node = ResidualSignSpec(k=2, rounds=2).init(w[None]).pack("w")
    node = jax.tree.map(lambda a: a[0], node)
    b, g, h = (np.float64(a) for a in (node.signs(), node.g, node.h))
    np.testing.assert_allclose(node.dense(), np.einsum("kio,ki,ko->io", b, h, g), rtol=1e-5)
    dw = rng.normal(size=(I, O))
    _, pull = jax.vjp(lambda g, h: PackedSign(node.bits, g, h).dense(),
                      node.g.astype(jnp.float32), node.h.astype(jnp.float32))
    dg, dh = pull(jnp.asarray(dw, jnp.float32))
    np.testing.assert_allclose(dg, np.einsum("io,kio,ki->ko", dw, b, h), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(dh, np.einsum("io,kio,ko->ki", dw, b, g), rtol=1e-3, atol=1e-4)


def test_a_scale_that_16_bits_cannot_hold_is_named(packed):
    node = fixed(packed)["w"]
    large = jax.tree.map(lambda r, a: a * 1e9 if r in ("scale", "level") else a, node.roles(), node)
    with pytest.raises(BadInput, match="layers/w"):
        large.pack("layers/w")


def test_a_fixed_embedding_is_still_looked_up():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(O, I)), jnp.float32)
    spec = GroupUniformSpec(bits=8, group=0)
    packed = pack(convert({"embed": {"embedding": w}}, [(LLAMA_ENDS, spec)]))
    student = fixed(packed)
    table, tokens = student["embed"]["embedding"], jnp.asarray([3, 0, 3])
    assert isinstance(table.T, FixedWeight) and table.shape == (O, I)
    np.testing.assert_allclose(table.lookup(tokens), w[tokens], atol=0.02)
    found = jax.grad(lambda t: jnp.sum(t.lookup(tokens)), allow_int=True)(table)
    level = np.asarray(found.matrix.packed_weight.c)[0]
    np.testing.assert_allclose(level, I * np.bincount([3, 0, 3], minlength=O))
    jax.tree.map(np.testing.assert_array_equal, pack(student), packed)
