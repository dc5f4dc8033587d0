"""Benchmarks of kernels at tiny sizes: rows, what they are made of, what is refused and saved."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax import BadInput
from rabit_jax.experiments.bench import __main__ as bench
from rabit_jax.experiments.bench import decode as bench_decode
from rabit_jax.experiments.bench import kernels as bench_matmul
from rabit_jax.experiments.bench import random_weights as bench_weights
from rabit_jax.experiments.bench import shapes as bench_shapes
from rabit_jax.experiments.engine.console import main_guard
from rabit_jax.kernels import reference
from rabit_jax.kernels.bench import aot, torch_cases
from rabit_jax.kernels.bench import case as bench_case
from rabit_jax.kernels.bench import machine as bench_device
from rabit_jax.kernels.cpu import bit_planes as cpu
from rabit_jax.kernels.cpu.library import library
from rabit_jax.kernels.layout import as_rows, unpack_bits

CACHE = 1 << 16
PRODUCTS = "kernels --shapes 96x160 --batch 1,2 --k 1,2 --repeats 2 --lowrank 0.55 --json".split()
# Block linears, and all parameters of the published model with its norms.
PUBLISHED = {
    "llama2-7b": (6_476_005_376, 6_738_415_616),
    "llama2-13b": (12_687_769_600, 13_015_864_320),
    "llama3-8b": (6_979_321_856, 8_030_261_248),
    "llama3.2-1b": (973_078_528, 1_235_814_400),
    "tinyllama-1.1b": (968_884_224, 1_100_048_384),
    "gemma3-1b": (697_761_792, 999_885_952),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A small cache, so that little memory exceeds it."""
    monkeypatch.setattr(bench_matmul, "last_level_cache", lambda: (CACHE, "of this test"))


