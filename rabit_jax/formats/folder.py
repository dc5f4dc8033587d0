"""Model folders: found on disk or on the hub, and written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError

from rabit_jax.atomic import replacing, write_tensors, write_text
from rabit_jax.errors import BadInput, check_regular, first_line
from rabit_jax.formats.gguf import find_gguf, gguf_folder
from rabit_jax.formats.hub import ID, fetch
from rabit_jax.formats.tokenizer import save_tokenizer
from rabit_jax.json_text import parse
from rabit_jax.locks import locked
from rabit_jax.types import Json, Tokenizer
from rabit_jax.workspaces import vanishing

if TYPE_CHECKING:
    import tokenizers
    from jax.typing import DTypeLike

FILE = "model.safetensors"
EDGE = 1 << 16  # bytes at either end of a file that tell it from another
LARGEST_JSON = 1 << 28  # bytes: the index of a model of a million tensors has 2^27


def find_folder(path: str | Path) -> Path:
    """The folder of a model.

    Args:
      path: a model folder; a run folder, for the packed model in it; or the id of a model on the
        hub, for its snapshot on this machine, which is downloaded where it is missing.

    A GGUF file, or a folder that holds one and no config.json, is read into a folder of its own in
    a cache, see `formats.gguf.gguf_folder`.

    Raises:
      BadInput: none of these, a model of the hub that does not exist or cannot be reached, a GGUF
        file that is damaged or not supported.
    """
    if not isinstance(path, str | os.PathLike):
        raise BadInput(f"a model folder is a {type(path).__name__}, wanted its path or the id of a "
                       "model on the hub")
    folder = Path(os.path.expanduser(path))
    gguf = find_gguf(folder)
    if gguf is not None:
        return gguf_folder(gguf)
    if folder.is_dir():
        return _model_in(folder)
    if folder.exists() or not ID.fullmatch(str(path)):
        what = "is a file" if folder.exists() else "does not exist"
        raise BadInput(f"no model folder {path}, it {what}: wanted a folder with config.json and "
                       "safetensors, a run folder with packed/, or the id of a model on the hub")
    return fetch(str(path))


def _model_in(folder: Path) -> Path:
    """The folder itself where it holds a model, or `packed/` of a run folder."""
    if (folder / "config.json").exists():
        return folder
    if (folder / "packed" / "config.json").exists():
        return folder / "packed"
    if is_run_folder(folder):
        raise BadInput(f"{folder} is a run folder without packed/: let the run finish, or name a "
                       "model folder in it, such as teacher")
    raise BadInput(f"{folder} is no model folder, it holds neither config.json nor packed/ of a "
                   "run: name a folder that does")


def read_json(file: Path) -> Json:
    """A JSON object from a file.

    Raises:
      BadInput: a file that cannot be read, is larger than 256 MB, is nested too deeply, or holds
        something else than an object or a number that is not finite.
    """
    try:
        check_regular(file)
        if file.exists() and file.stat().st_size > LARGEST_JSON:
            raise ValueError(f"it has more than {LARGEST_JSON} bytes")
        content = parse(file.read_text(encoding="utf-8"), finite=True)
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read {file}: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise BadInput(f"{file} holds a {type(content).__name__}, wanted a JSON object")
    return content


def json_files(
    raw: Json, generation: Json | None = None
) -> dict[str, Json]:
    """config.json and generation_config.json by name.

    Args:
      raw: content of config.json; its begin and end tokens are those of generation too.
      generation: further content of generation_config.json, such as the source model's sampling.
    """
    ids = {name: raw[name] for name in ("bos_token_id", "eos_token_id")}
    return {"config.json": dict(raw), "generation_config.json": {**(generation or {}), **ids}}


def read_generation(folder: str | Path) -> Json:
    """Content of a local model folder's generation_config.json, `{}` where it has none."""
    file = Path(folder) / "generation_config.json"
    return read_json(file) if file.exists() else {}


