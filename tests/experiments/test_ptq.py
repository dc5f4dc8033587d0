"""Post-training block by block against the same work on the whole model at once."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from rabit_jax import (
    LLAMA_LINEARS,
    GroupUniformSpec,
    ResidualSignSpec,
    Stats,
    calibrate,
    convert,
    describe,
    load_hf,
    pack,
)
from rabit_jax.calibration import outliers
from rabit_jax.calibration.outliers import record_limbs
from rabit_jax.data.sources import DataConfig, documents
from rabit_jax.data.tokens import batch, tokenise, windows
from rabit_jax.evaluate.perplexities import perplexity
from rabit_jax.experiments.engine import machine, packing
from rabit_jax.experiments.engine import ptq as blockwise
from rabit_jax.experiments.engine.job import Job
from rabit_jax.formats.packed_model import load_packed, save_packed
from rabit_jax.formats.tokenizer import load_tokenizer
from rabit_jax.train.losses import next_token_loss
from rabit_jax.tree import weights_of

LAYERS, LENGTH, SEED = 3, 24, 5
SPEC = ResidualSignSpec(k=2, rounds=4)
RULES = [(LLAMA_LINEARS, SPEC)]


@pytest.fixture(scope="module", autouse=True)
def _limit():
    """Sixty-four inputs never reach the ratio of 25: one that the outlier here passes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outliers, "LARGEST_RATIO", 5.0)
        yield


@pytest.fixture(scope="module")
def finished(place, ptq):
    assert ptq() == 0
    return place / "runs" / "ptq"


@pytest.fixture(scope="module")
def text(place, ptq_model):
    config = DataConfig(source="files", files=(str(place / "train.txt"),),
                        eval_files=(str(place / "eval.txt"),))
    train, held_out = documents(config)
    tokenizer = load_tokenizer(ptq_model)
    return tuple(tokenise(part, tokenizer, place / "cache") for part in (train, held_out))


@pytest.fixture(scope="module")
def at_once(ptq_model, text):
    """Params, statistics and packed params of the whole model in memory."""
    decoder, params, _ = load_hf(ptq_model)
    rows = (batch(text[0].tokens, step, 4, LENGTH, SEED + 1) for step in range(3))
    batches = ({"tokens": r, "mask": np.ones(r.shape, bool)} for r in rows)
    stats = calibrate(lambda p, b: next_token_loss(decoder, p, b)[0], params, batches, RULES)
    student = convert(params, RULES, stats, jax.random.key(SEED))
    return decoder, params, stats, record_limbs(pack(student), stats)


def test_statistics_are_those_of_one_pass(finished, at_once):
    found, wanted = load_file(finished / "calibration.safetensors"), at_once[2]
    assert {name.rsplit(".", 1)[0] for name in found} == set(wanted)
    for path, stats in wanted.items():
        for part in ("s_in", "s_out"):
            want = np.asarray(getattr(stats, part))
            np.testing.assert_allclose(found[f"{path}.{part}"], want, rtol=1e-5)


def test_the_packed_folder_is_that_of_one_pass(finished, at_once, ptq_model, tmp_path):
    decoder, _, _, packed = at_once
    spec = {"spec": dataclasses.asdict(SPEC)}
    save_packed(tmp_path / "packed", decoder.config, packed, load_tokenizer(ptq_model), extra=spec)
    one, other = tmp_path / "packed", finished / "packed"
    assert {f.name for f in one.iterdir()} == {f.name for f in other.iterdir()}
    for file in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (one / file).read_text() == (other / file).read_text()
    a, b = (load_file(f / "model.safetensors") for f in (one, other))
    assert a.keys() == b.keys()
    for name, array in a.items():
        if name.endswith((".g", ".h")):  # float16, fitted to statistics that differ by 1e-6
            np.testing.assert_allclose(b[name], array, rtol=2e-3)
        else:
            np.testing.assert_array_equal(b[name], array)
    headers = []
    for folder in (one, other):
        with safe_open(folder / "model.safetensors", framework="numpy") as file:
            headers.append(file.metadata())
    assert headers[0]["modules"] == headers[1]["modules"]
    assert '"limbs": 3' in headers[0]["modules"] and '"limbs": 2' in headers[0]["modules"]


