"""Reading files and datasets, and the split into training and evaluation documents."""

import dataclasses
import gzip
import json

import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest

from rabit_jax.data import readers
from rabit_jax.data.mix import Part, identity, stream
from rabit_jax.data.sources import DataConfig, documents, unseen_documents
from rabit_jax.errors import BadInput


def write(folder, count, name="text"):
    for number in range(count):
        (folder / f"{name}{number:03}.txt").write_text(f"Document {name} number {number}.\n")
    return DataConfig(source="files", files=(str(folder / "*.txt"),), eval_fraction=0.2)


def test_adding_a_document_moves_no_other(tmp_path):
    config = write(tmp_path, 100)
    train, held = documents(config)
    (tmp_path / "aaa.txt").write_text("A new document.")
    more_train, more_held = documents(config)
    assert len(train) + len(held) == 100 and 8 <= len(held) <= 35
    assert set(train) <= set(more_train) and set(held) <= set(more_held)
    assert len(more_train) + len(more_held) == 101


def test_the_seed_chooses_and_repeats_the_split(tmp_path):
    config = write(tmp_path, 60)
    other = DataConfig(source="files", files=config.files, eval_fraction=0.2, seed=1)
    assert documents(config) == documents(config)
    assert documents(config)[1] != documents(other)[1]


def test_identical_documents_count_once(tmp_path):
    config = write(tmp_path, 20)
    for number in range(20):
        (tmp_path / f"copy{number}.txt").write_text("The same text.\n")
    train, held = documents(config)
    assert len(train) + len(held) == 21
    assert not set(train) & set(held)


def test_something_is_always_held_out(tmp_path):
    write(tmp_path, 2)
    config = DataConfig(source="files", files=(str(tmp_path / "*"),), eval_fraction=1e-9)
    train, held = documents(config)
    assert len(train) == len(held) == 1


def test_eval_files_are_the_only_evaluation_text(tmp_path):
    config = write(tmp_path, 10)
    extra = tmp_path / "held.md"
    extra.write_text("Held out.")
    paths = (str(extra), str(tmp_path / "text000.txt"))
    train, held = documents(DataConfig(source="files", files=config.files, eval_files=paths))
    assert held == ["Held out.", "Document text number 0.\n"]
    assert train == [f"Document text number {n}.\n" for n in range(1, 10)]


def test_eval_files_serve_embedded_training_too(tmp_path, monkeypatch):
    some = [f"Documentation {n}." for n in range(20)]  # gathering the real ones takes seconds
    monkeypatch.setattr("rabit_jax.data.sources.embedded_documents", lambda: some)
    path = tmp_path / "held.txt"
    path.write_text("Held out.")
    train, held = documents(DataConfig(eval_files=(str(path),), max_documents=7))
    assert train == some[:7] and held == ["Held out."]


@pytest.mark.parametrize("mark", ["\n\n", "\n", " ", ""])
def test_a_big_file_is_cut_into_complete_pieces(mark):
    text = mark.join(f"{'x' * 30}{n:05}" for n in range(5_000))
    pieces = list(readers.pieces(text, 1000))
    assert "".join(pieces) == text
    assert all(500 <= len(piece) <= 1000 for piece in pieces[:-1])
    assert all(piece.endswith(mark) for piece in pieces[:-1])


def test_one_big_file_still_has_a_held_out_part(tmp_path):
    path = tmp_path / "big.txt"
    path.write_bytes("\ufeff".encode() + b"".join(b"Line %d is here.\r\n" % n for n in range(9000)))
    train, held = documents(DataConfig(source="files", files=(str(path),)))
    assert held and train and not set(train) & set(held)
    assert not any("\r" in text or "\ufeff" in text for text in train + held)


def test_max_documents_takes_the_first(tmp_path):
    config = write(tmp_path, 9)
    few = DataConfig(source="files", files=config.files, max_documents=4)
    assert sorted(sum(documents(few), [])) == [f"Document text number {n}.\n" for n in range(4)]


def test_a_path_with_glob_characters_is_a_path(tmp_path):
    for name in ("a[1].txt", "a1.txt"):
        (tmp_path / name).write_text(name)
    assert list(readers.file_documents((str(tmp_path / "a[1].txt"),))) == ["a[1].txt"]


