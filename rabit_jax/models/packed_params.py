"""Packed params of any model in one file: the format of `packed_format`, under their own paths."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError

from rabit_jax.errors import BadInput
from rabit_jax.models.folder import save_tensors
from rabit_jax.models.packed_format import (
    PackedFile,
    metadata,
    named_parts,
    open_packed,
    part_names,
)
from rabit_jax.weights.linear import is_weight
from rabit_jax.weights.packed_types import abstract_packed, is_packed_node


def save_packed_params(file: str | Path, params: Any) -> Path:
    """Writes packed params of a model that is not ours: the file knows nothing of the model.

    One tensor for each array of a packed weight, `block/fc/kernel.bits`, and one for each other
    parameter in the dtype that it has. Written beside the target and renamed.

    Args:
      file: where to write, usually `*.safetensors`; replaced if it exists.
      params: nested dicts (keys: text or whole numbers), packed; see `rabit_jax.pack`.

    Returns:
      The file.

    Raises:
      BadInput: something else than nested dicts, two parameters of one path (a key with "/"), a
        weight that is not packed, no packed weight at all, or no room.

    Example:
      >>> save_packed_params("vit.safetensors", pack(student))
      >>> logits = model.apply({"params": dense(load_packed_params("vit.safetensors"))}, x)
    """
    file = Path(file)
    keys, tensors, headers = {}, {}, {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(params, is_leaf=is_weight)[0]:
        own = [_key(entry) for entry in path]
        name = "/".join(map(str, own))
        if name in keys:
            raise BadInput(f"two parameters have the path {name}: {keys[name]} and {own}; rename "
                           "one of them")
        keys[name] = own
        if not is_weight(leaf):
            tensors[name] = np.asarray(leaf)
            continue
        if not is_packed_node(leaf):
            raise BadInput(f"{name} is a {type(leaf).__name__}, wanted a packed weight: pack the "
                           "params first")
        headers[name] = leaf.header()
        tensors |= {f"{name}.{part}": array for part, array in named_parts(leaf).items()}
    if not headers:
        raise BadInput("the params hold no packed weight: convert and pack them first")
    tensors = {name: np.ascontiguousarray(a) if a.ndim else a for name, a in tensors.items()}
    _write(file, tensors, metadata({"params": keys}, headers, tensors))
    return file


def load_packed_params(file: str | Path) -> dict[str, Any]:
    """Reads and verifies what `save_packed_params` wrote: the same tree, to the bit.

    Raises:
      BadInput: no such file, a truncated or altered one, another format or version, or the file of
        a packed language model.
    """
    params: dict[str, Any] = {}
    with open_packed(Path(file)) as packed:
        paths = packed.config.get("params")
        if paths is None:
            raise BadInput(f"{file} is that of a language model: read its folder by load_packed")
        for name, keys in paths.items():
            branch = params
            for key in keys[:-1]:
                branch = branch.setdefault(key, {})
            branch[keys[-1]] = _read(packed, name)
    return params


def _key(entry: Any) -> str | int:
    key = getattr(entry, "key", None)
    if not isinstance(entry, jax.tree_util.DictKey) or not isinstance(key, str | int):
        raise BadInput(f"the params have the entry {entry}, wanted nested dicts with keys that are "
                       "text or whole numbers; of an NNX model take nnx.to_pure_dict(state)")
    return key


def _read(packed: PackedFile, name: str) -> Any:
    try:
        if name not in packed.modules:
            return jnp.asarray(packed.read(name))
        names = part_names(abstract_packed(packed.modules[name]))
        return jax.tree.map(lambda part: jnp.asarray(packed.read(f"{name}.{part}")), names)
    except SafetensorError as error:
        raise BadInput(f"{packed.path} lacks a tensor of {name}: fetch it again") from error


def _write(file: Path, tensors: dict[str, np.ndarray], header: dict[str, str]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as place:
            new = Path(place) / file.name
            save_tensors(tensors, new, header)
            new.replace(file)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"cannot write {file}: {error}") from error