def test_scores_are_those_of_the_whole_models(finished, at_once, text):
    decoder, params, _, _ = at_once
    summary = json.loads((finished / "summary.json").read_text())
    rows = windows(text[1].tokens, 32)[:6]
    models = {"teacher": (decoder, params), "packed": load_packed(finished / "packed")[:2]}
    for name, (decoder, tree) in models.items():
        want = perplexity(decoder, tree, rows, batch_size=4, text_bytes=text[1].bytes,
                          total_tokens=len(text[1].tokens))
        for field in ("ppl", "bits_per_byte", "context"):
            assert summary[name][field] == pytest.approx(getattr(want, field), rel=1e-5), field
    assert summary["packed"]["ppl"] != pytest.approx(summary["teacher"]["ppl"], rel=1e-3)
    assert summary["qat"] is None and summary["init"] is None
    errors = summary["relative_error"]["init"]["layers/mlp/down/kernel"]
    assert len(errors) == LAYERS and all(0.05 < e < 0.3 for e in errors)
    assert summary["tokens"] == {"calibrate": 12 * LENGTH}
    size = (finished / "packed" / "model.safetensors").stat().st_size
    assert summary["packed"]["bytes"] == size
    card, packed = (finished / "packed" / "README.md").read_text(), summary["packed"]
    assert f"| this model | {packed['ppl']:.2f} | {packed['bits_per_byte']:.3f} | 32 |" in card
    assert f"calibrate {12 * LENGTH}" in card
    assert "python -m experiments.run --config ptq.yaml" in card
    assert str(finished.parents[1]) in summary["command"] and str(finished.parents[1]) not in card


def test_embedding_and_head_are_packed_as_in_one_pass(at_once, ptq, place, text, tensor_bytes):
    """Without calibration, so that the blocks are quickly done."""
    decoder, params, _, _ = at_once
    assert ptq("name=table", "calibrate.mode=none", "evaluate.models=[packed]",
               "init.embedding={type: round_to_nearest, bits: 8, group: 0}",
               "init.by_path=[{paths: head/kernel, spec: {type: round_to_nearest, bits: 4}}]") == 0
    folder = place / "runs" / "table"
    rules = [("embed/embedding", GroupUniformSpec(bits=8, group=0)),
             ("head/kernel", GroupUniformSpec(bits=4)), *RULES]
    wanted = pack(convert(params, rules, key=jax.random.key(SEED)))
    decoder, found, _ = load_packed(folder / "packed")
    jax.tree.map(np.testing.assert_array_equal, weights_of(found), weights_of(wanted))
    summary = json.loads((folder / "summary.json").read_text())
    want = perplexity(decoder, found, windows(text[1].tokens, 32)[:6], batch_size=4)
    assert summary["packed"]["ppl"] == pytest.approx(want.ppl, rel=1e-5)
    described = describe(wanted)
    packed = summary["packed"]
    assert packed["bits_per_weight"] == pytest.approx(described.bits_per_weight)
    assert packed["stored_bits_per_weight"] == pytest.approx(described.stored_bits_per_weight)
    count = sum(x.size for x in jax.tree.leaves(params))
    stored = tensor_bytes(folder / "packed" / "model.safetensors")
    assert packed["whole_model_bits_per_weight"] == pytest.approx(8 * stored / count)
    assert described.whole_model_bits_per_weight == packed["whole_model_bits_per_weight"]
    assert set(summary["relative_error"]["init"]) == {
        p for p in weights_of(wanted) if p.startswith("layers/")}
    raw = json.loads((folder / "packed" / "config.json").read_text())
    assert raw["quantization_config"]["embedding"]["bits"] == 8