def bad(message, **fields):
    with pytest.raises(BadInput, match=message):
        documents(DataConfig(**fields))


def test_bad_settings_are_named():
    bad("data.source is 'web'; choose one of embedded, files, hub, mix", source="web")
    bad("eval_fraction is 1.0", eval_fraction=1.0)
    bad("max_documents is -1", max_documents=-1)
    bad("data.files is empty", source="files")
    bad("data.hub is empty", source="hub")


def test_a_pattern_without_files_names_the_nearest(tmp_path):
    write(tmp_path, 3)
    (tmp_path / "corpus.txt").write_text("x")
    bad(r"corpsu.txt'.*nearest.*corpus.txt", source="files", files=(str(tmp_path / "corpsu.txt"),))
    bad(r"no file matches '/nowhere/\*'; ", source="files", files=("/nowhere/*",))
    bad("no file matches", source="files", files=(str(tmp_path),))


def test_text_that_is_not_utf8_names_file_and_byte(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("naïve".encode("latin-1"))
    bad(r"latin.txt' is not UTF-8 text at byte 2 \(0xef\)", source="files", files=(str(path),))


def test_compressed_text_is_refused(tmp_path):
    path = tmp_path / "text.txt.gz"
    path.write_bytes(gzip.compress(b"one two"))
    bad("text.txt.gz' is not UTF-8 text .*; decompress it", source="files", files=(str(path),))


ROWS = [{"text": f"Row {n}:\n\nits text.", "body": f"body {n}", "id": n} for n in range(4)]


def table(path):
    """A local file of `ROWS`, as its name says."""
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif path.suffix == ".csv":
        pyarrow.csv.write_csv(pyarrow.Table.from_pylist(ROWS), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS))
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return (str(path),)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz",
                                  "a [1] {b}*?.jsonl", "a'b.parquet"])
def test_rows_of_local_tables_are_documents(tmp_path, name):
    files = table(tmp_path / name)
    assert list(readers.file_documents(files)) == [row["text"] for row in ROWS]
    config = DataConfig(source="files", files=files, eval_files=files, hub_text_column="body")
    other = dataclasses.replace(config, eval_files=table(tmp_path / "b.csv"), max_documents=3)
    bad("found 0 training and 4 evaluation", **vars(config))
    assert readers.is_table(tmp_path / name) and not readers.is_table(tmp_path / "a.txt.gz")
    (tmp_path / "b.csv").write_text("body\nheld\n")
    assert documents(other) == ([row["body"] for row in ROWS[:3]], ["held"])
    part = Part(files=files, hub_column="body")
    assert list(next(stream([part]))[0]) == [row["body"] for row in ROWS]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt"])
def test_a_file_without_content_holds_no_documents(tmp_path, name):
    (tmp_path / name).touch()
    other = write(tmp_path, 1)
    bad("found 1 different documents", source="files", files=(str(tmp_path / name), *other.files))


def test_a_table_without_that_column_names_the_others(tmp_path):
    files = table(tmp_path / "a.jsonl")
    bad("file 'a.jsonl' of dataset .* has no text in column 'words'; set data.hub_text_column .* "
        "to one of text, body, id", source="files", files=files, hub_text_column="words")


def test_a_table_is_another_text_than_the_same_bytes(tmp_path):
    plain, rows = tmp_path / "a.txt", tmp_path / "a.jsonl"
    table(rows)
    plain.write_bytes(rows.read_bytes())
    first, second = (identity([Part(files=(str(path),))]) for path in (plain, rows))
    assert first != second


def test_too_little_text_is_refused(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("Only one.")
    one = (str(path),)
    bad("found 1 different documents, wanted at least 2", source="files", files=one)
    bad("found 0 training and 1 evaluation", source="files", files=one, eval_files=one)


@pytest.fixture
def dataset(tmp_path):
    """A dataset folder that `datasets` reads without a network: 12 training and 3 test rows."""
    for split, count in (("train", 12), ("test", 3)):
        rows = [{"text": f"{split} row {number}", "id": number} for number in range(count)]
        rows.append({"text": "  ", "id": -1})
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path)


