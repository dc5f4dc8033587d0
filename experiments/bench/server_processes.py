"""Servers that a benchmark starts and ends: ours of a model folder, llama.cpp's of a GGUF file."""

from __future__ import annotations

import collections
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from rabit_jax.errors import BadInput
from rabit_jax.formats.gguf_file import read_gguf
from rabit_jax.progress import say

WAIT_SECONDS = 600  # for a model to be loaded
POLL_SECONDS = 0.5
# Becomes a command that ends with the process of that number, also where that is killed.
ENDING_WITH = """
import ctypes, os, sys
getattr(ctypes.CDLL(None), "prctl", lambda *_: 0)(1, 9)  # PR_SET_PDEATHSIG, SIGKILL: Linux alone
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class Server(NamedTuple):
    """How to start a server.

    Attributes:
      label: in the table.
      command: without the port.
      health: path that answers 200 when it is ready.
    """

    label: str
    command: tuple[str | int | Path, ...]
    health: str


def ours(folder: str, slots: int, context: int, bits: int) -> Server:
    """`experiments.serve` of a model folder, with so many bits of activations."""
    command = (sys.executable, "-m", "rabit_jax.experiments.serve", "--model", folder, "--slots",
               slots, "--context", context, "--activation-bits", bits)
    return Server(f"rabit_jax {folder}, {bits}-bit activations", command, "/healthz")


def llama_cpp(file: Path, slots: int, context: int, threads: int) -> Server:
    """llama-server of a GGUF file, with as many slots of the same context.

    Raises:
      BadInput: no GGUF file, or a build of llama.cpp that fails.
    """
    from rabit_jax.experiments.bench.llama_cpp import programs

    # Read before a build that takes minutes.
    label = f"llama.cpp {file.name}, blocks {block_type(file)}"
    program = programs(("llama-server",)) / "llama-server"
    command = (program, "-m", file, "-np", slots, "-c", slots * context, "-t", threads, "--host",
               "127.0.0.1")
    return Server(label, command, "/health")


def block_type(file: Path) -> str:
    """The type that most matrices of a GGUF file's blocks have."""
    types = [tensor.dtype for name, tensor in read_gguf(file).tensors.items()
             if name.startswith("blk.") and len(tensor.shape) > 1]
    return collections.Counter(types).most_common(1)[0][0] if types else "empty"


@contextlib.contextmanager
def running(server: Server) -> Iterator[str]:
    """Yields the URL of the server's API once it is ready; it is ended when the block ends.

    Raises:
      BadInput: it ends or does not answer in time; the message has its last line.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile() as log:
        command = map(str, (*server.command, "--port", port))
        process = subprocess.Popen([sys.executable, "-c", ENDING_WITH, str(os.getpid()), *command],
                                   stdout=log, stderr=log)
        try:
            say(f"starting {server.label}")
            _wait(process, f"http://127.0.0.1:{port}{server.health}", server.label, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen, url: str, label: str, log: IO[bytes]) -> None:
    """Returns when the URL answers."""
    begun = time.monotonic()
    while process.poll() is None and time.monotonic() - begun < WAIT_SECONDS:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(POLL_SECONDS)
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines() or ["no output"]
    what = "did not answer in time" if process.poll() is None else f"ended with {process.poll()}"
    raise BadInput(f"the {label} {what}: {lines[-1][:300]}")


def started(
    models: Sequence[str], files: Sequence[str], slots: int, context: int, threads: int,
    bits: Sequence[int],
) -> list[Server]:
    """The servers of model folders, one for each number of bits of activations, and of GGUF
    files."""
    return [*(ours(folder, slots, context, one) for folder in models for one in bits),
            *(llama_cpp(Path(file), slots, context, threads) for file in files)]
