"""Matrices of extreme scale, of zeros and with dead channels, in every representation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax.errors import BadInput
from rabit_jax.signs.channel_importance import Stats
from rabit_jax.weights.codebook import CodebookSpec
from rabit_jax.weights.dual_binary import DualBinarySpec
from rabit_jax.weights.frozen_path import FrozenPath, FrozenPathSpec
from rabit_jax.weights.group_uniform import GroupUniformSpec
from rabit_jax.weights.independent_sign import IndependentSign, IndependentSignSpec
from rabit_jax.weights.low_rank_sign import LowRankSign, LowRankSignSpec
from rabit_jax.weights.residual_sign import ResidualSign, ResidualSignSpec
from rabit_jax.weights.scaled_weight import scaled
from rabit_jax.weights.sum_weight import residual
from rabit_jax.weights.uniform_residual import UniformResidual, UniformResidualSpec

I, O = 48, 32
FIT = {"rounds": 2}
SPECS = {
    "residual": ResidualSignSpec(k=2, **FIT),
    "independent": IndependentSignSpec(k=2, **FIT),
    "frozen_path": FrozenPathSpec(k=2, **FIT),
    "uniform": UniformResidualSpec(k=2, **FIT),
    "grouped": ResidualSignSpec(k=2, group=16, **FIT),
    "grouped_uniform": UniformResidualSpec(k=2, group=16, **FIT),
    "low_rank": LowRankSignSpec(rank=8),
    "round_to_nearest": GroupUniformSpec(group=16),
    "dual_binary": DualBinarySpec(group=16),
    "codebook": CodebookSpec(iterations=3),
    "scaled": scaled(GroupUniformSpec(group=16)),
    "sum": residual(LowRankSignSpec(rank=8), ResidualSignSpec(k=1, **FIT)),
}
EACH = pytest.mark.parametrize("name", SPECS)
GAUSSIAN = np.random.default_rng(0).normal(size=(2, I, O)).astype(np.float32)


def dense64(node):
    return np.asarray(node.dense(), np.float64)


def relative_error(node, w):
    w = np.float64(w)
    return np.sum((dense64(node) - w) ** 2) / np.sum(w**2)


@pytest.fixture(scope="module")
def usual():
    """Relative error of every representation on a matrix of unit scale."""
    found = {name: spec.init(jnp.asarray(GAUSSIAN)) for name, spec in SPECS.items()}
    return {name: relative_error(node.pack("w"), GAUSSIAN) for name, node in found.items()}


@pytest.mark.parametrize("size", [1e-36, 1e-24, 1e-12, 1e-6, 1e-3, 1e4, 1e12, 1e24, 1e37])
@EACH
def test_a_scale_packs_to_itself_or_is_refused_by_name(name, size, usual):
    w = GAUSSIAN * np.float32(size)
    node = SPECS[name].init(jnp.asarray(w))
    assert relative_error(node, w) == pytest.approx(usual[name], rel=0.03)
    try:
        packed = node.pack("layers/q/kernel")
    except BadInput as error:
        assert str(error).startswith("layers/q/kernel")
        assert size not in (1e-3, 1e4)
    else:
        assert relative_error(packed, w) == pytest.approx(usual[name], rel=0.02)


@EACH
def test_a_layer_of_zeros_stays_zeros_beside_one_that_is_none(name):
    w = GAUSSIAN.copy()
    w[1] = 0
    statistics = Stats(jnp.ones((2, I)), jnp.ones((2, O)).at[1].set(0))
    node = SPECS[name].init(jnp.asarray(w), statistics)
    packed = node.pack("w")
    for weight in (node, packed):
        found = dense64(weight)
        assert np.isfinite(found).all() and not found[1].any() and found[0].any()

    def loss(node):
        return jnp.sum(node.dense() ** 2 + node.dense())

    grads = jax.grad(loss, allow_int=True)(node)
    floats = [g for g in jax.tree.leaves(grads) if jnp.issubdtype(g.dtype, jnp.floating)]
    assert floats and all(np.isfinite(np.asarray(g)).all() for g in floats)
    x = jnp.ones((3, I))
    for weight in (node, packed):
        one = jax.tree.map(lambda leaf: leaf[1], weight)
        assert not np.asarray(one.matmul(x)).any()


DEAD = {
    **{name: lambda a, spec=SPECS[name]: type(spec)(k=2, a_in=a, a_out=a, **FIT)
       for name in ("residual", "independent", "frozen_path", "uniform")},
    "scaled low_rank": lambda a: scaled(SPECS["low_rank"], a_in=a, a_out=a),
    "scaled sign paths": lambda a: scaled(SPECS["residual"], a_in=a, a_out=a),
    "scaled sum": lambda a: scaled(SPECS["sum"], a_in=a, a_out=a),
}


@pytest.mark.parametrize("name", DEAD)
def test_dead_channels_keep_their_size_at_full_importance(name):
    rng = np.random.default_rng(1)
    s_in, s_out = (np.exp(rng.normal(size=(2, n))) for n in (I, O))
    s_in[:, ::4], s_out[:, ::8] = 0, 0
    stats = Stats(jnp.asarray(s_in, jnp.float32), jnp.asarray(s_out, jnp.float32))
    w = jnp.asarray(GAUSSIAN)
    node = DEAD[name](1.0).init(w, stats)
    plain = relative_error(DEAD[name](0.0).init(w, stats), GAUSSIAN)
    assert relative_error(node, GAUSSIAN) < 3 * plain
    dead = np.abs(dense64(node))[:, ::4].mean()
    assert 0.3 < dead / np.abs(GAUSSIAN[:, ::4]).mean() < 1.7
    node.pack("w")


NODES = {
    "residual": lambda **ste: ResidualSign(jnp.ones((4, 3)), jnp.ones((1, 3)), jnp.ones((1, 4)),
                                           **ste),
    "independent": lambda **ste: IndependentSign(jnp.ones((1, 4, 3)), jnp.ones((1, 3)),
                                                 jnp.ones((1, 4)), **ste),
    "frozen_path": lambda **ste: FrozenPath(jnp.ones((0, 4, 3), bool), jnp.ones((4, 3)),
                                            jnp.ones((1, 3)), jnp.ones((1, 4)), **ste),
    "uniform": lambda **ste: UniformResidual(jnp.ones((4, 3)), jnp.ones((1, 3)),
                                             jnp.ones((1, 4)), **ste),
    "low_rank": lambda **ste: LowRankSign(jnp.ones((1, 4, 2)), jnp.ones((1, 2, 3)),
                                          jnp.ones((1, 4)), jnp.ones((1, 2)), jnp.ones((1, 3)),
                                          **ste),
}


@pytest.mark.parametrize("name", NODES)
def test_a_wrong_straight_through_rule_is_an_error_on_spec_and_node(name):
    node = NODES[name]()
    for make in (NODES[name], node.replace, type(SPECS[name])):
        with pytest.raises(BadInput, match="ste is 'smoth': choose .*smooth"):
            make(ste="smoth")
    assert NODES[name](ste="smooth").ste == "smooth"


@pytest.mark.parametrize("name", ["residual", "independent", "frozen_path"])
def test_the_smooth_rule_has_a_gradient_at_scales_and_residuals_of_0(name):
    node = NODES[name](ste="smooth")
    latent = "latents" if name == "independent" else "latent"
    zero = node.replace(**{latent: 0 * getattr(node, latent), "g": node.g.at[0, 1].set(0)})
    grads = jax.grad(lambda n: jnp.sum(n.dense()), allow_int=True)(zero)
    np.testing.assert_array_equal(getattr(grads, latent), jnp.ones_like(getattr(zero, latent)))
    assert np.isfinite(grads.g).all() and np.isfinite(grads.h).all()


SMALL_SCALES = [name for name in SPECS if name not in ("scaled", "sum")]


@pytest.mark.parametrize("name", SMALL_SCALES)
def test_scales_of_16_bits_multiply_in_float32_and_have_gradients(name):
    node = SPECS[name].init(jnp.asarray(GAUSSIAN))
    roles = node.roles()
    half = jax.tree.map(
        lambda x, role: x.astype(jnp.bfloat16) if role in ("scale", "level") else x, node, roles)
    whole = jax.tree.map(
        lambda x, role: x.astype(jnp.float32) if role in ("scale", "level") else x, half, roles)
    np.testing.assert_allclose(half.dense(), whole.dense(), rtol=1e-6, atol=1e-6)
    grads = jax.grad(lambda n: jnp.sum(n.dense() ** 2), allow_int=True)(half)
    wanted = jax.grad(lambda n: jnp.sum(n.dense() ** 2), allow_int=True)(whole)
    for got, want, x in zip(*map(jax.tree.leaves, (grads, wanted, half)), strict=True):
        if jnp.issubdtype(x.dtype, jnp.floating):
            assert got.dtype == x.dtype
            np.testing.assert_allclose(
                np.float64(got), np.float64(want), rtol=1e-2, atol=1e-2 * np.abs(want).max())
