"""The dense export of a packed model: what transformers makes of it, and what it refuses."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from rabit_jax.data.tokenizer import train_tokenizer
from rabit_jax.experiments.export import main
from rabit_jax.formats.hf import load_hf
from rabit_jax.formats.model_card import base_and_licence
from rabit_jax.formats.packed_model import load_packed, save_packed
from rabit_jax.kernels.layout import packed_bytes
from rabit_jax.models.config import ModelConfig
from rabit_jax.models.decoder import Decoder, param_shapes
from rabit_jax.weights.conversion import dense
from rabit_jax.weights.sign_paths import PackedSign

CONFIG = ModelConfig(vocab_size=300, d_model=40, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=10,
                     d_hidden=300, eos_ids=(0,), bos_id=0, max_position=32)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A packed model whose value projections stay dense."""
    rng = np.random.default_rng(0)

    def leaf(path, shape):
        if not path.endswith("/kernel") or "/v/" in path or path.startswith("head"):
            return rng.normal(size=shape).astype(np.float16)
        l, i, o = shape
        bits = rng.integers(0, 256, (l, 2, o, packed_bytes(i)), np.uint8)
        scales = [rng.uniform(0.1, 0.3, (l, 2, n)).astype(np.float16) for n in (o, i)]
        return PackedSign(bits, *scales, None)

    params = {path: leaf(path, shape) for path, shape in param_shapes(CONFIG).items()}
    tokenizer = train_tokenizer(["the cat sat on the mat, the cat ran"] * 3, 300)
    return save_packed(tmp_path_factory.mktemp("export") / "packed", CONFIG,
                       unflatten_dict(params, sep="/"), tokenizer, base="org/teacher",
                       generation={"top_p": 0.9, "do_sample": True})


@pytest.mark.more
def test_transformers_reads_the_export_with_our_logits(packed, tmp_path, capsys):
    torch = pytest.importorskip("torch", reason="the reference runs on PyTorch")
    transformers = pytest.importorskip("transformers", reason="the reference is transformers")
    target = tmp_path / "dense"
    assert main(["--model", str(packed), "--output", str(target), "--dtype", "float32"]) == 0
    assert capsys.readouterr().out == f"dense model: {target}\n"
    reference, info = transformers.AutoModelForCausalLM.from_pretrained(
        target, output_loading_info=True, attn_implementation="eager")
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert reference.generation_config.top_p == 0.9 and reference.generation_config.do_sample
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, CONFIG.vocab_size)
    with torch.no_grad():
        wanted = reference(torch.tensor(np.asarray(tokens, np.int64))).logits.numpy()
    assert np.abs(wanted).max() > 1
    for folder, load in ((packed, load_packed), (target, load_hf)):
        model, params, tokenizer = load(folder)
        params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), dense(params))
        found = jax.jit(model.apply)({"params": params}, tokens)
        assert np.abs(np.asarray(found) - wanted).max() < 1e-4 * np.abs(wanted).max()
        assert tokenizer("the cat")["input_ids"]


def test_the_export_holds_the_matrices_that_the_packed_model_multiplies_by(packed, tmp_path):
    target = tmp_path / "dense"
    assert main(["--model", str(packed), "--output", str(target)]) == 0
    config = json.loads((target / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "quantization_config" not in config
    exact = flatten_dict(dense(load_packed(packed)[1]), sep="/")
    found = flatten_dict(load_hf(target)[1], sep="/")
    for path, value in found.items():
        wanted = np.asarray(exact[path], np.float32).astype(jnp.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(value, wanted)
    assert base_and_licence(target) == ("org/teacher", None)
    assert Decoder(CONFIG).config.eos_ids == load_hf(target)[0].config.eos_ids


def test_the_first_paths_alone_can_be_exported(packed, tmp_path, capsys):
    target = tmp_path / "first"
    args = ["--model", str(packed), "--output", str(target), "--dtype", "float32", "--paths", "1"]
    assert main(args) == 0
    weights = flatten_dict(load_packed(packed)[1], sep="/")
    found = flatten_dict(load_hf(target)[1], sep="/")
    for path, weight in weights.items():
        if isinstance(weight, PackedSign):
            (first, second), value = weight.paths(), found[path]
            np.testing.assert_allclose(value, first, rtol=1e-6)
            assert np.abs(np.asarray(second)).max() > 0
    assert main([*args[:1], str(target), "--output", str(tmp_path / "no"), "--paths", "1"]) == 2
    assert "no sign paths" in capsys.readouterr().err


def test_refusals(packed, tmp_path, capsys):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    for model, output, message in (
        (packed, packed, "is the model itself"),
        (packed, tmp_path / "thesis", "exists and is not a model folder"),
        (tmp_path / "none", tmp_path / "out", "no model folder"),
    ):
        assert main(["--model", str(model), "--output", str(output)]) == 2
        assert message in capsys.readouterr().err
    assert [f.name for f in tmp_path.iterdir()] == ["thesis"]
