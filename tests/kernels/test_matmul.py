"""Every product that a CPU runs against float64, their choice, and what they refuse."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rabit_jax.errors import BadInput
from rabit_jax.kernels.cpu.library import library
from rabit_jax.kernels.layout import from_words, pack_bits, to_words
from rabit_jax.kernels.matmul import choose, packed_low_rank_matmul, packed_matmul

NATIVE = ("native",) if library() else ()
HERE = ("reference", "unpacked", "cpu", *NATIVE)


def product(p, impl, words=False, limbs=3, layer=None):
    bits = to_words(p.bits) if words else p.bits
    if layer is None:
        bits, g, h = bits[0], p.g[0], p.h[0]
    else:
        g, h = p.g, p.h
    run = jax.jit(packed_matmul, static_argnames=("rows", "limbs", "impl"))
    return run(p.x, bits, g, h, layer=layer, rows=p.rows, limbs=limbs, impl=impl)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(impl=st.sampled_from(HERE), words=st.booleans(), k=st.integers(1, 4),
       batch=st.sampled_from([1, 2, 5]), i=st.sampled_from([1, 31, 300, 513]),
       rows=st.sampled_from([(1,), (33,), (7, 20)]), limbs=st.sampled_from([2, 3]))
def test_the_product_is_that_of_float64(problem, relative, impl, words, k, batch, i, rows, limbs):
    p = problem(batch, i, rows, k, seed=i + k)
    tolerance = 2e-4 if impl in ("cpu", "native") and limbs == 2 else 3e-6
    # A sum may cancel to nothing; the error is then measured by what was added.
    scale = np.abs(p.want).max() + np.sqrt(i)
    assert np.abs(product(p, impl, words, limbs) - p.want[0]).max() < tolerance * scale


@pytest.mark.parametrize("impl", ["cpu", *NATIVE])
@pytest.mark.parametrize("limbs, bound", [(2, 1e-3), (3, 1e-5)])
def test_errors_with_an_outlier_at_4096_inputs(problem, relative, impl, limbs, bound):
    p = problem(2, 4096, (64,), outlier=60.0)
    assert relative(product(p, impl, True, limbs), p.want[0]) < bound


@pytest.mark.parametrize("impl", HERE)
@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 6e-3), ("float16", 1e-3)])
def test_short_floats_in_and_out(problem, relative, impl, dtype, tolerance):
    p = problem(3, 300, (40,), dtype=dtype)
    y = product(p, impl)
    assert y.dtype == dtype and relative(y, p.want[0]) < tolerance


@pytest.mark.parametrize("impl", HERE)
def test_the_layer_is_found_in_the_stack(problem, relative, impl):
    p = problem(2, 300, (16, 8), layers=3)
    for layer in range(3):
        found = product(p, impl, impl == "cpu", layer=jnp.int32(layer))
        assert relative(found, p.want[layer]) < 1e-5


@pytest.mark.parametrize("impl, held", [
    ("cpu", (4, 2, 32, 512)), *((name, (4, 32, 2, 32, 16)) for name in NATIVE)])
def test_no_layer_of_the_bits_is_copied(impl, held):
    """The compiled program indexes the stack: no array of bits is made beside it."""
    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    run = jax.jit(lambda x, words, g, h, l: packed_matmul(x, words, g, h, layer=l, impl=impl))
    text = run.lower(
        array("float32", 1, 1024), array("uint32", *held), array("float16", 4, 2, 512),
        array("float16", 4, 2, 1024), array("int32")).compile().as_text()
    program, stack = text[text.index("ENTRY"):], re.escape(",".join(map(str, held)))
    assert len(re.findall(rf"u32\[{stack}\]\S* parameter", program)) == 1
    assert not re.search(rf"= u32\[[0-9,]*{held[-1]}\]\S* (?!parameter)", program)


@pytest.mark.parametrize("impl", HERE)
def test_rows_of_a_batch_know_nothing_of_each_other(problem, impl):
    p = problem(4, 300, (24,))
    alone = product(p, impl)
    p.x = p.x.at[1].set(1e6).at[2].set(jnp.nan)
    beside = product(p, impl)
    np.testing.assert_array_equal(alone[jnp.array([0, 3])], beside[jnp.array([0, 3])])
    assert np.isnan(beside[2]).all()


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_any_size_of_activation_keeps_its_precision(problem, relative, scale):
    p = problem(2, 300, (24,))
    p.x = p.x * scale
    for impl in ("cpu", *NATIVE):
        assert relative(product(p, impl, limbs=3) / scale, p.want[0]) < 1e-5


def test_zeros_give_zeros(problem):
    p = problem(2, 300, (24,))
    p.x = jnp.zeros_like(p.x)
    for impl in HERE:
        assert not product(p, impl).any()


@pytest.mark.parametrize("impl, words", [
    ("reference", False), ("reference", True), ("cpu", True),
    *((name, words) for name in NATIVE for words in (True, False)),
    pytest.param("cpu", False, marks=pytest.mark.more),
])
def test_low_rank_factors_as_two_products(relative, impl, words):
    rng = np.random.default_rng(0)
    c, i, r, o, batch = 2, 300, 40, 70, 3
    u, v = rng.choice([-1.0, 1.0], (c, r, i)), rng.choice([-1.0, 1.0], (c, o, r))
    h, l, g = (np.float16(rng.uniform(0.5, 1.5, (c, n))) for n in (i, r, o))
    x = rng.normal(size=(batch, i)).astype(np.float32)
    want = sum(
        (((x * h[n].astype(float)) @ u[n].T * l[n].astype(float)) @ v[n].T) * g[n].astype(float)
        for n in range(c)
    )
    turn = to_words if words else lambda b: b
    bits = (turn(pack_bits(jnp.asarray(a > 0))) for a in (u.reshape(1, c * r, i), v))
    found = packed_low_rank_matmul(jnp.asarray(x), *bits, *map(jnp.asarray, (h, l, g)), limbs=3,
                                   impl=impl)
    assert relative(found, want) < 1e-5


def test_wrong_factors_are_one_sentence():
    half = functools.partial(jnp.ones, dtype=jnp.float16)
    bits = functools.partial(jnp.zeros, dtype=jnp.uint8)
    with pytest.raises(BadInput, match=r"bits has shape \(1, 2, 70, 64\), wanted \(1, 2, 70, 32\)"):
        packed_low_rank_matmul(jnp.ones((1, 300)), bits((1, 80, 64)), bits((2, 70, 64)),
                               half((2, 300)), half((2, 40)), half((2, 70)))


def test_words_are_turned_and_turned_back():
    rows = np.random.default_rng(0).integers(0, 256, (2, 3, 64), np.uint8)
    words = to_words(jnp.asarray(rows))
    assert words.shape == (2, 16, 3) and words.dtype == jnp.uint32
    np.testing.assert_array_equal(words[1, 5, 2], rows[1, 2, 20:24].view(np.uint32)[0])
    np.testing.assert_array_equal(from_words(words), rows)


@pytest.mark.parametrize("platform, capability, batch, words, b1, wanted", [
    ("cpu", 0, 1, True, True, "cpu"), ("cpu", 0, 8, True, True, "cpu"),
    ("cpu", 0, 9, True, True, "unpacked"), ("cpu", 0, 1, False, True, "unpacked"),
    ("gpu", 90, 1, False, True, "triton_b1"), ("gpu", 90, 1, False, False, "triton_int8"),
    ("gpu", 80, 3, False, True, "triton_b1"), ("gpu", 89, 4, False, True, "triton_int8"),
    ("gpu", 90, 32, False, True, "triton_int8"), ("gpu", 90, 33, False, True, "triton_dense"),
    ("gpu", 75, 1, False, True, "reference"), ("tpu", 0, 1, False, True, "reference"),
])
def test_the_choice_follows_device_and_batch(platform, capability, batch, words, b1, wanted):
    assert choose(platform, capability, batch, 4096, words, b1) == wanted


def test_the_native_kernel_takes_every_batch_of_a_cpu():
    for batch in (1, 9, 4096):
        assert choose("cpu", 0, batch, 4096, native=True) == "native"
    assert choose("gpu", 90, 1, 4096, native=True) == "triton_b1"


def test_planes_are_not_chosen_for_more_inputs_than_they_sum_exactly(problem):
    assert choose("cpu", 0, 1, 32769, True) == "unpacked"
    assert choose("gpu", 90, 1, 32769) == "triton_int8"
    with pytest.raises(BadInput, match="cpu got 32769 inputs"):
        product(problem(1, 32769, (1,), 1), "cpu")


def test_a_derivative_names_what_to_train(problem):
    p = problem(1, 40, (8,))
    for n in range(3):
        with pytest.raises(BadInput, match="cannot be differentiated: train a ResidualSign"):
            jax.grad(lambda x, g, h: packed_matmul(x, p.bits[0], g, h).sum(), argnums=n)(
                p.x, p.g[0], p.h[0])


def test_float16_activations_are_scaled_in_float32(problem, relative):
    p = problem(1, 300, (24,), dtype="float16")
    # Products of x and h pass float16's largest number; what comes out does not.
    p.x, p.h, p.g = p.x * 200, p.h * 200, p.g.astype(jnp.float32) / 4e4
    wanted = p.want[0]
    found = product(p, "cpu", limbs=3)
    assert found.dtype == jnp.float16 and relative(found, wanted) < 3e-3


@pytest.mark.parametrize("change, message", [
    ({"x": jnp.ones((2, 41))}, r"h has shape \(1, 2, 1, 40\), wanted \(1, 2, 1, 41\)"),
    ({"bits": jnp.zeros((2, 9, 32), jnp.uint8)}, r"bits has shape \(1, 2, 9, 32\)"),
    ({"bits": jnp.zeros((2, 8, 32), jnp.int8)}, "bits are int8"),
    ({"rows": (4, 3)}, "h has shape"), ({"limbs": 4}, "limbs 4: wanted"),
    ({"x": jnp.ones((2, 40), jnp.int32)}, "x is int32, wanted float16, bfloat16 or float32"),
    ({"impl": "cuda"}, "impl is 'cuda': choose reference, unpacked, native, cpu"),
])
def test_what_does_not_fit_is_one_sentence(problem, change, message):
    p = problem(2, 40, (8,))
    given = {"x": p.x, "bits": p.bits[0], "g": p.g[0], "h": p.h[0], "rows": None, "limbs": 2,
             "impl": None} | change
    x, bits, g, h = (given.pop(name) for name in ("x", "bits", "g", "h"))
    with pytest.raises(BadInput, match=message) as error:
        packed_matmul(x, bits, g, h, **given)
    assert "\n" not in str(error.value)
