"""GGUF exports: read back by `load_hf`, decoded by the `gguf` package, run by llama.cpp."""

import dataclasses
import struct
import subprocess
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rabit_jax import (
    LLAMA_LINEARS,
    BadInput,
    GroupUniformSpec,
    ResidualSignSpec,
    UniformResidualSpec,
    convert,
    dense,
    load_hf,
    pack,
)
from rabit_jax.data.tokenizer import train_tokenizer
from rabit_jax.experiments.export import main
from rabit_jax.formats import gguf_blocks
from rabit_jax.formats.exact_levels import Levels
from rabit_jax.formats.gguf_file import read_gguf
from rabit_jax.formats.gguf_writing import save_gguf
from rabit_jax.formats.packed_model import save_packed
from rabit_jax.models.config import ModelConfig, RopeScaling
from rabit_jax.models.decoder import Decoder, param_shapes
from rabit_jax.tree import is_weight, map_leaves, pytree_dataclass
from rabit_jax.types import Array
from rabit_jax.weights.leaves import WeightNode, leaf

LLAMA = ModelConfig(
    vocab_size=300, d_model=128, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=32, d_hidden=256,
    bos_id=0, eos_ids=(0,), max_position=64, tied_head=True)
GEMMA = dataclasses.replace(
    LLAMA, n_layers=3, window=8, local_layers=(True, True, False), rope_theta=1e6,
    local_rope_theta=10000.0, qk_norm=True, post_norms=True, norm_plus_one=True,
    embed_scale=128**0.5, activation="gelu_tanh", query_scalar=32, family="gemma3_text",
    norm_eps=1e-6)
FAMILIES = {
    "llama": dataclasses.replace(LLAMA, tied_head=False, rope_scaling=RopeScaling(
        "llama3", 8.0, 1.0, 4.0, 8192), rope_theta=500000.0),
    "linear": dataclasses.replace(LLAMA, rope_scaling=RopeScaling("linear", 4.0)),
    "qwen2": dataclasses.replace(LLAMA, attention_bias=True, family="qwen2", norm_eps=1e-6),
    "qwen3": dataclasses.replace(LLAMA, qk_norm=True, family="qwen3", head_dim=64),
    "gemma3": GEMMA,
    "biases": dataclasses.replace(LLAMA, attention_bias=True, o_bias=True, mlp_bias=True),
    "mistral": dataclasses.replace(LLAMA, family="mistral"),
}
TEXT = "the cat sat on the mat, and 12 more cats ran home; the end. " * 40


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], 300)


def params_of(config, seed=0):
    rng = np.random.default_rng(seed)
    flat = {path: jnp.asarray(rng.normal(size=shape) * (0.5 if path.endswith("scale") else 0.1)
                              + (path.endswith("scale")), jnp.float16).astype(jnp.float32)
            for path, shape in param_shapes(config).items()}
    return unflatten_dict(flat, sep="/")


def packed_of(config, spec, embedding=None):
    rules = [(LLAMA_LINEARS, spec), *([(r"embed/embedding", embedding)] if embedding else [])]
    return pack(convert(params_of(config), rules))


