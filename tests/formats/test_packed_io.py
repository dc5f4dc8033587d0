"""Packed folders: round trip, the bytes on disk read by hand, and what cannot be written."""

import dataclasses
import errno
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from rabit_jax.errors import BadInput
from rabit_jax.formats import packed_model as io
from rabit_jax.formats.hf import save_hf
from rabit_jax.models.config import ModelConfig
from rabit_jax.models.decoder import Decoder
from rabit_jax.tree import is_weight
from rabit_jax.weights.description import describe
from rabit_jax.weights.residual_sign import ResidualSign
from rabit_jax.weights.sign_paths import PackedSign

EXACT = ModelConfig(vocab_size=32, d_model=256, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=64,
                    d_hidden=512, tied_head=True)


@pytest.fixture(scope="module")
def params(random_packed, small):
    return random_packed(small, keep=("v",))


@pytest.fixture
def folder(params, small, tmp_path):
    return io.save_packed(tmp_path / "packed", small, params)


def raw_file(folder):
    """Header and data of model.safetensors, by the format's definition alone."""
    content = (folder / io.FILE).read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def assert_same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_round_trip(params, tmp_path, small, words):
    tokenizer = words("low", "the", "lowest")
    target = tmp_path / "runs" / "packed"
    assert io.save_packed(target, small, params, tokenizer, extra={"spec": {"k": 2}}) == target
    assert [p.name for p in target.parent.iterdir()] == ["packed"]
    assert len({p.stat().st_mode for p in target.iterdir()}) == 1
    model, found, read = io.load_packed(target)
    assert model.config == small and read.encode("the lowest") == [1, 2]
    assert_same(found, params)
    assert isinstance(found["layers"]["mlp"]["up"]["kernel"], PackedSign)
    assert not is_weight(found["layers"]["attn"]["v"]["kernel"])
    tokens = jnp.arange(14).reshape(2, 7)
    run = jax.jit(lambda p: Decoder(small).apply({"params": p}, tokens))
    np.testing.assert_array_equal(run(found), run(params))
    raw = json.loads((target / "config.json").read_text())
    assert raw["quantization_config"] == {
        "spec": {"k": 2}, "quant_method": "rabit", "format": "rb256", "version": 4,
        "types": ["sign"]}
    with pytest.raises(BadInput, match="unsupported quantization_config"):
        io.load_hf(target)


def test_the_file_read_by_hand(params, folder):
    # Bit p of byte j is input 256 c + 32 p + j, and 256 + 8 p + j in the last block of 64 inputs.
    header, data = raw_file(folder)
    name, node = "model.layers.1.mlp.down_proj", params["layers"]["mlp"]["down"]["kernel"]
    entry = header[f"{name}.bits"]
    assert entry["dtype"] == "U8" and entry["shape"] == [2, 40, 40]
    begin, end = entry["data_offsets"]
    bits = np.frombuffer(data[begin:end], np.uint8).reshape(entry["shape"])
    signs = np.asarray(node.signs())[1]
    for i in range(300):
        c, size = i // 256, 32 if i < 256 else 8
        p, j = divmod(i % 256, size)
        np.testing.assert_array_equal(bits[:, :, 32 * c + j] >> p & 1, signs[:, i] > 0)
    for part, array in (("g", node.g), ("h", node.h)):
        assert header[f"{name}.{part}"]["dtype"] == "F16"
        begin, end = header[f"{name}.{part}"]["data_offsets"]
        stored = np.frombuffer(data[begin:end], np.float16)
        np.testing.assert_array_equal(stored, np.asarray(array)[1].ravel())
    meta = header["__metadata__"]
    assert (meta["format"], meta["version"]) == ("rb256", "4")
    assert json.loads(meta["modules"])[name] == {
        "type": "sign", "in": 300, "out": 40, "k": 2, "limbs": 3}
    assert json.loads(meta["config"])["hidden_size"] == 40


