"""The Triton kernels: their numbers, the instruction's own tables, and that JAX lowers them."""

import functools
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax.errors import BadInput
from rabit_jax.kernels import reference
from rabit_jax.kernels.activations import bit_planes
from rabit_jax.kernels.bench import aot
from rabit_jax.kernels.gpu import triton_b1, triton_int8
from rabit_jax.kernels.layout import pack_bits
from rabit_jax.kernels.matmul import packed_matmul
from tests.kernels import triton_layouts

ROOT = Path(__file__).parents[2]
# Largest relative error of the product for 2 and 3 limbs, with an outlier of 60.
TOLERANCE = {2: 1e-3, 3: 1e-5}
# Implementation, batch, paths, rows of members, inputs, limbs, parts of the inputs (0: as planned),
# outlier. Inputs of less than a block, of whole blocks, and of a block and a rest; one tile and
# several, full and not; all widths of columns, and two chunks of them.
CASES = [
    ("triton_int8", 1, 2, (40, 70), 1324, 3, 2, 60),
    ("triton_int8", 2, 1, (5,), 100, 2, 0, 1),
    ("triton_int8", 5, 1, (70,), 1024, 2, 1, 1),
    ("triton_int8", 20, 1, (64,), 700, 2, 0, 1),
    ("triton_b1", 1, 2, (40, 70), 1200, 2, 2, 60),
    ("triton_b1", 1, 1, (70,), 1024, 3, 0, 60),
    ("triton_b1", 3, 1, (37,), 724, 3, 1, 1),
    ("triton_b1", 2, 1, (5,), 200, 2, 0, 1),
    ("triton_dense", 1, 2, (40, 70), 1324, 3, 0, 1),
    ("triton_dense", 1, 3, (5,), 200, 3, 0, 1),
]


