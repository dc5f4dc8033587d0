"""Ctrl-C, SIGTERM and SIGHUP: real processes, told apart by what they print, and no clocks."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rabit_jax.experiments.engine import signals

ROOT = Path(__file__).parents[2]
BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
ALL = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
BLOCKED = """
import sys
from rabit_jax.experiments.engine.signals import watch, stopping_between_steps
def here(word):
    print(word, flush=True)
    sys.stdin.read()
"""
STEPS = BLOCKED + """
import types
from rabit_jax.experiments.engine.console import main_guard
watch("not this")
run = types.SimpleNamespace(stopped=False)
def main():
    with stopping_between_steps(run, "at the next step"):
        print("training", flush=True)
        while not run.stopped:
            pass
        if sys.argv[1] == "twice":
            here("saving")
    print("saved", flush=True)
    raise KeyboardInterrupt
sys.exit(main_guard(main, resumable=True))
"""


def start(*command, **environment):
    return subprocess.Popen(
        [sys.executable, *map(str, command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | environment,
    )


def signalled(process, number, word):
    """Send the signal once the process has printed `word`; its exit code, stdout and stderr."""
    for line in process.stdout:
        if line.strip() == word:
            break
    process.send_signal(number)
    # stdin stays open: a process that ignores the signal goes on waiting for it.
    return process.wait(60), process.stdout.read(), process.stderr.read()


@ALL
@pytest.mark.parametrize("command, ends", [
    *((name, 75) for name in ("run", "ptq", "ablate", "evaluate")),
    *((name, 130) for name in ("generate", "serve", "export", "push", "bench", "fetch_models")),
])
def test_a_signal_during_the_imports_is_answered_at_once(tmp_path, command, ends, number):
    """The first heavy import is one of NumPy or JAX; here it never ends."""
    for name in ("jax", "numpy"):
        (tmp_path / f"{name}.py").write_text("print('importing', flush=True); input()")
    process = start("-m", f"experiments.{command}", "--help", PYTHONPATH=str(tmp_path))
    code, _, err = signalled(process, number, "importing")
    said = "stopped; the same command" if ends == 75 else "stopped\n"
    assert code == ends and said in err and "Traceback" not in err


def test_the_console_scripts_watch_before_the_imports_too(tmp_path):
    (tmp_path / "numpy.py").write_text("print('importing', flush=True); input()")
    for name, ends in (("run", 75), ("export", 130)):
        script = f"from rabit_jax.experiments.commands import {name}; raise SystemExit({name}())"
        process = start("-c", script, "--help", PYTHONPATH=f"{tmp_path}:{ROOT}")
        assert signalled(process, signal.SIGTERM, "importing")[0] == ends


@BOTH
def test_a_signal_while_text_is_tokenised_leaves_nothing_half_written(tmp_path, number):
    script = BLOCKED + """
watch("stopped; the same command")
from rabit_jax.data import token_cache, tokens
from rabit_jax.data.tokenizer import train_tokenizer
def encoded(documents, tokenizer):
    yield "one", [1, 2]
    here("tokenising")
token_cache._encoded = encoded
tokens.tokenise(["a text"], train_tokenizer(["a text"], 260), sys.argv[1])
"""
    cache = tmp_path / "cache"
    code, _, err = signalled(start("-c", script, cache), number, "tokenising")
    assert code == 75 and err == "stopped; the same command\n"
    assert list(cache.iterdir()) == []


@BOTH
def test_a_signal_inside_a_callback_of_jax_is_not_lost(number):
    script = BLOCKED + """
watch("stopped; the same command")
import jax
jax.block_until_ready(jax.jit(lambda x: (jax.debug.callback(lambda: here("inside")), x))(1.0))
jax.effects_barrier()
"""
    assert signalled(start("-c", script), number, "inside")[0] == 75


def asked_to_save(number):
    """A training that a first signal has stopped, and that is saving."""
    process = start("-c", STEPS, "twice")
    for line in process.stdout:
        if line == "training\n":
            process.send_signal(number)
        elif line == "saving\n":
            break
    return process


@BOTH
def test_between_steps_the_first_signal_asks_and_the_second_ends(number):
    code, out, err = signalled(start("-c", STEPS, "once"), number, "training")
    assert (code, out) == (75, "saved\n")
    assert err == f"stopping at the next step (again to stop at once)\n{signals.CONTINUE}\n"
    process = asked_to_save(number)
    process.send_signal(number)
    assert process.wait(60) == 75 and signals.CONTINUE in process.stderr.read()


@pytest.mark.parametrize("first", [signal.SIGHUP, signal.SIGTERM])
def test_a_closed_terminal_asks_once_however_often_it_is_told(first):
    """The shell and the system both tell of it, and a session's end is SIGTERM and SIGHUP."""
    process = asked_to_save(first)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGHUP)
    out, err = process.communicate("go on\n", 60)
    assert (process.returncode, out) == (75, "saved\n")
    assert err == f"stopping at the next step (again to stop at once)\n{signals.CONTINUE}\n"


