"""Token ids: those of tokenizer.json, special tokens before a text, and the rows of the table."""

import copy
import dataclasses
import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from rabit_jax.data.tokenizer import train_tokenizer
from rabit_jax.data.tokens import tokenise
from rabit_jax.errors import BadInput
from rabit_jax.evaluate.texts import text_windows
from rabit_jax.formats.tokenizer import (
    begins_with,
    check_ids,
    encode,
    load_tokenizer,
    prompt_ids,
    read_tokenizer,
    save_tokenizer,
    text_ids,
)

TEXTS = ["Plain words, a number 12345 and  two spaces .", " leading", "cafe\u0301 ﬁ", "don't we'll"]


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(["Plain words, don't 12345 and  two spaces. " * 4], 400)


@pytest.mark.parametrize("family", ["qwen2", "llama", None])
@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "LlamaTokenizer", "PreTrainedTokenizer",
                                  "TokenizersBackend", "Qwen2Tokenizer", "GPT2TokenizerFast",
                                  "NoSuchTokenizer", None, {}])
def test_the_file_decides_the_ids_whatever_class_is_named(trained, tmp_path, family, name):
    save_tokenizer(trained, tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings.pop("tokenizer_class")
    if name is not None:
        settings["tokenizer_class"] = name
    # Code of the folder is neither run nor asked about.
    settings["auto_map"] = {"AutoTokenizer": ["code.Tokenizer", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    if family:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    plain = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    found = load_tokenizer(tmp_path)
    assert encode(found, TEXTS) == [plain.encode(text).ids for text in TEXTS]
    assert found.eos_token_id == 0


def test_code_of_a_folder_is_refused_and_not_asked_about(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    (tmp_path / "config.json").write_text('{"model_type": "no such"}')
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}}))
    (tmp_path / "code.py").write_text("raise SystemExit")
    with pytest.raises(BadInput, match="cannot read the tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("single, before", [
    ("$A", ""), ("<s> $A", "<s>"), ("$A </s>", ""), ("<s> $A </s>", "<s>"),
    ("<s> </s> $A <s>", "<s></s>")])
def test_special_tokens_come_before_a_text_and_only_once(trained, single, before):
    tokenizer = copy.deepcopy(trained)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    names = ["<s>", "</s>"]
    ids = tokenizer.convert_tokens_to_ids(names)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=list(zip(names, ids, strict=True)))
    (bare,), (begin,) = encode(tokenizer, ["two words"]), encode(tokenizer, [before])
    wanted = [*begin, *bare]
    assert begins_with(tokenizer) == begin
    assert text_ids(tokenizer, "two words") == prompt_ids(tokenizer, "two words", 500) == wanted
    # Special tokens that the text has already are not put there again.
    assert text_ids(tokenizer, f"{before}two words") == wanted
    windows = text_windows("file:x", ["two words"], tokenizer, len(wanted))
    assert windows.tokens.tolist() == [wanted]


def sparse(*ids):
    """A tokenizer of the words w0, w1, ... with these ids."""
    plain = Tokenizer(models.WordLevel({f"w{n}": i for n, i in enumerate(ids)}, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="w1")


def test_ids_with_gaps_are_cached_and_read(tmp_path, config):
    tokenizer = sparse(0, 1, 70_000, 70_001)
    text = tokenise(["w2 w0", "w3"], tokenizer, tmp_path)
    assert text.tokens.dtype == np.uint32 and text.tokens.tolist() == [70_000, 0, 1, 70_001, 1]
    assert tokenise(["w2 w0"], sparse(0, 1, 65_535), tmp_path).tokens.dtype == np.uint16
    tokenizer.save_pretrained(tmp_path)
    large = dataclasses.replace(config, vocab_size=70_002)
    assert read_tokenizer(tmp_path, large).decode([70_000, 60_000]) == "w2"
    with pytest.raises(BadInput, match="token 'w3' with id 70001, .* ends at 60: put the"):
        read_tokenizer(tmp_path, config)


def test_a_token_without_a_row_is_named(config):
    tokenizer = sparse(0, 1, 60, 61)
    assert prompt_ids(tokenizer, "w2 w0", 61) == [60, 0]
    with pytest.raises(BadInput, match="token 'w3' with id 61, and the model's vocabulary ends at"):
        prompt_ids(tokenizer, "w2 w3", 61)
    check_ids(np.zeros((0, 4), np.int32), tokenizer, 61)
    with pytest.raises(BadInput, match="token None with id 99"):
        check_ids(np.array([[3, 99]]), tokenizer, 61)


def test_text_that_has_no_tokens_is_refused(tmp_path):
    plain = Tokenizer(models.WordLevel({"a": 0}, unk_token="missing"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="a")
    message = "cannot encode the text .*unknown-word token"
    with pytest.raises(BadInput, match=message):
        prompt_ids(tokenizer, "b", 9)
    with pytest.raises(BadInput, match=message):
        tokenise(["b"], tokenizer, tmp_path)


@pytest.mark.parametrize("name, content", [
    ("tokenizer.json", '{"a":' * 100_000), ("tokenizer.json", "[]"), ("tokenizer.json", ""),
    ("tokenizer.json", '{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", '
                       '"vocab": {"a": -1}, "merges": []}}'),
    ("tokenizer_config.json", "[" * 100_000), ("tokenizer_config.json", '{"eos_token": 7}'),
    ("tokenizer_config.json", '{"eos_token": {"a": {}}}'), ("tokenizer_config.json", "[]"),
    ("tokenizer_config.json", '{"model_max_length": "x"}'),
])
def test_damaged_and_hostile_files(trained, tmp_path, config, name, content):
    save_tokenizer(trained, tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(BadInput, match="tokenizer"):
        read_tokenizer(tmp_path, dataclasses.replace(config, vocab_size=400))
