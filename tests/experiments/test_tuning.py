"""Tuning and end-to-end distillation of task ptq: better models, and the same ones when resumed."""

import json

import pytest
from safetensors.numpy import load_file

from rabit_jax.experiments.engine import tuning
from rabit_jax.formats.packed_model import load_packed

LAYERS = 3
TUNE = ("tune.epochs=2", "tune.sequences=24", "tune.held_out=4", "tune.batch_size=4",
        "tune.length=24")
END = ("end_to_end.steps=6", "end_to_end.batch_size=4", "end_to_end.length=24",
       "end_to_end.save_every=3", "end_to_end.log_every=1")
ALL = (*TUNE, *END, "evaluate.models=[teacher,init,tuned,packed]")


@pytest.fixture(scope="module")
def finished(place, ptq):
    assert ptq("name=tuned", *ALL) == 0
    return place / "runs" / "tuned"


def lines(folder, stage):
    text = (folder / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, text) if line["stage"] == stage]


def tensors(folder):
    return load_file(folder / "packed" / "model.safetensors")


def test_each_stage_comes_nearer_to_the_teacher(finished):
    summary = json.loads((finished / "summary.json").read_text())
    tune = summary["tune"]
    assert len(tune["before"]) == len(tune["after"]) == LAYERS
    assert all(a < b for a, b in zip(tune["after"], tune["before"], strict=True))
    assert all(min(losses) == a for losses, a in zip(tune["losses"], tune["after"], strict=True))
    assert [line["step"] for line in lines(finished, "tune")] == [0, 1, 2]
    losses = [line["kl"] for line in lines(finished, "end_to_end")]
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert summary["tokens"] == {"calibrate": 288, "tune": 576, "end_to_end": 576}
    assert {"tune", "end_to_end", "init", "pack"} <= summary["seconds"].keys()
    assert summary["init"]["ppl"] != summary["tuned"]["ppl"] != summary["packed"]["ppl"]
    # Arrays and two moments of scales and norms: less than the latents alone.
    assert 0 < summary["end_to_end"]["state_bytes"] < 4 * LAYERS * 7 * 64 * 64


def test_the_packed_model_has_the_signs_of_tuning_and_scales_of_its_own(finished, place, ptq):
    assert ptq("name=only-tuned", *TUNE, "evaluate.models=[packed]") == 0
    one, other = tensors(place / "runs" / "only-tuned"), tensors(finished)
    assert one.keys() == other.keys()
    bits = [name for name in one if name.endswith(".bits")]
    scales = [name for name in one if name.endswith((".g", ".h", "norm.weight"))]
    assert bits and all((one[name] == other[name]).all() for name in bits)
    kept = [name for name in scales if (one[name] == other[name]).all()]
    assert scales and not kept
    tuned = json.loads((finished / "summary.json").read_text())["tuned"]
    packed = json.loads((place / "runs" / "only-tuned" / "summary.json").read_text())["packed"]
    # What is scored between the stages has its norms in float32, the packed file in 16 bits.
    assert packed["ppl"] == pytest.approx(tuned["ppl"], rel=1e-2)


def test_tuning_moves_signs_and_norms_of_the_initialised_model(finished, place, ptq):
    assert ptq("name=plain", "evaluate.models=[packed]") == 0
    plain, tuned = tensors(place / "runs" / "plain"), tensors(finished)
    names = [name for name in plain if name.endswith((".bits", "layernorm.weight"))]
    assert names and not any((plain[name] == tuned[name]).all() for name in names)
    packed = json.loads((place / "runs" / "plain" / "summary.json").read_text())["packed"]
    init = json.loads((finished / "summary.json").read_text())["init"]
    assert init["ppl"] == pytest.approx(packed["ppl"], rel=1e-3)


@pytest.mark.parametrize(("where", "calls", "logged"), [
    ("tune_block", 2, [0, 1, 2]), ("_write", 1, [1, 2]), ("_tune_block", 2, [0, 1, 2])])
def test_crashed_and_resumed_is_the_uninterrupted_run(
    where, calls, logged, finished, place, ptq, monkeypatch
):
    real, seen = getattr(tuning, where), []

    def broken(*arguments, **named):
        found = real(*arguments, **named)
        seen.append(1)
        if len(seen) == calls:
            raise RuntimeError("crashed")
        return found

    monkeypatch.setattr(tuning, where, broken)
    name = f"name=crashed-{where}"
    with pytest.raises(RuntimeError, match="crashed"):
        ptq(name, *ALL)
    monkeypatch.undo()
    assert ptq(name, *ALL, "--resume") == 0
    folder = place / "runs" / f"crashed-{where}"
    one, other = tensors(folder), tensors(finished)
    assert all((one[n] == other[n]).all() for n in other)
    assert [line["step"] for line in lines(folder, "tune")] == logged
    left = sorted(f.name for f in (folder / "tune").iterdir())
    assert left == [*(f"block-{n:03}.safetensors" for n in range(LAYERS)), "key"]


def test_a_signal_ends_the_run_after_its_block_and_in_the_end_to_end_stage(
    finished, place, ptq, monkeypatch
):
    real = tuning.Job.check_stop

    def stop(job):
        if not done:
            done.append(1)
            job.stopped = True
        real(job)

    done = ["the calibration is not stopped"]
    monkeypatch.setattr(tuning.Job, "check_stop", stop)
    assert ptq("name=stopped", *ALL, "--until", "quantise") == 0
    done.clear()
    assert ptq("name=stopped", *ALL) == 75
    assert len(list((place / "runs" / "stopped" / "tune").glob("block-*"))) == 1
    assert ptq("name=stopped", *ALL, "--resume") == 0
    one, other = tensors(place / "runs" / "stopped"), tensors(finished)
    assert all((one[n] == other[n]).all() for n in other)