def same(found, wanted, tolerance=0.0):
    found, wanted = (flatten_dict(tree, sep="/") for tree in (found, wanted))
    assert found.keys() == wanted.keys()
    for path, value in wanted.items():
        value = np.asarray(value, np.float32)
        np.testing.assert_allclose(np.asarray(found[path]), value, rtol=0,
                                   atol=tolerance * np.abs(value).max(), err_msg=path)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_float32_file_holds_the_model_and_its_tokenizer(name, tmp_path, tokenizer):
    config, params = FAMILIES[name], params_of(FAMILIES[name])
    types = save_gguf(tmp_path / "m.gguf", config, params, tokenizer, "f32", "mine", "mit")
    assert set(types) == {"F32"}
    model, found, own = load_hf(tmp_path / "m.gguf")
    same(found, params, 1e-7 if name == "gemma3" else 0.0)  # whose norms are stored with 1 added
    differs = {f.name for f in dataclasses.fields(config)
               if getattr(model.config, f.name) != getattr(config, f.name)}
    assert differs <= {"query_scalar"} | ({"family"} if name == "mistral" else set())
    assert own(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert model.config.eos_ids == (0,) and model.config.bos_id == 0
    fields = read_gguf(tmp_path / "m.gguf").fields
    assert fields["general.license"] == "mit"
    assert fields["general.file_type"] == gguf.LlamaFileType.ALL_F32


CASES = {
    "one bit": (UniformResidualSpec(k=1, rounds=1, group=128), "gguf", {"Q1_0"}, 0.0),
    "one bit of a row": (UniformResidualSpec(k=1, rounds=1, group=512), "gguf-q1_0", {"Q1_0"}, 0.0),
    "ternary blocks": (UniformResidualSpec(k=1, rounds=1, group=256), "gguf-q4_0", {"Q4_0"}, 0.0),
    "two bits": (UniformResidualSpec(k=2, rounds=1, group=32), "gguf", {"Q4_0"}, 0.0),
    "three bits": (UniformResidualSpec(k=3, rounds=1, group=64), "gguf", {"Q4_0"}, 0.0),
    "four bits": (UniformResidualSpec(k=4, rounds=1, group=64), "gguf", {"Q8_0"}, 0.0),
    "codes of 3": (GroupUniformSpec(bits=3, group=32), "gguf", {"Q4_0", "Q4_1"}, 1e-3),
    "codes of 4": (GroupUniformSpec(bits=4, group=32), "gguf-q4_1", {"Q4_1"}, 1e-6),
    "codes of 7": (GroupUniformSpec(bits=7, group=64), "gguf", {"Q8_0"}, 1e-3),
}


@pytest.mark.parametrize("case", [
    pytest.param(case, marks=() if case in ("one bit", "codes of 4") else pytest.mark.more)
    for case in CASES
])
def test_packed_matrices_are_held_exactly(case, tmp_path, tokenizer, capsys):
    spec, kind, types, tolerance = CASES[case]
    params = packed_of(LLAMA, spec, GroupUniformSpec(bits=7, group=32))
    save_packed(tmp_path / "packed", LLAMA, params, tokenizer)
    target = tmp_path / "m.gguf"
    args = ["--model", str(tmp_path / "packed"), "--format", kind, "--output", str(target)]
    assert main(args) == 0, capsys.readouterr().err
    assert str(target) in capsys.readouterr().out
    file = read_gguf(target)
    assert {t.dtype for n, t in file.tensors.items() if "blk" in n and len(t.shape) > 1} <= types
    assert file.tensors["token_embd.weight"].dtype == "Q8_0"
    found = load_hf(target)[1]
    same(found["layers"], dense(params)["layers"], tolerance)
    same({"embed": found["embed"]}, {"embed": dense(params)["embed"]}, 1e-3)


def test_every_type_of_blocks_is_decoded_to_the_levels():
    rng = np.random.default_rng(0)
    for one in gguf_blocks.TYPES.values():
        numbers = rng.integers(one.lowest, one.highest + 1, (6, 512)).astype(np.int16)
        numbers = np.where(numbers & 1, numbers, one.highest) if one.odd else numbers
        steps = rng.uniform(0.01, 0.1, (6, 2)).astype(np.float16)
        lowest = rng.uniform(-1, 1, (6, 2)).astype(np.float16)
        levels = Levels(None if one.shifted else numbers, steps, 256,
                        numbers if one.shifted else None, lowest if one.shifted else None)
        assert one.why_not(levels) is None, one.name
        rows, kind = one.bytes_of(levels), gguf.GGMLQuantizationType[one.name]
        assert rows.shape[1] == 512 // one.size * gguf.GGML_QUANT_SIZES[kind][1]
        assert gguf.GGML_QUANT_SIZES[kind][0] == one.size
        found = gguf_blocks.decode(rows, one.name)
        if found is None:
            found = gguf.quants.dequantize(rows, kind)
        wide = np.repeat(steps.astype(np.float64), 256, axis=1) * numbers
        wide += np.repeat(lowest.astype(np.float64), 256, axis=1) if one.shifted else 0
        np.testing.assert_allclose(found, wide, atol=1e-7, err_msg=one.name)


REFUSED = {
    "row scales": (ResidualSignSpec(k=1, rounds=0), "gguf", "has a scale for each input"),
    "groups and inputs": (ResidualSignSpec(k=1, rounds=0, group=128), "gguf-q1_0",
                          "has a scale for each input"),
    "dense": (None, "gguf", "is not quantised"),
    "levels": (UniformResidualSpec(k=2, rounds=1, group=128), "gguf-q1_0", "beyond its -1 to 1"),
    "groups": (UniformResidualSpec(k=1, rounds=1, group=64), "gguf-q1_0",
               "no multiple of its blocks of 128"),
    "codes": (GroupUniformSpec(bits=8, group=48), "gguf", "fits no block of llama.cpp exactly"),
    "sum": ("trained", "gguf-q4_0", "no whole multiples of their steps"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_exact_is_refused_with_the_reason(case, tmp_path, tokenizer, capsys):
    spec, kind, reason = REFUSED[case]
    if spec is None:
        params = packed_of(LLAMA, None, GroupUniformSpec(group=32))
    elif spec == "trained":
        node = packed_of(LLAMA, GroupUniformSpec(bits=2, group=32))
        params = jax.tree.map(lambda a: a * 1.01 if a.dtype == jnp.float16 and a.min() < 0 else a,
                              node)
    else:
        params = packed_of(LLAMA, spec)
    save_packed(tmp_path / "packed", LLAMA, params, tokenizer)
    args = ["--model", str(tmp_path / "packed"), "--format", kind,
            "--output", str(tmp_path / "m.gguf")]
    assert main(args) == 2
    error = capsys.readouterr().err
    assert reason in error and "Traceback" not in error
    assert not (tmp_path / "m.gguf").exists()


def test_settings_that_llama_cpp_computes_otherwise_are_refused(tmp_path, tokenizer):
    for change, message in (
        ({"family": "mistral", "window": 8, "local_layers": (True, True)}, "unsupported window 8"),
        ({"family": "gemma2", "attention_softcap": 50.0}, "unsupported family 'gemma2'"),
        ({"rope_theta": 1e6, "query_scalar": 99.0, "family": "gemma3_text"}, "unsupported"),
    ):
        base = GEMMA if change["family"].startswith("gemma") else LLAMA
        config = dataclasses.replace(base, **change)
        with pytest.raises(BadInput, match=message):
            save_gguf(tmp_path / "m.gguf", config, params_of(config), tokenizer, "f32")
    with pytest.raises(BadInput, match="no tokenizer"):
        save_gguf(tmp_path / "m.gguf", LLAMA, params_of(LLAMA), None, "f32")
    assert not list(tmp_path.glob("*.gguf"))


def test_a_base_model_is_written_though_its_tokenizer_has_ends_of_turns(tmp_path):
    tokenizer = train_tokenizer([TEXT], 290)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<|endoftext|>"]})
    save_gguf(tmp_path / "m.gguf", LLAMA, params_of(LLAMA), tokenizer, "f32")
    assert read_gguf(tmp_path / "m.gguf").fields["tokenizer.ggml.eos_token_id"] == 0
    # llama.cpp ends at those as well, whatever the file says.
    assert load_hf(tmp_path / "m.gguf")[0].config.eos_ids[0] == 0


def test_chat_templates_keep_their_names(tmp_path):
    """As the gguf package writes and transformers reads several of them."""
    tokenizer = train_tokenizer([TEXT], 300)
    for template in ("plain", {"default": "plain", "tool_use": "tools"}, {"tool_use": "tools"}):
        tokenizer.chat_template = template
        save_gguf(tmp_path / "m.gguf", LLAMA, params_of(LLAMA), tokenizer, "f32")
        ours = read_gguf(tmp_path / "m.gguf").fields
        named = template if isinstance(template, dict) else {"default": template}
        writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "llama")
        writer.add_chat_template([{"name": n, "template": t} for n, t in named.items()])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        theirs = read_gguf(tmp_path / "theirs.gguf").fields
        assert {k: v for k, v in ours.items() if "chat_template" in k} == {
            k: v for k, v in theirs.items() if "chat_template" in k}
        assert load_hf(tmp_path / "m.gguf")[2].chat_template == template


def test_sentencepiece_is_written_where_llama_cpp_makes_its_tokens(tmp_path):
    """It puts a space before every text and behind every special token, or none anywhere."""
    pieces = ["▁", "a", "b", "▁a", "ab", "▁b", "▁▁", "\n"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *pieces]
    merges = [("▁", "a"), ("a", "b"), ("▁", "b"), ("▁", "▁")]
    replaced = normalizers.Replace(" ", "▁")
    forms = {
        "prepended": normalizers.Sequence([normalizers.Prepend("▁"), replaced]), "bare": replaced,
        "first": pre_tokenizers.Metaspace(prepend_scheme="first", split=False)}
    for name, form in forms.items():
        built = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges,
                                     unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        setattr(built, "pre_tokenizer" if name == "first" else "normalizer", form)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=built, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
        config = dataclasses.replace(LLAMA, bos_id=1, eos_ids=(2,))
        if name == "first":
            with pytest.raises(BadInput, match="unsupported tokenizer: none .* ' a leading blank'"):
                save_gguf(tmp_path / "m.gguf", config, params_of(config), tokenizer, "f32")
            continue
        save_gguf(tmp_path / "m.gguf", config, params_of(config), tokenizer, "f32")
        fields = read_gguf(tmp_path / "m.gguf").fields
        assert fields["tokenizer.ggml.add_space_prefix"] == (name == "prepended")
        own = load_hf(tmp_path / "m.gguf")[2]
        for text in ("ab", " ab", "a</s>b", "<s> a\nb é"):
            assert own(text)["input_ids"] == tokenizer(text)["input_ids"], text


def test_a_target_is_a_file_name(tmp_path, tokenizer, capsys):
    save_packed(tmp_path / "packed", LLAMA, packed_of(LLAMA, UniformResidualSpec(group=32)),
                tokenizer)
    base = ["--model", str(tmp_path / "packed"), "--format", "gguf", "--output"]
    for rest, message in (([str(tmp_path / "m")], "end it in .gguf"),
                          ([str(tmp_path / "m.gguf"), "--dtype", "float32"], "--dtype goes with")):
        assert main([*base, *rest]) == 2
        assert message in capsys.readouterr().err


def llama_cpp_logits(file: Path, text: Path, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens `[windows, context]` and log-probabilities `[windows, context - 1 - context / 2,
    vocabulary]` of llama.cpp's perplexity, which stores them in steps of 16 / 65535."""
    program = Path(".cache/llama.cpp/bin/llama-perplexity")
    if not program.exists():
        pytest.skip("llama.cpp is not built: run `python -m experiments.bench peers` once")
    out = file.with_suffix(".logits")
    subprocess.run([program, "-m", file, "-f", text, "-c", str(context), "-b", str(context), "-t",
                    "1", "-ctk", "f32", "-ctv", "f32", "-fa", "off", "--save-all-logits", out],
                   check=True, capture_output=True)
    data = out.read_bytes()
    assert data[:8] == b"_logits_"
    size, vocabulary, windows = struct.unpack("<3i", data[8:20])
    assert size == context
    tokens = np.frombuffer(data, "<i4", windows * context, 20).reshape(windows, context)
    rows = np.frombuffer(data, "<u2", offset=20 + 4 * tokens.size).reshape(
        windows, context - 1 - context // 2, -1)
    head = np.ascontiguousarray(rows[..., :4]).view("<f4")
    return tokens, head[..., 1:] + head[..., :1] * rows[..., 4 : 4 + vocabulary]


@pytree_dataclass
class Rounded(WeightNode):
    """A matrix that multiplies as llama.cpp multiplies blocks of integers: by activations that are
    rounded to 8 bits, in blocks of 32 with a 16-bit scale."""

    kernel: Array = leaf("latent", "i o")

    def dense(self):
        """The matrix."""
        return self.kernel

    def matmul(self, x):
        """`round(x) W`."""
        blocks = x.reshape(*x.shape[:-1], -1, 32)
        scale = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True) / 127
        whole = jnp.round(blocks / jnp.where(scale > 0, scale, 1))
        return (whole * scale.astype(jnp.float16)).reshape(x.shape) @ self.kernel


@pytest.mark.more
@pytest.mark.parametrize(("config", "spec", "kind"), [
    (LLAMA, None, "f32"),
    (FAMILIES["biases"], None, "f32"),
    (GEMMA, None, "f32"),
    (LLAMA, UniformResidualSpec(k=1, rounds=1, group=128), "Q1_0"),
    (LLAMA, UniformResidualSpec(k=2, rounds=1, group=32), "Q4_0"),
    (GEMMA, UniformResidualSpec(k=1, rounds=1, group=128), "Q1_0"),
], ids=["llama f32", "biases f32", "gemma f32", "llama Q1_0", "llama Q4_0", "gemma Q1_0"])
def test_llama_cpp_computes_our_logits(config, spec, kind, tmp_path, tokenizer):
    params = packed_of(config, spec) if spec else params_of(config)
    save_gguf(tmp_path / "m.gguf", config, params, tokenizer, kind)
    (tmp_path / "text.txt").write_text(TEXT)
    tokens, found = llama_cpp_logits(tmp_path / "m.gguf", tmp_path / "text.txt", 32)
    tokens, found = tokens[:8], found[:8]
    params = map_leaves(lambda _, w: Rounded(w.dense()) if is_weight(w) else w, params)
    wanted = jax.jit(Decoder(config).apply)({"params": params}, tokens)
    wanted = np.asarray(jax.nn.log_softmax(wanted)[:, 16:31], np.float64)
    seen = wanted > wanted.max(axis=-1, keepdims=True) - 10  # others are cut off in that file
    assert seen.mean() > 0.2
    off = np.abs(found - wanted)[seen] / max(1.0, wanted[seen].std())
    # An activation that lies between two integers may be rounded to either; without the rounding
    # the quantile is about .15 of Gemma's.
    assert np.quantile(off, 0.99) < (2e-3 if spec is None else 0.1), off.max()
