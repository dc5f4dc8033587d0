"""Limbs: which packed matrices ask for a third byte of their activations."""

import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax import ResidualSignSpec, Stats, convert, pack
from rabit_jax.calibration.outliers import outlier_ratio, record_limbs
from rabit_jax.weights.scaled_weight import ScaledWeight
from rabit_jax.weights.sum_weight import SumWeight


def test_the_ratio_is_the_largest_channel_over_the_root_mean_square():
    s, h = np.ones((2, 100)), np.ones((2, 3, 100))
    s[1, 7], h[1, 2, 7] = 5.0, 8.0
    wanted = 40 / np.sqrt((99 + 40**2) / 100)
    assert outlier_ratio(jnp.asarray(s), jnp.asarray(h)) == pytest.approx(wanted, rel=1e-6)
    assert outlier_ratio(jnp.ones(100), jnp.full((2, 100), -3.0)) == pytest.approx(1, rel=1e-6)
    assert outlier_ratio(jnp.zeros(100), jnp.ones((2, 100))) == 0


def test_the_choice_is_kept_by_the_header_and_made_by_the_statistics():
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(2, 1024, 8)), jnp.float32)
    params = {name: {"kernel": kernel} for name in ("even", "spiky", "other")}
    packed = pack(convert(params, [(".*", ResidualSignSpec(k=2, rounds=0))]))
    spiky = jnp.ones((2, 1024)).at[1, 3].set(100)
    stats = {f"{n}/kernel": Stats(s, jnp.ones((2, 8)))
             for n, s in (("even", jnp.ones((2, 1024))), ("spiky", spiky))}
    found = {n: part["kernel"] for n, part in record_limbs(packed, stats).items()}
    assert {n: node.limbs for n, node in found.items()} == {"even": 2, "spiky": 3, "other": None}
    for node in found.values():
        assert type(node).abstract(node.header()).limbs == node.limbs


def test_sums_and_scaled_weights_pass_it_on():
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(1024, 8)), jnp.float32)
    sign = ResidualSignSpec(k=1, rounds=0).init(w).pack("w")
    d_in = jnp.ones(1024, jnp.float16).at[3].set(100)
    both = SumWeight((sign, ScaledWeight(sign, d_in, jnp.ones(8, jnp.float16))))
    stats = {"w/kernel": Stats(jnp.ones(1024), jnp.ones(8))}
    found = record_limbs({"w": {"kernel": both}}, stats)["w"]["kernel"]
    assert [found.terms[0].limbs, found.terms[1].inner.limbs] == [2, 3]
