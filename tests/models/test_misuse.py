"""What is given in place of params, rules and tokens: one sentence each."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax import LLAMA_LINEARS, ResidualSign, ResidualSignSpec, convert, generate
from rabit_jax.errors import BadInput
from rabit_jax.evaluate.perplexities import perplexity
from rabit_jax.evaluate.scoring import Request, score

SPEC = ResidualSignSpec(rounds=1)


@pytest.mark.parametrize("tokens, message", [
    ("hello", "a prompt is text, wanted token ids .*encode it first"),
    (["hello", "x"], "a prompt is text"), ([[1.5]], "a prompt is of float64"),
    ([[1, 2], [3]], "lists of different lengths"), ([[61]], "token id 61"), ([[-1]], "or -1"),
    ([], "empty prompt"),
])
def test_prompts(model, params, tokens, message):
    with pytest.raises(BadInput, match=message):
        generate(model, params, tokens)


@pytest.mark.parametrize("tokens, message", [
    (np.array([[3, 61]]), "tokens hold the id 61, the model's vocabulary has 0..60"),
    (np.array([[-1]]), "tokens hold the id -1"), ("text", "tokens are a str, wanted integer ids"),
    ([[1]], "tokens are a list"), (np.ones((1, 2)), r"tokens are float64\[1, 2\]"),
    (np.array([1]), r"tokens are int64\[1\], wanted"),
])
def test_tokens_of_a_forward_pass(model, params, tokens, message):
    with pytest.raises(BadInput, match=message):
        model.apply({"params": params}, tokens)


def test_tokens_of_an_evaluation(model, params):
    with pytest.raises(BadInput, match="tokens hold the id 61"):
        perplexity(model, params, np.array([[1, 61]]), batch_size=1)
    with pytest.raises(BadInput, match="tokens hold the id 61"):
        next(score(model, params, [Request([1, 61], 1)], batch_size=1))


def test_constant_tokens_of_a_traced_call(model, params):
    """They are checked on the host; those that are traced cannot be."""
    tokens, beyond = jnp.array([[1, 2]]), jnp.array([[1, 62]])
    shape = jax.eval_shape(lambda p: model.apply({"params": p}, tokens), params).shape
    assert shape == (1, 2, 61)
    with pytest.raises(BadInput, match="tokens hold the id 62"):
        jax.eval_shape(lambda p: model.apply({"params": p}, beyond), params)


@pytest.mark.parametrize("rules, message", [
    (SPEC, "rules are a ResidualSignSpec, wanted a list of pairs"), ([SPEC], "a rule is"),
    (LLAMA_LINEARS, "rules are a str"), ((LLAMA_LINEARS, SPEC), "a rule is"),
    ({LLAMA_LINEARS: SPEC}, "rules are a dict"),
    ([(LLAMA_LINEARS, ResidualSignSpec)], "names <class .*a spec"),
    ([(SPEC, LLAMA_LINEARS)], "a rule is"), (None, "rules are a NoneType"),
])
def test_rules(params, rules, message):
    with pytest.raises(BadInput, match=message):
        convert(params, rules)


def test_params(model):
    for wrong in (model, nn.Dense(3), "folder", None):
        with pytest.raises(BadInput, match=f"params are a {type(wrong).__name__}, wanted a tree"):
            convert(wrong, [(LLAMA_LINEARS, SPEC)])
    with pytest.raises(BadInput, match="a is a float, wanted an array"):
        convert({"a": 1.0, "b": jnp.ones((2, 2))}, [("a", SPEC)])


def test_a_weight_node_in_place_of_an_array():
    node, x = ResidualSign(jnp.ones((4, 3)), jnp.ones((2, 3)), jnp.ones((2, 4))), jnp.ones((2, 4))
    for use in (lambda: x @ node, lambda: jnp.dot(x, node)):
        with pytest.raises(BadInput, match="a ResidualSign is no array.*apply it to dense params"):
            use()
