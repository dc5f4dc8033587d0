"""A params tree prepared for decoding: matrices joined, packed signs laid out for the device.

Axes: i in, o out, l layers, d model, v vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Float

from rabit_jax.errors import BadInput
from rabit_jax.models.cache import check_bits
from rabit_jax.models.config import ModelConfig, compute_dtype
from rabit_jax.models.decoder import check_params, param_shapes
from rabit_jax.tree import is_weight, leaves, pytree_dataclass
from rabit_jax.types import Array, Json, Param, Params, Weight
from rabit_jax.weights.laid import (
    Laid,
    LaidCodes,
    LaidGroupedSign,
    LaidLowRank,
    LaidSign,
    LaidTable,
    joins,
    lay,
    lay_table,
)
from rabit_jax.weights.mixed_stack import unstacked
from rabit_jax.weights.seam import linear
from rabit_jax.weights.sign_paths import PackedSign

# Matrices that read the same input, and the bytes of fixed point that the input gets on integer
# kernels: that of `down` has outliers hundreds of times its mean, so it gets three.
GROUPS = {("q", "k", "v"): 2, ("o",): 2, ("gate", "up"): 2, ("down",): 3}
LAID = (LaidSign, LaidLowRank, LaidCodes, LaidGroupedSign)

P = TypeVar("P")
Kernel: TypeAlias = "Param | At | Beside | Rows"  # of one layer
Kernels: TypeAlias = "Laid | tuple[Kernel, ...]"  # of all layers
Head: TypeAlias = "Param | Laid | LaidTable | Rows"


@pytree_dataclass
class Engine:
    """A decoder's weights as `step` reads them; made by `prepare`.

    Attributes:
      embed: `[v, d]` as an array, a `Table`, or the laid codes of a tied head.
      layers: the subtree `layers` of the params. Matrices that are joined stand under their names
        with spaces, such as "q k v"; a kernel is a laid weight of all layers, or a tuple with a
        matrix or weight node for each layer.
      final_norm: `[d]`.
      head: `[d, v]` as an array, `Rows`, `LaidTable`, a weight node or a laid weight of one layer;
        None where the head is the embedding.
      config: the decoder's; its dtype is that of everything but the products, which have that of
        their matrix.
      cache_bits: of keys and values, for `init_cache`.
    """

    embed: Any
    layers: Params
    final_norm: Array
    head: Head | None
    config: ModelConfig = struct.field(pytree_node=False)
    cache_bits: int = struct.field(pytree_node=False, default=16)

    @property
    def products(self) -> Json:
        """The kernels of `layers` by the names of the matrices that are joined in them."""
        return {name: part["kernel"] for side in ("attn", "mlp")
                for name, part in self.layers[side].items() if "kernel" in part}


@pytree_dataclass
class At:
    """One layer of a laid weight; nothing is copied."""

    weight: Laid
    layer: Array


@pytree_dataclass
class Beside:
    """Laid weights of one layer that read the same input, their outputs side by side."""

    members: tuple[At, ...]

    def matmul(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        """`x [W_1 ... W_m]`."""
        return jnp.concatenate([multiply(x, one) for one in self.members], axis=-1)


@pytree_dataclass
class Rows:
    """A 16-bit matrix that lies `[o, i]`, the order in which a CPU multiplies it fastest."""

    rows: Float[Array, "o i"]

    def matmul(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        """`x W` in float32.

        XLA's CPU product has no 16-bit path for a single row: it would first widen the whole
        matrix, which takes 18 times as long. So a single row is multiplied as two.
        """
        flat = x.reshape(-1, x.shape[-1]).astype(self.rows.dtype)
        n = flat.shape[0]
        flat = jnp.pad(flat, ((0, 1), (0, 0))) if n == 1 else flat
        y = jnp.einsum("bi,oi->bo", flat, self.rows, preferred_element_type=jnp.float32)
        return y[:n].reshape(*x.shape[:-1], -1)


def prepare(
    config: ModelConfig, params: Params, head_bits: int | None = None, cache_bits: int = 16,
    activation_bits: int = 16,
) -> Engine:
    """The params of a decoder, laid out for `step`.

    Packed signs of one k that read the same input become one `LaidSign` (q, k, v; gate, up),
    and evenly spaced levels of the same bits and group one `LaidCodes` or `LaidGroupedSign`;
    other such weights, `PackedGroupedSign` and `PackedLowRank` are laid alone; dense matrices
    that read the same input are joined too. All others keep their form, one node per layer. An
    embedding that is a `Table` is looked up as it is stored, and laid where the head is tied to
    it.

    Args:
      config: of the decoder.
      params: its params, dense, packed, in training form or mixed. Matrices are
        copied, so drop them after this where memory counts.
      head_bits: 8 rounds a dense head to 8 bits with one scale for each token, which a CPU reads
        in a quarter of the time of float32; None leaves it as it is. The embedding stays as it is
        also where the head is the embedding.
      cache_bits: of the keys and values of generated text: 16 keeps them in the compute dtype (on a
        CPU float32), 8 or 4 in `models.cache.Codes`.
      activation_bits: of what the packed sign paths of the blocks multiply, where they multiply few
        rows: 16 gives an input of a matrix one scale and at least 16 bits, 8 gives each 256 of
        them a scale, see `byte_activations`. All other weights, the head among them, stay as they
        are.

    Returns:
      The engine. Dense matrices are cast once to `config.dtype`, as `Decoder` casts them at each
      product; see `compute_dtype`. Between products a CPU computes in float32: it has no bfloat16
      arithmetic, and XLA's conversions took four times as long as packed products.

    Raises:
      BadInput: params that do not fit the config, the message names the path; or `head_bits` is
        neither 8 nor None, `cache_bits` none of 16, 8 and 4, `activation_bits` neither 16 nor 8.

    Example:
      >>> engine = prepare(model.config, params)
      >>> logits, cache = step(engine, tokens, init_cache(engine.config, batch=1, slots=128))
    """
    check_params(dict(leaves(params)), param_shapes(config))
    if head_bits not in (None, 8):
        raise BadInput(f"head_bits is {head_bits}, wanted 8, or None for the head as it is")
    check_bits(cache_bits)
    if activation_bits not in (16, 8):
        raise BadInput(f"activation_bits is {activation_bits}, wanted 16 or 8")
    platform = jax.devices()[0].platform
    config = dataclasses.replace(config, dtype=compute_dtype(config))
    params = jax.tree.map(jnp.asarray, params)
    layers = {side: _joined(part, config, platform) if side in ("attn", "mlp") else part
              for side, part in params["layers"].items()}
    table, head = _ends(params, config, platform, head_bits)
    if platform == "cpu":
        # A factor of the embedding keeps the rounding of the model's dtype.
        scale = float(np.asarray(config.embed_scale, jnp.dtype(config.dtype)))
        config = dataclasses.replace(config, dtype="float32", embed_scale=scale)
    engine = Engine(table, layers, params["final_norm"]["scale"], head, config, cache_bits)
    return byte_activations(engine) if activation_bits == 8 else engine


def byte_activations(engine: Engine) -> Engine:
    """The engine with 8 bits for the activations of the blocks' sign paths; nothing is copied.

    Each `LaidSign` of the layers, which has scales of rows and columns, multiplies `h x` rounded by
    `kernels.activations.rounded_blocks`, also where its file wants 3 bytes. Weights with groups,
    of low rank, with levels, sums and dense ones stay as they are. Where one dense matrix
    multiplies many rows, such as a prompt, a CPU with bfloat16 products takes those, whose rounding
    is 10 times finer, and others round nothing: see `kernels.matmul.packed_matmul`.
    """
    def one(leaf: Any) -> Any:
        if not isinstance(leaf, LaidSign):
            return leaf
        return dataclasses.replace(leaf, limbs=1, short=True)

    layers = jax.tree.map(one, engine.layers, is_leaf=lambda leaf: isinstance(leaf, LaidSign))
    return dataclasses.replace(engine, layers=layers)


def layer_at(engine: Engine, layer: int | Array) -> Params:
    """The params of one layer, as `block` reads them with `multiply`."""
    def at(leaf: Kernels) -> Kernel:
        if isinstance(leaf, tuple):
            return leaf[layer]
        if isinstance(leaf, LAID):
            return At(leaf, jnp.asarray(layer))
        return jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)

    return jax.tree.map(at, engine.layers, is_leaf=lambda leaf: isinstance(leaf, (tuple, *LAID)))


def multiply(x: Float[Array, "... i"], w: Kernel) -> Float[Array, "... o"]:
    """`x W` in `x.dtype` of a kernel of `layer_at`: `At`, `Beside`, `Rows`, array or weight."""
    if isinstance(w, At):
        return w.weight.matmul_at(x, w.layer)
    return w.matmul(x).astype(x.dtype) if isinstance(w, (Rows, Beside)) else linear(x, w)


def _joined(part: Params, config: ModelConfig, platform: str) -> Params:
    """The params of attention or MLP of all layers, joined where they read the same input."""
    kernels = {name: own["kernel"] for name, own in part.items() if "kernel" in own}
    found = {name: own for name, own in part.items() if name not in kernels}
    for group, limbs in GROUPS.items():
        for names in _alike([name for name in group if name in kernels], kernels):
            product = _product([kernels[name] for name in names], config, platform, limbs)
            own: dict[str, Kernels | Array] = {"kernel": product}
            biases = [part[name]["bias"].astype(config.dtype)
                      for name in names if "bias" in part[name]]
            if biases:
                own["bias"] = jnp.concatenate(biases, axis=-1)
            found[" ".join(names)] = own
    return found


def _alike(group: Sequence[str], kernels: Mapping[str, Param]) -> list[list[str]]:
    """The names of a group in sets that can be joined: dense, packed alike, or one."""
    sets: dict[Hashable, list[str]] = {}
    for name in group:
        node = kernels[name]
        kind = "mixed" if _mixed(node) else (joins(node) or name) if is_weight(node) else "dense"
        sets.setdefault(kind, []).append(name)
    return list(sets.values())


def _product(nodes: list[Any], config: ModelConfig, platform: str, limbs: int) -> Kernels:
    """The joined weights of all layers: laid, or a tuple of one matrix or node for each layer."""
    short = config.dtype == "bfloat16"
    if _mixed(nodes[0]):
        layers = zip(*map(unstacked, nodes), strict=True)
        return tuple(_beside(own, platform, limbs, short) for own in layers)
    laid = lay(nodes, platform, limbs, short) if is_weight(nodes[0]) else None
    if laid is not None:
        return laid
    if is_weight(nodes[0]):
        node = _with_default(nodes[0], limbs)
        return tuple(_index(node, n) for n in range(config.n_layers))
    matrices = (_matrix(nodes, n, config.dtype) for n in range(config.n_layers))
    return tuple(for_device(matrix, platform) for matrix in matrices)


def _mixed(node: object) -> bool:
    """Whether the layers of a packed stack have different numbers of paths."""
    return isinstance(node, PackedSign) and node.layer_k is not None


def _beside(nodes: Sequence[PackedSign], platform: str, limbs: int, short: bool) -> At | Beside:
    """The laid weights of one layer `[i, o]` that read the same input; those of one k that follow
    each other are joined."""
    found = []
    for _, own in itertools.groupby(nodes, lambda node: node.k):
        laid = lay([jax.tree.map(lambda a: a[None], n) for n in own], platform, limbs, short)
        found.append(At(cast(Laid, laid), jnp.int32(0)))
    return found[0] if len(found) == 1 else Beside(tuple(found))


def _with_default(node: Weight, limbs: int) -> Weight:
    """The node with `limbs` in those packed signs within it that have none of their own."""
    def is_sign(n: object) -> bool:
        return isinstance(n, PackedSign)

    return jax.tree.map(lambda n: n.replace(limbs=n.limbs or limbs) if is_sign(n) else n, node,
                        is_leaf=is_sign)


@jax.jit
def _index(node: P, layer: int | Array) -> P:
    """One layer of an array or a weight node whose leaves have a leading axis of layers."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, layer, keepdims=False), node)


