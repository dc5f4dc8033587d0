"""The decoder against a float64 NumPy loop, and its masks, remat and weight nodes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax.errors import BadInput
from rabit_jax.models.config import RopeScaling
from rabit_jax.models.decoder import Decoder, init_params
from rabit_jax.tree import pytree_dataclass
from rabit_jax.weights import product

INIT = jax.jit(init_params, static_argnums=0)


def _norm(x, scale, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def _reference(c, params, tokens):
    """Logits `[t, v]` and hidden states `[l, t, d]` of one sequence, in float64 loops."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x = p["embed"]["embedding"][tokens]
    half, group, hidden = c.head_dim // 2, c.n_heads // c.n_kv_heads, []

    def dense(w, layer, x):
        return x @ w["kernel"][layer] + (w["bias"][layer] if "bias" in w else 0.0)

    def turn(v, t):
        out = np.empty_like(v)
        for j in range(half):
            a = t * c.rope_theta ** (-2 * j / c.head_dim)
            out[j] = v[j] * np.cos(a) - v[j + half] * np.sin(a)
            out[j + half] = v[j + half] * np.cos(a) + v[j] * np.sin(a)
        return out

    for layer in range(c.n_layers):
        part = p["layers"]
        y = _norm(x, part["attn_norm"]["scale"][layer], c.norm_eps)
        q, k, v = (dense(part["attn"][n], layer, y).reshape(len(tokens), -1, c.head_dim)
                   for n in "qkv")
        out = np.zeros((len(tokens), c.n_heads, c.head_dim))
        for t in range(len(tokens)):
            for n in range(c.n_heads):
                s = np.array([turn(q[t, n], t) @ turn(k[i, n // group], i) for i in range(t + 1)])
                w = np.exp(s / np.sqrt(c.head_dim))
                out[t, n] = (w / w.sum()) @ v[: t + 1, n // group]
        x = x + dense(part["attn"]["o"], layer, out.reshape(len(tokens), -1))
        y = _norm(x, part["mlp_norm"]["scale"][layer], c.norm_eps)
        gate = dense(part["mlp"]["gate"], layer, y)
        up = dense(part["mlp"]["up"], layer, y)
        x = x + dense(part["mlp"]["down"], layer, gate / (1 + np.exp(-gate)) * up)
        hidden.append(x)
    y = _norm(x, p["final_norm"]["scale"], c.norm_eps)
    return y @ (p["embed"]["embedding"].T if c.tied_head else p["head"]["kernel"]), hidden


def _random(c):
    """Params of `c` in which norms are not one and biases not zero, so that both are seen."""
    rng = np.random.default_rng(3)
    tree = jax.eval_shape(lambda: init_params(c, jax.random.key(0)))
    return jax.tree.map(lambda a: 0.3 * rng.normal(size=a.shape).astype(np.float32), tree)


@pytest.mark.parametrize("change", [
    {}, {"tied_head": True, "attention_bias": True, "o_bias": True, "mlp_bias": True,
         "remat": True},
])
def test_logits_and_hidden_match_a_float64_loop(config, tokens, apply, change):
    c = dataclasses.replace(config, **change)
    params = _random(c)
    logits, hidden = apply(Decoder(c), params, tokens, None, True)
    wanted, stream = _reference(c, params, np.asarray(tokens[0]))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits[0], wanted, atol=1e-4)
    np.testing.assert_allclose(hidden[:, 0], stream, atol=1e-4)


def test_params_tree_and_initial_scale(config, params):
    from rabit_jax.models.decoder import param_shapes

    c = config
    shapes = param_shapes(c)
    assert shapes["layers/attn/q/kernel"] == (c.n_layers, c.d_model, c.n_heads * c.head_dim)
    assert shapes["layers/attn/k/kernel"] == (c.n_layers, c.d_model, c.n_kv_heads * c.head_dim)
    assert shapes["layers/mlp/down/kernel"] == (c.n_layers, c.d_hidden, c.d_model)
    assert shapes["head/kernel"] == (c.d_model, c.vocab_size)
    assert len(shapes) == 12
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    wide = INIT(dataclasses.replace(c, d_model=256, d_hidden=256), jax.random.key(0))
    mlp = wide["layers"]["mlp"]
    np.testing.assert_allclose(jnp.std(mlp["up"]["kernel"]), c.initializer_range, rtol=0.02)
    np.testing.assert_allclose(
        jnp.std(mlp["down"]["kernel"]), c.initializer_range / np.sqrt(2 * c.n_layers), rtol=0.02)
    # Each layer has its own draw.
    assert not np.array_equal(mlp["up"]["kernel"][0], mlp["up"]["kernel"][1])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, params, tokens, apply, side):
    plain = apply(model, params, tokens)
    junk = jnp.full((2, 4), 5, tokens.dtype)
    order = (junk, tokens) if side == "left" else (tokens, junk)
    real = jnp.concatenate([jnp.full(a.shape, a is tokens) for a in order], axis=1)
    padded = apply(model, params, jnp.concatenate(order, axis=1), real)
    start = 4 if side == "left" else 0
    np.testing.assert_allclose(padded[:, start : start + 9], plain, atol=2e-5)


def test_positions_count_real_tokens_only(model, params, tokens, apply):
    """A gap in the text; rotary angles see only differences, so padding at an end cannot tell."""
    plain = apply(model, params, tokens)
    gap = jnp.concatenate([tokens[:, :5], jnp.full((2, 4), 5, tokens.dtype), tokens[:, 5:]], axis=1)
    real = jnp.ones(gap.shape, bool).at[:, 5:9].set(False)
    found = apply(model, params, gap, real)
    np.testing.assert_allclose(found[:, :5], plain[:, :5], atol=2e-5)
    np.testing.assert_allclose(found[:, 9:], plain[:, 5:], atol=2e-5)


def test_all_masked_row_stays_finite_with_its_gradient(model, params, tokens):
    mask = jnp.ones(tokens.shape, bool).at[0].set(False)

    def loss(p):
        return jnp.sum(jnp.square(model.apply({"params": p}, tokens, mask)))

    value, grad = jax.jit(jax.value_and_grad(loss))(params)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grad))


def test_features_and_head_make_the_logits(model, params, tokens, apply):
    read = jax.jit(lambda p, t: model.apply({"params": p}, t, method="features"))
    features, hidden = read(params, tokens)
    assert hidden is None and features.shape == (*tokens.shape, model.config.d_model)
    logits = model.apply({"params": params}, features[1, 3], method="head")
    np.testing.assert_allclose(logits, apply(model, params, tokens)[1, 3], atol=1e-5)


def test_remat_saves_memory_and_changes_no_gradient(config, params, tokens):
    def compiled(remat):
        model = Decoder(dataclasses.replace(config, remat=remat))

        def loss(p):
            return model.apply({"params": p}, tokens).var()

        return jax.jit(jax.grad(loss)).lower(params).compile()

    plain, remat = compiled(False), compiled(True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
                 plain(params), remat(params))
    room = [f.memory_analysis().temp_size_in_bytes for f in (plain, remat)]
    assert room[1] < 0.6 * room[0]


@pytest.mark.parametrize("tiles", [False, True])
def test_what_is_kept_of_products_is_not_made_again(config, params, tokens, tiles, monkeypatch):
    monkeypatch.setattr(product, "amx", lambda: tiles)

    def products(**fields):
        model = Decoder(dataclasses.replace(config, dtype="bfloat16", **fields))
        grad = jax.jit(jax.grad(lambda p: model.apply({"params": p}, tokens).var()))
        return grad.lower(params).as_text().count("stablehlo.dot_general")

    plain, remat = products(), products(remat=True)
    kept = products(remat=True, remat_keep="products")
    # Scores and the weighting of values are made again, the seven matrices are not.
    assert plain < kept < remat and remat - kept >= 6


def test_bfloat16_compute_keeps_float32_logits_and_norms(config, params, tokens, apply):
    c = dataclasses.replace(config, dtype="bfloat16")
    logits, hidden = apply(Decoder(c), params, tokens, None, True)
    exact = apply(Decoder(config), params, tokens)
    assert logits.dtype == jnp.float32 and hidden.dtype == jnp.bfloat16
    error = float(jnp.linalg.norm(logits - exact) / jnp.linalg.norm(exact))
    assert 1e-5 < error < 0.03
    # Not merely bfloat16 logits cast up.
    assert not np.array_equal(logits, logits.astype(jnp.bfloat16).astype(jnp.float32))


def test_llama3_scaling_stretches_only_long_wavelengths(config, params, tokens):
    from rabit_jax.models.rotary import frequencies

    c = dataclasses.replace(config, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 64))
    w, stretched = np.asarray(frequencies(config)), np.asarray(frequencies(c))
    turns = 64 * w / (2 * np.pi)
    np.testing.assert_allclose(stretched[turns >= 4], w[turns >= 4], rtol=1e-6)
    np.testing.assert_allclose(stretched[turns <= 1], w[turns <= 1] / 8, rtol=1e-6)
    linear = dataclasses.replace(config, rope_scaling=RopeScaling("linear", 4.0))
    np.testing.assert_allclose(frequencies(linear), w / 4, rtol=1e-6)


