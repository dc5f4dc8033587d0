"""Runs with a budget of bits, nested training, and the options that read and serve them."""

import json

import pytest
import yaml
from safetensors.numpy import load_file

from rabit_jax.errors import BadInput
from rabit_jax.experiments import evaluate, generate, run
from rabit_jax.experiments.bench import __main__ as bench
from rabit_jax.experiments.engine import tuning
from rabit_jax.experiments.engine.settings import Init, Qat
from rabit_jax.formats.packed_model import load_packed, packed_bytes
from rabit_jax.tree import weights_of
from rabit_jax.weights.budget import path_specs, stored_bits

BUDGET = ("init.spec.k=3", "init.budget=2.9")
TUNE = ("tune.epochs=1", "tune.sequences=12", "tune.held_out=4", "tune.batch_size=4",
        "tune.length=24")


def summary(place, name):
    return json.loads((place / "runs" / name / "summary.json").read_text())


def check_paths(folder, chosen, budget):
    """The packed model has the paths that were chosen, and these fit the budget."""
    nodes = {p: w for p, w in weights_of(load_packed(folder / "packed")[1]).items()}
    bits = weights = 0
    for path, ks in chosen.items():
        assert list(nodes[path].layer_k or (nodes[path].k,) * len(ks)) == ks
        shape = nodes[path].shape
        bits += sum(stored_bits(path_specs(Init().spec.__class__(k=3))[k - 1], shape[1:])
                    for k in ks)
        weights += shape[0] * shape[1] * shape[2]
    assert bits / weights <= budget
    found = packed_bytes(folder / "packed")["stored_bits_per_weight"]
    assert found == pytest.approx(bits / weights)
    return found


@pytest.fixture(scope="module")
def mixed(place, ptq):
    assert ptq("name=mixed", *BUDGET, "evaluate.models=[packed]") == 0
    return place / "runs" / "mixed"


def test_a_budget_is_spent_and_kept(mixed, place):
    chosen = json.loads((mixed / "stages" / "quantise.json").read_text())["result"]["k"]
    found = check_paths(mixed, chosen, 2.9)
    assert found > 2.6 and len({k for ks in chosen.values() for k in ks}) > 1
    told = summary(place, "mixed")
    assert told["k"] == chosen
    assert told["packed"]["stored_bits_per_weight"] == pytest.approx(found)
    assert told["cost"]["bytes"] == packed_bytes(mixed / "packed")["linear_bytes"]
    assert not list((mixed / "blocks").glob("option-*"))


@pytest.mark.more
def test_tuning_keeps_the_paths_and_a_stopped_run_gives_the_same(mixed, place, ptq):
    assert ptq("name=mixed-tuned", *BUDGET, *TUNE, "evaluate.models=[packed]") == 0
    folder = place / "runs" / "mixed-tuned"
    chosen = json.loads((mixed / "stages" / "quantise.json").read_text())["result"]["k"]
    check_paths(folder, chosen, 2.9)
    one, other = (load_file(f / "packed" / "model.safetensors") for f in (mixed, folder))
    assert {n: a.shape for n, a in one.items()} == {n: a.shape for n, a in other.items()}


def test_a_budget_that_the_paths_cannot_use_is_refused(place, ptq, capsys):
    assert ptq("name=refused", "init.spec.k=2", "init.budget=5.5") == 2
    assert "the budget is 5.5 bits per weight, wanted" in capsys.readouterr().err


