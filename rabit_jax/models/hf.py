"""Models as Hugging Face folders: config.json, safetensors and tokenizer, read and written."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from rabit_jax.data.tokenizer import load_tokenizer
from rabit_jax.errors import BadInput
from rabit_jax.models.config import ModelConfig, from_hf, to_hf, token_ids
from rabit_jax.models.decoder import Decoder
from rabit_jax.models.folder import (
    check_params,
    find_folder,
    first_line,
    json_files,
    read_json,
    write_folder,
)
from rabit_jax.models.names import hf_name, param_shapes, tensor_names
from rabit_jax.weights.linear import is_weight

_FLOATS = ("F64", "F32", "F16", "BF16")


def load_hf(
    path: str | Path, dtype: Any = None, shardings: Any = None
) -> tuple[Decoder, dict[str, Any], Any]:
    """Reads a model from a folder, or from the hub by its id.

    Args:
      path: folder with config.json and safetensors (one file, or shards with their index), or a
        hub id such as `org/name`.
      dtype: of the params in memory, None for float32. Matrix products run in the dtype that
        config.json names.
      shardings: tree like the params, of `jax.sharding.Sharding`; each stacked parameter goes
        from the file straight to its devices. None puts all on the default device.

    Returns:
      `(Decoder, params, tokenizer)`; torch's `[out, in]` matrices come transposed and stacked as
      `[l, in, out]`; the tokenizer is transformers', or None where the folder has none.

    Raises:
      BadInput: no such folder or hub model, an unsupported config (the message begins with
        `unsupported`), a damaged shard, or a missing, extra or misshapen tensor, by name.
    """
    folder = find_folder(path)
    config = read_config(folder)
    targets = {} if shardings is None else flatten_dict(shardings, sep="/")
    with contextlib.ExitStack() as stack:
        tensors = _open_tensors(folder, stack)
        shapes = param_shapes(config)
        _check_tensors(tensors, shapes, config, folder)
        params = {
            p: jax.device_put(_stack(tensors, p, shape, jnp.dtype(dtype or "float32")),
                              targets.get(p))
            for p, shape in shapes.items()
        }
    return Decoder(config), unflatten_dict(params, sep="/"), load_tokenizer(folder)


def save_hf(
    folder: str | Path, model: Decoder | ModelConfig, params: Any, tokenizer: Any = None,
    dtype: Any = "float32",
) -> None:
    """Writes a folder that transformers and `load_hf` load.

    It holds config.json, generation_config.json, model.safetensors and, if given, the tokenizer.
    All is written beside the target and renamed, so nothing half-written stays; a model folder of
    that name is replaced.

    Args:
      folder: where to write.
      model: the decoder or its config.
      params: its params; a weight node is saved as its `dense()` matrix.
      tokenizer: of transformers, or a plain `tokenizers.Tokenizer`.
      dtype: of the stored tensors, named in config.json too: float32, bfloat16 or float16.

    Raises:
      BadInput: params that do not fit the config, a target that is no model folder, no room.
    """
    config = dataclasses.replace(getattr(model, "config", model), dtype=jnp.dtype(dtype).name)
    leaves = flatten_dict(params, sep="/")
    check_params(leaves, param_shapes(config))
    write_folder(
        folder, _tensors(config, leaves), {"format": "pt"}, json_files(to_hf(config)), tokenizer
    )


def read_config(path: str | Path) -> ModelConfig:
    """The config of a folder or hub id, with the end tokens of generation_config.json if any.

    Raises:
      BadInput: no such model, or a config that cannot be read or is not supported.
    """
    folder = find_folder(path)
    config = from_hf(read_json(folder / "config.json"))
    generation = folder / "generation_config.json"
    eos = read_json(generation).get("eos_token_id") if generation.exists() else None
    return config if eos is None else dataclasses.replace(config, eos_ids=token_ids(eos))


def _open_tensors(folder: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Tensor name -> the open file that holds it."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.exists():
        shards = [single.name]
    elif index.exists():
        shards = sorted(set(read_json(index).get("weight_map", {}).values()))
    else:
        raise BadInput(f"{folder} holds no model.safetensors and no {index.name}")
    tensors: dict[str, Any] = {}
    for name in shards:
        try:
            file = stack.enter_context(safe_open(folder / name, framework="numpy"))
        except (OSError, SafetensorError) as error:
            raise BadInput(f"cannot read shard {folder / name} ({first_line(error)}), it is "
                           "missing or damaged: fetch it again") from error
        tensors |= {tensor: file for tensor in file.keys()}
    return tensors


def _check_tensors(
    tensors: dict[str, Any], shapes: dict[str, tuple[int, ...]], config: ModelConfig, folder: Path
) -> None:
    wanted = dict(pair for path, shape in shapes.items() for pair in tensor_names(path, shape))
    for name, shape in wanted.items():
        if name not in tensors:
            raise BadInput(f"missing tensor {name} {list(shape)} in {folder}")
        found = tensors[name].get_slice(name)
        if tuple(found.get_shape()) != shape or found.get_dtype() not in _FLOATS:
            raise BadInput(f"tensor {name} in {folder} is {found.get_dtype()} {found.get_shape()}, "
                           f"wanted {list(shape)} of float32, bfloat16 or float16")
    for name in sorted(set(tensors) - set(wanted)):
        if name.endswith("rotary_emb.inv_freq"):
            continue
        if not (name == "lm_head.weight" and config.tied_head and _same(tensors, name)):
            raise BadInput(f"extra tensor {name} in {folder}, config.json asks for none of that "
                           "name")


def _same(tensors: dict[str, Any], head: str) -> bool:
    embed = hf_name("embed/embedding")
    return np.array_equal(tensors[head].get_tensor(head), tensors[embed].get_tensor(embed))


def _stack(
    tensors: dict[str, Any], path: str, shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    """One parameter, read tensor by tensor, transposed and stacked on the host."""
    out = np.empty(shape, dtype)
    rows = out if path.startswith("layers/") else out[None]
    for row, (name, _) in zip(rows, tensor_names(path, shape), strict=True):
        value = tensors[name].get_tensor(name)
        row[...] = value.T if path.endswith("/kernel") else value
    return out


def _tensors(config: ModelConfig, leaves: dict[str, Any]) -> dict[str, np.ndarray]:
    """All tensors under their Hugging Face names, in torch's layout."""
    out = {}
    for path, leaf in leaves.items():
        stored = np.asarray(leaf.dense() if is_weight(leaf) else leaf).astype(config.dtype)
        rows = stored if path.startswith("layers/") else stored[None]
        for row, (name, _) in zip(rows, tensor_names(path, stored.shape), strict=True):
            out[name] = np.ascontiguousarray(row.T if path.endswith("/kernel") else row)
    return out
