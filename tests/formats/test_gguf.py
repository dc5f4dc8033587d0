"""GGUF files: headers, tensors, configs and tokenizers, against gguf, transformers and PyTorch."""

import itertools
import json
import struct

import gguf
import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from rabit_jax import BadInput, load_hf
from rabit_jax.formats import gguf_file
from rabit_jax.formats.checkpoint import read_config
from rabit_jax.formats.folder import find_folder
from rabit_jax.formats.gguf import half_split_rows, hf_config, hf_tensors
from rabit_jax.formats.gguf_file import GGUFFile, read_gguf, stored_bytes
from rabit_jax.formats.gguf_tokenizer import end_ids, merges_by_score, read_tokenizer
from rabit_jax.formats.hf_config import from_hf

TEXTS = (
    "Hello world", "  two spaces and   three\ttab", "12345 and 3.14 + 7,000,000", "one\n\ntwo\r\n",
    "naïve café “quotes” ﬁ e\u0301", "🙂🚀👨‍👩‍👧", "def f(x):\n    return x**2  # ok\n",
    "<|im_start|>user\nhi<|im_end|>\n", "日本語 中文", "don't I'll we've THE'S", "", " ",
    "a\u00a0b\x00", "<h1>Title</h1>   \n\n\n\n",
)
SIZES = {"vocab": 320, "width": 32, "hidden": 64, "layers": 2, "heads": 4, "kv": 2}
LLAMA3 = {"factor": 8.0, "low": 1.0, "high": 4.0, "trained": 8192}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def byte_level():
    """Tokens and merges of a small byte-level BPE, with two control tokens in front."""
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=SIZES["vocab"], special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    text = "the user said hello and  then  12 + 345 = 357 the end"
    built.train_from_iterator([text] * 3, trainer)
    merges = [" ".join(merge) for merge in json.loads(built.to_str())["model"]["merges"]]
    vocab = built.get_vocab()
    tokens = sorted(vocab, key=vocab.get)
    tokens += [f"<unused{n}>" for n in range(SIZES["vocab"] - len(tokens))]
    return tokens, merges


