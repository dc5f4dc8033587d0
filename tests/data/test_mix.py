"""Mixes: what is read, in which order, what is left out, and when it is not read again."""

import copy
import dataclasses
import gzip
import json

import pytest

from rabit_jax.data import token_cache
from rabit_jax.data.conversations import rendering
from rabit_jax.data.mix import Part
from rabit_jax.data.readers import NAMED, named_text
from rabit_jax.data.sources import DataConfig, documents, mixed
from rabit_jax.data.tokenizer import train_tokenizer
from rabit_jax.data.tokens import tokenise, tokenise_stream
from rabit_jax.errors import BadInput

COMMIT = "0" * 40


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["some words of text number 0 1 2 3 4 5 6 7 8 9"] * 3, 270)


def written(folder, name, count):
    for number in range(count):
        (folder / f"{name}{number:02}.txt").write_text(f"{name} text number {number}")
    return Part(files=(str(folder / f"{name}*.txt"),))


def rows(folder, name, texts):
    file = folder / f"{name}.jsonl.gz"
    with gzip.open(file, "wt", encoding="utf-8") as out:
        out.writelines(json.dumps({"body": text, "n": 0}) + "\n" for text in texts)
    return Part(hub=str(folder), hub_file=file.name, hub_column="body")


def texts(config, side):
    return [text for part, _ in mixed(config, side)[0]() for text in part]


def tokens(config, side, tokenizer, cache):
    return tokenise_stream(*mixed(config, side), tokenizer, cache)


@pytest.fixture
def mix(tmp_path):
    """Five files, then ten rows; evaluation has one of the rows, the unseen text one of each."""
    (tmp_path / "hub").mkdir()
    part = rows(tmp_path / "hub", "rows", [f"row {n}" for n in range(10)])
    held = rows(tmp_path / "hub", "held", ["row 3", "held 1", "held 1", " "])
    other = rows(tmp_path / "hub", "other", ["held 1", "row 4", "file text number 2", "other"])
    parts = (written(tmp_path, "file", 5), part)
    return DataConfig(source="mix", mix=parts, mix_eval=(held,), mix_unseen=(other,))


def test_parts_follow_each_other_and_no_document_is_on_two_sides(mix):
    assert texts(mix, "eval") == ["row 3", "held 1"]
    assert texts(mix, "unseen") == ["row 4", "file text number 2", "other"]
    left = [f"file text number {n}" for n in (0, 1, 3, 4)]
    left += [f"row {n}" for n in (0, 1, 2, 5, 6, 7, 8, 9)]
    assert texts(mix, "train") == left
    twice = dataclasses.replace(mix, mix=(*mix.mix, *mix.mix))
    assert texts(twice, "train") == left


def test_a_limit_on_documents_takes_the_first_of_its_part(mix):
    parts = tuple(dataclasses.replace(part, documents=3) for part in mix.mix)
    found = texts(dataclasses.replace(mix, mix=parts), "train")
    assert found == ["file text number 0", "file text number 1", "row 0", "row 1", "row 2"]


def test_what_a_limit_on_tokens_leaves_is_there_for_a_later_part(
    tokenizer, tmp_path, monkeypatch
):
    """A group of documents is read ahead of the limit; a process that goes on reads another one."""
    part = written(tmp_path, "file", 12)
    held = written(tmp_path, "held", 1)
    config = DataConfig(source="mix", mix=(dataclasses.replace(part, tokens=40), part),
                        mix_eval=(held,))
    wanted = [f"file text number {n}" for n in range(12)]  # each once, by whichever part
    lengths = [len(tokenizer.encode(text)) + 1 for text in wanted]
    assert 40 < sum(lengths) / 2
    found = tokens(config, "train", tokenizer, tmp_path / "a")
    assert found.digest == tokenise(wanted, tokenizer, tmp_path / "b").digest
    # Kept after every second document, stopped behind the last of the first part.
    monkeypatch.setattr(token_cache, "KEEP", 30)
    monkeypatch.setattr(token_cache, "CHUNK", 20)
    opened, recipe = mixed(config, "train")

    def stopped():
        parts = opened()
        yield next(parts)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenise_stream(stopped, recipe, tokenizer, tmp_path / "c")
    assert list((tmp_path / "c").glob("*.partial.json"))
    assert tokenise_stream(opened, recipe, tokenizer, tmp_path / "c").digest == found.digest


def test_a_stream_is_the_same_text_as_a_list(mix, tokenizer, tmp_path):
    stream = tokens(mix, "train", tokenizer, tmp_path / "a")
    whole = tokenise(texts(mix, "train"), tokenizer, tmp_path / "b")
    assert stream.tokens.tolist() == whole.tokens.tolist()
    assert (stream.digest, stream.bytes, stream.documents) == (
        whole.digest, whole.bytes, whole.documents,
    )


