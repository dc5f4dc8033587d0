"""A params tree prepared for decoding: matrices joined, packed signs laid out for the device.

Axes: i in, o out, l layers, d model, v vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from flax.traverse_util import flatten_dict

from rabit_jax.models.config import ModelConfig
from rabit_jax.models.decoder import check_params, param_shapes
from rabit_jax.tree import is_weight
from rabit_jax.weights.laid import lay
from rabit_jax.weights.seam import linear
from rabit_jax.weights.sign_paths import PackedSign

# What reads the same input, and the bytes of fixed point its input gets on integer kernels: that of
# `down` has outliers hundreds of times its mean, so it gets three.
GROUPS = {("q", "k", "v"): 2, ("o",): 2, ("gate", "up"): 2, ("down",): 3}


@struct.dataclass
class Engine:
    """A decoder's weights as `step` reads them; made by `prepare`.

    Attributes:
      embed: `[v, d]`.
      head: `[d, v]` as an array, `Rows`, a weight node or a laid weight of one layer; None where
        the head is the embedding.
      norms: those of the blocks `[l, d]`, of q and k `[l, h]` where there are any, by the last
        part of their paths, and `final_norm` `[d]`.
      products: by the names of the matrices that are joined in it, such as "q k v": a laid weight
        with `matmul_at(x, layer)`, or a tuple with a matrix or weight node for each layer.
      biases: `[l, o]` by the name of the matrix.
      config: the decoder's; its dtype is that of the products.
    """

    embed: jax.Array
    head: Any
    norms: dict[str, jax.Array]
    products: dict[str, Any]
    biases: dict[str, jax.Array]
    config: ModelConfig = struct.field(pytree_node=False)


@struct.dataclass
class Rows:
    """A 16-bit matrix that lies `[o, i]`, the order in which a CPU multiplies it fastest."""

    rows: jax.Array

    def matmul(self, x: jax.Array) -> jax.Array:
        """`x: [..., i]` to float32 `[..., o]`.

        XLA's CPU product has no 16-bit path for a single row: it would first widen the whole
        matrix, which takes 18 times as long. So a single row is multiplied as two.
        """
        flat = x.reshape(-1, x.shape[-1])
        n = flat.shape[0]
        flat = jnp.pad(flat, ((0, 1), (0, 0))) if n == 1 else flat
        y = jnp.einsum("bi,oi->bo", flat, self.rows, preferred_element_type=jnp.float32)
        return y[:n].reshape(*x.shape[:-1], -1)


def prepare(config: ModelConfig, params: Any) -> Engine:
    """The params of a decoder, laid out for `step`.

    Packed signs of one k that read the same input become one `LaidSign` (q, k, v; gate, up), other
    packed signs and `PackedLowRank` are laid alone; dense matrices that read the same input are
    joined too. All others keep their form, one node per layer.

    Args:
      config: of the decoder.
      params: its params, dense, packed, in training form or mixed. Matrices are
        copied, so drop them after this where memory counts.

    Returns:
      The engine. Dense matrices are cast once to `config.dtype`, as `Decoder` casts them at each
      product; on a CPU, which has no float16 arithmetic, a float16 model computes in float32.

    Raises:
      BadInput: params that do not fit the config; the message names the path.

    Example:
      >>> engine = prepare(model.config, params)
      >>> logits, cache = step(engine, tokens, init_cache(engine.config, batch=1, slots=128))
    """
    check_params(flatten_dict(params, sep="/"), param_shapes(config))
    platform = jax.devices()[0].platform
    if platform == "cpu" and config.dtype == "float16":
        config = dataclasses.replace(config, dtype="float32")
    params = jax.tree.map(jnp.asarray, params)
    layers = params["layers"]
    inner = {**layers["attn"], **layers["mlp"]}
    parts = {name: part for name, part in inner.items() if "kernel" in part}
    products = {}
    for group, limbs in GROUPS.items():
        for names in _alike(group, parts):
            nodes = [parts[name]["kernel"] for name in names]
            products[" ".join(names)] = _product(nodes, config, platform, limbs)
    norms = {name: part["scale"] for name, part in {**layers, **inner}.items() if "scale" in part}
    norms["final_norm"] = params["final_norm"]["scale"]
    biases = {name: part["bias"] for name, part in parts.items() if "bias" in part}
    embed, head = _ends(params, config, platform)
    return Engine(embed, head, norms, products, biases, config)


def multiply(x: jax.Array, w: Any) -> jax.Array:
    """`x W` in `x.dtype` of one matrix as `for_device` gives it, or of a weight node."""
    return w.matmul(x).astype(x.dtype) if isinstance(w, Rows) else linear(x, w)


def _alike(group: Sequence[str], parts: Any) -> list[list[str]]:
    """The names of a group in sets that can be joined: dense, packed signs of one k, or one."""
    sets: dict[Any, list[str]] = {}
    for name in group:
        node = parts[name]["kernel"]
        kind = node.k if isinstance(node, PackedSign) else (name if is_weight(node) else "dense")
        sets.setdefault(kind, []).append(name)
    return list(sets.values())


def _product(nodes: list[Any], config: ModelConfig, platform: str, limbs: int) -> Any:
    """The joined weights of all layers: laid, or a tuple of one matrix or node for each layer."""
    laid = lay(nodes, platform, limbs) if is_weight(nodes[0]) else None
    if laid is not None:
        return laid
    if is_weight(nodes[0]):
        node = _with_default(nodes[0], limbs)
        return tuple(_node(node, n) for n in range(config.n_layers))
    matrices = (_matrix(nodes, n, config.dtype) for n in range(config.n_layers))
    return tuple(for_device(matrix, platform) for matrix in matrices)


def _with_default(node: Any, limbs: int) -> Any:
    """The node with `limbs` in packed signs within it that do not say theirs."""
    def is_sign(n: Any) -> bool:
        return isinstance(n, PackedSign)

    return jax.tree.map(lambda n: n.replace(limbs=n.limbs or limbs) if is_sign(n) else n, node,
                        is_leaf=is_sign)


@jax.jit
def _node(node: Any, layer: Any) -> Any:
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, layer, keepdims=False), node)


@functools.partial(jax.jit, static_argnums=2)
def _matrix(kernels: list[jax.Array], layer: Any, dtype: str) -> jax.Array:
    """One layer of stacked kernels `[l, i, o]`, joined along their outputs."""
    return jnp.concatenate([_node(kernel, layer).astype(dtype) for kernel in kernels], axis=-1)


def for_device(matrix: jax.Array, platform: str) -> Any:
    """A matrix `[i, o]` as it lies best: `Rows` for 16 bits on a CPU, else as it is."""
    return Rows(matrix.T) if _turned(matrix, platform) else matrix


def _turned(matrix: jax.Array, platform: str) -> bool:
    return platform == "cpu" and matrix.dtype.itemsize == 2


def _ends(params: Any, config: ModelConfig, platform: str) -> tuple[jax.Array, Any]:
    """The embedding and the head of an engine."""
    table = params["embed"]["embedding"].astype(config.dtype)
    if config.tied_head:
        return table, Rows(table) if _turned(table, platform) else None
    head = params["head"]["kernel"]
    if is_weight(head):
        return table, lay([jax.tree.map(lambda a: a[None], head)], platform) or head
    return table, for_device(head.astype(config.dtype), platform)
