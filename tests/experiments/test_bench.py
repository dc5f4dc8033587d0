"""Benchmarks at tiny sizes: the shape of their output and what their numbers are made of."""

import argparse
import json
import statistics

import jax
import numpy as np
import pytest

from rabit_jax import BadInput
from rabit_jax.experiments.bench import __main__ as bench
from rabit_jax.experiments.bench import step as bench_step
from rabit_jax.experiments.bench import svid as bench_svid
from rabit_jax.experiments.engine.console import main_guard
from rabit_jax.models.decoder import init_params

STEP = "step --width 64 --layers 1 --tokens 16 --vocab 32 --steps 3 --k 2 --gamma 0.5".split()
SVID = "svid --shape 48x64 --check-shape 40x56 --rounds 3".split()


def options(arguments):
    return bench.parser().parse_args(arguments)


@pytest.fixture(scope="module")
def variants():
    asked = options(STEP)
    built = bench_step.build(asked)
    bench_step.time_steps(built, asked.steps, argparse.Namespace(update=lambda *a, **k: None))
    return built


def test_stdout_is_one_json_object(capsys):
    bench.run([*SVID, "--json"])
    out = capsys.readouterr().out
    found = json.loads(out)
    assert out.count("\n") == 1 and out.endswith("\n")
    assert list(found) == ["device", "date", "versions", "command", "rows"]
    assert found["command"] == " ".join(["python -m experiments.bench", *SVID, "--json"])
    assert found["versions"]["jax"] == jax.__version__ and found["device"]
    keys = {"shape", "k", "rounds", "seconds", "reference_seconds", "speedup", "relative_error",
            "reference_relative_error", "extrapolated"}
    big, check = found["rows"]
    assert set(big) == set(check) == keys
    assert (big["shape"], big["extrapolated"]) == ([48, 64], True)
    assert (check["shape"], check["extrapolated"]) == ([40, 56], False)
    assert big["reference_relative_error"] is None
    for row in found["rows"]:
        assert row["k"] == 2 and row["rounds"] == 3 and row["seconds"] > 0
        assert row["speedup"] == pytest.approx(row["reference_seconds"] / row["seconds"])
    assert check["relative_error"] == pytest.approx(check["reference_relative_error"], rel=1e-3)


def test_without_json_a_table(capsys, monkeypatch):
    row = {**dict.fromkeys(bench_svid.COLUMNS), "shape": [48, 64], "k": 2, "speedup": 12.5}
    monkeypatch.setattr(bench_svid, "measure", lambda options: [row])
    bench.run(SVID)
    out = capsys.readouterr().out
    assert all(text in out for text in ("speedup", "48x64", "12.5", "-")) and "{" not in out


def test_extrapolation_is_one_svd_times_all_of_them(monkeypatch):
    fit = argparse.Namespace(error=0.1, rounds=10)
    monkeypatch.setattr(bench_svid, "time_svid", lambda w, k, rounds: (0.5, fit))
    monkeypatch.setattr(bench_svid, "timed", lambda function, *arguments: (1.5, None))
    found = bench_svid.row((12, 16), k=2, rounds=10, extrapolate=True)
    assert found["reference_seconds"] == 1.5 * 22
    assert found["speedup"] == 1.5 * 22 / 0.5


@pytest.mark.parametrize(("k", "rounds", "oracle"), [(1, 0, 1 - 2 / np.pi), (2, 5, 0.1176)])
def test_reference_rounds_reach_the_gaussian_oracle(k, rounds, oracle):
    w = bench_svid.gaussian((96, 128))
    # The scales of a finite matrix fit some of its noise: a little below the scalar oracle.
    assert 0.92 * oracle < bench_svid.reference(w, k, rounds) < oracle


@pytest.mark.more
def test_step_rows_by_contract(variants):
    rows = bench_step.rows_of(variants)
    assert [row["impl"] for row in rows] == ["dense", "residual", "independent"]
    contract = {"impl", "step_seconds", "step_time_ratio", "state_bytes", "state_bytes_ratio",
                "peak_memory_bytes"}
    for row, variant in zip(rows, variants.values(), strict=True):
        assert contract <= set(row)
        assert len(variant.seconds) == 3
        assert row["step_seconds"] == statistics.median(variant.seconds)
        assert row["step_seconds_min"] == min(variant.seconds)
        assert row["step_time_ratio"] == row["step_seconds"] / rows[0]["step_seconds"]
        assert row["state_bytes_ratio"] == row["state_bytes"] / rows[0]["state_bytes"]
        assert row["peak_memory_bytes"] >= row["state_bytes"]
    assert rows[0]["step_time_ratio"] == rows[0]["state_bytes_ratio"] == 1
    json.dumps(rows)


