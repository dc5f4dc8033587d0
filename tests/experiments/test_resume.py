"""Skipping, forcing, redoing, stopping and resuming a run."""

import dataclasses
import json
import shutil

import pytest

from rabit_jax.experiments.engine import fitting, qat, stages
from rabit_jax.experiments.engine.folder import RunFolder
from rabit_jax.experiments.engine.settings import RunConfig

STAGES = {stage.name: stage for stage in qat.STAGES}


def ids(folder):
    return {p.stem: json.loads(p.read_text())["id"] for p in (folder / "stages").glob("*.json")}


def test_a_second_run_skips_every_stage(finished, place, capsys, run):
    before = ids(finished)
    assert run(place) == 0
    assert ids(finished) == before
    assert capsys.readouterr().err.count("skipped") == len(qat.STAGES)


def test_a_stage_is_complete_whatever_its_card_says(tmp_path):
    folder = RunFolder(RunConfig(name="run", output=str(tmp_path)))
    packed = folder.path / "packed"
    packed.mkdir(parents=True)
    for name in ("model.safetensors", "README.md"):
        (packed / name).write_text("short")
    stages.complete(folder, STAGES["pack"], {"key": "a", "id": "a", "result": {}})
    (packed / "README.md").write_text("written again from the summary, then edited")
    assert stages.completed(folder, STAGES["pack"], "a")
    (packed / "model.safetensors").write_text("another")
    assert not stages.completed(folder, STAGES["pack"], "a")


def test_packing_makes_post_training_of_the_same_folder_pack_again(tmp_path):
    folder = RunFolder(RunConfig(name="run", output=str(tmp_path)))
    note = folder.path / "blocks" / "packed.json"
    note.parent.mkdir(parents=True)
    note.write_text("{}")
    stages.begin(folder, STAGES["evaluate"], stages.Read("evaluate", {}), resume=False)
    assert note.exists()
    stages.begin(folder, STAGES["pack"], stages.Read("pack", {}), resume=False)
    assert not note.exists()


@pytest.mark.more
def test_a_change_redoes_what_depends_on_it(finished, place, run):
    before = ids(finished)
    assert run(place, "generate.max_new_tokens=4", "--force", "pack") == 0
    after = ids(finished)
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"pack", "generate"}


@pytest.mark.slow
def test_a_changed_start_or_training_reaches_the_results(finished, place, run):
    before = json.loads((finished / "summary.json").read_text())
    plain = ("init.spec.rounds=0", "init.spec.a_in=0", "init.spec.a_out=0", "qat.steps=2")
    assert run(place, *plain) == 0
    after = json.loads((finished / "summary.json").read_text())
    assert after["init"]["ppl"] == after["greedy"]["ppl"] == before["greedy"]["ppl"]
    assert before["init"]["ppl"] != before["greedy"]["ppl"]
    assert run(place, *plain, "qat.optimizer.lr=3e-3") == 0
    faster = json.loads((finished / "summary.json").read_text())
    assert len({s["qat"]["ppl"] for s in (before, after, faster)}) == 3
    assert faster["packed"]["ppl"] == pytest.approx(faster["qat"]["ppl"], rel=5e-3)
    assert faster["init"] == after["init"]


@pytest.mark.slow
def test_a_given_teacher_gives_the_run_of_the_trained_one(finished, place, tmp_path, capsys, run):
    assert run(place) == 0
    trained = json.loads((finished / "summary.json").read_text())
    folder = tmp_path / "model"
    shutil.copytree(finished / "teacher", folder)
    given = ("name=given", f"teacher.path={folder}")
    assert run(place, *given) == 0
    found = json.loads((place / "runs" / "given" / "summary.json").read_text())
    for name in ("teacher", "init", "qat", "packed"):
        assert found[name]["ppl"] == trained[name]["ppl"]
    assert found["tokens"]["teacher"] == 0
    # Another model in that folder is noticed, whatever its date.
    capsys.readouterr()
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 7]}')
    assert run(place, *given) == 0
    assert "skipped" not in capsys.readouterr().err


def test_resume_with_a_changed_config_shows_the_difference(finished, place, capsys, run):
    assert run(place) == 0  # the config of the folder is the file's again
    before = ids(finished)
    assert run(place, "--resume", "qat.steps=9") == 2
    assert "qat.steps: 8 -> 9" in capsys.readouterr().err
    assert ids(finished) == before


def stop_at_six(monkeypatch):
    """Make QAT behave as if Ctrl-C came during its sixth step."""
    train = fitting.train

    def stopped(loop, *arguments):
        steps = []
        halted = dataclasses.replace(loop, stop=lambda: steps.append(1) or len(steps) >= 6)
        return train(halted if loop.stage == "qat" else loop, *arguments)

    monkeypatch.setattr(fitting, "train", stopped)


def cut_largest_file(folder):
    file = max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    file.write_bytes(file.read_bytes()[:100])


def test_stopped_damaged_and_resumed_is_the_uninterrupted_run(
    finished, place, monkeypatch, capsys, run
):
    assert run(place) == 0
    with monkeypatch.context() as patch:
        stop_at_six(patch)
        assert run(place, "name=stopped") == 75
    assert "--resume" in capsys.readouterr().err
    folder = place / "runs" / "stopped"
    cut_largest_file(folder / "checkpoints" / "qat" / "6")
    assert run(place, "name=stopped", "--resume") == 0
    err = capsys.readouterr().err
    assert "qat/6 cannot be read" in err and "continuing after step 4" in err
    whole, parts = [json.loads((f / "summary.json").read_text()) for f in (finished, folder)]
    assert whole["qat"] == parts["qat"] and whole["packed"]["ppl"] == parts["packed"]["ppl"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["stage"] == "qat"] == list(range(1, 9))
    assert [line["step"] for line in lines if line["stage"] == "diagnostics"] == [1, 5, 8]


@pytest.mark.more
def test_resume_never_throws_a_stopped_stage_away(place, monkeypatch, capsys, run):
    text = place / "train.txt"
    before = text.read_text()
    with monkeypatch.context() as patch:
        stop_at_six(patch)
        assert run(place, "name=kept") == 75
    text.write_text(before + "\n\nOne more sentence about files.")
    assert run(place, "name=kept", "--resume") == 2
    text.write_text(before)
    assert "since stage qat was stopped" in capsys.readouterr().err
    assert (place / "runs" / "kept" / "checkpoints" / "qat" / "6").exists()


def test_a_stage_whose_files_are_gone_is_done_again(finished, place, capsys, run):
    assert run(place) == 0
    capsys.readouterr()
    (finished / "packed" / "model.safetensors").unlink()
    assert run(place) == 0
    err = capsys.readouterr().err
    assert "qat: complete" in err and "pack: complete" not in err
    assert (finished / "packed" / "model.safetensors").exists()


@pytest.mark.more
def test_a_damaged_student_names_the_stage_to_force(finished, place, capsys, run):
    state = finished / "checkpoints" / "student"
    file = max((f for f in state.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    assert run(place, "--force", "evaluate") == 2
    assert "--force qat" in capsys.readouterr().err
    assert not (finished / "summary.json").exists()
    assert run(place, "--force", "qat") == 0
