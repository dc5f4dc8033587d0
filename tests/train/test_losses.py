"""Losses against float64 NumPy on whole logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from rabit_jax.experiments.planning.flops import count_flops
from rabit_jax.train.losses import (
    distillation_loss,
    dominant_term,
    nested_loss,
    next_token_loss,
    sample_labels,
    summed_cross_entropy,
    summed_hidden_error,
    summed_kl,
)
from rabit_jax.tree import is_weight, map_leaves

RNG = np.random.default_rng(0)
HEAD = RNG.normal(size=(6, 11)).astype(np.float32)
OTHER = RNG.normal(size=(6, 11)).astype(np.float32)
FEATURES = RNG.normal(size=(3, 7, 6)).astype(np.float32)
TAUGHT = RNG.normal(size=(3, 7, 6)).astype(np.float32)
LABELS = RNG.integers(0, 11, (3, 7))
MASK = RNG.random((3, 7)) < 0.7


def project(kernel):
    return lambda x: x @ jnp.asarray(kernel)


def log_probabilities(x, kernel):
    return log_softmax(np.float64(x) @ np.float64(kernel), axis=-1)


@pytest.mark.parametrize("chunk", [0, 1, 3, 7, 50])
def test_cross_entropy_is_that_of_whole_logits(chunk):
    nats, count = summed_cross_entropy(project(HEAD), FEATURES, LABELS, MASK, chunk)
    chosen = np.take_along_axis(log_probabilities(FEATURES, HEAD), LABELS[..., None], -1)[..., 0]
    np.testing.assert_allclose(nats, -(chosen * MASK).sum(), rtol=1e-6)
    assert count == MASK.sum()


@pytest.mark.parametrize("chunk", [0, 2, 7])
def test_kl_and_its_gradient(chunk):
    value, grad = jax.value_and_grad(
        lambda x: summed_kl(project(HEAD), project(OTHER), x, TAUGHT, MASK, chunk)
    )(jnp.asarray(FEATURES))
    log_q, log_p = log_probabilities(FEATURES, HEAD), log_probabilities(TAUGHT, OTHER)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    np.testing.assert_allclose(value, (kl * MASK).sum(), rtol=1e-5)
    wanted = ((np.exp(log_q) - np.exp(log_p)) * MASK[..., None]) @ np.float64(HEAD).T
    np.testing.assert_allclose(grad, wanted, atol=2e-6)


@pytest.mark.parametrize("chunk", [0, 3])
def test_gradients_by_features_and_head_together(chunk):
    """Of a loss that is scaled and has another factor, by all that is differentiated."""

    def loss(given, features, scale):
        kernel, bias = given["kernel"], given["bias"]
        nats, _ = summed_cross_entropy(
            lambda x: x @ kernel + bias[None, None], features, LABELS, MASK, chunk)
        return scale * nats**2 / 100

    bias = RNG.normal(size=11).astype(np.float32)
    given = {"kernel": jnp.asarray(HEAD), "bias": jnp.asarray(bias)}
    by_given, by_features, by_scale = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(
        given, jnp.asarray(FEATURES), jnp.float32(3))
    log_q = log_softmax(np.float64(FEATURES) @ np.float64(HEAD) + bias, axis=-1)
    nats = -(np.take_along_axis(log_q, LABELS[..., None], -1)[..., 0] * MASK).sum()
    by_logits = (np.exp(log_q) - np.eye(11)[LABELS]) * MASK[..., None] * 3 * 2 * nats / 100
    np.testing.assert_allclose(by_scale, nats**2 / 100, rtol=1e-5)
    np.testing.assert_allclose(by_features, by_logits @ np.float64(HEAD).T, rtol=2e-4, atol=1e-4)
    wanted = np.einsum("btd,btv->dv", np.float64(FEATURES), by_logits)
    np.testing.assert_allclose(by_given["kernel"], wanted, rtol=2e-4, atol=1e-4)
    np.testing.assert_allclose(by_given["bias"], by_logits.sum((0, 1)), rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize(("chunk", "positions"), [(0, 7), (3, 9)])
def test_logits_are_computed_once_in_a_step(chunk, positions):
    found = count_flops(jax.grad(
        lambda x: summed_kl(project(HEAD), project(OTHER), x, TAUGHT, MASK, chunk)), FEATURES)
    # The student's logits, the teacher's, and the gradient by the student's features.
    assert found.total == found.model.total() == 3 * (2 * 3 * positions * 6 * 11)


def test_kl_sends_nothing_to_the_teacher():
    grad = jax.grad(lambda t: summed_kl(project(HEAD), project(OTHER), FEATURES, t, MASK, 3))(
        jnp.asarray(TAUGHT)
    )
    assert not grad.any()


def relative_error64(s, t):
    """`mean_l |s - t|^2 / |t|^2` of every token, in float64: `[b, t]`."""
    s, t = np.float64(s), np.float64(t)
    return (((s - t) ** 2).sum(-1) / (t**2).sum(-1)).mean(0)


def test_hidden_error_is_relative_to_each_token_and_a_mean_over_layers():
    s, t = RNG.normal(size=(2, 4, 3, 7, 6)).astype(np.float32)
    wanted = (relative_error64(s, t) * MASK).sum()
    np.testing.assert_allclose(summed_hidden_error(s, t, MASK), wanted, rtol=1e-6)


def test_hidden_error_is_that_of_every_scale_of_layers_and_tokens():
    # A residual stream with massive activations: the first token is 1,000 times the others.
    s, t = RNG.normal(size=(2, 4, 3, 7, 6)).astype(np.float32)
    size = np.float32(np.exp(3 * RNG.normal(size=(4, 1, 7, 1))))
    size[:, :, 0] *= 1000
    error, grad = jax.value_and_grad(summed_hidden_error)(size * s, size * t, MASK)
    np.testing.assert_allclose(error, summed_hidden_error(s, t, MASK), rtol=1e-5)
    wanted = 2 * (np.float64(s) - t) / (np.float64(t) ** 2).sum(-1, keepdims=True)
    wanted *= MASK[None, ..., None] / (4 * size)
    np.testing.assert_allclose(grad, wanted, rtol=1e-4, atol=1e-9)


def test_hidden_error_of_a_token_of_zeros_counts_nothing():
    s, t = RNG.normal(size=(2, 4, 3, 7, 6)).astype(np.float32)
    t[:, 1, 2] = 0
    s[:2, 1, 2] = 0
    mask = np.ones_like(MASK)
    value, grads = jax.value_and_grad(summed_hidden_error, argnums=(0, 1))(s, t, mask)
    wanted = np.delete(relative_error64(s, np.where(t == 0, 1, t)).ravel(), 1 * 7 + 2).sum()
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    assert np.isfinite(grads[0]).all() and not grads[0][:, 1, 2].any() and not grads[1].any()


def test_a_term_that_dwarfs_the_other_is_named():
    assert dominant_term(1.0, 0.5, 1.0) is None
    assert dominant_term(0.01, 0.5, 1.0) is None
    assert dominant_term(0.0, 5.0, 0.0) is None  # without the term there is nothing to compare
    assert dominant_term(0.0, 0.0, 1.0) is None
    assert "lower gamma" in (dominant_term(6.8, 123204.0, 1.0) or "")
    assert "raise gamma" in (dominant_term(2.0, 1e-3, 1.0) or "")


def test_distillation_sends_nothing_to_the_teacher(model, student, teacher, batches):
    def loss(teacher):
        return distillation_loss(model, student, teacher, batches(0), gamma=1.0, chunk=5)["loss"]

    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(jax.grad(loss)(teacher)))


def test_no_logits_of_the_whole_sequence_are_held():
    v, t, c = 4096, 64, 8
    head = jnp.zeros((6, v))

    def loss(x):
        labels = jnp.zeros((2, t), jnp.int32)
        return summed_cross_entropy(lambda f: f @ head, x, labels, jnp.ones((2, t)), c)[0]

    text = jax.jit(jax.grad(loss)).lower(jnp.zeros((2, t, 6))).as_text()
    assert f"2x{c}x{v}xf32" in text
    assert f"2x{t}x{v}xf32" not in text


def test_next_token_loss_counts_pairs_of_real_tokens(model, teacher, batches):
    batch = batches(0)
    nats, count = next_token_loss(model, teacher, batch, chunk=5)
    logits = np.float64(model.apply({"params": teacher}, batch["tokens"], batch["mask"]))
    chosen = np.take_along_axis(log_softmax(logits, -1)[:, :-1], batch["tokens"][:, 1:, None], -1)[
        ..., 0
    ]
    scored = batch["mask"][:, 1:] & batch["mask"][:, :-1]
    assert count == scored.sum()
    np.testing.assert_allclose(nats, -(chosen * scored).sum(), rtol=1e-5)


def test_distillation_of_the_teacher_into_itself_is_zero(model, teacher, batches):
    sums = distillation_loss(model, teacher, teacher, batches(0), gamma=1.0, chunk=5)
    assert abs(float(sums["kl"])) < 1e-4 and float(sums["hidden_mse"]) == 0


def test_distillation_adds_gamma_times_the_hidden_error(model, student, teacher, batches):
    batch = batches(1)
    batch["mask"][:, -1] = False
    sums = {
        k: float(v) for k, v in distillation_loss(model, student, teacher, batch, 3.0, 4).items()
    }
    run = [
        model.apply({"params": p}, batch["tokens"], batch["mask"], hidden_states=True)
        for p in (student, teacher)
    ]
    (z_s, h_s), (z_t, h_t) = [(np.float64(z), np.float64(h)) for z, h in run]
    log_q, log_p = log_softmax(z_s, -1), log_softmax(z_t, -1)
    kl = ((np.exp(log_p) * (log_p - log_q)).sum(-1) * batch["mask"]).sum()
    hidden = (relative_error64(h_s, h_t) * batch["mask"]).sum()
    np.testing.assert_allclose([sums["kl"], sums["hidden_mse"]], [kl, hidden], rtol=2e-4)
    np.testing.assert_allclose(sums["loss"], sums["kl"] + 3 * sums["hidden_mse"], rtol=1e-6)


def test_sampled_labels_follow_the_model():
    features = jnp.tile(jnp.asarray(FEATURES[:1, :1]), (1, 20000, 1))
    drawn = np.bincount(
        np.asarray(sample_labels(project(HEAD), features, jax.random.key(0), 999))[0], minlength=11
    )
    np.testing.assert_allclose(
        drawn / 20000, np.exp(log_probabilities(FEATURES[0, 0], HEAD)), atol=0.015
    )


def test_nested_losses_are_those_of_the_first_paths_by_weight(model, student, teacher, batches):
    """The prefix is made by hand here; gradients of the whole are the weighted ones too."""
    batch, weights = batches(1), {1: 1.0, 2: 3.0}

    def prefix(params, n):
        return map_leaves(
            lambda _, w: w.replace(g=w.g[:, :n], h=w.h[:, :n]) if is_weight(w) else w, params)

    def alone(params, n):
        return distillation_loss(model, prefix(params, n), teacher, batch, 2.0, 4)

    found, grad = jax.value_and_grad(
        lambda p: nested_loss(model, p, teacher, batch, 2.0, weights, 4)["loss"])(student)
    want, wanted = jax.value_and_grad(
        lambda p: (alone(p, 1)["loss"] + 3 * alone(p, 2)["loss"]) / 4)(student)
    np.testing.assert_allclose(found, want, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grad), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))
    sums = nested_loss(model, student, teacher, batch, 2.0, weights, 4)
    assert set(sums) == {"loss", "kl", "hidden_mse", "kl_1"}
    np.testing.assert_allclose(sums["kl"], alone(student, 2)["kl"], rtol=1e-5)
    np.testing.assert_allclose(sums["kl_1"], alone(student, 1)["kl"], rtol=1e-5)
