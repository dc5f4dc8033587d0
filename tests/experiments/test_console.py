"""What a command prints and how it ends: exit codes and tables."""

import errno
import importlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import rabit_jax
from rabit_jax.errors import BadInput
from rabit_jax.experiments.engine import console


def test_table_goes_where_it_is_told_and_formats_numbers(capsys):
    rows = [("teacher", 12.3456, 1_000_000), ("[init]", None, 3)]
    console.table("Results", ["name", "ppl", "bytes"], rows)
    out, err = capsys.readouterr()
    assert out == ""
    for word in ("Results", "teacher", "[init]", "12.35", "1,000,000", "-"):
        assert word in err
    console.table("Results", ["name", "ppl", "bytes"], rows, stdout=True)
    assert capsys.readouterr() == (err, "")


def raising(error):
    def main():
        raise error

    return main


def test_exit_codes(capsys):
    assert console.main_guard(lambda: None) == 0
    assert console.main_guard(lambda: 75) == 75
    assert console.main_guard(raising(BadInput("k is 5"))) == 2
    assert capsys.readouterr() == ("", "error: k is 5\n")
    assert console.main_guard(raising(KeyboardInterrupt()), resumable=True) == 75
    assert "--resume" in capsys.readouterr().err
    assert console.main_guard(raising(KeyboardInterrupt())) == 130
    assert "--resume" not in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENAMETOOLONG, errno.EROFS, errno.ENOENT,
                                    errno.EIO, errno.ESTALE, errno.ENOTDIR, errno.EEXIST])
def test_a_file_that_the_system_refuses_is_one_sentence(capsys, number):
    name = "a\nb" + "x" * 3000
    assert console.main_guard(raising(OSError(number, os.strerror(number), name))) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: cannot use a b") and os.strerror(number) in err
    assert err.count("\n") == 1 and len(err) < 600
    with pytest.raises(OSError, match="a bug"):
        console.main_guard(raising(OSError(errno.EINVAL, "a bug")))


def test_a_name_that_is_no_utf_8_is_one_sentence(capsys):
    """Such as the name of a model folder that its card is to hold."""
    def main():
        ("a model called " + os.fsdecode(b"caf\xe9")).encode()

    assert console.main_guard(main) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: a name or a text holds bytes that are no UTF-8")
    assert "a model called caf" in err
    assert err.count("\n") == 1


def test_a_full_disk_is_one_sentence_however_deep_it_lies(capsys):
    assert console.main_guard(raising(OSError(errno.ENOSPC, "No space left on device"))) == 2
    wrapped = RuntimeError("save failed")
    wrapped.__cause__ = ValueError("RESOURCE_EXHAUSTED: write: No space left on device")
    assert console.main_guard(raising(wrapped)) == 2
    assert capsys.readouterr().err.count("error: the disk is full: free some space") == 2
    named = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "runs/a/config.yaml")
    assert console.main_guard(raising(named)) == 2
    said = "error: the disk is full, runs/a/config.yaml cannot be written: free some space\n"
    assert capsys.readouterr().err == said


SAVING = """
import resource, sys
import jax.numpy as jnp
from rabit_jax.experiments.engine.console import main_guard
from rabit_jax.train.checkpoints import Checkpoints
def main():
    with Checkpoints(sys.argv[1]) as kept:
        kept.save(1, {"w": jnp.ones(8)})
        kept.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        rng = __import__("numpy").random.default_rng(0)
        for step in range(2, 5):
            kept.save(step, {str(n): jnp.asarray(rng.normal(size=(200, 200))) for n in range(12)})
sys.exit(main_guard(main, resumable=True))
"""


def test_a_full_disk_in_the_threads_of_a_save_is_one_sentence_alone(tmp_path):
    """A limit on the size of files stands in for the disk."""
    done = subprocess.run(
        [sys.executable, "-c", SAVING, str(tmp_path / "kept")], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    said = f"error: the disk is full, {tmp_path / 'kept'} cannot be written: free some space, "
    assert done.stderr == said + "then continue with --resume\n"
    assert done.returncode == 2 and done.stdout == ""
    assert "1" in {p.name for p in (tmp_path / "kept").iterdir()}


def test_any_other_error_propagates():
    with pytest.raises(FileNotFoundError):
        console.main_guard(raising(FileNotFoundError("x")))
    with pytest.raises(ValueError, match="bug"):
        console.main_guard(raising(ValueError("bug")))


@pytest.mark.parametrize("name", ["run", "ptq", "ablate", "evaluate", "generate", "serve", "export",
                                  "push"])
def test_every_command_tells_its_versions_and_completes(name, capsys):
    main = importlib.import_module(f"rabit_jax.experiments.{name}").main
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    lines = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines())
    assert ended.value.code == 0
    # The last line says what multiplies packed weights on a CPU.
    wanted = ["rabit_jax", "jax", "jaxlib", "python", "device"]
    assert list(lines) == wanted + ["packed"] * (jax.default_backend() == "cpu")
    assert lines["rabit_jax"] == rabit_jax.__version__ and lines["jax"] == jax.__version__
    with pytest.raises(SystemExit):
        main(["--print-completion", "bash"])
    wanted = "rabit-run" if name == "ptq" else f"rabit-{name}"
    assert "complete -o bashdefault -F _shtab_rabit_" in (out := capsys.readouterr().out)
    assert out.rstrip().endswith(wanted) and "--version" in out
