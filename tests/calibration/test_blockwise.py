"""One block at a time against the whole model at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax import CodebookSpec, ResidualSignSpec, Stats, convert, linear, pack, residual, scaled
from rabit_jax.calibration.blockwise import block_sums, init_block
from rabit_jax.tree import layer_keys, match_rules

L, I, O = 3, 24, 16
SPEC = ResidualSignSpec(k=1, rounds=2)
CODES = CodebookSpec(bits=2, iterations=2)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return {"layers": {n: {"kernel": jnp.asarray(rng.normal(size=(L, I, O)), jnp.float32)}
                       for n in ("up", "gate")}}


@pytest.mark.parametrize(("spec", "calibrated"), [
    pytest.param(SPEC, True, id="signs"),
    pytest.param(residual(SPEC, scaled(CODES)), True, id="codes", marks=pytest.mark.more),
    pytest.param(residual(SPEC, scaled(CODES)), False, id="free", marks=pytest.mark.more),
])
def test_a_block_packs_to_the_bits_of_its_layer_in_the_stack(params, spec, calibrated):
    """Random numbers included: codebooks start from entries that are drawn."""
    rules, key = [("layers/.*", spec)], jax.random.key(3)
    rng = np.random.default_rng(1)
    stats = {f"layers/{n}/kernel": Stats(*(jnp.asarray(rng.uniform(0.5, 2, (L, c)), jnp.float32)
                                           for c in (I, O))) for n in ("up", "gate")}
    stats = stats if calibrated else None
    student = convert(params, rules, stats, key)
    whole, specs = pack(student), match_rules(params, rules)
    keys = layer_keys(key, {path: (L,) for path in specs})
    for n in range(L):
        block = jax.tree.map(lambda a, n=n: a[n], params)
        own = None if stats is None else jax.tree.map(lambda a, n=n: a[n], stats)
        ready = []
        packed, errors = init_block(block, n, specs, own, keys, ready.append)
        assert set(ready) == set(packed) == set(errors) == set(specs)
        for name in ("up", "gate"):
            path, want = f"layers/{name}/kernel", whole["layers"][name]["kernel"]
            jax.tree.map(lambda a, b, n=n: np.testing.assert_array_equal(a[0], b[n]),
                         packed[path], want)
            w = np.asarray(params["layers"][name]["kernel"][n], np.float64)
            w_hat = np.asarray(student["layers"][name]["kernel"].dense()[n], np.float64)
            assert errors[path] == pytest.approx(((w - w_hat) ** 2).sum() / (w**2).sum(), rel=1e-5)


def flops(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def test_no_weight_gradient_is_made_and_inputs_need_no_backward_pass():
    """A product of 2 m i o operations: twice for y and dx, once more for a weight gradient."""
    x, w = jnp.ones((2, 64, 128)), jnp.ones((128, 96))
    mask = jnp.ones((2, 64), bool)
    product = 2 * 2 * 64 * 128 * 96

    def run(w, x):
        y, dx, sums = block_sums(
            lambda p, x: linear(x, p["w"]), {"w": w}, x, jnp.ones((2, 64, 96)), mask, ("w",))
        return y, dx, sums["w"].s_in, sums["w"].s_out

    assert flops(run, w, x) == pytest.approx(2 * product, rel=0.1)
    assert flops(lambda *a: run(*a)[::2], w, x) == pytest.approx(product, rel=0.1)
    y, dx, s_in, s_out = run(w, x)
    np.testing.assert_allclose(y, np.full((2, 64, 96), 128))
    np.testing.assert_allclose(dx, np.full((2, 64, 128), 96))
    np.testing.assert_allclose(s_in, np.full(128, 128))
    np.testing.assert_allclose(s_out, np.full(96, 128))
