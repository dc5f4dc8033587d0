"""The decode engine against whole forward passes: token by token, for each kind of weight."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from rabit_jax import (
    LLAMA_ENDS,
    LLAMA_LINEARS,
    GroupUniformSpec,
    ResidualSignSpec,
    convert,
    dense,
    pack,
)
from rabit_jax.errors import BadInput
from rabit_jax.models import engine as engine_module
from rabit_jax.models.decoder import Decoder
from rabit_jax.models.engine import init_cache, step
from rabit_jax.models.prepared import prepare
from rabit_jax.weights.laid import LaidCodes, LaidGroupedSign, LaidLowRank, LaidSign
from rabit_jax.weights.low_rank_sign import PackedLowRank
from rabit_jax.weights.residual_sign import ResidualSign
from rabit_jax.weights.table import Table

STEP = jax.jit(step, donate_argnums=2)


LAID = dict.fromkeys(["q k v", "o", "gate up", "down"], LaidSign)


@pytest.fixture(scope="module")
def trees(small, random_params, random_packed):
    """Params of each kind, and how `prepare` should hold them."""
    dense = unflatten_dict(random_params(small), sep="/")
    dense = jax.tree.map(lambda a: 0.3 * a, dense)
    return {
        "dense": (dense, dict.fromkeys(LAID, tuple)),
        "one path": (random_packed(small, 1), LAID),
        "two paths": (random_packed(small, 2), LAID),
        "mixed": mixed(small, random_packed),
    }


def mixed(c, random_packed):
    """One of each kind of weight, q and k alone of one kind; and the products they make."""
    tree, one = random_packed(c, 2, keep=("v",)), random_packed(c, 1)
    rng = np.random.default_rng(4)
    attn, mlp = dict(tree["layers"]["attn"]), dict(tree["layers"]["mlp"])
    attn["o"] = {**attn["o"], "kernel": low_rank(rng, *attn["o"]["kernel"].shape)}
    mlp["gate"] = one["layers"]["mlp"]["gate"]
    mlp["down"] = {"kernel": trained(rng, *mlp["down"]["kernel"].shape)}
    products = {"q k": LaidSign, "v": tuple, "o": LaidLowRank, "gate": LaidSign, "up": LaidSign,
                "down": tuple}
    return {**tree, "layers": {**tree["layers"], "attn": attn, "mlp": mlp}}, products


def low_rank(rng, l, i, o, r=24):
    """A random `PackedLowRank` of two copies."""
    u, v = (jnp.asarray(rng.integers(0, 256, (l, 2, r, 32 * -(-n // 256)), np.uint8))
            for n in (i, o))
    scales = (rng.uniform(0.2, 0.4, (l, 2, n)).astype(np.float16) for n in (i, r, o))
    return PackedLowRank(u, v, *map(jnp.asarray, scales))


def trained(rng, l, i, o):
    """A random weight in training form."""
    latent = rng.normal(size=(l, i, o)).astype(np.float32)
    g, h = (rng.uniform(0.2, 0.4, (l, 2, n)).astype(np.float32) for n in (o, i))
    return ResidualSign(*map(jnp.asarray, (latent, g, h)))


def token_by_token(engine, tokens, mask=None, prompt=5):
    """Logits after the prompt and after each further token: `[b, t - prompt + 1, v]`."""
    cache = init_cache(engine.config, tokens.shape[0], tokens.shape[1] + 3)
    first = None if mask is None else mask[:, :prompt]
    logits, cache = STEP(engine, tokens[:, :prompt], cache, first)
    out = [logits]
    for t in range(prompt, tokens.shape[1]):
        logits, cache = STEP(engine, tokens[:, t : t + 1], cache)
        out.append(logits)
    assert int(cache["length"]) == tokens.shape[1]
    return jnp.stack(out, axis=1)


@pytest.mark.parametrize("kind", [
    "dense", "one path", "two paths", pytest.param("mixed", marks=pytest.mark.more),
])
def test_steps_match_the_whole_sequence(small, trees, tokens, apply, kind):
    tree, products = trees[kind]
    engine = prepare(small, tree)
    assert {name: type(p) for name, p in engine.products.items()} == products
    whole = apply(Decoder(small), tree, tokens)[:, 4:]
    found = token_by_token(engine, tokens)
    assert found.dtype == jnp.float32
    # Packed products round activations to 16 bits on a CPU.
    atol = 1e-4 if kind == "dense" else 1e-3 * float(whole.std())
    np.testing.assert_allclose(found, whole, atol=atol)


def test_biases_and_a_tied_head(small, tokens, apply, random_params):
    c = dataclasses.replace(small, tied_head=True, mlp_bias=True)
    tree = jax.tree.map(lambda a: 0.3 * a, unflatten_dict(random_params(c), sep="/"))
    whole = apply(Decoder(c), tree, tokens)[:, 4:]
    np.testing.assert_allclose(token_by_token(prepare(c, tree), tokens), whole, atol=1e-4)


def test_a_packed_head(small, trees, random_packed):
    tree = trees["two paths"][0]
    gate = random_packed(dataclasses.replace(small, d_hidden=61))["layers"]["mlp"]["gate"]["kernel"]
    node = jax.tree.map(lambda a: a[0], gate)
    engine = prepare(small, {**tree, "head": {"kernel": node}})
    assert isinstance(engine.head, LaidSign)
    x = np.random.default_rng(0).normal(size=(2, 40)).astype(np.float32)
    wanted = x @ np.asarray(node.dense())
    found = jax.jit(engine_module.head_logits)(engine, x)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, atol=1e-3 * wanted.std())


TABLES = {
    "8-bit rows": (GroupUniformSpec(bits=8, group=0), LaidCodes, LaidCodes),
    "4 bits": (GroupUniformSpec(bits=4, group=16), LaidCodes, LaidCodes),
    "signs": (ResidualSignSpec(k=3, rounds=1), Table, LaidSign),
    "signs in groups": (ResidualSignSpec(k=2, rounds=1, group=32), LaidGroupedSign,
                        LaidGroupedSign),
}


@pytest.mark.parametrize(("kind", "tied"), [
    ("8-bit rows", True), ("8-bit rows", False), ("4 bits", True), ("signs", True),
    ("signs in groups", True),
    pytest.param("signs", False, marks=pytest.mark.more),
])
def test_a_packed_embedding(small, tokens, apply, random_params, kind, tied):
    """Looked up and multiplied as the dense table would be, in whole sequences and step by step."""
    spec, embed, head = TABLES[kind]
    c = dataclasses.replace(small, tied_head=tied)
    tree = jax.tree.map(lambda a: 0.3 * a, unflatten_dict(random_params(c), sep="/"))
    packed = pack(convert(tree, [(LLAMA_ENDS, spec)]))
    engine = prepare(c, packed)
    assert isinstance(engine.embed, embed if tied else Table) and isinstance(engine.head, head)
    whole = apply(Decoder(c), dense(packed), tokens)
    np.testing.assert_allclose(apply(Decoder(c), packed, tokens), whole, atol=1e-4)
    # Packed products round activations to 16 bits on a CPU.
    atol = 1e-3 * float(whole.std())
    np.testing.assert_allclose(token_by_token(engine, tokens), whole[:, 4:], atol=atol)


def test_codes_of_one_kind_are_joined(small, tokens, apply, random_params):
    tree = jax.tree.map(lambda a: 0.3 * a, unflatten_dict(random_params(small), sep="/"))
    rules = [(r"layers/mlp/up/kernel", GroupUniformSpec(bits=3, group=16)),
             (LLAMA_LINEARS, GroupUniformSpec(bits=8, group=0))]
    packed = pack(convert(tree, rules))
    engine = prepare(small, packed)
    kinds = dict.fromkeys(["q k v", "o", "gate", "up", "down"], LaidCodes)
    assert {name: type(p) for name, p in engine.products.items()} == kinds
    whole = apply(Decoder(small), packed, tokens)[:, 4:]
    np.testing.assert_allclose(token_by_token(engine, tokens), whole, atol=1e-4)


def test_precision_of_activations(small, trees):
    """The input of `down` gets three bytes, unless the weight asks for another."""
    tree = trees["two paths"][0]
    assert {n: p.limbs for n, p in prepare(small, tree).products.items()} == {
        "q k v": 2, "o": 2, "gate up": 2, "down": 3}
    layers = jax.tree.map(lambda w: w, tree["layers"])
    layers["mlp"]["down"]["kernel"] = layers["mlp"]["down"]["kernel"].replace(limbs=2)
    layers["attn"]["k"]["kernel"] = layers["attn"]["k"]["kernel"].replace(limbs=3)
    asked = prepare(small, {**tree, "layers": layers}).products
    assert (asked["down"].limbs, asked["q k v"].limbs, asked["o"].limbs) == (2, 3, 2)


@pytest.mark.parametrize("kind", ["dense", pytest.param("one path", marks=pytest.mark.more)])
def test_rows_know_nothing_of_neighbours_and_padding(small, trees, tokens, kind):
    engine = prepare(small, trees[kind][0])
    alone = token_by_token(engine, tokens[:1], prompt=8)
    padded = jnp.concatenate([jnp.full((1, 3), 7, tokens.dtype), tokens[:1]], axis=1)
    mask = jnp.ones((2, 12), bool).at[0, :3].set(False)

    def beside(junk, other):
        batch = jnp.concatenate([padded.at[0, :3].set(junk), other])
        return token_by_token(engine, batch, mask, prompt=11)

    found = beside(7, padded[:, ::-1])
    np.testing.assert_allclose(found[:1], alone, atol=1e-3 * float(alone.std()))
    np.testing.assert_array_equal(found[0], beside(11, jnp.full_like(padded, 9))[0])


@pytest.mark.parametrize("dtype, tied", [
    pytest.param("bfloat16", False, marks=pytest.mark.more), ("bfloat16", True),
    ("float16", False),
])
def test_16_bit_models(small, trees, tokens, apply, dtype, tied):
    """On a CPU bfloat16 weights lie turned, and all models compute in float32 between products."""
    c = dataclasses.replace(small, dtype=dtype, tied_head=tied)
    tree = {n: p for n, p in trees["dense"][0].items() if not (tied and n == "head")}
    tree = jax.tree.map(lambda a: a.astype(dtype), tree)
    engine = prepare(c, tree)
    assert engine.config.dtype == "float32"
    assert engine.embed.dtype == ("bfloat16" if dtype == "bfloat16" else "float32")
    exact = apply(Decoder(dataclasses.replace(c, dtype="float32")), tree, tokens[:1])[:, 7:]
    found = token_by_token(engine, tokens[:1], prompt=8)
    error = jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact)
    assert (1e-5 < error < 0.03) if dtype == "bfloat16" else error < 1e-5


def test_a_16_bit_table_is_not_widened_before_the_loop(small, trees):
    """The loop over tokens takes rows of the embedding; XLA would widen all of it beforehand."""
    c = dataclasses.replace(small, dtype="bfloat16")
    engine = prepare(c, jax.tree.map(
        lambda a: a.astype("bfloat16") if a.dtype == jnp.float32 else a, trees["two paths"][0]))

    def loop(engine, start):
        def one(_, carry):
            logits, cache = step(engine, *carry)
            return jnp.argmax(logits, axis=-1)[:, None].astype(jnp.int32), cache

        return jax.lax.fori_loop(0, 4, one, start)

    start = jnp.zeros((1, 1), jnp.int32), init_cache(engine.config, 1, 8)
    text = jax.jit(loop).lower(engine, start).compile().as_text()
    sizes = f"{c.vocab_size},{c.d_model}"
    assert f"bf16[{sizes}]" in text
    assert not re.search(rf"= f32\[{sizes}\]\S* (fusion|copy)", text)


def test_an_8_bit_head(small, trees, tokens):
    """One scale for each token: the error of a logit is below half a step of every weight."""
    tree = trees["dense"][0]
    x = np.random.default_rng(0).normal(size=(3, small.d_model)).astype(np.float32)
    rows = np.asarray(tree["head"]["kernel"]).T
    engine = prepare(small, tree, head_bits=8)
    step_size = np.abs(rows).max(axis=1) / 127
    found = jax.jit(engine_module.head_logits)(engine, x)
    bound = np.abs(x).sum(axis=1)[:, None] * (0.5 * step_size + 1e-3 * np.abs(rows).max(axis=1))
    assert (np.abs(found - x @ rows.T) <= bound).all()
    assert not np.allclose(found, x @ rows.T, atol=1e-6)
    tied = dataclasses.replace(small, tied_head=True)
    engine = prepare(tied, {n: p for n, p in tree.items() if n != "head"}, head_bits=8)
    assert token_by_token(engine, tokens).shape[-1] == small.vocab_size
    with pytest.raises(BadInput, match="head_bits is 4, wanted 8"):
        prepare(small, tree, head_bits=4)


@pytest.mark.parametrize("kind", ["two paths", pytest.param("mixed", marks=pytest.mark.more)])
def test_activations_of_8_bits(small, trees, tokens, kind):
    """Sign paths alone take them; logits are near those of 16 bits and not the same."""
    tree, products = trees[kind]
    wide, narrow = prepare(small, tree), prepare(small, tree, activation_bits=8)
    for name, product in narrow.products.items():
        assert type(product) is products[name]
        if isinstance(product, LaidSign):
            assert product.limbs == 1 and wide.products[name].limbs in (2, 3)
            assert product.bits.shape == wide.products[name].bits.shape
        else:
            assert jax.tree.structure(product) == jax.tree.structure(wide.products[name])
    want, found = (token_by_token(engine, tokens) for engine in (wide, narrow))
    error = float(jnp.linalg.norm(found - want) / jnp.linalg.norm(want))
    assert 1e-3 < error < 0.05
    with pytest.raises(BadInput, match="activation_bits is 4, wanted 16 or 8"):
        prepare(small, tree, activation_bits=4)


def test_the_cache_is_written_in_place(small, trees, tokens):
    engine = prepare(small, trees["two paths"][0])
    cache = init_cache(small, 1, 512)
    plan = STEP.lower(engine, tokens[:1, :1], cache).compile().memory_analysis()
    assert plan.alias_size_in_bytes >= 2 * cache["k"].nbytes
    # Work space for one layer's keys and values, no other copy.
    assert plan.temp_size_in_bytes < 1.5 * cache["k"].nbytes


def test_params_that_do_not_fit_are_named(config, params):
    wrong = {**params, "final_norm": {"scale": jnp.ones(3)}}
    with pytest.raises(BadInput, match="final_norm/scale is"):
        prepare(config, wrong)
    with pytest.raises(BadInput, match="head/kernel"):
        prepare(config, {**params, "head": {}})
