"""The byte-level BPE: any text survives, training repeats, folders round-trip."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rabit_jax.data.embedded import embedded_documents
from rabit_jax.data.tokenizer import train_tokenizer
from rabit_jax.errors import BadInput
from rabit_jax.formats.tokenizer import load_tokenizer, save_tokenizer

ROOT = Path(__file__).parents[2]
TEXTS = [
    "Plain words, a number 12345 and  two spaces .",
    " leading and trailing \n\n\t tabs\r\n",
    "naïve café — “quotes” 中文 日本語 العربية हिन्दी",
    "🙂👩‍👩‍👧 e\u0301 \u0000 \u200b \ufeff",
    "a literal <|endoftext|> inside",
    "",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(embedded_documents()[:20], 400)


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids(tokenizer):
    assert len(tokenizer) == 400
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.pad_token_id == 0
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.encode("the")[0] != 0 and len(tokenizer.encode(" the")) == 1


def test_training_repeats(tokenizer):
    again = train_tokenizer(embedded_documents()[:20], 400)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def merges(texts, size):
    return json.loads(train_tokenizer(texts, size).backend_tokenizer.to_str())["model"]["merges"]


def test_merges_are_the_most_frequent_pairs_seen_at_least_twice():
    assert merges(["zq-zq-zq-ab-ab-cd"], 258) == [["z", "q"]]
    assert merges(["zq-zq-zq-ab-ab-cd"], 300) == [["z", "q"], ["a", "b"]]


def test_little_text_gives_fewer_tokens():
    assert len(train_tokenizer(["abc"], 5000)) == 257


@pytest.mark.parametrize("kind", [None, "llama", "qwen2", "gemma2"])
def test_a_folder_gives_the_tokeniser_back(tokenizer, tmp_path, kind):
    save_tokenizer(tokenizer, tmp_path)
    if kind:  # transformers picks some classes by model type: the tokens must stay the same
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    loaded = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(loaded.encode(text)) == text
    assert loaded.eos_token_id == 0 and len(loaded) == 400


def test_a_folder_without_tokeniser(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert load_tokenizer(tmp_path) is None
    assert load_tokenizer(tmp_path / "missing") is None


def test_a_damaged_tokeniser_is_named(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(BadInput, match="cannot read the tokenizer in .* restore its tokenizer"):
        load_tokenizer(tmp_path)


def test_a_vocabulary_out_of_range_is_refused():
    with pytest.raises(BadInput, match="vocab_size is 256, wanted 257 to"):
        train_tokenizer(["text"], 256)
    with pytest.raises(BadInput, match="vocab_size is 100000000000, wanted"):
        train_tokenizer(["text"], 10**11)  # the library would end the process for want of memory


def test_the_folder_named_kernels_does_not_break_transformers():
    code = "from rabit_jax.data import train_tokenizer as t; print(len(t(['a'], 300)))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == "257", done.stderr


def test_importing_the_room_imports_no_heavy_library():
    code = (
        "import sys, rabit_jax.data; heavy = {'torch', 'transformers', 'tokenizers', 'datasets'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
