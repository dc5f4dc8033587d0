"""The whole run in small: what it leaves, what the same command does again, and bad input."""

import json
import math
import shutil

import numpy as np
import pytest
from huggingface_hub import ModelCard

from rabit_jax import GroupUniformSpec, convert, load_hf, pack
from rabit_jax.experiments import run as command
from rabit_jax.experiments.engine import folder
from rabit_jax.formats.packed_model import load_packed

STAGES = ["teacher", "calibrate", "init", "qat", "evaluate", "pack", "generate"]


def test_a_folder_that_cannot_be_made_is_told_before_text_is_read(
    place, run, monkeypatch, capsys
):
    monkeypatch.setattr(command, "opened", lambda *_: pytest.fail("text is read first"))
    assert run(place, f"output={place / 'train.txt'}") == 2
    assert run(place, f"output={place}", "name=train.txt") == 2
    monkeypatch.setattr(folder.os, "access", lambda *_: False)  # as for a disk that is read-only
    assert run(place, "name=new") == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition("(")[2] for line in lines] == [
        "Not a directory); set output to another place"] * 2 + [
        "Permission denied); set output to another place"]
    assert not (place / "runs").exists()


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
    assert summary["peak_memory_bytes"] > 0
    assert list(summary["seconds"]) == STAGES


