"""QAT without its teacher, from the likeliest tokens on disk; traces and figures of a run."""

import json

import jax
import numpy as np
import pytest

from rabit_jax.experiments.engine import taught
from rabit_jax.experiments.engine.settings import Compute
from rabit_jax.experiments.planning.targets import known_chip

pytestmark = pytest.mark.more

KEPT = ("qat.gamma=0", "qat.teacher_top=40")


@pytest.fixture(scope="module")
def kept(place, run):
    """A run up to QAT of 8 steps, traced in two of them."""
    assert run(place, *KEPT, "--until", "qat", "--profile", "3:4", "--peak-flops", "1e12") == 0
    return place / "runs" / "tiny"


def lines(folder, stage):
    text = (folder / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, text) if line["stage"] == stage]


def test_a_run_keeps_a_piece_for_each_step_and_reports_the_error(kept):
    record = json.loads((kept / "stages" / "teacher_logits.json").read_text())["result"]
    pieces = sorted((kept / "teacher-logits").glob("step-0*"))
    assert len(pieces) == 8
    assert record["bytes"] == 8 * 8 * 32 * (40 * 6 + 4)
    assert 0 < record["rest_mass"] < 1
    assert 0 < record["kl_start_kept"] < record["kl_start_exact"]
    losses = [line["kl"] for line in lines(kept, "qat")]
    assert len(losses) == 8 and np.isfinite(losses).all()
    np.testing.assert_allclose(losses[0], record["kl_start_kept"], rtol=1e-4)


def test_metrics_have_the_figures_of_the_machine(kept):
    for stage in ("teacher", "qat"):
        found = lines(kept, stage)[-1]
        assert 0 < found["mfu"] < 1 and 0 <= found["input_wait"] < 1
        assert found["device_memory"] is None  # a CPU's allocator does not tell
        assert found["tokens_per_second"] > 0


def test_a_trace_is_written_for_each_training(kept):
    for stage in ("teacher", "qat"):
        files = list((kept / "profile" / stage).rglob("*.xplane.pb"))
        assert len(files) == 1 and files[0].stat().st_size > 1000


def test_a_stopped_stage_goes_on_and_a_damaged_piece_is_made_again(
    kept, place, run, monkeypatch, capsys
):
    folder = place / "runs" / "again"
    written, write = [], taught.Pieces.write_arrays

    def interrupted(self, name, arrays, metadata=None):
        if len(written) == 3:
            raise KeyboardInterrupt
        write(self, name, arrays, metadata)
        written.append(name)

    with monkeypatch.context() as patch:
        patch.setattr(taught.Pieces, "write_arrays", interrupted)
        assert run(place, *KEPT, "name=again", "--until", "teacher_logits") == 75
    before = {p.name: p.stat().st_mtime_ns for p in (folder / "teacher-logits").glob("step-*")}
    assert len(before) == 3
    assert run(place, *KEPT, "name=again", "--until", "teacher_logits", "--resume") == 0
    after = {p.name: p.stat().st_mtime_ns for p in (folder / "teacher-logits").glob("step-*")}
    assert len(after) == 8 and before.items() <= after.items()
    piece = folder / "teacher-logits" / taught.step_name(5)
    content = bytearray(piece.read_bytes())
    content[-9] ^= 1
    piece.write_bytes(bytes(content))
    assert run(place, *KEPT, "name=again", "--until", "qat") == 0
    assert "step-0000005 is damaged" in capsys.readouterr().err
    assert lines(folder, "qat")[-1]["kl"] == lines(place / "runs" / "tiny", "qat")[-1]["kl"]


def test_hidden_states_of_a_teacher_that_is_not_run_are_refused(place, run, capsys):
    assert run(place, "qat.gamma=1", "qat.teacher_top=4", "--dry-run") == 2
    assert "set gamma to 0" in capsys.readouterr().err


def test_more_tokens_than_there_are_are_refused_before_anything_is_written(place, run, capsys):
    assert run(place, "qat.gamma=0", "qat.teacher_top=10000", "name=many") == 2
    assert "qat.teacher_top is 10000 of a vocabulary of 300" in capsys.readouterr().err
    assert not (place / "runs" / "many").exists()


@pytest.mark.parametrize("steps", ["5", "0:3", "4:2", "a:b"])
def test_steps_that_cannot_be_traced_are_refused(place, run, steps, capsys):
    assert run(place, "--profile", steps) == 2
    assert "as in 11:13" in capsys.readouterr().err


def test_what_is_known_of_a_device():
    assert known_chip("NVIDIA H200").flops16 == 989e12
    assert known_chip("TPU v5 lite").memory < 17e9 and known_chip("cpu") is None


@pytest.mark.more
def test_a_teacher_in_8_bits_trains_and_reports_its_error(place, run):
    assert run(place, "name=short", "compute.teacher=int8", "--until", "qat") == 0
    record = json.loads((place / "runs" / "short" / "stages" / "qat.json").read_text())["result"]
    assert 0 < record["teacher_kl"] < 1e-3


def test_a_teacher_in_bfloat16_or_8_bits_keeps_its_norms():
    """Kernels are cast to the compute dtype at every product in any case; norms stay."""
    params = {"layers": {"attn": {"q": {"kernel": np.full((2, 4, 4), 1.003, np.float32)}}},
              "final_norm": {"scale": np.full(4, 1.003, np.float32)}}
    held = Compute(teacher="bfloat16").held(jax.tree.map(jax.numpy.asarray, params))
    assert held["layers"]["attn"]["q"]["kernel"].dtype == jax.numpy.bfloat16
    assert held["final_norm"]["scale"].dtype == np.float32
    rounded = Compute(teacher="int8").held(jax.tree.map(jax.numpy.asarray, params))
    node = rounded["layers"]["attn"]["q"]["kernel"]
    assert node.codes().dtype == np.uint8
    np.testing.assert_allclose(node.dense(), 1.003, rtol=1e-3)
    shapes = jax.eval_shape(Compute(teacher="int8").held, params)
    assert jax.tree.structure(shapes) == jax.tree.structure(rounded)