def test_under_nohup_a_closed_terminal_is_nothing():
    script = BLOCKED + """
import os, signal
watch("stopped")
os.kill(os.getpid(), signal.SIGHUP)
here("goes on")
"""
    process = subprocess.Popen(["nohup", sys.executable, "-c", script], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.communicate("", 60)[0] == "goes on\n" and process.returncode == 0


@ALL
def test_what_a_command_has_started_ends_with_it_and_what_that_has_started(number):
    script = BLOCKED + """
import subprocess
watch("stopped", 130)
subprocess.run(["sh", "-c", "sh -c 'echo started; exec sleep 600'; true"])
"""
    process = start("-c", script)
    assert process.stdout.readline() == "started\n"
    process.send_signal(number)
    # They hold the same pipe, which ends with the last of them.
    assert process.communicate(timeout=60) == ("", "stopped\n") and process.returncode == 130


@ALL
def test_a_signal_behind_the_end_of_a_command_changes_nothing(number):
    """As in the second in which JAX and the interpreter go."""
    script = f"import atexit, os\natexit.register(os.kill, os.getpid(), {int(number)})\n" \
             + BLOCKED + "\nwatch('stopped', 130)\nprint('done')"
    process = start("-c", script)
    assert process.communicate("", 60) == ("done\n", "") and process.returncode == 0


@ALL
def test_no_lock_of_a_model_folder_is_left(number, tmp_path):
    script = BLOCKED + """
from pathlib import Path
from rabit_jax.formats.folder import write_folder
def shards():
    here("writing")
    yield "model.safetensors", {}
watch("stopped", 130)
write_folder(Path(sys.argv[1]) / "model", shards(), {}, {}, None)
"""
    process = start("-c", script, tmp_path)
    assert signalled(process, number, "writing")[::2] == (130, "stopped\n")
    assert list(tmp_path.iterdir()) == []


def test_in_a_call_from_python_the_process_goes_on():
    class Run:
        stopped = False

    run = Run()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), signals.stopping_between_steps(run, "at the next step"):
        signal.raise_signal(signal.SIGTERM)
        assert run.stopped
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_temporary_files_of_a_killed_process_are_removed_by_the_next(tmp_path):
    script = BLOCKED + """
from pathlib import Path
from rabit_jax.atomic import replacing
with replacing(Path(sys.argv[1]) / "states.bin") as new:
    new.write_bytes(b"half")
    here("writing")
"""
    again = "from rabit_jax.atomic import write_text; from pathlib import Path; import sys; " \
            "write_text(Path(sys.argv[1]) / 'other', 'whole')"
    lives, dies = start("-c", script, tmp_path), start("-c", script, tmp_path)
    try:
        assert lives.stdout.readline() == "writing\n"
        code, _, _ = signalled(dies, signal.SIGKILL, "writing")
        assert code == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 2
        assert start("-c", again, tmp_path).wait(60) == 0
        # What a living process writes stays.
        assert len([p for p in tmp_path.iterdir() if p.name.startswith(".")]) == 1
    finally:
        lives.communicate("")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "states.bin"]


@ALL
def test_keys_stop_an_answer_and_a_request_to_end_ends_the_process(number):
    """In a chat Ctrl-C is for the answer alone; behind it a signal ends the command."""
    script = BLOCKED + """
from rabit_jax.experiments.engine.signals import interrupted_by_keys
watch("stopped", 130)
try:
    with interrupted_by_keys():
        here("answering")
except KeyboardInterrupt:
    here("asked again")
"""
    process = start("-c", script)
    for line in process.stdout:
        if line == "answering\n":
            break
    process.send_signal(number)
    if number == signal.SIGINT:
        code, _, err = signalled(process, number, "asked again")
    else:
        code, err = process.wait(60), process.stderr.read()
    assert (code, err) == (130, "stopped\n")
