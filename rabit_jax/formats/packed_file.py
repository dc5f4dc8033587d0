"""What a file of packed weights holds: names, shapes, headers and checksums."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from safetensors import SafetensorError, safe_open

from rabit_jax.atomic import write_tensors
from rabit_jax.errors import BadInput, check_regular
from rabit_jax.formats.families import hf_name, tensor_names
from rabit_jax.json_text import parse
from rabit_jax.kernels.layout import from_stored, stored_bytes, to_stored
from rabit_jax.tree import is_weight
from rabit_jax.types import Array, Json, Param, Params, Weight
from rabit_jax.weights.leaves import WeightNode, row_signs
from rabit_jax.weights.representations import abstract_packed, is_packed_node
from rabit_jax.weights.sign_paths import PackedSign

METHOD, FORMAT, VERSION = "rabit", "rb256", 4
READABLE = (3, 4)  # 3 pads every row of signs to 256 inputs
_DTYPES = {"uint8": "U8", "float16": "F16"}
OTHERS = ("F16", "BF16")
_BYTES = {"U8": 1, "F16": 2, "BF16": 2}
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class PackedFile:
    """An open file of format `rb256` whose header has been read.

    Attributes:
      path: where it lies.
      version: of the format.
      config: the model's config.json as the header repeats it.
      modules: `header()` of each packed linear, by Hugging Face module name.
      sha256: checksum of each tensor, by name.
      tensors: the open safetensors handle.
    """

    path: Path
    version: int
    config: Json
    modules: dict[str, Json]
    sha256: dict[str, str]
    tensors: safe_open

    def read(self, name: str) -> np.ndarray:
        """One tensor.

        Raises:
          BadInput: its bytes are not those that were written.
        """
        value = self.tensors.get_tensor(name)
        if checksum(value) != self.sha256.get(name):
            raise BadInput(f"tensor {name} in {self.path} is altered, its checksum differs from "
                           "the one in the header: fetch the file again")
        return value

    def read_part(self, name: str, signs: int) -> np.ndarray:
        """One array of a packed weight, whose rows hold `signs` signs (0: it is not packed).

        Raises:
          BadInput: as `read`.
        """
        return in_memory(self.read(name), signs, self.version)

    def sizes(self) -> dict[str, int]:
        """Bytes of each tensor, by name."""
        found = {name: self.tensors.get_slice(name) for name in self.tensors.keys()}
        return {n: prod(s.get_shape()) * _BYTES[s.get_dtype()] for n, s in found.items()}


@contextlib.contextmanager
def open_packed(path: Path) -> Iterator[PackedFile]:
    """Opens a file and reads its header; no tensor is read yet.

    Raises:
      BadInput: no such file, a truncated one, another format or version, or a damaged header.
    """
    try:
        check_regular(path)
        tensors = safe_open(path, framework="numpy")
    except (OSError, SafetensorError) as error:
        raise BadInput(f"cannot read {path}, it is missing, truncated or damaged: fetch it again "
                       f"({str(error).splitlines()[0]})") from error
    with tensors:
        header = tensors.metadata() or {}
        check_version(header, str(path))
        try:
            parts = [dict(parse(header[name], finite=True))
                     for name in ("config", "modules", "sha256")]
            if not all(isinstance(one, dict) for one in parts[1].values()):
                raise TypeError("modules hold something else than objects")
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"the header of {path} is damaged ({error}): fetch it again") from error
        for name in ("config", "modules"):
            if text_checksum(header[name]) != parts[2].get(name):
                raise BadInput(f"the header of {path} is altered, the checksum of its {name} "
                               "differs: fetch it again")
        config, modules, sha256 = parts
        yield PackedFile(path, int(header["version"]), config, modules, sha256, tensors)


def check_version(found: Json, where: str) -> None:
    """Raises BadInput unless `found` names the format and the version that are read here."""
    pair = found.get("format"), str(found.get("version"))
    if pair[0] != FORMAT or pair[1] not in map(str, READABLE):
        raise BadInput(f"{where} has format {pair[0]!r} version {pair[1]}, this program reads "
                       f"{FORMAT!r} version {' and '.join(map(str, READABLE))}: pack the model "
                       "again or update the program")


def metadata(
    config: Json, modules: Mapping[str, Json], tensors: Mapping[str, np.ndarray]
) -> dict[str, str]:
    """The metadata of the header, for a parsed config.json and all tensors of the file."""
    texts = {"config": json.dumps(config), "modules": json.dumps(modules)}
    sha256 = {name: text_checksum(text) for name, text in texts.items()}
    sha256 |= {name: checksum(value) for name, value in tensors.items()}
    return {"format": FORMAT, "version": str(VERSION), **texts, "sha256": json.dumps(sha256)}


def text_checksum(text: str) -> str:
    """SHA-256, in hexadecimal, of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def checksum(value: np.ndarray) -> str:
    """SHA-256, in hexadecimal, of dtype, shape and bytes (row-major, little endian) of a tensor.

    The text hashed before the bytes is such as `float16[2, 64]`.
    """
    digest = hashlib.sha256(f"{value.dtype}{list(value.shape)}".encode())
    digest.update(np.ascontiguousarray(value).view(np.uint8).data)
    return digest.hexdigest()


