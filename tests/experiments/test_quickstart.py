"""The shipped quickstart: cheap checks of its config, and the whole of it as a slow test."""

import json
import math
from pathlib import Path

import pytest

from experiments import run as command
from experiments.config import load_config
from experiments.settings import RunConfig

FILE = Path(__file__).parents[2] / "experiments" / "configs" / "quickstart.yaml"


def test_its_widths_pack_without_padding():
    shape = load_config(RunConfig, FILE).model
    assert shape.d_model % 256 == shape.d_hidden % 256 == shape.n_heads * shape.head_dim % 256 == 0


def test_dry_run_needs_no_text_beyond_the_tokeniser(tmp_path, capsys):
    overrides = [f"output={tmp_path}/runs", f"data.cache={tmp_path}/cache"]
    assert command.main(["--config", str(FILE), *overrides, "--dry-run"]) == 0
    assert "layers/mlp/down/kernel" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_it_reaches_what_it_promises(tmp_path):
    overrides = [f"output={tmp_path}/runs", f"data.cache={tmp_path}/cache"]
    # Eight simulated devices in this suite: the batch divides over them.
    assert command.main(["--config", str(FILE), *overrides]) == 0
    found = json.loads((tmp_path / "runs" / "quickstart" / "summary.json").read_text())
    assert found["parameters"]["non_embedding"] >= 1.5e6
    assert math.log(found["teacher"]["ppl"]) <= found["unigram_nats"] - 1.5
    assert found["gap_closed"] >= 0.6
    assert found["qat"]["ppl"] <= 1.1 * found["teacher"]["ppl"]
    assert found["init"]["ppl"] < found["greedy"]["ppl"] < found["round_to_nearest"]["ppl"]
    assert found["packed"]["ppl"] == pytest.approx(found["qat"]["ppl"], rel=5e-3)
    assert found["packed"]["bits_identical"]
