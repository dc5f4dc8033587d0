"""Nothing that is read can run code: no unpickling, no evaluated text, no code of a model."""

import ast
import json
from pathlib import Path

import pytest
import yaml

from rabit_jax import BadInput, load_hf
from rabit_jax.experiments.engine.config import load_config
from rabit_jax.experiments.engine.settings import RunConfig
from rabit_jax.experiments.report.figures import svg_with_legend
from rabit_jax.formats.model_card import packed_card
from rabit_jax.formats.packed_file import load_packed_params
from rabit_jax.formats.rendering import code, plain

ROOT = Path(__file__).parents[1]
SOURCES = [f for name in ("rabit_jax", "kernels", "experiments")
           for f in sorted((ROOT / name).rglob("*.py"))]
# Modules whose formats can hold code.
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve",
           "pickletools", "numpy.lib.npyio"}
# Calls that turn text or bytes into code, or read a format that may hold some.
CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "np.load", "numpy.load",
         "os.system", "os.popen", "yaml.load",
         "yaml.unsafe_load", "yaml.full_load", "pd.read_pickle"}
COMMAND = "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{}']]"


def calls(tree):
    """Each call of a module, with the dotted name of what it calls."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: k.value for k in node.keywords}


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_no_source_unpickles_or_evaluates(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
            [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not MODULES & set(names), f"{file}:{node.lineno}"
    for name, keywords in calls(tree):
        assert name not in CALLS, f"{file} calls {name}"
        given = {k: v.value for k, v in keywords.items() if isinstance(v, ast.Constant)}
        assert not given.get("trust_remote_code"), f"{file} runs the code of a model"
        assert not given.get("shell") and not given.get("allow_pickle"), f"{file}: {name}"
        if name.endswith(("extractall", ".extract")):
            assert given.get("filter") == "data", f"{file}: an archive may leave its folder"


@pytest.mark.parametrize("key", ["name: {}", "data: {{files: [{}]}}", "{}", "seed: {}",
                                 "? {}\n: 1"])
def test_tags_of_yaml_make_no_objects(tmp_path, key):
    ran, file = tmp_path / "ran", tmp_path / "config.yaml"
    file.write_text(key.format(COMMAND.format(ran)))
    with pytest.raises(BadInput):
        load_config(RunConfig, file)
    with pytest.raises(BadInput):
        load_config(RunConfig, None, [f"data.files=[{COMMAND.format(ran)}]"])
    assert not ran.exists()
    with pytest.raises(yaml.YAMLError):
        yaml.safe_load(file.read_text())


def test_code_that_comes_with_a_model_is_not_run(folder, words):
    """Its config and its tokeniser name a module that lies beside them."""
    ran = folder.parent / "ran"
    code_file = f"from pathlib import Path\nPath({str(ran)!r}).touch()\n"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py",
                 "sitecustomize.py", "__init__.py"):
        (folder / name).write_text(code_file)
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=words("a", "b", "<unk>")).save_pretrained(str(folder))
    own = {"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]}
    for name, change in (("tokenizer_config.json", {"auto_map": own, "tokenizer_class": "Evil"}),
                         ("config.json", {"auto_map": {"AutoConfig": "configuration_evil.Evil"}})):
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    load_hf(folder)
    # Without this file the class is the choice of transformers.
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(BadInput):
        load_hf(folder)
    file = folder / "config.json"
    raw = json.loads(file.read_text()) | {"auto_map": {"AutoModelForCausalLM": "modeling_evil.E"}}
    file.write_text(json.dumps(raw))
    with pytest.raises(BadInput, match="^unsupported config field auto_map"):
        load_hf(folder)
    assert not ran.exists()


def test_weights_of_pickle_are_not_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BadInput, match="convert the model to safetensors"):
        load_hf(folder)
    with pytest.raises(BadInput):
        load_packed_params(folder / "pytorch_model.bin")


EVIL = "<script>alert(1)</script>"


def test_cards_show_markup_as_text():
    text = packed_card(f"{EVIL} [x](javascript:alert(1)) | `", 2.0, 2.1, EVIL, EVIL,
                       [(EVIL, "1", "2", 3)], {"data": code(EVIL), "device": plain(EVIL)}, 2.5)
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["license"] == EVIL
    inline = body.replace(code(EVIL), "")
    assert "<script" not in inline and "](javascript" not in inline
    # A text that ends the front matter, or begins a heading, does neither.
    hostile = packed_card("a\n---\n# b", 2.0, 2.1, None, "x\n---\nlicense: y")
    assert yaml.safe_load(hostile.split("---\n")[1])["license"] == "x --- license: y"
    assert "\n# b" not in hostile


@pytest.mark.parametrize("label", [EVIL, "a $x$ b", "$\\frac{1}$", "$", "\\", "&lt;", "_x^2", "]]>",
                                   "-->", "\\$", "'\"><b>"])
def test_labels_of_figures_are_text(label):
    """No markup, and none of matplotlib's mathematics either."""
    from xml.etree import ElementTree

    def draw(axes):
        axes.set_xlabel(label)
        axes.set_yticks([1], labels=[label])
        return {label: axes.plot([1, 2], [1, 2])[0]}

    found = svg_with_legend(label, draw, [label])
    assert "<script" not in found
    shown = list(ElementTree.fromstring(found.replace("xlink:", "")).itertext())
    assert sum(text.strip() == label for text in shown) == 4
