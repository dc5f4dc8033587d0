"""Packed folders in transformers: the same logits with our quantiser, an error without it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rabit_jax import GroupUniformSpec, convert, load_model, pack
from rabit_jax.errors import BadInput
from rabit_jax.formats.packed_model import save_packed
from rabit_jax.models.config import ModelConfig
from rabit_jax.weights.dual_binary import DualBinarySpec

torch = pytest.importorskip("torch", reason="transformers' models are PyTorch's")
transformers = pytest.importorskip("transformers", reason="the quantiser is for transformers")

ROOT = Path(__file__).parents[2]
# Twelve layers: the names of the second and of the eleventh begin alike.
CONFIG = ModelConfig(
    vocab_size=61, d_model=40, n_layers=12, n_heads=4, n_kv_heads=2, head_dim=10, d_hidden=300,
    attention_bias=True, o_bias=True, bos_id=1, eos_ids=(2, 5), max_position=48,
)
WITHOUT = """
import sys, transformers
for load in (transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM):
    try:
        load.from_pretrained(sys.argv[1])
    except ValueError as error:
        print("refused:", error)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, random_packed):
    """Packed signs, one matrix left as it was, one in another representation, a packed table."""
    params = random_packed(CONFIG, keep=("v",))
    rng = np.random.default_rng(2)
    gate = params["layers"]["mlp"]["gate"]
    gate["kernel"] = DualBinarySpec(group=20).init(
        rng.normal(size=(12, 40, 300)).astype(np.float32)).pack("gate")
    params = pack(convert(params, [("embed/embedding", GroupUniformSpec(bits=4, group=16))]))
    return save_packed(tmp_path_factory.mktemp("packed") / "p", CONFIG, params)


@pytest.fixture(scope="module")
def registered():
    """Importing it is all there is to do."""
    import rabit_jax.integrations.transformers  # noqa: F401


@pytest.fixture(scope="module")
def wanted(folder, apply, tokens):
    model, params, _ = load_model(folder)
    return np.asarray(apply(model, params, tokens))


def logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens, np.int64))).logits.float().numpy()


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_logits_are_ours(folder, registered, wanted, tokens, dtype):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, attn_implementation="eager")
    assert not any(info.values()), info
    assert model.dtype == torch.float32 and type(model).__name__ == "LlamaForCausalLM"
    found = logits(model, tokens)
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_the_model_is_dense_and_can_be_saved(folder, registered, wanted, tokens, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert np.abs(logits(model, tokens) - wanted).max() < 0.1 * np.abs(wanted).max()
    model.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in raw and "transformers_weights" not in raw
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    np.testing.assert_array_equal(logits(again, tokens), logits(model, tokens))


def test_damage_is_refused(folder, registered, tmp_path):
    import shutil

    copy = shutil.copytree(folder, tmp_path / "p")
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    with pytest.raises(Exception, match="altered|conversion"):
        transformers.AutoModelForCausalLM.from_pretrained(copy)
    raw = json.loads((copy / "config.json").read_text())
    raw["quantization_config"]["version"] = 99
    (copy / "config.json").write_text(json.dumps(raw))
    with pytest.raises(BadInput, match="version 99, this program reads"):
        transformers.AutoModelForCausalLM.from_pretrained(copy)


def test_folders_of_0_1_without_the_entry_are_read(folder, registered, wanted, tokens, tmp_path,
                                                   apply):
    import shutil

    copy = shutil.copytree(folder, tmp_path / "p")
    raw = json.loads((copy / "config.json").read_text())
    assert "rabit_jax.integrations.transformers" in raw.pop("transformers_weights")
    (copy / "config.json").write_text(json.dumps(raw))
    model, params, _ = load_model(copy)
    np.testing.assert_array_equal(apply(model, params, tokens), wanted)
    found = logits(transformers.AutoModelForCausalLM.from_pretrained(copy), tokens)
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.more
def test_without_the_import_transformers_refuses(folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", WITHOUT, str(folder)], env=environment,
                          capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr
    assert all("refused: " in line and "import rabit_jax.integrations.transformers" in line
               for line in lines)


def test_the_decoder_without_its_head_has_the_same_weights(folder, registered):
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder).model.state_dict()
    bare = transformers.AutoModel.from_pretrained(folder).state_dict()
    assert bare.keys() == whole.keys()
    assert all(torch.equal(bare[name], whole[name]) for name in whole)
