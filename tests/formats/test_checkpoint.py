"""Checkpoints read parameter by parameter: layout, layers, dtypes, multimodal names, damage."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rabit_jax.errors import BadInput
from rabit_jax.formats import checkpoint as module
from rabit_jax.formats.checkpoint import open_checkpoint
from rabit_jax.formats.hf import load_hf

UP = "model.layers.1.mlp.up_proj.weight"


def _edit(folder, change):
    """Rewrites model.safetensors with what `change(tensors)` returns."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")


def test_parameters_come_in_our_layout(folder, model, monkeypatch):
    monkeypatch.setattr(module, "PIECE_BYTES", 700)  # some rows of each tensor at a time
    stored = load_file(folder / "model.safetensors")
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.config == model.config and checkpoint.folder == folder
        up = checkpoint.read("layers/mlp/up/kernel")
        layer = checkpoint.read("layers/mlp/up/kernel", layer=1)
        norm = checkpoint.read("layers/attn_norm/scale", layer=2)
        embedding = checkpoint.read("embed/embedding")
        head = checkpoint.read("head/kernel", dtype=ml_dtypes.bfloat16)
        assert up.shape == checkpoint.shapes["layers/mlp/up/kernel"]
    assert up.dtype == np.float32 and head.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(up[1], stored[UP].T)
    np.testing.assert_array_equal(layer, stored[UP].T)
    np.testing.assert_array_equal(norm, stored["model.layers.2.input_layernorm.weight"])
    np.testing.assert_array_equal(embedding, stored["model.embed_tokens.weight"])
    np.testing.assert_array_equal(head, stored["lm_head.weight"].astype(ml_dtypes.bfloat16).T)


def test_bytes_are_told_as_they_are_read(folder, params):
    told = []
    load_hf(folder, done=lambda ready, total: told.append((ready, total)))
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert told[-1] == (total, total) and len(told) == len(jax.tree.leaves(params))
    assert told == sorted(told)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_float_is_read(folder, dtype):
    _edit(folder, lambda t: {name: value.astype(dtype) for name, value in t.items()})
    wanted = load_file(folder / "model.safetensors")[UP]
    assert wanted.dtype == dtype
    with open_checkpoint(folder) as checkpoint:
        found = checkpoint.read("layers/mlp/up/kernel", layer=1)
    np.testing.assert_array_equal(found, wanted.astype(np.float32).T)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_values_that_are_not_finite_are_named(folder, value, dtype):
    def damage(tensors):
        tensors = {name: t.astype(dtype) for name, t in tensors.items()}
        tensors[UP][3, 5] = value
        return tensors

    _edit(folder, damage)
    with open_checkpoint(folder) as checkpoint:
        checkpoint.read("layers/mlp/up/kernel", layer=0)
        with pytest.raises(BadInput, match=rf"tensor {UP} in .*model.safetensors holds NaN or inf"):
            checkpoint.read("layers/mlp/up/kernel")
    with pytest.raises(BadInput, match=f"tensor {UP} .* holds NaN or infinity"):
        load_hf(folder)


def test_values_beyond_the_dtype_are_named(folder):
    _edit(folder, lambda t: t | {UP: t[UP] + np.float32(7e4)})
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.read("layers/mlp/up/kernel").max() > 65504
        with pytest.raises(BadInput, match=f"tensor {UP} .* beyond the range of float16"):
            checkpoint.read("layers/mlp/up/kernel", dtype="float16")


# The names of the files and of transformers 5: language model, head, images.
SPELLINGS = {
    "older": ("language_model.model.", "language_model.lm_head.weight",
              ("vision_tower.", "multi_modal_projector.")),
    "newer": ("model.language_model.", "lm_head.weight",
              ("model.vision_tower.", "model.multi_modal_projector.")),
}


