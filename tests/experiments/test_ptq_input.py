"""Inputs that a post-training run refuses before it works, and what a dry run shows."""

import shutil

import pytest

from rabit_jax.experiments.engine import ptq as blockwise


@pytest.mark.parametrize(
    "overrides, said",
    [
        (("task=ptg",), "wanted one of 'qat', 'ptq'"),
        (("teacher.path=",), "set teacher.path"),
        (("teacher.path=/no/such/folder",), "no model folder /no/such/folder"),
        (("mesh.data=2",), "one device"),
        (("--force", "init"), "no stages"),
        (("task=qat", "calibrate.mode=none"), "task qat needs 'full'"),
        (("calibrate.mode=activation",), "calibrate.mode"),
        (("calibrate.length=64", "calibrate.batch_size=4000", "calibrate.sequences=4000"),
         "too short for one batch"),
        (("calibrate.length=128",), "the model has 64 positions"),
        (("evaluate.context=128",), "the model has 64 positions"),
        (("evaluate.models=[student]",), "evaluate.models[0]"),
        (("init.quantise=[head/kernel]",), "kernels of the blocks"),
        (("init.keep=[layers/.*/kernel]",), "no kernel to quantise"),
        (("init.quantise=[layers/nothing/kernel]",), "matches no parameter"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(overrides, said, ptq, place, capsys):
    assert ptq("name=bad", *overrides) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err
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
