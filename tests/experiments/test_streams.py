"""stdin, stdout and stderr that are closed, full, or read by nobody: real processes."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WATCHED = """
import sys
from rabit_jax.experiments.engine.signals import watch
watch("stopped", 130)
"""
GUARDED = WATCHED + """
from rabit_jax.experiments.engine.console import main_guard, table
from rabit_jax.progress import progress, say
def main():
    say("begun")
    with progress("work", 1) as bar:
        bar.update(1)
    print("result")
    if "table" in sys.argv:
        table("t", ["a"], [[1]], stdout=True)
    open(sys.argv[1], "w").write("done")
sys.exit(main_guard(main))
"""


def run(script, *arguments, **streams):
    return subprocess.run([sys.executable, "-c", script, *map(str, arguments)], cwd=ROOT, text=True,
                          **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams)


@pytest.fixture
def unread():
    """The end of a pipe whose reader has ended."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.fixture
def full():
    """A file on a disk that is full."""
    with open("/dev/full", "w") as file:
        yield file


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_nothing_that_is_said_goes_into_a_file_that_took_the_number_of_stderr(tmp_path, closed):
    script = WATCHED + """
from rabit_jax.experiments.engine.streams import tell
with open(sys.argv[1], "w") as file:
    tell("to nobody")
    print("nor this", file=sys.stderr)
    print(sys.stdin.read())
    file.write("content")
"""
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", script]
    done = subprocess.run([*command, str(tmp_path / "file")], cwd=ROOT, stdin=subprocess.DEVNULL,
                          capture_output=True)
    assert done.returncode == 0 and done.stderr == b""
    assert (tmp_path / "file").read_text() == "content"


@pytest.mark.parametrize("kind", ["lines", "table"])
def test_a_reader_of_results_that_has_ended_ends_the_command_without_a_word(
    tmp_path, unread, kind
):
    done = run(GUARDED, tmp_path / "file", kind, stdout=unread)
    assert done.returncode == 141
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["begun", "work"]


def test_help_that_nobody_reads_is_no_error(unread):
    script = WATCHED + "import argparse; argparse.ArgumentParser().parse_args(['--help'])"
    done = run(script, stdout=unread)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_full_disk_behind_stdout_is_one_sentence(tmp_path, full):
    done = run(GUARDED, tmp_path / "file", stdout=full)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: the disk is full: free some space"


@pytest.mark.parametrize("lost", ["unread", "full"])
def test_work_goes_on_where_progress_cannot_be_shown_any_more(tmp_path, lost, request):
    done = run(GUARDED, tmp_path / "file", stderr=request.getfixturevalue(lost))
    assert (done.returncode, done.stdout) == (0, "result\n")
    assert (tmp_path / "file").read_text() == "done"


def test_characters_that_an_encoding_lacks_are_written_as_numbers(tmp_path):
    script = WATCHED + "print('caf\\xe9 \\u2019 \\udce9')"
    done = run(script, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout) == (0, "caf\\xe9 \\u2019 \\udce9\n")


def test_signals_are_answered_where_stderr_is_lost(unread):
    script = WATCHED + """
import types
from rabit_jax.experiments.engine.signals import stopping_between_steps
run = types.SimpleNamespace(stopped=False)
with stopping_between_steps(run, "at the next step"):
    print("training", flush=True)
    while not run.stopped:
        pass
    print("saving", flush=True)
    sys.stdin.read()
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=unread, text=True)
    for line in process.stdout:
        assert line in ("training\n", "saving\n")
        process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130


def test_work_goes_on_when_its_terminal_is_closed_under_a_progress_bar():
    script = WATCHED + """
from rabit_jax.progress import progress, say
with progress("work", 2) as bar:
    print("drawing", flush=True)
    sys.stdin.readline()
    bar.update(1)
    bar.update(2)
say("after")
print("done")
"""
    terminal, ours = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=ours, text=True)
    os.close(ours)
    assert process.stdout.readline() == "drawing\n"
    os.close(terminal)
    assert process.communicate("go on\n") == ("done\n", None) and process.returncode == 0
