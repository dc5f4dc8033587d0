"""The combinators: each part against the same part done by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax import (
    BadInput,
    CodebookSpec,
    DualBinarySpec,
    FrozenPathSpec,
    GroupUniformSpec,
    IndependentSignSpec,
    LowRankSignSpec,
    ResidualSignSpec,
    Stats,
    UniformResidualSpec,
    residual,
    scaled,
)
from rabit_jax.signs.channel_importance import importance
from rabit_jax.weights.scaled_weight import ScaledWeight
from rabit_jax.weights.sum_weight import SumSpec

I, O = 48, 40
PLAIN = {"a_in": 0.0, "a_out": 0.0, "rounds": 3}


@pytest.fixture(scope="module")
def kernel():
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, I, O)), jnp.float32)


@pytest.fixture(scope="module")
def stats():
    rng = np.random.default_rng(1)
    return Stats(*(jnp.asarray(np.exp(rng.normal(size=(2, n))), jnp.float32) for n in (I, O)))


def test_each_part_fits_what_those_before_leave(kernel):
    first, second = ResidualSignSpec(k=1, rounds=0), GroupUniformSpec(group=16)
    node = residual(first, second).init(kernel)
    one = first.init(kernel)
    two = second.init(kernel - one.dense())
    np.testing.assert_array_equal(node.terms[0].dense(), one.dense())
    np.testing.assert_array_equal(node.terms[1].dense(), two.dense())
    np.testing.assert_allclose(node.dense(), one.dense() + two.dense(), atol=1e-6)
    assert node.bits_per_weight() == one.bits_per_weight() + two.bits_per_weight()


def test_two_greedy_sign_paths_are_a_sum_of_one_path_each(kernel):
    spec = ResidualSignSpec(k=1, rounds=0, a_in=0.0, a_out=0.0)
    summed = residual(spec, spec).init(kernel)
    whole = ResidualSignSpec(k=2, rounds=0, a_in=0.0, a_out=0.0).init(kernel)
    np.testing.assert_allclose(summed.dense(), whole.dense(), atol=1e-5)


@pytest.mark.parametrize(
    "spec", [ResidualSignSpec, IndependentSignSpec, FrozenPathSpec, UniformResidualSpec]
)
def test_scaling_a_sign_spec_is_its_own_preconditioning(spec, kernel, stats):
    node = scaled(spec(**PLAIN), a_in=0.5, a_out=0.7).init(kernel, stats)
    want = spec(**{**PLAIN, "a_in": 0.5, "a_out": 0.7}).init(kernel, stats)
    assert type(node) is type(want)
    np.testing.assert_allclose(node.g, want.g, rtol=1e-4)
    np.testing.assert_allclose(node.h, want.h, rtol=1e-4)
    latents = [getattr(n, "latent", getattr(n, "latents", None)) for n in (node, want)]
    np.testing.assert_allclose(*latents, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("inner", [
    GroupUniformSpec(group=16), DualBinarySpec(group=16), CodebookSpec(iterations=2),
    LowRankSignSpec(rank=8), residual(ResidualSignSpec(k=1, rounds=0), LowRankSignSpec(rank=8)),
], ids=lambda spec: spec.type)
def test_scaling_fits_the_preconditioned_matrix_and_maps_back(inner, kernel, stats):
    node = scaled(inner, a_in=0.5, a_out=1.0).init(kernel, stats)
    d_in, d_out = importance(stats.s_in, 0.5), importance(stats.s_out, 1.0)
    diagonal = np.asarray(d_in, np.float64)[..., None] * np.asarray(d_out, np.float64)[:, None, :]
    fitted = inner.init(kernel * jnp.asarray(diagonal, jnp.float32)).dense()
    np.testing.assert_allclose(node.dense(), np.asarray(fitted) / diagonal, rtol=1e-4, atol=1e-5)
    wrapped = isinstance(node, ScaledWeight)
    assert wrapped == (inner.type in ("round_to_nearest", "dual_binary", "codebook"))
    extra = 16 * (I + O) / (I * O) if wrapped else 0
    plain = inner.init(kernel)
    assert node.bits_per_weight() == pytest.approx(plain.bits_per_weight() + extra)


def test_without_statistics_scaling_changes_nothing(kernel):
    spec = GroupUniformSpec(group=16)
    np.testing.assert_array_equal(scaled(spec).init(kernel).dense(), spec.init(kernel).dense())


def test_bad_compositions_are_refused():
    with pytest.raises(BadInput, match="parts has 1 specs: a sum needs at least two"):
        SumSpec((ResidualSignSpec(),))
    with pytest.raises(BadInput, match="parts has 0 specs"):
        residual()