def test_a_second_run_does_nothing_again_and_a_new_setting_what_depends_on_it(
    finished, ptq, monkeypatch, capsys
):
    before = tensors(finished)
    monkeypatch.setattr(tuning, "tune_block", lambda *_, **__: 1 / 0)
    assert ptq("name=tuned", *ALL) == 0
    err = capsys.readouterr().err
    assert all(f"{stage}: complete" in err for stage in ("quantise", "tune", "end_to_end", "pack"))
    assert ptq("name=tuned", *ALL, "end_to_end.steps=3") == 0  # trained anew, not tuned anew
    assert "tune: complete" in capsys.readouterr().err
    after = tensors(finished)
    assert any((before[n] != after[n]).any() for n in before)
    assert ptq("name=tuned", *ALL) == 0
    assert all((before[n] == a).all() for n, a in tensors(finished).items())


def test_without_tuning_the_initialised_model_is_packed_again(place, ptq):
    """In the folder of a run that was tuned, whose packed file has the same size."""
    assert ptq("name=both", *TUNE, "evaluate.models=[]") == 0
    tuned = tensors(place / "runs" / "both")
    assert ptq("name=both", "evaluate.models=[]") == 0
    plain = tensors(place / "runs" / "both")
    assert any((tuned[n] != plain[n]).any() for n in plain)
    assert ptq("name=both", *TUNE, "evaluate.models=[]") == 0
    assert all((tuned[n] == a).all() for n, a in tensors(place / "runs" / "both").items())


def test_latents_that_were_kept_train_end_to_end(finished, place, ptq, capsys):
    latents = ("tune.keep_latents=true", "end_to_end.optimizer.freeze=[embedding,head,matrix]",
               "evaluate.models=[]")
    assert ptq("name=latents", *TUNE, *END, *latents[1:]) == 2
    assert "set tune.epochs and tune.keep_latents" in capsys.readouterr().err
    assert ptq("name=latents", *TUNE, *END, *latents) == 0
    folder = place / "runs" / "latents"
    one, other = tensors(folder), tensors(finished)
    changed = [(one[n] != other[n]).any() for n in one if n.endswith(".bits")]
    assert all(changed)
    kl, scales_alone = ([line["kl"] for line in lines(f, "end_to_end")] for f in (folder, finished))
    # The same student at the start, but for scales in 16 bits; then more of it moves.
    assert kl[0] == pytest.approx(scales_alone[0], rel=1e-2) and kl[-1] < kl[0]


@pytest.mark.more
def test_other_representations_and_inputs_of_the_teacher(place, ptq):
    """Groups have levels, codebooks only tables and scales; and a model without calibration."""
    for name, spec in (("groups", "{type: round_to_nearest, group: 16}"),
                       ("codes", "{type: codebook, bits: 3, iterations: 2}")):
        assert ptq(f"name={name}", *TUNE, *END, f"init.spec={spec}", "calibrate.mode=none",
                   "tune.inputs=teacher") == 0
        folder = place / "runs" / name
        tune = json.loads((folder / "summary.json").read_text())["tune"]
        assert all(a < b for a, b in zip(tune["after"], tune["before"], strict=True))
        load_packed(folder / "packed")


@pytest.mark.parametrize(("change", "words"), [
    ("tune.sequences=100000", "the training text has"),
    ("tune.length=96", "positions"),
    ("tune.held_out=24", "held_out is 24 of 24"),
    ("tune.optimizer.freeze=[latents]", "the roles are"),
])
def test_bad_settings_are_refused_before_anything_is_written(place, ptq, capsys, change, words):
    assert ptq("name=bad", *TUNE, change) == 2
    assert words in capsys.readouterr().err
    assert not (place / "runs" / "bad").exists()


def test_the_settings_belong_to_post_training(run, place, capsys):
    assert run(place, "name=other", "tune.epochs=1") == 2
    assert "belong to task ptq" in capsys.readouterr().err


@pytest.mark.more
def test_embedding_and_groups_are_tuned_and_trained_too(place, ptq):
    """Groups of 16 inputs in q and k; the levels of 8-bit rows train end to end."""
    rows = "{type: round_to_nearest, bits: 8, group: 0}"
    groups = "{type: residual, k: 2, rounds: 2, group: 16}"
    shared = (*TUNE, "tune.epochs=1", "evaluate.models=[packed]", f"init.embedding={rows}",
              f"init.by_path=[{{paths: 'layers/attn/[qk]/kernel', spec: {groups}}}]")
    assert ptq("name=table", *shared) == 0
    assert ptq("name=table-trained", *shared, *END, "end_to_end.optimizer.freeze=[latent]") == 0
    one, other = (load_packed(place / "runs" / name / "packed")[1]
                  for name in ("table", "table-trained"))
    for params in (one, other):
        assert type(params["embed"]["embedding"].matrix).__name__ == "PackedGroupUniform"
        assert type(params["layers"]["attn"]["q"]["kernel"]).__name__ == "PackedGroupedSign"
        assert type(params["layers"]["attn"]["v"]["kernel"]).__name__ == "PackedSign"
    pairs = [(p["embed"]["embedding"].matrix, p["layers"]["attn"]["q"]["kernel"])
             for p in (one, other)]
    for a, b, levels in zip(*pairs, ("s", "g"), strict=True):
        assert (a.bits == b.bits).all() and not (getattr(a, levels) == getattr(b, levels)).all()
