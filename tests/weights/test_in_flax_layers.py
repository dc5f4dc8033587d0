"""Weight nodes in the layers of Flax itself: Linen and NNX multiply by the node's own matrix."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rabit_jax import (
    BadInput,
    GroupUniformSpec,
    LowRankSignSpec,
    ResidualSignSpec,
    convert,
    dense,
    pack,
)

SIGNS = ResidualSignSpec(rounds=1)
TABLE = GroupUniformSpec(bits=8, group=0)
TOKENS = np.arange(10).reshape(2, 5)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(32)(x)), None


class Linen(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 32)(tokens)
        stacked = nn.scan(nn.remat(Layer), variable_axes={"params": 0},
                          split_rngs={"params": True}, length=2)
        x, _ = stacked(name="layers")(x, None)
        return nn.DenseGeneral((4, 8))(x)


class Nnx(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(11, 32, rngs=rngs)
        self.first = nnx.Linear(32, 32, rngs=rngs)
        self.last = nnx.Linear(32, 32, rngs=rngs)

    def __call__(self, tokens):
        return self.last(nnx.tanh(self.first(self.embed(tokens))))


def linen():
    """A converted Linen model: its params and `apply(params)`."""
    params = Linen().init(jax.random.key(0), TOKENS)["params"]
    rules = [("Embed_0/embedding", TABLE), ("layers/.*/kernel", SIGNS)]
    return convert(params, rules), lambda params: Linen().apply({"params": params}, TOKENS)


def in_nnx():
    """The same of an NNX model."""
    graph, state, rest = nnx.split(Nnx(), nnx.Param, ...)
    rules = [("embed/embedding", TABLE), ("first/kernel", SIGNS),
             ("last/kernel", LowRankSignSpec(bits=1.0))]
    student = convert(nnx.to_pure_dict(state), rules)
    return student, lambda params: nnx.merge(graph, params, rest)(TOKENS)


@pytest.mark.parametrize("make", [linen, in_nnx])
@pytest.mark.parametrize("form", [lambda student: student, pack], ids=["trained", "packed"])
def test_outputs_are_those_of_dense_params(make, form):
    student, apply = make()
    tree = form(student)
    np.testing.assert_array_equal(apply(tree), apply(dense(tree)))


@pytest.mark.parametrize("make", [linen, in_nnx])
def test_gradients_are_those_of_dense_params(make):
    student, apply = make()
    got = jax.jit(jax.grad(lambda tree: jnp.sum(apply(tree) ** 2)))(student)
    want = jax.jit(jax.grad(lambda tree: jnp.sum(apply(dense(tree)) ** 2)))(student)
    assert jax.tree.structure(got) == jax.tree.structure(student)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(got))


def test_one_packed_layer_against_numpy():
    layer, x = nn.Dense(48), np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    params = layer.init(jax.random.key(0), x)["params"]
    packed = pack(convert(params, [("kernel", SIGNS)]))
    node = packed["kernel"]
    want = sum(x.astype(np.float64) @ np.asarray(path, np.float64) for path in node.paths())
    got = layer.apply({"params": packed}, x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    module = nnx.Linear(64, 48, rngs=nnx.Rngs(0))
    nnx.update(module, packed)
    np.testing.assert_allclose(module(x), want, rtol=1e-4, atol=1e-4)


def test_layers_of_another_size_are_still_refused():
    packed = pack(convert({"kernel": jnp.ones((64, 48))}, [("kernel", SIGNS)]))
    with pytest.raises(Exception, match=r"expected to generate shape \(64, 32\).*\(64, 48\)"):
        nn.Dense(32, use_bias=False).apply({"params": packed}, jnp.ones((2, 64)))


def test_layers_stacked_along_another_axis():
    stacked = nn.scan(Layer, variable_axes={"params": 1}, split_rngs={"params": True}, length=2)
    model, x = stacked(), jnp.ones((3, 32))
    params = model.init(jax.random.key(0), x, None)["params"]
    params["Dense_0"]["kernel"] = SIGNS.init(params["Dense_0"]["kernel"])
    with pytest.raises(BadInput, match="stacked along axis 1, wanted the first"):
        model.apply({"params": params}, x, None)


def test_indices():
    node = SIGNS.init(jnp.ones((8, 4)))
    np.testing.assert_array_equal(node[...], node.dense())
    for use in (lambda: node[0], lambda: list(node), lambda: node[:, 1]):
        with pytest.raises(BadInput, match="a ResidualSign is no array and has no parts to index"):
            use()
    with pytest.raises(BadInput, match="takes no other matrix"):
        node.replace_boxed(jnp.ones((8, 4)))
