"""Models written as GGUF files of llama.cpp, with the tables that `gguf` reads them by.

Only what the file can hold exactly is written: settings are read back and compared with the model's
own, matrices go into blocks of integers without rounding (`gguf_blocks`).
"""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from rabit_jax.atomic import replacing
from rabit_jax.errors import BadInput
from rabit_jax.formats.exact_levels import levels_of
from rabit_jax.formats.folder import finite_as
from rabit_jax.formats.gguf import (
    ARCHITECTURES,
    GEMMA_MODULES,
    MODULES,
    ROPE_FREQUENCIES,
    SIZES,
    TOP,
    half_split_rows,
    hf_config,
)
from rabit_jax.formats.gguf_blocks import TYPES, smallest
from rabit_jax.formats.gguf_file import read_gguf
from rabit_jax.formats.gguf_vocabulary import tokenizer_fields
from rabit_jax.formats.hf import StoredTensor, stored_tensors
from rabit_jax.formats.hf_config import from_hf, to_hf
from rabit_jax.models.config import ModelConfig
from rabit_jax.models.decoder import Decoder, check_params, param_shapes
from rabit_jax.models.rotary import frequencies
from rabit_jax.tree import is_weight, leaves
from rabit_jax.types import Array, Json, Params, Shape, Tokenizer, Weight
from rabit_jax.weights.table import Table

if TYPE_CHECKING:
    import gguf

Kind: TypeAlias = str  # "f32", "f16", "exact" or a name in `gguf_blocks.TYPES`
# llama.cpp's name of the architecture that computes each family of Hugging Face.
NAMES = {hf: name for name, hf in ARCHITECTURES.items()} | {"mistral": "llama"}


def save_gguf(
    file: str | Path, model: Decoder | ModelConfig, params: Params, tokenizer: Tokenizer | None,
    kind: Kind = "exact", name: str = "", licence: str | None = None,
    done: Callable[[int], None] = lambda count: None,
) -> dict[str, int]:
    """Writes a GGUF file; it appears under its name when it is whole.

    Args:
      file: where to write; a file of that name is replaced.
      model: the decoder or its config.
      params: its params, packed or dense.
      tokenizer: of transformers.
      kind: "f32" holds every dense matrix exactly; "f16" rounds them to float16; "exact" gives each
        packed matrix the smallest type of `gguf_blocks.TYPES` that holds it, and the name of one
        gives it to all matrices of the blocks. Embedding, head and arrays that are not packed then
        have the smallest type that holds them, float32 at most.
      name: of the model, for readers of the file.
      licence: its licence, as the hub spells it.
      done: called after each tensor with the number of tensors that are ready.

    Returns:
      How many tensors have each type.

    Raises:
      BadInput: a family, setting or tokenizer that the file cannot describe; a matrix that the kind
        cannot hold exactly, or a value that is not finite in it; a file that cannot be written.
    """
    config = model.config if isinstance(model, Decoder) else model
    flat = dict(leaves(params))
    check_params(flat, param_shapes(config))
    architecture = NAMES.get(config.family)
    if architecture is None:
        raise BadInput(f"unsupported family {config.family!r} for a GGUF file, supported are "
                       f"{', '.join(NAMES)}")
    fields = {"general.architecture": architecture, "general.type": "model",
              "general.name": name, "general.quantization_version": 2,
              **_settings(config, architecture),
              **tokenizer_fields(tokenizer, config.vocab_size, architecture, config.eos_ids)}
    if licence:
        fields["general.license"] = licence
    tensors = _tensors(config, architecture, kind, flat)
    fields["general.file_type"] = _file_type(tensors)
    try:
        with replacing(Path(file)) as new:
            _write(new, fields, tensors, flat, done)
            _check(new, config)
    except OSError as error:
        reason = error.strerror or os.strerror(errno.ENOSPC)  # NumPy gives none of a full disk
        raise BadInput(f"cannot write {file} ({reason}): free space there or choose another "
                       "place") from error
    found = [one.type for one in tensors.values()]
    return {kind: found.count(kind) for kind in sorted(set(found))}


