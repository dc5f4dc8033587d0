"""One writer for a folder, whatever happened to the one before."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rabit_jax.errors import BadInput
from rabit_jax.experiments import run as command
from rabit_jax.formats.folder import write_folder
from rabit_jax.locks import locked

ROOT = Path(__file__).parents[1]
HOLDER = """
import sys
from rabit_jax.experiments.engine.folder import RunFolder
from rabit_jax.experiments.engine.settings import RunConfig
folder = RunFolder(RunConfig(name="mine", output=sys.argv[1]))
folder.open(resume=False)
print("training", flush=True)
sys.stdin.read()
folder.close()
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout.readline() == "training\n"
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("resume", [(), ("--resume",)])
def test_a_second_run_in_a_folder_is_refused_before_it_reads_text(
    tmp_path, holder, capsys, resume
):
    before = sorted(tmp_path.rglob("*"))
    config = tmp_path / "mine" / "config.yaml"
    assert command.main(["--config", str(config), "data.files=[/no/such/text]", *resume]) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert f"written by process {holder.pid} on {socket.gethostname()}" in err
    assert err.count("error: ") == 1 and sorted(tmp_path.rglob("*")) == before


def test_a_lock_does_not_outlive_its_process(tmp_path, holder):
    file = tmp_path / "mine" / ".lock"
    with pytest.raises(BadInput, match=f"process {holder.pid}"), locked(file, "the folder"):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert file.exists()
    with locked(file, "the folder"):
        assert f" {os.getpid()} " in file.read_text()
    assert not file.exists()


def test_one_process_writes_a_model_folder_at_a_time(tmp_path):
    folder = tmp_path / "packed"
    with (
        locked(tmp_path / ".packed.lock", folder),
        pytest.raises(BadInput, match="packed is being written by process"),
    ):
        write_folder(folder, [], {}, {"config.json": {}}, None)
    write_folder(folder, [], {}, {"config.json": {}}, None)
    assert list(tmp_path.iterdir()) == [folder]
