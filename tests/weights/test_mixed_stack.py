"""Stacks whose layers have different numbers of paths: packed, stored, prepared."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax import BadInput, ResidualSignSpec, describe, pack
from rabit_jax.formats.packed_model import load_model, load_packed, packed_bytes, save_packed
from rabit_jax.models.config import ModelConfig
from rabit_jax.models.decoder import Decoder, init_params
from rabit_jax.models.engine import init_cache, step
from rabit_jax.models.prepared import prepare
from rabit_jax.weights.fixed import FixedWeight, fixed
from rabit_jax.weights.mixed_stack import first_paths, stacked, unstacked

CONFIG = ModelConfig(vocab_size=40, d_model=64, n_layers=3, n_heads=4, n_kv_heads=4, head_dim=16,
                     d_hidden=128, max_position=32)
KS = {"q": (1, 3, 2), "k": (1, 3, 2), "v": (2, 3, 1), "o": (2, 2, 2), "gate": (1, 1, 3),
      "up": (3, 1, 3), "down": (3, 2, 1)}


@pytest.fixture(scope="module")
def trained():
    """Params whose matrices have the paths of `KS`, and the same layers on their own."""
    params, alone = init_params(CONFIG, jax.random.key(0)), {}
    for side, names in (("attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
        for name in names:
            w = params["layers"][side][name]["kernel"]
            alone[name] = [ResidualSignSpec(k=k, rounds=2).init(one)
                           for one, k in zip(w, KS[name], strict=True)]
            params["layers"][side][name]["kernel"] = stacked(alone[name])
    return params, alone


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    return save_packed(tmp_path_factory.mktemp("mixed") / "packed", CONFIG, pack(trained[0]))


def kernel(params, name):
    return params["layers"]["attn" if name in "qkvo" else "mlp"][name]["kernel"]


@pytest.mark.parametrize("name", KS)
def test_a_layer_is_that_of_its_own_number_of_paths(trained, name):
    params, alone = trained
    node, packed = kernel(params, name), kernel(pack(params), name)
    for n, one in enumerate(alone[name]):
        np.testing.assert_array_equal(node.dense()[n], one.dense())
        assert unstacked(packed)[n].k == KS[name][n]
        for a, b in zip(jax.tree.leaves(unstacked(packed)[n]), jax.tree.leaves(one.pack("w")),
                        strict=True):
            np.testing.assert_array_equal(a, b)
    assert (packed.layer_k or (2, 2, 2)) == KS[name]


def test_sizes_count_the_paths_that_are_there(trained, folder):
    packed, alone = pack(trained[0]), trained[1]
    want = sum(one.pack("w").deployed_bytes() for own in alone.values() for one in own)
    rows = describe(packed).quantised
    assert sum(row.deployed_bytes for row in rows) == want
    found, table = packed_bytes(folder), describe(packed)
    assert found["linear_bytes"] == want
    assert found["stored_bits_per_weight"] == pytest.approx(table.stored_bits_per_weight)
    assert found["bits_per_weight"] == pytest.approx(table.bits_per_weight)
    i, o = 64, 128
    assert kernel(packed, "up").bits_per_weight() == pytest.approx(
        7 / 3 * (1 + 16 * (i + o) / (i * o)))
    assert kernel(packed, "up").cost().additions == 7 * i * o


def test_a_file_gives_the_stack_back(trained, folder):
    want, (_, found, _) = pack(trained[0]), load_packed(folder)
    for name in KS:
        a, b = kernel(want, name), kernel(found, name)
        assert a.layer_k == b.layer_k
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_array_equal(x[:, :1], y[:, :1])
        np.testing.assert_array_equal(a.dense(), b.dense())


def test_the_engine_multiplies_each_layer_by_its_own_paths(folder):
    model, params, _ = load_packed(folder)
    tokens = jax.random.randint(jax.random.key(1), (2, 7), 0, CONFIG.vocab_size)
    want = model.apply({"params": params}, tokens)
    engine = prepare(model.config, params)
    cache, found = init_cache(engine.config, 2, 7), []
    for t in range(7):
        logits, cache = step(engine, tokens[:, t : t + 1], cache)
        found.append(logits)
    np.testing.assert_allclose(jnp.stack(found, 1), want, atol=2e-4 * float(jnp.abs(want).max()))
    whole, _ = step(engine, tokens, init_cache(engine.config, 2, 7))
    np.testing.assert_allclose(whole, want[:, -1], atol=2e-4 * float(jnp.abs(want).max()))


@pytest.mark.parametrize("paths", [1, 2, 3])
def test_first_paths_are_their_sum(folder, paths):
    _, params, _ = load_model(folder)
    _, small, _ = load_model(folder, paths=paths)
    for name in KS:
        node = kernel(params, name)
        terms = list(node.paths())[:paths]
        np.testing.assert_allclose(kernel(small, name).dense(), sum(terms), atol=1e-6)
    again = first_paths(params, paths)
    assert jax.tree.structure(again) == jax.tree.structure(small)
    want = min(max(KS["up"]), paths) if paths > 1 else 1
    assert kernel(small, "up").k == want
    if paths == 1:
        assert kernel(small, "up").layer_k is None


def test_the_latent_gives_the_same_first_paths(trained):
    params = trained[0]
    small = pack(first_paths(params, 2))
    large = first_paths(pack(params), 2)
    for name in KS:
        np.testing.assert_array_equal(
            kernel(small, name).positive(), kernel(large, name).positive())


def test_scales_that_train_behind_packing_have_the_same_first_paths(trained):
    packed = pack(trained[0])
    for paths in (1, 2):
        want = first_paths(packed, paths)
        found = first_paths(fixed(packed), paths)
        for name in KS:
            np.testing.assert_array_equal(kernel(found, name).dense(), kernel(want, name).dense())
            again = kernel(pack(found), name)
            assert jax.tree.structure(again) == jax.tree.structure(kernel(want, name))


def test_more_paths_than_there_are_is_refused(folder, tmp_path, trained):
    for paths in (0, 4):
        with pytest.raises(BadInput, match=f"paths is {paths}.* have 3 sign paths: ask for 1 to 3"):
            load_packed(folder, paths)
    with pytest.raises(BadInput, match="no sign paths"):
        first_paths(init_params(CONFIG, jax.random.key(0)), 1)
    assert isinstance(load_model(folder)[0], Decoder)


def test_gradients_leave_paths_that_are_not_there_at_zero(trained):
    node = kernel(trained[0], "up")
    grads = jax.grad(lambda n: jnp.sum(n.dense() ** 3))(node)
    for g in (grads.g, grads.h):
        assert not np.asarray(g[1, 1:]).any() and np.asarray(g[0, 2]).any()


def test_scales_train_on_a_mixed_stack_and_pack_again(folder):
    _, params, _ = load_packed(folder)
    again = pack(fixed(params))
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    node = kernel(fixed(params), "up").packed_weight
    with pytest.raises(BadInput, match="up of layer 2: scale"):
        FixedWeight(node.replace(g=node.g.at[2, 1, 3].set(0))).pack("up")


def test_paths_that_no_layer_has_are_not_packed():
    w = jax.random.normal(jax.random.key(0), (3, 64, 64))
    node = ResidualSignSpec(k=3, rounds=1).init(w)
    zeros = node.replace(g=node.g.at[:, 2].set(0), h=node.h.at[:, 2].set(0))
    packed = zeros.pack("w")
    assert packed.k == 2 and packed.layer_k is None
    np.testing.assert_array_equal(packed.positive(), zeros.positive()[:, :2])
    assert not zeros.positive()[:, 2].any()
    pruned = ResidualSignSpec(k=2).init(jnp.zeros((2, 64, 64))).pack("zeros")
    assert pruned.k == 2 and pruned.layer_k is None
