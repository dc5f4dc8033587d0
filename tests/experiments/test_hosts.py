"""Runs in several real processes over gloo, two CPU devices each: trained, killed, gone on with.

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

from rabit_jax.train.checkpoints import Checkpoints
from tests.experiments.conftest import settings, write_texts

pytestmark = pytest.mark.more
WORKER = Path(__file__).with_name("hosts_worker.py")
ROOT = WORKER.parents[2]


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def started(place, processes, *arguments, kill=None, devices=2, name="tiny"):
    """Exit codes and stderr of the processes of one run; process `kill` dies at step 5 of qat."""
    port, running = free_port(), []
    for n in range(processes):
        cluster = {} if processes == 1 else {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(n)}
        flags = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
                 "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        command = [sys.executable, str(WORKER), str(5 if kill == n else 0), "--config",
                   str(place / "config.yaml"), f"name={name}", *arguments]
        running.append(subprocess.Popen(
            command, env={**os.environ, **flags, **cluster}, text=True, stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL, cwd=ROOT))
    errors = [process.communicate(timeout=900)[1] for process in running]
    return [process.returncode for process in running], errors


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
    codes, errors = started(base, 2, "--until", "qat", kill=1, name="killed")
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
    codes, _ = started(base, 1, "--until", "qat", kill=0, name="alone", devices=4)
    assert codes == [-9]
    step = resumed_at(folder)
    before = losses(folder)
    done(base, 2, "--resume", "--until", "qat", name="alone")
    found = losses(folder)
    assert found[1] == pytest.approx(losses(undisturbed)[1], rel=1e-5)
    for later in range(step + 1, 5):  # what the one process had trained behind its last save
        assert found[later] == pytest.approx(before[later], rel=1e-5)


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