class _Tensor(NamedTuple):
    """A tensor to write.

    Attributes:
      name, type, shape: as the file has them, the shape as torch's.
      source: the model's tensor; None where the values are `given`.
      order: which of its rows stands in each place, None where they are in order.
      added: to each value.
      given: values that no tensor of the model has.
    """

    name: str
    type: str
    shape: Shape
    source: StoredTensor | None = None
    order: np.ndarray | None = None
    added: float = 0.0
    given: np.ndarray | None = None

    def encoded(self, params: Params) -> np.ndarray:
        """The tensor as the file holds it: a float array, or bytes of blocks."""
        if self.given is not None or self.source is None:
            return np.asarray(self.given, np.float32)
        if self.type in TYPES:
            levels = levels_of(_matrix(self.source.leaf(params)), self.name)
            levels = levels if self.order is None else levels.rows(self.order)
            return TYPES[self.type].bytes_of(levels)
        value = self.source.value(params, "float32")
        value = value if self.order is None else value[self.order]
        return _as_type(value + np.float32(self.added), self.type, self.name)


def _matrix(leaf: Array | Weight) -> Array | Weight:
    return leaf.matrix if isinstance(leaf, Table) else leaf


def _as_type(value: np.ndarray, kind: str, name: str) -> np.ndarray:
    import ml_dtypes

    dtype = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[kind]
    found = finite_as(value, dtype, name)
    return found.view(np.uint8) if kind == "BF16" else found


def _tensors(
    config: ModelConfig, architecture: str, kind: Kind, params: Params
) -> dict[str, _Tensor]:
    """All tensors with their types, by name."""
    names = {hf: ours for ours, hf in MODULES.items()}
    if architecture == "gemma3":
        names = {hf: ours for ours, hf in (MODULES | GEMMA_MODULES).items()}
    top = {hf: ours for ours, hf in TOP.items()}
    heads = {"attn_q": config.n_heads, "attn_k": config.n_kv_heads}
    found = {}
    for hf, source in stored_tensors(config).items():
        module, _, suffix = hf.rpartition(".")
        if hf in top:
            ours, base = top[hf], ""
        else:
            _, _, layer, inner = module.split(".", 3)
            if inner not in names:
                raise BadInput(f"a GGUF file of a {architecture} model has no place for {hf}")
            base = names[inner]
            ours = f"blk.{layer}.{base}.{suffix}"
        order = None
        if architecture == "llama" and base in heads:
            order = half_split_rows(source.shape[0], heads[base])
        added = float(config.norm_plus_one and hf.endswith("norm.weight"))
        one = _Tensor(ours, "F32", source.shape, source, order, added)
        found[ours] = one._replace(type=_type(one, kind, params))
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "llama3":
        plain = frequencies(dataclasses.replace(config, rope_scaling=None))
        divisors = np.asarray(plain / frequencies(config), np.float32)
        found[ROPE_FREQUENCIES] = _Tensor(ROPE_FREQUENCIES, "F32", divisors.shape, given=divisors)
    return found


def _type(tensor: _Tensor, kind: Kind, params: Params) -> str:
    """The type of one tensor.

    Raises:
      BadInput: a matrix that the kind cannot hold exactly.
    """
    assert tensor.source is not None
    if len(tensor.shape) == 1:  # llama.cpp computes norms and biases in float32
        return "F32"
    if kind in ("f32", "f16"):
        return kind.upper()
    leaf = _matrix(tensor.source.leaf(params))
    in_block = tensor.name.startswith("blk.")
    if in_block:
        levels = levels_of(leaf, tensor.name)
        if kind == "exact":
            return smallest(levels, tensor.name).name
        why = TYPES[kind].why_not(levels)
        if why:
            raise BadInput(f"{tensor.name} {why} in {kind}: --format gguf takes the smallest type "
                           "that holds each matrix")
        return kind
    if is_weight(leaf):
        try:
            return smallest(levels_of(leaf, tensor.name), tensor.name).name
        except BadInput:
            return "F32"  # as the dense matrix, which holds it exactly too
    return _smallest_float(tensor.source.value(params, "float32"))