@pytest.mark.more
def test_the_scales_of_nested_paths_train_behind_tuning(place, ptq, capsys):
    short = ("end_to_end.steps=6", "end_to_end.batch_size=4", "end_to_end.length=24",
             "end_to_end.log_every=1", "evaluate.models=[teacher,packed]")
    assert ptq("name=cut", "init.spec.k=3", *TUNE, *short, "end_to_end.nested=[1,3]") == 0
    told, lines = summary(place, "cut"), capsys.readouterr().out
    assert "the first 1 of its paths" in lines
    kl = [json.loads(line)["kl_1"] for line in
          (place / "runs" / "cut" / "metrics.jsonl").read_text().splitlines() if "kl_1" in line]
    assert len(kl) == 6 and kl[-1] < kl[0]
    assert set(told["nested"]) == {"1", "3"}
    assert told["nested"]["3"]["ppl"] == pytest.approx(told["packed"]["ppl"], rel=1e-5)
    assert told["nested"]["1"]["ppl"] > told["nested"]["3"]["ppl"]
    windows = ["--model", str(place / "runs" / "cut" / "packed"), "--paths", "1", "--ppl",
               f"file:{place / 'eval.txt'}", "--context", "32", "--limit", "6", "--json"]
    assert evaluate.main(windows) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    found = next(row["value"] for row in rows if row["metric"] == "perplexity")
    assert found == pytest.approx(told["nested"]["1"]["ppl"], rel=2e-3)


def test_nested_tuning_crashed_and_resumed_is_the_uninterrupted_run(place, ptq, monkeypatch):
    own = ("init.spec.k=3", *TUNE, "tune.nested=[1,3]", "evaluate.models=[packed]")
    assert ptq("name=together", *own) == 0
    whole, told = place / "runs" / "together", summary(place, "together")
    assert set(told["nested"]) == {"1", "3"}
    assert told["nested"]["3"]["ppl"] == pytest.approx(told["packed"]["ppl"], rel=1e-5)
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    blocks = [record for record in records if record["stage"] == "tune"]
    for record in blocks:
        assert record["after_1"] > record["after_3"]
        mean = (record["after_1"] * record["after_3"]) ** 0.5
        assert record["after"] == pytest.approx(mean, rel=1e-5) and mean < record["before"]

    real = tuning.Sweep.forward

    def broken(sweep, n, params):
        if sweep.prefix == "student-" and n == 1:
            raise RuntimeError("crashed")  # the states of one path are there, of three not
        real(sweep, n, params)

    monkeypatch.setattr(tuning.Sweep, "forward", broken)
    with pytest.raises(RuntimeError, match="crashed"):
        ptq("name=crashed", *own)
    monkeypatch.undo()
    assert ptq("name=crashed", *own, "--resume") == 0
    one, other = (load_file(place / "runs" / name / "packed" / "model.safetensors")
                  for name in ("together", "crashed"))
    assert all((one[n] == other[n]).all() for n in other)
    assert not list((place / "runs" / "crashed" / "tune").glob("*x-*"))


@pytest.mark.more
def test_inputs_of_the_teacher_serve_every_nested_model(place, ptq):
    own = ("init.spec.k=2", *TUNE, "tune.nested=[1,2]", "evaluate.models=[packed]")
    assert ptq("name=given", *own, "tune.inputs=teacher") == 0
    assert set(summary(place, "given")["nested"]) == {"1", "2"}


@pytest.mark.more
def test_under_a_budget_no_layer_need_have_the_most_nested_paths(place, ptq):
    assert ptq("name=few", "init.spec.k=3", "init.budget=1.65", *TUNE, "end_to_end.steps=2",
               "end_to_end.batch_size=4", "end_to_end.length=24", "end_to_end.nested=[1,2,3]",
               "evaluate.models=[packed]") == 0
    told = summary(place, "few")
    assert max(k for ks in told["k"].values() for k in ks) == 2
    assert told["nested"]["3"] == told["nested"]["2"]
    assert told["nested"]["2"]["ppl"] == pytest.approx(told["packed"]["ppl"], rel=1e-5)


def test_nested_paths_that_the_weights_have_not_are_refused(place, ptq, capsys):
    assert ptq("name=refused", "end_to_end.steps=2", "end_to_end.nested=[1,5]") == 2
    assert "end_to_end.nested is [1, 5], and the weights have 2" in capsys.readouterr().err
    assert ptq("name=refused", *TUNE, "tune.nested=[1]") == 2
    assert "tune.nested is [1], and the weights have 2" in capsys.readouterr().err


