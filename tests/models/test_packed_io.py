"""Packed folders: round trip, the bytes on disk read by hand, and damage of every kind."""

import dataclasses
import errno
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import safe_open
from safetensors.numpy import save_file

from rabit_jax.data import train_tokenizer
from rabit_jax.errors import BadInput
from rabit_jax.models import Decoder, ModelConfig, param_shapes, save_hf
from rabit_jax.models import packed_io as io
from rabit_jax.weights import PackedSign, ResidualSign, is_weight

# Inputs of 40 and 300: padded to one block and to two.
SMALL = ModelConfig(
    vocab_size=61, d_model=40, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=10, d_hidden=300,
    attention_bias=True, bos_id=1, eos_ids=(2, 5), max_position=48,
)
EXACT = ModelConfig(vocab_size=32, d_model=256, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=64,
                    d_hidden=512, tied_head=True)
LINEARS = ("q", "k", "v", "o", "gate", "up", "down")


def random(config):
    """Random float32 params by path; NumPy, for nothing is compiled that way."""
    rng = np.random.default_rng(0)
    return {path: jnp.asarray(rng.normal(size=shape), jnp.float32)
            for path, shape in param_shapes(config).items()}


def packed(config, k=2, keep=()):
    """Random params whose linears are packed, but for those in `keep`; the rest is float16."""
    rng = np.random.default_rng(1)

    def leaf(path, value):
        module, name = path.split("/")[-2:]
        if module not in LINEARS or name == "bias" or module in keep:
            return value.astype(jnp.float16)
        l, i, o = value.shape
        bits = rng.integers(0, 256, (l, k, o, -(-i // 256) * 32), np.uint8)
        g, h = (rng.uniform(0.2, 0.6, (l, k, n)).astype(np.float16) for n in (o, i))
        return PackedSign(jnp.asarray(bits), jnp.asarray(g), jnp.asarray(h))

    flat = {path: leaf(path, value) for path, value in random(config).items()}
    return unflatten_dict(flat, sep="/")


@pytest.fixture(scope="module")
def params():
    return packed(SMALL, keep=("v",))


@pytest.fixture
def folder(params, tmp_path):
    return io.save_packed(tmp_path / "packed", SMALL, params)


def raw_file(folder):
    """Header and data of model.safetensors, by the format's definition alone."""
    content = (folder / io.FILE).read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def rewrite(folder, name, change):
    """Writes the file again with `change(value)` for a field or tensor; None removes it."""
    with safe_open(folder / io.FILE, "numpy") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    holder = header if name in ("format", "version", "config", "modules", "sha256") else tensors
    holder[name] = change(holder.get(name))
    if holder[name] is None:
        del holder[name]
    save_file(tensors, folder / io.FILE, metadata=header)


def refused(folder):
    """The sentence with which the folder is refused."""
    with pytest.raises(BadInput) as error:
        io.load_packed(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def assert_same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_round_trip(params, tmp_path):
    tokenizer = train_tokenizer(["low lower lowest"], 300)
    target = tmp_path / "runs" / "packed"
    assert io.save_packed(target, SMALL, params, tokenizer, extra={"spec": {"k": 2}}) == target
    assert [p.name for p in target.parent.iterdir()] == ["packed"]
    assert len({p.stat().st_mode for p in target.iterdir()}) == 1
    model, found, read = io.load_packed(target)
    assert model.config == SMALL and read.encode("the lowest") == tokenizer.encode("the lowest")
    assert_same(found, params)
    assert isinstance(found["layers"]["mlp"]["up"]["kernel"], PackedSign)
    assert not is_weight(found["layers"]["attn"]["v"]["kernel"])
    tokens = jnp.arange(14).reshape(2, 7)
    run = jax.jit(lambda p: Decoder(SMALL).apply({"params": p}, tokens))
    np.testing.assert_array_equal(run(found), run(params))
    raw = json.loads((target / "config.json").read_text())
    assert raw["quantization_config"] == {
        "spec": {"k": 2}, "quant_method": "rabit", "format": "rb256", "version": 2,
        "types": ["sign"]}
    with pytest.raises(BadInput, match="unsupported quantization_config"):
        io.load_hf(target)


def test_the_file_read_by_hand(params, folder):  # bit p of byte j is input 256 c + 32 p + j
    header, data = raw_file(folder)
    name, node = "model.layers.1.mlp.down_proj", params["layers"]["mlp"]["down"]["kernel"]
    entry = header[f"{name}.bits"]
    assert entry["dtype"] == "U8" and entry["shape"] == [2, 40, 64]
    begin, end = entry["data_offsets"]
    bits = np.frombuffer(data[begin:end], np.uint8).reshape(entry["shape"])
    signs = np.asarray(node.signs())[1]
    for i in range(300):
        c, p, j = i // 256, i % 256 // 32, i % 32
        np.testing.assert_array_equal(bits[:, :, 32 * c + j] >> p & 1, signs[:, i] > 0)
    for part, array in (("g", node.g), ("h", node.h)):
        assert header[f"{name}.{part}"]["dtype"] == "F16"
        begin, end = header[f"{name}.{part}"]["data_offsets"]
        stored = np.frombuffer(data[begin:end], np.float16)
        np.testing.assert_array_equal(stored, np.asarray(array)[1].ravel())
    meta = header["__metadata__"]
    assert (meta["format"], meta["version"]) == ("rb256", "2")
    assert json.loads(meta["modules"])[name] == {
        "type": "sign", "in": 300, "out": 40, "k": 2}
    assert json.loads(meta["config"])["hidden_size"] == 40


@pytest.mark.parametrize("k", [1, 3])
def test_bits_per_weight_are_counted_from_the_file(k, tmp_path):
    folder = io.save_packed(tmp_path / "exact", EXACT, packed(EXACT, k))
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
    }
    assert found["other_bytes"] == 2 * (32 * 256 + 5 * 256)


def test_padding_is_counted(folder):
    shapes = [(40, 40), (40, 20), (40, 40), (40, 300), (40, 300), (300, 40)] * 2
    bits = sum(2 * o * (-(-i // 256) * 256) + 32 * (i + o) for i, o in shapes)
    found = io.packed_bytes(folder)["stored_bits_per_weight"]
    assert found == bits / sum(i * o for i, o in shapes) > 4


GATE = "model.layers.0.mlp.gate_proj"


def flip(value):
    value.view(np.uint8).reshape(-1)[3] ^= 4
    return value


@pytest.mark.parametrize("name, change, message", [
    (f"{GATE}.bits", flip, "^tensor NAME in .*safetensors is altered"),
    (f"{GATE}.h", flip, "^tensor NAME in .*safetensors is altered"),
    ("lm_head.weight", flip, "^tensor NAME in .*safetensors is altered"),
    (f"{GATE}.g", lambda _: None, r"^missing tensor NAME \[2, 300\] in "),
    ("model.norm.weight", lambda _: None, "^missing tensor NAME "),
    ("model.layers.2.mlp.up_proj.g", lambda _: np.ones(2, np.float16), "^extra tensor NAME in "),
    (f"{GATE}.h", lambda h: h[:1], r"^tensor NAME in .* is F16 \[1, 40\], wanted F16 \[2, 40\]"),
    (f"{GATE}.g", lambda g: g.astype(jnp.bfloat16), "^tensor NAME in .* is BF16"),
    ("model.norm.weight", lambda v: v.astype(np.float32), "^tensor NAME in .* is F32"),
])
def test_altered_tensors_are_named(folder, name, change, message):
    rewrite(folder, name, change)
    assert re.search(message.replace("NAME", re.escape(name)), refused(folder))


@pytest.mark.parametrize("field, value, message", [
    ("version", "3", "has format 'rb256' version 3, this program reads 'rb256' version 2"),
    ("format", None, "safetensors has format None"),
    ("sha256", "{}", "tensor model.embed_tokens.weight in .*safetensors is altered"),
    ("sha256", None, "header of .*safetensors is damaged"),
    ("modules", "[1, 2]", "header of .*safetensors is damaged"),
    ("modules", "{}", "missing tensor model.layers.0.self_attn.k_proj.weight"),
    ("config", "{", "header of .*safetensors is damaged"),
    ("config", "{}", "architectures is .* in .*config.json and None in the header"),
])
def test_altered_headers_are_refused(folder, field, value, message):
    rewrite(folder, field, lambda _: value)
    assert re.search(message, refused(folder))


@pytest.mark.parametrize("entry", [
    {"type": "sign", "in": 40, "out": 300, "k": 1}, {"type": "sign", "in": 41, "out": 300, "k": 2},
    {"type": "sign", "in": 40}, {"type": "ternary"}, {"in": 40, "out": 300, "k": 2}, 7])
def test_a_module_that_disagrees_is_refused(folder, entry):
    rewrite(folder, "modules", lambda text: json.dumps(json.loads(text) | {GATE: entry}))
    assert re.search(r"^module model.layers.[01].mlp.gate_proj |^the header ", refused(folder))


@pytest.mark.parametrize("size", [0, 5, 300, -1, -5000])
def test_truncated_files_are_refused(folder, size):
    file = folder / io.FILE
    content = file.read_bytes()
    file.write_bytes(content[:size])
    assert f"cannot read {file}, it is missing, truncated or damaged" in refused(folder)


def test_any_flipped_bit_is_refused(folder):
    file = folder / io.FILE
    content = file.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    rng = np.random.default_rng(0)
    places = [0, 7, 8, *rng.integers(8, size, 12), *rng.integers(size, len(content), 5)]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.integers(8)
        file.write_bytes(damaged)
        refused(folder)


@pytest.mark.parametrize("change, message", [
    ({"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06 in .*config.json and 1e-05 in the header"),
    ({"version": 3}, "config.json has format 'rb256' version 3"),
    ({"quant_method": "gptq"}, "holds no packed model"),
    ({"quantization_config": None}, "holds no packed model"),
])
def test_altered_configs_are_refused(folder, change, message):
    file = folder / "config.json"
    raw = json.loads(file.read_text())
    inner = set(change) & {"version", "quant_method"}
    (raw["quantization_config"] if inner else raw).update(change)
    file.write_text(json.dumps(raw))
    assert re.search(message, refused(folder))


def test_load_model_reads_both_kinds(params, folder, tmp_path):
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    model, found, _ = io.load_model(folder)
    assert model.config == dataclasses.replace(SMALL, eos_ids=(7, 9))
    assert_same(found, params)
    dense = unflatten_dict(random(SMALL), sep="/")
    save_hf(tmp_path / "dense", SMALL, dense, dtype="bfloat16")
    model, found, tokenizer = io.load_model(tmp_path / "dense")
    assert tokenizer is None and model.config.dtype == "bfloat16"
    assert_same(found, jax.tree.map(lambda x: x.astype(jnp.bfloat16), dense))
    with pytest.raises(BadInput, match="holds no packed model"):
        io.load_packed(tmp_path / "dense")
    with pytest.raises(BadInput, match="no model folder"):
        io.load_model(tmp_path / "nowhere")


def test_save_refuses_what_it_cannot_hold(params, tmp_path):
    def changed(path, value):
        return unflatten_dict(flatten_dict(params, sep="/") | {path: value}, sep="/")

    up, node = "layers/mlp/up/kernel", params["layers"]["mlp"]["up"]["kernel"]
    latent = ResidualSign(jnp.ones(node.shape), jnp.ones((2, 2, 300)), jnp.ones((2, 2, 40)))
    for bad, message in [
        (changed(up, latent), "layers/mlp/up/kernel is a ResidualSign, wanted a packed weight"),
        (unflatten_dict(random(SMALL), sep="/"), "hold no packed weight"),
        (changed(up, node.replace(bits=node.bits[..., :-1])), r"bits uint8\[2, 2, 300, 31\]"),
        (changed(up, node.replace(g=node.g.astype(jnp.float32))), "has g float32"),
        (changed("layers/mlp/up/extra", jnp.ones(3)), "extra parameter layers/mlp/up/extra"),
        (changed("final_norm/scale", jnp.full(40, jnp.nan)), "final_norm/scale holds a"),
    ]:
        with pytest.raises(BadInput, match=message):
            io.save_packed(tmp_path / "packed", SMALL, bad)
    assert not list(tmp_path.iterdir())
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    with pytest.raises(BadInput, match="is not a model folder"):
        io.save_packed(tmp_path / "thesis", SMALL, params)


def test_saving_again_replaces_and_a_full_disk_leaves_what_was_there(params, folder, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    other = packed(SMALL, k=3)
    io.save_packed(folder, SMALL, other)
    monkeypatch.setattr("rabit_jax.models.folder.save_file", full)
    with pytest.raises(BadInput, match="cannot write model folder .*No space left"):
        io.save_packed(folder, SMALL, params)
    assert [p.name for p in folder.parent.iterdir()] == ["packed"]
    assert_same(io.load_packed(folder)[1], other)
