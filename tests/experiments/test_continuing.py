"""Text in whole characters, padding, and the stopwatch."""

import jax
import numpy as np
import pytest

from rabit_jax.data.tokenizer import train_tokenizer
from rabit_jax.experiments.engine import continuing
from rabit_jax.experiments.engine.continuing import Speed, Stopwatch, Text, pad_left, until_end


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat sat on the mat"] * 3, 290)


def test_characters_are_shown_once_they_are_whole(tokenizer):
    wanted = " naïve 🙂🙃 cat é"
    ids = tokenizer.encode(wanted)
    text = Text(tokenizer, tokenizer.encode("the"), ())
    pieces = [text.add([token]) for token in ids]
    assert "".join(pieces) == wanted == text.whole() and text.rest() == ""
    # Four bytes of a face give nothing, nothing, nothing and the face.
    at = pieces.index("🙂")
    assert pieces[at - 3 : at] == ["", "", ""]
    assert not any("\ufffd" in piece for piece in pieces)


def test_what_never_becomes_whole_is_shown_at_the_end(tokenizer):
    ids = tokenizer.encode("cat🙂")
    text = Text(tokenizer, [], (7,))
    assert text.add(ids[:-1]) + text.add([7]) == "cat"
    assert text.rest() == "\ufffd" and text.whole() == "cat\ufffd"


def test_a_first_space_is_kept():
    class Dropping:
        """Decodes as SentencePiece does: no space before the first word."""

        def decode(self, ids, **_):
            return "".join([" the", " cat", " sat"][n] for n in ids).removeprefix(" ")

    text = Text(Dropping(), [0], ())
    assert text.add([1]) + text.add([2]) == " cat sat"


def test_padding_is_on_the_left():
    tokens, mask = pad_left([[5], [1, 2, 3]])
    np.testing.assert_array_equal(tokens, [[0, 0, 5], [1, 2, 3]])
    np.testing.assert_array_equal(mask, [[False, False, True], [True, True, True]])
    tokens, mask = pad_left([[5, 6, 7]], 4)
    np.testing.assert_array_equal(tokens, [[0, 5, 6, 7]])
    np.testing.assert_array_equal(mask, [[False, True, True, True]])


def test_rows_are_cut_behind_the_first_end():
    assert until_end([4, 2, 9, 2], (9, 2)) == [4, 2]
    assert until_end([4, 5], ()) == [4, 5]


def test_speed_in_words():
    assert str(Speed(7, 0.5, 30, 2.0)) == (
        "prefill: 7 tokens in 0.50 s, 14.0 tokens/s; decode: 30 tokens in 2.00 s, 15.0 tokens/s "
        "(compilation not included)")


def test_the_stopwatch_leaves_compilation_out(monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr(continuing.time, "perf_counter", lambda: next(ticks))
    function = jax.jit(lambda x: x * 3 + 1)
    x = np.ones(5, np.float32)
    with Stopwatch() as compiling:
        function(x)
    assert compiling.start > 0 and compiling.seconds == 1
    before = next(ticks)
    with Stopwatch() as compiled:
        function(x)
    assert compiled.start == before + 1 and compiled.seconds == 1
