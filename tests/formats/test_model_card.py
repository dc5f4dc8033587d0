"""Model cards: front matter, figures, and code that runs."""

import contextlib
import io
import re

import numpy as np
import pytest
from huggingface_hub import ModelCard

from rabit_jax.formats.model_card import (
    base_and_licence,
    dense_card,
    kept_parts,
    packed_card,
    without_local_paths,
)
from rabit_jax.formats.packed_model import save_packed
from rabit_jax.formats.rendering import code


@pytest.fixture
def folder(tmp_path, small, random_packed, words):
    tokenizer = words("The", "list", *[f"w{n}" for n in range(small.vocab_size - 2)])
    return save_packed(tmp_path / "mine", small, random_packed(small), tokenizer,
                       generation={"temperature": 0.6}, base="org/teacher")


def test_a_saved_model_has_a_card(folder):
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict() == {
        "base_model": "org/teacher", "base_model_relation": "quantized",
        "library_name": "rabit_jax", "pipeline_tag": "text-generation",
        "tags": ["rabit", "residual-binarisation", "quantized", "jax"]}
    assert card.text.lstrip().startswith("# mine\n\nResidual binarisation of org/teacher:")
    shapes = [(40, 40), (40, 20), (40, 20), (40, 40), (40, 300), (40, 300), (300, 40)]
    weights = sum(i * o for i, o in shapes)
    for bits in (sum(2 * i * o + 32 * (i + o) for i, o in shapes),
                 sum(2 * o * -(-i // 64) * 64 + 32 * (i + o) for i, o in shapes)):
        assert f": {bits / weights:.4g}\n" in card.text
    assert "licence: not known here" in card.text
    assert "* embedding, norms, head: 16 bits" in card.text
    assert "rabit_jax.experiments.serve --model FOLDER" in card.text
    assert '"temperature": 0.6' in (folder / "generation_config.json").read_text()
    assert base_and_licence(folder) == ("org/teacher", None)


@pytest.mark.parametrize(("modules", "tied", "kept"), [
    (["model.layers.0.mlp.up_proj"], True, "embedding, norms, head"),
    (["model.embed_tokens"], True, "norms"),
    (["model.embed_tokens"], False, "norms, head"),
    (["lm_head"], False, "embedding, norms"),
])
def test_what_is_packed_is_not_called_unquantised(modules, tied, kept):
    assert kept_parts(modules, tied) == kept


@pytest.mark.more
def test_the_code_on_a_card_runs(folder):
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code.replace("FOLDER", str(folder)), {})  # noqa: S102
    assert out.getvalue().strip()


def test_what_is_known_stands_on_the_card(tmp_path):
    text = packed_card("mine", 2.19, 2.25, "runs/teacher", "apache-2.0",
                       [("base", "8.00", "0.9", 128)], {"tokens": "qat 5"})
    (tmp_path / "README.md").write_text(text)
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.license == "apache-2.0" and data.base_model == "runs/teacher"
    assert "| base | 8.00 | 0.9 | 128 |" in text and "* tokens: qat 5" in text
    assert "* licence: apache-2.0" in text


def test_a_local_base_is_no_hub_id(tmp_path):
    (tmp_path / "teacher").mkdir()
    for base in (str(tmp_path / "teacher"), "./teacher", "teacher/of/mine", "teacher"):
        (tmp_path / "README.md").write_text(packed_card("mine", 2, 2, base))
        assert base_and_licence(tmp_path) == (None, None)
        text = (tmp_path / "README.md").read_text()
        assert f"Residual binarisation of {base.rpartition('/')[2]}:" in text
        assert str(tmp_path) not in text


def test_no_local_path_stands_on_a_card(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "train.txt").touch()
    command = (f"python -m x --config {tmp_path}/my.yaml data.files=[corpus/train.txt,~/b*.txt] "
               "teacher.path=org/name init.quantise=[layers/.*/kernel]")
    text = packed_card("mine", 2, 2, facts={"command": f"`{command}`"})
    assert ("`python -m x --config my.yaml data.files=[train.txt,b*.txt] teacher.path=org/name "
            "init.quantise=[layers/.*/kernel]`\n") in text
    text = dense_card("d", str(tmp_path / "packed"), "float32", None, None)
    assert "dense form of packed:" in text and str(tmp_path) not in text


@pytest.mark.parametrize("text, shown", [
    ("--config '/home/me/my runs/a b.yaml' x=1", "--config 'a b.yaml' x=1"),
    ("'data.files=[/home/me/my data/x.txt,/b/c d.txt]'", "'data.files=[x.txt,c d.txt]'"),
    ("files=('/home/me/my data/x.txt',)", "files=('x.txt',)"),
    ('"C:\\Users\\me\\x.txt"', '"x.txt"'), ("--ppl file:/home/me/x.txt", "--ppl x.txt"),
    ("file:///home/me/x.txt", "x.txt"), ("~me/x.txt ../up/y.txt", "x.txt y.txt"),
    ("teacher.path=org/name 'it is org/name'", "teacher.path=org/name 'it is org/name'"),
    ("init.quantise=[layers/.*/kernel] a/b", "init.quantise=[layers/.*/kernel] a/b"),
    ("5 tokens/s, 1/2", "5 tokens/s, 1/2"), ("'a' /x/y z 'b' /c", "'a' y z 'b' c"),
])
def test_paths_of_all_kinds_are_shortened(text, shown):
    assert without_local_paths(text) == shown


def test_names_of_users_stay_text(tmp_path):
    scores = [("a|b", "<i>", "1", 8)]
    text = packed_card("<b>[x](y)\n# no", 2, 2, "teacher", "a|b", scores, {"made": code("a`b")})
    assert "\n# &lt;b>[x]\\(y) # no\n" in text and "* licence: a\\|b\n" in text
    assert "| a\\|b | &lt;i> | 1 | 8 |" in text and "* made: `` a`b ``\n" in text


@pytest.mark.parametrize("text", [None, "", "no front matter", "---\n: [\n---\n", "---\n- a\n---"])
def test_cards_that_say_nothing(tmp_path, text):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert base_and_licence(tmp_path) == (None, None)


def test_dense_card(tmp_path):
    (tmp_path / "README.md").write_text(dense_card("d", "org/p", "float32", "org/base", "mit"))
    assert base_and_licence(tmp_path) == ("org/base", "mit")
    text = (tmp_path / "README.md").read_text()
    assert "dense form of org/p" in text and "AutoModelForCausalLM" in text
    assert np.char.count(text, "\n---\n") == 1