@pytest.fixture(scope="module")
def errors():
    """Relative error of each case in Triton's interpreter: of all outputs, and of the worst."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("Triton's interpreter keeps its arrays in torch, which is not installed here")
    script = Path(__file__).with_name("triton_interpreted.py")
    done = subprocess.run([sys.executable, script, json.dumps(CASES)], cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_the_plain_form_is_the_product_of_float64(errors, case):
    error, worst, laid = errors[case]
    assert laid
    assert error < TOLERANCE[case[5]] and worst < 10 * TOLERANCE[case[5]]


def run_asm(text, operands):
    """What the assembly makes of 20 registers per lane, by the tables of mma.m16n8k256 in the PTX
    manual. operands: uint32 `[32, 20]`, the first 4 of them results."""
    registers = {f"${n}": operands[:, n].astype(np.int64) for n in range(20)}
    group, thread = np.divmod(np.arange(32), 4)
    for names in re.findall(r"popc ([^;]+);", text):
        d, a, b, c = (one.split(",") for one in re.findall(r"{([^}]+)}", names))
        left, right = np.zeros((16, 8), np.int64), np.zeros((8, 8), np.int64)
        for n in range(4):
            left[group + n % 2 * 8, thread + n // 2 * 4] = registers[a[n]]
        for n in range(2):
            right[group, thread + n * 4] = registers[b[n]]
        sums = np.bitwise_count((left[:, None] & right[None]).astype(np.uint64)).sum(2)
        new = [registers[c[n]] + sums[group + n // 2 * 8, 2 * thread + n % 2] for n in range(4)]
        registers.update(zip(d, new, strict=True))
    return np.stack([registers[f"${n}"] for n in range(4)], 1)


def test_the_assembly_multiplies_rows_by_planes_as_they_are_laid():
    rng = np.random.default_rng(0)
    positive = rng.random((8, 512)) < 0.5
    u = jnp.asarray(rng.normal(size=(1, 1, 1, 512)), jnp.float32)
    planes = np.asarray(triton_layouts.fragments(u, 2, 64)[0]).reshape(2, 32, 4).view(np.uint32)
    words = np.asarray(pack_bits(jnp.asarray(positive))).view(np.uint32).reshape(32, 4)
    zero = np.zeros((32, 4), np.uint32)
    operands = np.concatenate([zero, words, planes[0], planes[1], zero], axis=1)
    text = str(getattr(triton_b1._b1_asm, "fn", triton_b1._b1_asm)())
    # Element 16 p + 4 t + 2 h + e is the count of row 2 t + e and plane p + 8 h.
    counts = run_asm(text, operands).reshape(8, 4, 2, 2).transpose(1, 3, 2, 0).reshape(8, 16)
    weights = np.where(np.arange(16) == 15, -(2**15), 2 ** np.arange(16))
    made = bit_planes(u[0, 0], 16)
    v = np.round(np.asarray(u[0, 0, 0], np.float64) / float(made.scale[0])).astype(np.int64)
    np.testing.assert_array_equal(counts @ weights, positive @ v)


def test_lanes_hold_the_neighbouring_words_that_the_assembly_takes():
    text = aot.compile_triton("triton_b1", 2, 90).layouts
    used = set(re.findall(r"elementwise_inline_asm.*->.*?(#\w+)>", text))
    assert len(used) == 1, used
    [layout] = re.findall(rf"^{used.pop()} = (.*)$", text, re.MULTILINE)
    for part in ("sizePerThread = [1, 4]", "threadsPerWarp = [1, 32]", "order = [1, 0]",
                 f"warpsPerCTA = [{triton_b1.WARPS}, 1]"):
        assert part in layout


@pytest.mark.parametrize("module, batch, limbs", [
    (triton_int8, 1, 2), (triton_int8, 32, 3), (triton_b1, 1, 2), (triton_b1, 3, 3)])
def test_a_host_without_gpu_lowers_the_product_for_one(module, batch, limbs):
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (
        ((batch, 2, 2, 700), jnp.float32), ((3, 2, 192, 96), jnp.uint8),
        ((3, 2, 192), jnp.float16), ((), jnp.int32))]

    def product(u, bits, g, layer):
        return module.product(u, bits, g, layer, (128, 64), limbs, 90)

    traced = jax.jit(product).trace(*shapes)
    assert jax.eval_shape(product, *shapes).shape == (batch, 192)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    # One lays the activations, one multiplies.
    calls = [line for line in text.splitlines() if "custom_call @triton_kernel_call" in line]
    assert len(calls) == 2
    # The stacked bits are an argument of the program and of one kernel and of nothing else.
    [call] = [line for line in calls if "tensor<3x2x192x96xui8>" in line]
    uses = [line for line in text.splitlines() if "tensor<3x2x192x96xui8>" in line and line != call]
    assert len(uses) == 1 and "func.func public @main" in uses[0]


def test_inputs_are_laid_as_the_blocks_of_a_row_meet_them():
    # 160 bytes in blocks of 64: the third begins at byte 96, so that its first 32 come again.
    u = jnp.arange(1.0, 1271)
    laid = np.asarray(triton_layouts.lay_inputs(u, 160, 64))
    assert laid.shape == (1536,)
    np.testing.assert_array_equal(laid[:1024], u[:1024])
    assert not laid[1024:1280].any()
    np.testing.assert_array_equal(laid[1280:], np.pad(u[1024:], (0, 10)))
    for inputs, row_bytes in ((200, 32), (500, 64)):
        laid = triton_layouts.lay_inputs(u[:inputs], row_bytes, 64)
        np.testing.assert_array_equal(laid, np.pad(u[:inputs], (0, 512 - inputs)))


@pytest.mark.parametrize("impl", ["triton_int8", "triton_b1"])
def test_other_devices_and_larger_batches_are_bad_input(problem, impl):
    module = importlib.import_module(f"rabit_jax.kernels.gpu.{impl}")
    p = problem(1, 300, (8,))
    if jax.devices()[0].platform == "cpu":
        with pytest.raises(BadInput, match=f"{impl} runs on NVIDIA GPUs .* device is cpu"):
            packed_matmul(p.x, p.bits[0], p.g[0], p.h[0, :, 0], impl=impl)
    p = problem(module.MAX_BATCH + 1, 300, (8,))
    with pytest.raises(BadInput, match=f"{impl} takes a batch of up to {module.MAX_BATCH} rows"):
        packed_matmul(p.x, p.bits[0], p.g[0], p.h[0, :, 0], impl=impl)


@pytest.mark.parametrize("factor, right", [(1, True), (1.0001, False)])
def test_wrong_sums_of_the_compiled_kernel_are_bad_input(problem, monkeypatch, factor, right):
    def product(u, bits, g, layer, rows, limbs, version):
        return factor * reference.signs_matmul(u, bits, g, layer, rows)

    monkeypatch.setattr(triton_b1, "product", product)
    monkeypatch.setattr(triton_b1, "capability", lambda impl: 90)
    monkeypatch.setattr(triton_b1, "works", functools.cache(triton_b1.works.__wrapped__))
    p = problem(1, 300, (8,))
    run = functools.partial(packed_matmul, impl="triton_b1")
    if right:
        jax.jit(run)(p.x, p.bits[0], p.g[0], p.h[0, :, 0])
    else:
        with (
            pytest.warns(RuntimeWarning, match="triton_int8 takes its place .an error of"),
            pytest.raises(BadInput, match="triton_b1 failed its self-test"),
        ):
            jax.jit(run)(p.x, p.bits[0], p.g[0], p.h[0, :, 0])


@pytest.mark.gpu
@pytest.mark.parametrize("limbs", [2, 3])
@pytest.mark.parametrize("impl, batch", [
    ("triton_b1", 1), ("triton_b1", 3), ("triton_int8", 1), ("triton_int8", 7),
    ("triton_int8", 32), ("triton_dense", 70)])
@pytest.mark.parametrize("i, rows", [
    (4096, (512,)), (11008, (300, 40)), (200, (5,)), (1324, (70,))])
def test_a_gpu_computes_the_product_of_float64(problem, relative, impl, batch, limbs, i, rows):
    p = problem(batch, i, rows, k=2, layers=2, outlier=60)

    @jax.jit
    def product(x, bits, g, h, layer):
        return packed_matmul(x, bits, g, h, layer=layer, rows=p.rows, limbs=limbs, impl=impl)

    for layer in range(2):
        y = product(p.x, p.bits, p.g, p.h, jnp.int32(layer))
        assert relative(y, p.want[layer]) < TOLERANCE[limbs]