@pytest.mark.more
def test_the_packed_kernels_are_those_of_one_pass_with_less_calibration(
    at_once, ptq_model, ptq, place, tmp_path
):
    """Without gradients and without text; then the model needs no tokeniser either."""
    _, params, stats, _ = at_once
    inputs_only = {p: Stats(s.s_in, np.ones_like(s.s_out)) for p, s in stats.items()}
    assert ptq("name=inputs", "calibrate.mode=activations", "evaluate.models=[]") == 0
    bare = tmp_path / "bare"
    shutil.copytree(ptq_model, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    assert ptq("name=free", "calibrate.mode=none", "evaluate.models=[]", "data.files=[/no/text]",
               f"teacher.path={bare}") == 0
    for name, given in (("inputs", inputs_only), ("free", None)):
        folder = place / "runs" / name
        packed = pack(convert(params, RULES, given, jax.random.key(SEED)))
        found = load_packed(folder / "packed")[1]["layers"]
        for part in ("attn", "mlp"):
            for kernel, module in packed["layers"][part].items():
                one, other = module["kernel"], found[part][kernel]["kernel"]
                assert (other.limbs is None) == (given is None)
                np.testing.assert_array_equal(other.bits, one.bits)
                np.testing.assert_allclose(other.g, one.g, rtol=0 if given is None else 2e-3)
                np.testing.assert_allclose(other.h, one.h, rtol=0 if given is None else 2e-3)
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["teacher"] is None and "ppl" not in summary["packed"]
        assert (folder / "calibration.safetensors").exists() == (given is not None)


@pytest.mark.more
def test_sampled_labels_are_those_of_one_pass(ptq, place, at_once, text):
    decoder, params, _, _ = at_once

    def loss(p, b):
        key = jax.random.fold_in(jax.random.key(SEED), b["row"])
        return next_token_loss(decoder, p, b, 256, "sampled", key)[0]

    rows = (batch(text[0].tokens, step, 4, LENGTH, SEED + 1) for step in range(3))
    batches = ({"tokens": r, "mask": np.ones(r.shape, bool), "row": 4 * n}
               for n, r in enumerate(rows))
    wanted = calibrate(loss, params, batches, RULES)
    assert ptq("name=sampled", "calibrate.labels=sampled", "evaluate.models=[]") == 0
    found = load_file(place / "runs" / "sampled" / "calibration.safetensors")
    for path, stats in wanted.items():
        np.testing.assert_allclose(found[f"{path}.s_out"], stats.s_out, rtol=1e-5)


def content(folder):
    """Header and bytes of a packed file; safetensors writes the header in any order."""
    file = (folder / "packed" / "model.safetensors").read_bytes()
    begin = 8 + int.from_bytes(file[:8], "little")
    return json.loads(file[8:begin]), file[begin:]


def crash(monkeypatch, name, calls):
    """Make the n-th call of a function of the room raise, once its work is done."""
    real, seen = getattr(blockwise, name), []

    def broken(*arguments):
        found = real(*arguments)
        seen.append(1)
        if len(seen) == calls:
            raise RuntimeError("crashed")
        return found

    monkeypatch.setattr(blockwise, name, broken)


@pytest.mark.parametrize(
    "where, calls", [("init_block", 2), ("_quantise_block", 2), ("_start", 1), ("pack_model", 1)]
)
def test_crashed_and_resumed_is_the_uninterrupted_run(
    where, calls, finished, place, ptq, monkeypatch
):
    name = f"name=crashed-{where}"
    if where == "pack_model":
        monkeypatch.setattr(packing, "save_packed", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ptq(name)
    else:
        crash(monkeypatch, where, calls)
        with pytest.raises(RuntimeError, match="crashed"):
            ptq(name)
    monkeypatch.undo()
    folder = place / "runs" / f"crashed-{where}"
    assert not (folder / "packed").exists() and not (folder / "summary.json").exists()
    assert ptq(name, "--resume") == 0
    assert content(folder) == content(finished)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["stage"] == "init"] == [2, 1, 0]
    assert [line["step"] for line in lines if line["stage"] == "forward"] == [0, 1, 2]
    assert sorted(f.name for f in (folder / "blocks").iterdir()) == [
        *(f"block-{n:03}.safetensors" for n in range(LAYERS)), "key", "packed.json"]


@pytest.mark.parametrize("piece, how", [
    ("block-002.safetensors", "flip"), ("block-002.safetensors", "cut"), ("x-001", "cut"),
    ("dx-002", "flip"), ("x-000", "gone"), ("x-001", "longer"),
])
def test_a_damaged_piece_starts_its_stage_again(
    piece, how, finished, place, ptq, monkeypatch, capsys
):
    name = f"name=damaged-{piece}-{how}"
    crash(monkeypatch, "init_block", 2)
    with pytest.raises(RuntimeError, match="crashed"):
        ptq(name)
    monkeypatch.undo()
    folder = place / "runs" / f"damaged-{piece}-{how}"
    file = folder / "blocks" / piece
    whole = bytearray(file.read_bytes())
    if how == "gone":
        file.unlink()
    elif how == "flip":
        whole[-5] ^= 16
        file.write_bytes(whole)
    else:
        file.write_bytes(whole[: len(whole) // 2] if how == "cut" else whole + bytes(999))
    capsys.readouterr()
    assert ptq(name, "--resume") == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "starts again" in line]
    assert f"blocks/{piece} is damaged (" in line and line.endswith("stage quantise starts again")
    assert content(folder) == content(finished)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["stage"] == "init"] == [2, 1, 0]


def test_a_signal_ends_the_run_after_its_block(finished, place, ptq, monkeypatch, capsys):
    real, seen = Job.check_stop, []

    def stop(job):
        seen.append(1)
        job.stopped |= len(seen) in (2, 4)
        real(job)

    monkeypatch.setattr(Job, "check_stop", stop)
    assert ptq("name=stopped") == 75  # in the forward pass
    assert "--resume" in capsys.readouterr().err
    assert ptq("name=stopped", "--resume") == 75  # in the backward pass
    blocks = place / "runs" / "stopped" / "blocks"
    assert 0 < len(list(blocks.glob("block-*"))) < LAYERS
    assert ptq("name=stopped", "--resume") == 0
    assert content(place / "runs" / "stopped") == content(finished)


def test_a_second_run_does_nothing_again(finished, ptq, monkeypatch, capsys):
    before, where = content(finished), json.loads((finished / "summary.json").read_text())["device"]
    for owner, name in ((blockwise, "init_block"), (packing, "save_packed"), (Job, "forward")):
        monkeypatch.setattr(owner, name, lambda *_, **__: 1 / 0)
    monkeypatch.setattr(machine, "_processor", lambda: "another")
    assert ptq() == 0
    assert json.loads((finished / "summary.json").read_text())["device"] == where
    monkeypatch.undo()
    monkeypatch.setattr(blockwise, "init_block", lambda *_, **__: 1 / 0)
    assert ptq("evaluate.windows=3") == 0  # scored again, not packed again
    assert json.loads((finished / "summary.json").read_text())["packed"]["scored_tokens"] == 93
    assert content(finished) == before
    assert ptq("--resume") == 2
    assert "evaluate.windows: 3 -> 6" in capsys.readouterr().err
    assert ptq() == 0


def test_what_training_left_in_the_folder_is_not_taken_for_its_own(finished, ptq):
    left = {"calibrate": "calibration.safetensors", "init": "checkpoints/init/0",
            "pack": "packed/model.safetensors"}
    made = [finished / "stages" / f"{name}.json" for name in left]
    for file, name in zip(made, left.values(), strict=True):
        file.write_text(json.dumps({"files": {name: 1}}))
    with open(finished / "metrics.jsonl", "a", encoding="utf-8") as lines:
        lines.write('{"stage": "qat", "step": 1, "tokens": 8, "loss": 2.0}\n')
    before = json.loads((finished / "summary.json").read_text())["seconds"]
    assert ptq() == 0
    assert json.loads((finished / "summary.json").read_text())["seconds"] == before
    assert [file.exists() for file in made] == [False, True, False]
    made[1].unlink()


def test_resume_refuses_another_model(place, ptq_model, ptq, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "model"
    shutil.copytree(ptq_model, folder)
    crash(monkeypatch, "_quantise_block", 1)
    name = ("name=changed", f"teacher.path={folder}")
    with pytest.raises(RuntimeError):
        ptq(*name)
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 7]}')
    assert ptq(*name, "--resume") == 2
    assert "what it reads has changed" in capsys.readouterr().err
    assert list((place / "runs" / "changed" / "blocks").glob("block-*"))


