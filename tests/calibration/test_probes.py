"""Calibration against per-token gradients, written out by hand in float64 NumPy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rabit_jax import BadInput, calibrate, linear

L, B, T, D, F, V = 2, 8, 6, 8, 12, 14
RULES = [(r"(layers/(up|down)|head)/kernel", "measure")]
PATHS = ("layers/up/kernel", "layers/down/kernel", "head/kernel")


class Block(nn.Module):
    """x + tanh(mean of the past of x @ up) @ down."""

    @nn.compact
    def __call__(self, x, _):
        up, down = (self.get_variable("params", name)["kernel"] for name in ("up", "down"))
        past = jnp.cumsum(x, axis=1) / jnp.arange(1.0, T + 1).reshape(1, T, 1)
        return x + linear(jnp.tanh(linear(past, up)), down), None


class Model(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = self.get_variable("params", "embed")[tokens]
        layers = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={}, length=L)
        x, _ = layers(name="layers")(x, None)
        return linear(x, self.get_variable("params", "head")["kernel"])


def loss(params, batch):
    """Summed next-token cross-entropy over pairs of real tokens."""
    logits = Model().apply({"params": params}, batch["tokens"])[:, :-1]
    log_p = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_p, batch["tokens"][:, 1:, None], axis=-1)[..., 0]
    return -jnp.sum(picked * (batch["mask"][:, 1:] & batch["mask"][:, :-1]))


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    array = lambda *s: jnp.asarray(rng.normal(size=s) * 0.5, jnp.float32)  # noqa: E731
    return {
        "embed": array(V, D).at[V - 1].set(100.0),
        "layers": {"up": {"kernel": array(L, D, F)}, "down": {"kernel": array(L, F, D)}},
        "head": {"kernel": array(D, V)},
    }


@pytest.fixture(scope="module")
def batch():
    """Ragged rows, one with a hole; the padding token has an embedding far too large."""
    rng = np.random.default_rng(1)
    mask = np.arange(T) < np.array([6, 4, 2, 6, 5, 3, 6, 1])[:, None]
    mask[3, 2] = False
    tokens = np.where(mask, rng.integers(0, V - 1, (B, T)), V - 1)
    return {"tokens": tokens.astype(np.int32), "mask": mask}


def by_hand(params, batch):
    """Inputs and output gradients by path: `(x, dy)`, float64 `[l, b, t, channels]`."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    up, down = (p["layers"][name]["kernel"] for name in ("up", "down"))
    head = p["head"]["kernel"]
    tokens, mask = batch["tokens"], batch["mask"]
    causal = np.tril(np.ones((T, T))) / np.arange(1, T + 1)[:, None]
    found = {path: [] for path in PATHS}
    for row in range(len(tokens)):
        x = p["embed"][tokens[row]]
        pasts, hiddens = [], []
        for l in range(L):
            pasts.append(causal @ x)
            hiddens.append(np.tanh(pasts[-1] @ up[l]))
            x = x + hiddens[-1] @ down[l]
        logits = x @ head
        dlogits = np.zeros((T, V))
        for t in range(T - 1):
            if mask[row, t] and mask[row, t + 1]:
                e = np.exp(logits[t] - logits[t].max())
                dlogits[t] = e / e.sum()
                dlogits[t, tokens[row, t + 1]] -= 1
        found["head/kernel"].append((x[None], dlogits[None]))
        dx = dlogits @ head.T
        d_up, d_down = [None] * L, [None] * L
        for l in reversed(range(L)):
            d_down[l] = dx
            d_up[l] = (dx @ down[l].T) * (1 - hiddens[l] ** 2)
            dx = dx + causal.T @ (d_up[l] @ up[l].T)
        found["layers/up/kernel"].append((np.stack(pasts), np.stack(d_up)))
        found["layers/down/kernel"].append((np.stack(hiddens), np.stack(d_down)))
    return {k: [np.stack(a, axis=1) for a in zip(*v, strict=True)] for k, v in found.items()}


def rms(a, mask, clip=None):
    """Root mean square over real tokens `[l, channels]`, token by token, each clipped in norm."""
    out = np.zeros((a.shape[0], a.shape[-1]))
    for l in range(a.shape[0]):
        tokens = [a[l, b, t] for b, t in np.argwhere(mask)]
        norms = np.array([np.linalg.norm(v) for v in tokens])
        limit = np.inf if clip is None else np.sort(norms)[clip]
        for v, size in zip(tokens, norms, strict=True):
            out[l] += (v * min(1.0, limit / max(size, 1e-300))) ** 2
    return np.sqrt(out / mask.sum())


