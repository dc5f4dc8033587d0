"""Model folders: found on disk or on the hub, and written whole or not at all."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from rabit_jax.errors import BadInput

FILE = "model.safetensors"


def find_folder(path: str | Path) -> Path:
    """The folder itself, or where the hub's snapshot of that id lies (downloaded where missing).

    Raises:
      BadInput: no such folder, and no such model on the hub or no way to reach it.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", str(path)):
        raise BadInput(f"no model folder {path}")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(
            str(path), allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"],
            ignore_patterns=["consolidated*", "original/*"],
        ))
    except Exception as error:  # network, cache and hub raise many kinds
        raise BadInput(f"no model folder {path}, and the hub gave no model of that name "
                       f"({first_line(error)})") from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; BadInput where it cannot be read or is no object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read {file}: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise BadInput(f"{file} holds a {type(content).__name__}, wanted a JSON object")
    return content


def check_params(leaves: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises BadInput where params by path do not have the names and shapes of the config."""
    if odd := sorted(set(leaves) ^ set(shapes)):
        what = "extra" if odd[0] in leaves else "missing"
        raise BadInput(f"{what} parameter {odd[0]}: the params do not fit the model's config")
    for path, shape in shapes.items():
        if tuple(leaves[path].shape) != shape:
            raise BadInput(f"parameter {path} is {tuple(leaves[path].shape)}, the config wants "
                           f"{shape}")


def json_files(raw: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """config.json and generation_config.json for the content `raw` of the former, by name."""
    ids = {name: raw[name] for name in ("bos_token_id", "eos_token_id")}
    return {"config.json": dict(raw), "generation_config.json": ids}


def write_folder(
    folder: str | Path, tensors: dict[str, np.ndarray], metadata: dict[str, str],
    files: Mapping[str, Any], tokenizer: Any,
) -> Path:
    """Writes a model folder beside its target and renames it; a model folder there is replaced.

    Args:
      folder: the target.
      tensors: content of model.safetensors.
      metadata: its header.
      files: JSON content by file name.
      tokenizer: of transformers, a plain `tokenizers.Tokenizer`, or None.

    Raises:
      BadInput: the target exists and is no model folder, or it cannot be written (a full disk).
    """
    folder = Path(folder)
    if folder.exists() and not _replaceable(folder):
        raise BadInput(f"{folder} exists and is not a model folder, choose another place to save")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as place:
            new = Path(place) / "new"
            new.mkdir()
            save_file(tensors, new / FILE, metadata=metadata)
            for name, content in files.items():
                (new / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            # safetensors leaves a file that its owner alone can read.
            shutil.copymode(new / "config.json", new / FILE)
            _save_tokenizer(new, tokenizer)
            if folder.exists():
                folder.rename(Path(place) / "old")
            new.rename(folder)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"cannot write model folder {folder}: {error}") from error
    return folder


def _replaceable(folder: Path) -> bool:
    return folder.is_dir() and ((folder / "config.json").exists() or not any(folder.iterdir()))


def _save_tokenizer(folder: Path, tokenizer: Any) -> None:
    if tokenizer is None:
        return
    if not hasattr(tokenizer, "save_pretrained"):
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    tokenizer.save_pretrained(str(folder))


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
