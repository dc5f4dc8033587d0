"""GGUF files: damaged bytes, and headers whose values were chosen to do harm.

A GGUF file holds no checksum, so what can be told is what its lengths, shapes and types tell.
"""

import struct

import numpy as np
import pytest

from rabit_jax import BadInput
from rabit_jax.formats.checkpoint import open_checkpoint
from rabit_jax.formats.gguf import gguf_folder
from rabit_jax.formats.tokenizer import load_tokenizer
from tests.fuzz.mutations import damaged, hostile

U32, F32, BOOL, STRING, ARRAY, U64, I32 = 4, 6, 7, 8, 9, 10, 5
CODES = {0: "B", 1: "b", 2: "H", 3: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", 11: "q",
         12: "d"}
WIDTH, HIDDEN, HEADS, KV, LAYERS = 32, 32, 4, 2, 1
TOKENS = ["<|endoftext|>", "<s>", "</s>", "a", "b", "c", "ab", "abc", "\u0120", "\u0120a"]
FIELDS = [
    ("general.architecture", STRING, "llama"), ("llama.context_length", U32, 64),
    ("llama.embedding_length", U32, WIDTH), ("llama.block_count", U32, LAYERS),
    ("llama.feed_forward_length", U32, HIDDEN), ("llama.attention.head_count", U32, HEADS),
    ("llama.attention.head_count_kv", U32, KV),
    ("llama.attention.layer_norm_rms_epsilon", F32, 1e-5), ("llama.rope.freq_base", F32, 5000.0),
    ("llama.rope.dimension_count", U32, 8), ("tokenizer.ggml.model", STRING, "gpt2"),
    ("tokenizer.ggml.pre", STRING, "smollm"), ("tokenizer.ggml.tokens", (ARRAY, STRING), TOKENS),
    ("tokenizer.ggml.token_type", (ARRAY, I32), [3, 3, 3, 1, 1, 1, 1, 1, 1, 1]),
    ("tokenizer.ggml.merges", (ARRAY, STRING), ["a b", "ab c", "\u0120 a"]),
    ("tokenizer.ggml.scores", (ARRAY, F32), [-float(n) for n in range(10)]),
    ("tokenizer.ggml.bos_token_id", U32, 1), ("tokenizer.ggml.eos_token_id", U32, 2),
    ("tokenizer.ggml.unknown_token_id", U32, 0), ("tokenizer.ggml.add_bos_token", BOOL, True),
    ("tokenizer.chat_template", STRING, "{{ messages }}"), ("general.alignment", U32, 32),
]
MATRICES = [("attn_q", WIDTH, WIDTH), ("attn_k", 16, WIDTH), ("attn_v", 16, WIDTH),
            ("attn_output", WIDTH, WIDTH), ("ffn_gate", HIDDEN, WIDTH), ("ffn_up", HIDDEN, WIDTH),
            ("ffn_down", WIDTH, HIDDEN)]
NAMES = {"tokenizer.ggml.model": ["gpt2", "llama", "bert"], "general.architecture": [
    "llama", "qwen2", "qwen3", "gemma3", "phi3"], "tokenizer.ggml.pre": ["qwen2", "llama-bpe", "x"]}


def infos():
    """Name, shape as stored, type and relative offset of each tensor; F32 matrices and vectors."""
    shapes = [("token_embd.weight", (WIDTH, len(TOKENS))), ("output_norm.weight", (WIDTH,)),
              ("blk.0.attn_norm.weight", (WIDTH,)), ("blk.0.ffn_norm.weight", (WIDTH,))]
    shapes += [(f"blk.0.{name}.weight", (columns, rows)) for name, rows, columns in MATRICES]
    found, offset = [], 0
    for name, shape in shapes:
        found.append([name, list(shape), 0, offset])
        offset += 4 * int(np.prod(shape))
    return found, offset


def text(value):
    data = value.encode(errors="replace")
    return struct.pack("<Q", len(data)) + data


def one(kind, value):
    """A value in a type, whatever it is; what does not fit is cut to the bits that do."""
    if kind == STRING:
        return text(str(value))
    code = CODES.get(kind, "I")
    try:
        return struct.pack("<" + code, value)
    except (struct.error, TypeError, OverflowError):
        number = int(value) if isinstance(value, int) else 0
        return (number % 2**64).to_bytes(8, "little")[: struct.calcsize("<" + code)]


