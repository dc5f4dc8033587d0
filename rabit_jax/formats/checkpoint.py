"""Hugging Face checkpoints in safetensors, checked by name and read one parameter at a time.

A shard is mapped into memory for each piece that is read and unmapped after it: the pages of a file
that stays mapped count as memory of this process until the machine runs short of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from rabit_jax.errors import BadInput, check_regular, first_line
from rabit_jax.formats.families import hf_name, tensor_names
from rabit_jax.formats.folder import FILE, find_folder, finite_as, read_generation, read_json
from rabit_jax.formats.gguf import LINK, hf_tensors
from rabit_jax.formats.gguf_file import GGUFTensor, read_gguf
from rabit_jax.formats.hf_config import from_hf
from rabit_jax.formats.hf_fields import token_ids
from rabit_jax.formats.tokenizer import load_tokenizer
from rabit_jax.models.config import ModelConfig
from rabit_jax.models.decoder import param_shapes
from rabit_jax.types import Shape, Tokenizer

INDEX = f"{FILE}.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
PIECE_BYTES = 1 << 23

# A checkpoint of text and images prefixes the names of its language model's tensors; the first two
# prefixes are those of older files.
_RENAMED = (("language_model.model.", "model."), ("language_model.lm_head.", "lm_head."),
            ("model.language_model.", "model."))
_IMAGES = ("vision_tower.", "model.vision_tower.", "multi_modal_projector.",
           "model.multi_modal_projector.")


class Stored(NamedTuple):
    """Where a tensor is stored: shard, name in it, shape, and dtype as safetensors spells it."""

    file: Path
    name: str
    shape: Shape
    dtype: str

    @property
    def label(self) -> str:
        """The tensor and its file, for error messages."""
        return f"tensor {self.name} in {self.file}"

    def pieces(self) -> Iterator[tuple[slice, np.ndarray]]:
        """The tensor as slices of its first axis, each of about `PIECE_BYTES`.

        Raises:
          BadInput: the shard can no longer be read.
        """
        row_bytes = max(1, int(np.prod(self.shape[1:])) * (8 if self.dtype == "F64" else 4))
        step = max(1, PIECE_BYTES // row_bytes)
        for begin in range(0, self.shape[0], step):
            rows = slice(begin, min(begin + step, self.shape[0]))
            with _opened(self.file) as shard:
                piece = shard.get_slice(self.name)[rows]
            yield rows, piece


Tensor: TypeAlias = Stored | GGUFTensor


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model folder in which all tensors have been found, in the right shapes.

    Attributes:
      folder: the model folder.
      config: config of the decoder.
      shapes: shape of each parameter by path, see `rabit_jax.models.decoder.param_shapes`.
      tensors: where each Hugging Face tensor of the language model is stored, by name.
    """

    folder: Path
    config: ModelConfig
    shapes: dict[str, Shape]
    tensors: dict[str, Tensor]

    def read(
        self, path: str, layer: int | None = None, dtype: DTypeLike = "float32"
    ) -> np.ndarray:
        """One parameter in this package's layout.

        Host memory beyond the result is one piece of a tensor, about `PIECE_BYTES`.

        Args:
          path: such as `layers/attn/q/kernel`.
          layer: the one layer of a stacked parameter to read; None reads the whole stack.
          dtype: dtype of the result.

        Returns:
          `[l, ...]` for a stack, else `[...]`; a kernel is `[..., i, o]`, torch's `[o, i]`
          transposed.

        Raises:
          BadInput: a value that is NaN, infinite or beyond the range of `dtype`; the message names
            the tensor.

        Example:
          >>> with open_checkpoint("runs/mine/teacher") as checkpoint:
          ...     q = checkpoint.read("layers/attn/q/kernel", layer=3)
        """
        shape, stacked = self.shapes[path], path.startswith("layers/")
        names = [name for name, _ in tensor_names(path, shape)]
        if layer is not None:
            names, shape = [names[layer]], (1, *shape[1:])
        out = np.empty(shape, dtype)
        for row, name in zip(out if stacked else out[None], names, strict=True):
            torch_layout = row.T if path.endswith("/kernel") else row
            for rows, piece in self.tensors[name].pieces():
                torch_layout[rows] = finite_as(piece, out.dtype, self.tensors[name].label)
        return out if layer is None else out[0]


@contextlib.contextmanager
def open_checkpoint(path: str | Path) -> Iterator[Checkpoint]:
    """Opens a model folder, or a model on the hub by its id; `Checkpoint.read` reads its values.

    Raises:
      BadInput: no such folder or hub model, an unsupported config (the message begins with
        `unsupported`), a shard that is missing or truncated, or a missing, extra or misshapen
        tensor; the message names it.
    """
    folder = find_folder(path)
    raw = read_json(folder / "config.json")
    config = with_end_tokens(from_hf(raw), folder)
    tensors = _find_tensors(folder, multimodal="text_config" in raw)
    shapes = param_shapes(config)
    _check(tensors, shapes, config, folder)
    yield Checkpoint(folder, config, shapes, tensors)


def read_config(path: str | Path) -> ModelConfig:
    """The config of a model folder or hub id, with all of its end tokens.

    Raises:
      BadInput: no such model, or a config or tokenizer that cannot be read or is not supported.
    """
    folder = find_folder(path)
    return with_end_token_of(load_tokenizer(folder), folder_config(folder))


