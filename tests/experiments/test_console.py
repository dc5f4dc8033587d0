"""What a command prints and how it ends: exit codes, lines in a log, tables."""

import errno

import numpy as np
import pytest

from rabit_jax.errors import BadInput
from rabit_jax.experiments.engine import console


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only when told to."""
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_every_ten_seconds_and_one_at_the_end(clock, capsys):
    with console.progress("QAT", total=100, start=40) as bar:
        for step in range(41, 101):
            clock[0] += 1.0
            bar.update(step, loss=np.float32(0.25), tokens_per_second=12345.6)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[0] == "QAT: 50/100, loss 0.25, 12,346 tokens/s, 50s left"
    assert lines[-1] == "QAT: 100/100, loss 0.25, 12,346 tokens/s, took 1m00s"
    assert len(lines) == 6


def test_values_are_not_read_when_nothing_is_drawn(clock, capsys):
    class Unread:
        def __float__(self):
            raise AssertionError("read")

    with console.progress("QAT", total=100) as bar:
        bar.update(1, tokens_per_second=Unread())
        bar.update(2)


def test_say_prints_text_as_it_is(capsys):
    text = "[bold] layers/[0] " + "x" * 300
    console.say(text)
    assert capsys.readouterr().err == text + "\n"


def test_table_goes_where_it_is_told_and_formats_numbers(capsys):
    rows = [("teacher", 12.3456, 1_000_000), ("[init]", None, 3)]
    console.table("Results", ["name", "ppl", "bytes"], rows)
    out, err = capsys.readouterr()
    assert out == ""
    for word in ("Results", "teacher", "[init]", "12.35", "1,000,000", "-"):
        assert word in err
    console.table("Results", ["name", "ppl", "bytes"], rows, stdout=True)
    assert capsys.readouterr() == (err, "")


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (3, "3"), (12345, "12,345"), (0.13051, "0.1305"), (6.25e-5, "6.25e-05"),
     (12345.6, "12,346"), (1e6, "1,000,000"), (float("nan"), "nan"), (float("inf"), "inf"),
     ("a", "a")],
)  # fmt: skip
def test_numbers_for_people(value, text):
    assert console.number(value) == text


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


def test_a_full_disk_is_one_sentence_however_deep_it_lies(capsys):
    assert console.main_guard(raising(OSError(errno.ENOSPC, "No space left on device"))) == 2
    wrapped = RuntimeError("save failed")
    wrapped.__cause__ = ValueError("RESOURCE_EXHAUSTED: write: No space left on device")
    assert console.main_guard(raising(wrapped)) == 2
    assert capsys.readouterr().err.count("error: the disk is full") == 2


def test_any_other_error_propagates():
    with pytest.raises(FileNotFoundError):
        console.main_guard(raising(FileNotFoundError("x")))
    with pytest.raises(ValueError, match="bug"):
        console.main_guard(raising(ValueError("bug")))


def test_only_large_models_show_that_they_are_read(clock, capsys):
    with console.loading("small") as done:
        done(10**8, 2 * 10**8)
    assert capsys.readouterr().err == ""
    with console.loading("org/large") as done:
        for ready in (1, 2, 4):
            clock[0] += 11.0
            done(ready * 10**9, 4 * 10**9)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("load org/large, MB: 2000/4000")
    assert lines[-1].startswith("load org/large, MB: 4000/4000")