@pytree_dataclass
class Scaled:
    """A weight node: `diag(h) B`, with a leaf of another rank than the matrix."""

    h: jax.Array
    b: jax.Array

    @property
    def shape(self):
        return self.b.shape

    def matmul(self, x):
        return (x * self.h.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))) @ self.b.astype(
            x.dtype)

    def dense(self):
        return self.h[..., None] * self.b


def _wrap(params, node):
    """The params with every kernel of the blocks replaced by `node(kernel)`."""
    layers = {
        part: {n: {**w, "kernel": node(w["kernel"])} for n, w in params["layers"][part].items()}
        for part in ("attn", "mlp")
    }
    return {**params, "layers": {**params["layers"], **layers}}


@pytest.mark.parametrize("remat", [False, True])
def test_weight_nodes_pass_through_scan_remat_jit_and_grad(config, params, tokens, remat):
    model = Decoder(dataclasses.replace(config, remat=remat))

    def node(w):
        h = np.resize(np.linspace(0.5, 1.5, 7, dtype=np.float32), w.shape[:-1])
        return Scaled(h, np.asarray(w) / h[..., None])

    def loss(p):
        return jnp.mean(jnp.square(model.apply({"params": p}, tokens)))

    nodes = _wrap(params, node)
    value, grad = jax.jit(jax.value_and_grad(loss))(nodes)
    wanted, dense_grad = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    found, kernel = (g["layers"]["mlp"]["up"]["kernel"] for g in (grad, dense_grad))
    up = nodes["layers"]["mlp"]["up"]["kernel"]
    np.testing.assert_allclose(found.b, kernel * up.h[..., None], atol=1e-5)
    np.testing.assert_allclose(found.h, (kernel * up.b).sum(-1), atol=1e-5)


def test_integer_nodes_pass_for_inference(model, params, tokens, apply):
    """Packed nodes hold leaves that are no floats and of no kernel's shape."""
    def node(w):
        bits = np.where(np.asarray(w) < 0, -1, 1).astype(np.int8)
        return Scaled(np.full(w.shape[:-1], 0.05, np.float32), bits)

    packed = _wrap(params, node)
    dense = _wrap(params, lambda w: node(w).dense())
    np.testing.assert_allclose(apply(model, packed, tokens),
                               apply(model, dense, tokens), atol=1e-5)


def test_a_node_serves_as_head(model, params, tokens, apply):
    w = params["head"]["kernel"]
    swapped = {**params, "head": {"kernel": Scaled(jnp.ones(w.shape[0]), w)}}
    np.testing.assert_allclose(apply(model, swapped, tokens),
                               apply(model, params, tokens), atol=1e-5)


def test_missing_kernel_is_named(model, params, tokens, apply):
    broken = {**params, "head": {}}
    with pytest.raises(BadInput, match="params hold no head/kernel"):
        apply(model, broken, tokens)