def encoded(fields, tensors, size, version=3):
    out = struct.pack("<4sIQQ", b"GGUF", version, len(tensors), len(fields))
    for key, kind, value in fields:
        if isinstance(kind, tuple):
            values = value if isinstance(value, list) else [value]
            head = struct.pack("<IIQ", ARRAY, kind[1] % 2**32, len(values))
            content = head + b"".join(one(kind[1], item) for item in values)
        else:
            content = struct.pack("<I", kind % 2**32) + one(kind, value)
        out += text(key) + content
    for name, shape, kind, offset in tensors:
        out += text(name) + struct.pack("<I", len(shape))
        out += b"".join(one(U64, n) for n in shape) + one(U32, kind) + one(U64, offset)
    out += bytes(-len(out) % 32)
    rng = np.random.default_rng(0)
    return out + (rng.normal(size=size // 4) * 0.1).astype("<f4").tobytes()


def mutate(fields, tensors, rng):
    fields, tensors = [list(f) for f in fields], [[n, list(s), k, o] for n, s, k, o in tensors]
    for _ in range(int(rng.integers(1, 3))):
        kind, f, t = (int(rng.integers(n)) for n in (9, len(fields), len(tensors)))
        if kind == 0:
            fields[f][1] = int(rng.integers(14))
        elif kind in (1, 2):
            key = fields[f][0]
            fields[f][2] = hostile(rng, *NAMES.get(key, ()), *NAMES.get(key, ()))
        elif kind == 3:
            fields.pop(f) if rng.random() < 0.7 else fields.append(fields[f])
        elif kind == 4 and isinstance(fields[f][2], list):
            values = fields[f][2] = list(fields[f][2])
            values[int(rng.integers(len(values)))] = hostile(rng, "a b c", "ab", "a", 2**31)
        elif kind == 5:
            tensors[t][0] = str(hostile(rng, "blk.1.attn_q.weight", "blk..attn_q.weight",
                                        "blk.-1.attn_q.weight", "blk.0.attn_q.bias",
                                        "rope_freqs.weight", "output.weight",
                                        "blk.999999999999.attn_q.weight"))
        elif kind == 6:
            shape = tensors[t][1]
            shape[int(rng.integers(len(shape)))] = hostile(rng, 16, 64, 33, 2**40)
            tensors[t][1] = shape * int(rng.integers(1, 3))
        elif kind == 7:
            tensors[t][2] = int(rng.choice([0, 1, 2, 8, 12, 24, 28, 30, 39, 255, 2**31]))
        else:
            tensors[t][3] = hostile(rng, 1, 2, 3, 33, 2**40)
    return fields, tensors


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "model.gguf"


def read(file):
    """The config, all parameters and the tokenizer, as `load_hf` reads them."""
    folder = gguf_folder(file)
    with open_checkpoint(folder) as checkpoint:
        found = {path: checkpoint.read(path) for path in checkpoint.shapes}
        for path, array in found.items():
            assert array.shape == checkpoint.shapes[path] and np.isfinite(array).all()
        tokenizer = load_tokenizer(folder)
        if tokenizer is not None:
            assert max(tokenizer("abc a<s>")["input_ids"], default=0) >= 0
        return checkpoint.config, found


def test_the_file_that_is_damaged_is_sound(file):
    file.write_bytes(encoded(FIELDS, *infos()))
    config, found = read(file)
    assert config.vocab_size == len(TOKENS) and len(found) == 11


def test_gguf_files(file, fuzz, tmp_path):
    import shutil

    whole = encoded(FIELDS, *infos())
    head = len(encoded(FIELDS, infos()[0], 0))
    file.write_bytes(whole)
    read(file)  # imports count for no input

    def make(rng):
        tensors, size = infos()
        content = encoded(*mutate(FIELDS, tensors, rng), size) if rng.random() < 0.6 else \
            damaged(whole, rng, head if rng.random() < 0.8 else 0)
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        file.write_bytes(content)
        return len(content)

    accepted, refused = fuzz(2, make, lambda: read(file), 64,
                             again=(1039, 5664))
    assert accepted and refused > accepted / 2


def test_a_sound_file_may_have_another_order(file):
    tensors, size = infos()
    file.write_bytes(encoded(FIELDS[::-1], tensors[::-1], size))
    read(file)
    file.write_bytes(encoded(FIELDS, [*tensors, tensors[0]], size))
    with pytest.raises(BadInput, match="two tensors of the name"):
        read(file)
