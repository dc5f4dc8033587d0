"""Statistics of models that know nothing of weights, against the same models in plain float64."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax import calibrate_flax
from rabit_jax.tree import match_rules

ALL = [(".*kernel", "measure")]

IN, HIDDEN, OUT = 6, 10, 3
D, HEADS, PATCH, TOKENS, CLASSES, BLOCKS = 8, 2, 5, 4, 3, 2
ATTENTION = "MultiHeadDotProductAttention_0"


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(OUT, name="second")(jnp.tanh(nn.Dense(HIDDEN, name="first")(x)))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(num_heads=HEADS)(nn.LayerNorm()(x))
        hidden = nn.Dense(2 * D, name="up")(nn.LayerNorm()(x))
        return x + nn.Dense(D, name="down")(nn.gelu(hidden)), None


class Vit(nn.Module):
    """`[b, t, patch] -> [b, classes]`; its blocks one by one, or stacked and scanned over."""

    scanned: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(D, name="embed")(x)
        x = x + self.param("position", nn.initializers.normal(0.5), (1, TOKENS, D))
        if self.scanned:
            axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            x, _ = nn.scan(nn.remat(Block), length=BLOCKS, **axes)(name="blocks")(x, None)
        else:
            for n in range(BLOCKS):
                x, _ = Block(name=f"block_{n}")(x)
        return nn.Dense(CLASSES, name="head")(nn.LayerNorm()(x).mean(axis=1))


def stacked(params):
    """Params of the scanned `Vit` from those of the other."""
    blocks = [params[f"block_{n}"] for n in range(BLOCKS)]
    rest = {name: tree for name, tree in params.items() if not name.startswith("block_")}
    return rest | {"blocks": jax.tree.map(lambda *a: jnp.stack(a), *blocks)}


def cross_entropy(logits, labels):
    """Summed over the batch."""
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)
    return -jnp.sum(picked)


def vit_by_hand(params, x, labels):
    """The same of the cross-entropy of `Vit`, from plain sums over indices in float64."""
    with jax.enable_x64(True):
        p = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), params)
        x = jnp.asarray(np.asarray(x, np.float64))
        shapes = jax.eval_shape(lambda x: _forward(p, x, {})[2], x)
        zeros = {path: jnp.zeros(s.shape) for path, s in shapes.items()}

        def loss(zeros):
            logits, inputs, _ = _forward(p, x, zeros)
            return cross_entropy(logits, labels), inputs

        slopes, inputs = jax.jit(jax.grad(loss, has_aux=True))(zeros)
        return {path: (np.asarray(inputs[path]), np.asarray(slopes[path])) for path in shapes}


def _forward(p, x, extra):
    """Logits, and inputs and outputs of every layer as `[..., i]` and `[..., o]`."""
    inputs, outputs = {}, {}

    def layer(path, tree, x, o):
        inputs[path] = x
        y = jnp.einsum("...i,io->...o", x, tree["kernel"].reshape(x.shape[-1], o))
        outputs[path] = y + tree["bias"].reshape((1,) * (x.ndim - 1) + (o,)) + extra.get(path, 0)
        return outputs[path]

    def norm(tree, x):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        one = (1,) * (x.ndim - 1) + (-1,)
        return scaled * tree["scale"].reshape(one) + tree["bias"].reshape(one)

    x = layer("embed/kernel", p["embed"], x, D) + p["position"]
    for n in range(BLOCKS):
        block, name = p[f"block_{n}"], f"block_{n}"
        own, z = f"{name}/{ATTENTION}", norm(block["LayerNorm_0"], x)
        q, k, v = (
            layer(f"{own}/{part}/kernel", block[ATTENTION][part], z, D)
            .reshape(*z.shape[:2], HEADS, D // HEADS)
            for part in ("query", "key", "value")
        )
        scores = jnp.einsum("bqhc,bkhc->bhqk", q, k) / np.sqrt(D // HEADS)
        mixed = jnp.einsum("bhqk,bkhc->bqhc", jax.nn.softmax(scores), v).reshape(z.shape)
        x = x + layer(f"{own}/out/kernel", block[ATTENTION]["out"], mixed, D)
        z = layer(f"{name}/up/kernel", block["up"], norm(block["LayerNorm_1"], x), 2 * D)
        z = 0.5 * z * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
        x = x + layer(f"{name}/down/kernel", block["down"], z, D)
    logits = layer("head/kernel", p["head"], norm(p["LayerNorm_0"], x).mean(axis=1), CLASSES)
    return logits, inputs, outputs


def draw(rows, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, IN)) * np.exp(rng.normal(size=IN))
    return {"x": x.astype(np.float32), "y": rng.normal(size=(rows, OUT)).astype(np.float32)}


@pytest.fixture(scope="module")
def params():
    made = jax.eval_shape(Mlp().init, jax.random.key(0), jnp.ones((1, IN)))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) * 0.4, s.dtype), made)


@pytest.fixture(scope="module")
def by_hand(params, two_layers64):
    """`by_hand(batch)` -> inputs and output gradients of both layers of the MLP, by path."""

    def run(batch):
        layers = [params[name][part] for name in PATHS.values() for part in ("kernel", "bias")]
        return dict(zip(PATHS, two_layers64(batch["x"], *layers, batch["y"]), strict=True))

    return run


PATHS = {"first/kernel": "first", "second/kernel": "second"}


def loss(params, batch):
    return jnp.sum((Mlp().apply({"params": params}, batch["x"]) - batch["y"]) ** 2)


def test_the_statistics_of_an_mlp_are_those_by_hand(params, by_hand, same_stats):
    ragged = [draw(7), draw(4, seed=1)]  # batches of two sizes weigh by their positions
    whole = {n: np.concatenate([batch[n] for batch in ragged]) for n in ("x", "y")}
    same_stats(calibrate_flax(loss, params, ragged, ALL), by_hand(whole))


def test_a_mask_in_the_shape_of_a_layers_positions_is_used(params, by_hand, same_stats):
    batch = draw(6)
    mask = np.array([True, False, True, True, False, True])
    stats = calibrate_flax(loss, params, [batch | {"mask": mask}], ALL)
    same_stats(stats, by_hand(batch), mask)
    other = batch | {"mask": mask.reshape(2, 3)}  # of another shape: every position counts
    same_stats(calibrate_flax(loss, params, [other], ALL), by_hand(batch))


def test_rules_choose_what_is_measured(params, by_hand, same_stats):
    stats = calibrate_flax(loss, params, [draw(5)], [("first/kernel", None), *ALL])
    same_stats(stats, {"second/kernel": by_hand(draw(5))["second/kernel"]})


@pytest.mark.parametrize("rows", ["vmap", "jit", "map"])
def test_it_does_not_matter_how_the_loss_goes_over_its_rows(rows, params, by_hand, same_stats):
    def one(params, pair):
        return loss(params, dict(zip("xy", pair, strict=True)))

    def by_row(params, batch):
        row, pairs = partial(one, params), (batch["x"], batch["y"])
        return jnp.sum(jax.vmap(row)(pairs) if rows == "vmap" else jax.lax.map(row, pairs))

    mine = jax.jit(loss) if rows == "jit" else by_row
    for _ in range(2):  # the second time, a jitted loss is in the cache
        same_stats(calibrate_flax(mine, params, [draw(5)], ALL), by_hand(draw(5)))


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(IN, use_bias=False, name="shared")
        return layer(jnp.tanh(layer(x)))


def test_a_layer_that_is_called_twice_has_the_statistics_of_both_calls(two_layers64, same_stats):
    w = np.random.default_rng(1).normal(size=(IN, IN)).astype(np.float32) * 0.4
    x = draw(5)["x"]
    summed = lambda p, x: jnp.sum(Twice().apply({"params": p}, x) ** 2)  # noqa: E731
    stats = calibrate_flax(summed, {"shared": {"kernel": jnp.asarray(w)}}, [x], ALL)
    calls = two_layers64(x, w, 0, w, 0, 0)
    same_stats(stats, {"shared/kernel": [np.concatenate(a) for a in zip(*calls, strict=True)]})


class Wide(nn.Module):
    """Contracts two axes that are not the last ones: `[b, 3, 4, c] -> [b, c, 2, 5]`."""

    @nn.compact
    def __call__(self, x):
        return nn.DenseGeneral((2, 5), axis=(2, 1), name="wide")(x)


def test_positions_are_the_axes_that_are_not_contracted(same_stats):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 3, 4, 6)).astype(np.float32)
    params = {"wide": {"kernel": jnp.asarray(rng.normal(size=(3, 4, 2, 5)), jnp.float32),
                       "bias": jnp.zeros((2, 5))}}
    summed = lambda p, x: jnp.sum(Wide().apply({"params": p}, x) ** 2)  # noqa: E731
    x64, w = np.asarray(x, np.float64), np.asarray(params["wide"]["kernel"], np.float64)
    dy = 2 * np.einsum("bijc,ijuv->bcuv", x64, w)
    rows = (np.einsum("bijc->bcij", x64).reshape(-1, 12), dy.reshape(-1, 10))
    same_stats(calibrate_flax(summed, params, [x], ALL), {"wide/kernel": rows})


@pytest.fixture(scope="module")
def vit():
    """`(params, batch, by hand)`; all params are random, biases and norms too."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, TOKENS, PATCH)).astype(np.float32)
    shapes = jax.eval_shape(Vit().init, jax.random.key(0), x)["params"]
    some = lambda s: jnp.asarray(rng.normal(size=s.shape) * 0.5, jnp.float32)  # noqa: E731
    params = jax.tree.map(some, shapes)
    labels = rng.integers(0, CLASSES, 3)
    return params, {"x": x, "labels": labels}, vit_by_hand(params, x, labels)


def vit_loss(scanned, params, batch):
    logits = Vit(scanned).apply({"params": params}, batch["x"])
    return cross_entropy(logits, batch["labels"])


@pytest.mark.more  # the next one has the same layers
def test_the_statistics_of_a_vision_transformer_are_those_by_hand(vit, same_stats):
    params, batch, by_hand = vit
    same_stats(calibrate_flax(partial(vit_loss, False), params, [batch], ALL), by_hand)


def test_each_layer_of_a_scanned_and_rematerialised_model_has_its_own(vit, same_stats):
    params, batch, by_hand = vit
    stats = calibrate_flax(partial(vit_loss, True), stacked(params), [batch], ALL)
    assert set(stats) == set(match_rules(stacked(params), ALL))
    for path, want in by_hand.items():
        block, _, rest = path.partition("/")
        if block.startswith("block_"):
            one = jax.tree.map(lambda s, n=int(block[-1]): s[n], stats[f"blocks/{rest}"])
            same_stats({path: one}, {path: want})
        else:
            same_stats({path: stats[path]}, {path: want})