def _multimodal(folder, spelling):
    body, head, images = SPELLINGS[spelling]

    def rename(tensors):
        out = {name.replace("model.", body, 1): t for name, t in tensors.items()
               if name != "lm_head.weight"}
        out[head] = tensors["lm_head.weight"]
        return out | {f"{prefix}weight": np.ones(3, np.float32) for prefix in images}

    _edit(folder, rename)
    file = folder / "config.json"
    raw = json.loads(file.read_text())
    file.write_text(json.dumps({**raw, "text_config": {}}))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_language_model_of_a_multimodal_checkpoint(folder, params, spelling, monkeypatch, config):
    _multimodal(folder, spelling)
    monkeypatch.setattr(module, "from_hf", lambda raw: config)  # no family of ours is meant here
    found = load_hf(folder)[1]
    np.testing.assert_array_equal(found["layers"]["mlp"]["up"]["kernel"],
                                  params["layers"]["mlp"]["up"]["kernel"])
    np.testing.assert_array_equal(found["head"]["kernel"], params["head"]["kernel"])
    odd = SPELLINGS[spelling][0] + "layers.0.odd"
    _edit(folder, lambda t: t | {odd: np.ones(3, np.float32)})
    with pytest.raises(BadInput, match=f"extra tensor {odd} in"):
        load_hf(folder)


def test_images_belong_to_multimodal_checkpoints_alone(folder):
    _edit(folder, lambda t: t | {"vision_tower.weight": np.ones(3, np.float32)})
    with pytest.raises(BadInput, match="extra tensor vision_tower.weight"):
        load_hf(folder)


@pytest.mark.parametrize("index", [
    {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 3}},
    {"weight_map": {"a": "../elsewhere.safetensors"}},
])
def test_a_damaged_index_is_named(folder, index):
    (folder / "model.safetensors").rename(folder / "elsewhere.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadInput, match="model.safetensors.index.json has no weight_map"):
        load_hf(folder)


LOADING = """
import json, sys
from pathlib import Path
import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rabit_jax.formats import load_hf
from rabit_jax.formats.checkpoint import read_config
from rabit_jax.models import param_shapes

def status(name):
    rows = [line.split() for line in open("/proc/self/status")]
    return next(1024 * int(row[1]) for row in rows if row[0] == name + ":")

warm, folder, devices = sys.argv[1:]
mesh = Mesh(np.array(jax.devices()[:2]), ("data",))

def place(shape):
    last = "data" if devices == "2" and shape[-1] % 2 == 0 else None
    return NamedSharding(mesh, PartitionSpec(*[None] * (len(shape) - 1), last))

def load(folder):
    shapes = param_shapes(read_config(folder))
    places = unflatten_dict({p: place(s) for p, s in shapes.items()}, sep="/")
    return load_hf(folder, shardings=None if devices == "1" else places)[1]

load(warm)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
params = load(folder)
peak = status("VmHWM")
leaves = jax.tree.leaves(params)
print(json.dumps({
    "beyond": peak - before - sum(a.nbytes for a in leaves),
    "loaded": sum(a.nbytes for a in leaves),
    "stack": max(a.nbytes for a in leaves),
    "shard": max(f.stat().st_size for f in Path(folder).glob("*.safetensors"))}))
"""


@pytest.mark.more
@pytest.mark.parametrize("devices", ["1", "2"])
def test_loading_holds_one_stacked_parameter_more(folder, devices, random_big):
    """Host memory beyond the loaded arrays is at most one shard and one stacked parameter."""
    run = subprocess.run([sys.executable, "-c", LOADING, str(folder), str(random_big), devices],
                         capture_output=True, text=True, timeout=300,
                         cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["loaded"] > 5e8 and found["shard"] < found["stack"] < found["loaded"] / 4
    print({name: f"{size / 1e6:.0f} MB" for name, size in found.items()})
    assert found["beyond"] < found["shard"] + found["stack"]


@pytest.fixture(scope="module")
def random_big(tmp_path_factory):
    """A random bfloat16 checkpoint of 290 MB in six shards."""
    from rabit_jax.formats.families import tensor_names
    from rabit_jax.formats.hf_config import to_hf
    from rabit_jax.models.config import ModelConfig
    from rabit_jax.models.decoder import param_shapes

    config = ModelConfig(vocab_size=8192, d_model=1024, n_layers=10, n_heads=16, n_kv_heads=16,
                         head_dim=64, d_hidden=2816)
    folder, rng = tmp_path_factory.mktemp("big"), np.random.default_rng(0)
    (folder / "config.json").write_text(json.dumps(to_hf(config)))
    names = sorted(pair for p, s in param_shapes(config).items() for pair in tensor_names(p, s))
    weight_map = {}
    for n in range(6):
        part = names[n * len(names) // 6 : (n + 1) * len(names) // 6]
        tensors = {name: rng.random(shape, np.float32).astype(ml_dtypes.bfloat16)
                   for name, shape in part}
        save_file(tensors, folder / f"model-{n}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"model-{n}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder
