"""The one-bit kernel against float64: its twin in plain operations here, itself on a GPU."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rabit_jax.errors import BadInput
from rabit_jax.kernels.gpu import pallas_b1

pytestmark = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
TOLERANCE = {2: 1e-3, 3: 1e-5}


@pytest.fixture(scope="module")
def compiled(compiled_pallas):
    return functools.partial(compiled_pallas, pallas_b1)


@pytest.fixture(scope="module")
def run(run_pallas):
    return functools.partial(run_pallas, pallas_b1)


def instruction(a, b, c):
    """mma.m16n8k256 .b1 AND.POPC, lane by lane from the tables of the PTX manual.

    a `[32, 4]`, b `[32, 2]` uint32 and c `[32, 4]` int -> d `[32, 4]`.
    """
    left, right = np.zeros((16, 8), np.uint32), np.zeros((8, 8), np.uint32)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for n in range(4):
            left[g + 8 * (n % 2), t + 4 * (n // 2)] = a[lane, n]
        for n in range(2):
            right[g, t + 4 * n] = b[lane, n]
    d = np.bitwise_count(left[:, None] & right[None]).sum(-1, dtype=np.int64)
    out = c.copy()
    for lane in range(32):
        g, t = divmod(lane, 4)
        for n in range(4):
            out[lane, n] += d[g + 8 * (n // 2), 2 * t + n % 2]
    return out


def test_the_twin_moves_words_between_lanes_as_the_instruction_does():
    rng = np.random.default_rng(0)
    upper, lower, v = rng.integers(0, 256, (3, 2, 512), np.uint8)
    counts = rng.integers(-(2**31), 2**31 - 600, (2, 128), np.int32)
    found = pallas_b1._count(*(jnp.asarray(x) for x in (upper, lower, v)),
                             jnp.asarray(counts.view(np.int8)), asm=False)
    for warp in range(2):
        w0, w1, x = (y[warp].view(np.uint32).reshape(32, 4) for y in (upper, lower, v))
        c = counts[warp].astype(np.int64).reshape(32, 4)
        for n in (0, 2):
            a = np.stack([w0[:, n], w1[:, n], w0[:, n + 1], w1[:, n + 1]], 1)
            c = instruction(a, x[:, n : n + 2], c)
        assert np.array_equal(np.asarray(found)[warp].view(np.int32).reshape(32, 4), c)


@pytest.mark.parametrize("limbs", [2, 3])
@pytest.mark.parametrize("batch, i, rows, k, layers", [
    (1, 1, (1,), 1, 1), (2, 300, (33, 1, 70), 2, 2), (3, 1100, (17,), 1, 1), (1, 1376, (5,), 4, 1),
    (1, 4400, (3,), 1, 1),
])
def test_the_twin_is_float64(problem, relative, batch, i, rows, k, layers, limbs, run):
    p = problem(batch, i, rows, k=k, layers=layers, spread=30.0)
    for layer in range(layers):
        y = run(p, layer, limbs)
        assert y.dtype == jnp.float32 and y.shape == p.want[layer].shape
        assert relative(y, p.want[layer]) < TOLERANCE[limbs]


@pytest.mark.more
@settings(deadline=None, max_examples=3, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 900),
       st.lists(st.integers(1, 70), min_size=1, max_size=3), st.integers(1, 4))
def test_any_shape(problem, relative, run, batch, i, rows, k):
    p = problem(batch, i, rows, k=k)
    assert relative(run(p, 0, 2), p.want[0]) < 1e-4


@pytest.mark.parametrize("limbs", [2, 3])
def test_outliers_of_60_times_the_rest(problem, relative, limbs, run):
    p = problem(1, 4096, (32,), k=1, outlier=60.0)
    assert relative(run(p, 0, limbs), p.want[0]) < TOLERANCE[limbs]


@pytest.mark.parametrize("limbs", [2, 3])
def test_sums_of_the_largest_integers_are_exact(limbs, compiled):
    i, top = 2048, 2 ** (8 * limbs - 1) - 1
    u = jnp.full((1, 1, 1, i), float(top)).at[0, 0, 0, 1].set(-top).at[0, 0, 0, 2].set(1)
    bits = jnp.full((1, 1, 16, i // 8), 255, jnp.uint8)
    y = compiled((16,), limbs)(u, bits, jnp.ones((1, 1, 16)), jnp.int32(0))
    assert y.tolist() == [[float(np.float32((i - 3) * top + 1))] * 16]


def test_rows_of_a_batch_neither_see_their_neighbours_nor_their_own_size(problem, compiled, scaled):
    p = problem(3, 520, (21, 14), k=1)
    u = scaled(p, 0)
    y = compiled(p.rows, 2)(u, p.bits, p.g, jnp.int32(0))
    size = jnp.asarray([2.0**100, 2.0**-80, 0.0])[:, None, None, None]
    other = compiled(p.rows, 2)(u * size, p.bits, p.g, jnp.int32(0))
    assert jnp.array_equal(other, y * size[:, :, 0, 0])


@pytest.mark.parametrize("batch, rows, i", [(1, (4096,), 4096), (3, (31, 5), 300), (2, (1,), 1)])
def test_a_host_without_a_gpu_compiles_for_one(batch, rows, i, lowers_pallas):
    lowers_pallas(pallas_b1, batch, rows, i)


def test_what_it_refuses(problem, run):
    with pytest.raises(BadInput, match="b from 1 to 3"):
        run(problem(4, 40, (5,), k=1), 0, 2)
    with pytest.raises(BadInput, match="32769 inputs.*32768.*pallas_int8"):
        run(problem(1, 32769, (1,), k=1), 0, 2)
    with pytest.raises(BadInput, match="pallas_b1 runs on NVIDIA GPUs only.*cpu"):
        run(problem(1, 40, (5,), k=1), 0, 2, interpret=False)


@pytest.fixture
def untested():
    pallas_b1.works.cache_clear()
    yield
    pallas_b1.works.cache_clear()


def test_the_self_test_fails_once_and_says_why(untested, monkeypatch):
    if jax.default_backend() == "cpu":
        with pytest.warns(RuntimeWarning, match="pallas_int8 takes its place .BadInput: pallas_b1"):
            assert not pallas_b1.works()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not pallas_b1.works()
    pallas_b1.works.cache_clear()
    monkeypatch.setattr(pallas_b1, "signs_matmul", lambda u, b, g, l, rows, n: jnp.ones((3, 111)))
    with pytest.warns(RuntimeWarning, match="an error of .* with 16 planes"):
        assert not pallas_b1.works()


def test_the_self_test_runs_while_a_caller_is_traced(untested, monkeypatch):
    real = pallas_b1.signs_matmul
    monkeypatch.setattr(pallas_b1, "signs_matmul", functools.partial(real, interpret=True))
    works = []
    jax.jit(lambda x: works.append(pallas_b1.works()) or x)(jnp.ones(3))
    assert works == [True]


@pytest.mark.gpu
def test_this_gpu_passes_the_self_test(untested):
    assert pallas_b1.works()


@pytest.mark.gpu
@pytest.mark.parametrize("limbs", [2, 3])
@pytest.mark.parametrize("batch, i, rows, k, layers", [
    (1, 1, (1,), 1, 1), (1, 4096, (512,), 2, 2), (2, 1376, (33, 1, 70), 3, 2),
    (3, 4096, (100,), 1, 1), (1, 11008, (64, 64), 2, 1), (3, 700, (257,), 4, 1),
])
def test_the_kernel_is_float64(problem, relative, batch, i, rows, k, layers, limbs, run):
    p = problem(batch, i, rows, k=k, layers=layers, outlier=60.0 if i >= 4096 else 0.0)
    y = run(p, layers - 1, limbs, interpret=False)
    assert relative(y, p.want[-1]) < TOLERANCE[limbs]


@pytest.mark.gpu
def test_the_kernel_is_its_twin_to_the_last_bit(problem, run):
    p = problem(3, 1376, (33, 70), k=2, layers=2)
    assert np.array_equal(run(p, 1, 3, interpret=False), run(p, 1, 3))