def part_names(node: Weight) -> PyTree[str]:
    """The tree of a packed node with each array replaced by its name within the module."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path, simple=True, separator="."), node
    )


def in_memory(array: np.ndarray, signs: int, version: int) -> np.ndarray:
    """An array of a file as a packed node holds it; rows of `signs` signs (0: it is not packed)."""
    return from_stored(array, signs) if signs and version > 3 else array


def stored_parts(node: Weight) -> dict[str, np.ndarray]:
    """The arrays of a packed node by their names within the module, as the file stores them."""
    counts = jax.tree.leaves(row_signs(node))
    return {name: to_stored(array, signs) if signs else array
            for (name, array), signs in zip(named_parts(node).items(), counts, strict=True)}


def named_parts(node: Weight) -> dict[str, np.ndarray]:
    """The arrays of a packed node by their names within the module."""
    names, arrays = (jax.tree.leaves(tree) for tree in (part_names(node), node))
    return {name: np.asarray(array) for name, array in zip(names, arrays, strict=True)}


def module_names(path: str, shape: tuple[int, ...]) -> list[str]:
    """Hugging Face modules of the kernel or embedding at `path`: one per layer of a stack
    `[l, i, o]`."""
    layers = range(shape[0]) if path.startswith("layers/") else [None]
    return [hf_name(path.rpartition("/")[0], layer) for layer in layers]


def module_table(shapes: Shapes, headers: Mapping[str, Sequence[Json]]) -> dict[str, Json]:
    """`modules` of the header: `headers` holds those of the layers of each packed kernel, by
    path."""
    return {
        module: header for path, own in headers.items()
        for module, header in zip(module_names(path, shapes[path]), own, strict=True)
    }


def packed_kernels(file: PackedFile, shapes: Shapes) -> dict[str, list[Weight]]:
    """Each packed kernel, and the embedding if it is packed, by path: the matrix of each layer as
    shapes and dtypes. Layers are alike, but for the k of sign paths.

    Raises:
      BadInput: the header's modules are not those of a model of these shapes.
    """
    kernels = {path: module_names(path, shape) for path, shape in shapes.items()
               if path.endswith(("/kernel", "/embedding"))}
    headers = {path: [_as_first(file.modules, m, modules[0]) for m in modules]
               for path, modules in kernels.items() if modules[0] in file.modules}
    nodes: dict[str, list[Weight]] = {}
    for path, own in headers.items():
        known: dict[str, Weight] = {}
        nodes[path] = []
        for module, header in zip(kernels[path], own, strict=True):
            text = json.dumps(header)
            if text not in known:
                known[text] = _outlined(file, module, header, shapes[path][-2:])
            nodes[path].append(known[text])
    wanted = module_table(shapes, headers)
    for name in [*wanted, *file.modules]:
        if file.modules.get(name) != wanted.get(name):
            raise BadInput(f"module {name} in {file.path} is {file.modules.get(name)}, the config "
                           f"and the other layers ask for {wanted.get(name)}: pack it again")
    return nodes


def _as_first(modules: Mapping[str, Json], name: str, first: str) -> Json:
    """The header that a module should have: that of the first layer, with its own k of sign
    paths."""
    header, found = modules[first], modules.get(name, {})
    mixed = header.get("type") == PackedSign.header_type and "k" in found
    return {**header, "k": found["k"]} if mixed else header


def _outlined(file: PackedFile, module: str, header: Json, shape: tuple[int, ...]) -> Weight:
    """The node of a header, of a matrix that the config says is `shape`."""
    try:
        node = abstract_packed(header)
    except BadInput as error:
        raise BadInput(f"module {module} in {file.path}: {error}; pack the model again "
                       "or update the program") from None
    if node.shape != shape:
        raise BadInput(f"module {module} in {file.path} is {list(node.shape)}, "
                       f"the config asks for {list(shape)}: pack it again")
    return node


def check_tensors(
    file: PackedFile, shapes: Shapes, nodes: Mapping[str, Sequence[Weight]]
) -> None:
    """Raises BadInput, with its name, for a tensor that is missing, misshapen or not asked for."""
    wanted = dict(_wanted(shapes, nodes, file.version))
    found = set(file.tensors.keys())
    for name, (shape, dtypes) in wanted.items():
        if name not in found:
            raise BadInput(f"missing tensor {name} {list(shape)} in {file.path}")
        stored = file.tensors.get_slice(name)
        if tuple(stored.get_shape()) != shape or stored.get_dtype() not in dtypes:
            raise BadInput(f"tensor {name} in {file.path} is {stored.get_dtype()} "
                           f"{stored.get_shape()}, wanted {' or '.join(dtypes)} {list(shape)}")
    if extra := sorted(found - set(wanted)):
        raise BadInput(f"extra tensor {extra[0]} in {file.path}, the config asks for none of that "
                       "name")


def _wanted(
    shapes: Shapes, nodes: Mapping[str, Sequence[Weight]], version: int
) -> Iterator[tuple[str, tuple]]:
    """Name and `(shape, dtypes)` of every tensor of the file."""
    for path, shape in shapes.items():
        if path not in nodes:
            yield from ((name, (inner, OTHERS)) for name, inner in tensor_names(path, shape))
            continue
        for module, node in zip(module_names(path, shape), nodes[path], strict=True):
            parts = map(jax.tree.leaves, (part_names(node), node, row_signs(node)))
            for part, leaf, signs in zip(*parts, strict=True):
                stored = (*leaf.shape[:-1], stored_bytes(signs))
                tailed = signs and version > 3
                yield f"{module}.{part}", (stored if tailed else leaf.shape,
                                           (_DTYPES[str(leaf.dtype)],))


def nearest_16bit(value: Array | np.ndarray, name: str) -> np.ndarray:
    """`value` in float16 or bfloat16, whichever has the smaller largest error; float16 on a tie.

    So a model trained in bfloat16 is stored exactly, and a small float32 one with float16's three
    more bits, unless a value lies beyond float16's range.

    Raises:
      BadInput: a value is not finite; the message begins with `name`.
    """
    wide = np.asarray(value).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = [wide.astype(jnp.dtype(dtype)) for dtype in ("float16", "bfloat16")]
        errors = [np.max(np.abs(r.astype(np.float32) - wide), initial=0) for r in rounded]
    best = int(np.argmin(errors))
    if not np.isfinite(errors[best]):
        raise BadInput(f"{name} holds a value that is not finite or leaves the range of bfloat16, "
                       "it cannot be stored: look where the training went wrong")
    return rounded[best]


def save_packed_params(file: str | Path, params: Params) -> Path:
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
        headers[name] = cast(WeightNode, leaf).header()
        tensors |= {f"{name}.{part}": array for part, array in stored_parts(leaf).items()}
    if not headers:
        raise BadInput("the params hold no packed weight: convert and pack them first")
    tensors = {name: np.ascontiguousarray(a) if a.ndim else a for name, a in tensors.items()}
    _write(file, tensors, metadata({"params": keys}, headers, tensors))
    return file


def load_packed_params(file: str | Path) -> Params:
    """Reads and verifies what `save_packed_params` wrote: the same tree, to the bit.

    Raises:
      BadInput: no such file, a truncated or altered one, another format or version, or the file of
        a packed language model.
    """
    params: Params = {}
    with open_packed(Path(file)) as packed:
        paths = packed.config.get("params")
        if paths is None:
            raise BadInput(f"{file} is that of a language model: read its folder by load_packed")
        for name, keys in paths.items():
            branch = params
            for key in keys[:-1]:
                branch = branch.setdefault(key, {})
            branch[keys[-1]] = _read_params(packed, name)
    return params


def _key(entry: object) -> str | int:
    key = getattr(entry, "key", None)
    if not isinstance(entry, jax.tree_util.DictKey) or not isinstance(key, str | int):
        raise BadInput(f"the params have the entry {entry}, wanted nested dicts with keys that are "
                       "text or whole numbers; of an NNX model take nnx.to_pure_dict(state)")
    return key


def _read_params(packed: PackedFile, name: str) -> Param:
    try:
        if name not in packed.modules:
            return jnp.asarray(packed.read(name))
        node = abstract_packed(packed.modules[name])
        return jax.tree.map(
            lambda part, signs: jnp.asarray(packed.read_part(f"{name}.{part}", signs)),
            part_names(node), row_signs(node))
    except SafetensorError as error:
        raise BadInput(f"{packed.path} lacks a tensor of {name}: fetch it again") from error


def _write(file: Path, tensors: dict[str, np.ndarray], header: dict[str, str]) -> None:
    try:
        write_tensors(file, tensors, header)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"cannot write {file}: {error}") from error
