"""Runs in several real processes over gloo, two CPU devices each: trained, killed, gone on with;
trained students (task qat), models packed block by block (task ptq), and their evaluation.

`make test-hosts` runs these alone. The processes find each other by JAX's variables in the
environment, as on a cluster.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml

from rabit_jax.experiments import evaluate, run
from rabit_jax.experiments.engine.pieces import Pieces
from rabit_jax.train.checkpoints import Checkpoints
from tests.experiments.conftest import ptq_settings, settings, write_model, write_texts

pytestmark = pytest.mark.more
WORKER = Path(__file__).with_name("hosts_worker.py")
ROOT = WORKER.parents[2]
TUNE = {"epochs": 2, "sequences": 12, "held_out": 4, "batch_size": 4, "length": 24}
END = {"steps": 3, "batch_size": 4, "length": 24, "log_every": 1}


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def commanded(processes, command, *arguments, fate=None, devices=2):
    """Exit codes, stdout and stderr of the processes of one command, by process.

    `fate` is that of the last process, see `hosts_worker`.
    """
    port, running = free_port(), []
    for n in range(processes):
        cluster = {} if processes == 1 else {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(n)}
        flags = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
                 "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        own = fate if fate and n == processes - 1 else "lives"
        running.append(subprocess.Popen(
            [sys.executable, str(WORKER), own, command, *arguments], text=True, cwd=ROOT,
            env={**os.environ, **flags, **cluster}, stderr=subprocess.PIPE,
            stdout=subprocess.PIPE))
    said = [process.communicate(timeout=1800) for process in running]
    return [process.returncode for process in running], *zip(*said, strict=True)


def started(place, processes, *arguments, name="tiny", **options):
    """Exit codes and stderr of the processes of one run."""
    codes, _, errors = commanded(processes, "run", "--config", str(place / "config.yaml"),
                                 f"name={name}", *arguments, **options)
    return codes, errors


def done(place, processes, *arguments, **options):
    codes, errors = started(place, processes, *arguments, **options)
    assert codes == [0] * processes, "\n".join(errors)
    return errors


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run of two processes up to the student as initialised."""
    place = tmp_path_factory.mktemp("hosts")
    write_texts(place)
    config = settings(place)
    config["mesh"] = {"fsdp": 2}
    config["model"] |= {"d_model": 64, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16,
                        "d_hidden": 128}
    config["teacher"]["steps"] = 6
    config["qat"] |= {"steps": 8, "save_every": 2, "watch_every": 8}
    config["init"] = {"spec": {"rounds": 2}}
    (place / "config.yaml").write_text(yaml.safe_dump(config))
    done(place, 2, "--until", "init")
    return place


def copied(base, source, name):
    shutil.copytree(base / "runs" / source, base / "runs" / name)
    config = base / "runs" / name / "config.yaml"
    config.write_text(config.read_text().replace(f"name: {source}", f"name: {name}"))
    return base / "runs" / name


@pytest.fixture(scope="module")
def undisturbed(base):
    folder = copied(base, "tiny", "undisturbed")
    done(base, 2, "--until", "qat", name="undisturbed")
    return folder


@pytest.fixture(scope="module")
def killed(base):
    """Process 1 of 2 is killed in training."""
    folder = copied(base, "tiny", "killed")
    codes, errors = started(base, 2, "--until", "qat", fate="dies:qat:5", name="killed")
    assert codes == [75, 75] and "another process of this run has ended" in errors[0]
    # Whether the fifth line is written is a matter of which process is faster.
    assert list(losses(folder))[:4] == [1, 2, 3, 4] and len(losses(folder)) < 8, errors[0]
    assert 2 <= resumed_at(folder) <= 4, errors[0]
    return folder