def write(path, arch, byte_level, types=("F32",), fields=(), head_dim=8, biases=False, seed=0,
          tied=True, rope=None, pre="gpt-2"):
    """A random model of an architecture; `types` are used in turn for the matrices."""
    path.parent.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    out = gguf.GGUFWriter(path, arch)
    s, prefix = SIZES, f"{arch}."
    numbers = {
        "context_length": 64, "embedding_length": s["width"], "block_count": s["layers"],
        "feed_forward_length": s["hidden"], "attention.head_count": s["heads"],
        "attention.head_count_kv": s["kv"], **dict(fields)}
    if head_dim != s["width"] // s["heads"] or arch == "gemma3":
        numbers |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    for key, value in numbers.items():
        if isinstance(value, str):
            out.add_string(prefix + key, value)
        elif isinstance(value, float):
            out.add_float32(prefix + key, value)
        else:
            out.add_uint32(prefix + key, value)
    out.add_float32(prefix + "attention.layer_norm_rms_epsilon", 1e-5)
    out.add_float32(prefix + "rope.freq_base", 5000.0)
    tokens, merges = byte_level
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre(pre)
    out.add_token_list(tokens)
    out.add_token_types([3 if t.startswith("<") and len(t) > 1 else 1 for t in tokens])
    out.add_token_merges(merges)
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    count = iter(range(10**6))

    def matrix(name, rows, columns):
        kind = gguf.GGMLQuantizationType[types[next(count) % len(types)]]
        value = rng.normal(size=(rows, columns)).astype(np.float32) * 0.2
        out.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)

    def vector(name, size, base=0.0):
        out.add_tensor(name, (base + rng.normal(size=size) * 0.2).astype(np.float32))

    matrix("token_embd.weight", s["vocab"], s["width"])
    q, kv = s["heads"] * head_dim, s["kv"] * head_dim
    for n in range(s["layers"]):
        b = f"blk.{n}."
        for name, rows, columns in (
            ("attn_q", q, s["width"]), ("attn_k", kv, s["width"]), ("attn_v", kv, s["width"]),
            ("attn_output", s["width"], q), ("ffn_gate", s["hidden"], s["width"]),
            ("ffn_up", s["hidden"], s["width"]), ("ffn_down", s["width"], s["hidden"]),
        ):
            matrix(f"{b}{name}.weight", rows, columns)
        for name, size in (("attn_q", q), ("attn_k", kv), ("attn_v", kv)):
            if biases:
                vector(f"{b}{name}.bias", size)
        norms = ["attn_norm", "ffn_norm"]
        norms += ["post_attention_norm", "post_ffw_norm"] if arch == "gemma3" else []
        for name in norms:
            vector(f"{b}{name}.weight", s["width"], 1.0)
        if arch in ("qwen3", "gemma3"):
            vector(f"{b}attn_q_norm.weight", head_dim, 1.0)
            vector(f"{b}attn_k_norm.weight", head_dim, 1.0)
    vector("output_norm.weight", s["width"], 1.0)
    if not tied:
        matrix("output.weight", s["vocab"], s["width"])
    if rope is not None:
        out.add_tensor("rope_freqs.weight", rope.astype(np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


CASES = {
    "llama": {"arch": "llama", "types": ("Q8_0", "F16"), "tied": False},
    "llama tied": {"arch": "llama", "types": ("Q4_1", "Q5_0"), "head_dim": 8},
    "qwen2": {"arch": "qwen2", "types": ("Q4_0", "BF16"), "biases": True},
    "qwen3": {"arch": "qwen3", "types": ("Q5_1",), "head_dim": 128},
    "gemma3": {"arch": "gemma3", "types": ("Q8_0", "F32"), "head_dim": 256,
               "fields": {"attention.sliding_window": 4}},
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case, tmp_path, byte_level):
    torch = pytest.importorskip("torch", reason="the reference runs on PyTorch")
    transformers = pytest.importorskip("transformers")
    path = write(tmp_path / "m.gguf", byte_level=byte_level, **CASES[case])
    model, params, tokenizer = load_hf(path)
    tokens = np.random.default_rng(1).integers(0, SIZES["vocab"], (2, 12))
    found = np.asarray(jax.jit(model.apply)({"params": params}, tokens))
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        str(tmp_path), gguf_file=path.name, dtype=torch.float32)
    with torch.no_grad():
        wanted = reference(torch.tensor(tokens)).logits.numpy()
    assert np.std(wanted) > 0.1
    np.testing.assert_allclose(found, wanted, atol=1e-3)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path), gguf_file=path.name)
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == theirs(text)["input_ids"], text
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_folder_of_one_gguf_file_is_a_model_and_its_cache_is_used_again(
    tmp_path, byte_level, cache
):
    write(tmp_path / "m.gguf", "llama", byte_level)
    config = read_config(tmp_path)
    assert config.eos_ids == (2, 0) and config.bos_id == 1 and config.vocab_size == 320
    folder = find_folder(tmp_path)
    stamp = (folder / "config.json").stat().st_mtime_ns
    assert find_folder(tmp_path / "m.gguf") == folder and cache in folder.parents
    assert (folder / "config.json").stat().st_mtime_ns == stamp
    write(tmp_path / "m.gguf", "llama", byte_level, fields={"rope.dimension_count": 8})
    assert find_folder(tmp_path) != folder  # another file of the same name
    write(tmp_path / "n.gguf", "llama", byte_level)
    with pytest.raises(BadInput, match=r"holds 2 GGUF files \(m.gguf, n.gguf"):
        read_config(tmp_path)


