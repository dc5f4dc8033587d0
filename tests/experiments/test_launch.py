"""What the environment says of a run in several processes."""

import importlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rabit_jax.experiments import run
from rabit_jax.experiments.engine.launch import Cluster, cluster, missing

OWN = {"JAX_COORDINATOR_ADDRESS": "one:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}
SLURM = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3"}
MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}


@pytest.mark.parametrize("environment, wanted", [
    ({}, None),
    (OWN, Cluster("environment", "one:1234", 4, 2)),
    ({**OWN, **SLURM}, Cluster("environment", "one:1234", 4, 2)),
    (SLURM, Cluster("slurm", "", 8, 3)),
    ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, None),  # in a batch script, outside of srun
    ({**SLURM, "SLURM_STEP_NUM_NODES": "2"}, Cluster("slurm", "", 8, 3)),
    ({**SLURM, "SLURM_STEP_NUM_NODES": "8"}, Cluster("slurm", "", 8, 3, alone=True)),
    (MPI, Cluster("ompi", "", 2, 1)),
    ({**MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, Cluster("ompi", "", 2, 1, alone=True)),
    ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, None),
])
def test_the_cluster_of_an_environment(environment, wanted):
    assert cluster(environment) == wanted


@pytest.fixture
def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


VISIBLE = """
import sys
from rabit_jax.experiments.engine.launch import start
import jax
start(60, 60)
sys.stderr.write(f"visible {jax.config.values['jax_cuda_visible_devices']}\\n")
"""


@pytest.mark.parametrize("nodes, local, own, seen", [
    ("2", ("0", "0"), False, ["all", "all"]),  # one process a node
    ("1", ("0", "1"), False, ["0", "1"]),  # both on one: each its own, as JAX does it
    ("2", ("0", "0"), True, ["all", "all"]),  # JAX's own variables, inside of srun
])
def test_a_process_alone_on_its_node_sees_all_its_gpus(nodes, local, own, seen, free_port):
    given = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port}", "JAX_NUM_PROCESSES": "2"}
    running = [subprocess.Popen(
        [sys.executable, "-c", VISIBLE], text=True, stderr=subprocess.PIPE,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_PORT": str(free_port),
             "SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2",
             "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": nodes, "SLURM_PROCID": str(n),
             "SLURM_LOCALID": local[n], **({**given, "JAX_PROCESS_ID": str(n)} if own else {})})
        for n in range(2)]
    said = [process.communicate(timeout=300)[1] for process in running]
    assert [line for text in said for line in text.splitlines() if "visible" in line] == [
        f"visible {name}" for name in seen], said


@pytest.mark.parametrize("environment, said", [
    ({"JAX_PROCESS_ID": "0"}, "no JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES"),
    ({**OWN, "JAX_NUM_PROCESSES": "four"}, "'four', wanted a number"),
    ({**OWN, "JAX_PROCESS_ID": "4"}, "this process 4 of 4"),
])
def test_an_environment_that_is_incomplete(environment, said):
    with pytest.raises(ValueError, match=said):
        cluster(environment)


def test_a_first_process_that_does_not_answer_is_named():
    found = Cluster("environment", "localhost:1", 2, 1)
    assert missing(found).startswith("process 0 does not answer at localhost:1")


def test_a_command_says_what_the_environment_lacks():
    done = subprocess.run(
        [sys.executable, "-m", "rabit_jax.experiments.run", "--help"], text=True,
        env={**os.environ, "JAX_NUM_PROCESSES": "2"}, capture_output=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == ("error: the environment has JAX_NUM_PROCESSES but no "
                           "JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID: set all three, or none for a "
                           "single process\n")


@pytest.mark.parametrize("environment, said", [
    (OWN, "process 2 of 4 that were started together: unset JAX_COORDINATOR_ADDRESS"),
    (SLURM, "process 3 of 8 that were started together: start it without srun"),
    (MPI, "process 1 of 2 that were started together: start it without mpirun"),
    ({"JAX_NUM_PROCESSES": "2"}, "no JAX_COORDINATOR_ADDRESS"),
])
@pytest.mark.parametrize("name, arguments", [
    ("generate", ["--model", "m", "--prompt", "p"]),
    ("serve", ["--model", "m"]),
    ("export", ["--model", "m", "--output", "o"]),
    ("push", ["--model", "m", "--repo", "a/b"]),
    ("ablate", ["--config", "c.yaml"]),
    ("fetch_models", []),
    ("bench.__main__", ["svid"]),
])
def test_commands_of_one_process_refuse_to_be_one_of_several(
    name, arguments, environment, said, monkeypatch, capsys
):
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    command = importlib.import_module(f"rabit_jax.experiments.{name}")
    assert command.main(arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--dry-run", "--plan=cpu:8"])
def test_process_0_alone_prints_a_plan_and_a_dry_run(option, monkeypatch, capsys):
    for variable, value in OWN.items():
        monkeypatch.setenv(variable, value)
    assert run.main(["--config", "quickstart", option]) == 0
    assert capsys.readouterr() == ("", "")


SCRIPT = Path(__file__).parents[2] / "experiments" / "launch" / "slurm.sh"


@pytest.mark.parametrize("code, restarts, resumed, queued", [
    (0, 0, False, False), (75, 0, False, True), (75, 3, True, True), (75, 100, True, False),
    (2, 1, True, False)])
def test_the_script_for_slurm_queues_again_what_can_be_resumed(
    tmp_path, code, restarts, resumed, queued
):
    """With stand-ins for srun, which prints what it gets, and for scontrol."""
    for name, line in (("srun", f'printf "%s|" "$@"; exit {code}'), ("scontrol", 'echo "$@"')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", str(SCRIPT), "--config", "my x.yaml", "mesh.fsdp=32"], text=True,
        capture_output=True, env={
            "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7",
            "SLURM_RESTART_COUNT": str(restarts), "SLURM_CPUS_PER_TASK": "8"})
    assert done.returncode == code and not done.stderr
    command = "--kill-on-bad-exit=0|--label|--cpus-per-task=8|python|-m|experiments.run|"
    command += "--config|my x.yaml|mesh.fsdp=32|" + "--resume|" * resumed
    assert done.stdout == command + "requeue 7\n" * queued
