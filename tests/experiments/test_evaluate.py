"""The evaluate command in process: figures against transformers, its outputs, its refusals."""

import dataclasses
import errno
import functools
import json
import math
import os
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax.traverse_util import unflatten_dict
from transformers import PreTrainedTokenizerFast

from rabit_jax import PackedSign
from rabit_jax.data.tokenizer import train_tokenizer
from rabit_jax.errors import BadInput
from rabit_jax.experiments import evaluate as command
from rabit_jax.experiments.engine import evaluation
from rabit_jax.experiments.engine.console import main_guard
from rabit_jax.formats.hf import save_hf
from rabit_jax.formats.packed_model import load_model, save_packed
from rabit_jax.models.config import ModelConfig
from rabit_jax.models.decoder import param_shapes

CONFIG = ModelConfig(
    vocab_size=300, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_hidden=48,
    bos_id=0, eos_ids=(0,), max_position=64,
)
TEXT = "the cat sat on the mat, the dog ran under a log and the red cat sat. " * 40


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A packed model, the same as dense matrices, a text and a task."""
    root, rng = tmp_path_factory.mktemp("evaluate"), np.random.default_rng(3)
    flat = {path: rng.normal(size=shape).astype(np.float16).astype(np.float32)
            for path, shape in param_shapes(CONFIG).items()}
    for path, value in flat.items():
        if path.startswith("layers/mlp/"):
            l, i, o = value.shape
            bits = rng.integers(0, 256, (l, 1, o, 32), np.uint8)
            scales = (np.full((l, 1, n), 0.4, np.float16) for n in (o, i))
            flat[path] = PackedSign(*map(jnp.asarray, (bits, *scales)))
    tokenizer = train_tokenizer([TEXT], 300)
    save_packed(root / "packed", CONFIG, unflatten_dict(flat, sep="/"), tokenizer)
    save_hf(root / "dense", CONFIG, unflatten_dict(flat, sep="/"), tokenizer)
    (root / "text.txt").write_text(TEXT)
    rows = [{"q": TEXT[: 9 + 7 * n], "a": [" cat", " dog", " the red log"], "is": n % 3}
            for n in range(6)]
    (root / "data.json").write_text("\n".join(map(json.dumps, rows)))
    (root / "tasks").mkdir()
    for name in ("tiny_cats", "tiny_dogs"):
        (root / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump({
            "task": name, "dataset_path": "json", "output_type": "multiple_choice",
            "dataset_kwargs": {"data_files": {"test": str(root / "data.json")}},
            "test_split": "test", "doc_to_text": "{{q}}", "doc_to_choice": "{{a}}",
            "doc_to_target": "is", "target_delimiter": "",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }))
    (root / "tasks" / "both.yaml").write_text(yaml.safe_dump({
        "group": "tiny_group", "task": ["tiny_cats", "tiny_dogs"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }))
    (root / "tasks" / "writes.yaml").write_text(yaml.safe_dump({
        "task": "writes", "dataset_path": "json", "output_type": "generate_until",
        "dataset_kwargs": {"data_files": {"test": str(root / "data.json")}},
        "test_split": "test", "doc_to_text": "{{q}}", "doc_to_target": "{{a[0]}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 64},
        "metric_list": [{"metric": "exact_match"}],
    }))
    for name, held in {"tiny_all": "tiny_group", "few": "tiny_cats"}.items():
        (root / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump({
            "group": name, "task": [held],
            "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
        }))
    return root


@pytest.fixture
def evaluate(capsys):
    """Runs the command; returns exit code, stdout and stderr."""
    def call(*args):
        code = command.main([str(arg) for arg in args])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def harness(monkeypatch, folders):
    """The harness without its own 14,000 tasks, which take seconds to list."""
    pytest.importorskip("lm_eval", reason="tasks are those of lm-evaluation-harness")
    import datasets
    import lm_eval.tasks

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folders / "cache"))
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", functools.partial(
        lm_eval.tasks.TaskManager, include_defaults=False))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)


def reference(folders, context):
    """Nats per token of the dense model by transformers, in float64."""
    torch = pytest.importorskip("torch", reason="the reference runs on PyTorch")
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(
        folders / "dense", attn_implementation="eager").double()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folders / "dense")
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    windows = ids[0, : ids.shape[1] // context * context].reshape(-1, context)
    with torch.no_grad():
        return model(windows, labels=windows).loss.item(), len(windows)


def test_gemma_begins_every_window_with_its_begin_token(folders):
    model, _, tokenizer = load_model(folders / "dense")
    gemma = dataclasses.replace(model.config, family="gemma2")
    cases = [([], CONFIG, None), (["--begin"], CONFIG, 0), ([], gemma, 0),
             (["--no-begin"], gemma, None)]
    for options, config, wanted in cases:
        given = command.parser().parse_args(["--model", "m", "--ppl", "c4", *options])
        subject = evaluation.Subject("m", type(model)(config), {}, tokenizer)
        assert evaluation.begin_token(subject, given.begin) == wanted


@pytest.mark.parametrize("kind", ["dense", pytest.param("packed", marks=pytest.mark.more)])
def test_perplexity_is_that_of_transformers(folders, evaluate, kind):
    nats, windows = reference(folders, 32)
    code, out, _ = evaluate("--model", folders / kind, "--ppl", f"file:{folders / 'text.txt'}",
                            "--context", 32, "--json")
    assert code == 0
    rows = {row["metric"]: row for row in json.loads(out)["rows"]}
    assert rows["nats_per_token"]["value"] == pytest.approx(nats, rel=1e-4)
    assert rows["perplexity"]["value"] == pytest.approx(math.exp(nats), rel=1e-3)
    assert all((row["context"], row["samples"]) == (32, windows) for row in rows.values())
    tokens = len(PreTrainedTokenizerFast.from_pretrained(folders / kind).encode(TEXT))
    bits = nats / math.log(2) * tokens / len(TEXT)
    assert rows["bits_per_byte"]["value"] == pytest.approx(bits, rel=1e-4)


def test_one_object_on_stdout_and_in_the_file(folders, evaluate, harness, tmp_path):
    settings = ("--model", folders / "packed", "--include-path", folders / "tasks", "--tasks",
                "tiny_*", "--ppl", f"file:{folders / 'text.txt'}", "--context", 16, "--limit", 4)
    code, out, err = evaluate(*settings, "--json", "--output", tmp_path / "new" / "out.json")
    assert code == 0 and "error" not in err
    found = json.loads(out)
    assert json.loads((tmp_path / "new" / "out.json").read_text()) == found
    assert {"device", "date", "versions", "command", "rows", "model", "limit",
            "begin", "size"} == set(found)
    size = found["size"]
    assert 1 < size["bits_per_weight"] < size["whole_model_bits_per_weight"] < 16
    assert size["whole_model_ratio"] == pytest.approx(16 / size["whole_model_bits_per_weight"])
    assert "lm-eval" in found["versions"] and found["limit"] == 4 and found["begin"] is False
    assert found["command"].startswith("python -m experiments.evaluate --model ")
    rows = {(row["name"], row["metric"]): row for row in found["rows"]}
    cats = rows["tiny_cats", "acc"]
    assert cats["samples"] == 4 and cats["shots"] == 0 and cats["value"] in (0, 0.25, 0.5, 0.75, 1)
    assert rows["tiny_cats", "acc_norm"] and cats["context"] is None
    # The harness's: sqrt(p (1 - p) / (n - 1)).
    p = cats["value"]
    assert cats["stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 3))
    assert rows["tiny_dogs", "acc"]["value"] == p
    assert rows["mean of 2 tasks", "acc"]["value"] == p == rows["tiny_group", "acc"]["value"]
    assert rows["tiny_all", "acc"]["value"] == p
    assert rows[f"file:{folders / 'text.txt'}", "perplexity"]["samples"] == 4


def test_the_file_is_written_before_stdout_which_may_be_lost(folders, tmp_path, monkeypatch):
    def lost(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr(command, "table", lost)
    text, file = folders / "text.txt", tmp_path / "result.json"
    with pytest.raises(BrokenPipeError):
        command.main(["--model", str(folders / "packed"), "--ppl", f"file:{text}", "--limit", "8",
                      "--context", "32", "--batch-size", "8", "--output", str(file)])
    assert json.loads(file.read_text())["rows"]


def test_the_table_states_the_context(folders, evaluate):
    code, out, err = evaluate("--model", folders / "packed", "--context", 16,
                              "--ppl", f"file:{folders / 'text.txt'}")
    assert code == 0 and "perplexity, file:" in err
    head = next(line for line in out.splitlines() if "metric" in line)
    row = next(line for line in out.splitlines() if " perplexity " in line)
    column = [cell.strip() for cell in re.split("[┃│]", head)].index("context")
    assert re.split("[┃│]", row)[column].strip() == "16"


@pytest.mark.parametrize("args, message", [
    ([], "nothing to evaluate"),
    (["--ppl", "wikitext"], "nearest is 'wikitext2'"),
    (["--ppl", "file:none.txt"], "no file matches 'none.txt'"),
    (["--ppl", "TEXT", "--context", 65], "--context is 65, the model has 64 positions"),
    (["--ppl", "TEXT", "--context", 1], "--context is 1, wanted at least 2"),
    (["--ppl", "TEXT", "--context", 32, "--batch-size", 3], "a multiple of 8"),
    (["--ppl", "TEXT", "--limit", 0], "--limit is 0"),
    (["--ppl", "TEXT", "--context", "many"], "--help"),
    (["--ppl", "TEXT", "--output", "TEXT"], "exists: remove it or name another"),
    (["--ppl", "TEXT", "--output", "."], "exists: remove it or name another"),
    (["--ppl", "TEXT", "--output", "TEXT/new/out.json"], "out.json cannot be written"),
    (["--ppl", "TEXT", "--include-path", "nowhere"], "--include-path nowhere is no folder"),
    (["--ppl", "TEXT", "--context", 16, "--chat"], "no chat template"),
    (["--ppl", "TEXT", "--context", 16, "--max-length", 65], "--max-length is 65"),
])
def test_bad_input_is_one_sentence(folders, evaluate, args, message):
    args = [str(arg).replace("TEXT", f"file:{folders / 'text.txt'}") for arg in args]
    args = [a.removeprefix("file:") if b == "--output" else a
            for a, b in zip(args, ["", *args], strict=False)]
    refused(evaluate("--model", folders / "dense", *args), message)


def refused(done, message):
    code, out, err = done
    last = err.splitlines()[-1]
    assert (code, out) == (2, "") and last.startswith("error: ") and message in last, err


def test_bad_models_are_one_sentence(folders, evaluate, tmp_path):
    bare = shutil.copytree(folders / "dense", tmp_path / "bare",
                           ignore=shutil.ignore_patterns("tokenizer*"))
    text = ("--ppl", f"file:{folders / 'text.txt'}", "--context", 16)
    refused(evaluate("--model", bare, *text), "holds no tokenizer")
    refused(evaluate("--model", tmp_path / "none", *text), "no model folder")


def test_damaged_weights_are_one_sentence(folders, evaluate, tmp_path):
    model, params, tokenizer = load_model(folders / "dense")
    params["final_norm"]["scale"] = jnp.full_like(params["final_norm"]["scale"], 3e38)
    save_hf(tmp_path / "huge", model, params, tokenizer)
    refused(evaluate("--model", tmp_path / "huge", "--ppl", f"file:{folders / 'text.txt'}",
                     "--context", 32), "hold NaN")


def test_bad_tasks_are_one_sentence(folders, evaluate, harness, monkeypatch):
    ours = ("--model", folders / "dense", "--include-path", folders / "tasks", "--tasks")
    refused(evaluate(*ours, "tiny_cat"), "no task 'tiny_cat', the nearest is 'tiny_cats'")

    def refuse(*_, **__):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    refused(evaluate(*ours, "tiny_cats"), "ConnectionError: no route to the hub")


def test_settings_of_generation_are_refused_before_anything_is_scored(folders, evaluate, harness):
    done = evaluate("--model", folders / "dense", "--include-path", folders / "tasks",
                    "--tasks", "tiny_cats,writes")
    refused(done, "writes: a task asks for 64 new tokens, wanted 1 to 63")
    assert "log-probabilities" not in done[2]


def test_what_a_group_holds_is_evaluated_once(folders, harness):
    for names, left in [(("tiny_all",), ["tiny_all"]), (("tiny_*",), ["tiny_all"]),
                        (("tiny_dogs", "tiny_group"), ["tiny_group"]),
                        (("few", "tiny_dogs", "few"), ["few", "tiny_dogs"])]:
        manager, found = evaluation.load_tasks(names, str(folders / "tasks"))
        assert [evaluation._name(item) for item in found] == left
        assert {"tiny_cats", "tiny_dogs"} == set(manager.load(found)["tasks"])
    with pytest.raises(BadInput, match="'few' and 'tiny_all' share the task 'tiny_cats'"):
        evaluation.load_tasks(("few", "tiny_all"), str(folders / "tasks"))


def test_without_the_harness(folders, evaluate, monkeypatch):
    import rabit_jax.evaluate.harness as adapter

    monkeypatch.setattr(adapter, "_missing", ImportError("No module named 'lm_eval'"))
    refused(evaluate("--model", folders / "dense", "--tasks", "arc_easy"),
            "pip install 'lm-eval<0.5'")


def test_a_figure_that_is_not_finite_is_null():
    row = evaluation.make_row("text", "perplexity", math.inf, "N/A", context=16)
    assert row["value"] is None and row["stderr"] is None and row["context"] == 16
    assert evaluation.make_row("a", "b", np.float32(2))["value"] == 2


@pytest.mark.slow
def test_the_student_of_a_run(finished, evaluate, tmp_path):
    """The student and the packed model that was made of it; the teacher is another model."""
    text = finished.parent.parent / "eval.txt"
    # Elsewhere, without the text and the devices of the run.
    moved = shutil.copytree(finished, tmp_path / "moved")
    config = yaml.safe_load((moved / "config.yaml").read_text())
    config["data"]["files"], config["mesh"] = ["gone.txt"], {"data": 16}
    (moved / "config.yaml").write_text(yaml.safe_dump(config))

    def nats(model):
        code, out, _ = evaluate(
            "--model", model, "--ppl", f"file:{text}", "--context", 32, "--json")
        assert code == 0
        return next(r["value"] for r in json.loads(out)["rows"] if r["metric"] == "nats_per_token")

    student = nats(moved)
    assert student == pytest.approx(nats(finished / "packed"), rel=2e-3)
    assert abs(student - nats(finished / "teacher")) > 2e-3 * student


def test_an_unfinished_run(folders, evaluate, tmp_path):
    (tmp_path / "config.yaml").write_text("name: x\nmesh: {data: 16}\n")
    text = f"file:{folders / 'text.txt'}"
    refused(evaluate("--model", tmp_path, "--ppl", text), "no trained student")


@pytest.mark.parametrize("form", ["--json", "--no-begin"])
def test_a_result_is_shown_where_the_disk_is_full(form, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "result.json")

    monkeypatch.setattr(command, "write_text", full)
    options = command.parser().parse_args(["--model", "m", "--output", str(tmp_path / "f"), form])
    row = dict.fromkeys(command.COLUMNS, 1.5)
    result = {"rows": [row], "device": "a CPU", "date": "today"}
    assert main_guard(lambda: command.show(options, result, "2 bits")) == 2
    out, err = capsys.readouterr()
    assert "1.5" in out and err == "error: the disk is full, result.json cannot be written: free " \
        "some space\n"
