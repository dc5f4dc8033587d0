"""One command as several processes: which of them this is, how they start and how they end.

Where the environment names several processes the command runs in a child of this process. JAX ends
a process in the middle of a C++ thread when another one has died, which Python cannot catch; the
parent sees it and exits with the code for "resumable".

Only the standard library and files that need no more are imported at the top: `supervised` forks
before anything else is loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

from rabit_jax.experiments.engine import streams

RESUMABLE = 75  # exit code: stopped, the same command goes on or begins again
STARTED = "RABIT_JAX_STARTED"  # descriptor on which the child tells its parent that all are there
ENDED = "another process of this run has ended, or the network to it"
GOES_ON = "the same command with --resume continues from the last checkpoint"
BEGINS_AGAIN = "the same command starts again"
# How to start a command that must be one process, by the source of the cluster.
ALONE = {
    "environment": "unset JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID",
    "slurm": "start it without srun, or by srun --ntasks=1",
    "ompi": "start it without mpirun",
}


@dataclass(frozen=True)
class Cluster:
    """Where this process stands among the others.

    Attributes:
      source: "environment" for JAX's own variables, or "slurm", "ompi" as JAX names them.
      coordinator: host and port of the first process; "" where JAX finds it.
      processes: their number.
      process: the number of this one, from 0.
      alone: whether no other of them is on this node, as far as the source tells.
    """

    source: str
    coordinator: str
    processes: int
    process: int
    alone: bool = False


def cluster(environment: Mapping[str, str] = os.environ) -> Cluster | None:
    """The cluster that the environment describes; None for a single process.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID go before what SLURM (`srun`) and
    Open MPI (`mpirun`) set.

    Raises:
      ValueError: a part of these variables is missing or is no number.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = {name: environment[name] for name in names if environment.get(name)}
    if given:
        missing = [name for name in names if name not in given]
        if missing:
            raise ValueError(f"the environment has {', '.join(given)} but no {', '.join(missing)}: "
                             "set all three, or none for a single process")
        found = Cluster("environment", given[names[0]], _number(given, names[1]),
                        _number(given, names[2]))
    elif "SLURM_STEP_NUM_TASKS" in environment and "SLURM_PROCID" in environment:
        tasks = _number(environment, "SLURM_STEP_NUM_TASKS")
        found = Cluster("slurm", "", tasks, _number(environment, "SLURM_PROCID"),
                        environment.get("SLURM_STEP_NUM_NODES") == str(tasks))
    elif "OMPI_COMM_WORLD_SIZE" in environment:
        found = Cluster("ompi", "", _number(environment, "OMPI_COMM_WORLD_SIZE"),
                        _number(environment, "OMPI_COMM_WORLD_RANK"),
                        environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1")
    else:
        return None
    if found.processes < 2:
        return None
    if not 0 <= found.process < found.processes:
        raise ValueError(f"the environment makes this process {found.process} of "
                         f"{found.processes}: they are numbered from 0")
    return found


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not text.isdigit():
        raise ValueError(f"{name} is {text!r}, wanted a number")
    return int(text)


def refusal(environment: Mapping[str, str] = os.environ) -> str:
    """Why a command that runs in one process cannot run here, as a sentence; "" where it can."""
    try:
        found = cluster(environment)
    except ValueError as error:
        return str(error)
    return "" if found is None else (
        f"this command runs in one process, and this is process {found.process} of "
        f"{found.processes} that were started together: {ALONE[found.source]}")


def supervised(then: str = GOES_ON) -> None:
    """Go on in a child where the environment names several processes; the parent never returns.

    Called in the first line of a command. The parent hands signals on and exits with the code of
    the child; where another process has ended the run that is 75, and `then` says what follows.
    """
    try:
        found = cluster()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if found is None:
        return
    streams.prepare()
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    parent, child = os.getpid(), os.fork()
    if child == 0:
        os.close(reader)
        os.setpgid(0, 0)  # Ctrl-C of a terminal reaches the parent, which hands it on once
        _end_with(parent)
        os.environ[STARTED] = str(writer)
        return
    os.close(writer)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as of a terminal that closes
            signal.signal(number, lambda number, _: _send(child, number))
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        os._exit(code)
    started = os.read(reader, 1)
    why = f"{ENDED}; {then}" if started else missing(found)
    os.write(2, f"process {found.process} of {found.processes}: {why}\n".encode())
    os._exit(RESUMABLE if started else 2)


def _send(child: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, number)


def _end_with(parent: int) -> None:
    """Let the system end this process when its parent has ended, however that happens."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(RESUMABLE)


def missing(found: Cluster) -> str:
    """The sentence for processes that did not all start in time."""
    if found.process == 0:
        return (f"of the {found.processes} processes not all came in time: the logs of the others "
                "say which have started; the run needs every one")
    where = f" at {found.coordinator}" if found.coordinator else ""
    if found.coordinator and not _listens(found.coordinator):
        return (f"process 0 does not answer{where}: start it, or correct JAX_COORDINATOR_ADDRESS")
    return (f"process 0{where} is there, but not all {found.processes} processes came in time: the "
            "logs of the others say which have started")


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=5):
            return True
    except (OSError, ValueError):
        return False


def start(start_timeout: int, heartbeat: int) -> None:
    """Connect with the other processes that the environment names, if it names any.

    Args:
      start_timeout: seconds in which all of them must come.
      heartbeat: seconds of silence after which a process counts as dead.
    """
    found = cluster()
    if found is None:
        return
    import jax

    from rabit_jax import progress

    _results_alone_on_stdout()

    # Without one coordinator address JAX asks the scheduler that started the processes.
    ours = found.source == "environment"
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    # On a CPU a collective holds a thread, and XLA has as many as cores: with few of them, programs
    # that run at once can wait for each other's threads for ever.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        os.environ.setdefault("NPROC", str(max(16, os.cpu_count() or 1)))
        # Process 0 alone may find its program in the cache; a program of the cache and one that was
        # compiled anew have been seen to wait for each other in their first collective.
        jax.config.update("jax_enable_compilation_cache", False)
    jax.distributed.initialize(
        coordinator_address=found.coordinator if ours else None,
        num_processes=found.processes if ours else None,
        process_id=found.process if ours else None,
        # Else JAX looks for a scheduler all the same, and takes from it which GPU this process has.
        cluster_detection_method="deactivate" if ours else found.source,
        initialization_timeout=start_timeout, heartbeat_timeout_seconds=heartbeat)
    if found.alone and not os.environ.get("JAX_LOCAL_DEVICE_IDS"):
        # Under a scheduler JAX gives each process one GPU, that of its number on the node.
        jax.config.update("jax_cuda_visible_devices", "all")
        jax.config.update("jax_rocm_visible_devices", "all")
    if descriptor := os.environ.get(STARTED):
        os.write(int(descriptor), b"s")
    if found.process:
        progress.silence()


def _results_alone_on_stdout() -> None:
    """Let what libraries write to descriptor 1 go to stderr, as Gloo's lines on its connections."""
    sys.stdout.flush()
    results = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = open(results, "w", buffering=1, encoding=sys.stdout.encoding, errors=streams.ANY)


def finish(code: int) -> int:
    """The exit code of one process of several; one that failed ends here and now.

    An orderly end waits for all processes, so one that ends alone must not take part in it: the
    others then notice at once and exit with 75.
    """
    found = cluster()
    if found is None or code == 0:
        return code
    streams.settle()
    if found.process == 0:
        time.sleep(2)  # the first is the coordinator: the others still say their own sentence
    os._exit(code)
