"""What the names of texts mean: windows against the published protocols, written down again."""

import random

import numpy as np
import pytest

from rabit_jax.data.tokenizer import train_tokenizer
from rabit_jax.errors import BadInput
from rabit_jax.evaluate import texts

WORDS = "the cat dog sat ran on under a mat log and or then house red blue".split()


@pytest.fixture(scope="module")
def documents():
    rng = random.Random(1)
    return [" ".join(rng.choice(WORDS) for _ in range(rng.choice([3, 20, 60]))) for _ in range(50)]


@pytest.fixture(scope="module")
def tokenizer(documents):
    return train_tokenizer(documents, 300)


def test_a_text_is_cut_in_order(tokenizer, tmp_path):
    text = "the cat sat on the mat\r\n\r\nnaïve — " * 5
    (tmp_path / "my.txt").write_bytes(text.encode())
    read = texts.read_text(f"file:{tmp_path / 'my.txt'}")
    assert read == [text.replace("\r\n", "\n")]
    found = texts.text_windows("file:x", read, tokenizer, 16)
    tokens = tokenizer(read[0])["input_ids"]
    assert found.total_tokens == len(tokens) and found.text_bytes == len(read[0].encode())
    assert found.tokens.ravel().tolist() == tokens[: len(tokens) // 16 * 16]
    few = texts.text_windows("file:x", read, tokenizer, 16, most=2)
    np.testing.assert_array_equal(few.tokens, found.tokens[:2])


def test_rows_of_a_table_are_joined_by_blank_lines(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"text": "one"}\n{"text": ""}\n{"text": "two"}\n')
    (tmp_path / "c.txt").write_text("three")
    assert texts.read_text(f"file:{tmp_path}/a.jsonl") == ["one\n\ntwo"]
    assert texts.read_text(f"file:{tmp_path}/[ac].*") == ["one\n\ntwothree"]


def test_the_begin_token_takes_the_first_place_of_every_window(documents, tokenizer):
    for name in ("file:x", "c4"):
        plain = texts.text_windows(name, documents, tokenizer, 24, most=5).tokens
        found = texts.text_windows(name, documents, tokenizer, 24, most=5, begin=7).tokens
        assert (found[:, 0] == 7).all() and not (plain[:, 0] == 7).all()
        np.testing.assert_array_equal(found[:, 1:], plain[:, 1:])


def test_which_part_of_which_dataset(monkeypatch):
    asked = []
    monkeypatch.setattr(texts, "named_text", lambda *a: asked.append(a) or iter(["one text"]))
    assert texts.read_text("wikitext2") == ["one text"] and asked == [("wikitext2", "test")]
    monkeypatch.setattr(texts, "named_text", lambda *a: asked.append(a) or map(str, range(9999)))
    assert len(texts.read_text("c4")) == 9999 and len(texts.read_text("c4-new")) == 1100
    assert set(asked[1:]) == {("c4", "validation")}


def test_c4_is_drawn_as_its_protocol_draws(documents, tokenizer):
    random.seed(0)  # the published loop, over the module's own generator
    wanted = []
    for _ in range(256):
        while True:
            ids = tokenizer(documents[random.randint(0, len(documents) - 1)])["input_ids"]
            if len(ids) > 24:
                break
        start = random.randint(0, len(ids) - 24 - 1)
        wanted.append(ids[start : start + 24])
    calls = []
    found = texts.text_windows("c4", documents, tokenizer, 24, progress=lambda *n: calls.append(n))
    np.testing.assert_array_equal(found.tokens, wanted)
    assert found.text_bytes is None and calls[-1] == (256, 256)
    few = texts.text_windows("c4", documents, tokenizer, 24, most=3)
    np.testing.assert_array_equal(few.tokens, wanted[:3])


def test_c4_new_joins_the_first_documents(documents, tokenizer):
    many = documents * 30  # 1500, of which 1100 count
    found = texts.text_windows("c4-new", many, tokenizer, 4)
    tokens = tokenizer(" ".join(many[:1100]))["input_ids"]
    assert found.tokens.shape == (256, 4)
    assert found.tokens.ravel().tolist() == tokens[: 256 * 4]


def test_bad_input(documents, tokenizer, tmp_path, monkeypatch):
    for name in ("wikitext", "file:", ""):
        with pytest.raises(BadInput, match="nearest is '.*': choose from wikitext2, c4, c4-new"):
            texts.read_text(name)
    with pytest.raises(BadInput, match="no file matches"):
        texts.read_text(f"file:{tmp_path / 'none.txt'}")
    with pytest.raises(BadInput, match="too short for one window"):
        texts.text_windows("file:x", ["the cat"], tokenizer, 64)
    monkeypatch.setattr(texts, "DRAWS", 1000)
    with pytest.raises(BadInput, match="found 0 windows of 4096 tokens in 50 documents"):
        texts.text_windows("c4", documents, tokenizer, 4096)


def test_a_text_out_of_reach(monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(BadInput, match=r"'c4' .* no route to the hub.*file:PATH instead of c4"):
        texts.read_text("c4")


def test_a_file_that_is_not_there_is_named_with_what_was_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("story.txt", "README.md"):
        (tmp_path / name).write_text("text")
    with pytest.raises(BadInput, match="^file:nothing.txt names no text: no file matches") as said:
        texts.check_name("file:nothing.txt")
    assert "README" not in str(said.value) and "story" not in str(said.value)
    with pytest.raises(BadInput, match="the nearest file there is '.*story.txt'"):
        texts.check_name("file:stroy.txt")
    with pytest.raises(BadInput, match="give file:story.txt"):
        texts.check_name("story.txt")
    texts.check_name("file:story.txt")
    texts.check_name("file:*.txt")
