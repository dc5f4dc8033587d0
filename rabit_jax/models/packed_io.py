"""Packed models as folders: written, read and measured; the file is that of `packed_format`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from rabit_jax.data.tokenizer import load_tokenizer
from rabit_jax.errors import BadInput
from rabit_jax.models.config import ModelConfig, from_hf, to_hf, token_ids
from rabit_jax.models.decoder import Decoder
from rabit_jax.models.folder import (
    FILE,
    check_params,
    find_folder,
    json_files,
    read_json,
    write_folder,
)
from rabit_jax.models.hf import load_hf
from rabit_jax.models.names import param_shapes, tensor_names
from rabit_jax.models.packed_format import (
    FORMAT,
    METHOD,
    PARTS,
    VERSION,
    PackedFile,
    check_tensors,
    check_version,
    metadata,
    module_names,
    module_table,
    nearest_16bit,
    open_packed,
    packed_kernels,
    part_shapes,
)
from rabit_jax.weights.linear import is_weight
from rabit_jax.weights.packed import PackedSign


def save_packed(
    folder: str | Path, config: ModelConfig, params: Any, tokenizer: Any = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a packed model: config.json, model.safetensors, generation_config.json, tokenizer.

    All is written beside the target and renamed, so nothing half-written stays; a model folder of
    that name is replaced. What is not packed (embedding, norms, head, biases) is stored in float16
    or bfloat16, whichever is closer to it.

    Args:
      folder: where to write.
      config: of the decoder.
      params: its params, some or all kernels as `PackedSign`; see `rabit_jax.pack`.
      tokenizer: of transformers, or a plain `tokenizers.Tokenizer`.
      extra: JSON fields to keep beside the format in `quantization_config` of config.json, such
        as the spec that the weights were trained with.

    Returns:
      The folder.

    Raises:
      BadInput: params that do not fit the config, hold no packed or an unpacked weight node, or a
        value that is not finite; a target that is no model folder; no room.

    Example:
      >>> folder = save_packed("runs/mine/packed", model.config, pack(params), tokenizer)
      >>> model, params, tokenizer = load_packed(folder)
    """
    leaves, shapes = flatten_dict(params, sep="/"), param_shapes(config)
    check_params(leaves, shapes)
    ks = _paths_packed(leaves)
    tensors = _tensors(leaves)
    raw = to_hf(config)
    header = metadata(raw, module_table(shapes, ks), tensors)
    counts = sorted(set(ks.values()))
    quantization = {**(extra or {}), "quant_method": METHOD, "format": FORMAT, "version": VERSION,
                    "k": counts[0] if len(counts) == 1 else counts}
    files = json_files(raw)
    files["config.json"]["quantization_config"] = quantization
    return write_folder(folder, tensors, header, files, tokenizer)


def load_packed(folder: str | Path) -> tuple[Decoder, dict[str, Any], Any]:
    """Reads and verifies a packed model.

    Args:
      folder: written by `save_packed`, or the id of such a model on the hub.

    Returns:
      `(Decoder, params, tokenizer)` as `load_hf` gives them, but packed kernels are `PackedSign`
      nodes stacked over layers, and the rest stays in the 16-bit dtype of the file.

    Raises:
      BadInput: no such folder or no packed model in it, a truncated or altered file, an unknown
        version, a missing, extra or misshapen tensor; each by name.
    """
    folder = find_folder(folder)
    raw = read_json(folder / "config.json")
    if not is_packed(raw):
        raise BadInput(f"{folder} holds no packed model: the quantization_config of config.json "
                       f"names no quant_method {METHOD!r}")
    check_version(raw.pop("quantization_config"), f"{folder / 'config.json'}")
    config = from_hf(raw)
    with open_packed(folder / FILE) as file:
        _check_config(file, raw, folder)
        shapes = param_shapes(config)
        ks = packed_kernels(file, shapes)
        check_tensors(file, shapes, ks)
        params = {path: _read(file, path, shape, path in ks) for path, shape in shapes.items()}
    model = Decoder(dataclasses.replace(config, eos_ids=_eos_ids(folder, config)))
    return model, unflatten_dict(params, sep="/"), load_tokenizer(folder)


def load_model(folder: str | Path) -> tuple[Decoder, dict[str, Any], Any]:
    """Reads a model to run it, packed or dense as its config.json says.

    Dense params come in the dtype that config.json names for the matrix products, so that both
    kinds hold in memory what they would hold when deployed.

    Args:
      folder: of a model, or its hub id.

    Returns:
      `(Decoder, params, tokenizer)`; see `load_packed` and `load_hf` for them and for what raises.
    """
    folder = find_folder(folder)
    raw = read_json(folder / "config.json")
    return load_packed(folder) if is_packed(raw) else load_hf(folder, dtype=from_hf(raw).dtype)


