"""Progress on stderr: lines in a log, what is read when, numbers for people."""

import numpy as np
import pytest

from rabit_jax import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only when told to."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_every_ten_seconds_and_one_at_the_end(clock, capsys):
    with progress.progress("QAT", total=100, start=40) as bar:
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

    with progress.progress("QAT", total=100) as bar:
        bar.update(1, tokens_per_second=Unread())
        bar.update(2)


def test_say_prints_text_as_it_is(capsys):
    text = "[bold] layers/[0] " + "x" * 300
    progress.say(text)
    assert capsys.readouterr().err == text + "\n"


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (3, "3"), (12345, "12,345"), (0.13051, "0.1305"), (6.25e-5, "6.25e-05"),
     (12345.6, "12,346"), (1e6, "1,000,000"), (float("nan"), "nan"), (float("inf"), "inf"),
     ("a", "a")],
)  # fmt: skip
def test_numbers_for_people(value, text):
    assert progress.number(value) == text


def test_only_large_models_show_that_they_are_read(clock, capsys):
    with progress.loading("small") as done:
        done(10**8, 2 * 10**8)
    assert capsys.readouterr().err == ""
    with progress.loading("org/large") as done:
        for ready in (1, 2, 4):
            clock[0] += 11.0
            done(ready * 10**9, 4 * 10**9)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("load org/large, MB: 2000/4000")
    assert lines[-1].startswith("load org/large, MB: 4000/4000")


def test_much_text_shows_what_was_read_of_it(clock, capsys):
    with progress.reading("tokenising", 100, counted=False) as done:
        done(60, None, documents=1, tokens=30)
        clock[0] += 11.0
        done(90, None, documents=2, tokens=45)
        done(120, None, documents=3, tokens=60)
        clock[0] += 11.0
        done(150, None, documents=12345, tokens=75)
    assert capsys.readouterr().err.splitlines() == [
        "tokenising: 12,345 documents, 75 tokens",
        "tokenising: 12,345 documents, 75 tokens, took 11s",
    ]


def test_hidden_progress_prints_nothing(clock, capsys):
    with progress.progress("scores", 2, hidden=True) as bar:
        clock[0] += 60.0
        bar.update(1)
    assert capsys.readouterr() == ("", "")