def losses(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    found = [(line["step"], line["loss"]) for line in lines if line["stage"] == "qat"]
    assert [step for step, _ in found] == sorted({step for step, _ in found})  # each written once
    return dict(found)


def student(folder):
    """What training has left, as arrays of this process."""
    place = (folder / "checkpoints" / "student" / "0" / "default").absolute()
    with ocp.PyTreeCheckpointer() as reader:
        shapes = reader.metadata(place).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        return reader.restore(place, ocp.args.PyTreeRestore(restore_args=as_numpy))["state"]


def resumed_at(folder):
    """The newest whole checkpoint of training."""
    with Checkpoints(folder / "checkpoints" / "qat") as kept:
        return kept.steps()[-1]


def test_files_and_lines_are_written_once(base, undisturbed):
    assert list(losses(undisturbed)) == list(range(1, 9))
    record = json.loads((undisturbed / "stages" / "qat.json").read_text())
    assert record["result"]["tokens"] == 8 * 8 * 32
    assert not list(undisturbed.rglob("*orbax-checkpoint-tmp*"))


def test_what_was_trained_is_scored_packed_and_sampled_as_by_one_process(base, undisturbed):
    found = copied(base, "undisturbed", "whole")
    done(base, 2, name="whole")
    wanted = copied(base, "undisturbed", "by-one")
    done(base, 1, name="by-one", devices=4)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (found / "packed" / name).read_bytes() == (wanted / "packed" / name).read_bytes()
    two, one = (json.loads((f / "summary.json").read_text()) for f in (found, wanted))
    assert two["packed"]["bits_identical"] and two["packed"]["bytes"] == one["packed"]["bytes"]
    for name in ("teacher", "greedy", "round_to_nearest", "init", "qat", "packed"):
        assert two[name]["ppl"] == pytest.approx(one[name]["ppl"], rel=1e-5)
    samples = [json.loads((f / "stages/generate.json").read_text())["result"]["samples"]
               for f in (found, wanted)]
    assert samples[0] == samples[1] and len(samples[0]) == 1
    assert (found / "report.html").stat().st_size > 10_000


def test_killed_and_resumed_on_the_same_mesh_it_is_bitwise_the_same(base, undisturbed, killed):
    copied(base, "killed", "resumed")
    done(base, 2, "--resume", "--until", "qat", name="resumed")
    folder = base / "runs" / "resumed"
    assert losses(folder) == losses(undisturbed)
    assert jax.tree.all(jax.tree.map(np.array_equal, student(folder), student(undisturbed)))


@pytest.mark.parametrize("processes, devices", [
    (1, 4), (1, 1), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_other_processes_and_meshes_go_on_with_the_same_loss(
    base, undisturbed, killed, processes, devices
):
    name = f"elastic-{processes}-{devices}"
    folder = copied(base, "killed", name)
    step = resumed_at(folder)
    mesh = "mesh={}" if devices == 1 else "mesh={fsdp: 2, tensor: 2}"
    done(base, processes, "--resume", "--until", "qat", mesh, name=name, devices=devices)
    assert losses(folder)[step + 1] == pytest.approx(losses(undisturbed)[step + 1], rel=1e-5)


def test_two_processes_go_on_with_what_one_began(base, undisturbed):
    folder = copied(base, "tiny", "alone")
    codes, _ = started(base, 1, "--until", "qat", fate="dies:qat:5", name="alone", devices=4)
    assert codes == [-9]
    step = resumed_at(folder)
    before = losses(folder)
    done(base, 2, "--resume", "--until", "qat", name="alone")
    found = losses(folder)
    assert found[1] == pytest.approx(losses(undisturbed)[1], rel=1e-5)
    for later in range(step + 1, 5):  # what the one process had trained behind its last save
        assert found[later] == pytest.approx(before[later], rel=1e-5)


def test_a_bug_in_one_process_ends_the_others_at_once(base):
    folder = copied(base, "tiny", "broken")
    codes, errors = started(base, 2, "--until", "qat", fate="breaks:qat:3", name="broken")
    assert codes == [75, 1] and "ZeroDivisionError: a bug" in errors[1]
    assert "another process of this run has ended" in errors[0] and resumed_at(folder) == 2


def test_what_one_process_alone_can_is_refused_before_anything_is_written(base):
    codes, errors = started(base, 2, "qat.teacher_top=4", "qat.gamma=0", name="top")
    assert codes == [2, 2] and "made and read by one process" in errors[0]
    assert not (base / "runs" / "top").exists()


def test_a_process_that_is_missing_ends_the_others(base):
    codes, errors = started(base, 2, "hosts.start_timeout=20", "data.vocab_size=3", name="bad")
    assert codes == [2, 2] and "vocab_size" in errors[0]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_PROCESSES": "2",
                   "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}"}
    for n, said in ((0, "not all came in time"), (1, "process 0 does not answer")):
        ended = subprocess.run(
            [sys.executable, "-m", "rabit_jax.experiments.run", "--config",
             str(base / "config.yaml"), "hosts.start_timeout=3"],
            env={**environment, "JAX_PROCESS_ID": str(n)}, capture_output=True, text=True)
        assert ended.returncode == 2 and said in ended.stderr


@pytest.fixture(scope="module")
def post(tmp_path_factory):
    """A block-wise run of two processes up to the calibrated start."""
    place = tmp_path_factory.mktemp("post")
    write_texts(place)
    config = ptq_settings(place, write_model(place, 2))
    config |= {"name": "tiny", "mesh": {"fsdp": 2, "tensor": 2}, "tune": TUNE, "end_to_end": END,
               "hosts": {"heartbeat": 600}}  # for a machine with other work
    config["init"]["spec"]["rounds"] = 2
    config["calibrate"]["sequences"] = 8
    config["evaluate"]["windows"] = 4
    (place / "config.yaml").write_text(yaml.safe_dump(config))
    done(place, 2, "--until", "quantise")
    return place


@pytest.fixture(scope="module")
def packed(post):
    """The whole run, in two processes."""
    folder = copied(post, "tiny", "packed")
    done(post, 2, name="packed")
    return folder


def by_one(place, *arguments):
    """The run in this process, on one device."""
    assert run.main(["--config", str(place / "config.yaml"), "mesh={}", *arguments]) == 0


@pytest.fixture(scope="module")
def one(post):
    """The whole run in one process on the same mesh; one device has other rounding errors."""
    done(post, 1, name="one", devices=4)
    return post / "runs" / "one"


@pytest.fixture(scope="module")
def killed_tuning(post):
    """Process 1 of 2 is killed behind the first block."""
    folder = copied(post, "tiny", "killed")
    codes, errors = started(post, 2, "--until", "tune", fate="dies:tune:0", name="killed")
    assert codes == [75, 75] and "another process of this run has ended" in errors[0]
    assert [f.name for f in (folder / "tune").glob("block-*")] == ["block-000.safetensors"]
    return folder


def blocks(folder, stage):
    """The arrays of all packed blocks that a stage has left, by block and name."""
    return {f"{n} {name}": array for n in range(2) for name, array in
            Pieces(folder / stage).read_arrays(f"block-{n:03}.safetensors")[0].items()}


def assert_bits_near(found, wanted, share):
    for name, array in wanted.items():
        if name.endswith(":bits"):
            assert np.unpackbits(array ^ found[name]).mean() <= share, name


def test_statistics_and_signs_are_those_of_one_process(packed, one):
    found, wanted = blocks(packed, "blocks"), blocks(one, "blocks")
    stats = [name for name in wanted if name.endswith((":s_in", ":s_out"))]
    assert len(stats) == 2 * 2 * 7
    for name in stats:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, err_msg=name)
    assert_bits_near(found, wanted, 1e-4)
    assert_bits_near(blocks(packed, "tune"), blocks(one, "tune"), 1e-3)


def test_scores_are_those_of_one_process(packed, one):
    found, wanted = (json.loads((f / "summary.json").read_text()) for f in (packed, one))
    assert found["teacher"]["ppl"] == pytest.approx(wanted["teacher"]["ppl"], rel=1e-5)
    assert found["packed"]["ppl"] == pytest.approx(wanted["packed"]["ppl"], rel=1e-3)
    assert found["tune"]["before"] == pytest.approx(wanted["tune"]["before"], rel=1e-3)
    assert found["tune"]["after"] == pytest.approx(wanted["tune"]["after"], rel=1e-3)
    lines = map(json.loads, (packed / "metrics.jsonl").read_text().splitlines())
    steps = [(line["stage"], line["step"]) for line in lines]
    assert len(steps) == len(set(steps))  # each written once


def test_tuning_that_was_killed_goes_on_bitwise(post, packed, killed_tuning):
    folder = copied(post, "killed", "resumed")
    done(post, 2, "--resume", "--until", "tune", name="resumed")
    found, wanted = blocks(folder, "tune"), blocks(packed, "tune")
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_one_process_goes_on_with_what_two_began(post, packed, killed_tuning):
    folder = copied(post, "killed", "gone-on")
    by_one(post, "name=gone-on", "--resume", "--until", "tune")
    found, wanted = blocks(folder, "tune"), blocks(packed, "tune")
    for name, array in wanted.items():
        if name.startswith("0 "):  # which was there
            np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert_bits_near(found, wanted, 1e-3)


def test_what_one_process_finds_damaged_is_made_again_by_all(post, packed):
    folder = copied(post, "tiny", "seen")
    errors = done(post, 2, "--until", "tune", fate="sees:student-x-001", name="seen")
    assert "student-x-001 is damaged" in errors[0] and "stage tune starts again" in errors[0]
    for name, array in blocks(packed, "tune").items():
        np.testing.assert_array_equal(blocks(folder, "tune")[name], array, err_msg=name)


def test_a_budget_and_inputs_alone(post):
    options = ("calibrate.mode=activations", "init.budget=1.9", "tune.epochs=0",
               "end_to_end.steps=0", "evaluate.models=[]")
    done(post, 2, *options, name="budget-two")
    by_one(post, *options, "name=budget-one")
    found, wanted = (post / "runs" / name for name in ("budget-two", "budget-one"))
    k = [json.loads((f / "summary.json").read_text())["k"] for f in (found, wanted)]
    assert k[0] == k[1] and len({n for own in k[0].values() for n in own}) > 1
    assert_bits_near(blocks(found, "blocks"), blocks(wanted, "blocks"), 1e-4)


def test_evaluation_in_two_processes(post, packed, capsys):
    options = ("--model", str(packed / "packed"), "--ppl", f"file:{post / 'eval.txt'}",
               "--context", "32", "--limit", "8", "--json")
    codes, outputs, errors = commanded(2, "evaluate", *options)
    assert codes == [0, 0] and not outputs[1], errors
    capsys.readouterr()
    assert evaluate.main(options) == 0
    found, wanted = (json.loads(text) for text in (outputs[0], capsys.readouterr().out))
    assert len(found["rows"]) == 3 and found["size"] == wanted["size"]
    for one, other in zip(found["rows"], wanted["rows"], strict=True):
        assert one["metric"] == other["metric"]
        assert one["value"] == pytest.approx(other["value"], rel=1e-5)
    codes, _, errors = commanded(2, "evaluate", "--model", str(packed), "--tasks", "arc_easy")
    assert codes == [2, 2] and "--tasks runs in one process" in errors[0]