def write_folder(
    folder: str | Path, shards: Iterable[tuple[str, dict[str, np.ndarray]]],
    metadata: dict[str, str], files: Mapping[str, str | Json],
    tokenizer: Tokenizer | tokenizers.Tokenizer | None,
) -> Path:
    """Writes a model folder beside its target and renames it; a model folder there is replaced.

    Args:
      folder: the target.
      shards: name and tensors of each safetensors file, taken one by one as they are written.
      metadata: header of each of these.
      files: by file name, a text or JSON content.
      tokenizer: of transformers, a plain `tokenizers.Tokenizer`, or None.

    Raises:
      BadInput: the target exists and is no model folder, another process is writing it, or it
        cannot be written (a full disk).
    """
    folder = Path(folder)
    if folder.exists() and not _replaceable(folder):
        raise BadInput(f"{folder} exists and is not a model folder, choose another place to save")
    try:
        lock = folder.absolute().with_name(f".{folder.absolute().name}.lock")
        with locked(lock, folder), vanishing(lock), replacing(folder) as new:
            new.mkdir()
            for name, content in files.items():
                text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
                write_text(new / name, text)
            for name, tensors in shards:
                write_tensors(new / name, tensors, metadata)
                del tensors  # or two shards are held while the next is made
            if tokenizer is not None:
                save_tokenizer(tokenizer, new)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise BadInput(f"cannot write model folder {folder} ({reason}): free space there or choose "
                       "another place") from error
    return folder


def fingerprint(path: str | Path) -> list[tuple[str, int, str]]:
    """Name, size and digest of each file of a model folder or hub id, without its card.

    Of a large file the digest covers the first and last 64 kB: reading all of a model would take
    minutes at every start of a run.
    """
    found = []
    for file in sorted(find_folder(path).glob("*")):
        if not file.is_file() or file.name == "README.md":
            continue
        size = file.stat().st_size
        with open(file, "rb") as content:
            digest = hashlib.sha256(content.read(EDGE))
            content.seek(max(EDGE, size - EDGE))
            digest.update(content.read())
        found.append((file.name, size, digest.hexdigest()))
    return found


def is_run_folder(folder: Path) -> bool:
    """Whether a folder is that of a run, and not a model's."""
    return (folder / "config.yaml").is_file() and not (folder / "config.json").exists()


def is_model_folder(folder: Path) -> bool:
    """Whether a folder holds a config.json and safetensors."""
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def check_dtype(dtype: DTypeLike) -> None:
    """Raises BadInput for what is no floating dtype of at least 16 bits."""
    try:
        found = jnp.dtype(dtype)
        fine = jnp.issubdtype(found, jnp.floating) and found.itemsize >= 2
    except TypeError:
        fine = False
    if not fine:
        raise BadInput(f"dtype is {dtype!r}, wanted float32, bfloat16 or float16")


def finite_as(value: np.ndarray, dtype: DTypeLike, name: str) -> np.ndarray:
    """`value` in `dtype`, contiguous.

    Raises:
      BadInput: a value is not finite there; the message begins with `name`.
    """
    dtype = np.dtype(dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        out = np.ascontiguousarray(value, dtype)
    # The bits without the sign are in the order of the magnitudes, with NaN above infinity.
    kind = np.dtype(f"uint{8 * dtype.itemsize}")
    infinity = np.array(np.inf, dtype).view(kind)
    if np.max(out.view(kind) & kind.type(np.iinfo(kind).max // 2), initial=0) < infinity:
        return out
    if np.isfinite(value).all():
        raise BadInput(f"{name} holds a value beyond the range of {dtype.name}: take bfloat16 or "
                       "float32")
    raise BadInput(f"{name} holds NaN or infinity: the file is damaged or its training diverged")


def _replaceable(folder: Path) -> bool:
    return folder.is_dir() and ((folder / "config.json").exists() or not any(folder.iterdir()))
