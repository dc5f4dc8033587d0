"""Roles, Muon on stacked layers, freezing, projection."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rabit_jax import BadInput, ResidualSign, ResidualSignSpec
from rabit_jax.train.optimizer import (
    OptimizerConfig,
    apply_updates,
    check_moments,
    learning_rate,
    make_optimizer,
    merge,
    partition,
    project_scales,
    roles,
)
from rabit_jax.weights.fixed import fixed

STEPS = 100


def newton_schulz(m):
    """Orthogonalise one matrix as Muon does, in float64."""
    x = m.T if m.shape[0] > m.shape[1] else m
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if m.shape[0] > m.shape[1] else x


def test_roles_name_every_leaf(student):
    names = roles(student)
    assert names["layers"]["attn"]["q"]["kernel"] == ResidualSign("latent", "scale", "scale")
    assert names["embed"]["embedding"] == "embedding" and names["head"]["kernel"] == "head"
    assert names["layers"]["attn_norm"]["scale"] == names["final_norm"]["scale"] == "norm"
    assert jax.tree.structure(names) == jax.tree.structure(student)


def test_full_precision_kernels_are_matrices_and_biases_are_not():
    names = roles({"layers": {"up": {"kernel": jnp.zeros((3, 4, 5)), "bias": jnp.zeros((3, 5))}}})
    assert names["layers"]["up"] == {"kernel": "matrix", "bias": "bias"}


@pytest.mark.parametrize("shape", [(3, 8, 20), (3, 20, 8), (1, 6, 6)])
def test_muon_orthogonalises_each_layer_of_a_stack(shape):
    rng = np.random.default_rng(0)
    w, grad = rng.normal(size=(2, *shape)).astype(np.float32)
    node = ResidualSign(
        jnp.asarray(w), jnp.ones((shape[0], 2, shape[2])), jnp.ones((shape[0], 2, shape[1]))
    )
    config = OptimizerConfig(lr=0.1, warmup=0.0, schedule="constant", clip=0.0)
    optimizer = make_optimizer(config, roles(node), STEPS)
    state = optimizer.init(node)
    for _ in range(2):
        update, state = optimizer.update(
            ResidualSign(jnp.asarray(grad), node.g, node.h), state, node
        )
    # Constant gradient: Nesterov momentum with bias correction leaves its direction alone.
    scale = 0.2 * np.sqrt(max(shape[1:]))
    wanted = np.stack([-0.1 * scale * newton_schulz(layer) for layer in np.float64(grad)])
    np.testing.assert_allclose(update.latent, wanted, rtol=2e-3, atol=2e-4)


def test_muon_keeps_one_moment_for_latents_and_adam_two_for_scales(student):
    trainable, _ = partition(student, roles(student), ("embedding", "head"))
    names, _ = partition(roles(student), roles(student), ("embedding", "head"))
    state = make_optimizer(OptimizerConfig(), names, STEPS).init(trainable)
    sizes = {"latent": 0, "scale": 0, "norm": 0}
    for leaf, name in zip(jax.tree.leaves(trainable), jax.tree.leaves(names), strict=True):
        sizes[name] += leaf.size
    held = sum(
        x.size for x in jax.tree.leaves(state) if x.ndim and x.shape != (3,)
    )  # 3: Muon's polynomial
    assert held == sizes["latent"] + 2 * (sizes["scale"] + sizes["norm"])


def test_partition_and_merge_are_inverse_and_frozen_arrays_cost_nothing(student):
    trainable, frozen = partition(student, roles(student), ("embedding", "head", "scale"))
    assert trainable["embed"]["embedding"] is None and frozen["embed"]["embedding"] is not None
    assert trainable["layers"]["mlp"]["up"]["kernel"].g is None
    back = merge(trainable, frozen)
    assert all(a is b for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(student), strict=True))


def test_adamw_moves_latents_as_optax_does():
    node = ResidualSign(jnp.ones((2, 4, 4)), jnp.ones((2, 1, 4)), jnp.ones((2, 1, 4)))
    grads = jax.tree.map(lambda x: jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape), node)
    config = OptimizerConfig(
        name="adamw", lr=0.1, schedule="constant", warmup=0.01, clip=0.0, scale_lr=0.3
    )
    optimizer = make_optimizer(config, roles(node), STEPS)
    state = optimizer.init(node)
    for _ in range(2):
        update, state = optimizer.update(grads, state, node)
    for rate, got, grad in ((0.1, update.latent, grads.latent), (0.3, update.g, grads.g)):
        plain = optax.adam(rate, b1=0.9, b2=0.95)
        plain_state = plain.init(grad)
        for _ in range(2):
            wanted, plain_state = plain.update(grad, plain_state)
        np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_projection_moves_only_scales_below_the_floor():
    g = jnp.array([[1.0, -2.0, 1e-9, 3.0]])
    node = ResidualSign(jnp.full((2, 4), -1.0), g, jnp.ones((1, 2)))
    out, moved = project_scales(node, roles(node), floor=0.1)
    floor = 0.1 * np.mean(np.abs(g))
    np.testing.assert_allclose(out.g, [[1.0, floor, floor, 3.0]], rtol=1e-6)
    assert moved == 2 and (out.latent == node.latent).all() and (out.h == node.h).all()


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"freeze": ("latents",)}, "latents"), ({"lr": 0.0}, "lr"), ({"warmup": 1.5}, "warmup"),
        ({"lr": float("nan")}, "lr is nan"), ({"lr": float("inf")}, "lr is inf"),
        ({"scale_lr": -1.0}, "scale_lr is -1.0"), ({"beta1": 1.0}, "beta1 is 1.0"),
        ({"beta2": -0.1}, "beta2 is"), ({"weight_decay": -1.0}, "weight_decay"),
        ({"clip": float("nan")}, "clip is nan"),
    ],
)
def test_bad_settings(settings, said):
    with pytest.raises(BadInput, match=said):
        OptimizerConfig(**settings)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_no_step_is_idle(schedule):
    for steps in (1, 2, 7, 100):
        rate = learning_rate(OptimizerConfig(schedule=schedule, warmup=0.1), 0.5, steps)
        rates = [float(rate(s)) for s in range(steps)]
        assert min(rates) > 0 and max(rates) == pytest.approx(0.5)
    assert float(learning_rate(OptimizerConfig(warmup=0.1), 1.0, 100)(4)) == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_bfloat16_latents_move_as_far_as_float32_ones(name):
    # The learning rate of a 7B model beside weights of the usual size: to the nearest bfloat16
    # number nearly all of these updates are nothing.
    rng = np.random.default_rng(0)
    w = (0.05 * rng.normal(size=(64, 96))).astype(np.float32)
    grad = rng.normal(size=w.shape).astype(np.float32)
    config = OptimizerConfig(name, lr=4e-5, warmup=0.0, schedule="constant", clip=0.0)

    def run(dtype, steps=40):
        node = ResidualSign(jnp.asarray(w, dtype), jnp.ones((1, 96)), jnp.ones((1, 64)))
        optimizer = make_optimizer(config, roles(node), steps)
        grads = node.replace(latent=jnp.asarray(grad, dtype), g=0 * node.g, h=0 * node.h)

        @jax.jit
        def step(carry, n):
            node, state = carry
            update, state = optimizer.update(grads, state, node)
            return (apply_updates(node, update, n), state), None

        (node, _), _ = jax.lax.scan(step, (node, optimizer.init(node)), jnp.arange(steps))
        assert node.latent.dtype == dtype
        return np.asarray(node.latent, np.float64) - np.asarray(jnp.asarray(w, dtype), np.float64)

    wanted, found = run(jnp.float32), run(jnp.bfloat16)
    slope = (found * wanted).sum() / (wanted**2).sum()
    assert slope == pytest.approx(1, abs=0.05)
    # What is left is the rounding of single steps, of one or two units in the last place.
    assert np.abs(found - wanted).mean() < 2**-6 * np.abs(w).mean()


@pytest.mark.parametrize("beta2", [0.95, 0.98, 0.999])
def test_a_second_moment_in_bfloat16_is_that_of_float64_or_refused(beta2):
    """Gradients that become ten times smaller, 300 steps of each size; the mean over 500 arrays."""
    config = OptimizerConfig("adamw", lr=1e-3, beta2=beta2, clip=0.0)
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(600, 500)) * np.repeat([1.0, 0.1], 300)[:, None]
    wanted = np.zeros(500)
    for grad in grads:
        wanted = beta2 * wanted + (1 - beta2) * grad**2
    param = {"w": jnp.zeros((500,), jnp.bfloat16)}
    names = {"w": "latent"}
    optimizer = make_optimizer(config, names, 600)

    @jax.jit
    def moments(grads):
        def step(state, grad):
            return optimizer.update({"w": grad.astype(jnp.bfloat16)}, state, param)[1], None

        return jax.lax.scan(step, optimizer.init(param), grads)[0]

    (found,) = [np.asarray(x, np.float64) for path, x in
                jax.tree_util.tree_leaves_with_path(moments(jnp.asarray(grads, jnp.float32)))
                if ".nu" in jax.tree_util.keystr(path)]
    error = abs(found.mean() / wanted.mean() - 1)
    if beta2 > 0.98:
        assert error > 0.3  # what is refused would be wrong
        with pytest.raises(BadInput, match="beta2 is 0.999 for moments in bfloat16"):
            check_moments(config, param, names)
        check_moments(config, {"w": jnp.zeros(3)}, names)
        check_moments(dataclasses.replace(config, name="muon"), param, names)  # it has none of it
    else:
        assert error < 0.05
        check_moments(config, param, names)
        slow = dataclasses.replace(config, beta1=0.99)
        with pytest.raises(BadInput, match="beta1 is 0.99 for moments in bfloat16"):
            check_moments(slow, param, names)
        check_moments(dataclasses.replace(slow, momentum="float32"), param, names)


def test_stochastic_rounding_is_right_on_average_and_exact_where_it_can_be():
    x = jnp.full((100_000,), 1 + 2.0**-10, jnp.float32)
    zero = {"a": jnp.zeros(x.shape, jnp.bfloat16), "b": jnp.zeros((3,), jnp.bfloat16)}
    update = {"a": x, "b": jnp.asarray([0.0, -1.5, jnp.nan])}
    found = jax.jit(apply_updates)(zero, update, jnp.int32(7))
    assert set(np.unique(np.float32(found["a"]))) == {1.0, 1 + 2.0**-7}
    assert np.float64(found["a"]).mean() == pytest.approx(1 + 2.0**-10, abs=5e-5)
    np.testing.assert_array_equal(np.float32(found["b"]), [0, -1.5, np.nan])
    again = jax.jit(apply_updates)(zero, update, jnp.int32(7))
    np.testing.assert_array_equal(np.float32(again["a"]), np.float32(found["a"]))
    other = jax.jit(apply_updates)(zero, update, jnp.int32(8))
    assert (np.float32(other["a"]) != np.float32(found["a"])).any()


def test_relative_steps_are_shares_of_each_array():
    """Adam's first step is lr in every element; here in units of each matrix, path and layer."""
    rng = np.random.default_rng(0)
    sizes = np.array([1.0, 100.0])[:, None, None]
    node = ResidualSign(*(jnp.asarray(sizes * rng.normal(size=s), jnp.float32)
                          for s in ((2, 8, 6), (2, 3, 6), (2, 3, 8))))
    grad = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) * 1e-9, jnp.float32), node)
    config = OptimizerConfig("relative", lr=0.01, scale_lr=0.03, warmup=0.0, clip=0.0)
    optimizer = make_optimizer(config, roles(node), STEPS)
    update, _ = optimizer.update(grad, optimizer.init(node), node)
    for name, axes, lr in (("latent", (-2, -1), 0.01), ("g", -1, 0.03), ("h", -1, 0.03)):
        x, g = (np.float64(getattr(tree, name)) for tree in (node, grad))
        wanted = -lr * np.sqrt((x**2).mean(axes, keepdims=True)) * np.sign(g)
        np.testing.assert_allclose(getattr(update, name), wanted, rtol=1e-3)


