"""Model folders: round trips, shards, shardings, tokenizers, and damage reported by name."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerFast

from rabit_jax import LLAMA_LINEARS, ResidualSignSpec, convert, pack
from rabit_jax.errors import BadInput
from rabit_jax.formats.checkpoint import read_config
from rabit_jax.formats.families import hf_name
from rabit_jax.formats.hf import load_hf, save_hf
from rabit_jax.formats.packed_model import load_packed, save_packed
from rabit_jax.formats.tokenizer import load_tokenizer, save_tokenizer
from rabit_jax.tree import pytree_dataclass


def _same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def _edit(folder, change):
    """Rewrites model.safetensors after `change(tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def _shard(folder):
    """Splits model.safetensors into two shards and their index."""
    tensors = load_file(folder / "model.safetensors")
    names, weight_map = sorted(tensors), {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_names():
    assert hf_name("layers/attn/q/kernel", 3) == "model.layers.3.self_attn.q_proj.weight"
    assert hf_name("layers/attn/q/kernel") == "model.layers.{}.self_attn.q_proj.weight"
    assert hf_name("layers/mlp/down", 0) == "model.layers.0.mlp.down_proj"
    assert hf_name("layers/attn/o/bias", 1) == "model.layers.1.self_attn.o_proj.bias"
    assert hf_name("head/kernel") == "lm_head.weight"
    with pytest.raises(BadInput, match="no Hugging Face name for 'layers/moe/kernel'"):
        hf_name("layers/moe/kernel")


def test_round_trip_is_bitwise(folder, model, params):
    again, loaded, tokenizer = load_hf(folder)
    assert again.config == model.config and tokenizer is None
    _same(loaded, params)
    names = {f.name for f in folder.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}
    stored = load_file(folder / "model.safetensors")
    np.testing.assert_array_equal(stored["model.layers.2.mlp.down_proj.weight"],
                                  np.asarray(params["layers"]["mlp"]["down"]["kernel"][2]).T)


def test_shards_read_as_one_file(folder, params):
    _shard(folder)
    _same(load_hf(folder)[1], params)


def test_large_models_are_written_in_shards(tmp_path, model, params):
    counts = []
    save_hf(tmp_path / "m", model, params, shard_bytes=20_000, done=counts.append,
            texts={"README.md": "text"}, generation={"temperature": 0.6, "eos_token_id": 40})
    shards = sorted((tmp_path / "m").glob("model-*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / "m" / "model.safetensors").exists()
    sizes = [sum(t.nbytes for t in load_file(shard).values()) for shard in shards]
    assert max(sizes) <= 20_000
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert {n: f for f in shards for n in load_file(f)} == {
        n: tmp_path / "m" / f for n, f in index["weight_map"].items()}
    assert counts == list(range(1, len(index["weight_map"]) + 1))
    again, loaded, _ = load_hf(tmp_path / "m")
    _same(loaded, params)
    assert again.config == model.config  # the model's own end token is kept
    generation = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    assert generation == {"temperature": 0.6, "bos_token_id": 1, "eos_token_id": 2}
    assert (tmp_path / "m" / "README.md").read_text() == "text"


@pytest.mark.parametrize("value, dtype, message", [
    (np.nan, "float32", "layers/mlp/up/kernel holds NaN or infinity"),
    (7e4, "float16", "layers/mlp/up/kernel holds a value beyond the range of float16"),
])
def test_values_that_cannot_be_stored_are_named(tmp_path, model, params, value, dtype, message):
    flat = flatten_dict(params, sep="/")
    flat["layers/mlp/up/kernel"] = flat["layers/mlp/up/kernel"].at[1, 2, 3].set(value)
    with pytest.raises(BadInput, match=message):
        save_hf(tmp_path / "m", model, unflatten_dict(flat, sep="/"), dtype=dtype)
    assert not list(tmp_path.iterdir())


def test_bfloat16_storage(folder, model, params):
    save_hf(folder, model, params, dtype="bfloat16")
    again, loaded, _ = load_hf(folder)
    assert again.config.dtype == "bfloat16"
    rounded = jax.tree.map(lambda a: np.asarray(a).astype(ml_dtypes.bfloat16), params)
    _same(loaded, jax.tree.map(lambda a: a.astype(np.float32), rounded))
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(loaded))
    _same(load_hf(folder, dtype=jnp.bfloat16)[1], rounded)


def test_parameters_land_on_their_shardings(folder, params):
    mesh = Mesh(np.array(jax.devices()[:2]), ("tensor",))
    columns = NamedSharding(mesh, PartitionSpec(None, None, "tensor"))
    whole = NamedSharding(mesh, PartitionSpec())
    shardings = jax.tree.map(lambda a: columns if a.ndim == 3 else whole, params)
    _, loaded, _ = load_hf(folder, shardings=shardings)
    _same(loaded, params)
    assert loaded["layers"]["mlp"]["up"]["kernel"].sharding == columns
    assert loaded["final_norm"]["scale"].sharding == whole


def test_end_tokens_are_those_of_all_files(folder, model, params, words):
    """Of generation_config.json, of config.json and of the tokenizer, each once."""
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 9, 2, 61]}')
    assert load_hf(folder)[0].config.eos_ids == (5, 9, 2) == read_config(folder).eos_ids
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words(*[f"w{n}" for n in range(61)]), eos_token="w7")
    save_tokenizer(tokenizer, folder)
    assert load_hf(folder)[0].config.eos_ids == (5, 9, 2, 7) == read_config(folder).eos_ids
    packed = save_packed(folder.parent / "packed", model.config, pack(convert(params, [
        (LLAMA_LINEARS, ResidualSignSpec(rounds=1))])), tokenizer, generation={"top_k": 3})
    assert load_packed(packed)[0].config.eos_ids == (2, 7)


def test_a_tokenizer_without_end_token_gets_the_models(folder, words):
    save_tokenizer(words(*[f"w{n}" for n in range(61)]), folder)
    assert load_tokenizer(folder).eos_token_id is None
    tokenizer = load_hf(folder)[2]
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("w2", 2)
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 9]}')
    assert load_hf(folder)[2].eos_token_id == 5


@pytest.mark.parametrize("kind", ["index", "no index"])
def test_a_tensor_that_two_shards_hold(folder, params, kind):
    """The index decides; without one the tensor and both files are named."""
    _shard(folder)
    first, second = sorted(folder.glob("model-0*.safetensors"))
    name = sorted(load_file(first))[0]
    save_file({**load_file(second), name: load_file(first)[name] + 1}, second)
    if kind == "index":
        return _same(load_hf(folder)[1], params)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(BadInput, match=f"{name} in .*{first.name} and tensor {name} in "
                                       f".*{second.name} are one parameter"):
        load_hf(folder)
    save_file({n: t for n, t in load_file(second).items() if n != name}, second)
    _same(load_hf(folder)[1], params)  # the shards are all there and agree


@pytree_dataclass
class Sign:
    """A weight node of one scale per layer."""

    scale: jax.Array
    b: jax.Array

    @property
    def shape(self):
        return self.b.shape

    def matmul(self, x):
        raise AssertionError("saving multiplies by no weight")

    def dense(self):
        return self.scale[..., None, None] * self.b.astype(jnp.float32)


def test_weight_nodes_are_saved_dense(tmp_path, model, params):
    flat = flatten_dict(params, sep="/")
    for path in [p for p in flat if p.endswith("/kernel") and p.startswith("layers/")]:
        flat[path] = Sign(jnp.array([0.5, 1.5, 2.5]), jnp.sign(flat[path]).astype(jnp.int8))
    save_hf(tmp_path / "m", model, unflatten_dict(flat, sep="/"))
    found = load_hf(tmp_path / "m")[1]["layers"]["attn"]["o"]["kernel"]
    np.testing.assert_array_equal(found, flat["layers/attn/o/kernel"].dense())


def test_tied_head_may_be_stored_twice(tmp_path, config, params):
    from rabit_jax.models.decoder import Decoder

    tied = Decoder(dataclasses.replace(config, tied_head=True))
    body = {name: part for name, part in params.items() if name != "head"}
    folder = tmp_path / "tied"
    save_hf(folder, tied, body)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    _edit(folder, lambda t: t.update({
        "lm_head.weight": embedding, "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(6)}))
    _same(load_hf(folder)[1], body)
    _edit(folder, lambda t: t.update({"lm_head.weight": embedding + 1}))
    with pytest.raises(BadInput, match="extra tensor lm_head.weight"):
        load_hf(folder)


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop(UP), rf"missing tensor {UP} \[40, 32\]"),
    (lambda t: t.update(odd=np.ones(2)), "extra tensor odd"),
    (lambda t: t.update({UP: t[UP].T.copy()}), rf"tensor {UP} .* is F32 \[32, 40\]"),
    (lambda t: t.update({UP: t[UP].astype(np.int8)}), rf"tensor {UP} .* is I8"),
])
def test_wrong_tensors_are_named(folder, change, message):
    _edit(folder, change)
    with pytest.raises(BadInput, match=message):
        load_hf(folder)


def test_truncated_and_missing_shards_are_named(folder):
    _shard(folder)
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(BadInput, match="model-00002-of-00002.safetensors .*fetch it again"):
        load_hf(folder)
    shard.unlink()
    with pytest.raises(BadInput, match="model-00002-of-00002.safetensors .*fetch it again"):
        load_hf(folder)


@pytest.mark.parametrize("name, content, message", [
    ("config.json", "{", "cannot read .*config.json"),
    ("config.json", "[]", "holds a list, wanted a JSON object"),
    ("config.json", '{"model_type": "bert"}', "^unsupported model_type 'bert'"),
    ("config.json", None, "is no model folder, it holds neither config.json"),
    ("model.safetensors", None, "holds no model.safetensors and no model.safetensors.index.json"),
    ("tokenizer.json", "{", "cannot read the tokenizer"),
])
def test_damaged_folders(folder, name, content, message):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(BadInput, match=message):
        load_hf(folder)


def test_missing_folder_and_unreachable_hub(tmp_path, monkeypatch):
    with pytest.raises(BadInput, match="^no model folder"):
        load_hf(tmp_path / "nowhere")

    def offline(*_, **__):
        raise ConnectionError("no route to the hub\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(BadInput, match=r"no model folder org/name, .* \(no route to the hub\)"):
        load_hf("org/name")


def test_hub_ids_are_fetched_once(folder, params, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download",
                        lambda name, **_: asked.append(name) or str(folder))
    _same(load_hf("org/name")[1], params)
    assert asked == ["org/name"]  # once, so that all is of one revision


def test_saving_refuses_what_does_not_fit(tmp_path, model, params):
    wrong = {**params, "final_norm": {"scale": jnp.ones(5)}}
    with pytest.raises(BadInput, match=r"parameter final_norm/scale is \(5,\)"):
        save_hf(tmp_path / "m", model, wrong)
    with pytest.raises(BadInput, match="missing parameter head/kernel"):
        save_hf(tmp_path / "m", model, {n: p for n, p in params.items() if n != "head"})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(BadInput, match="exists and is not a model folder"):
        save_hf(tmp_path / "mine", model, params)
    assert [f.name for f in tmp_path.iterdir()] == ["mine"]


def test_tokenizer_is_kept(tmp_path, model, params, words):
    save_hf(tmp_path / "m", model, params, tokenizer=words("a", "b", "?"))
    tokenizer = load_hf(tmp_path / "m")[2]
    assert tokenizer("b a c")["input_ids"] == [1, 0, 2]
    save_hf(tmp_path / "again", model, params, tokenizer=tokenizer)
    assert load_hf(tmp_path / "again")[2]("a b")["input_ids"] == [0, 1]


def test_tokenizer_must_fit_the_vocabulary(tmp_path, model, params, words):
    size = model.config.vocab_size
    full = words(*[f"w{n}" for n in range(size)])
    save_hf(tmp_path / "m", model, params, tokenizer=full)
    tokenizer = load_hf(tmp_path / "m")[2]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})  # no text has it
    assert tokenizer.convert_tokens_to_ids("<image>") == size
    save_hf(tmp_path / "image", model, params, tokenizer=tokenizer)
    assert load_hf(tmp_path / "image")[2] is not None
    tokenizer.chat_template = "<image>{{ messages }}"
    save_hf(tmp_path / "chat", model, params, tokenizer=tokenizer)
    save_hf(tmp_path / "long", model, params, tokenizer=words(*[f"w{n}" for n in range(size + 3)]))
    for name, largest in (("chat", size), ("long", size + 2)):
        with pytest.raises(BadInput, match=f"with id {largest}, .* ends at {size - 1}: put"):
            load_hf(tmp_path / name)