def test_stages_are_recorded_forced_and_ended_after(finished, place, ptq, capsys):
    def records(folder):
        files = sorted((folder / "stages").iterdir())
        return {f.stem: json.loads(f.read_text())["id"] for f in files}

    before = records(finished)
    assert list(before) == ["quantise", "score_packed", "score_teacher"]
    assert ptq("--force", "score_packed") == 0
    err = capsys.readouterr().err
    assert "quantise: complete" in err and "score_packed: complete" not in err
    after = records(finished)
    assert [name for name in after if after[name] != before[name]] == ["score_packed"]
    assert ptq("name=ended", "--until", "quantise", "calibrate.mode=none") == 0
    folder = place / "runs" / "ended"
    assert list(records(folder)) == ["quantise"]
    assert (folder / "packed").is_dir() and not (folder / "summary.json").exists()


def test_the_pieces_of_version_0_1_are_taken_as_they_are(
    finished, place, ptq, monkeypatch, capsys
):
    """It had no records of stages: the keys of the pieces told what was complete."""
    folder = place / "runs" / "older"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "stages")
    for owner, name in ((blockwise, "init_block"), (packing, "save_packed"), (Job, "forward")):
        monkeypatch.setattr(owner, name, lambda *_, **__: 1 / 0)
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("name: ptq", "name: older"))
    assert ptq("name=older", "--resume") == 0
    summaries = [json.loads((f / "summary.json").read_text()) for f in (finished, folder)]
    for name in ("teacher", "packed", "relative_error", "tokens", "seconds", "dense", "cost"):
        assert summaries[0][name] == summaries[1][name], name
    shutil.rmtree(folder / "stages")
    (folder / "blocks" / "key").write_text("of another model")
    assert ptq("name=older", "--resume") == 2
    assert "what it reads has changed" in capsys.readouterr().err
    assert (folder / "blocks" / "block-000.safetensors").exists()
