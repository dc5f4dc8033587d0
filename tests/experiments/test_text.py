"""The text of a run: from a mix, and with begin tokens."""

import dataclasses

import numpy as np
import pytest

from rabit_jax import BadInput
from rabit_jax.data.mix import Part
from rabit_jax.data.sources import DataConfig
from rabit_jax.experiments.engine.config import dump_yaml
from rabit_jax.experiments.engine.settings import Evaluate, Qat, RunConfig
from rabit_jax.experiments.engine.text import Text
from rabit_jax.train.sharding import make_mesh


def text(data, length=8):
    qat = Qat(batch_size=8, length=length)
    return Text(RunConfig(data=data, qat=qat, evaluate=Evaluate(context=length)), make_mesh())


@pytest.fixture
def data(tmp_path):
    for side in ("train", "eval", "unseen"):
        for n in range(30 if side == "train" else 4):
            (tmp_path / f"{side}{n}.txt").write_text(f"{side} {n} says something of its own. " * 3)
    part = {s: (Part(files=(str(tmp_path / f"{s}*"),)),) for s in ("train", "eval", "unseen")}
    return DataConfig(
        source="mix", mix=part["train"], mix_eval=part["eval"], mix_unseen=part["unseen"],
        vocab_size=300, cache=str(tmp_path / "cache"),
    )


def test_a_mix_gives_tokeniser_tokens_and_batches(data, monkeypatch):
    found = text(data)
    counts = [t.documents for t in (found.train, found.held_out, found.unseen)]
    assert counts == [30, 4, 4]
    decoded = found.tokenizer.decode(np.asarray(found.held_out.tokens[:20]))
    assert decoded.startswith("eval 0 says something of its own.")
    rows = found.batches(found.config.qat, 0)(3)["tokens"]
    assert rows.shape == (8, 8)
    monkeypatch.setattr("rabit_jax.data.mix._read", None)  # all that follows is in the cache
    again = text(data)
    assert again.train.digest == found.train.digest
    assert np.array_equal(again.batches(again.config.qat, 0)(3)["tokens"], rows)
    assert np.array_equal(again.windows(again.unseen), found.windows(found.unseen))


def test_a_cache_that_cannot_be_written_is_told_by_its_setting(data, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(BadInput, match="cannot write the token cache in .*set data.cache"):
        print(text(data).tokenizer)


def test_without_unseen_parts_there_is_no_unseen_text(data):
    assert text(dataclasses.replace(data, mix_unseen=())).unseen is None


def test_begin_replaces_the_first_token_of_every_window(data):
    plain, begun = text(data), text(dataclasses.replace(data, begin=True))
    begin = plain.tokenizer.bos_token_id
    pairs = [
        (plain.windows(), begun.windows()),
        tuple(t.batches(t.config.qat, 0)(0)["tokens"] for t in (plain, begun)),
    ]
    for without, with_it in pairs:
        assert (np.asarray(with_it)[:, 0] == begin).all()
        assert not (np.asarray(without)[:, 0] == begin).all()
        assert np.array_equal(with_it[:, 1:], without[:, 1:])
    assert plain.train.digest != begun.train.digest  # stages that read it are redone


def test_begin_wants_a_tokeniser_with_a_begin_token(data):
    begun = text(dataclasses.replace(data, begin=True))
    begun.tokenizer.bos_token = None
    with pytest.raises(BadInput, match="data.begin is true but the tokeniser has no begin token"):
        begun.windows()


def test_search_and_report_have_windows_of_their_own(tmp_path):
    for name in ("train", "eval"):
        words = " ".join(f"{name} {n}" for n in range(300))
        (tmp_path / f"{name}.txt").write_text(words)

    def cut(part, windows=0):
        data = DataConfig(source="files", files=(str(tmp_path / "train.txt"),), vocab_size=260,
                          eval_files=(str(tmp_path / "eval.txt"),), cache=str(tmp_path / "cache"))
        settings = Evaluate(context=16, windows=windows, part=part)
        return Text(RunConfig(data=data, evaluate=settings), None).windows()

    every, search, report = cut("all"), cut("search"), cut("report")
    assert len(search) == -(-len(every) // 4) and len(every) > 8
    np.testing.assert_array_equal(np.concatenate([report, search]), every)
    np.testing.assert_array_equal(cut("search", 2), search[:2])
    np.testing.assert_array_equal(cut("report", len(every)), report)


def test_parts_of_the_windows_leave_older_configs_as_they_were():
    assert "part:" not in dump_yaml(RunConfig())
    assert "part: search" in dump_yaml(RunConfig(evaluate=Evaluate(part="search")))
