"""A dataset as a stream: the same documents as in memory, and never all of them at once."""

import json
import tracemalloc

import pytest

from rabit_jax import BadInput
from rabit_jax.data import hub_stream as module
from rabit_jax.data.hub_stream import hub_stream
from rabit_jax.data.sources import DataConfig, documents


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """A dataset folder with blank and repeated rows, and files of other text."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "set"
    folder.mkdir()
    rows = {"train": [f"row {n % 50}" for n in range(70)] + ["  ", "test 2"],
            "test": [f"test {n}" for n in range(6)] + ["test 1"]}
    for split, texts in rows.items():
        lines = [json.dumps({"text": text, "body": text.upper()}) for text in texts]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    (tmp_path / "eval.txt").write_text("row 3\n\n\n\nsomething else")
    (tmp_path / "unseen.txt").write_text("row 7")
    return folder


@pytest.mark.parametrize("settings", [
    {}, {"eval_fraction": 0.5}, {"eval_fraction": 1e-9}, {"seed": 3}, {"max_documents": 9},
    {"hub_eval_split": "test"}, {"hub_eval_split": "test", "max_documents": 4},
    {"hub_text_column": "body"}, {"streaming": False}, {"eval_files": True},
], ids=str)
def test_the_documents_are_those_of_a_list_in_memory(dataset, settings):
    if settings.get("eval_files"):
        settings = {"eval_files": (str(dataset.parent / "eval.txt"),)}
    config = DataConfig(source="hub", hub=str(dataset), **settings)
    wanted = documents(config)
    for side, texts in zip(("train", "eval"), wanted, strict=True):
        opened, recipe = hub_stream(config, side)
        for _ in range(2):
            assert [(list(found), most) for found, most in opened()] == [(texts, 0)]
        assert json.dumps(recipe)


def test_what_the_text_depends_on_is_in_the_recipe(dataset):
    base = DataConfig(source="hub", hub=str(dataset))
    recipes = [json.dumps(hub_stream(base, side)[1]) for side in ("train", "eval")]
    for change in ({"seed": 1}, {"eval_fraction": 0.1}, {"max_documents": 3},
                   {"hub_eval_split": "test"}, {"hub_text_column": "body"},
                   {"unseen_files": (str(dataset.parent / "unseen.txt"),)}):
        config = DataConfig(source="hub", hub=str(dataset), **change)
        recipes.append(json.dumps(hub_stream(config, "train")[1]))
    (dataset / "train.jsonl").write_text('{"text": "a"}')
    recipes.append(json.dumps(hub_stream(base, "train")[1]))
    assert len(set(recipes)) == len(recipes)
    elsewhere = DataConfig(source="hub", hub=str(dataset), cache="other")
    assert hub_stream(elsewhere, "train")[1] == hub_stream(base, "train")[1]


def test_unseen_text_that_was_seen_is_refused(dataset):
    config = DataConfig(source="hub", hub=str(dataset),
                        unseen_files=(str(dataset.parent / "unseen.txt"),))
    with pytest.raises(BadInput, match="of data.unseen_files is in the training or evaluation"):
        for side in ("train", "eval"):
            for found, _ in hub_stream(config, side)[0]():
                list(found)


def test_a_large_dataset_is_not_held(monkeypatch):
    """40 MB of text, of which hashes alone stay: some 100 bytes of 10,000."""
    monkeypatch.setattr(module, "hub_documents",
                        lambda *a, **k: (f"{n} " * 2500 for n in range(4000)))
    opened, _ = hub_stream(DataConfig(source="hub", hub="some/set"), "train")
    tracemalloc.start()
    try:
        count = sum(1 for found, _ in opened() for _ in found)
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()
    assert 3600 < count < 4000
