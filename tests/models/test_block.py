"""One definition of a layer: whole sequences and the decode engine agree, in every family."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax.errors import BadInput
from rabit_jax.models import block as block_module
from rabit_jax.models.block import Slots, attention, rotary_attention
from rabit_jax.models.config import RopeScaling
from rabit_jax.models.decoder import Decoder, init_params, param_shapes
from rabit_jax.models.engine import init_cache, step
from rabit_jax.models.prepared import prepare
from rabit_jax.models.rotary import make_context, seen_from
from rabit_jax.tree import leaves

GEMMA = {"window": 3, "query_scalar": 10.0, "post_norms": True, "norm_plus_one": True,
         "embed_scale": 32**0.5, "activation": "gelu_tanh", "tied_head": True}
# Windows are shorter than the text.
FAMILIES = {
    "llama": {},
    "llama3": {"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 16), "n_kv_heads": 4},
    "mistral": {"window": 3, "local_layers": (True,) * 3},
    "qwen2": {"attention_bias": True, "window": 3, "local_layers": (False, False, True)},
    "qwen3": {"qk_norm": True, "attention_bias": True, "o_bias": True, "mlp_bias": True},
    "gemma2": {**GEMMA, "local_layers": (True, False, True), "attention_softcap": 2.0,
               "final_softcap": 3.0},
    "gemma3": {**GEMMA, "local_layers": (True, True, False), "qk_norm": True,
               "rope_scaling": RopeScaling("linear", 4.0), "local_rope_theta": 50.0},
}


def random_params(config):
    """Params whose norms are not one and whose biases are not zero, so that both matter."""
    rng = np.random.default_rng(5)
    tree = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return jax.tree.map(lambda a: jnp.asarray(0.3 * rng.normal(size=a.shape), jnp.float32), tree)


def decoded(config, params, tokens, mask, prompt):
    """Logits of the engine after the prompt, and after all further tokens at once: `[2, b, v]`."""
    engine = prepare(config, params)
    run = jax.jit(lambda *arguments: step(*arguments))
    cache = init_cache(engine.config, *tokens.shape)
    first, cache = run(engine, tokens[:, :prompt], cache, mask[:, :prompt])
    return jnp.stack([first, run(engine, tokens[:, prompt:], cache, mask[:, prompt:])[0]])


def whole(config, params, tokens, mask, prompt):
    """The same logits from one pass over the whole sequence."""
    run = jax.jit(lambda *arguments: Decoder(config).apply(*arguments))
    logits = run({"params": params}, tokens, mask)
    return jnp.stack([logits[:, prompt - 1], logits[:, -1]])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shapes_of_params_are_those_of_fresh_ones(family, config):
    c = dataclasses.replace(config, **FAMILIES[family])
    fresh = jax.eval_shape(lambda: init_params(c, jax.random.key(0)))
    assert list(param_shapes(c).items()) == [(path, a.shape) for path, a in leaves(fresh)]


@pytest.fixture
def batch(tokens):
    """Tokens, a mask with padding on the left of one row, and how many of them are the prompt."""
    return tokens, jnp.ones(tokens.shape, bool).at[1, :2].set(False), 6


@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_gives_the_logits_of_the_whole_sequence(family, config, batch):
    c = dataclasses.replace(config, **FAMILIES[family])
    params = random_params(c)
    wanted = whole(c, params, *batch)
    assert float(wanted.std()) > 0.1
    np.testing.assert_allclose(decoded(c, params, *batch), wanted, atol=2e-5)


@pytest.mark.parametrize("name", ["attention", "mlp"])
def test_a_change_of_the_definition_changes_both_forwards(name, config, batch, monkeypatch):
    params = random_params(config)
    before = whole(config, params, *batch)
    original = getattr(block_module, name)
    monkeypatch.setattr(block_module, name, lambda *a, **k: 0.5 * original(*a, **k))
    after = whole(config, params, *batch)
    assert float(jnp.abs(after - before).max()) > 0.05
    np.testing.assert_allclose(decoded(config, params, *batch), after, atol=2e-5)


@pytest.mark.parametrize("cap", [None, 1.5])
def test_attention_matches_float64_loops(config, cap):
    b, t, s, n, h = 2, 3, 5, config.n_heads, config.head_dim
    c = dataclasses.replace(config, attention_softcap=cap, query_scalar=7.0)
    rng = np.random.default_rng(0)
    q = rng.normal(size=(b, t, n, h))
    k, v = rng.normal(size=(2, b, c.n_kv_heads, s, h))
    allowed = rng.random((b, 1, t, s)) < 0.6
    allowed[..., 0] = True
    wanted = np.zeros_like(q)
    for row, place, head in np.ndindex(b, t, n):
        key = head // (n // c.n_kv_heads)
        scores = k[row, key] @ q[row, place, head] / np.sqrt(7.0)
        scores = scores if cap is None else cap * np.tanh(scores / cap)
        p = np.exp(scores) * allowed[row, 0, place]
        wanted[row, place, head] = p / p.sum() @ v[row, key]
    found = attention(*(jnp.asarray(a, jnp.float32) for a in (q, k, v)), jnp.asarray(allowed), c)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_the_cache_holds_keys_and_values_of_its_layer_and_slots_alone(config):
    """New tokens at slots 2 and 3 of the second layer, as if two others were read before them."""
    c, rng = config, np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 4, n, c.head_dim)), jnp.float32)
               for n in (c.n_heads, c.n_kv_heads, c.n_kv_heads))
    real = jnp.ones((2, 4), bool)
    wanted, none = rotary_attention(q, k, v, make_context(c, real).full, c)
    assert none is None
    cache = jnp.full((3, 2, c.n_kv_heads, 5, c.head_dim), 9.0)
    slots, place = Slots(cache, cache, 1, jnp.int32(0)), jnp.arange(4)
    valid = jnp.arange(5)[None] < 4

    @jax.jit
    def run(slots, place, *heads):
        view = seen_from(c, place[None], place, jnp.arange(5), valid).full
        own = slots._replace(layer=1, start=place[0], ring=False)  # not traced
        return rotary_attention(*heads, view, c, own)

    for part in (slice(0, 2), slice(2, 4)):
        y, slots = run(slots, place[part], q[:, part], k[:, part], v[:, part])
        np.testing.assert_allclose(y, wanted[:, part], atol=1e-5)
    np.testing.assert_array_equal(slots.v[1, :, :, :4], jnp.swapaxes(v, 1, 2))
    assert (slots.k[jnp.array([0, 2])] == 9).all() and (slots.v[:, :, :, 4] == 9).all()


def test_params_of_another_shape_are_named(config, params, tokens):
    wrong = {**params, "final_norm": {"scale": jnp.ones(1)}}
    with pytest.raises(BadInput, match=r"final_norm/scale is \(1,\), the model needs \(32,\)"):
        Decoder(config).apply({"params": wrong}, tokens)
