"""The whole run in small: every stage, skipping, resuming, forcing, and bad input."""

import dataclasses
import json
import math
import random
import shutil
import signal

import pytest
import yaml

from experiments import inputs
from experiments import run as command
from rabit_jax.models import load_packed

NOUNS = "file list string module function object value error line number class method".split()
VERBS = "returns raises reads writes calls takes holds opens closes finds".split()


def story(seed, sentences):
    rng = random.Random(seed)
    return "\n\n".join(
        f"The {rng.choice(NOUNS)} {rng.choice(VERBS)} a {rng.choice(NOUNS)} {n} of "
        f"{rng.choice(NOUNS)}s and the {rng.choice(NOUNS)} {rng.choice(VERBS)} it."
        for n in range(sentences)
    )


def settings(folder):
    training = {"batch_size": 8, "length": 32, "save_every": 4, "log_every": 1}
    return {
        "name": "tiny",
        "output": str(folder / "runs"),
        "data": {
            "source": "files",
            "files": [str(folder / "train.txt")],
            "eval_files": [str(folder / "eval.txt")],
            "vocab_size": 300,
            "cache": str(folder / "cache"),
        },
        "model": {
            "d_model": 256,
            "n_layers": 2,
            "n_heads": 4,
            "n_kv_heads": 2,
            "head_dim": 64,
            "d_hidden": 256,
            "max_position": 64,
        },
        "teacher": {**training, "steps": 12, "optimizer": {"lr": 3e-3}},
        "calibrate": {"sequences": 16, "batch_size": 8, "length": 32},
        "init": {"spec": {"rounds": 10}},
        "qat": {**training, "steps": 8, "watch_every": 4, "optimizer": {"lr": 1e-3}},
        "evaluate": {"context": 32, "windows": 16, "diagnostic_windows": 8},
        "generate": {"prompts": ["The file"], "max_new_tokens": 5},
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "train.txt").write_text(story(0, 1500))
    (folder / "eval.txt").write_text(story(1, 150))
    (folder / "config.yaml").write_text(yaml.safe_dump(settings(folder)))
    return folder


@pytest.fixture(autouse=True)
def _signals():
    kept = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def run(place, *arguments):
    return command.main(["--config", str(place / "config.yaml"), *arguments])


@pytest.fixture(scope="module")
def finished(place):
    assert run(place) == 0
    return place / "runs" / "tiny"


def ids(folder):
    return {p.stem: json.loads(p.read_text())["id"] for p in (folder / "stages").glob("*.json")}


def test_a_run_leaves_what_the_contract_names(finished):
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "report.html",
        "checkpoints",
        "packed",
    ):
        assert (finished / name).exists(), name
    summary = json.loads((finished / "summary.json").read_text())
    for name in ("teacher", "init", "qat", "packed", "greedy", "round_to_nearest"):
        assert math.isfinite(summary[name]["ppl"]) and summary[name]["context"] == 32
        assert summary[name]["bits_per_byte"] > 0
    for name in ("init", "qat"):
        found = summary["diagnostics"][name]
        assert set(found["mean"]) >= {
            "path_correlation",
            "residual_alignment",
            "slope",
            "relative_mse",
        }
        assert len(found["layers"]["layers/attn/q"]["path_correlation"]) == 2
    assert summary["tokens"] == {"teacher": 3072, "calibrate": 512, "qat": 2048}
    assert summary["peak_memory_bytes"] > 0 and set(summary["seconds"]) == set(command.STAGES)


