"""What is given in place of params, rules and tokens: one sentence each."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax import (
    LLAMA_LINEARS,
    ResidualSign,
    ResidualSignSpec,
    convert,
    generate,
    load_hf,
    save_hf,
)
from rabit_jax.errors import BadInput
from rabit_jax.evaluate.perplexities import perplexity
from rabit_jax.evaluate.scoring import Request, score
from rabit_jax.formats.packed_model import save_packed

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


@pytest.mark.parametrize("settings, message", [
    ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5, wanted an integer"),
    ({"temperature": 1.0, "key": 3}, "key is 3, wanted a key"),
    ({"eos_ids": "</s>"}, "eos_ids are '</s>', wanted a list of token ids"),
    ({"eos_ids": 3}, "eos_ids are 3"),
])
def test_settings_of_a_generation(model, params, settings, message):
    with pytest.raises(BadInput, match=message):
        generate(model, params, np.array([[3]]), **{"max_new_tokens": 2, **settings})


def test_arguments_in_the_wrong_order(model, params, tmp_path):
    for call in (lambda: generate(params, model, np.array([[3]])),
                 lambda: save_hf(tmp_path / "a", params, params),
                 lambda: save_packed(model, tmp_path / "a", params)):
        with pytest.raises(BadInput, match="the model is a .*, wanted a Decoder or its"):
            call()


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "nosuch", "bool"])
def test_dtypes_that_hold_no_weights(folder, model, params, tmp_path, dtype):
    for call in (lambda: load_hf(folder, dtype=dtype),
                 lambda: save_hf(tmp_path / "a", model, params, dtype=dtype)):
        with pytest.raises(BadInput, match=f"dtype is '{dtype}', wanted float32"):
            call()


@pytest.mark.parametrize("path", [None, 5, ["model"]])
def test_a_path_that_is_none(path):
    with pytest.raises(BadInput, match="a model folder is a .*, wanted its path"):
        load_hf(path)


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