def test_a_name_may_be_as_long_as_the_disk_takes(tmp_path, byte_level, cache):
    file = tmp_path / f"{'é' * 125}.gguf"
    write(file, "llama", byte_level)
    assert find_folder(file).parent == cache / "rabit_jax" / "gguf"


def _llama3(base, size, factor, low, high, trained):
    """Divisors as llama.cpp's converter computes them, frequency by frequency."""
    found = []
    for j in range(size):
        wavelength = 2 * np.pi * base ** (j / size)
        if wavelength < trained / high:
            found.append(1.0)
        elif wavelength > trained / low:
            found.append(factor)
        else:
            smooth = (trained / wavelength - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found)


def test_llama_3_scaling_is_read_off_its_divisors(tmp_path, byte_level):
    divisors = _llama3(5000.0, 4, *LLAMA3.values())
    path = write(tmp_path / "m.gguf", "llama", byte_level, rope=divisors, fields={
        "attention.key_length": 8})
    assert 1 < divisors.max() < LLAMA3["factor"]  # no wavelength here is divided by all of it
    scaling = hf_config(read_gguf(path))["rope_scaling"]
    assert scaling["rope_type"] == "llama3"
    np.testing.assert_allclose(scaling["factor"], LLAMA3["factor"], rtol=1e-4)
    wrong = write(tmp_path / "n.gguf", "llama", byte_level, rope=divisors + [0, 1, 0, 0])
    with pytest.raises(BadInput, match="unsupported tensor rope_freqs.weight .* Llama 3.1"):
        hf_config(read_gguf(wrong))


