"""Checkpoints of random weights: read back like any model, the same for the same seed."""

import json

import numpy as np
import pytest

from rabit_jax import load_hf
from rabit_jax.experiments.bench import synthetic_checkpoint as command
from rabit_jax.experiments.bench.shapes import MODELS

TINY = {"d_model": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16,
        "d_hidden": 96, "vocab_size": 300, "max_position": 64}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", TINY)
    monkeypatch.setattr(command, "embedded_documents", lambda: ["low lower lowest the list"] * 9)
    monkeypatch.setattr(command, "SHARD_BYTES", 100_000)


def write(folder, *more):
    return command.main(["--model", "tiny", "--output", str(folder), *more])


def test_it_is_a_model_with_outliers_that_no_two_layers_share(tmp_path):
    for name, seed in (("one", "0"), ("same", "0"), ("other", "1")):
        assert write(tmp_path / name, "--seed", seed) == 0
    (model, one, tokenizer), (_, same, _), (_, other, _) = (
        load_hf(tmp_path / name) for name in ("one", "same", "other"))
    assert model.config.n_layers == 3 and len(tokenizer) <= 300
    assert model.config.eos_ids == (tokenizer.eos_token_id,)
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 1
    raw = json.loads((tmp_path / "one" / "config.json").read_text())
    assert raw["dtype"] == "bfloat16" and raw["intermediate_size"] == 96
    q, again, unlike = (np.asarray(p["layers"]["attn"]["q"]["kernel"]) for p in (one, same, other))
    assert q.shape == (3, 64, 64)
    np.testing.assert_array_equal(q, again)
    assert not np.array_equal(q, unlike) and not np.array_equal(q[0], q[1])
    sizes = np.sort(np.sqrt((q**2).mean(axis=2)), axis=1)
    assert (sizes[:, -4:] > 5 * sizes[:, -5:-4]).all()
    assert sizes[:, :-4].mean() == pytest.approx(0.02, rel=0.05)
    down = np.asarray(one["layers"]["mlp"]["down"]["kernel"])
    assert np.median(np.abs(down)) < 0.6 * np.median(np.abs(q))


def test_fewer_layers_are_the_first_of_all(tmp_path):
    assert write(tmp_path / "all") == 0 and write(tmp_path / "two", "--layers", "2") == 0
    every, two = (load_hf(tmp_path / name)[1]["layers"]["attn"]["k"]["kernel"]
                  for name in ("all", "two"))
    np.testing.assert_array_equal(every[:2], two)


def test_bad_input_is_told_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command.shutil, "disk_usage", lambda _: command.argparse.Namespace(free=9))
    assert write(tmp_path / "full") == 2
    assert "choose fewer --layers" in capsys.readouterr().err
    assert write(tmp_path / "none", "--layers", "0") == 2
    assert "n_layers is 0" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