def test_relative_sizes_are_those_of_the_start():
    tree = {"w": jnp.full((4, 4), 2.0)}
    config = OptimizerConfig("relative", lr=0.1, warmup=0.0, schedule="constant", clip=0.0)
    optimizer = make_optimizer(config, roles(tree), STEPS)
    state = optimizer.init(tree)
    grad, grown = {"w": jnp.ones((4, 4))}, {"w": jnp.full((4, 4), 9.0)}
    for _ in range(3):  # a constant gradient: Adam's step stays 1
        update, state = optimizer.update(grad, state, grown)
        np.testing.assert_allclose(update["w"], np.full((4, 4), -0.2), rtol=1e-4)


def test_matrix_freezes_plain_matrices_and_no_array_of_a_weight_node():
    params = {"layers": {"q": {"kernel": fixed({"w": _packed()})["w"]}}, "proj": jnp.ones((4, 4))}
    trainable, frozen = partition(params, roles(params), ("embedding", "head", "matrix", "latent"))
    assert trainable["proj"] is None and frozen["proj"] is not None
    node = trainable["layers"]["q"]["kernel"].packed_weight
    assert node.g is not None and node.h is not None and node.bits is None


def _packed():
    w = jax.random.normal(jax.random.key(0), (64, 8))
    return ResidualSignSpec(k=2).init(w).pack("w")
