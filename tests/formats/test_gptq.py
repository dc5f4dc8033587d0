"""GPTQ folders, against an own PyTorch reading of the layout and transformers' dense model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file

from rabit_jax import (
    LLAMA_LINEARS,
    GroupUniformSpec,
    ResidualSignSpec,
    UniformResidualSpec,
    convert,
    dense,
    pack,
)
from rabit_jax.experiments.export import main
from rabit_jax.formats import gptq
from rabit_jax.formats.families import hf_name
from rabit_jax.formats.packed_model import save_packed
from rabit_jax.models.config import ModelConfig
from rabit_jax.models.decoder import Decoder, param_shapes

CONFIG = ModelConfig(
    vocab_size=61, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, d_hidden=96,
    bos_id=1, eos_ids=(2,), max_position=32)


def packed_of(spec):
    rng = np.random.default_rng(0)
    flat = {path: jnp.asarray(rng.normal(size=shape) * 0.2, jnp.float16).astype(jnp.float32)
            for path, shape in param_shapes(CONFIG).items()}
    return pack(convert(unflatten_dict(flat, sep="/"), [(LLAMA_LINEARS, spec)]))


def unpacked(words, bits, axis):
    """Numbers of `bits` bits of int32 words along an axis, by the shifts of AutoGPTQ's
    qlinear_torch: for 3 bits ten numbers and the ends of two that lie across words."""
    words = np.moveaxis(words.astype(np.int64) & 0xFFFFFFFF, axis, 0)
    if bits != 3:
        parts = [words >> shift & (1 << bits) - 1 for shift in range(0, 32, bits)]
        found = np.stack(parts, axis=1).reshape(-1, *words.shape[1:])
        return np.moveaxis(found, 0, axis)
    a, b, c = words[0::3], words[1::3], words[2::3]
    first = [a >> 3 * n & 7 for n in range(10)]
    tenth = a >> 30 & 3 | (b & 1) << 2
    second = [b >> 3 * n + 1 & 7 for n in range(10)]
    twenty_first = b >> 31 & 1 | (c & 3) << 1
    third = [c >> 3 * n + 2 & 7 for n in range(10)]
    found = np.stack([*first, tenth, *second, twenty_first, *third], axis=1)
    return np.moveaxis(found.reshape(-1, *words.shape[1:]), 0, axis)


def matrix(tensors, name, config):
    """`W_hat`, float64 `[i, o]`, of a linear layer of a folder."""
    bits, more = config["bits"], int(config["checkpoint_format"] == "gptq")
    qweight, qzeros, scales, g_idx = (
        tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx"))
    assert qweight.dtype == qzeros.dtype == g_idx.dtype == np.int32
    assert scales.dtype == np.float16
    codes, zeros = unpacked(qweight, bits, 0), unpacked(qzeros, bits, 1) + more
    return scales.astype(np.float64)[g_idx] * (codes - zeros[g_idx])


def exported(params, folder, capsys, *more):
    save_packed(folder / "packed", CONFIG, params)
    args = ["--model", str(folder / "packed"), "--format", "gptq", "--output",
            str(folder / "gptq"), *more]
    code = main(args)
    return code, capsys.readouterr()


CASES = {  # bits, group, symmetric, checkpoint_format, tolerance
    "one bit": (UniformResidualSpec(k=1, group=32, rounds=1), (2, 32, True, "gptq"), 0.0),
    "two bits": (UniformResidualSpec(k=2, group=32, rounds=1), (3, 32, True, "gptq"), 0.0),
    "three bits": (UniformResidualSpec(k=3, group=96, rounds=1), (4, -1, True, "gptq"), 0.0),
    # Some groups of 16 have no negative weight, so their zero point is 0.
    "codes of 2": (GroupUniformSpec(bits=2, group=16), (2, 16, False, "gptq_v2"), 1e-3),
    "codes of 4": (GroupUniformSpec(bits=4, group=32), (4, 32, False, "gptq_v2"), 1e-3),
    "codes of 8": (GroupUniformSpec(bits=8, group=32), (8, 32, False, "gptq_v2"), 1e-3),
}


@pytest.mark.parametrize("case", [
    pytest.param(case, marks=() if case in ("two bits", "codes of 2") else pytest.mark.more)
    for case in CASES
])
def test_the_matrices_are_ours(case, tmp_path, capsys):
    spec, (bits, group, symmetric, version), tolerance = CASES[case]
    params = packed_of(spec)
    code, said = exported(params, tmp_path, capsys)
    assert code == 0, said.err
    assert f"GPTQ folder of {bits} bits, groups of {group}" in said.out
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["desc_act"]) == ("gptq", False)
    assert (config["bits"], config["group_size"], config["sym"], config["checkpoint_format"]) == (
        bits, group, symmetric, version)
    tensors = load_file(tmp_path / "gptq" / "model.safetensors")
    card = (tmp_path / "gptq" / "README.md").read_text()
    assert f"{bits} bits" in card and "gptqmodel" in card
    wanted = flatten_dict(dense(params), sep="/")
    linears = [path for path in wanted if "/attn/" in path or "/mlp/" in path]
    assert len(tensors) == 4 * len(linears) * CONFIG.n_layers + 2 * CONFIG.n_layers + 3
    for path in linears:
        for layer in range(CONFIG.n_layers):
            found = matrix(tensors, hf_name(path, layer).removesuffix(".weight"), config)
            value = np.asarray(wanted[path][layer], np.float64)
            np.testing.assert_allclose(found, value, rtol=0, atol=tolerance * np.abs(value).max())


@pytest.mark.parametrize("k, bits", [(1, 4), (2, 4), (2, 8)])
def test_more_bits_hold_the_same_matrices(k, bits, tmp_path, capsys):
    params = packed_of(UniformResidualSpec(k=k, group=32, rounds=1))
    code, said = exported(params, tmp_path, capsys, "--bits", str(bits))
    assert code == 0, said.err
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["sym"], config["checkpoint_format"]) == (bits, True, "gptq")
    assert "vllm serve" in (tmp_path / "gptq" / "README.md").read_text()
    tensors = load_file(tmp_path / "gptq" / "model.safetensors")
    for path in ("layers/attn/q/kernel", "layers/mlp/down/kernel"):
        value = np.asarray(flatten_dict(dense(params), sep="/")[path][1], np.float64)
        name = hf_name(path, 1).removesuffix(".weight")
        np.testing.assert_array_equal(matrix(tensors, name, config), value)


def test_bits_that_do_not_hold_the_levels_are_refused(tmp_path, capsys):
    params = packed_of(UniformResidualSpec(k=2, group=32, rounds=1))
    code, said = exported(params, tmp_path, capsys, "--bits", "2")
    assert code == 2 and "2 bits do not hold them" in said.err
    assert not (tmp_path / "gptq").exists()


def test_a_stream_of_three_bits_crosses_words():
    codes = np.random.default_rng(0).integers(0, 8, (64, 5))
    np.testing.assert_array_equal(unpacked(gptq.stream(codes, 3), 3, 0), codes)


@pytest.mark.more
def test_transformers_computes_our_logits_from_the_folder(tmp_path, capsys):
    torch = pytest.importorskip("torch", reason="the reference runs on PyTorch")
    transformers = pytest.importorskip("transformers", reason="the reference is transformers")
    params = packed_of(UniformResidualSpec(k=2, group=32))
    code, said = exported(params, tmp_path, capsys, "--dtype", "float32")
    assert code == 0, said.err
    folder = tmp_path / "gptq"
    tensors = load_file(folder / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    config = transformers.quantizers.AutoQuantizationConfig.from_dict(
        raw.pop("quantization_config"))  # transformers knows all of its fields
    assert (config.bits, config.group_size, config.sym) == (3, 32, True)
    state = {name: torch.tensor(value) for name, value in tensors.items()
             if name.endswith((".weight", ".bias"))}
    for name in {n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")}:
        own = matrix(tensors, name, config.to_dict() | {"checkpoint_format": "gptq"})
        state[f"{name}.weight"] = torch.tensor(own.T.astype(np.float32))
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(raw))
    reference.load_state_dict(state)
    tokens = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (2, 12))
    with torch.no_grad():
        wanted = reference(torch.tensor(tokens)).logits.numpy()
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), dense(params))
    found = jax.jit(Decoder(CONFIG).apply)({"params": params}, tokens)
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize(("spec", "reason"), [
    (ResidualSignSpec(k=2, rounds=0), "has a scale for each input"),
    (UniformResidualSpec(k=2, group=40, rounds=0), "no multiple of its groups of 40"),
    (UniformResidualSpec(k=2, group=64, rounds=0), "no multiple of its groups of 64"),
])
def test_what_is_not_exact_is_refused_with_the_reason(spec, reason, tmp_path, capsys):
    code, said = exported(packed_of(spec), tmp_path, capsys)
    assert code == 2 and reason in said.err and "Traceback" not in said.err
    assert not (tmp_path / "gptq").exists()