@pytest.mark.more
def test_state_bytes_are_latents_scales_and_optimiser_state(variants):
    d, f, k = 64, 192, 2
    shapes = [(d, d)] * 4 + [(d, f)] * 2 + [(f, d)]
    weights = sum(i * o for i, o in shapes)
    scales = k * sum(i + o for i, o in shapes)
    norms = 3 * d

    # Muon keeps one momentum, AdamW two moments; embedding and head are frozen. What is left over
    # are the counters of the step and of the schedules.
    def counted(latents, other):
        return 4 * (2 * latents + 3 * other)

    want = {"dense": counted(weights, norms), "residual": counted(weights, norms + scales),
            "independent": counted(k * weights, norms + scales)}
    for row in bench_step.rows_of(variants):
        assert 0 < row["state_bytes"] - want[row["impl"]] <= 64


@pytest.mark.more
def test_quantised_students_share_the_start_and_all_of_them_move(variants):
    config = bench_step.model_config(options(STEP))
    params = jax.jit(lambda key: init_params(config, key))(jax.random.key(0))
    start = bench_step.students(options(STEP), params)
    first = jax.tree.leaves(start["dense"]["layers"]["attn"]["q"])[0]
    nodes = [start[name]["layers"]["attn"]["q"]["kernel"] for name in ("residual", "independent")]
    np.testing.assert_array_equal(nodes[0].latent, first)
    np.testing.assert_array_equal(nodes[0].dense(), nodes[1].dense())
    for name, variant in variants.items():
        assert int(variant.state.step) == 4
        before, after = start[name], variant.state.trainable
        moved = jax.tree.map(lambda a, b: np.any(a != b), before["layers"], after["layers"])
        assert all(jax.tree.leaves(moved)), name
        assert after["embed"]["embedding"] is None and after["head"]["kernel"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [("step --width 100", "--width is 100, wanted a multiple of 64"),
     ("step --steps 0", "--steps is 0, wanted a positive integer"),
     ("step --tokens 700", "--tokens is 700, wanted at most 512 or a multiple of it"),
     ("step --gamma -1", "--gamma is -1.0, wanted 0 or more"),
     ("step --k 5 --width 64", "k is 5"),
     ("step --dtype int8", "invalid choice: 'int8'"),
     ("svid --rounds -1", "--rounds is -1, wanted 0 or more"),
     ("svid --shape 12", "'12' is no shape, wanted two sizes like 4096x11008"),
     ("stepp", "invalid choice: 'stepp'"),
     ("step --widht 64", "unrecognized arguments: --widht 64"),
     ("", "NAME")],
)
def test_wrong_options_are_one_sentence_and_exit_code_2(arguments, message, capsys):
    with pytest.raises(BadInput, match=message):
        bench.run(arguments.split())
    assert main_guard(lambda: bench.run(arguments.split())) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["step", "svid", "kernels", "decode", "aot", "server", "data"])
def test_help_has_examples_that_parse(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.run([name, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    examples = [line.split("bench ")[1].split(" >")[0] for line in text.splitlines()
                if line.startswith("  python -m experiments.bench")]
    assert len(examples) >= 2
    assert all(options(example.split()).name == name for example in examples)


def test_a_share_of_a_step_is_its_seconds_over_those_of_the_step(monkeypatch, capsys):
    from rabit_jax.experiments.bench import data as bench_data

    monkeypatch.setattr(bench_data, "step_seconds", lambda tokens: 1e6 * tokens)
    monkeypatch.setattr(bench_data, "tokenise_speed", lambda: 2.5)
    rows = bench_data.measure(options("data --text 2e5 --batches 2".split()))
    assert [(row["batch"], row["length"]) for row in rows] == list(bench_data.SHAPES)
    for row in rows:
        assert set(row) == set(bench_data.COLUMNS) and row["load_seconds"] > 0
        assert row["share_of_step"] == row["load_seconds"] / row["step_seconds"]
    assert "at most the 2%" in bench_data.remarks(rows)[0]
    assert "MORE THAN the 2%" in bench_data.remarks([{"share_of_step": 0.03}])[0]