def result(arguments, capsys):
    bench.run(arguments)
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and out.endswith("\n")
    found = json.loads(out)
    assert list(found) == ["device", "date", "versions", "command", "rows"]
    assert found["command"] == " ".join(["python -m experiments.bench", *arguments])
    return found["rows"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_models_have_the_published_sizes(name):
    linears, total = PUBLISHED[name]
    config = bench_shapes.model_config(name)
    shapes = bench_shapes.linears(config, name)
    block = sum(shape.inputs * shape.outputs for shape in shapes)
    assert config.n_layers * block == linears
    tables = config.vocab_size * config.d_model * (1 if config.tied_head else 2)
    # Gemma 3 has four norms in a block and one each for queries and keys.
    norms = 4 * config.d_model + 2 * config.head_dim if "gemma" in name else 2 * config.d_model
    assert linears + tables + config.n_layers * norms + config.d_model == total


def test_a_model_means_the_joined_linears_of_its_block():
    found = bench_shapes.parse_shapes("tinyllama-1.1b,300x77,tinyllama-1.1b")
    assert [(s.name.split()[-1], s.inputs, s.rows, s.limbs) for s in found] == [
        ("q+k+v", 2048, (2048, 256, 256), 2), ("o", 2048, (2048,), 2),
        ("gate+up", 2048, (5632, 5632), 2), ("down", 5632, (2048,), 3), ("300x77", 300, (77,), 2)]


@pytest.mark.more
def test_rows_of_products_by_contract(capsys):
    rows = result(PRODUCTS, capsys)
    own = "cpu" if library() is None else "native"
    names = ["dense_bf16", "dense_f32", own, own, "lowrank_0.55"]
    assert [row["impl"] for row in rows] == names * 2
    assert [row["k"] for row in rows] == [None, None, 1, 2, 2] * 2
    assert [row["batch"] for row in rows] == [1] * 5 + [2] * 5
    size = {1: 160 * 32 + 2 * (160 + 96), 2: 2 * (160 * 32 + 2 * (160 + 96))}
    for n, row in enumerate(rows):
        assert set(bench_matmul.KEYS) <= set(row)
        assert row["shape"] == [96, 160] and row["repeats"] == 2
        assert row["rotation_bytes"] > 4 * CACHE
        seconds = row["microseconds"] / 1e6
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / seconds / 1e9)
        bf16, f32 = (rows[5 * (n // 5) + m]["microseconds"] for m in (0, 1))
        assert row["ratio_to_bf16"] == pytest.approx(bf16 / row["microseconds"])
        assert row["ratio_to_f32"] == pytest.approx(f32 / row["microseconds"])
        assert 0 < row["error"] < (3e-3 if row["impl"] == "dense_bf16" else 1e-3)
        assert row["impl"] != "cpu" or row["bytes"] == size[row["k"]]
    copy = {round(row["gb_per_s"] / row["bandwidth_share"], 6) for row in rows[:5]}
    assert len(copy) == 1


def test_table_shows_rows_and_the_reason_of_what_cannot_run(capsys):
    arguments = ("kernels --shapes 64x96 --batch 1,2 --impl cpu,pallas_int8 --repeats 1 "
                 "--lowrank none")
    bench.run(arguments.split())
    out = capsys.readouterr().out
    assert all(text in out for text in ("64x96", "dense_bf16", "x f32", "median of 1 calls"))
    (line,) = (line for line in out.splitlines() if line.startswith("pallas_int8, batch 1, 2: "))
    assert "NVIDIA" in line and "│ pallas" not in out
    rows = result([*arguments.split(), "--json"], capsys)
    refused = [row for row in rows if row["impl"] == "pallas_int8"]
    assert len(refused) == 2 and all("NVIDIA" in row["refused"] for row in refused)
    assert all(row[key] is None for row in refused for key in bench_matmul.KEYS[4:])


def test_error_shows_a_broken_product(monkeypatch):
    right = cpu.signs_matmul
    monkeypatch.setattr(cpu, "signs_matmul", lambda *a: right(*a) * 1.01)
    shape = bench_shapes.Shape("x", 300, (40, 24), 3)
    errors = {case.impl: case.error()
              for case in bench_matmul.build(shape, 1, [2], ["cpu", "reference"], [])}
    assert 0.009 < errors["cpu"] < 0.011 and errors["reference"] < 1e-6
    assert math.isnan(bench_case.relative_error(jnp.array([1.0, math.nan]), np.ones(2)))


def test_a_product_that_is_not_finite_is_told(monkeypatch, capsys):
    monkeypatch.setattr(reference, "signs_matmul", lambda u, b, g, *_: u[:, 0, 0, :1] * math.nan
                        + jnp.zeros((1, g.shape[-1])))
    arguments = "kernels --shapes 16x24 --impl reference --repeats 1 --lowrank none --json"
    rows = result(arguments.split(), capsys)
    assert rows[2]["refused"] == "the product is not finite" and rows[2]["microseconds"] is None


@pytest.mark.parametrize("impl", ["native", "cpu", "reference"])
def test_numpy_reads_the_bits_as_the_layout_says(impl):
    shape, rows = bench_shapes.Shape("x", 300, (40, 24)), np.array([0, 7, 63])
    weight = bench_weights.signs(shape, 2, bench_matmul.layout_of(impl, on_cpu=True))
    got = bench_weights.unpack(as_rows(weight.bits, shape.rows, 300)[0, 1], 300, rows)
    plain = bench_weights.signs(shape, 2, lambda bits, rows, inputs: bits).bits[0, 1]
    np.testing.assert_array_equal(got, 2.0 * np.asarray(unpack_bits(plain, 300))[rows] - 1)


@pytest.mark.parametrize("stacked", [False, True])
def test_each_call_reads_other_weights(stacked):
    weight = jnp.ones((1, 4, 4)) if stacked else jnp.ones((4, 4))
    case = bench_case.Case("x", 2, None, None, weight, (jnp.ones((1, 4)),) * 2, stacked)
    case.rotate(5)
    assert case.bytes * case.copies == 5 * 64
    assert sum(w.nbytes for (w,) in case.rotation) == 5 * 64
    seen = []

    def program(xs, weights, layers):
        assert len(weights) == (1 if stacked else 2)
        places = (w.unsafe_buffer_pointer() for (w,) in weights)
        seen.extend(map(int, layers) if stacked else places)

    case.program = program
    for _ in range(5):
        case.run()
    assert len(set(seen)) == 5 and seen[:5] == seen[5:]


def test_rotation_exceeds_four_caches_or_its_share_of_memory():
    sizes, products = [1000, 5_000_000], [1, 1]
    wanted, given = bench_matmul.copies_of(sizes, products, CACHE, 1 << 30)
    assert given == wanted == [4 * CACHE // 1000 + 1, 1]
    # On a GPU a call reads no weight twice where that costs little.
    wanted, _ = bench_matmul.copies_of([1 << 25, 1 << 30], [16, 16], 1 << 26, 1 << 40)
    assert wanted == [16, 1]
    wanted, given = bench_matmul.copies_of([1 << 20], [1], 1 << 25, 1 << 27)
    assert wanted == [129] and given == [64]
    with pytest.raises(BadInput, match="one weight of each kind takes 5.00 GB, more than half"):
        bench_matmul.copies_of([5 * 10**9], [1], CACHE, 6 * 10**9)


def test_last_level_cache_of_linux_and_of_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_device.os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    for core, shared in ((0, "0-1"), (1, "0-1"), (2, "2-3")):
        for index, (level, size) in enumerate(((1, "48K"), (2, "1024K"), (3, "32768K"))):
            folder = tmp_path / f"cpu{core}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            (folder / "level").write_text(f"{level}\n")
            (folder / "size").write_text(f"{size}\n")
            (folder / "shared_cpu_list").write_text(f"{shared if level == 3 else core}\n")
    assert bench_device.linux_cache(tmp_path) == (2 * 32768 * 1024, "level 3 as Linux tells")
    assert bench_device.linux_cache(tmp_path / "none")[0] == 64 << 20
    assert bench_device.nvidia_cache("NVIDIA GeForce RTX 4090")[0] == 72 << 20
    assert bench_device.nvidia_cache("NVIDIA L40S")[0] == 96 << 20
    assert bench_device.nvidia_cache("NVIDIA H200")[0] == 64 << 20
    assert bench_device.nvidia_cache("something else")[0] == 64 << 20


def test_save_keeps_the_other_modes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "results")
    row = {**dict.fromkeys(bench_matmul.KEYS), "refused": "not here"}
    monkeypatch.setattr(bench_matmul, "measure", lambda *a: [row])
    monkeypatch.setattr(bench_decode, "measure", lambda *a: [{"model": "tiny"}])
    for arguments in (PRODUCTS, ["decode", "--json"], PRODUCTS):
        bench.run([*arguments, "--save"])
    (file,) = (tmp_path / "results").iterdir()
    held = json.loads(file.read_text())
    assert set(held) == {"products", "decode"} and held["decode"]["rows"] == [{"model": "tiny"}]
    for found in held.values():
        assert {"date", "versions", "command", "driver"} <= set(found) and found["driver"]


def test_aot_prints_the_table_of_its_rows(monkeypatch, capsys):
    figures = {**dict.fromkeys(aot.COLUMNS), "spills": 7, "instructions_per_bit": 0.12345}
    made = [{**figures, "arch": arch} for arch in ("sm_89", "sm_90")]
    monkeypatch.setattr(aot, "report", lambda archs: made[:len(archs)])
    bench.run(["aot", "--archs", "sm_89,sm_90"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*aot.COLUMNS, "sm_89", "sm_90", "0.1235"))
    assert result(["aot", "--archs", "sm_89,sm_90", "--json"], capsys) == made
    assert result(["aot", "--archs", "sm_89", "--json"], capsys) == made[:1]


def test_libraries_are_told_where_they_are_missing(monkeypatch):
    monkeypatch.setattr(torch_cases.importlib.util, "find_spec", lambda name: None)
    [told] = set(torch_cases.missing().values())
    assert told == "torch is not installed, so gemlite and Humming have no rows"
    assert torch_cases.cases(256, 256, 1) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [("kernels --shapes llama", "shape is 'llama': choose llama2-7b, .*4096x11008"),
     ("kernels --shapes 0x12", "shape is '0x12'"),
     ("kernels --batch 1,two", "--batch has 'two', wanted whole numbers from 1 to 4096"),
     ("kernels --batch 0", "--batch has '0'"),
     ("kernels --k 5", "--k has '5', wanted whole numbers from 1 to 4"),
     ("kernels --impl fast", "--impl has 'fast': choose auto, all, reference"),
     ("kernels --lowrank 0", "--lowrank has '0', wanted bits per weight above 0"),
     ("kernels --repeats 0", "--repeats is 0, wanted a positive integer"),
     ("decode --model llama", "model is 'llama': choose llama2-7b"),
     ("decode --layers 0", "--layers is 0, wanted a positive integer"),
     ("decode --context 5000", "--context has '5000', wanted whole numbers from 1 to 2048"),
     ("decode --context 4", "--context is 4, wanted at least the 8 tokens"),
     ("decode --shapes 12x12", "unrecognized arguments: --shapes 12x12"),
     ("kernels --context 128", "unrecognized arguments: --context 128"),
     ("aot --batch 2", "unrecognized arguments: --batch 2"),
     ("aot --archs H200", "'H200' is no architecture"),
     ("kernels --shapes 12x12x12", "shape is '12x12x12'"),
     ("kernels --speed", "unrecognized arguments: --speed")],
)
def test_wrong_options_are_one_sentence_and_exit_code_2(arguments, message, capsys):
    with pytest.raises(BadInput, match=message):
        bench.run(arguments.split())
    assert main_guard(lambda: bench.run(arguments.split())) == 2
    assert capsys.readouterr().out == ""