@functools.partial(jax.jit, static_argnums=2)
def _matrix(kernels: list[Array], layer: int, dtype: str) -> Array:
    """One layer of stacked kernels `[l, i, o]`, joined along their outputs."""
    return jnp.concatenate([_index(kernel, layer).astype(dtype) for kernel in kernels], axis=-1)


def for_device(matrix: Float[Array, "i o"], platform: str) -> Array | Rows:
    """A matrix in its fastest layout: `Rows` for 16 bits on a CPU, else as it is."""
    return Rows(matrix.T) if _turned(matrix, platform) else matrix


def _turned(matrix: Array, platform: str) -> bool:
    return platform == "cpu" and matrix.dtype.itemsize == 2


def _ends(
    params: Params, config: ModelConfig, platform: str, head_bits: int | None
) -> tuple[Head, Head | None]:
    """The embedding and the head of an engine."""
    table: Any = params["embed"]["embedding"]
    table = table if is_weight(table) else table.astype(config.dtype)
    head: Any = params["head"]["kernel"] if not config.tied_head else None
    if head_bits is not None and not is_weight(table if head is None else head):
        rows = params["embed"]["embedding"] if head is None else head.T
        return table, lay_table(rows, platform)
    if config.tied_head and isinstance(table, jax.Array):
        return table, Rows(table) if _turned(table, platform) else None
    head = table.T if head is None else head
    if not is_weight(head):
        return table, for_device(head.astype(config.dtype), platform)
    head = lay([jax.tree.map(lambda a: a[None], head)], platform) or head
    # The rows of codes serve both, so that the table is held once.
    tied = config.tied_head and isinstance(head, LaidCodes | LaidGroupedSign)
    return head if tied else table, head