def folder_config(folder: Path) -> ModelConfig:
    """The config of a model's folder without the end token of its tokenizer, which is not read.

    Raises:
      BadInput: a config that cannot be read or is not supported.
    """
    return with_end_tokens(from_hf(read_json(folder / "config.json")), folder)


def with_end_tokens(config: ModelConfig, folder: Path) -> ModelConfig:
    """The config with the end tokens of the folder's generation_config.json before its own.

    Ids beyond the vocabulary, which the model cannot make, are left out.
    """
    where = f"eos_token_id in {folder / 'generation_config.json'}"
    return _ending(config, token_ids(read_generation(folder).get("eos_token_id"), where), ())


def with_end_token_of(tokenizer: Tokenizer | None, config: ModelConfig) -> ModelConfig:
    """The config with the tokenizer's end token after its own."""
    end = None if tokenizer is None else tokenizer.eos_token_id
    return _ending(config, (), token_ids(end, "the end token of the tokenizer"))


def _ending(
    config: ModelConfig, before: tuple[int, ...], after: tuple[int, ...]
) -> ModelConfig:
    ids = dict.fromkeys((*before, *config.eos_ids, *after))
    return dataclasses.replace(config, eos_ids=tuple(i for i in ids if i < config.vocab_size))


def _find_tensors(folder: Path, multimodal: bool) -> dict[str, Tensor]:
    """Where each tensor of the language model is stored, by its name in a model of text alone.

    A tensor that several shards hold is taken from the one that the index names.
    """
    if (folder / LINK).exists():
        return dict(hf_tensors(read_gguf((folder / LINK).readlink())))
    found: dict[str, Tensor] = {}
    shards, index = _shards(folder)
    for file in shards:
        with _opened(file) as shard:
            for name in shard.keys():
                if index.get(name, file.name) != file.name:
                    continue
                if multimodal and name.startswith(_IMAGES):
                    continue
                info = shard.get_slice(name)
                plain = _plain(name) if multimodal else name
                stored = Stored(file, name, tuple(info.get_shape()), info.get_dtype())
                if plain in found:
                    raise BadInput(f"{found[plain].label} and {stored.label} are one parameter of "
                                   f"the model: take one of them out, or name it in {INDEX}")
                found[plain] = stored
    return found


def _shards(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The safetensors files of a folder, and the file name of each tensor in its index, if any."""
    index = folder / INDEX
    if (folder / FILE).exists():
        return [folder / FILE], {}
    if index.exists():
        table = read_json(index).get("weight_map")
        names = list(table.values()) if isinstance(table, dict) else []
        if not names or not all(map(_is_file_name, names)):
            raise BadInput(f"{index} has no weight_map from tensors to files of this folder: "
                           "fetch it again")
        return [folder / name for name in sorted(set(names))], dict(table or {})
    if files := sorted(folder.glob("model-*-of-*.safetensors")):
        return files, {}
    raise BadInput(f"{folder} holds no {FILE} and no {INDEX}: convert the model to safetensors, or "
                   "take one that has them")


def _is_file_name(name: object) -> bool:
    """Whether a value is the name of a file in a folder."""
    if not isinstance(name, str) or Path(name).name != name:
        return False
    try:
        return bool(name.encode())
    except UnicodeEncodeError:  # half of a pair of UTF-16, which JSON can write
        return False


def _plain(name: str) -> str:
    for prefix, wanted in _RENAMED:
        if name.startswith(prefix):
            return wanted + name.removeprefix(prefix)
    return name


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[safe_open]:
    try:
        check_regular(file)
        with safe_open(file, framework="numpy") as shard:
            yield shard
    except (OSError, SafetensorError) as error:
        raise BadInput(f"cannot read shard {file} ({first_line(error)}), it is missing or "
                       "damaged: fetch it again") from error


def _check(
    tensors: dict[str, Tensor], shapes: dict[str, Shape], config: ModelConfig, folder: Path
) -> None:
    """Raises BadInput for the first tensor that is missing, misshapen or extra."""
    wanted = dict(pair for path, shape in shapes.items() for pair in tensor_names(path, shape))
    for name, shape in wanted.items():
        if name not in tensors:
            raise BadInput(f"missing tensor {name} {list(shape)} in {folder}")
        found = tensors[name]
        readable = found.dtype in FLOATS or not isinstance(found, Stored)
        if found.shape != shape or not readable:
            raise BadInput(f"tensor {found.name} in {folder} is {found.dtype} {list(found.shape)}, "
                           f"wanted {list(shape)} of float32, bfloat16 or float16")
    for name in sorted(set(tensors) - set(wanted)):
        if name.endswith("rotary_emb.inv_freq"):
            continue
        if not (name == "lm_head.weight" and config.tied_head and _same(tensors, name)):
            raise BadInput(f"extra tensor {tensors[name].name} in {folder}, config.json asks for "
                           "none of that name")


def _same(tensors: Mapping[str, Tensor], head: str) -> bool:
    """Whether a stored head equals the embedding that the config ties it to."""
    one, other = tensors[head], tensors[hf_name("embed/embedding")]
    if one.shape != other.shape:
        return False
    pairs = zip(one.pieces(), other.pieces(), strict=False)
    return all(np.array_equal(a, b) for (_, a), (_, b) in pairs)