def test_the_teacher_learns_and_the_packed_model_is_the_student(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert math.log(summary["teacher"]["ppl"]) < summary["unigram_nats"]
    assert summary["packed"]["bits_identical"]
    assert summary["packed"]["ppl"] == pytest.approx(summary["qat"]["ppl"], rel=5e-3)


def test_bits_per_weight_are_counted_from_the_file(finished):
    packed = json.loads((finished / "summary.json").read_text())["packed"]
    sizes = {
        "q": (256, 256),
        "k": (256, 128),
        "v": (256, 128),
        "o": (256, 256),
        "gate": (256, 256),
        "up": (256, 256),
        "down": (256, 256),
    }
    bits = sum(2 * i * o + 32 * (i + o) for i, o in sizes.values())
    wanted = bits / sum(i * o for i, o in sizes.values())
    assert packed["bits_per_weight"] == pytest.approx(wanted, rel=1e-12)
    assert packed["stored_bits_per_weight"] == pytest.approx(wanted, rel=1e-12)
    assert packed["bytes"] == (finished / "packed" / "model.safetensors").stat().st_size


def test_metrics_have_the_agreed_keys(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    qat = [line for line in lines if line["stage"] == "qat"]
    assert [line["step"] for line in qat] == list(range(1, 9))
    assert set(qat[-1]) >= {
        "stage",
        "step",
        "tokens",
        "loss",
        "kl",
        "hidden_mse",
        "lr",
        "grad_norm",
        "tokens_per_second",
    }
    watched = [line for line in lines if line["stage"] == "diagnostics"]
    assert [line["step"] for line in watched] == [1, 5, 8]
    assert all(0 <= line["flip_rate"] < 0.5 for line in watched)


def test_the_samples_of_the_report_come_from_the_packed_folder(finished):
    _, params, tokenizer = load_packed(finished / "packed")
    record = json.loads((finished / "stages" / "generate.json").read_text())
    assert record["result"]["samples"][0]["packed"] and tokenizer is not None
    assert str(params["layers"]["attn"]["q"]["kernel"].bits.dtype) == "uint8"
    assert "The file" in (finished / "report.html").read_text()


def test_a_second_run_skips_every_stage(finished, place, capsys):
    before = ids(finished)
    assert run(place) == 0
    assert ids(finished) == before
    assert capsys.readouterr().err.count("skipped") == len(command.STAGES)


def test_a_change_redoes_what_depends_on_it(finished, place):
    before = ids(finished)
    assert run(place, "generate.max_new_tokens=4", "--force", "pack") == 0
    after = ids(finished)
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"pack", "generate"}


def test_a_changed_start_or_training_reaches_the_results(finished, place):
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


def test_a_given_teacher_gives_the_run_of_the_trained_one(finished, place, tmp_path, capsys):
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


def test_resume_with_a_changed_config_shows_the_difference(finished, place, capsys):
    assert run(place) == 0  # the config of the folder is the file's again
    before = ids(finished)
    assert run(place, "--resume", "qat.steps=9") == 2
    assert "qat.steps: 8 -> 9" in capsys.readouterr().err
    assert ids(finished) == before


def stop_at_six(monkeypatch):
    """Make QAT behave as if Ctrl-C came during its sixth step."""
    train = inputs.train

    def stopped(loop, *arguments):
        steps = []
        halted = dataclasses.replace(loop, stop=lambda: steps.append(1) or len(steps) >= 6)
        return train(halted if loop.stage == "qat" else loop, *arguments)

    monkeypatch.setattr(inputs, "train", stopped)


def cut_largest_file(folder):
    file = max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    file.write_bytes(file.read_bytes()[:100])


def test_stopped_damaged_and_resumed_is_the_uninterrupted_run(finished, place, monkeypatch, capsys):
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


def test_resume_never_throws_a_stopped_stage_away(place, monkeypatch, capsys):
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


def test_a_stage_whose_files_are_gone_is_done_again(finished, place, capsys):
    assert run(place) == 0
    capsys.readouterr()
    (finished / "packed" / "model.safetensors").unlink()
    assert run(place) == 0
    err = capsys.readouterr().err
    assert "qat: complete" in err and "pack: complete" not in err
    assert (finished / "packed" / "model.safetensors").exists()


def test_a_damaged_student_names_the_stage_to_force(finished, place, capsys):
    state = finished / "checkpoints" / "student"
    file = max((f for f in state.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    assert run(place, "--force", "evaluate") == 2
    assert "--force qat" in capsys.readouterr().err
    assert not (finished / "summary.json").exists()
    assert run(place, "--force", "qat") == 0


def test_dry_run_prints_the_table_and_writes_nothing(place, capsys):
    assert run(place, "name=dry", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "layers/mlp/down/kernel" in out and "ResidualSign" in out and "name: dry" in out
    assert not (place / "runs" / "dry").exists()


@pytest.mark.parametrize(
    "override, said",
    [
        ("qat.stepz=3", "qat.steps"),
        ("qat.steps=many", "qat.steps"),
        ("init.spec.k=5", "k is 5"),
        ("init.quantise=[layers/nothing/kernel]", "matches no parameter"),
        ("init.quantise=[layers/1/attn/q/kernel]", "one layer of a stack"),
        ("teacher.path=/no/such/folder", "/no/such/folder"),
        ("data.files=[/no/such/text]", "/no/such/text"),
        ("mesh.data=3", "devices"),
        ("qat.batch_size=100000", "too short"),
        ("qat.length=100", "positions"),
        ("evaluate.context=1", "context"),
        ("generate.max_new_tokens=100", "positions"),
        ("generate.prompts=['']", "empty prompt"),
        ("init.keep=[layers/.*/kernel]", "no kernel to quantise"),
        ("init.quantise=[embed/embedding]", "embed/embedding"),
        ("qat.optimizer.freeze=[latent,scale,norm,embedding]", "nothing to train"),
        ("mesh.tensor=0", "mesh"),
        ("seed=-1", "seed"),
        ("compute.chunk=-1", "chunk"),
        ("output=/dev/null/runs", "/dev/null/runs"),
        ("name=a/b", "name"),
    ],
)
def test_bad_input_is_one_sentence_exit_2_and_nothing_written(place, capsys, override, said):
    arguments = () if override.startswith("name=") else ("name=bad",)
    assert run(place, *arguments, override) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err
    assert err.strip().count("error: ") == 1
    assert not (place / "runs" / "bad").exists()


def test_a_missing_config_is_one_sentence(tmp_path, capsys):
    assert command.main(["--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err
