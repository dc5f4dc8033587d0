"""Run folders, packed folders, packed params and configs that version 0.1 wrote still load.

`made_by_0_1.tar.xz` was written by `make_0_1.py` with version 0.1 (Python 3.11, jax 0.10.2); the
logits and matrices in its `expected.npz` are what that version computed.
"""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from rabit_jax import dense, load_model, load_packed_params
from rabit_jax.experiments.engine.config import dump_yaml, load_config
from rabit_jax.experiments.engine.settings import RunConfig

ROOT = Path(__file__).parents[2]
ARCHIVE = Path(__file__).with_name("made_by_0_1.tar.xz")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The extracted archive as the working directory."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def expected(place):
    with np.load(place / "expected.npz") as arrays:
        return dict(arrays)


def command(file, *arguments):
    """Run the command in the extracted folder, on one device as in the old run."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("XLA_FLAGS", None)
    return subprocess.run(
        [sys.executable, "-m", "rabit_jax.experiments.run", "--config", file, *arguments],
        env=environment, capture_output=True, text=True, timeout=500,
    )


def run(file, *arguments):
    """The same, where it succeeds; returns stderr."""
    done = command(file, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stderr


def summary(folder):
    """The summary without what depends on machine and version: the bytes of the cost are those of
    the present format, whose rows have less padding."""
    found = json.loads((folder / "summary.json").read_text())
    assert found["cost"].pop("bytes") > 0
    for name in ("seconds", "peak_memory_bytes", "versions", "device", "command"):
        found.pop(name, None)
    return found


def changed(found, before, path=""):
    """What a summary held and holds no more; later versions add to it, also fields to a spec, and
    bits over the whole model no longer count the file's header."""
    if path == ".spec":
        fields = {line.strip("(), ") for line in found.replace("(", ",").split(",")}
        before = {line.strip("(), ") for line in before.replace("(", ",").split(",")}
        return sorted(before - fields)
    if not isinstance(before, dict):
        return [] if found == before or "whole_model" in path else [(path, found, before)]
    return [one for name in before
            for one in changed(found.get(name), before[name], f"{path}.{name}")]


def losses(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if line["stage"] == "qat"}


@pytest.mark.parametrize("name", ["tiny", "ptq"])
def test_a_resolved_config_reads_back_to_the_same_text(place, name):
    file = place / "runs" / name / "config.yaml"
    assert dump_yaml(load_config(RunConfig, file)) == file.read_text()


@pytest.mark.more
def test_a_finished_run_is_found_complete(place):
    folder = place / "runs" / "tiny"
    before, packed = summary(folder), (folder / "packed/model.safetensors").read_bytes()
    shown = run("tiny.yaml")
    stages = ("teacher", "calibrate", "init", "qat", "evaluate", "pack", "generate")
    assert all(f"{stage}: complete with the same inputs, skipped" in shown for stage in stages)
    assert changed(summary(folder), before) == []
    assert (folder / "packed/model.safetensors").read_bytes() == packed


@pytest.mark.more
def test_an_unfinished_training_by_another_loss_is_not_gone_on_with(place):
    folder = place / "runs" / "tiny"
    key = json.loads((folder / "stages/qat.json").read_text())["key"]
    for stage in ("qat", "evaluate", "pack", "generate"):
        (folder / f"stages/{stage}.json").unlink()
    (folder / "stages/qat.started").write_text(key)
    before = sorted((str(p), p.stat().st_mtime_ns) for p in (folder / "checkpoints").rglob("*"))
    refused = command("tiny.yaml", "--resume")
    assert refused.returncode == 2
    shown = " ".join(refused.stderr.split())
    assert "version 0.1 began stage qat, and its error of the hidden states was not" in shown
    assert before == sorted(
        (str(p), p.stat().st_mtime_ns) for p in (folder / "checkpoints").rglob("*"))


@pytest.mark.more
def test_a_finished_post_training_run_packs_nothing_again(place):
    folder = place / "runs" / "ptq"
    before, packed = summary(folder), (folder / "packed/model.safetensors").stat().st_mtime_ns
    run("ptq.yaml", "--resume")
    assert changed(summary(folder), before) == []
    assert (folder / "packed/model.safetensors").stat().st_mtime_ns == packed


@pytest.mark.parametrize("name", ["tiny", "ptq"])
def test_a_packed_folder_gives_the_same_logits(place, expected, name):
    model, params, tokenizer = load_model(place / "runs" / name / "packed")
    tokens = np.arange(24).reshape(2, 12) % 262
    found = model.apply({"params": params}, tokens)
    np.testing.assert_allclose(found, expected[name], rtol=1e-5, atol=1e-5)
    text = "The file returns a list"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_packed_params_of_every_representation_hold_the_same_matrices(place, expected):
    found = dense(load_packed_params(place / "every.safetensors"))
    matrices = {name: value for name, value in expected.items() if name not in ("tiny", "ptq")}
    assert set(found) == {*matrices, "norm"}
    for name, matrix in matrices.items():
        np.testing.assert_allclose(found[name]["kernel"], matrix, rtol=1e-6, atol=1e-7)
