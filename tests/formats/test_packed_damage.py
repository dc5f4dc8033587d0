"""Packed folders that were damaged: an error in one sentence, never a crash or wrong weights."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from rabit_jax.errors import BadInput
from rabit_jax.formats import packed_model as io
from rabit_jax.formats.packed_file import open_packed, text_checksum


@pytest.fixture
def folder(random_packed, small, tmp_path):
    return io.save_packed(tmp_path / "packed", small, random_packed(small, keep=("v",)))


def rewrite(folder, name, change):
    """Writes the file again with `change(value)` for a field or tensor; None removes it."""
    with safe_open(folder / io.FILE, "numpy") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    holder = header if name in ("format", "version", "config", "modules", "sha256") else tensors
    holder[name] = change(holder.get(name))
    if holder[name] is None:
        del holder[name]
    elif name in ("config", "modules"):
        # A writer that is wrong, not a damaged file: what the checksum of the text cannot tell.
        sums = json.loads(header["sha256"]) | {name: text_checksum(holder[name])}
        header["sha256"] = json.dumps(sums)
    save_file(tensors, folder / io.FILE, metadata=header)


def refused(folder):
    """The sentence with which the folder is refused."""
    with pytest.raises(BadInput) as error:
        io.load_packed(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


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
    ("version", "2", "has format 'rb256' version 2, this program reads 'rb256' version 3"),
    ("format", None, "safetensors has format None"),
    ("sha256", "{}", "header of .*safetensors is altered, the checksum of its config differs"),
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
    # Layers may differ in k: there it is the tensor that is of another shape.
    wanted = r"^module model.layers.[01].mlp.gate_proj |^the header |^tensor .*gate_proj.bits "
    assert re.search(wanted, refused(folder))


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
    ({"version": 2}, "config.json has format 'rb256' version 2"),
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


def damages(content, rng):
    """One damaged copy of a file, of a kind that disks, networks and editors make."""
    size, kind = len(content), rng.integers(7)
    header = 8 + int.from_bytes(content[:8], "little")
    # Half of them in the header, which is a small part of the file.
    at = int(rng.integers(header if rng.random() < 0.5 else size))
    n = int(rng.integers(1, 65))
    damaged = bytearray(content)
    if kind == 0:
        damaged[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        damaged[at : at + n] = rng.integers(0, 256, len(damaged[at : at + n]), np.uint8).tobytes()
    elif kind == 2:
        damaged[at : at + n] = bytes(len(damaged[at : at + n]))
    elif kind == 3:
        del damaged[at:]
    elif kind == 4:
        del damaged[at : at + n]
    elif kind == 5:
        damaged[at:at] = damaged[max(at - n, 0) : at] or b"0"
    else:
        digits = [m.start() for m in re.finditer(rb"[0-9]", content[8:header])]
        damaged[8 + digits[int(rng.integers(len(digits)))]] = 48 + int(rng.integers(10))
    return bytes(damaged)


def everything(path):
    """Config, modules and the bytes of every tensor that a file is read as."""
    with open_packed(path) as file:
        names = sorted(file.tensors.keys())
        return file.config, file.modules, {n: file.read(n).tobytes() for n in names}


def test_thousands_of_damaged_files_are_refused_or_read_right(folder):
    file = folder / io.FILE
    content, wanted, rng = file.read_bytes(), everything(file), np.random.default_rng(0)
    refusals = 0
    for _ in range(3000):
        file.write_bytes(damages(content, rng))
        try:
            assert everything(file) == wanted
        except BadInput as error:
            refusals += 1
            assert "\n" not in str(error)
    # What is read right had its padding or a digit replaced by itself.
    assert refusals > 2500
