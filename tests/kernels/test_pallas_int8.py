"""The int8 kernel against float64: its twin in plain operations here, itself on a GPU."""

import functools

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rabit_jax.errors import BadInput
from rabit_jax.kernels.gpu import pallas_int8

pytestmark = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
TOLERANCE = {2: 1e-3, 3: 1e-5}


@pytest.fixture(scope="module")
def compiled(compiled_pallas):
    return functools.partial(compiled_pallas, pallas_int8)


@pytest.fixture(scope="module")
def run(run_pallas):
    return functools.partial(run_pallas, pallas_int8)


@pytest.mark.parametrize("limbs", [2, 3])
@pytest.mark.parametrize("batch, i, rows, k, layers", [
    (1, 1, (1,), 1, 1), (2, 300, (33, 1, 70), 3, 2), (5, 1376, (40, 5), 4, 1),
    (32, 700, (9,), 1, 2), (1, 4700, (3,), 1, 1),
])
def test_the_twin_is_float64(problem, relative, batch, i, rows, k, layers, limbs, run):
    p = problem(batch, i, rows, k=k, layers=layers, spread=30.0)
    for layer in range(layers):
        y = run(p, layer, limbs)
        assert y.dtype == jnp.float32 and y.shape == p.want[layer].shape
        assert relative(y, p.want[layer]) < TOLERANCE[limbs]


@pytest.mark.more
@settings(deadline=None, max_examples=5, derandomize=True)
@given(st.integers(1, 11), st.integers(1, 900),
       st.lists(st.integers(1, 70), min_size=1, max_size=3), st.integers(1, 4))
def test_any_shape(problem, relative, run, batch, i, rows, k):
    p = problem(batch, i, rows, k=k)
    assert relative(run(p, 0, 3), p.want[0]) < TOLERANCE[3]


@pytest.mark.parametrize("limbs", [2, 3])
def test_outliers_of_60_times_the_rest(problem, relative, limbs, run):
    p = problem(1, 4096, (32,), outlier=60.0)
    assert relative(run(p, 0, limbs), p.want[0]) < TOLERANCE[limbs]


def test_rows_of_a_batch_neither_see_their_neighbours_nor_their_own_size(problem, compiled, scaled):
    p = problem(4, 520, (21, 14), k=1)
    u = scaled(p, 0)
    y = compiled(p.rows, 2)(u, p.bits, p.g, jnp.int32(0))
    size = jnp.asarray([1.0, 2.0**100, 2.0**-80, 0.0])[:, None, None, None]
    other = compiled(p.rows, 2)(u * size, p.bits, p.g, jnp.int32(0))
    assert jnp.array_equal(other, y * size[:, :, 0, 0])
    nan = compiled(p.rows, 2)(u.at[1, 0, 0, 3].set(jnp.nan), p.bits, p.g, jnp.int32(0))
    others = jnp.asarray([0, 2, 3])
    assert jnp.array_equal(nan[others], y[others]) and jnp.array_equal(nan[1, 21:], y[1, 21:])


@pytest.mark.parametrize("batch, rows, i", [(1, (4096,), 4096), (8, (31, 5), 300), (32, (64,), 32)])
def test_a_host_without_a_gpu_compiles_for_one(batch, rows, i, lowers_pallas):
    lowers_pallas(pallas_int8, batch, rows, i)


def test_what_it_refuses(problem, run):
    p = problem(33, 40, (5,), k=1)
    with pytest.raises(BadInput, match="b from 1 to 32"):
        run(p, 0, 2)
    with pytest.raises(BadInput, match="pallas_int8 runs on NVIDIA GPUs only.*cpu"):
        run(problem(1, 40, (5,), k=1), 0, 2, interpret=False)


@pytest.mark.gpu
@pytest.mark.parametrize("limbs", [2, 3])
@pytest.mark.parametrize("batch, i, rows, k, layers", [
    (1, 1, (1,), 1, 1), (1, 4096, (512,), 2, 2), (3, 1376, (33, 1, 70), 3, 2),
    (8, 4096, (100,), 1, 1), (16, 11008, (64, 64), 2, 1), (32, 700, (257,), 4, 1),
])
def test_the_kernel_is_float64(problem, relative, batch, i, rows, k, layers, limbs, run):
    p = problem(batch, i, rows, k=k, layers=layers, outlier=60.0 if i >= 4096 else 0.0)
    y = run(p, layers - 1, limbs, interpret=False)
    assert relative(y, p.want[-1]) < TOLERANCE[limbs]


@pytest.mark.gpu
def test_the_kernel_is_its_twin(problem, relative, run):
    p = problem(5, 1376, (33, 70), k=2, layers=2)
    y = run(p, 1, 3, interpret=False)
    # On a CPU: XLA's own int8 products on an H200 are wrong here (jax 0.11.2, 2026-11-29).
    with jax.default_device(jax.devices("cpu")[0]):
        assert relative(y, run(p, 1, 3)) < 1e-6