def test_rows_of_q_go_back_to_where_hugging_face_has_them():
    heads, width = 3, 8
    ours = np.arange(heads * width)
    # llama.cpp's converter: reshape(heads, 2, d/2).swapaxes(1, 2)
    stored = ours.reshape(heads, 2, width // 2).swapaxes(1, 2).reshape(-1)
    restored = np.empty_like(stored)
    restored[half_split_rows(heads * width, heads)] = stored
    np.testing.assert_array_equal(restored, ours)


@pytest.mark.parametrize("kind", [
    k for k in gguf.GGMLQuantizationType if k in gguf.quants._type_traits or k.name in ("F16",)
], ids=lambda k: k.name)
def test_every_type_decodes_in_pieces_as_in_one(kind, tmp_path, monkeypatch):
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(kind).integers(0, 120, (6, size * 2), np.uint8)
    (tmp_path / "t").write_bytes(b"head" + data.tobytes())
    tensor = gguf_file.GGUFTensor(tmp_path / "t", "t", (6, 2 * block), int(kind), 4)
    assert stored_bytes(tensor.shape, int(kind)) == data.size
    monkeypatch.setattr(gguf_file, "PIECE_BYTES", 4 * 2 * block * 4)
    found = np.zeros(tensor.shape, np.float32)
    steps = 0
    for rows, piece in tensor.pieces():
        found[rows] = piece
        steps += 1
    assert steps == 2
    np.testing.assert_array_equal(found, gguf.quants.dequantize(data, kind).astype(np.float32))


BAD = {
    "architecture": ({"arch": "mamba"}, "unsupported GGUF architecture 'mamba'"),
    "experts": ({"fields": {"expert_count": 8}}, "mixtures of experts"),
    "window": ({"fields": {"attention.sliding_window": 16}}, "attention.sliding_window"),
    "yarn": ({"fields": {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}}, "'yarn'"),
    "partial rotary": ({"fields": {"rope.dimension_count": 4}}, "rope.dimension_count = 4"),
    "unknown field": ({"fields": {"logit_scale": 0.5}}, "llama.logit_scale = 0.5"),
    "pre": ({"pre": "tekken"}, "unsupported tokenizer.ggml.pre 'tekken'"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_supported_is_named_and_leaves_nothing(case, tmp_path, byte_level, cache):
    settings, message = BAD[case]
    path = write(tmp_path / "m.gguf", byte_level=byte_level, **{"arch": "llama", **settings})
    with pytest.raises(BadInput, match=message):
        load_hf(path)
    assert not list(cache.rglob("config.json"))


def test_a_tensor_of_no_name_or_type_is_named(tmp_path, byte_level):
    data = write(tmp_path / "m.gguf", "llama", byte_level).read_bytes()
    renamed = tmp_path / "renamed.gguf"
    renamed.write_bytes(data.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    with pytest.raises(BadInput, match="unsupported tensor blk.1.ffn_xx.weight"):
        hf_tensors(read_gguf(renamed))
    at = data.index(b"output_norm.weight") + len(b"output_norm.weight") + 4 + 8
    typed = tmp_path / "typed.gguf"
    typed.write_bytes(data[:at] + struct.pack("<I", 26) + data[at + 4:])
    with pytest.raises(BadInput, match="unsupported type I32 of tensor output_norm.weight"):
        read_gguf(typed)


def test_damaged_files_are_refused_at_once(tmp_path, byte_level):
    data = write(tmp_path / "m.gguf", "llama", byte_level).read_bytes()
    for cut in (0, 3, 4, 7, 20, 24, 40, 200, 2000, len(data) // 2, len(data) - 64):
        (tmp_path / "cut.gguf").write_bytes(data[:cut])
        with pytest.raises(BadInput, match="truncated|no GGUF file|damaged"):
            read_gguf(tmp_path / "cut.gguf")
    for at, value in ((8, 2**60), (16, 2**60), (24, 2**62)):  # tensors, fields, length of a key
        (tmp_path / "big.gguf").write_bytes(data[:at] + struct.pack("<Q", value) + data[at + 8:])
        with pytest.raises(BadInput, match="truncated or damaged"):
            read_gguf(tmp_path / "big.gguf")
    (tmp_path / "old.gguf").write_bytes(data[:4] + struct.pack("<I", 1) + data[8:])
    with pytest.raises(BadInput, match="GGUF version 1"):
        read_gguf(tmp_path / "old.gguf")


def test_digits_of_smollm_are_cut_one_by_one(byte_level):
    tokens, merges = byte_level
    fields = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
              "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges,
              "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(tokens) - 3)}
    pieces = read_tokenizer(fields, "llama").tokenize("the 345")
    assert pieces[-3:] == ["3", "4", "5"]
    fields["tokenizer.ggml.pre"] = "gpt-2"
    assert "345" in "".join(read_tokenizer(fields, "llama").tokenize("the 345")[-1:])


def test_merges_follow_the_scores():
    tokens, scores = ["a", "b", "c", "ab", "bc", "abc"], [0, 0, 0, -2.0, -1.0, -3.0]
    assert merges_by_score(tokens, scores) == [("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c")]


def test_sentencepiece_adds_a_begin_token_and_spells_bytes():
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "▁", "a", "b", "▁a",
              "▁ab", "ab"]
    fields = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens,
              "tokenizer.ggml.scores": [0.0] * 259 + [-9, -8, -7, -1, -2, -3],
              "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 6,
              "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
              "tokenizer.ggml.unknown_token_id": 0}
    tokenizer = read_tokenizer(fields, "llama")
    ids = tokenizer("ab é")["input_ids"]
    assert [tokens[i] for i in ids] == ["<s>", "▁ab", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab é"
    plain = read_tokenizer({**fields, "tokenizer.ggml.add_bos_token": False,
                            "tokenizer.ggml.add_eos_token": True}, "llama")
    assert [tokens[i] for i in plain("ab")["input_ids"]] == ["▁ab", "</s>"]
    assert end_ids(fields) == [2]


class LlamaCpp:
    """llama.cpp's SentencePiece, symbol by symbol (`llm_tokenizer_spm_session`), by the tokens'
    scores alone."""

    def __init__(self, tokens, scores, whole, prefix):
        self.scores = dict(zip(tokens, scores, strict=True))
        self.whole, self.prefix = whole, prefix

    def __call__(self, text):
        found, rest, behind_special = [], text, True
        while rest:
            starts = [(rest.index(t), t) for t in self.whole if t in rest]
            at, token = min(starts, default=(len(rest), ""))
            if rest[:at]:
                blank = " " if self.prefix and behind_special else ""
                found += self.piece((blank + rest[:at]).replace(" ", "▁"))
            if token:
                found.append(token)
            behind_special, rest = True, rest[at + len(token):]
        return found

    def piece(self, text):
        symbols = list(text)
        while True:
            joined = [a + b for a, b in itertools.pairwise(symbols)]
            pairs = [(-self.scores[t], n) for n, t in enumerate(joined) if t in self.scores]
            if not pairs:
                break
            n = min(pairs)[1]
            symbols[n : n + 2] = [symbols[n] + symbols[n + 1]]
        return [t for s in symbols
                for t in ([s] if s in self.scores else [f"<0x{b:02X}>" for b in s.encode()])]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_is_that_of_llama_cpp(prefix):
    pieces = ["▁", "a", "b", "▁a", "▁ab", "ab", "▁▁", "\n", "h", "i", "hi", "▁hi", "▁▁a", "ba"]
    whole = ["<s>", "</s>", "<|user|>", "<|im_end|>"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *pieces, *whole[2:]]
    scores = [0.0] * 259 + [-(3 + n * 7 % 13 + n / 100) for n in range(len(pieces))] + [0.0] * 2
    kinds = [2, 3, 3] + [6] * 256 + [1] * len(pieces) + [4, 1]  # llama.cpp knows <|im_end|> by text
    fields = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens,
              "tokenizer.ggml.scores": scores, "tokenizer.ggml.token_type": kinds,
              "tokenizer.ggml.add_space_prefix": prefix}  # ids 0, 1, 2 are the default
    found = read_tokenizer(fields, "llama")
    reference = LlamaCpp(tokens, scores, whole, prefix)
    parts = [" ", "  ", "a", "b", "ab", "hi", "\n", "é", *whole]
    rng = np.random.default_rng(0)
    texts = ["", " ab", "<s> ab", "a</s>ab", "hi<|user|>hi\nab", "a<s></s>b"]
    texts += ["".join(rng.choice(parts, 12)) for _ in range(200)]
    for text in texts:
        ids = found(text)["input_ids"]
        assert [tokens[i] for i in ids] == ["<s>", *reference(text)], text
    assert found.bos_token == "<s>" and found.unk_token == "<unk>"
    assert end_ids(fields) == [2, tokens.index("<|im_end|>")]
    assert found.decode(found("ab é")["input_ids"], skip_special_tokens=True) == "ab é"


@pytest.mark.parametrize("pre", ["default", None])
def test_a_file_without_a_way_of_cutting_gets_that_of_llama_cpp(byte_level, pre):
    tokens, merges = byte_level
    fields = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens,
              "tokenizer.ggml.merges": merges, **({"tokenizer.ggml.pre": pre} if pre else {})}
    found = read_tokenizer(fields, "llama").backend_tokenizer.pre_tokenizer
    # Cut by hand with llama.cpp's four patterns; llama-server made tokens within these pieces.
    for text, pieces in (
        ("hello, (and) then 12345 + 345", ["hello", ",", " ", "(", "and", ")", " then", " ", "123",
                                           "45", " ", "+", " ", "345"]),
        ("don't 'so' -- $100 ~^ a<b>=c", ["don", "'", "t", " ", "'", "so", "'", " ", "--", " ", "$",
                                          "100", " ", "~^", " a", "<", "b", ">=", "c"]),
    ):
        assert [p.replace("Ġ", " ") for p, _ in found.pre_tokenize_str(text)] == pieces


def test_what_metadata_leave_out_is_what_llama_cpp_takes(tmp_path, byte_level):
    def config(arch, without=(), tensors=(), **fields):
        file = read_gguf(write(tmp_path / "m.gguf", arch, byte_level))
        kept = {k: v for k, v in file.fields.items() if k.removeprefix(f"{arch}.") not in without}
        more = {name: file.tensors["output_norm.weight"] for name in tensors}
        return hf_config(GGUFFile(file.path, kept | {f"{arch}.{k.replace('__', '.')}": v
                                                     for k, v in fields.items()},
                                  file.tensors | more))

    sizes = ("attention.head_count_kv", "attention.key_length", "attention.value_length")
    for arch in ("llama", "qwen2", "qwen3", "gemma3"):
        found = from_hf(config(arch, sizes))
        assert found.n_kv_heads == SIZES["heads"]
        assert found.head_dim == SIZES["width"] // SIZES["heads"]
    assert from_hf(config("gemma3", ["attention.sliding_window"])).window is None
    with pytest.raises(BadInput, match="no llama.attention.layer_norm_rms_epsilon"):
        config("llama", ["attention.layer_norm_rms_epsilon"])
    # A factor without a type is linear; the old name of the factor counts where the new one lacks.
    linear = {"rope_type": "linear", "factor": 4.0}
    for fields, wanted in (
        ({"rope__scaling__factor": 4.0}, linear), ({"rope__scale_linear": 4.0}, linear),
        ({"rope__scaling__factor": 4.0, "rope__scale_linear": 2.0}, linear),
        ({"rope__scaling__factor": 4.0, "rope__scaling__type": "none"}, None),
        ({"rope__scaling__type": "yarn"}, None), ({"rope__scaling__factor": 0.0}, None),
    ):
        assert config("llama", **fields)["rope_scaling"] == wanted, fields
    with pytest.raises(BadInput, match="'linear' with factor 4 .* without any other"):
        config("llama", tensors=["rope_freqs.weight"], rope__scaling__factor=4.0)
    assert config("llama", tensors=["blk.0.ffn_up.bias"])["mlp_bias"]


def test_a_split_model_is_read_from_any_of_its_parts(tmp_path, byte_level, monkeypatch):
    whole = write(tmp_path / "whole" / "m.gguf", "llama", byte_level)
    folder = tmp_path / "split"
    folder.mkdir()
    plain = gguf.GGUFWriter
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", lambda path, arch: plain(
            path, arch, split_max_tensors=7))
        write(folder / "m.gguf", "llama", byte_level)
    parts = sorted(folder.iterdir())
    assert [part.name for part in parts] == [f"m-{n:05d}-of-00003.gguf" for n in (1, 2, 3)]
    # As the hub's cache has them: links whose targets have other names.
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for n, part in enumerate(parts):
        part.rename(blobs / str(n))
        part.symlink_to(blobs / str(n))
    wanted = load_hf(whole)
    for path in (parts[0], parts[2], folder):
        model, params, tokenizer = load_hf(path)
        jax.tree.map(np.testing.assert_array_equal, params, wanted[1])
        assert model.config == wanted[0].config
        assert tokenizer("the end")["input_ids"] == wanted[2]("the end")["input_ids"]
    parts[1].unlink()
    parts[1].symlink_to(blobs / "2")
    with pytest.raises(BadInput, match="m-00002-of-00003.gguf is not part 2 of the 3 parts"):
        read_gguf(parts[0])
    parts[1].unlink()
    with pytest.raises(BadInput, match="cannot read .*m-00002-of-00003.gguf"):
        read_gguf(parts[0])
    parts[0].rename(folder / "first.gguf")
    with pytest.raises(BadInput, match="call it NAME-00001-of-00003.gguf"):
        read_gguf(folder / "first.gguf")
    with pytest.raises(BadInput, match="m-00001-of-00003.gguf is not beside it"):
        find_folder(parts[2])