@pytest.fixture(scope="module")
def nested(place):
    config = yaml.safe_load((place / "config.yaml").read_text())
    config |= {"name": "nested"}
    file = place / "nested.yaml"
    file.write_text(yaml.safe_dump(config))
    assert run.main(["--config", str(file), "init.spec.k=3", "init.budget=2.9",
                     "qat.nested=[1,3]", "qat.nested_weights=[1,2]",
                     "evaluate.baselines=false"]) == 0
    return place / "runs" / "nested"


@pytest.mark.more
def test_a_nested_run_scores_every_size_and_the_file_gives_them(nested, place, capsys):
    told = summary(place, "nested")
    assert told["packed"]["bits_identical"] and told["disordered"] < 0.5
    check_paths(nested, told["k"], 2.9)
    found = told["nested"]
    assert set(found) == {"1", "3"}
    assert found["1"]["stored_bits_per_weight"] < found["3"]["stored_bits_per_weight"] <= 2.9
    lines = [json.loads(line) for line in (nested / "metrics.jsonl").read_text().splitlines()]
    assert all("kl_1" in line for line in lines if line["stage"] == "qat")
    evaluated = ["--model", str(nested / "packed"), "--ppl", f"file:{place / 'eval.txt'}",
                 "--context", "32", "--limit", "16", "--json"]
    scores = []
    for more in ([], ["--paths", "3"], ["--paths", "1"]):
        assert evaluate.main([*evaluated, *more]) == 0
        rows = json.loads(capsys.readouterr().out)["rows"]
        scores.append(next(row["value"] for row in rows if row["metric"] == "perplexity"))
    assert scores[0] == scores[1] != scores[2]
    assert scores[2] == pytest.approx(found["1"]["ppl"], rel=2e-3)
    for more in (["--paths", "1", "--cache-bits", "8"], ["--cache-bits", "4"]):
        assert generate.main(["--model", str(nested / "packed"), "--prompt", "The file",
                              "--max-new-tokens", "4", "--greedy", *more]) == 0
    assert generate.main(["--model", str(nested / "packed"), "--prompt", "x", "--paths", "4"]) == 2
    assert "paths is 4" in capsys.readouterr().err


@pytest.mark.more
def test_the_benchmark_of_caches_scores_as_evaluation_does(nested, place, capsys):
    text = ["--model", str(nested / "packed"), "--context", "32"]
    assert evaluate.main([*text, "--ppl", f"file:{place / 'eval.txt'}", "--limit", "4",
                          "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    want = next(row["value"] for row in rows if row["metric"] == "perplexity")
    assert bench.main(["cache", *text, "--text", f"file:{place / 'eval.txt'}", "--windows", "4",
                       "--repeats", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["rows"]
    assert [row["cache_bits"] for row in found] == [16, 8, 4]
    assert found[0]["ppl"] == pytest.approx(want, rel=1e-3)
    for row, rel in zip(found[1:], (0.01, 0.2), strict=True):
        assert row["ppl"] == pytest.approx(want, rel=rel) and row["ppl"] != found[0]["ppl"]
    # 64 values of a head: 8.25 and 5 bits each.
    assert [row["bytes_ratio"] for row in found[1:]] == pytest.approx([66 / 128, 40 / 128])


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(BadInput, match="name each number of paths once"):
        Qat(nested=(1, 1))
    with pytest.raises(BadInput, match="2 weights for the 1 numbers of paths"):
        Qat(nested=(2,), nested_weights=(1.0, 2.0))
    with pytest.raises(BadInput, match="nothing would train"):
        Qat(nested=(1, 2), nested_weights=(0.0, 0.0))
    assert Qat(nested=(2, 1), nested_weights=(3.0, 1.0)).prefixes == {1: 1.0, 2: 3.0}
