"""Whole models read from and written to Hugging Face folders."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from huggingface_hub import split_state_dict_into_shards_factory
from jax.typing import DTypeLike
from jaxtyping import PyTree

from rabit_jax.formats.checkpoint import INDEX, open_checkpoint, with_end_token_of
from rabit_jax.formats.families import tensor_names
from rabit_jax.formats.folder import check_dtype, finite_as, json_files, write_folder
from rabit_jax.formats.hf_config import to_hf
from rabit_jax.formats.tokenizer import read_tokenizer
from rabit_jax.models.config import ModelConfig
from rabit_jax.models.decoder import Decoder, check_params, config_of, param_shapes
from rabit_jax.tree import is_weight, leaves
from rabit_jax.types import Array, Json, Params, Shape, Tokenizer, Weight

if TYPE_CHECKING:
    import tokenizers

SHARD_BYTES = 5 * 10**9


def load_hf(
    path: str | Path, dtype: DTypeLike | None = None,
    shardings: PyTree[jax.sharding.Sharding] | None = None,
    done: Callable[[int, int], None] = lambda ready, total: None,
) -> tuple[Decoder, Params, Tokenizer | None]:
    """Reads a model from a folder, or from the hub by its id.

    Each stacked parameter is read tensor by tensor and put on its devices before the next one. Host
    memory beyond the loaded arrays is one stacked parameter and a few pieces of a tensor.

    Args:
      path: folder with config.json and safetensors (one file, or shards with their index), or a
        hub id such as `org/name`. Of a multimodal model the language model is read.
      dtype: dtype of the params in memory, None for float32. Matrix products run in the dtype that
        config.json names.
      shardings: tree like the params; each stacked parameter goes from the file straight to its
        devices. None puts all of them on the default device.
      done: called after each parameter with the bytes of params read so far and in total.

    Returns:
      `(Decoder, params, tokenizer)`. Torch's `[out, in]` matrices come transposed and stacked as
      `[l, in, out]`. The tokenizer is one of transformers, or None if the folder has none.
      `model.config.eos_ids` are the end tokens that generation_config.json, config.json and the
      tokenizer name.

    Raises:
      BadInput: no such folder or hub model, an unsupported config (the message begins with
        `unsupported`), a damaged shard, a missing, extra or misshapen tensor or one with NaN (the
        message names it), a tokenizer of another model.
    """
    check_dtype(dtype or "float32")
    targets = {} if shardings is None else dict(leaves(shardings))
    with open_checkpoint(path) as checkpoint:
        tokenizer = read_tokenizer(checkpoint.folder, checkpoint.config)
        params, ready, size = {}, 0, jnp.dtype(dtype or "float32").itemsize
        total = size * sum(int(np.prod(shape)) for shape in checkpoint.shapes.values())
        for name in checkpoint.shapes:
            value = checkpoint.read(name, dtype=dtype or "float32")
            ready += value.nbytes
            # Without waiting, copies to the devices would queue up and hold many parameters here.
            params[name] = jax.block_until_ready(_placed(value, targets.get(name)))
            del value
            done(ready, total)
    config = with_end_token_of(tokenizer, checkpoint.config)
    return Decoder(config), unflatten_dict(params, sep="/"), tokenizer


def _placed(value: np.ndarray, sharding: jax.sharding.Sharding | None) -> Array:
    if sharding is None:
        return jax.device_put(value)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def save_hf(
    folder: str | Path, model: Decoder | ModelConfig, params: Params,
    tokenizer: Tokenizer | tokenizers.Tokenizer | None = None,
    dtype: DTypeLike = "float32", generation: Json | None = None,
    shard_bytes: int = SHARD_BYTES, texts: Mapping[str, str] | None = None,
    done: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes a folder that transformers and `load_hf` load.

    The folder holds config.json, generation_config.json, model.safetensors and, if given, the
    tokenizer; a model larger than `shard_bytes` is split into shards with an index. Everything is
    written beside the target and then renamed, so that nothing half-written remains; a model folder
    of that name is replaced. Host memory beyond the params is one shard and one layer's dense
    matrix.

    Args:
      folder: where to write.
      model: the decoder or its config.
      params: its params; a weight node is saved as its `dense()` matrix.
      tokenizer: of transformers, or a plain `tokenizers.Tokenizer`.
      dtype: dtype of the stored tensors, also named in config.json: float32, bfloat16 or float16.
      generation: content of generation_config.json besides the begin and end tokens.
      shard_bytes: most bytes of tensors in a file, unless a single tensor has more.
      texts: further text files by name, such as a README.md.
      done: called after each tensor with the number of tensors that are ready.

    Raises:
      BadInput: params that do not fit the config or hold a value that is not finite in `dtype`, a
        target that exists and is not a model folder, a full disk.
    """
    check_dtype(dtype)
    config = config_of(model)
    config = dataclasses.replace(config, dtype=jnp.dtype(dtype).name)
    flat, tensors = dict(leaves(params)), stored_tensors(config)
    check_params(flat, param_shapes(config))
    size = jnp.dtype(config.dtype).itemsize
    made = {name: Made(size * math.prod(one.shape), partial(one.value, flat, config.dtype))
            for name, one in tensors.items()}
    files = {**json_files(to_hf(config), generation), **(texts or {})}
    write_sharded(folder, made, files, tokenizer, shard_bytes, done)


class Made(NamedTuple):
    """A tensor that is made when it is written: its size, and what makes it."""

    nbytes: int
    make: Callable[[], np.ndarray]


def write_sharded(
    folder: str | Path, tensors: Mapping[str, Made], files: Mapping[str, str | Json],
    tokenizer: Tokenizer | tokenizers.Tokenizer | None, shard_bytes: int = SHARD_BYTES,
    done: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes a model folder whose tensors are made shard by shard, as `save_hf` describes it.

    Raises:
      BadInput: a target that exists and is not a model folder, a full disk.
    """
    split = split_state_dict_into_shards_factory(
        dict(tensors), get_storage_size=lambda one: one.nbytes,
        filename_pattern="model{suffix}.safetensors", max_shard_size=shard_bytes)
    files = dict(files)
    if split.is_sharded:
        files[INDEX] = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}

    def shards() -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        ready = 0
        for file, names in split.filename_to_tensors.items():
            shard = {}
            for name in names:
                shard[name] = tensors[name].make()
                ready += 1
                done(ready)
            yield file, shard
            del shard

    write_folder(folder, shards(), {"format": "pt"}, files, tokenizer)


class StoredTensor(NamedTuple):
    """A tensor to store: path of its parameter, layer in the stack if any, torch's shape."""

    path: str
    layer: int | None
    shape: Shape

    def leaf(self, params: Params) -> Array | Weight:
        """The array or weight node of this layer, from params by path; only it is copied."""
        leaf, layer = params[self.path], self.layer
        return leaf if layer is None else jax.tree.map(lambda a: a[layer], leaf)

    def value(self, params: Params, dtype: str) -> np.ndarray:
        """The tensor in torch's layout; a weight node as its `dense()` matrix."""
        leaf = self.leaf(params)
        value = np.asarray(leaf.dense() if is_weight(leaf) else leaf)
        return finite_as(value.T if self.path.endswith("/kernel") else value, dtype, self.path)


def stored_tensors(config: ModelConfig) -> dict[str, StoredTensor]:
    """What a folder of this model stores, by Hugging Face's names."""
    return {
        name: StoredTensor(path, n if path.startswith("layers/") else None, shape)
        for path, stacked in param_shapes(config).items()
        for n, (name, shape) in enumerate(tensor_names(path, stacked))
    }
