"""Metrics on Weights & Biases, with a stand-in for its package."""

import dataclasses
import json
import sys
import types

import pytest

from rabit_jax.errors import BadInput
from rabit_jax.experiments.engine.folder import RunFolder
from rabit_jax.experiments.engine.settings import RunConfig


class Run:
    def __init__(self, **settings):
        self.settings, self.id = settings, settings["id"] or f"new-{settings['project']}"
        self.lines, self.axes, self.open = [], {}, True

    def define_metric(self, name, step_metric):
        assert name not in self.axes
        self.axes[name] = step_metric

    def log(self, values):
        assert self.open
        self.lines.append(values)

    def finish(self, exit_code):
        self.open, self.exit_code = False, exit_code


@pytest.fixture
def runs(monkeypatch):
    """What was opened at the stand-in for wandb."""
    opened = []

    def init(**settings):
        opened.append(Run(**settings))
        return opened[-1]

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    return opened


@pytest.fixture
def config(tmp_path):
    return RunConfig(name="tiny", output=str(tmp_path), wandb="signs")


def trained(config, resume, *records):
    folder = RunFolder(config)
    folder.open(resume)
    for record in records:
        folder.metrics.log(record)
    folder.close()
    return folder


QAT = {"stage": "qat", "step": 10, "tokens": 640, "loss": 0.5, "layers": [1.0]}
WATCHED = {"stage": "diagnostics", "during": "qat", "step": 5, "tokens": 320, "flip_rate": 0.01}


def test_every_number_goes_to_its_stage_with_a_step_axis_of_its_own(runs, config):
    folder = trained(config, False, QAT, WATCHED, QAT)
    (run,) = runs
    assert (run.settings["project"], run.settings["name"]) == ("signs", "tiny")
    assert run.settings["config"]["qat"]["steps"] == config.qat.steps
    assert run.axes == {"qat/*": "qat/step", "diagnostics/*": "diagnostics/step"}
    assert run.lines == [
        {"qat/step": 10, "qat/tokens": 640, "qat/loss": 0.5},
        {"diagnostics/step": 5, "diagnostics/tokens": 320, "diagnostics/flip_rate": 0.01},
        {"qat/step": 10, "qat/tokens": 640, "qat/loss": 0.5},
    ]
    assert not run.open and run.exit_code == 0
    assert folder.metrics.lines() == [QAT, WATCHED, QAT]
    assert len(list((folder.path / "tensorboard" / "qat").iterdir())) == 1


def test_a_resumed_run_goes_on_and_a_new_one_begins_anew(runs, config):
    trained(config, False, QAT)
    trained(config, True, QAT)
    trained(config, False, QAT)
    assert [run.settings["id"] for run in runs] == [None, "new-signs", None]
    assert all(run.settings["resume"] == "allow" for run in runs)


def test_a_crashed_run_counts_as_failed(runs, config):
    folder = RunFolder(config)
    folder.open(False)
    with pytest.raises(ZeroDivisionError):
        try:
            folder.metrics.log(QAT)
            1 / 0  # noqa: B018
        finally:
            folder.metrics.close()
    assert runs[0].exit_code == 1


def test_a_run_that_skips_everything_opens_nothing(runs, config):
    trained(config, False)
    assert runs == []


def test_without_being_asked_for_it_is_not_even_imported(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # An import of it would fail.
    folder = trained(dataclasses.replace(config, wandb=""), False, QAT)
    assert json.loads((folder.path / "metrics.jsonl").read_text()) == QAT


def test_where_it_is_missing_one_sentence_says_what_to_install(config, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(BadInput, match="pip install wandb"):
        RunFolder(config).open(False)
    assert list(tmp_path.iterdir()) == []


def test_a_login_that_fails_is_told(config, monkeypatch):
    def init(**_):
        raise ConnectionError("no key")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with pytest.raises(BadInput, match="no key.*wandb login"):
        trained(config, False, QAT)


def test_an_existing_folder_is_told_apart(config, tmp_path, capsys):
    plain = dataclasses.replace(config, wandb="")
    trained(plain, False)
    trained(plain, False)
    assert capsys.readouterr().err == ""
    trained(dataclasses.replace(plain, seed=3), False)
    assert "seed: 0 -> 3" in capsys.readouterr().err
    with pytest.raises(BadInput, match="cannot resume .*seed: 3 -> 0"):
        RunFolder(plain).open(True)
    (tmp_path / "tiny" / "config.yaml").write_text("sed: 1")
    with pytest.raises(BadInput, match="cannot resume .*nearest key is 'seed'"):
        RunFolder(plain).open(True)
    (tmp_path / "other" / "packed").mkdir(parents=True)
    with pytest.raises(BadInput, match="holds packed but no config.yaml"):
        RunFolder(dataclasses.replace(plain, name="other")).open(False)
    assert not (tmp_path / "other" / "config.yaml").exists()
