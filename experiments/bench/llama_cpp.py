"""llama.cpp as a peer: built from the sources in a package of PyPI, fed with random weights.

Everything lies below `.cache/llama.cpp`: the archive, `src`, `build`, `bin` with the programs and
`models` with GGUF files of random blocks. The speed of a product does not depend on the values, so
blocks are drawn at random instead of quantised, which would take hours for some types.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import gguf
import numpy as np

from rabit_jax.atomic import replacing
from rabit_jax.errors import BadInput
from rabit_jax.models.config import ModelConfig
from rabit_jax.progress import progress, say
from rabit_jax.types import Json

CACHE = Path(".cache") / "llama.cpp"
PACKAGE, VERSION = "llama-cpp-python", "0.3.36"  # MIT, with llama.cpp in vendor/
# The first measures; the others make and judge quantised files of real models.
PROGRAMS = ("llama-batched-bench", "llama-bench", "llama-quantize", "llama-imatrix",
            "llama-perplexity")
OPTIONS = ("-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_CURL=OFF",
           "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF",
           "-DLLAMA_BUILD_SERVER=ON")
T = gguf.GGMLQuantizationType
# What `llama-quantize` gives the tensors of a model by the name of a type, `*` those not named;
# grouped queries of 4 and more give `attn_v` more bits. See llama-quant.cpp.
MIXES: dict[str, dict[str, T]] = {
    "TQ2_0": {"*": T.TQ2_0, "token_embd": T.Q4_K, "output": T.Q6_K},
    "Q2_K": {"*": T.Q2_K, "attn_v": T.Q4_K, "attn_output": T.Q3_K, "ffn_down": T.Q3_K,
             "output": T.Q6_K},
    "IQ2_XXS": {"*": T.IQ2_XXS, "attn_v": T.Q4_K, "token_embd": T.Q2_K, "output": T.Q5_K},
    "Q4_0": {"*": T.Q4_0, "output": T.Q6_K},
}
# Where a row is no multiple of 256; blocks of these hold 32.
NARROW = {T.Q6_K: T.Q8_0, T.Q5_K: T.Q8_0}
# Where the 16-bit scales of a block begin, of which random bits would be infinite.
SCALES = {T.TQ2_0: (64,), T.Q2_K: (80, 82), T.Q3_K: (108,), T.Q4_K: (0, 2), T.Q5_K: (0, 2),
          T.Q6_K: (208,), T.IQ2_XXS: (0,), T.Q4_0: (0,), T.Q8_0: (0,)}
# Its last lines can be lost: a thread writes them, and the program does not wait for it to end.
ATTEMPTS = 5
SCALE = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)


def programs(names: Sequence[str] = PROGRAMS) -> Path:
    """The folder of the programs, built where they are not there (about 15 minutes of one core, as
    long again for llama-server).

    Raises:
      BadInput: no cmake or compiler, no network, or a build that fails; the message names its log.
    """
    folder = CACHE / "bin"
    if all((folder / name).exists() for name in names):
        return folder
    for tool in ("cmake", "c++"):
        if not shutil.which(tool):
            raise BadInput(f"building llama.cpp wants {tool}, which is not there: install it, such "
                           "as by `apt-get install cmake g++` or `pip install cmake`")
    source, log = _sources(), CACHE / "build.log"
    say(f"building llama.cpp in {CACHE}, about 15 minutes of one core; {log} has the output")
    generator = ("-G", "Ninja") if shutil.which("ninja") else ()
    # It holds absolute paths, which another place of the checkout does not have.
    (CACHE / "build" / "CMakeCache.txt").unlink(missing_ok=True)
    with open(log, "wb") as out:
        _call(["cmake", "-S", source, "-B", CACHE / "build", *generator, *OPTIONS], out)
        _call(["cmake", "--build", CACHE / "build", "--parallel", str(os.cpu_count() or 1),
               "--target", *names], out)
    folder.mkdir(exist_ok=True)
    for name in names:
        with replacing(folder / name) as new:
            shutil.copy2(CACHE / "build" / "bin" / name, new)
    return folder


def _sources() -> Path:
    """The folder of llama.cpp's sources."""
    source = CACHE / "src"
    if (source / "CMakeLists.txt").exists():
        return source
    CACHE.mkdir(parents=True, exist_ok=True)
    archive = CACHE / f"{PACKAGE.replace('-', '_')}-{VERSION}.tar.gz"
    if not archive.exists():
        say(f"fetching {PACKAGE} {VERSION} (77 MB) from the package index")
        _call([sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
               "--no-deps", "--no-binary", PACKAGE, "--dest", CACHE, f"{PACKAGE}=={VERSION}"])
    with replacing(source) as new, tarfile.open(archive) as files:
        part = new.with_name("unpacked")
        files.extractall(part, filter="data")
        (inner,) = part.glob("*/vendor/llama.cpp")
        inner.rename(new)
    return source