def _smallest_float(value: np.ndarray) -> str:
    import ml_dtypes

    for name, dtype in (("F16", np.float16), ("BF16", ml_dtypes.bfloat16)):
        with np.errstate(over="ignore"):
            if np.array_equal(value.astype(dtype).astype(np.float32), value):
                return name
    return "F32"


def _file_type(tensors: dict[str, _Tensor]) -> int:
    """llama.cpp's number of a file most of whose matrices have a type."""
    import gguf

    kinds = [one.type for one in tensors.values() if one.name.startswith("blk.")
             and len(one.shape) > 1]
    most = max(sorted(set(kinds)), key=kinds.count)
    return gguf.LlamaFileType["ALL_F32" if most == "F32" else f"MOSTLY_{most}"].value


def _settings(config: ModelConfig, architecture: str) -> Json:
    """The `{architecture}.*` metadata."""
    raw = to_hf(config)
    own: Json = {ours: raw[hf] for ours, hf in SIZES.items()}
    own |= {
        "attention.value_length": config.head_dim, "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab_size, "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.freq_base": config.rope_theta,
    }
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "linear":
        own |= {"rope.scaling.type": "linear", "rope.scaling.factor": config.rope_scaling.factor}
    if architecture == "gemma3" and config.window is not None:
        own["attention.sliding_window"] = config.window
        own["attention.sliding_window_pattern"] = list(config.local_layers)
        if config.local_rope_theta is not None:
            own["rope.freq_base_swa"] = config.local_rope_theta
    if config.final_softcap is not None:
        own["final_logit_softcapping"] = config.final_softcap
    return {f"{architecture}.{key}": value for key, value in own.items()}


def _write(
    file: Path, fields: Json, tensors: dict[str, _Tensor], params: Params,
    done: Callable[[int], None],
) -> None:
    """The file, tensor by tensor: only one of them is held at a time."""
    import gguf

    writer = gguf.GGUFWriter(file, fields["general.architecture"])
    try:
        for key, value in fields.items():
            if key != "general.architecture":  # which the writer has written
                _add_field(writer, key, value)
        for one in tensors.values():
            kind = gguf.GGMLQuantizationType[one.type]
            size = gguf.GGML_QUANT_SIZES[kind]
            count = int(np.prod(one.shape)) // size[0] * size[1]
            writer.add_tensor_info(one.name, one.shape, np.dtype(np.float32), count, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for n, one in enumerate(tensors.values()):
            writer.write_tensor_data(one.encoded(params))
            done(n + 1)
    finally:
        writer.close()


def _add_field(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        writer.add_string(key, str(value))


def _check(file: Path, config: ModelConfig) -> None:
    """Raises BadInput for a setting of the model that the file, read back, does not have."""
    found = from_hf(hf_config(read_gguf(file)))
    same = {"dtype": found.dtype, "remat": found.remat, "bos_id": found.bos_id,
            "initializer_range": found.initializer_range}
    if config.family == "mistral":  # which differs from a Llama by its window alone
        same["family"] = "llama"
    for name, wanted in _differences(dataclasses.replace(config, **same), found):
        raise BadInput(f"unsupported {name} {wanted} for a GGUF file: llama.cpp computes a "
                       f"{config.family} model with {getattr(found, name)}")


def _differences(wanted: ModelConfig, found: ModelConfig) -> Iterator[tuple[str, object]]:
    for field in dataclasses.fields(wanted):
        one, other = getattr(wanted, field.name), getattr(found, field.name)
        if field.name == "query_scalar":
            one, other = one or wanted.head_dim, other or wanted.head_dim
        if isinstance(one, float) and isinstance(other, float):  # the file has float32
            one, other = np.float32(one), np.float32(other)
        if field.name == "eos_ids" and set(wanted.eos_ids) <= set(found.eos_ids):
            continue  # llama.cpp ends at tokens that it knows by their text, too
        if one != other:
            yield field.name, getattr(wanted, field.name)
