"""Tuning of one block: its loss, what trains, when it stops, and that any representation can."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax import BadInput, CodebookSpec, ResidualSignSpec, linear
from rabit_jax.train.block_tuning import TuningConfig, relative_error, tune_block
from rabit_jax.train.optimizer import OptimizerConfig
from rabit_jax.tree import is_weight
from rabit_jax.weights.dual_binary import DualBinarySpec
from rabit_jax.weights.fixed import fixed
from rabit_jax.weights.group_uniform import GroupUniformSpec
from rabit_jax.weights.low_rank_sign import LowRankSignSpec
from rabit_jax.weights.seam import times

N, T, D = 36, 6, 16
HELD_OUT = 4
SPECS = {
    "residual": ResidualSignSpec(k=2, rounds=2),
    "bfloat16": ResidualSignSpec(k=2, rounds=2, latent_dtype="bfloat16"),
    "groups": GroupUniformSpec(group=8),
    "dual": DualBinarySpec(group=8),
    "codes": CodebookSpec(bits=2, iterations=2),
    "low rank": LowRankSignSpec(rank=8),
}


def block(params, batch):
    x = batch["x"]
    x = times(x, params["norm"]["scale"])
    return batch["x"] + batch["gain"] * jnp.tanh(linear(x, params["up"]["kernel"]))


@pytest.fixture(scope="module")
def data():
    """Windows, their targets, and the block in full precision; one token is 1000 times larger."""
    rng = np.random.default_rng(0)
    # Inputs with few directions, as activations have: there is more to gain than for white noise.
    x = rng.normal(size=(N, T, 4)) @ rng.normal(size=(4, D)) + 0.1 * rng.normal(size=(N, T, D))
    x = np.float32(x / 2)
    x[:, 0] *= 1000
    params = {"up": {"kernel": jnp.asarray(rng.normal(size=(D, D)) / 4, jnp.float32)},
              "norm": {"scale": jnp.asarray(rng.uniform(0.5, 2, D), jnp.float32)}}
    extra = {"gain": jnp.float32(2)}
    return x, np.asarray(block(params, {"x": x, **extra})), params, extra


def quantised(params, spec):
    kernel = spec.init(params["up"]["kernel"][None], None, jax.random.key(0)[None])
    return {**params, "up": {"kernel": jax.tree.map(lambda a: a[0], kernel)}}


def config(epochs=6, **optimizer):
    settings = {"lr": 0.01, "warmup": 0.0, "freeze": ("matrix",), **optimizer}
    return TuningConfig(epochs, 4, 2, OptimizerConfig("relative", **settings))


def tune(data, spec=SPECS["residual"], settings=None, **options):
    x, y, params, extra = data
    start = quantised(params, spec)
    return start, tune_block(block, start, x, y, settings or config(), HELD_OUT, extra=extra,
                             **options)


def same(a, b):
    return [bool((x == y).all()) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)]


def test_the_loss_is_relative_token_by_token(data):
    x, y, params, extra = data
    start = quantised(params, SPECS["residual"])
    out = np.asarray(block(start, {"x": x, **extra}), np.float64)
    wanted = (((out - y) ** 2).sum(-1) / (np.float64(y) ** 2).sum(-1)).sum()
    batch = {"x": x, "y": jnp.asarray(y), **extra}
    assert float(relative_error(block, start, batch)) == pytest.approx(wanted, rel=1e-5)
    _, tuned = tune(data)
    held = wanted = (((out - y) ** 2).sum(-1) / (np.float64(y) ** 2).sum(-1))[-HELD_OUT:].mean()
    assert tuned.before == pytest.approx(held, rel=1e-5)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_any_representation_comes_nearer_to_its_teacher(data, spec):
    start, tuned = tune(data, spec)
    assert tuned.after < 0.9 * tuned.before and tuned.after == min(tuned.losses)
    for name, leaf in ((p, n) for p, n in tuned.params["up"].items() if is_weight(n)):
        before = start["up"][name]
        for role, changed in zip(jax.tree.leaves(leaf.roles()), same(leaf, before), strict=True):
            assert changed == (role in ("sign", "code")), role
    x, y, _, extra = data
    batch = {"x": x[-HELD_OUT:], "y": jnp.asarray(y[-HELD_OUT:]), **extra}
    found = float(relative_error(block, tuned.params, batch)) / (HELD_OUT * T)
    assert found == pytest.approx(tuned.after, rel=1e-5)  # the params are those of that epoch


def nested_errors64(params, x, y, gain):
    """The mean relative error of the models of one and of all paths, in float64."""
    node, scale = params["up"]["kernel"], np.float64(params["norm"]["scale"])
    left, kernel, found = np.float64(node.latent), 0.0, []
    for n in range(node.g.shape[0]):
        path = np.where(left >= 0, 1.0, -1.0) * np.outer(node.h[n], node.g[n])
        left, kernel = left - path, kernel + path
        inputs = np.float64(x[n + 1])
        error = inputs + gain * np.tanh((inputs * scale) @ kernel) - y
        found.append(((error**2).sum(-1) / (np.float64(y) ** 2).sum(-1)).mean())
    return np.array(found)


def test_models_of_the_first_paths_are_tuned_together_each_from_its_own_inputs(data):
    x, y, params, extra = data
    rng = np.random.default_rng(1)
    own = {1: np.float32(x * rng.normal(1, 0.05, x.shape)), 2: x}
    start, weights = quantised(params, SPECS["residual"]), {1: 1.0, 2: 3.0}
    tuned = tune_block(block, start, own, y, config(), HELD_OUT, extra=extra, nested=weights)
    held = {n: a[-HELD_OUT:] for n, a in own.items()}

    def mean(errors):
        return np.exp((np.log(errors) * [0.25, 0.75]).sum())

    before = nested_errors64(start, held, y[-HELD_OUT:], 2)
    after = nested_errors64(tuned.params, held, y[-HELD_OUT:], 2)
    assert tuned.before == pytest.approx(mean(before), rel=1e-4)
    assert tuned.after == pytest.approx(mean(after), rel=1e-4)
    assert list(tuned.nested) == [1, 2]
    np.testing.assert_allclose(list(tuned.nested.values()), after, rtol=1e-4)
    assert (after < before).all()
    alone = tune_block(block, start, x, y, config(), HELD_OUT, extra=extra)
    assert alone.nested == {}
    assert nested_errors64(alone.params, held, y[-HELD_OUT:], 2)[0] > after[0]


@pytest.mark.parametrize(("given", "nested"), [((1, 2), {1: 1.0}), ((1,), None), ((), {2: 1.0})])
def test_inputs_are_those_of_the_models(data, given, nested):
    x, y, params, extra = data
    x = {n: x for n in given} or x
    with pytest.raises(BadInput, match="give those of each model by its number of paths"):
        tune_block(block, params, x, y, config(), HELD_OUT, extra=extra, nested=nested)


def test_a_model_without_error_leaves_the_others_finite(data):
    x, y, params, extra = data
    start = {**quantised(params, SPECS["residual"]), "up": {"kernel": params["up"]["kernel"]}}
    tuned = tune_block(block, start, {1: x, 2: x}, y, config(freeze=("norm",)), HELD_OUT,
                       extra=extra, nested={1: 1.0, 2: 1.0})
    assert tuned.after == pytest.approx(1e-30, rel=1e-3)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tuned.params))


def test_frozen_roles_stay_and_the_start_is_not_donated(data):
    start, tuned = tune(data, settings=config(freeze=("latent", "norm")))
    node, before = tuned.params["up"]["kernel"], start["up"]["kernel"]
    assert same(tuned.params["norm"], start["norm"]) == [True]
    assert same(node.latent, before.latent) == [True]
    assert same((node.g, node.h), (before.g, before.h)) == [False, False]


def test_scales_of_a_packed_block_train_too(data):
    x, y, params, extra = data
    start = quantised(params, SPECS["residual"])
    packed = start["up"]["kernel"].pack("up")
    start = fixed({**start, "up": {"kernel": packed}})
    tuned = tune_block(block, start, x, y, config(), HELD_OUT, extra=extra)
    assert tuned.after < 0.9 * tuned.before
    again = tuned.params["up"]["kernel"].pack("up")
    np.testing.assert_array_equal(again.bits, packed.bits)
    assert not (again.g == packed.g).all()


def test_held_out_windows_are_not_trained_on(data):
    x, y, params, extra = data
    _, one = tune(data)
    other = y.copy()
    other[-HELD_OUT:] *= 1.01
    start = quantised(params, SPECS["residual"])
    two = tune_block(block, start, x, other, config(), HELD_OUT, extra=extra)
    assert two.before != one.before
    if np.argmin(two.losses) == np.argmin(one.losses):
        assert all(same(one.params, two.params))


def test_a_block_that_gets_worse_keeps_its_start(data):
    start, tuned = tune(data, settings=config(epochs=9, lr=5.0))
    assert tuned.after == tuned.before and len(tuned.losses) == 2  # patience
    assert all(same(tuned.params, start))


def test_the_order_of_windows_follows_from_the_seed(data):
    (_, one), (_, two), (_, other) = tune(data), tune(data), tune(data, seed=1)
    assert all(same(one.params, two.params)) and one.losses == two.losses
    assert not all(same(one.params, other.params))


def test_every_window_is_read_once_an_epoch(data):
    x, y, params, extra = data
    seen = []

    class Watched:
        shape = x.shape

        def __len__(self):
            return len(x)

        def __getitem__(self, rows):
            if isinstance(rows, np.ndarray):
                seen.append(rows.tolist())
            return x[rows]

    calls = []
    settings = dataclasses.replace(config(epochs=1), batch_size=3)
    tune_block(block, quantised(params, SPECS["residual"]), Watched(), y, settings, HELD_OUT,
               extra=extra, done=lambda step, loss: calls.append(step))
    read = sum(seen, [])
    assert set(read) == set(range(N - HELD_OUT)) and len(read) == 33  # 32, filled up to 11 batches
    assert calls == list(range(1, 12))


@pytest.mark.parametrize(("change", "words"), [
    ({"freeze": ("latent", "scale", "norm")}, "leaves nothing of a block"),
    ({"lr": 1e30}, "not finite|lower the learning rate"),
    ({"beta1": 0.99, "momentum": "bfloat16"}, "moments in bfloat16, which then stand still"),
])
def test_what_cannot_work_is_refused(data, change, words):
    with pytest.raises(BadInput, match=words):
        tune(data, settings=config(**change))


def test_windows_have_to_be_held_out(data):
    x, y, params, extra = data
    start = quantised(params, SPECS["residual"])
    for held_out in (0, N):
        with pytest.raises(BadInput, match="at least one"):
            tune_block(block, start, x, y, config(), held_out, extra=extra)
    with pytest.raises(BadInput, match="patience is 0"):
        TuningConfig(patience=0)
