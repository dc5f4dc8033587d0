"""Rules, `convert`, `dense` and `pack` over params trees, our decoder's and any Flax model's."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rabit_jax import BadInput, PackedSign, ResidualSign, ResidualSignSpec, convert, dense, pack
from rabit_jax.signs.channel_importance import Stats
from rabit_jax.tree import match_rules, weights_of
from rabit_jax.weights.conversion import LLAMA_LINEARS

FIT = ResidualSignSpec(k=2, rounds=1)


class Plain:
    """A spec that fits nothing: rules and trees are what is tested."""

    def __init__(self, k):
        self.k = k

    def init(self, w, stats=None, key=None):
        *lead, i, o = w.shape
        size = np.full((*lead, self.k, i), 0.3) * 0.5 ** np.arange(self.k)[:, None]
        return ResidualSign(w, jnp.ones((*lead, self.k, o)), jnp.asarray(size, jnp.float32))


SPEC, ONE = Plain(2), Plain(1)
L, D, F = 3, 8, 12


def decoder_params():
    shapes = {
        "embed": {"embedding": (20, D)},
        "layers": {
            "attn": {name: {"kernel": (L, D, D), "bias": (L, D)} for name in "qkvo"},
            "mlp": {
                "gate": {"kernel": (L, D, F)},
                "up": {"kernel": (L, D, F)},
                "down": {"kernel": (L, F, D)},
            },
            "attn_norm": {"scale": (L, D)},
        },
        "head": {"kernel": (D, 20)},
    }
    rng = np.random.default_rng(0)
    array = lambda s: jnp.asarray(rng.normal(size=s), jnp.float32)  # noqa: E731
    return jax.tree.map(array, shapes, is_leaf=lambda x: isinstance(x, tuple))


@pytest.fixture
def params():
    return decoder_params()


SEVEN = {f"layers/attn/{n}/kernel" for n in "qkvo"} | {
    f"layers/mlp/{n}/kernel" for n in ("gate", "up", "down")
}


def test_the_llama_rule_selects_the_seven_projections(params):
    assert set(match_rules(params, [(LLAMA_LINEARS, SPEC)])) == SEVEN


def test_the_first_rule_that_matches_wins(params):
    rules = [
        ("layers/attn/v/kernel", None),
        ("layers/attn/.*/kernel", ONE),
        (r"layers/.*/kernel", SPEC),
    ]
    chosen = match_rules(params, rules)
    assert set(chosen) == SEVEN - {"layers/attn/v/kernel"}
    assert chosen["layers/attn/q/kernel"] is ONE and chosen["layers/mlp/up/kernel"] is SPEC
    assert match_rules(params, [(".*/kernel", SPEC), ("head/kernel", ONE)])["head/kernel"] is SPEC


def test_a_rule_must_match_the_whole_path(params):
    for part in ("attn/q/kernel", "layers/attn/q", "kernel"):
        with pytest.raises(BadInput, match="matches no parameter"):
            match_rules(params, [(part, SPEC)])


def test_convert_changes_what_is_selected_and_nothing_else(params):
    out = convert(params, [("layers/attn/v/kernel", None), (LLAMA_LINEARS, SPEC)])
    assert set(weights_of(out)) == SEVEN - {"layers/attn/v/kernel"}
    assert out["layers"]["attn"]["v"]["kernel"] is params["layers"]["attn"]["v"]["kernel"]
    assert out["embed"]["embedding"] is params["embed"]["embedding"]
    assert out["layers"]["attn"]["q"]["bias"] is params["layers"]["attn"]["q"]["bias"]
    node = out["layers"]["mlp"]["down"]["kernel"]
    assert isinstance(node, ResidualSign)
    assert (node.g.shape, node.h.shape) == ((L, 2, D), (L, 2, F))
    np.testing.assert_array_equal(node.latent, params["layers"]["mlp"]["down"]["kernel"])

    plain = dense(out)
    assert jax.tree.map(jnp.shape, plain) == jax.tree.map(jnp.shape, params)
    np.testing.assert_array_equal(plain["layers"]["mlp"]["down"]["kernel"], node.dense())
    small = pack({"mlp": {"down": node}, "head": out["head"]})
    assert isinstance(small["mlp"]["down"], PackedSign)
    assert small["head"]["kernel"] is params["head"]["kernel"]


def test_no_match_lists_the_nearest_paths(params):
    with pytest.raises(BadInput, match="matches no parameter.*layers/attn/q/kernel") as caught:
        convert(params, [(r"layers/atn/q/kernel", SPEC)])
    assert "layers/atn/q/kernel" in str(caught.value)
    with pytest.raises(BadInput, match="layers/mlp/down/kernel"):
        convert(params, [(LLAMA_LINEARS, SPEC), (r"layers/mlp/dwn/kernel", SPEC)])


@pytest.mark.parametrize(
    "pattern",
    [
        "layers/3/attn/q/kernel", "layers/0/.*", "layers_3/attn/q/kernel",
        r"layers/\d+/attn/q/kernel", r"layers/[0-9]/mlp/up/kernel",
        r"layers_0/(attn/[qkvo]|mlp/(gate|up|down))/kernel",
    ],
)
def test_one_layer_of_a_stack_is_an_error_that_says_so(pattern, params):
    for tree in (params, convert(params, [(LLAMA_LINEARS, ONE)])):
        with pytest.raises(BadInput, match="one layer of a stack.*all 3 layers") as caught:
            convert(tree, [(pattern, SPEC)])
        suggestion = re.search(r"write '(.*)'", str(caught.value))[1]
        assert any(re.fullmatch(suggestion, path) for path in SEVEN)


def test_a_typing_error_beside_a_layer_number_is_no_stack_error(params):
    with pytest.raises(BadInput, match="matches no parameter"):
        convert(params, [("layers/3/attn/qq/kernel", SPEC)])


def test_a_rule_that_matches_nothing_in_a_converted_tree_is_an_error(params):
    tree = convert(params, [(LLAMA_LINEARS, ONE)])
    for pattern in ("layers/attn/qq/kernel", "layers/0/attn/qq/kernel"):
        with pytest.raises(BadInput, match="matches no parameter"):
            convert(tree, [(pattern, SPEC)])


def test_a_bad_pattern_is_an_error_that_quotes_it(params):
    with pytest.raises(BadInput, match=re.escape("'layers/(attn'")):
        convert(params, [("layers/(attn", SPEC)])


def test_what_is_converted_already_is_refused(params):
    once = convert(params, [("layers/attn/q/kernel", SPEC)])
    with pytest.raises(BadInput, match="layers/attn/q/kernel is a ResidualSign already"):
        convert(once, [(LLAMA_LINEARS, SPEC)])
    assert convert(once, [("layers/attn/k/kernel", SPEC), ("layers/attn/q/kernel", None)])


def test_what_is_no_matrix_is_refused(params):
    ids = jnp.ones((D, D), jnp.int32)
    tree = params | {"final_norm": {"scale": jnp.ones(D)}, "ids": {"kernel": ids}}
    for path in ("final_norm/scale", "ids/kernel"):
        with pytest.raises(BadInput, match=f"{path} is .*no float matrix"):
            convert(tree, [(path, SPEC)])


def test_statistics_must_cover_what_is_selected(params):
    stats = {"layers/attn/q/kernel": Stats(jnp.ones((L, D)), jnp.ones((L, D)))}
    assert convert(params, [("layers/attn/q/kernel", SPEC)], stats)
    with pytest.raises(BadInput, match="no calibration statistics for layers/attn/k/kernel"):
        convert(params, [("layers/attn/[qk]/kernel", SPEC)], stats)


def test_statistics_reach_their_own_kernel(params):
    s = Stats(jnp.exp(jnp.linspace(-2, 2, L * D)).reshape(L, D), jnp.ones((L, D)))
    flat = Stats(jnp.ones((L, D)), jnp.ones((L, D)))
    stats = {"layers/attn/k/kernel": s, "layers/attn/q/kernel": flat}
    out = weights_of(convert(params, [("layers/attn/[qk]/kernel", FIT)], stats))
    for name, mine in stats.items():
        kernel = params["layers"]["attn"][name.split("/")[2]]["kernel"]
        np.testing.assert_array_equal(out[name].h, FIT.init(kernel, mine).h)
    other = np.asarray(FIT.init(params["layers"]["attn"]["k"]["kernel"], flat).h)
    assert np.abs(other / np.asarray(out["layers/attn/k/kernel"].h) - 1).max() > 0.1


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(16)(x)))


class NnxMlp(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(6, 16, rngs=rngs)
        self.second = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


def linen_case():
    model = Mlp()
    params = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 6)))["params"]
    # The outer layer is made first and so takes the name Dense_0.
    return params, lambda p, x: model.apply({"params": p}, x), ("Dense_1", "Dense_0")


def nnx_state_case():
    graph, state = nnx.split(NnxMlp(nnx.Rngs(0)), nnx.Param)
    return state, lambda p, x: nnx.merge(graph, p)(x), ("first", "second")


def nnx_dict_case():
    graph, state = nnx.split(NnxMlp(nnx.Rngs(0)), nnx.Param)

    def apply(p, x):
        full = jax.tree.map(lambda a: a, state)
        nnx.replace_by_pure_dict(full, p)
        return nnx.merge(graph, full)(x)

    return nnx.to_pure_dict(state), apply, ("first", "second")


@pytest.mark.parametrize("case", [linen_case, nnx_state_case, nnx_dict_case])
def test_an_ordinary_flax_model_converts_runs_and_trains(case):
    params, apply, names = case()
    x = np.random.default_rng(1).normal(size=(7, 6)).astype(np.float32)
    student = convert(params, [(".*kernel.*", SPEC)])
    nodes = weights_of(student)
    assert len(nodes) == 2 and all(isinstance(node, ResidualSign) for node in nodes.values())

    first, second = (next(v for p, v in nodes.items() if n in p) for n in names)
    want = np.maximum(np.asarray(x, np.float64) @ np.asarray(first.dense(), np.float64), 0)
    want = want @ np.asarray(second.dense(), np.float64)  # biases start at 0
    np.testing.assert_allclose(apply(dense(student), x), want, rtol=1e-4, atol=1e-5)

    grads = weights_of(jax.jit(jax.grad(lambda p: jnp.sum(apply(dense(p), x) ** 2)))(student))
    assert set(grads) == set(nodes)
    for grad in grads.values():
        assert all(np.abs(np.asarray(leaf)).max() > 0 for leaf in jax.tree.leaves(grad))
    plain = jax.jit(jax.grad(lambda p: jnp.sum(apply(p, x) ** 2)))(dense(student))
    kernels = [leaf for leaf in jax.tree.leaves(plain) if leaf.ndim == 2]
    for grad, want in zip(grads.values(), kernels, strict=True):
        np.testing.assert_allclose(grad.latent, want, rtol=1e-4, atol=1e-5)

    small = pack(student)
    assert all(isinstance(node, PackedSign) for node in weights_of(small).values())
    np.testing.assert_allclose(apply(dense(small), x), apply(dense(student), x), atol=2e-2)


def test_paths_of_a_user_model_stay_the_same_after_conversion():
    for case in (linen_case, nnx_state_case, nnx_dict_case):
        params, _, _ = case()
        rules = [(".*kernel.*", SPEC)]
        assert list(weights_of(convert(params, rules))) == list(match_rules(params, rules))
