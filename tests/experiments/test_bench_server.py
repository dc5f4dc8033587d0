"""Servers that the benchmark starts: ready when they answer, ended afterwards, named where they
fail."""

import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import gguf
import numpy as np
import pytest

from rabit_jax import BadInput
from rabit_jax.experiments.bench import server_processes
from rabit_jax.experiments.bench.server_processes import Server, block_type, ours, running

ROOT = Path(__file__).parents[2]
STUB = """
import http.server, sys
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), http.server.SimpleHTTPRequestHandler).serve_forever()
"""


def test_a_server_is_ended_when_it_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(server_processes, "POLL_SECONDS", 0.01)
    (tmp_path / "health").touch()
    monkeypatch.chdir(tmp_path)
    with running(Server("stub", (sys.executable, "-c", STUB), "/health")) as url:
        assert url.startswith("http://127.0.0.1:") and url.endswith("/v1")
        with urllib.request.urlopen(url.removesuffix("/v1") + "/health") as answer:
            assert answer.status == 200
    with pytest.raises(OSError):
        urllib.request.urlopen(url.removesuffix("/v1") + "/health")


def test_a_server_that_ends_is_named_with_its_last_line():
    command = (sys.executable, "-c", "import sys; print('one'); sys.exit('no such model')")
    with pytest.raises(BadInput, match="the stub ended with 1: no such model"), running(
            Server("stub", command, "/health")):
        pass


def test_servers_are_named_by_what_they_multiply(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for name, kind in (("blk.0.attn_q.weight", "Q8_0"), ("blk.0.ffn_up.weight", "Q4_0"),
                       ("blk.0.ffn_down.weight", "Q4_0"), ("token_embd.weight", "F32")):
        kind = gguf.GGMLQuantizationType[kind]
        data = gguf.quants.quantize(np.ones((2, 32), np.float32), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.add_tensor("blk.0.ffn_norm.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert block_type(tmp_path / "m.gguf") == "Q4_0"
    mine = ours("runs/mine", 4, 512, 8)
    assert mine.command[-6:] == ("--slots", 4, "--context", 512, "--activation-bits", 8)
    assert mine.label == "rabit_jax runs/mine, 8-bit activations"


def test_a_server_ends_with_a_benchmark_that_is_killed(tmp_path):
    script = f"""
import os, signal, sys
from rabit_jax.experiments.bench.server_processes import Server, running
with running(Server("stub", (sys.executable, "-c", {STUB!r}), "/")) as url:
    print(url, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, text=True, timeout=60,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    url = done.stdout.strip().removesuffix("/v1")
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(OSError):
        for _ in range(100):  # the system ends it soon, but not at once
            urllib.request.urlopen(url).close()
