"""Statistics of NNX modules, by hand and against Linen; what calibration refuses, of both kinds."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rabit_jax import BadInput, calibrate_flax

ALL = [(".*kernel", "measure")]
N, D, HEADS = 6, 8, 2


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(N, 10, rngs=rngs)
        self.second = nnx.Linear(10, 3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs, deterministic=True)
        self.norm = nnx.BatchNorm(N, rngs=rngs)

    def __call__(self, x):
        self.norm(x)  # changes its running mean, and nothing else
        return self.second(self.dropout(jnp.tanh(self.first(x))))


class Stack(nnx.Module):
    """Two linears of the same size, stacked and scanned over."""

    def __init__(self, rngs):
        make = nnx.vmap(lambda key: nnx.Linear(N, N, use_bias=False, rngs=nnx.Rngs(key)))
        self.layers = make(jax.random.split(rngs.params(), 2))

    def __call__(self, x):
        def step(carry, layer):
            x, n = carry
            y = layer(x)
            return (jnp.where(n == 0, jnp.tanh(y), y), n + 1), None

        scan = nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        return scan((x, 0), self.layers)[0][0]


class Tied(nnx.Module):
    """Two linears that share one kernel."""

    def __init__(self, rngs):
        self.a, self.b = (nnx.Linear(N, N, use_bias=False, rngs=rngs) for _ in range(2))
        self.b.kernel = self.a.kernel

    def __call__(self, x):
        return self.b(jnp.tanh(self.a(x)))


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(HEADS, D, D, rngs=rngs, decode=False)

    def __call__(self, x):
        return self.attention(x)


def draw(rows, out, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, N)) * np.exp(rng.normal(size=N))
    return {"x": x.astype(np.float32), "y": rng.normal(size=(rows, out)).astype(np.float32)}


def loss(module, batch):
    return jnp.sum((module(batch["x"]) - batch["y"]) ** 2)


def both(batches):
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def test_the_statistics_of_an_mlp_are_those_by_hand(two_layers64, same_stats):
    module, batches = Mlp(nnx.Rngs(0)), [draw(7, 3), draw(4, 3, seed=1)]
    stats = calibrate_flax(loss, module, batches, ALL)
    arrays = [getattr(layer, name)[...] for layer in (module.first, module.second)
              for name in ("kernel", "bias")]
    found = two_layers64(both(batches)["x"], *arrays, both(batches)["y"])
    same_stats(stats, dict(zip(("first/kernel", "second/kernel"), found, strict=True)))


def test_a_mask_is_used(two_layers64, same_stats):
    module, batch = Mlp(nnx.Rngs(0)), draw(5, 3)
    mask = np.array([True, False, True, True, False])
    stats = calibrate_flax(loss, module, [batch | {"mask": mask}], [("first/kernel", "measure")])
    arrays = [getattr(layer, name)[...] for layer in (module.first, module.second)
              for name in ("kernel", "bias")]
    first = two_layers64(batch["x"], *arrays, batch["y"])[0]
    same_stats(stats, {"first/kernel": first}, mask)


def test_the_module_stays_as_it_was():
    module = Mlp(nnx.Rngs(0))
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngState))))
    structure, layer, kernel = nnx.graphdef(module), module.first, module.first.kernel
    calibrate_flax(loss, module, [draw(4, 3)], ALL)
    assert nnx.graphdef(module) == structure
    assert module.first is layer and type(layer) is nnx.Linear and layer.kernel is kernel
    after = nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngState)))
    jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.more
def test_each_layer_of_a_scanned_module_has_its_own(two_layers64, same_stats):
    module, batch = Stack(nnx.Rngs(3)), draw(5, N)
    stats = calibrate_flax(loss, module, [batch], ALL)["layers/kernel"]
    w, v = module.layers.kernel[...]
    for n, pair in enumerate(two_layers64(batch["x"], w, 0, v, 0, batch["y"])):
        same_stats({"l": jax.tree.map(lambda s, n=n: s[n], stats)}, {"l": pair})


def test_a_kernel_that_two_layers_share_has_the_statistics_of_both(two_layers64, same_stats):
    module, batch = Tied(nnx.Rngs(0)), draw(5, N)
    w = module.a.kernel[...]
    calls = two_layers64(batch["x"], w, 0, w, 0, batch["y"])
    stats = calibrate_flax(loss, module, [batch], ALL)
    same_stats(stats, {"a/kernel": [np.concatenate(a) for a in zip(*calls, strict=True)]})


@pytest.mark.more
def test_nnx_attention_and_linen_attention_measure_the_same():
    module = Attention(nnx.Rngs(0))
    tree = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    x = np.random.default_rng(0).normal(size=(2, 4, D)).astype(np.float32)
    linen = nn.MultiHeadDotProductAttention(num_heads=HEADS)

    def linen_loss(params, x):
        return jnp.sum(linen.apply({"params": params["attention"]}, x) ** 3)

    one = calibrate_flax(linen_loss, tree, [x], ALL)
    other = calibrate_flax(lambda module, x: jnp.sum(module(x) ** 3), module, [x], ALL)
    assert set(one) == set(other) and len(one) == 4
    for path, stats in one.items():
        assert (stats.s_in.shape, stats.s_out.shape) == ((D,), (D,))
        for a, b in zip(jax.tree.leaves(stats), jax.tree.leaves(other[path]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.max(b)))


class Odd(nn.Module):
    """One of each thing that a rule should not select."""

    @nn.compact
    def __call__(self, x, unused=False):
        x = x + self.param("position", nn.initializers.ones, (1, N))
        y = nn.DenseGeneral((2, 3), name="general")(x)
        grouped = nn.DenseGeneral(2, axis=-1, batch_dims=(0,), name="grouped")(x[None])
        seen = jax.lax.stop_gradient(nn.Dense(2, name="watched")(x))
        if unused:
            nn.Dense(2, name="unused")(x)
        conv = nn.Conv(2, (3,), name="conv")(x[..., None])
        table = nn.Embed(4, 2, name="table")(jnp.zeros(1, int))
        zero = nn.Dense(2, name="zero", use_bias=False)(0 * x)
        return sum(jnp.sum(a**2) for a in (y, grouped, seen, conv, table, zero))


REFUSED = {
    "position": "position belongs to a Odd, wanted the kernel of an nn.Dense",
    "conv/kernel": "conv/kernel belongs to a Conv,",
    "table/embedding": "table/embedding belongs to a Embed,",
    "general/bias": "general/bias belongs to a DenseGeneral,",
    "grouped/kernel": "grouped/kernel has batch axes",
    "unused/kernel": "never calls the layer of unused/kernel",
    "watched/kernel": "watched/kernel: the gradient of the loss does not reach this layer",
    "zero/kernel": "zero/kernel: the statistics of its inputs are all zero",
    "none/kernel": "matches no parameter",
}


@pytest.mark.parametrize("path", REFUSED)
def test_what_cannot_be_measured_is_named(path):
    x = draw(3, 1)["x"]
    init = lambda key: Odd().init(key, x, unused=True)["params"]  # noqa: E731
    params = jax.tree.map(lambda s: jnp.full(s.shape, 0.1),
                          jax.eval_shape(init, jax.random.key(0)))
    with pytest.raises(BadInput, match=REFUSED[path]):
        calibrate_flax(lambda p, x: Odd().apply({"params": p}, x), params, [x], [(path, "measure")])


def test_what_cannot_be_measured_in_nnx_is_named():
    with pytest.raises(BadInput, match="norm/scale is .*no float matrix"):
        calibrate_flax(loss, Mlp(nnx.Rngs(0)), [draw(3, 3)], [("norm/scale", "measure")])

    class Table(nnx.Module):
        def __init__(self):
            self.table = nnx.Embed(4, 2, rngs=nnx.Rngs(0))
            self.idle = nnx.Linear(2, 2, rngs=nnx.Rngs(0))

    summed = lambda module, x: jnp.sum(module.table(x))  # noqa: E731
    for rule, message in [("table/embedding", "table/embedding belongs to a Embed, wanted the ker"),
                          ("idle/kernel", "never calls the layer of idle/kernel")]:
        with pytest.raises(BadInput, match=message):
            calibrate_flax(summed, Table(), [jnp.zeros(3, int)], [(rule, "measure")])


def test_a_loss_that_is_no_scalar_and_no_batch_are_refused():
    module, batch = Mlp(nnx.Rngs(0)), draw(3, 3)
    with pytest.raises(BadInput, match=r"the loss is float32\[3, 3\], wanted one float"):
        calibrate_flax(lambda m, b: m(b["x"]), module, [batch], ALL)
    with pytest.raises(BadInput, match="the loss is tuple, wanted one float"):
        calibrate_flax(lambda m, b: (loss(m, b), 0), module, [batch], ALL)
    with pytest.raises(BadInput, match="no batch"):
        calibrate_flax(loss, module, [], ALL)
    with pytest.raises(BadInput, match="not finite"):
        calibrate_flax(loss, module, [batch | {"y": batch["y"] * np.inf}], ALL)


class Sideways(nn.Module):
    @nn.compact
    def __call__(self, x):
        def step(layer, x, _):
            return layer(x), None

        scan = nn.scan(step, variable_axes={"params": 1}, split_rngs={"params": True}, length=2)
        return scan(nn.Dense(N, name="layers"), x, None)[0]


def test_layers_stacked_along_another_axis_are_refused():
    x = draw(3, 1)["x"]
    shapes = jax.eval_shape(Sideways().init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda s: jnp.ones(s.shape), shapes)
    assert params["layers"]["kernel"].shape == (N, 2, N)
    with pytest.raises(BadInput, match="stack layers along the first axis"):
        calibrate_flax(
            lambda p, x: jnp.sum(Sideways().apply({"params": p}, x)), params, [x], ALL
        )