def _call(command: Sequence[str | int | Path], out: IO | None = None) -> None:
    done = subprocess.run(list(map(str, command)), stdout=out, stderr=out)
    if done.returncode:
        where = f"; see {out.name}" if out else ""
        raise BadInput(f"`{' '.join(map(str, command[:6]))} ...` failed{where}")


def model_file(name: str, config: ModelConfig, mix: str) -> Path:
    """A GGUF file of a Llama of these sizes with random blocks in the types of `MIXES[mix]`."""
    file = CACHE / "models" / f"{name}-{mix}.gguf"
    if file.exists():
        return file
    tensors = list(_tensors(config, mix))
    with replacing(file) as new, progress(f"writing {file.name}", total=len(tensors)) as bar:
        writer = gguf.GGUFWriter(new, "llama")
        _header(writer, config)
        for n, (path, shape, kind) in enumerate(tensors):
            writer.add_tensor(path, _random(shape, kind, n), raw_dtype=kind)
            bar.update(n + 1)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return file


def _header(writer: gguf.GGUFWriter, c: ModelConfig) -> None:
    writer.add_block_count(c.n_layers)
    writer.add_context_length(c.max_position)
    writer.add_embedding_length(c.d_model)
    writer.add_feed_forward_length(c.d_hidden)
    writer.add_head_count(c.n_heads)
    writer.add_head_count_kv(c.n_kv_heads)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("none")


def _tensors(c: ModelConfig, mix: str) -> list[tuple[str, tuple[int, int] | tuple[int], T]]:
    """Name, shape `[o, i]` and type of every tensor."""
    queries, keys = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    found: list[tuple[str, tuple[int, int] | tuple[int], T]] = []

    def matrix(place: str, role: str, o: int, i: int) -> None:
        kind = MIXES[mix].get(role, MIXES[mix]["*"])
        if i % 256 and gguf.GGML_QUANT_SIZES[kind][0] == 256:
            kind = NARROW.get(kind, T.Q4_0)
        found.append((f"{place}{role}.weight", (o, i), kind))

    # A tied table has the type of the head.
    if c.tied_head:
        matrix("", "output", c.vocab_size, c.d_model)
        found[0] = ("token_embd.weight", *found[0][1:])
    else:
        matrix("", "token_embd", c.vocab_size, c.d_model)
        matrix("", "output", c.vocab_size, c.d_model)
    found.append(("output_norm.weight", (c.d_model,), T.F32))
    for n in range(c.n_layers):
        place = f"blk.{n}."
        for role, o, i in (("attn_q", queries, c.d_model), ("attn_k", keys, c.d_model),
                           ("attn_v", keys, c.d_model), ("attn_output", c.d_model, queries),
                           ("ffn_gate", c.d_hidden, c.d_model), ("ffn_up", c.d_hidden, c.d_model),
                           ("ffn_down", c.d_model, c.d_hidden)):
            matrix(place, role, o, i)
        found += [(f"{place}{norm}.weight", (c.d_model,), T.F32)
                  for norm in ("attn_norm", "ffn_norm")]
    return found


def _random(shape: tuple[int, ...], kind: T, seed: int) -> np.ndarray:
    """Ones for norms, else random blocks as bytes `[o, bytes of i]`."""
    if kind == T.F32:
        return np.ones(shape, np.float32)
    size, width = gguf.GGML_QUANT_SIZES[kind]
    rows, inputs = shape
    blocks = np.random.default_rng(seed).integers(
        0, 256, (rows * inputs // size, width), np.uint8)
    for start in SCALES[kind]:
        blocks[:, start : start + 2] = SCALE
    return blocks.reshape(rows, inputs // size * width)


def speed(
    file: Path, threads: int, prompt: int, tokens: int, batches: Sequence[int]
) -> list[Json]:
    """One run of `llama-batched-bench`.

    Args:
      file: the model.
      threads: to use.
      prompt: tokens before those that are generated; all rows of a batch share them.
      tokens: generated in each row.
      batches: rows that are generated at once.

    Returns:
      For each batch what the program prints as JSON: `speed_pp` and `speed_tg` are tokens per
      second of the prompt and of generation.

    Raises:
      BadInput: the program fails.
    """
    slots = prompt + max(batches) * (tokens + 1) + 512
    command = [programs() / "llama-batched-bench", "-m", file, "-t", threads, "-tb", threads,
               "-c", slots, "-b", 2048, "-ub", 512, "-npp", prompt, "-ntg", tokens,
               "-npl", ",".join(map(str, batches)), "-pps", "-kvu", "--output-format", "jsonl"]
    for _ in range(ATTEMPTS):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode == 0 and len(lines) == len(batches):
            return [json.loads(line) for line in lines]
    raise BadInput(f"llama-batched-bench failed on {file}: {done.stderr.strip()[-300:]}")
