"""Texts of tokens as they come, against decoding all of them at once."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rabit_jax.data.tokenizer import train_tokenizer
from rabit_jax.experiments.serving.writing import Writing, beginning, token_bytes, token_text


@pytest.fixture(scope="module")
def bytewise():
    """A tokenizer whose tokens are bytes, or few of them: most characters need several."""
    return train_tokenizer(["the cat sat on the mat"] * 3, 270)


@pytest.fixture(scope="module")
def spaced():
    """SentencePiece's: spaces are U+2581, and the first one of a text is dropped."""
    words = ["<unk>", "▁the", "▁cat", "s", "▁", *(f"<0x{n:02X}>" for n in range(256))]
    plain = Tokenizer(models.BPE({w: n for n, w in enumerate(words)}, [], unk_token="<unk>",
                                 byte_fallback=True))
    plain.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    plain.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(content=" ", left=1)])
    return PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>")


def written(tokenizer, prompt, new, stop=()):
    writing, pieces = Writing(tokenizer, prompt, stop), []
    for token in new:
        pieces.append(writing.add(token))
        if writing.stopped:
            return "".join(pieces)
    return "".join(pieces) + writing.rest()


@pytest.mark.parametrize("text", ["naïve café 🙂🚀 日本語", "the cat", " the  cats "])
def test_text_is_that_of_all_tokens_at_once(bytewise, spaced, text):
    ids = bytewise.encode(text)
    assert written(bytewise, bytewise.encode("the"), ids) == text
    new = [1, 2, 3, 2, *(5 + b for b in "é🙂".encode()), 2]
    assert written(spaced, [1], new) == " the cats caté🙂 cat"


def test_random_tokens_lose_nothing(bytewise):
    """Bytes that make no characters come as they are decoded together."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        prompt, new = bytewise.encode("the"), rng.integers(1, 257, 24).tolist()
        whole = bytewise.decode(prompt + new)[len("the") :]
        assert written(bytewise, prompt, new) == whole


def test_a_character_comes_whole(bytewise):
    writing = Writing(bytewise, bytewise.encode("the"), ())
    pieces = [writing.add(token) for token in bytewise.encode("🙂!")]
    assert pieces == ["", "", "", "🙂", "!"] and writing.rest() == ""


@pytest.mark.parametrize("stop, wanted", [
    (["cat"], "the "), (["t o", "sat"], "the cat "), (["never"], "the cat sat on the mat"),
    (["the matt", "mat"], "the cat sat on the "), (["the"], ""),
    (["mat!"], "the cat sat on the mat"),
])
def test_a_text_ends_before_its_first_stop_string(bytewise, stop, wanted):
    assert written(bytewise, [1], bytewise.encode("the cat sat on the mat"), stop) == wanted


def test_how_much_is_held_back():
    assert beginning("the ca", ["cat", "a"]) == 2
    assert beginning("aab", ["aabaabc"]) == 3
    assert beginning("the cat", ["cat"]) == 0
    assert beginning("cat", []) == 0


def test_texts_and_bytes_of_single_tokens(bytewise, spaced):
    euro = bytewise.encode("€")
    assert [b for token in euro for b in token_bytes(bytewise, token)] == list("€".encode())
    assert token_text(bytewise, bytewise.encode(" the")[0]).startswith(" ")
    assert token_text(spaced, 2) == " cat" and token_bytes(spaced, 2) == list(b" cat")
    assert token_bytes(spaced, 5 + 0xE2) == [0xE2] and token_text(spaced, 3) == "s"