def check(stats, params, batch, rtol=1e-5, clip=None):
    want = by_hand(params, batch)
    assert set(stats) == set(PATHS)
    for path, (x, dy) in want.items():
        for got, a in [(stats[path].s_in, x), (stats[path].s_out, dy)]:
            oracle = rms(a, batch["mask"], clip)
            oracle = oracle[0] if path.startswith("head") else oracle
            assert got.shape == oracle.shape and got.dtype == jnp.float32
            np.testing.assert_allclose(got, oracle, rtol=rtol, atol=rtol * oracle.max())


@pytest.fixture(scope="module")
def stats(params, batch):
    return calibrate(loss, params, [batch], RULES)


def test_statistics_are_those_of_explicit_per_token_gradients(stats, params, batch):
    check(stats, params, batch)


def test_without_padding(params, batch):
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, V - 1, (B, T)).astype(np.int32)
    whole = {"tokens": tokens, "mask": np.ones((B, T), bool)}
    check(calibrate(loss, params, [whole], RULES), params, whole)


def test_what_stands_at_padding_does_not_matter(stats, params, batch):
    other = {"tokens": np.where(batch["mask"], batch["tokens"], 0), "mask": batch["mask"]}
    other["tokens"][3, 2] = batch["tokens"][3, 2]  # the hole is inside a sequence: its past counts
    again = calibrate(loss, params, [other], RULES)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), stats, again)


def test_batches_split_differently_give_the_same_statistics(stats, params, batch):
    parts = ({k: v[n : n + 2] for k, v in batch.items()} for n in range(0, B, 2))
    again = calibrate(loss, params, parts, RULES)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), stats, again)


def test_token_norms_are_clipped_at_the_percentile(params, batch):
    mask = batch["mask"].copy()
    mask[3, 2] = True
    mask[4:] = False
    mask[4, :3] = True  # 6 + 4 + 2 + 6 + 3 = 21 real tokens: percentiles fall on tokens
    tokens = np.where(mask, batch["tokens"] % (V - 1), V - 1).astype(np.int32)
    ragged = {"tokens": tokens, "mask": mask}
    assert mask.sum() == 21
    clipped = calibrate(loss, params, [ragged], RULES, clip=80.0)
    check(clipped, params, ragged, clip=16)
    free = by_hand(params, ragged)["layers/up/kernel"][0]
    assert not np.allclose(clipped["layers/up/kernel"].s_in, rms(free, mask), rtol=1e-2)


@pytest.mark.parametrize("path", PATHS)
def test_only_what_a_rule_names_is_measured(path, stats, params, batch):
    found = calibrate(loss, params, [batch], [(path, "measure")])
    assert set(found) == {path}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found[path], stats[path])
    with pytest.raises(BadInput, match="matches no parameter"):
        calibrate(loss, params, [batch], [("layers/upp/kernel", "measure")])


def test_a_mesh_changes_nothing(stats, params, batch):
    mesh = Mesh(np.asarray(jax.devices()).reshape(4, 2), ("data", "tensor"))
    on = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))  # noqa: E731
    shardings = {
        "embed": on(None, "tensor"),
        "layers": {
            "up": {"kernel": on(None, None, "tensor")}, "down": {"kernel": on(None, "tensor")},
        },
        "head": {"kernel": on(None, "tensor")},
    }
    spread = jax.device_put(params, shardings)
    again = calibrate(
        loss, spread, [batch], RULES, shardings=shardings, batch_sharding=on("data")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), stats, again)


def test_a_mask_that_keeps_nothing_is_an_error(params, batch):
    empty = batch | {"mask": np.zeros((B, T), bool)}
    for batches in ([], [empty]):
        with pytest.raises(BadInput, match="no token"):
            calibrate(loss, params, batches, RULES)


def test_a_loss_without_gradient_is_an_error(params, batch):
    with pytest.raises(BadInput, match="output gradients are all zero.*cross-entropy"):
        calibrate(lambda p, b: 0.0 * loss(p, b), params, [batch], RULES)


def test_the_divergence_from_the_model_itself_is_an_error(params, batch):
    def divergence(p, b):
        log_q = jax.nn.log_softmax(Model().apply({"params": p}, b["tokens"]))
        log_p = jax.lax.stop_gradient(log_q)
        return jnp.sum(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1) * b["mask"])

    with pytest.raises(BadInput, match="output gradients"):
        calibrate(divergence, params, [batch], RULES)


def test_inputs_that_are_all_zero_are_an_error(params, batch):
    with pytest.raises(BadInput, match="its inputs are all zero"):
        calibrate(loss, params | {"embed": jnp.zeros((V, D))}, [batch], RULES)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_an_error_that_names_the_kernel(bad, params, batch):
    head = params["head"]["kernel"].at[0, 0].set(bad)
    with pytest.raises(BadInput, match="calibration of .*/kernel: .*not finite"):
        calibrate(loss, params | {"head": {"kernel": head}}, [batch], RULES)