def test_the_teacher_learns_and_the_packed_model_is_the_student(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert math.log(summary["teacher"]["ppl"]) < summary["unigram_nats"]
    assert summary["packed"]["bits_identical"]
    assert summary["packed"]["ppl"] == pytest.approx(summary["qat"]["ppl"], rel=5e-3)


def test_the_packed_model_has_a_card_with_the_figures_of_the_summary(finished):
    summary = json.loads((finished / "summary.json").read_text())
    card = ModelCard.load(finished / "packed" / "README.md")
    assert card.data.library_name == "rabit_jax" and card.data.base_model is None
    packed, teacher = summary["packed"], summary["teacher"]
    for text in (
        f"| this model | {packed['ppl']:.2f} | {packed['bits_per_byte']:.3f} | 32 |",
        f"| base, full precision | {teacher['ppl']:.2f} |",
        f"packed linears: {packed['bits_per_weight']:.4g}\n",
        f"with padding: {packed['stored_bits_per_weight']:.4g}\n",
        f"embedding and head included: {packed['whole_model_bits_per_weight']:.4g} (",
        f"{packed['bytes']:,} bytes",
        "python -m experiments.run --config config.yaml",
        "source=files",
        f"qat {summary['tokens']['qat']:,}",
        f"jax {summary['versions']['jax']}",
    ):
        assert text in card.text
    assert str(finished.parents[1]) in summary["command"]
    assert str(finished.parents[1]) not in card.content


def test_text_of_an_unseen_source_is_scored_apart(finished):
    summary = json.loads((finished / "summary.json").read_text())
    for name in ("teacher", "greedy", "init", "qat", "packed"):
        unseen = summary[name]["unseen"]
        assert math.isfinite(unseen["ppl"]) and unseen["context"] == 32
        assert unseen["ppl"] > summary[name]["ppl"]  # capitals were never seen


def test_what_training_cost_and_did_is_in_the_summary(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert 0 < summary["qat"]["kl"] < 10 and 0 <= summary["flip_rate"] < 1
    assert summary["step_seconds"] > 0 and summary["training_memory_bytes"] > 1e8
    sizes = {"q": (256, 256), "kv": (256, 128), "other": (256, 256)}
    count = {"q": 2, "kv": 2, "other": 3}  # q and o; k and v; gate, up and down
    inner = sum(n * (sum(sizes[name])) for name, n in count.items())
    products = sum(n * math.prod(sizes[name]) for name, n in count.items())
    # Two layers, two paths: inputs and outputs are scaled, every weight adds or subtracts.
    assert summary["cost"]["multiplications"] == 2 * 2 * inner
    assert summary["cost"]["additions"] == 2 * 2 * products
    assert summary["cost"]["lookups"] == 0
    assert summary["cost"]["bytes"] == summary["packed"]["linear_bytes"]
    # Muon keeps one moment for latents; norms and scales are small beside them.
    assert 8 * 2 * products < summary["state_bytes"] < 1.1 * 8 * 2 * products


def test_bits_per_weight_are_counted_from_the_file(finished, tensor_bytes):
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
    total = json.loads((finished / "summary.json").read_text())["parameters"]["total"]
    stored = tensor_bytes(finished / "packed" / "model.safetensors")
    assert packed["whole_model_bits_per_weight"] == pytest.approx(8 * stored / total)
    assert packed["whole_model_ratio"] == pytest.approx(2 * total / stored)
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
    held_out = [line for line in lines if line["stage"] == "validation"]
    assert [line["step"] for line in held_out] == [1, 7, 12]
    assert held_out[-1]["nats_per_token"] < held_out[0]["nats_per_token"]
    watched = [line for line in lines if line["stage"] == "diagnostics"]
    assert [line["step"] for line in watched] == [1, 5, 8]
    assert all(0 <= line["flip_rate"] < 0.5 for line in watched)


def test_the_samples_of_the_report_come_from_the_packed_folder(finished):
    _, params, tokenizer = load_packed(finished / "packed")
    record = json.loads((finished / "stages" / "generate.json").read_text())
    assert record["result"]["samples"][0]["packed"] and tokenizer is not None
    assert str(params["layers"]["attn"]["q"]["kernel"].bits.dtype) == "uint8"
    assert "The file" in (finished / "report.html").read_text()


def ids(folder):
    return {p.stem: json.loads(p.read_text())["id"] for p in (folder / "stages").glob("*.json")}


def test_a_second_run_skips_every_stage(finished, place, capsys, run):
    before = ids(finished)
    assert run(place) == 0
    assert ids(finished) == before
    assert capsys.readouterr().err.count("skipped") == len(STAGES)


def test_resume_with_a_changed_config_shows_the_difference(finished, place, capsys, run):
    before = ids(finished)
    assert run(place, "--resume", "qat.steps=9") == 2
    assert "qat.steps: 8 -> 9" in capsys.readouterr().err
    assert ids(finished) == before


def test_a_stage_whose_files_are_gone_is_done_again(finished, place, capsys, run):
    assert run(place) == 0
    capsys.readouterr()
    (finished / "packed" / "model.safetensors").unlink()
    assert run(place) == 0
    err = capsys.readouterr().err
    assert "qat: complete" in err and "pack: complete" not in err
    assert (finished / "packed" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_mesh_with_a_tensor_axis_gives_the_same_models(finished, place, run):
    mesh = ("name=meshed", "mesh.data=4", "mesh.tensor=2", f"teacher.path={finished / 'teacher'}")
    assert run(place, *mesh, "qat.steps=2") == 0
    one, other = [
        json.loads((f / "summary.json").read_text()) for f in (finished, place / "runs" / "meshed")
    ]
    assert other["teacher"]["ppl"] == pytest.approx(one["teacher"]["ppl"], rel=1e-5)
    assert other["init"]["ppl"] == pytest.approx(one["init"]["ppl"], rel=1e-3)
    assert other["packed"]["bits_identical"]


def test_a_teacher_without_its_config_is_made_again(finished, place, run):
    shutil.copytree(finished, place / "runs" / "bare")
    (place / "runs" / "bare" / "teacher" / "config.json").unlink()
    assert run(place, "name=bare", "--until", "teacher") == 0
    assert (place / "runs" / "bare" / "teacher" / "config.json").is_file()


def test_dry_run_prints_the_table_and_writes_nothing(place, capsys, run):
    assert run(place, "name=dry", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "layers/mlp/down/kernel" in out and "ResidualSign" in out and "name: dry" in out
    assert not (place / "runs" / "dry").exists()


@pytest.mark.parametrize(
    "override, said",
    [
        ("seed=4294967296", "seed"),
        ("data.vocab_size=99999999999", "vocab_size"),
        ("init.spec.a_in=-5", "a_in"),
        ("init.spec.a_out=.inf", "a_out"),
        ("generate.temperature=.inf", "temperature"),
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
        ("init.quantise=[embed/embedding]", "no kernel to quantise"),
        ("init.quantise=[layers/attn_norm/scale]", "layers/attn_norm/scale"),
        ("qat.optimizer.freeze=[latent,scale,norm,embedding]", "nothing to train"),
        ("mesh.tensor=0", "mesh"),
        ("seed=-1", "seed"),
        ("compute.chunk=-1", "chunk"),
        ("output=/dev/null/runs", "/dev/null/runs"),
        ("name=a/b", "name"),
    ],
)
def test_bad_input_is_one_sentence_exit_2_and_nothing_written(place, capsys, override, said, run):
    arguments = () if override.startswith("name=") else ("name=bad",)
    assert run(place, *arguments, override) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err
    assert err.strip().count("error: ") == 1
    assert not (place / "runs" / "bad").exists()


@pytest.mark.parametrize("override, said", [
    ("init.budget=99", "the budget is 99"), ("init.budget=0.1", "the budget is 0.1"),
    ("init.keep=[layers/.*/kernel]", "no kernel to quantise"),
    ("init.quantise=[layers/attn_norm/scale]", "layers/attn_norm/scale"),
    ("qat.nested=[1,3]", "qat.nested is"), ("qat.length=100", "positions"),
    ("evaluate.context=100", "positions"),
    ("qat.optimizer.freeze=[latent,scale,norm,embedding]", "nothing to train"),
    ("task=ptq", "set teacher.path"),
])
def test_a_dry_run_refuses_what_the_run_would(place, capsys, override, said, run):
    said_by = []
    for option in ([], ["--dry-run"]):
        assert run(place, "name=bad", override, *option) == 2
        out, err = capsys.readouterr()
        assert not out and said in err
        said_by.append(err.strip().splitlines()[-1])
    assert said_by[0] == said_by[1]
    assert not (place / "runs" / "bad").exists()


def test_an_unseen_text_that_is_too_short_is_refused_before_the_training(place, capsys, run):
    (place / "short.txt").write_text("too short")
    assert run(place, "name=bad", f"data.unseen_files=[{place / 'short.txt'}]") == 2
    assert "the unseen text (data.unseen_files" in capsys.readouterr().err
    assert not (place / "runs" / "bad").exists()


def test_a_missing_config_is_one_sentence(tmp_path, capsys):
    assert command.main(["--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err


@pytest.mark.slow
def test_a_composed_weight_is_run_like_any_other(finished, place, run):
    spec = "{type: sum, parts: [{type: low_rank, rank: 16}, {type: residual, k: 1, rounds: 0}]}"
    done = run(
        place, f"init.spec={spec}", f"teacher.path={finished / 'teacher'}", "name=sum",
        "init.quantise=layers/attn/[qk]/kernel", "qat.steps=4", "evaluate.baselines=false",
        "generate.prompts=[]",
    )
    assert done == 0
    folder = place / "runs" / "sum"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["packed"]["bits_identical"] and "greedy" not in summary
    assert summary["packed"]["ppl"] == pytest.approx(summary["qat"]["ppl"], rel=5e-3)
    # Rank 16 and its twin, then one sign path; q is 256 x 256, and k 256 x 128, whose 128 outputs
    # are padded to 256 in the factor that is stored along them.
    products = 2 * (16 * (512 + 384) + 16 * (528 + 400))
    paths = 256 * 256 + 256 * 128 + 16 * (512 + 384)
    weights = 256 * 256 + 256 * 128
    assert summary["packed"]["bits_per_weight"] == pytest.approx((products + paths) / weights)
    padding = 2 * 16 * 128 / weights
    assert summary["packed"]["stored_bits_per_weight"] == pytest.approx(
        (products + paths) / weights + padding
    )
    _, params, _ = load_packed(folder / "packed")
    terms = params["layers"]["attn"]["q"]["kernel"].terms
    assert [type(term).__name__ for term in terms] == ["PackedLowRank", "PackedSign"]


@pytest.mark.more
@pytest.mark.parametrize("freeze", ["embedding,head", "scale"])
def test_an_embedding_in_few_bits_trains_where_it_is_not_frozen(place, run, finished, freeze):
    name = freeze.replace(",", "-")
    assert run(place, f"name={name}", f"teacher.path={finished / 'teacher'}", "generate.prompts=[]",
               "init.embedding={type: round_to_nearest, bits: 6, group: 0}", "qat.gamma=0",
               f"qat.optimizer.freeze=[{freeze}]") == 0
    folder = place / "runs" / name
    summary, plain = (json.loads((f / "summary.json").read_text()) for f in (folder, finished))
    packed = load_packed(folder / "packed")[1]
    start = convert(load_hf(finished / "teacher")[1],
                    [("embed/embedding", GroupUniformSpec(bits=6, group=0))])
    same = np.array_equal(packed["embed"]["embedding"].matrix.bits,
                          pack(start)["embed"]["embedding"].matrix.bits)
    assert same == (freeze != "scale")
    assert summary["packed"]["bits_identical"]
    assert summary["packed"]["ppl"] == pytest.approx(summary["qat"]["ppl"], rel=5e-3)
    for field in ("bits_per_weight", "stored_bits_per_weight"):
        assert summary["packed"][field] == plain["packed"][field]
    assert summary["packed"]["bytes"] < plain["packed"]["bytes"]
    assert set(summary["diagnostics"]["qat"]["layers"]) == set(
        plain["diagnostics"]["qat"]["layers"])
