"""The knapsack against brute force, and the sensitivities against sums in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax import BadInput, ResidualSignSpec, Stats, convert
from rabit_jax.tree import match_rules
from rabit_jax.weights.budget import (
    Option,
    allocate,
    apply_budget,
    budget_range,
    check_budget,
    path_specs,
    sensitivity,
    stored_bits,
)

RULES = [(".*/kernel", ResidualSignSpec(k=3, rounds=2))]


def cases(seed, sizes=(1, 2, 5)):
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(6):
        size, errors = rng.choice(sizes), np.sort(rng.exponential(1.0, 3))[::-1]
        found.append([Option(int(size * (k + 1)), float(e)) for k, e in enumerate(errors)])
    least = sum(own[0].bits for own in found)
    return found, least + int(rng.integers(0, least * 2))


def best(options, budget):
    """The least error of all choices that fit."""
    choices = itertools.product(*options)
    return min(sum(o.error for o in c) for c in choices if sum(o.bits for o in c) <= budget)


@pytest.mark.parametrize("seed", range(40))
def test_the_allocation_is_as_near_to_the_best_as_it_says(seed):
    options, budget = cases(seed)
    found = [own[n] for own, n in zip(options, allocate(options, budget), strict=True)]
    assert sum(o.bits for o in found) <= budget
    # No step saves more than the whole error of the matrix that takes it.
    largest = max(own[0].error - own[-1].error for own in options)
    assert best(options, budget) <= sum(o.error for o in found) <= best(options, budget) + largest


@pytest.mark.parametrize("seed", range(40))
def test_matrices_of_one_size_with_falling_gains_are_allocated_exactly(seed):
    rng = np.random.default_rng(seed)
    gains = np.sort(rng.exponential(1.0, (5, 2)))[:, ::-1]
    options = [[Option(4, a + b), Option(8, b), Option(12, 0.0)] for a, b in gains]
    budget = int(rng.integers(20, 61))
    found = [own[n] for own, n in zip(options, allocate(options, budget), strict=True)]
    assert sum(o.error for o in found) == pytest.approx(best(options, budget), rel=1e-12)


def test_an_option_that_costs_more_and_errs_more_is_never_taken():
    options = [[Option(1, 3.0), Option(2, 4.0), Option(3, 1.0)]]
    assert [allocate(options, b) for b in (1, 2, 3)] == [[0], [0], [2]]


def test_less_than_the_cheapest_options_is_refused():
    with pytest.raises(BadInput, match="a budget of 1 bits: the cheapest options take 4"):
        allocate([[Option(2, 1.0)], [Option(2, 1.0)]], 1)


@pytest.fixture(scope="module")
def model():
    rng = np.random.default_rng(0)
    sizes = np.array([1.0, 4.0, 0.2])[:, None, None]
    params = {
        "a": {"kernel": jnp.asarray(rng.standard_normal((3, 64, 128)) * sizes, jnp.float32)},
        "b": {"kernel": jnp.asarray(rng.standard_normal((3, 128, 64)), jnp.float32)},
    }
    stats = {f"{name}/kernel": Stats(*(jnp.asarray(rng.uniform(0.5, 2, (3, n)), jnp.float32)
                                       for n in params[name]["kernel"].shape[1:]))
             for name in params}
    return params, stats


def test_the_sensitivity_is_the_weighted_squared_error(model):
    params, stats = model
    w, own = params["a"]["kernel"], stats["a/kernel"]
    node = ResidualSignSpec(k=1, rounds=2).init(w, own)
    error = np.asarray(w, np.float64) - np.asarray(node.dense(), np.float64)
    s_in, s_out = (np.asarray(s, np.float64) for s in (own.s_in, own.s_out))
    want = np.einsum("lio,li,lo->l", error**2, s_in**2, s_out**2)
    np.testing.assert_allclose(sensitivity(w, node, own), want, rtol=1e-5)
    plain = (error**2).sum((1, 2)) / (np.asarray(w, np.float64) ** 2).mean((1, 2))
    np.testing.assert_allclose(sensitivity(w, node, None), plain, rtol=1e-5)


def test_a_stack_gets_the_paths_that_the_budget_buys(model):
    params, stats = model
    specs = match_rules(params, RULES)
    student, chosen = apply_budget(params, convert(params, RULES, stats), specs, stats, 2.6)
    bits = sum(stored_bits(path_specs(specs[path])[k - 1], params[path[0]]["kernel"].shape[1:])
               for path, ks in chosen.items() for k in ks)
    assert bits <= 2.6 * 6 * 64 * 128
    ks = chosen["a/kernel"]
    assert ks[1] >= ks[0] >= ks[2] and ks[1] > ks[2]  # the larger matrix errs more
    for n, k in enumerate(ks):
        one = jax.tree.map(lambda a, n=n: a[n], stats["a/kernel"])
        alone = ResidualSignSpec(k=k, rounds=2).init(params["a"]["kernel"][n], one)
        layer = student["a"]["kernel"].dense()[n]
        np.testing.assert_allclose(layer, alone.dense(), atol=1e-5 * float(jnp.abs(layer).max()))


def test_a_budget_outside_of_what_the_specs_allow_is_refused(model):
    shapes = {"a/kernel": (3, 64, 128), "b/kernel": (3, 128, 64)}
    specs = match_rules(model[0], RULES)
    extra = 16 * (64 + 128) / (64 * 128)
    assert budget_range(specs, shapes) == pytest.approx((1 + extra, 3 * (1 + extra)))
    for budget in (1.3, 4.2):
        with pytest.raises(BadInput, match=rf"{budget} bits per weight, wanted 1.375 to 4.125"):
            check_budget(budget, specs, shapes)
    with pytest.raises(BadInput, match="k of at least 2"):
        check_budget(2.0, {"a/kernel": ResidualSignSpec(k=1)}, shapes)
