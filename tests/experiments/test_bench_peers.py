"""The benchmark beside llama.cpp: its model files, and its rows with a stand-in for the program."""

import json

import gguf
import jax
import numpy as np
import pytest

from rabit_jax import LLAMA_LINEARS, BadInput, ResidualSignSpec, convert, pack
from rabit_jax.experiments.bench import __main__ as bench
from rabit_jax.experiments.bench import llama_cpp, shapes
from rabit_jax.formats import save_packed
from rabit_jax.models import init_params
from rabit_jax.tree import leaves

TINY = {"d_model": 256, "n_layers": 2, "n_heads": 4, "n_kv_heads": 1, "head_dim": 64,
        "d_hidden": 512, "vocab_size": 64, "max_position": 64}


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """A tiny model, and a cache of its own."""
    monkeypatch.setitem(shapes.MODELS, "tiny", TINY)
    monkeypatch.setattr(llama_cpp, "CACHE", tmp_path)


@pytest.mark.parametrize("mix", llama_cpp.MIXES)
@pytest.mark.parametrize("width, tied", [(256, False), (96, True)])
def test_files_hold_the_types_of_llama_quantize_and_finite_weights(mix, width, tied):
    config = shapes.model_config("tiny", d_model=width, tied_head=tied)
    reader = gguf.GGUFReader(llama_cpp.model_file(f"tiny-{width}", config, mix))
    kinds = {t.name: t.tensor_type for t in reader.tensors}
    assert len(kinds) == 2 * 9 + (2 if tied else 3)
    wanted = llama_cpp.MIXES[mix]["*"] if width == 256 else gguf.GGMLQuantizationType.Q4_0
    assert kinds["blk.1.ffn_up.weight"] == wanted and ("output.weight" in kinds) != tied
    for tensor in reader.tensors:
        if tensor.name.startswith("blk.0.") or "output" in tensor.name:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            assert np.isfinite(values).all() and values.shape == tuple(tensor.shape[::-1])


def test_rows_by_contract(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(llama_cpp, "programs", lambda: tmp_path)
    monkeypatch.setattr(llama_cpp, "speed", lambda file, threads, prompt, tokens, batches: [
        {"speed_tg": 10.0 * batches[0], "speed_pp": 100.0}])
    bench.run("peers --model tiny --types TQ2_0,Q2_K --batch 1,2 --context 8,16 --prefill 12 "
              "--tokens 2 --rounds 2 --dense --json".split())
    rows = json.loads(capsys.readouterr().out)["rows"]
    cases = [("decode", 1, 8), ("decode", 2, 8), ("decode", 1, 16), ("prefill", 1, 12)]
    sides = ["rabit_jax packed, f32", "rabit_jax packed", "rabit_jax packed, 8-bit activations",
             "rabit_jax packed, bf16 head", "rabit_jax dense f32", "rabit_jax dense bf16",
             "llama.cpp TQ2_0", "llama.cpp Q2_K"]
    assert [(r["phase"], r["batch"], r["context"], r["impl"]) for r in rows] == [
        (*case, side) for case in cases for side in sides]
    speeds = {(r["phase"], r["batch"], r["context"], r["impl"]): r["tokens_per_second"]
              for r in rows}
    for row in rows:
        case = row["phase"], row["batch"], row["context"]
        assert row["ratio"] == row["tokens_per_second"] / speeds[*case, "llama.cpp TQ2_0"]
        assert row["ratio_to_f32"] == row["tokens_per_second"] / speeds[*case, sides[4]]
        assert (row["bytes_per_token"] is None) == (row["phase"] == "prefill")
        assert row["best"] >= row["tokens_per_second"] > 0 and row["rounds"] == 2
    assert speeds["decode", 2, 8, "llama.cpp TQ2_0"] == 20


def test_files_of_one_model_take_the_place_of_random_weights(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(llama_cpp, "programs", lambda: tmp_path)
    monkeypatch.setattr(llama_cpp, "speed", lambda file, threads, prompt, tokens, batches: [
        {"speed_tg": 10.0, "speed_pp": 100.0}])
    header = llama_cpp._header
    monkeypatch.setattr(llama_cpp, "_header", lambda writer, c: (
        header(writer, c), writer.add_token_list([f"t{i}" for i in range(c.vocab_size)])))
    config = shapes.model_config("tiny", tied_head=True)
    params = init_params(config, jax.random.key(0))
    packed = pack(convert(params, [(LLAMA_LINEARS, ResidualSignSpec(k=3))]))
    save_packed(tmp_path / "mine", config, packed)
    file = llama_cpp.model_file("tiny", config, "Q2_K")
    bench.run(["peers", "--packed", str(tmp_path / "mine"), "--gguf", str(file), "--batch", "2",
               "--context", "8", "--prefill", "0", "--tokens", "2", "--rounds", "1", "--json"])
    ours, bytewise, theirs = json.loads(capsys.readouterr().out)["rows"]
    assert ours["impl"] == f"rabit_jax {tmp_path}/mine"
    assert bytewise["impl"] == f"rabit_jax {tmp_path}/mine, 8-bit activations"
    assert bytewise["bytes_per_token"] == ours["bytes_per_token"]
    assert theirs["impl"] == f"llama.cpp {file.name}"
    cache = 2 * config.n_layers * config.n_kv_heads * config.head_dim * 8  # numbers of 8 tokens
    assert theirs["bytes_per_token"] == (file.stat().st_size + 2 * cache) // 2
    # Three paths of signs and 16-bit scales, the tied table in float32, the cache of both rows.
    signs = 3 * sum(w.size for path, w in leaves(params) if "kernel" in path) / 8
    assert ours["bytes_per_token"] > (signs + 4 * 64 * 256 + 2 * 4 * cache) / 2
    assert ours["ratio"] == ours["tokens_per_second"] / theirs["tokens_per_second"]


@pytest.mark.parametrize("arguments, message", [
    ("--packed nowhere", "nowhere"), ("--gguf nowhere.gguf", "nowhere.gguf"),
    ("--types Q9", "--types has 'Q9': choose TQ2_0"), ("--batch 0", "--batch has '0'"),
    ("--rounds 0", "--rounds is 0"), ("--model x", "model is 'x'"),
])
def test_bad_options_are_one_sentence(arguments, message):
    with pytest.raises(BadInput, match=message):
        bench.run(["peers", *arguments.split()])


def test_lost_output_is_asked_for_again(monkeypatch, tmp_path):
    program = tmp_path / "llama-batched-bench"
    program.write_text("#!/bin/sh\n"
                       f"if [ -e {tmp_path}/asked ]; then echo '{{\"speed_tg\": 3}}'; fi\n"
                       f"touch {tmp_path}/asked\n")
    program.chmod(0o755)
    monkeypatch.setattr(llama_cpp, "programs", lambda: tmp_path)
    assert llama_cpp.speed(tmp_path / "m.gguf", 1, 8, 2, [1]) == [{"speed_tg": 3}]
    program.write_text("#!/bin/sh\necho broken >&2\nexit 3\n")
    with pytest.raises(BadInput, match="failed on .*broken"):
        llama_cpp.speed(tmp_path / "m.gguf", 1, 8, 2, [1])