def test_a_limit_on_tokens_ends_a_part_with_the_document_that_reaches_it(mix, tokenizer, tmp_path):
    lengths = [len(tokenizer(text)["input_ids"]) + 1 for text in texts(mix, "train")]
    for most in (1, lengths[0], lengths[0] + 1, sum(lengths[:3])):
        count = next(n for n in range(1, 5) if sum(lengths[:n]) >= most)
        first = dataclasses.replace(mix.mix[0], tokens=most)
        config = dataclasses.replace(mix, mix=(first, mix.mix[1]))
        found = tokens(config, "train", tokenizer, tmp_path / str(most))
        assert found.documents == count + 8
        assert len(found.tokens) == sum(lengths[:count]) + sum(lengths[4:])


def test_what_was_read_is_not_read_again(mix, tokenizer, tmp_path, monkeypatch):
    first = tokens(mix, "train", tokenizer, tmp_path)
    monkeypatch.setattr("rabit_jax.data.mix._read", None)
    again = tokens(mix, "train", tokenizer, tmp_path)
    assert again.digest == first.digest and again.tokens.tolist() == first.tokens.tolist()
    recipes = list(tmp_path.glob("*.recipe.json"))
    assert len(recipes) == 1 and len(list(tmp_path.glob("*.bin"))) == 1
    assert json.loads(recipes[0].read_text())["recipe"]["parts"][0]["documents"] == 0


def test_another_text_has_another_recipe(mix, tokenizer, tmp_path):
    def digest():
        return tokens(mix, "train", tokenizer, tmp_path / "cache").digest

    before = digest()
    (tmp_path / "file00.txt").write_text("something else")
    changed = digest()
    rows(tmp_path / "hub", "held", ["row 5"])
    assert len({before, changed, digest()}) == 3
    other = train_tokenizer(["ab"], 257)
    assert tokens(mix, "train", other, tmp_path / "cache").digest not in (before, changed)


@pytest.mark.parametrize("end", [".bin", ".json", ".recipe.json"])
def test_a_lost_or_damaged_file_is_read_again(mix, tokenizer, tmp_path, end):
    expected = tokens(mix, "eval", tokenizer, tmp_path / "cache").tokens.tolist()
    file = next(file for file in (tmp_path / "cache").iterdir() if file.name.endswith(end))
    for damage in (lambda: file.write_text("["), file.unlink):
        damage()
        assert tokens(mix, "eval", tokenizer, tmp_path / "cache").tokens.tolist() == expected
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_a_stream_that_stops_leaves_nothing_and_starts_again(tokenizer, tmp_path):
    def broken():
        yield "the first"
        raise ConnectionResetError("gone")

    with pytest.raises(ConnectionResetError):
        list(broken())
    with pytest.raises(BadInput, match="gone"):
        tokenise_stream(lambda: [(broken(), 0)], "x", tokenizer, tmp_path)
    assert list(tmp_path.iterdir()) == []
    found = tokenise_stream(lambda: [(["the first"], 0)], "x", tokenizer, tmp_path)
    assert found.documents == 1


def test_no_more_than_a_group_of_documents_is_held(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("rabit_jax.data.token_cache.CHUNK", 10)
    alive, most = set(), 0

    class Document(str):
        def __del__(self):
            alive.discard(id(self))

    def many():
        nonlocal most
        for number in range(200):
            text = Document(f"word {number}")
            alive.add(id(text))
            most = max(most, len(alive))
            yield text

    assert tokenise_stream(lambda: [(many(), 0)], 0, tokenizer, tmp_path).documents == 200
    assert most < 10


def bad(message, **fields):
    with pytest.raises(BadInput, match=message):
        mixed(DataConfig(**{"source": "mix", **fields}), "train")


def test_bad_mixes_are_named(mix, tokenizer, tmp_path):
    part = Part(name="c4")
    bad("data.mix is empty", mix_eval=(part,))
    bad("data.mix_eval is empty", mix=(part,))
    bad("data.files is not read with data.source=mix", mix=(part,), mix_eval=(part,), files=("a",))
    bad("data.mix_unseen goes with data.source=mix", source="embedded", mix_unseen=(part,))
    with pytest.raises(BadInput, match="a mix is a stream"):
        documents(mix)
    same = dataclasses.replace(mix, mix=mix.mix_eval)
    with pytest.raises(BadInput, match="found no text to tokenise for the text"):
        tokens(same, "train", tokenizer, tmp_path)


def test_bad_parts_are_named():
    for message, fields in (
        ("give exactly one of the three", {}),
        ("give exactly one of the three", {"name": "c4", "hub": "some/dataset"}),
        ("no dataset is named 'c5'; choose one of wikitext2, c4", {"name": "c5"}),
        ("'c4' has no split 'x'; choose one of train, validation", {"name": "c4", "split": "x"}),
        ("-1 documents", {"name": "c4", "documents": -1}),
    ):
        with pytest.raises(BadInput, match=message):
            Part(**fields)


# Named datasets: no network here, so the hub's cache is filled by hand, as a download leaves it.


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """The files of C4 that are read, three rows each, in a cache of the hub; offline."""
    place = tmp_path / "datasets--allenai--c4"
    for split, file in NAMED["c4"].files.items():
        path = place / "snapshots" / COMMIT / file
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(path, "wt", encoding="utf-8") as out:
            for n in range(3):
                row = {"text": f"{split} {n}\nnaïve", "timestamp": "2019-04-25T12:57:54Z"}
                out.write(json.dumps(row) + "\n")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_c4_is_one_shard_row_by_row(stored):
    assert list(named_text("c4", "train")) == [f"train {n}\nnaïve" for n in range(3)]
    assert list(named_text("c4", "validation")) == [f"validation {n}\nnaïve" for n in range(3)]


def test_wikitext_is_one_document_joined_as_published(monkeypatch):
    lines = ["", " = Title = \n", "", " A first line . \n", ""]

    def load(hub, config, *, split, streaming):
        assert (hub, config) == ("Salesforce/wikitext", "wikitext-2-raw-v1")
        assert (split, streaming) == ("test", False)
        return [{"text": line} for line in lines]

    monkeypatch.setattr("datasets.load_dataset", load)
    assert list(named_text("wikitext2", "test")) == [
        "\n\n = Title = \n\n\n\n\n A first line . \n\n\n"
    ]


def test_a_named_dataset_out_of_reach_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BadInput, match="^'c4' is not on .*once with a network.*HF_HOME") as caught:
        next(named_text("c4", "validation"))
    assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match="no dataset is named 'c'"):
        named_text("c", "train")