def test_hub_splits_and_columns(dataset, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    train, held = documents(
        DataConfig(source="hub", hub=dataset, hub_eval_split="test", max_documents=5)
    )
    assert train == [f"train row {n}" for n in range(5)]
    assert held == [f"test row {n}" for n in range(3)]
    train, held = documents(DataConfig(source="hub", hub=dataset))
    assert sorted(train + held) == sorted(f"train row {n}" for n in range(12))
    column = "^split 'train' of dataset .* has no text in column 'body'; set .* text, id"
    bad(column, source="hub", hub=dataset, hub_text_column="body")
    bad("cannot read split 'dev' of dataset", source="hub", hub=dataset, hub_split="dev")


def test_a_dataset_out_of_reach_is_one_sentence(tmp_path):
    with pytest.raises(BadInput, match="cannot read split 'train' of dataset .*network") as caught:
        documents(DataConfig(source="hub", hub=str(tmp_path / "missing")))
    assert "\n" not in str(caught.value)


def test_a_network_that_breaks_off_is_one_sentence(monkeypatch):
    def broken(*args, **kwargs):
        yield {"text": "first"}
        raise ConnectionResetError("reset by peer\nmore detail")

    monkeypatch.setattr("datasets.load_dataset", broken)
    bad(r"ConnectionResetError: reset by peer\); check", source="hub", hub="some/dataset")


def test_unseen_files_are_read_apart(tmp_path):
    config = write(tmp_path, 20)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "news.txt").write_text("News.\n")
    train, held = documents(config)
    assert unseen_documents(config, train) == []
    config = dataclasses.replace(config, unseen_files=(str(tmp_path / "other" / "*"),))
    assert documents(config) == (train, held)
    assert unseen_documents(config, [*train, *held]) == ["News.\n"]


def test_unseen_files_must_be_unseen(tmp_path):
    config = write(tmp_path, 20)
    config = dataclasses.replace(config, unseen_files=(str(tmp_path / "text00*.txt"),))
    train, held = documents(config)
    with pytest.raises(BadInput, match="10 of 10 documents of data.unseen_files are in"):
        unseen_documents(config, [*train, *held])


WITH_GAPS = ["first", None, "second", "", "  ", "third", None]


def with_gaps(folder, ending):
    """A dataset folder of one file whose rows are `WITH_GAPS`; its format cannot hold null."""
    path = folder / f"train.{ending}"
    if ending == "parquet":
        table = pyarrow.table({"text": pyarrow.array(WITH_GAPS, pyarrow.string())})
        pyarrow.parquet.write_table(table, path)
    elif ending == "jsonl":
        rows = [{"text": text, "id": n} for n, text in enumerate(WITH_GAPS)]
        del rows[-1]["text"]  # a missing field is null
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        path.write_text("".join(f"{text or ''}\n" for text in WITH_GAPS))
    return str(folder), path.name


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "txt"])
@pytest.mark.parametrize("whole", [True, False], ids=["split", "file"])
def test_rows_without_text_are_skipped_and_counted(ending, whole, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder, file = with_gaps(tmp_path, ending)
    found = readers.hub_documents(folder, file="" if whole else file)
    assert list(found) == ["first", "second", "third"]
    name = "split 'train'" if whole else f"file '{file}'"
    said = " ".join(capsys.readouterr().err.split())
    assert f"{name} of dataset {folder!r}: skipped 4 rows whose 'text' is null or empty" in said


def test_a_column_of_nulls_is_no_text(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [{"text": None, "body": f"row {n}"} for n in range(3)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(BadInput, match="has no text in column 'text'; set .* text, body"):
        list(readers.hub_documents(str(tmp_path)))


def test_a_row_of_another_type_and_a_damaged_file_are_one_sentence(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    file = tmp_path / "train.csv"
    file.write_text("text\n1\n2\n")
    with pytest.raises(BadInput, match="has a row with 1 in column 'text', wanted text or null"):
        list(readers.hub_documents(str(tmp_path)))
    file.rename(tmp_path / "train.jsonl").write_text('{"text": "a"}\n{broken\n')
    with pytest.raises(BadInput, match="cannot read split 'train' of .*; correct its files"):
        list(readers.hub_documents(str(tmp_path)))
    assert capfd.readouterr().err == ""


def test_a_running_text_keeps_its_empty_lines(monkeypatch):
    rows = [{"text": text} for text in ("", " = Title = ", "", "A line.")]
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: rows)
    assert list(readers.named_text("wikitext2", "test")) == ["\n\n = Title = \n\n\n\nA line."]
