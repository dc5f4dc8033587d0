"""Models as Hugging Face folders: config.json, safetensors and tokenizer, read and written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from huggingface_hub import split_state_dict_into_shards_factory

from rabit_jax.formats.checkpoint import INDEX, open_checkpoint
from rabit_jax.formats.folder import (
    finite_as,
    json_files,
    read_tokenizer,
    write_folder,
)
from rabit_jax.formats.hf_config import to_hf
from rabit_jax.formats.names import tensor_names
from rabit_jax.models.config import ModelConfig
from rabit_jax.models.decoder import Decoder, check_params, param_shapes
from rabit_jax.tree import is_weight

SHARD_BYTES = 5 * 10**9


def load_hf(
    path: str | Path, dtype: Any = None, shardings: Any = None,
    done: Callable[[int, int], None] = lambda ready, total: None,
) -> tuple[Decoder, dict[str, Any], Any]:
    """Reads a model from a folder, or from the hub by its id.

    Each stacked parameter is read tensor by tensor and put on its devices before the next one:
    host memory beyond the loaded arrays is one stacked parameter and a few pieces of a tensor.

    Args:
      path: folder with config.json and safetensors (one file, or shards with their index), or a
        hub id such as `org/name`. Of a multimodal model the language model is read.
      dtype: of the params in memory, None for float32. Matrix products run in the dtype that
        config.json names.
      shardings: tree like the params, of `jax.sharding.Sharding`; each stacked parameter goes
        from the file straight to its devices. None puts all on the default device.
      done: called after each parameter with the bytes of params so far and in all.

    Returns:
      `(Decoder, params, tokenizer)`; torch's `[out, in]` matrices come transposed and stacked as
      `[l, in, out]`; the tokenizer is transformers', or None where the folder has none.

    Raises:
      BadInput: no such folder or hub model, an unsupported config (the message begins with
        `unsupported`), a damaged shard, a missing, extra or misshapen tensor or one with NaN, by
        name; a tokenizer of another model.
    """
    targets = {} if shardings is None else flatten_dict(shardings, sep="/")
    with open_checkpoint(path) as checkpoint:
        tokenizer = read_tokenizer(checkpoint.folder, checkpoint.config.vocab_size)
        params, ready, size = {}, 0, jnp.dtype(dtype or "float32").itemsize
        total = size * sum(int(np.prod(shape)) for shape in checkpoint.shapes.values())
        for name in checkpoint.shapes:
            value = checkpoint.read(name, dtype=dtype or "float32")
            ready += value.nbytes
            # Without waiting, copies to the devices would queue up and hold many parameters here.
            params[name] = jax.block_until_ready(_placed(value, targets.get(name)))
            del value
            done(ready, total)
    return Decoder(checkpoint.config), unflatten_dict(params, sep="/"), tokenizer


def _placed(value: np.ndarray, sharding: Any) -> jax.Array:
    if sharding is None:
        return jax.device_put(value)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def save_hf(
    folder: str | Path, model: Decoder | ModelConfig, params: Any, tokenizer: Any = None,
    dtype: Any = "float32", generation: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES, texts: Mapping[str, str] | None = None,
    done: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes a folder that transformers and `load_hf` load.

    It holds config.json, generation_config.json, model.safetensors and, if given, the tokenizer;
    a model larger than `shard_bytes` comes as shards with their index. All is written beside the
    target and renamed, so nothing half-written stays; a model folder of that name is replaced.
    Host memory beyond the params is one shard and one layer's dense matrix.

    Args:
      folder: where to write.
      model: the decoder or its config.
      params: its params; a weight node is saved as its `dense()` matrix.
      tokenizer: of transformers, or a plain `tokenizers.Tokenizer`.
      dtype: of the stored tensors, named in config.json too: float32, bfloat16 or float16.
      generation: content of generation_config.json beside the begin and end tokens.
      shard_bytes: most tensor bytes of a file, unless one tensor has more.
      texts: further files by name, such as a README.md.
      done: called with the number of tensors that are ready, after each.

    Raises:
      BadInput: params that do not fit the config or hold a value that is not finite in `dtype`, a
        target that is no model folder, no room.
    """
    config = dataclasses.replace(getattr(model, "config", model), dtype=jnp.dtype(dtype).name)
    leaves = flatten_dict(params, sep="/")
    shapes = param_shapes(config)
    check_params(leaves, shapes)
    tensors = {
        name: _Tensor(path, n if path.startswith("layers/") else None, shape)
        for path, stacked in shapes.items()
        for n, (name, shape) in enumerate(tensor_names(path, stacked))
    }
    size = jnp.dtype(config.dtype).itemsize
    split = split_state_dict_into_shards_factory(
        tensors, get_storage_size=lambda t: size * int(np.prod(t.shape)),
        filename_pattern="model{suffix}.safetensors", max_shard_size=shard_bytes)
    files = {**json_files(to_hf(config), generation), **(texts or {})}
    if split.is_sharded:
        files[INDEX] = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}

    def shards() -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        ready = 0
        for file, names in split.filename_to_tensors.items():
            shard = {}
            for name in names:
                shard[name] = tensors[name].value(leaves, config.dtype)
                ready += 1
                done(ready)
            yield file, shard
            del shard

    write_folder(folder, shards(), {"format": "pt"}, files, tokenizer)


class _Tensor(NamedTuple):
    """One stored tensor: our path, the layer of a stack, torch's shape."""

    path: str
    layer: int | None
    shape: tuple[int, ...]

    def value(self, leaves: Mapping[str, Any], dtype: str) -> np.ndarray:
        """The tensor in torch's layout, read from that layer alone."""
        leaf, stacked = leaves[self.path], self.layer is not None
        if stacked:
            leaf = jax.tree.map(lambda a: a[self.layer : self.layer + 1], leaf)
        value = np.asarray(leaf.dense() if is_weight(leaf) else leaf)
        value = value[0] if stacked else value
        return finite_as(value.T if self.path.endswith("/kernel") else value, dtype, self.path)