def test_a_file_of_unknown_format_is_refused(tmp_path):
    part = Part(hub=str(tmp_path), hub_file="rows.bin")
    config = DataConfig(source="mix", mix=(part,), mix_eval=(part,))
    with pytest.raises(BadInput, match="cannot tell the format of 'rows.bin'.*.parquet"):
        texts(config, "eval")


# Conversations.

TEMPLATE = ("{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}"
            "{% endif %}[{{ m.role }}] {{ m.content }}\n{% endfor %}")


@pytest.fixture
def chats(tmp_path):
    """Four rows: two usual forms, one that the template refuses, one without a conversation."""
    held = [
        [{"role": "user", "content": "text 1?"}, {"role": "assistant", "content": "2"}],
        [{"from": "system", "value": "s"}, {"from": "human", "value": "3"},
         {"from": "gpt", "value": "4"}],
        [{"role": "tool", "content": "5"}],
        [{"role": "user", "content": None}],
    ]
    (tmp_path / "hub").mkdir()
    lines = [json.dumps({"talk": row}) for row in held]
    (tmp_path / "hub" / "chats.jsonl").write_text("\n".join(lines))
    return Part(hub=str(tmp_path / "hub"), hub_file="chats.jsonl", hub_messages="talk")


def test_conversations_become_text_by_the_chat_template(chats, tmp_path, tokenizer, capsys):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    config = DataConfig(source="mix", mix=(chats, written(tmp_path, "file", 1)), mix_eval=(chats,))
    render = rendering(tokenizer)
    wanted = ["[user] text 1?\n[assistant] 2\n", "[system] s\n[user] 3\n[assistant] 4\n"]
    opened, recipe = mixed(config, "eval", render, TEMPLATE)
    assert [text for part, _ in opened() for text in part] == wanted
    assert "skipped 2 rows whose 'talk' gives no conversation" in capsys.readouterr().err
    assert recipe["chat_template"] == TEMPLATE
    found = tokenise_stream(opened, recipe, tokenizer, tmp_path / "cache")
    end = tokenizer.eos_token_id
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] + [end] for text in wanted]
    assert found.tokens.tolist() == sum(ids, [])
    # Training leaves out the conversations of evaluation, and another template is another text.
    opened, recipe = mixed(config, "train", render, TEMPLATE)
    assert [text for part, _ in opened() for text in part] == ["file text number 0"]
    assert recipe != mixed(config, "train", render, "other")[1]


def test_conversations_need_a_template_and_a_column(chats, tmp_path, tokenizer):
    with pytest.raises(BadInput, match="no chat template; take a chat model"):
        rendering(tokenizer)
    config = DataConfig(source="mix", mix=(chats,), mix_eval=(written(tmp_path, "file", 1),))
    with pytest.raises(BadInput, match="the teacher is trained here; name a chat model"):
        texts(config, "train")
    with pytest.raises(BadInput, match="holds conversations"):
        named_text("ultrachat", "test_sft")
    with pytest.raises(BadInput, match="hub_messages 'talk' and no hub"):
        Part(name="c4", hub_messages="talk")
    wrong = dataclasses.replace(config, mix=(dataclasses.replace(chats, hub_messages="talks"),))
    opened, _ = mixed(wrong, "train", lambda held: None)
    with pytest.raises(BadInput, match="no conversation in column 'talks'.*to one of talk"):
        [text for part, _ in opened() for text in part]


def test_a_mix_of_plain_text_keeps_its_key(mix):
    recipe = mixed(mix, "train")[1]
    assert "chat_template" not in recipe and "hub_messages" not in json.dumps(recipe)
