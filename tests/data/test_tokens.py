"""The token cache and the batches, against brute force."""

import json
import math
import random

import numpy as np
import pytest

from rabit_jax import progress
from rabit_jax.data import token_cache, tokens
from rabit_jax.data.tokenizer import train_tokenizer
from rabit_jax.data.tokens import batch, tokenise, tokenise_stream, windows
from rabit_jax.errors import BadInput

TEXTS = ["The first document, naïve.\n", "Another one here.", "", "The last one."]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 280)


def words(size):
    """A tokeniser of `size` whole words w0, w1, ...; w0 ends a document."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.WordLevel({f"w{n}": n for n in range(size)}, unk_token="w1"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="w0", unk_token="w1")


def test_tokens_are_those_of_each_document_and_its_end(tokenizer, tmp_path):
    text = tokenise(TEXTS, tokenizer, tmp_path)
    expected = [token for part in TEXTS for token in [*tokenizer.encode(part), 0]]
    assert text.tokens.tolist() == expected
    assert text.bytes == sum(len(part.encode()) for part in TEXTS) == len("".join(TEXTS)) + 1
    assert text.documents == 4
    assert text.tokens.dtype == np.uint16 and isinstance(text.tokens, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        text.tokens[0] = 1


def test_many_groups_give_the_same_tokens(tokenizer, tmp_path, monkeypatch):
    whole = tokenise(TEXTS * 5, tokenizer, tmp_path / "a").tokens
    monkeypatch.setattr(token_cache, "CHUNK", 30)
    assert np.array_equal(tokenise(TEXTS * 5, tokenizer, tmp_path / "b").tokens, whole)


@pytest.mark.parametrize(("size", "dtype"), [(65536, np.uint16), (65537, np.uint32)])
def test_big_vocabularies_need_wider_tokens(tmp_path, size, dtype):
    text = tokenise([f"w2 w{size - 1}"], words(size), tmp_path)
    assert text.tokens.dtype == dtype
    assert text.tokens.tolist() == [2, size - 1, 0]


def test_the_second_time_nothing_is_tokenised(tokenizer, tmp_path, monkeypatch, capsys):
    first = tokenise(TEXTS, tokenizer, tmp_path)
    monkeypatch.setattr(token_cache, "_encoded", None)
    second = tokenise(TEXTS, tokenizer, tmp_path)
    assert np.array_equal(first.tokens, second.tokens)
    assert (first.digest, first.bytes, first.documents) == (
        second.digest, second.bytes, second.documents,
    )
    assert capsys.readouterr().err == ""
    assert len(list(tmp_path.iterdir())) == 2


def test_the_key_is_the_content(tokenizer, tmp_path):
    def digest(texts, model=tokenizer):
        return tokenise(texts, model, tmp_path).digest

    keys = {
        digest(["ab", "c"]), digest(["a", "bc"]), digest(["abc"]), digest(["c", "ab"]),
        digest(["ab", "c"], train_tokenizer(TEXTS, 260)),
    }
    assert len(keys) == 5
    key = digest(["ab", "c"])
    tokenizer(["a", "a longer text"], padding=True, truncation=True, max_length=2)
    assert digest(["ab", "c"]) == key and tokenise(["ab" * 9], tokenizer, tmp_path).tokens.size > 3


def shorten(path):
    path.write_bytes(path.read_bytes()[:-2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)


def rename(path):
    side = path.with_suffix(".json")
    side.write_text(side.read_text().replace(path.stem, "0" * 64))


def garble(path):
    path.with_suffix(".json").write_text("[")


def widen(path):
    side = path.with_suffix(".json")
    side.write_text(json.dumps({**json.loads(side.read_text()), "dtype": "uint32"}))


def miscount(path):
    """The bytes of the text, which nothing else in the cache tells."""
    side = path.with_suffix(".json")
    side.write_text(side.read_text().replace('"bytes": 5', '"bytes": 7'))
    assert '"bytes": 7' in side.read_text()


@pytest.mark.parametrize(
    "damage", [shorten, flip, rename, garble, widen, miscount, lambda p: p.unlink()]
)
def test_a_damaged_cache_is_built_again(tokenizer, tmp_path, capsys, damage):
    text = tokenise(TEXTS, tokenizer, tmp_path)
    expected = text.tokens.tolist()
    digest = text.digest
    del text
    damage(tmp_path / f"{digest}.bin")
    assert tokenise(TEXTS, tokenizer, tmp_path).tokens.tolist() == expected
    assert capsys.readouterr().err.count("\n") == 1
    assert tokenise(TEXTS, tokenizer, tmp_path).tokens.tolist() == expected
    assert capsys.readouterr().err == ""


def test_a_stopped_run_leaves_nothing(tokenizer, tmp_path, monkeypatch):
    def stop(*args):
        yield "first", [1, 2]
        raise KeyboardInterrupt

    monkeypatch.setattr(token_cache, "_encoded", stop)
    with pytest.raises(KeyboardInterrupt):
        tokenise(TEXTS, tokenizer, tmp_path)
    assert list(tmp_path.iterdir()) == []


class Stopped(Exception):
    pass


def long_texts():
    rng = random.Random(0)
    return [" ".join(rng.choices(["the", "file", "is", "read", "é"], k=rng.randint(0, 40)))
            for _ in range(60)]


def stopping(texts, after):
    """The documents, until one too many is asked for."""
    yield from texts[:after]
    raise Stopped


@pytest.fixture
def small_steps(monkeypatch):
    monkeypatch.setattr(token_cache, "CHUNK", 200)
    monkeypatch.setattr(token_cache, "KEEP", 500)


@pytest.mark.parametrize("limit", [0, 300])
def test_a_stopped_run_goes_on_where_it_was(tokenizer, tmp_path, monkeypatch, small_steps, capsys,
                                            limit):
    """With limits on the tokens of a part, a part that is cut short before and after the stop."""
    texts, cache = long_texts(), tmp_path / "cache"
    parts = [(texts[:30], limit), (texts[30:], 0)]
    wanted = tokenise_stream(lambda: parts, {}, tokenizer, tmp_path / "whole").tokens.tolist()
    encoded, encode = [], token_cache.encode
    monkeypatch.setattr(token_cache, "encode",
                        lambda t, group: encoded.extend(group) or encode(t, group))
    for after in (9, 20, 25):
        with pytest.raises(Stopped):
            cut = [(texts[:30], limit), (stopping(texts[30:], after), 0)]
            tokenise_stream(lambda cut=cut: cut, {}, tokenizer, cache)
    names = {f.suffixes[-2] + f.suffix for f in cache.iterdir()}
    assert names == {".partial.bin", ".partial.lengths", ".partial.json"}
    found = tokenise_stream(lambda: parts, {}, tokenizer, cache)
    assert found.tokens.tolist() == wanted
    assert len(encoded) < 2 * len(texts)  # from the start each time it were more than 3 times
    assert "goes on after" in capsys.readouterr().err
    assert not list(cache.glob("*.partial.*"))


@pytest.mark.parametrize("spoil", ["flip", "cut", "state", "text", "shorter"])
def test_what_a_stopped_run_has_left_is_used_only_if_it_is_right(
    tokenizer, tmp_path, small_steps, spoil, capsys
):
    texts = long_texts()
    with pytest.raises(Stopped):
        tokenise_stream(lambda: [(stopping(texts, 50), 0)], {}, tokenizer, tmp_path)
    (kept,) = tmp_path.glob("*.partial.bin")
    content = bytearray(kept.read_bytes())
    if spoil == "flip":
        content[10] ^= 1
        kept.write_bytes(content)
    elif spoil == "cut":
        kept.write_bytes(content[: len(content) // 2])
    elif spoil == "state":
        kept.with_suffix(".json").write_text('{"sizes": {"bin": 5}}')
    elif spoil == "text":
        texts[3] += " x"
    else:
        texts = texts[:5]
    found = tokenise_stream(lambda: [(texts, 0)], {}, tokenizer, tmp_path).tokens.tolist()
    assert found == tokenise(texts, tokenizer, tmp_path / "other").tokens.tolist()
    assert ("from the start" in capsys.readouterr().err) == (spoil in ("text", "shorter"))
    assert not list(tmp_path.glob("*.partial.*"))


def test_a_full_disk_is_one_sentence(tokenizer, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rabit_jax.atomic.os.replace", full)
    with pytest.raises(BadInput, match="No space left on device.* free space"):
        tokenise(TEXTS, tokenizer, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unfit_input_is_refused(tokenizer, tmp_path):
    with pytest.raises(BadInput, match="no text"):
        tokenise(["", ""], tokenizer, tmp_path)
    endless = words(5)
    endless.eos_token = None
    with pytest.raises(BadInput, match="no end-of-text"):
        tokenise(["w2"], endless, tmp_path)


def test_a_progress_bar_only_for_much_text(tokenizer, tmp_path, monkeypatch, capfd):
    tokenise(TEXTS, tokenizer, tmp_path)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(token_cache, "SLOW", 1)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    tokenise(TEXTS[:2], tokenizer, tmp_path, "my text")
    out, err = capfd.readouterr()
    assert out == "" and "tokenising my text: 2 documents" in err


def starts(n, batch_size, length, seed, steps):
    """First tokens of every row of the first `steps` steps, checking that rows are runs."""
    rows = np.concatenate([batch(np.arange(n), s, batch_size, length, seed) for s in range(steps)])
    assert (np.diff(rows, axis=1) == 1).all() and rows.min() >= 0 and rows.max() < n
    return rows[:, 0].tolist()


@pytest.mark.parametrize(("n", "b", "t"), [(107, 4, 10), (100, 9, 10), (119, 3, 10), (1000, 7, 3)])
def test_every_window_once_per_epoch(n, b, t):
    count = next(c for c in range(n, 0, -1) if (t - 1) + c * t <= n)  # fit at any offset
    steps = math.lcm(b, count) // b * 2
    first = starts(n, b, t, 5, steps)
    epochs = [first[e : e + count] for e in range(0, len(first), count)]
    for epoch in epochs:
        offset = min(epoch)
        assert 0 <= offset < t
        assert sorted(epoch) == [offset + i * t for i in range(count)]
    if len(epochs) > 1:
        assert len({tuple(epoch) for epoch in epochs}) > 1


def test_offsets_and_orders_vary_by_epoch_and_seed():
    offsets = {min(starts(200, 19, 10, seed, 1)) for seed in range(60)}
    assert offsets == set(range(10))
    one, two = starts(200, 19, 10, 0, 2)[:19], starts(200, 19, 10, 0, 2)[19:]
    assert np.argsort(one).tolist() != np.argsort(two).tolist()


def test_a_batch_depends_on_seed_and_step_alone():
    text = np.arange(500, dtype=np.uint16)
    alone = batch(text, 7, 4, 16, 3)
    for step in (0, 100, 3, 8):
        batch(text, step, 4, 16, 3)
        batch(text, step, 2, 8, 4)
    assert np.array_equal(batch(text, 7, 4, 16, 3), alone)
    tokens._epoch.cache_clear()
    assert np.array_equal(batch(text, 7, 4, 16, 3), alone)
    assert alone.dtype == np.int32 and alone.shape == (4, 16)
    assert not np.array_equal(batch(text, 7, 4, 16, 4), alone)
    assert not np.array_equal(batch(text, 8, 4, 16, 3), alone)


def test_wider_batches_see_the_same_rows():
    text = np.arange(500)
    narrow = np.concatenate([batch(text, step, 2, 16, 0) for step in range(6)])
    wide = np.concatenate([batch(text, step, 4, 16, 0) for step in range(3)])
    assert np.array_equal(narrow, wide)


def test_too_short_for_a_batch():
    assert batch(np.arange(39), 0, 3, 10, 0).shape == (3, 10)
    with pytest.raises(BadInput, match="38 tokens, wanted at least 39 for 3 windows of 10"):
        batch(np.arange(38), 0, 3, 10, 0)
    with pytest.raises(BadInput, match="must both be at least 1"):
        batch(np.arange(38), 0, 0, 10, 0)


def test_windows_are_all_whole_ones_in_order():
    rows = windows(np.arange(35, dtype=np.uint16), 10)
    assert rows.dtype == np.int32
    assert rows.tolist() == [list(range(start, start + 10)) for start in (0, 10, 20)]
    assert windows(np.arange(10), 10).shape == (1, 10)
    with pytest.raises(BadInput, match="9 tokens, wanted at least 10"):
        windows(np.arange(9), 10)
