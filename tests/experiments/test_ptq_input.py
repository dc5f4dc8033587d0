"""Inputs that a post-training run refuses before it works, and what a dry run shows."""

import json
import shutil

import pytest
import yaml

from rabit_jax.experiments.engine import ptq as blockwise
from rabit_jax.experiments.engine.settings import RunConfig
from rabit_jax.experiments.engine.text import Text
from rabit_jax.formats.tokenizer import load_tokenizer


@pytest.mark.parametrize(
    "overrides, said",
    [
        (("task=ptg",), "wanted one of 'qat', 'ptq'"),
        (("teacher.path=",), "set teacher.path"),
        (("teacher.path=/no/such/folder",), "no model folder /no/such/folder"),
        (("mesh.data=3",), "8 devices"),
        (("--force", "init"), "no stages"),
        (("task=qat", "calibrate.mode=none"), "task qat needs 'full'"),
        (("calibrate.mode=activation",), "calibrate.mode"),
        (("calibrate.length=64", "calibrate.batch_size=4000", "calibrate.sequences=4000"),
         "too short for one batch"),
        (("calibrate.length=128",), "the model has 64 positions"),
        (("evaluate.context=128",), "the model has 64 positions"),
        (("evaluate.models=[student]",), "evaluate.models[0]"),
        (("init.quantise=[head/kernel]",), "no kernel to quantise in the blocks"),
        (("init.keep=[layers/.*/kernel]",), "no kernel to quantise"),
        (("init.quantise=[layers/nothing/kernel]",), "matches no parameter"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(overrides, said, ptq, place, capsys):
    assert ptq("name=bad", *overrides) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err
    assert not (place / "runs" / "bad").exists()


def _edited(model, target, **fields):
    """A copy of a model folder with other fields in tokenizer_config.json; None takes one out."""
    folder = shutil.copytree(model, target)
    file = folder / "tokenizer_config.json"
    raw = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({name: value for name, value in raw.items() if value is not None}))
    return folder


def test_a_tokeniser_without_end_token_takes_the_models(ptq_model, tmp_path, read_config):
    folder = _edited(ptq_model, tmp_path / "m", eos_token=None, pad_token=None, bos_token=None)
    text = tmp_path / "text.txt"
    text.write_text("The file returns a list.")
    config = read_config(RunConfig, yaml.safe_dump({
        "task": "ptq", "teacher": {"path": str(folder)},
        "data": {"source": "files", "files": [str(text)], "cache": str(tmp_path / "cache")}}))
    assert load_tokenizer(folder).eos_token_id is None
    found = Text(config, None)
    assert found.tokenizer.eos_token_id == 0
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "eos_token_id": None}))
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert Text(config, None).tokenizer.eos_token_id == 5


def test_a_token_without_a_row_is_named_before_any_work(ptq, ptq_model, place, tmp_path, capsys):
    folder = shutil.copytree(ptq_model, tmp_path / "m")
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    (tmp_path / "text.txt").write_text((place / "train.txt").read_text() + "<extra>")
    assert ptq("name=bad", f"teacher.path={folder}", f"data.files=[{tmp_path}/text.txt]") == 2
    err = capsys.readouterr().err
    assert "holds the token '<extra>' with id 300, and the model's vocabulary ends at 299" in err
    assert not (place / "runs" / "bad").exists()


def test_a_disk_without_room_is_told_before_the_work(ptq, monkeypatch, capsys):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(blockwise.shutil, "disk_usage", lambda _: usage)
    assert ptq("name=full") == 2
    assert "set output to another disk" in capsys.readouterr().err


def test_a_dry_run_prints_the_table_and_writes_nothing(ptq, place, capsys):
    assert ptq("name=dry", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "layers/mlp/down/kernel" in out and "ResidualSign" in out and "task: ptq" in out
    assert not (place / "runs" / "dry").exists()
