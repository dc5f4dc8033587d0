"""Packed models written to, read from and measured in model folders.

The tensors are in a file of `rabit_jax.formats.packed_file`, beside config.json, the tokenizer and
a model card.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from rabit_jax.errors import BadInput
from rabit_jax.formats.checkpoint import with_end_token_of, with_end_tokens
from rabit_jax.formats.families import HF_MODULES, tensor_names
from rabit_jax.formats.folder import (
    FILE,
    find_folder,
    json_files,
    read_json,
    write_folder,
)
from rabit_jax.formats.hf import load_hf
from rabit_jax.formats.hf_config import from_hf, to_hf
from rabit_jax.formats.model_card import CARD, kept_parts, packed_card
from rabit_jax.formats.packed_file import (
    FORMAT,
    METHOD,
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
    part_names,
    stored_parts,
)
from rabit_jax.formats.tokenizer import read_tokenizer
from rabit_jax.models.config import ModelConfig
from rabit_jax.models.decoder import Decoder, check_params, config_of, param_shapes
from rabit_jax.tree import is_weight, leaves
from rabit_jax.types import Array, Json, Params, Shape, Tokenizer, Weight
from rabit_jax.weights.description import describe
from rabit_jax.weights.leaves import WeightNode, row_signs
from rabit_jax.weights.mixed_stack import (
    check_paths,
    cut,
    has_paths,
    layer_headers,
    stacked,
    unstacked,
)
from rabit_jax.weights.representations import abstract_packed, is_packed_node

if TYPE_CHECKING:
    import tokenizers

# Without our quantiser transformers would only warn of an unknown method and load random weights.
# It reads the file that this entry names, and this one it refuses, naming what to do.
REFUSAL = {
    "transformers_weights": "packed: import rabit_jax.integrations.transformers before loading",
}

ENDS = (HF_MODULES["embed"], HF_MODULES["head"])


def save_packed(
    folder: str | Path, config: Decoder | ModelConfig, params: Params,
    tokenizer: Tokenizer | tokenizers.Tokenizer | None = None,
    extra: Json | None = None, generation: Json | None = None, base: str | None = None,
) -> Path:
    """Writes a packed model: config.json, model.safetensors, generation_config.json, tokenizer.

    A model card, README.md, is added. Everything is written beside the target and then renamed, so
    that nothing half-written remains; a model folder of that name is replaced. Params that are not
    packed (embedding, norms, head, biases) are stored in float16 or bfloat16, whichever is closer.

    Args:
      folder: where to write.
      config: of the decoder, or the decoder.
      params: its params, some or all kernels as packed weight nodes; see `rabit_jax.pack`.
      tokenizer: of transformers, or a plain `tokenizers.Tokenizer`.
      extra: further JSON fields for `quantization_config` of config.json, such as the spec that
        the weights were trained with.
      generation: content of generation_config.json besides the begin and end tokens.
      base: the model that was quantised, a hub id or another name for readers of the card.

    Returns:
      The folder.

    Raises:
      BadInput: params that do not fit the config, hold a weight node that is not packed or none
        at all, or a value that is not finite; a target that exists and is not a model folder; a
        full disk.

    Example:
      >>> folder = save_packed("runs/mine/packed", model.config, pack(params), tokenizer)
      >>> model, params, tokenizer = load_packed(folder)
    """
    config = config_of(config)
    flat, shapes = dict(leaves(params)), param_shapes(config)
    check_params(flat, shapes)
    headers = _headers(flat)
    tensors = _tensors(flat)
    raw = to_hf(config)
    header = metadata(raw, module_table(shapes, headers), tensors)
    types = sorted({one["type"] for own in headers.values() for one in own})
    quantization = {**(extra or {}), "quant_method": METHOD, "format": FORMAT, "version": VERSION,
                    "types": types}
    files = json_files({**raw, **REFUSAL, "quantization_config": quantization}, generation)
    sizes = describe(params)
    card = packed_card(Path(folder).name, sizes.bits_per_weight, sizes.stored_bits_per_weight, base,
                       whole_bits=sizes.whole_model_bits_per_weight,
                       kept=kept_parts(module_table(shapes, headers), config.tied_head))
    return write_folder(folder, [(FILE, tensors)], header, {**files, CARD: card}, tokenizer)


def load_packed(
    folder: str | Path, paths: int | None = None
) -> tuple[Decoder, Params, Tokenizer | None]:
    """Reads and verifies a packed model.

    Args:
      folder: written by `save_packed`, or the id of such a model on the hub.
      paths: how many sign paths of each matrix of the blocks are kept, see
        `weights.mixed_stack.first_paths`; None keeps all.

    Returns:
      `(Decoder, params, tokenizer)` as from `load_hf`, but packed kernels are packed weight nodes
      stacked over layers, a packed embedding is a `Table`, and the other params stay in the 16-bit
      dtype of the file.

    Raises:
      BadInput: no such folder or no packed model in it, a truncated or altered file, an unknown
        version, a missing, extra or misshapen tensor (the message names it), a tokenizer of another
        model.
    """
    folder = find_folder(folder)
    raw = read_json(folder / "config.json")
    if not is_packed(raw):
        raise BadInput(f"{folder} holds no packed model: the quantization_config of config.json "
                       f"names no quant_method {METHOD!r}")
    check_version(raw.pop("quantization_config"), f"{folder / 'config.json'}")
    for name in REFUSAL:  # which folders of 0.1 lack
        raw.pop(name, None)
    config = with_end_tokens(from_hf(raw), folder)
    tokenizer = read_tokenizer(folder, config)
    with open_packed(folder / FILE) as file:
        _check_config(file, raw, folder)
        shapes = param_shapes(config)
        nodes = packed_kernels(file, shapes)
        if paths is not None:
            check_paths(paths, [cast(WeightNode, node).sizes()["k"]
                                for path, own in nodes.items() for node in own
                                if path.startswith("layers/") and has_paths(node)])
        check_tensors(file, shapes, nodes)
        params = {path: _read(file, path, s, nodes.get(path), paths) for path, s in shapes.items()}
    model = Decoder(with_end_token_of(tokenizer, config))
    return model, unflatten_dict(params, sep="/"), tokenizer


def load_model(
    folder: str | Path, done: Callable[[int, int], None] = lambda ready, total: None,
    paths: int | None = None,
) -> tuple[Decoder, Params, Tokenizer | None]:
    """Reads a model to run it, whether it is packed or dense.

    Dense params are loaded in the dtype that config.json names for the matrix products, so that
    both kinds take the memory that they would take when deployed.

    Args:
      folder: a model folder, or a hub id.
      done: as for `load_hf`; not called for a packed model.
      paths: as for `load_packed`.

    Returns:
      `(Decoder, params, tokenizer)` of `load_packed` or `load_hf`.

    Raises:
      BadInput: as `load_packed` or `load_hf`; or `paths` of a dense model.
    """
    folder = find_folder(folder)
    raw = read_json(folder / "config.json")
    if is_packed(raw):
        return load_packed(folder, paths)
    if paths is not None:
        raise BadInput(f"{folder} holds a dense model, which has no sign paths: leave paths out")
    return load_hf(folder, dtype=from_hf(raw).dtype, done=done)


def is_packed(raw: Json) -> bool:
    """Whether a parsed config.json is that of a packed model."""
    quantization = raw.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == METHOD


def kept_in_16_bits(folder: str | Path) -> str:
    """What a packed model keeps in 16 bits besides its blocks, see `model_card.kept_parts`.

    Raises:
      BadInput: as `packed_bytes`.
    """
    with open_packed(Path(folder) / FILE) as file:
        return kept_parts(file.modules, bool(file.config.get("tie_word_embeddings")))


def packed_bytes(folder: str | Path) -> dict[str, float]:
    """Sizes of a packed model, counted from its file.

    Returns:
      `linear_bytes`: bits, codes and scales of the packed linears of the blocks (of embedding and
      head where nothing else is packed), padding included; `other_bytes`: all other tensors;
      `file_bytes`: size of model.safetensors with its header; `weights`: number of weights in those
      linears; `parameters`: numbers that all tensors stand for;
      `bits_per_weight`: without the padding;
      `stored_bits_per_weight = 8 linear_bytes / weights`, which is `k + 16 k (i + o) / (i o)` for k
      sign paths if i is a multiple of 64, and more if i is padded to one;
      `whole_model_bits_per_weight = 8 (linear_bytes + other_bytes) / parameters`, that of
      `describe`: all tensors, without the header of the file.

    Raises:
      BadInput: a file that is missing, truncated or of another format.
    """
    path = Path(folder) / FILE
    try:
        with open_packed(path) as file:
            sizes, modules = file.sizes(), file.modules
        packed = {m: sum(sizes[f"{m}.{part}"] for part in _parts(h)) for m, h in modules.items()}
        counts = {m: h["in"] * h["out"] for m, h in modules.items()}
        blocks = [m for m in modules if m not in ENDS] or list(modules)
        linear, weights = (sum(one[m] for m in blocks) for one in (packed, counts))
        nominal = sum(abstract_packed(modules[m]).bits_per_weight() * counts[m] for m in blocks)
        arrays = sum(sizes.values()) - sum(packed.values())  # in 16 bits each
    except (KeyError, TypeError) as error:
        raise BadInput(f"the header of {path} names {error}, which the file lacks: fetch it "
                       "again") from error
    total, parameters = sum(sizes.values()), sum(counts.values()) + arrays // 2
    return {
        "linear_bytes": linear, "other_bytes": total - linear,
        "file_bytes": path.stat().st_size, "weights": weights, "parameters": parameters,
        "bits_per_weight": nominal / weights,
        "stored_bits_per_weight": 8 * linear / weights,
        "whole_model_bits_per_weight": 8 * total / parameters,
    }


def _parts(header: Json) -> list[str]:
    """Names of the arrays of one packed module."""
    return jax.tree.leaves(part_names(abstract_packed(header)))


def _headers(params: Params) -> dict[str, list[Json]]:
    """Headers of the layers of each packed kernel by path; raises BadInput for nodes that cannot be
    stored."""
    nodes = {path: leaf for path, leaf in params.items() if is_weight(leaf)}
    if not nodes:
        raise BadInput("the params hold no packed weight: pack them, or save a dense model by "
                       "save_hf")
    headers = {}
    for path, node in nodes.items():
        if not is_packed_node(node):
            raise BadInput(f"{path} is a {type(node).__name__}, wanted a packed weight: pack the "
                           "params first")
        node = cast(WeightNode, node)
        headers[path] = layer_headers(node) if path.startswith("layers/") else [node.header()]
        _check_parts(path, node, node.header())
    return headers


def _check_parts(path: str, node: WeightNode, header: Json) -> None:
    """Raises BadInput for an array whose shape or dtype differs from the node's own header."""
    one, lead = abstract_packed(header), node.shape[:-2]
    names = jax.tree.leaves(part_names(one))
    for name, wanted, found in zip(names, *map(jax.tree.leaves, (one, node)), strict=True):
        if found.shape != (*lead, *wanted.shape) or found.dtype != wanted.dtype:
            raise BadInput(f"{path} has {name} {found.dtype}{list(found.shape)}, wanted "
                           f"{wanted.dtype}{[*lead, *wanted.shape]}")


