"""Records, lines, pieces and artefacts between stages: damage is named or mended, never used."""

import errno
import json
import os

import jax.numpy as jnp
import numpy as np
import pytest

import rabit_jax
from rabit_jax import BadInput, Stats
from rabit_jax.experiments.engine import inputs, qat, records, stages
from rabit_jax.experiments.engine.folder import RunFolder
from rabit_jax.experiments.engine.inputs import Inputs
from rabit_jax.experiments.engine.metrics import Metrics
from rabit_jax.experiments.engine.pieces import Pieces
from rabit_jax.experiments.engine.settings import RunConfig
from rabit_jax.experiments.engine.stages import Read

STAGES = {stage.name: stage for stage in qat.STAGES}


def flip(file, place=None, bit=1):
    content = bytearray(file.read_bytes())
    content[len(content) // 2 if place is None else place] ^= bit
    file.write_bytes(content)


@pytest.fixture
def folder(tmp_path):
    found = RunFolder(RunConfig(name="run", output=str(tmp_path)))
    (found.path / "stages").mkdir(parents=True)
    return found


def read(text="digest", name="calibrate"):
    return Read(name, {"calibrate": found_config().calibrate, "the training text": text})


def found_config():
    return RunConfig()


def complete(folder, stage, what):
    record = {**what.record(), "id": what.key, "result": {}}
    return stages.complete(folder, STAGES[stage], record)


@pytest.mark.parametrize("content", [
    b"", b"[", b"[1]", b"3", b"\xff\xfe{}", b'{"key": 5}', b'{"key": "a"}', b"[" * 100_000,
])  # fmt: skip
def test_a_damaged_record_is_set_aside_and_its_stage_done_again(folder, capsys, content):
    file = folder.path / "stages" / "calibrate.json"
    for _ in range(2):
        file.write_bytes(content)
        assert stages.completed(folder, STAGES["calibrate"], "a") is None
    err = capsys.readouterr().err
    assert err.count("calibrate.json is damaged") == 2 and err.count("done again") == 2
    names = sorted(p.name for p in (folder.path / "stages").iterdir())
    assert names == ["calibrate.json.damaged", "calibrate.json.damaged-2"]


def test_one_flipped_bit_of_a_number_in_a_record_is_noticed(folder):
    what = read()
    complete(folder, "calibrate", what)
    file = folder.path / "stages" / "calibrate.json"
    text = file.read_text()
    assert stages.completed(folder, STAGES["calibrate"], what.key)
    file.write_text(text.replace('"sequences": 128', '"sequences": 129'))
    assert stages.completed(folder, STAGES["calibrate"], what.key) is None


def test_records_of_0_1_have_no_checksum_and_are_read(folder):
    what = read()
    found = complete(folder, "calibrate", what)
    old = {n: v for n, v in found.items() if n not in ("sha256", "inputs", "digests")}
    (folder.path / "stages" / "calibrate.json").write_text(json.dumps(old))
    assert stages.completed(folder, STAGES["calibrate"], what.key) == old


def test_a_flipped_bit_in_the_statistics_is_named(folder):
    stats = {"layers/attn/q/kernel": Stats(jnp.ones((2, 8)), jnp.ones((2, 8)))}
    inputs.write_stats(folder.path / "calibration.safetensors", stats)
    complete(folder, "calibrate", read())
    run = Inputs(folder.config, folder)
    assert set(run.stats) == set(stats)
    run.forget()
    flip(folder.path / "calibration.safetensors", -3)
    with pytest.raises(BadInput, match="calibration.safetensors is damaged.*--force calibrate"):
        run.stats  # noqa: B018


def test_a_flipped_bit_in_a_teacher_that_a_run_trained_is_named(folder):
    teacher = folder.path / "teacher"
    teacher.mkdir()
    (teacher / "model.safetensors").write_bytes(os.urandom(200_000))
    complete(folder, "teacher", read(name="teacher"))
    inputs.check_teacher(str(teacher))
    flip(teacher / "model.safetensors")
    with pytest.raises(BadInput, match="model.safetensors is damaged.*--force teacher"):
        inputs.check_teacher(str(teacher))


def test_what_has_changed_since_a_stop_is_named(folder):
    stages.begin(folder, STAGES["calibrate"], read(), resume=False)
    order, stage = list(STAGES.values()), STAGES["calibrate"]
    stages._check_resumable(folder, order, stage, read())
    with pytest.raises(BadInput, match="what it reads has changed .the training text.;"):
        stages._check_resumable(folder, order, stage, read("another"))
    changed = Read("calibrate", {"calibrate": {"sequences": 3}, "the training text": "digest"})
    with pytest.raises(BadInput, match="calibrate.sequences: 128 -> 3"):
        stages._check_resumable(folder, order, stage, changed)


def test_a_damaged_record_of_an_earlier_stage_does_not_stop_a_resume(folder):
    complete(folder, "teacher", read(name="teacher"))
    stages.begin(folder, STAGES["calibrate"], read(), resume=False)
    order, teacher = list(STAGES.values()), STAGES["teacher"]
    with pytest.raises(BadInput, match="stage teacher reads has changed .the training text"):
        stages._check_resumable(folder, order, teacher, read("another", "teacher"))
    flip(folder.path / "stages" / "teacher.json", 40)
    stages._check_resumable(folder, order, teacher, read("another", "teacher"))


def test_an_unfinished_stage_of_0_1_goes_on(folder):
    (folder.path / "stages" / "qat.started").write_text("abc")
    what = Read("qat", {})
    with pytest.raises(BadInput, match="earlier version"):
        stages._check_resumable(folder, list(STAGES.values()), STAGES["qat"], what)
    (folder.path / "stages" / "qat.started").write_text(what.key)
    assert stages.begin(folder, STAGES["qat"], what, resume=True)


def test_damaged_metric_lines_are_set_aside_with_one_line(tmp_path, capsys):
    metrics = Metrics(tmp_path)
    good = {"stage": "qat", "step": 1, "tokens": 8, "loss": 2.0}
    bad = [b'{"stage": "qat", "st', b"5", b"[]", b'{"stage": "qat"}', b'{"step": 2}',
           b'{"stage": "qat", "step": "2"}', b'{"stage": "q\xfft", "step": 2}',
           b'{"stage": "qat", "step": 2, "tokens": "many"}']
    metrics.file.write_bytes(b"\n".join([json.dumps(good).encode(), *bad, b""]))
    assert metrics.lines() == [good]
    assert capsys.readouterr().err == ""
    metrics.forget(("teacher",))
    assert metrics.file.read_text() == json.dumps(good) + "\n"
    assert len((tmp_path / "metrics.damaged").read_text().splitlines()) == len(bad)
    assert capsys.readouterr().err.count("set aside") == 1
    metrics.forget(("teacher",))
    assert capsys.readouterr().err == ""


def test_a_folder_that_is_opened_holds_whole_lines_of_metrics(folder):
    """Also where every stage is complete and none would write to the file."""
    good = json.dumps({"stage": "qat", "step": 1, "tokens": 8, "loss": 2.0})
    folder.open(resume=False)
    folder.close()
    folder.metrics.file.write_text(f"{good}\n{good.replace('8', 'x')}\n{good[:9]}")
    folder.open(resume=True)
    assert folder.metrics.file.read_text() == good + "\n"


def test_a_flipped_bit_in_a_state_between_blocks_is_named_before_it_counts(tmp_path):
    pieces = Pieces(tmp_path)
    arrays = [np.full((2, 3), n, np.float32) for n in range(4)]
    with pieces.writing("x-000") as write:
        for array in arrays:
            write(array)
    found = list(pieces.reading("x-000", (2, 3), "float32"))
    np.testing.assert_array_equal(found, arrays)
    flip(tmp_path / "x-000")
    with pytest.raises(BadInput, match="x-000 is damaged"), pieces.writing("x-001") as write:
        for array in pieces.reading("x-000", (2, 3), "float32"):
            write(array)
    assert not pieces.has("x-001")
    pieces.drop("x-000")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_score_is_measured_again(tmp_path, capsys):
    pieces = Pieces(tmp_path)
    pieces.write_record("held_out.json", {"ppl": 12.5})
    assert pieces.record("held_out.json") == {"ppl": 12.5}
    file = tmp_path / "held_out.json"
    file.write_text(file.read_text().replace("12.5", "13.5"))
    assert pieces.record("held_out.json") is None
    assert "set aside" in capsys.readouterr().err


def test_files_written_with_digests_are_those_that_are_read(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert records.digests(tmp_path, ["a"])["a"].startswith("ba7816bf")


@pytest.mark.parametrize("version, refused", [("9.0", True), ("0.1.1", True), ("0.1.0", False),
                                              ("0.0.9", False), ("?", False), (3, False)])
def test_the_run_of_a_later_version_is_refused_and_stays_as_it_is(folder, version, refused):
    (folder.path / "config.yaml").write_text("setting_of_tomorrow: 1\n")
    name = "stages/qat.started" if version == "9.0" else "stages/teacher.json"
    record = {"versions": {"rabit_jax": version}, "of tomorrow": True}
    (folder.path / name).write_text(json.dumps(record))
    before = (folder.path / "config.yaml").read_text()
    if not refused:
        folder.open(resume=False)
        return folder.close()
    with pytest.raises(BadInput, match=f"was written by version {version} of rabit_jax"):
        folder.open(resume=False)
    assert json.loads((folder.path / name).read_text()) == record
    assert (folder.path / "config.yaml").read_text() == before


def test_what_a_stage_leaves_names_the_version_that_wrote_it(folder):
    stages.begin(folder, STAGES["calibrate"], read(), resume=False)
    started = json.loads((folder.path / "stages" / "calibrate.started").read_text())
    assert started["versions"]["rabit_jax"] == rabit_jax.__version__


def test_a_line_behind_one_that_was_cut_stays_whole(tmp_path):
    lines = [{"stage": "tune", "step": step, "loss": 0.5} for step in range(3)]
    for line in lines[:2]:
        metrics = Metrics(tmp_path)
        metrics.log(line)
        metrics.close()
    metrics.file.write_bytes(metrics.file.read_bytes()[:-5])
    Metrics(tmp_path).log(lines[2])
    assert metrics.lines() == [lines[0], lines[2]]


def test_a_full_disk_under_tensorboard_ends_a_run_that_gives_its_folder_up(folder, monkeypatch):
    """SummaryWriter's thread would end, and the run would wait for it for ever."""
    folder.lock()
    folder.metrics.log({"stage": "qat", "step": 0, "loss": 0.5})
    writer = folder.metrics._boards["qat"].writer
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(writer._py_recordio_writer, "_writer", full)
        with pytest.raises(OSError) as found:
            folder.metrics.log({"stage": "qat", "step": 1, "loss": 0.5})
    assert found.value.filename == str(folder.path / "tensorboard" / "qat")

    def close():
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(writer, "close", close)
    with pytest.raises(OSError, match="tensorboard/qat"):
        folder.close()
    RunFolder(folder.config).lock()