@pytest.mark.parametrize("k", [1, 3])
def test_bits_per_weight_are_counted_from_the_file(k, tmp_path, random_packed):
    folder = io.save_packed(tmp_path / "exact", EXACT, random_packed(EXACT, k))
    header, data = raw_file(folder)
    spans = {name: entry["data_offsets"] for name, entry in header.items() if name[0] != "_"}
    linears = {name for name in spans if name.endswith((".bits", ".g", ".h"))}
    linear = sum(spans[name][1] - spans[name][0] for name in linears)
    attention, mlp = [(256, 256), (256, 128)] * 2, [(256, 512), (256, 512), (512, 256)]
    shapes = (attention + mlp) * 2
    weights = sum(i * o for i, o in shapes)
    nominal = sum(k * i * o + 16 * k * (i + o) for i, o in shapes) / weights
    found = io.packed_bytes(folder)
    assert found == {
        "linear_bytes": linear, "other_bytes": len(data) - linear, "weights": weights,
        "file_bytes": (folder / io.FILE).stat().st_size, "stored_bits_per_weight": nominal,
        "bits_per_weight": pytest.approx(nominal),
        "parameters": weights + found["other_bytes"] // 2,
        "whole_model_bits_per_weight": 8 * len(data) / (weights + found["other_bytes"] // 2),
    }
    described = describe(io.load_packed(folder)[1])  # one number, whether of the file or of params
    assert described.whole_model_bits_per_weight == found["whole_model_bits_per_weight"]
    assert found["other_bytes"] == 2 * (32 * 256 + 5 * 256)


def test_padding_is_counted(folder):
    shapes = [(40, 40), (40, 20), (40, 40), (40, 300), (40, 300), (300, 40)] * 2
    bits = sum(2 * o * (-(-i // 64) * 64) + 32 * (i + o) for i, o in shapes)
    found = io.packed_bytes(folder)["stored_bits_per_weight"]
    assert found == bits / sum(i * o for i, o in shapes) > 3


def test_load_model_reads_both_kinds(params, folder, tmp_path, small, random_params):
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    model, found, _ = io.load_model(folder)
    assert model.config == dataclasses.replace(small, eos_ids=(7, 9, 2, 5))
    assert_same(found, params)
    dense = unflatten_dict(random_params(small), sep="/")
    save_hf(tmp_path / "dense", small, dense, dtype="bfloat16")
    model, found, tokenizer = io.load_model(tmp_path / "dense")
    assert tokenizer is None and model.config.dtype == "bfloat16"
    assert_same(found, jax.tree.map(lambda x: x.astype(jnp.bfloat16), dense))
    with pytest.raises(BadInput, match="holds no packed model"):
        io.load_packed(tmp_path / "dense")
    with pytest.raises(BadInput, match="no model folder"):
        io.load_model(tmp_path / "nowhere")


def test_save_refuses_what_it_cannot_hold(params, tmp_path, small, random_params):
    def changed(path, value):
        return unflatten_dict(flatten_dict(params, sep="/") | {path: value}, sep="/")

    up, node = "layers/mlp/up/kernel", params["layers"]["mlp"]["up"]["kernel"]
    latent = ResidualSign(jnp.ones(node.shape), jnp.ones((2, 2, 300)), jnp.ones((2, 2, 40)))
    for bad, message in [
        (changed(up, latent), "layers/mlp/up/kernel is a ResidualSign, wanted a packed weight"),
        (unflatten_dict(random_params(small), sep="/"), "hold no packed weight"),
        (changed(up, node.replace(bits=node.bits[..., :-1])), r"bits uint8\[2, 2, 300, 31\]"),
        (changed(up, node.replace(g=node.g.astype(jnp.float32))), "has g float32"),
        (changed("layers/mlp/up/extra", jnp.ones(3)), "extra parameter layers/mlp/up/extra"),
        (changed("final_norm/scale", jnp.full(40, jnp.nan)), "final_norm/scale holds a"),
    ]:
        with pytest.raises(BadInput, match=message):
            io.save_packed(tmp_path / "packed", small, bad)
    assert not list(tmp_path.iterdir())
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    with pytest.raises(BadInput, match="is not a model folder"):
        io.save_packed(tmp_path / "thesis", small, params)


def test_saving_again_replaces_and_a_full_disk_leaves_what_was_there(
    params, folder, monkeypatch, small, random_packed
):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    other = random_packed(small, k=3)
    io.save_packed(folder, small, other)
    monkeypatch.setattr("rabit_jax.atomic.save_file", full)
    with pytest.raises(BadInput, match="cannot write model folder .*No space left"):
        io.save_packed(folder, small, params)
    assert [p.name for p in folder.parent.iterdir()] == ["packed"]
    assert_same(io.load_packed(folder)[1], other)