def _tensors(params: Params) -> dict[str, np.ndarray]:
    """All tensors of the file, by name."""
    out = {}
    for path, leaf in params.items():
        stacked = path.startswith("layers/")
        if is_weight(leaf):
            layers = unstacked(jax.tree.map(np.asarray, leaf)) if stacked else [leaf]
            for one, module in zip(layers, module_names(path, leaf.shape), strict=True):
                out |= {f"{module}.{name}": a for name, a in stored_parts(one).items()}
            continue
        stored = nearest_16bit(leaf, path)
        names = tensor_names(path, stored.shape)
        for (name, _), row in zip(names, stored if stacked else [stored], strict=True):
            out[name] = np.ascontiguousarray(row.T if path.endswith("/kernel") else row)
    return out


def _check_config(file: PackedFile, raw: Json, folder: Path) -> None:
    """Raises BadInput if config.json was edited after packing, which would silently change the text
    that the model writes."""
    for name in {**raw, **file.config}:
        found, wanted = raw.get(name), file.config.get(name)
        if found != wanted:
            raise BadInput(f"{name} is {found!r} in {folder / 'config.json'} and {wanted!r} in the "
                           f"header of {FILE}: restore config.json")


def _read(
    file: PackedFile, path: str, shape: Shape, nodes: list[Weight] | None, paths: int | None
) -> Array | Weight:
    """One parameter: an array, or the packed weight whose layers have the abstract form `nodes`,
    stacked over layers; of a weight of sign paths the first `paths`."""
    if nodes is not None:
        found = [
            jax.tree.map(lambda part, signs, m=module: file.read_part(f"{m}.{part}", signs),
                         part_names(node), row_signs(node))
            for module, node in zip(module_names(path, shape), nodes, strict=True)
        ]
        node = stacked(found) if path.startswith("layers/") else found[0]
        node = jax.tree.map(jnp.asarray, node)
        return node if paths is None else cut(path, node, paths)
    rows = [file.read(name) for name, _ in tensor_names(path, shape)]
    return _stack([row.T for row in rows] if path.endswith("/kernel") else rows, path)


def _stack(rows: list[np.ndarray], path: str) -> Array:
    return jnp.asarray(np.stack(rows) if path.startswith("layers/") else rows[0])