def is_packed(raw: Mapping[str, Any]) -> bool:
    """Whether a parsed config.json is that of a packed model."""
    quantization = raw.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == METHOD


def packed_bytes(folder: str | Path) -> dict[str, float]:
    """Sizes of a packed model, counted from its file.

    Returns:
      `linear_bytes`: bits and scales of the packed linears, padding included; `other_bytes`: all
      other tensors; `file_bytes`: of model.safetensors; `weights`: how many weights the packed
      linears have; `stored_bits_per_weight = 8 linear_bytes / weights`, which is
      `k + 16 k (i + o) / (i o)` where i is a multiple of 256 and more where it is padded to one.

    Raises:
      BadInput: a file that is missing, truncated or of another format.
    """
    path = Path(folder) / FILE
    with open_packed(path) as file:
        sizes, modules = file.sizes(), file.modules
    try:
        linear = sum(sizes[f"{module}.{part}"] for module in modules for part in PARTS)
        weights = sum(m["in"] * m["out"] for m in modules.values())
    except (KeyError, TypeError) as error:
        raise BadInput(f"the header of {path} names {error}, which the file lacks: fetch it "
                       "again") from error
    return {
        "linear_bytes": linear, "other_bytes": sum(sizes.values()) - linear,
        "file_bytes": path.stat().st_size, "weights": weights,
        "stored_bits_per_weight": 8 * linear / weights,
    }


def _paths_packed(leaves: Mapping[str, Any]) -> dict[str, int]:
    """k of each packed kernel, by path; refuses weight nodes that this file cannot hold."""
    for path, leaf in leaves.items():
        if not is_weight(leaf):
            continue
        if not isinstance(leaf, PackedSign):
            raise BadInput(f"{path} is a {type(leaf).__name__}, wanted PackedSign: pack the params "
                           "first")
        lead = leaf.shape[:-2]
        for part, shape in part_shapes(leaf.shape, leaf.k).items():
            value, dtype = getattr(leaf, part), "uint8" if part == "bits" else "float16"
            if value.shape != (*lead, *shape) or value.dtype != dtype:
                raise BadInput(f"{path} has {part} {value.dtype}{list(value.shape)}, wanted {dtype}"
                               f"{[*lead, *shape]}")
    ks = {path: leaf.k for path, leaf in leaves.items() if is_weight(leaf)}
    if not ks:
        raise BadInput("the params hold no PackedSign: pack them, or save a dense model by save_hf")
    return ks


def _tensors(leaves: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """All tensors of the file, by name."""
    out = {}
    for path, leaf in leaves.items():
        stacked = path.startswith("layers/")
        if is_weight(leaf):
            parts = {part: np.asarray(getattr(leaf, part)) for part in PARTS}
            for n, module in enumerate(module_names(path, leaf.shape)):
                out |= {f"{module}.{p}": v[n] if stacked else v for p, v in parts.items()}
            continue
        stored = nearest_16bit(leaf, path)
        names = tensor_names(path, stored.shape)
        for (name, _), row in zip(names, stored if stacked else [stored], strict=True):
            out[name] = np.ascontiguousarray(row.T if path.endswith("/kernel") else row)
    return out


def _check_config(file: PackedFile, raw: Mapping[str, Any], folder: Path) -> None:
    """A config.json edited after packing would silently give other text."""
    for name in {**raw, **file.config}:
        found, wanted = raw.get(name), file.config.get(name)
        if found != wanted:
            raise BadInput(f"{name} is {found!r} in {folder / 'config.json'} and {wanted!r} in the "
                           f"header of {FILE}: restore config.json")


def _read(file: PackedFile, path: str, shape: tuple[int, ...], packed: bool) -> Any:
    """One parameter: an array, or a `PackedSign`, stacked over layers."""
    if packed:
        modules = module_names(path, shape)
        return PackedSign(**{
            part: _stack([file.read(f"{module}.{part}") for module in modules], path)
            for part in PARTS
        })
    rows = [file.read(name) for name, _ in tensor_names(path, shape)]
    return _stack([row.T for row in rows] if path.endswith("/kernel") else rows, path)


def _stack(rows: list[np.ndarray], path: str) -> jnp.ndarray:
    return jnp.asarray(np.stack(rows) if path.startswith("layers/") else rows[0])


def _eos_ids(folder: Path, config: ModelConfig) -> tuple[int, ...]:
    """The end tokens of generation_config.json, or else of the config."""
    file = folder / "generation_config.json"
    ids = read_json(file).get("eos_token_id") if file.exists() else None
    return config.eos_ids if ids is None else token_ids(ids)
