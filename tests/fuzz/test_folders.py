"""Hugging Face folders in shards, packed folders: config.json, index, tokenizer, safetensors."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from rabit_jax.formats import hf, packed_model
from rabit_jax.formats.checkpoint import open_checkpoint
from rabit_jax.formats.hf_config import from_hf
from rabit_jax.formats.packed_file import metadata, open_packed
from rabit_jax.formats.tokenizer import read_tokenizer
from tests.fuzz.mutations import damaged, hostile, json_bytes, mutated

PATHS = ("../model-00001-of-00002.safetensors", "/etc/passwd", "..",
         "model-00002-of-00002.safetensors", "./model-00001-of-00002.safetensors",
         "link.safetensors")
TENSORS = ("model.norm.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight",
           "model.layers.-1.mlp.up_proj.weight", "I8", "F8_E4M3", "BF16", "F64")
MODULES = ("sign", "uniform", "low_rank", "codebook", "sum", "scaled", "round_to_nearest", 40, 300)


def header_of(content):
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def with_header(header, data, rng):
    text = json_bytes(header, rng) if rng.random() < 0.5 else json.dumps(header).encode(
        errors="replace")
    size = len(text) if rng.random() < 0.95 else int(rng.integers(2**62))
    return size.to_bytes(8, "little") + text + data


def restored(folder, originals):
    """Put back every file that the input before this one has changed."""
    for file, content in originals.items():
        (folder / file).write_bytes(content)


@pytest.fixture
def shards(tmp_path, config, words):
    """A dense model of one layer in two shards, with its tokenizer; two entries of it escape."""
    config = dataclasses.replace(config, n_layers=1, vocab_size=7)
    rng = np.random.default_rng(0)
    from rabit_jax.models.decoder import Decoder, param_shapes

    params = unflatten_dict({p: rng.normal(size=s).astype(np.float32)
                             for p, s in param_shapes(config).items()}, sep="/")
    folder = tmp_path / "model"
    hf.save_hf(folder, Decoder(config), params, words("a", "b", "<s>", "</s>", "<unk>"),
               shard_bytes=10_000)
    outside = tmp_path / "model-00001-of-00002.safetensors"
    outside.write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    (folder / "link.safetensors").symlink_to("/dev/zero")
    return folder


def contents(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir() if not f.is_symlink()}


def test_folders_of_shards(shards, fuzz):
    originals = contents(shards)
    weights = sorted(n for n in originals if n.endswith(".safetensors"))
    assert len(weights) > 1
    texts = ["config.json", "model.safetensors.index.json", "generation_config.json",
             "tokenizer.json", "tokenizer_config.json"]
    changed = {}

    def make(rng):
        restored(shards, {n: originals[n] for n in changed})
        changed.clear()
        if rng.random() < 0.7:
            name = texts[int(rng.integers(len(texts)))]
            tree = json.loads(originals[name])
            changed[name] = json_bytes(mutated(tree, rng, *PATHS, *TENSORS), rng)
        else:
            name = weights[int(rng.integers(len(weights)))]
            header, data = header_of(originals[name])
            changed[name] = damaged(originals[name], rng, 2000) if rng.random() < 0.4 else \
                with_header(mutated(header, rng, *TENSORS, [0, 4], [32, 32]), data, rng)
        restored(shards, changed)
        return sum(map(len, originals.values()))

    def use():
        with open_checkpoint(shards) as checkpoint:
            read_tokenizer(shards, checkpoint.config)
            for path, shape in checkpoint.shapes.items():
                array = checkpoint.read(path)
                assert array.shape == shape and np.isfinite(array).all()
            for stored in checkpoint.tensors.values():
                assert stored.file.parent == shards

    use()  # imports count for no input
    accepted, refused = fuzz(3, make, use, 64, again=(3573,))
    assert accepted and refused


def test_what_config_json_may_say(fuzz):
    """Where it is read, every field that has an effect has the one that it names."""
    from tests.formats.test_hostile import BASE, GEMMA

    held = {}

    def make(rng):
        held["raw"] = mutated(GEMMA if rng.random() < 0.5 else BASE, rng)
        return 1000

    def use():
        config = from_hf(held["raw"])
        # What is left out has the default of transformers.
        assert config.vocab_size == held["raw"].get("vocab_size", config.vocab_size)
        assert config.d_model == held["raw"].get("hidden_size", config.d_model)

    accepted, refused = fuzz(4, make, use, 64)
    assert accepted and refused


@pytest.fixture
def packed(tmp_path, small, random_packed):
    config = dataclasses.replace(small, n_layers=1, d_hidden=40)
    return packed_model.save_packed(tmp_path / "packed", config, random_packed(config))


def everything(path):
    """Config, modules and the bytes of every tensor that a file is read as."""
    with open_packed(path) as file:
        names = sorted(file.tensors.keys())
        return file.config, file.modules, {n: file.read(n).tobytes() for n in names}


def test_packed_files_with_damage(packed, fuzz):
    """Whatever is not refused is read as it was written, to the bit."""
    file = packed / packed_model.FILE
    whole, wanted = file.read_bytes(), everything(file)
    head = 8 + int.from_bytes(whole[:8], "little")

    def make(rng):
        content = damaged(whole, rng, head)
        if rng.random() < 0.3:
            at = [8 + m.start() for m in re.finditer(rb"[0-9]", whole[8:head])]
            content = bytearray(whole)
            content[at[int(rng.integers(len(at)))]] = 48 + int(rng.integers(10))
        file.write_bytes(content)
        return len(whole)

    def use():
        assert everything(file) == wanted

    accepted, refused = fuzz(5, make, use, 64)
    assert refused > 5 * accepted


def test_packed_folders_that_mean_harm(packed, fuzz):
    """Headers that were made on purpose, with the right checksums."""
    originals = contents(packed)
    file = packed / packed_model.FILE
    tensors = load_file(file)
    with safe_open(file, "numpy") as opened:
        header = opened.metadata()
    config, modules = json.loads(header["config"]), json.loads(header["modules"])
    changed = {}

    def make(rng):
        restored(packed, {n: originals[n] for n in changed})
        changed.clear()
        kind = int(rng.integers(4))
        if kind == 0:
            raw = mutated(json.loads(originals["config.json"]), rng)
            changed["config.json"] = json_bytes(raw, rng)
            own = {k: v for k, v in raw.items() if k in config}
            save_file(tensors, file, metadata(own, modules, tensors))
        elif kind == 1:
            save_file(tensors, file, metadata(config, mutated(modules, rng, *MODULES), tensors))
        elif kind == 2:
            odd = {**header, str(rng.choice(list(header))): str(hostile(rng)).encode(
                errors="replace").decode()}
            save_file(tensors, file, odd)
        else:
            odd = dict(tensors)
            name = str(rng.choice(list(odd)))
            odd[name] = np.zeros(rng.integers(0, 4, int(rng.integers(4))), rng.choice(
                ["float16", "uint8", "float32", "int64"]))
            save_file(odd, file, metadata(config, modules, odd))
        changed[file.name] = file.read_bytes() if kind else b""
        restored(packed, {n: c for n, c in changed.items() if c})
        changed[file.name] = b""
        return sum(map(len, originals.values()))

    def use():
        model, params, _ = packed_model.load_packed(packed)
        arrays = jax.tree.leaves(params)
        assert sum(a.nbytes for a in arrays) <= 4 * sum(map(len, originals.values()))

    use()
    accepted, refused = fuzz(6, make, use, 64)
    assert refused
    shutil.rmtree(packed)
