"""A packed weight whose scales and levels train, while its signs and codes stay what they are."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Float

from rabit_jax.signs.ste import F32
from rabit_jax.tree import map_leaves, pytree_dataclass
from rabit_jax.types import Array, Param, Params
from rabit_jax.weights.axes import Leaf
from rabit_jax.weights.costs import Cost
from rabit_jax.weights.group_levels import to_half
from rabit_jax.weights.leaves import WeightNode, declaration, part
from rabit_jax.weights.mixed_stack import stacked, unstacked
from rabit_jax.weights.representations import is_packed_node
from rabit_jax.weights.table import Table

TRAINED = ("scale", "level")


@pytree_dataclass
class FixedWeight(WeightNode):
    """`W_hat` of a packed weight with its scales and levels in float32, which train.

    There is no latent, so a stack of these takes little more memory than the packed model, and the
    optimiser's state is that of scales alone: the end-to-end stage of EfficientQAT
    (arXiv 2407.11062) for any representation. Gradients are exact, for nothing is rounded.

    Attributes:
      packed_weight: a packed node `[..., i, o]`, its scales and levels float32.

    Example:
      >>> node = fixed({"w": ResidualSignSpec(k=2).init(w).pack("w")})["w"]
      >>> node.roles().packed_weight
      PackedSign(bits='sign', g='scale', h='scale', limbs=None)
    """

    packed_weight: WeightNode = part()

    paths_of = "packed_weight"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape `[..., i, o]` of the matrix."""
        return self.packed_weight.shape

    def dense(self) -> Float[Array, "... i o"]:
        """`W_hat`, float32 `[..., i, o]`."""
        return self.packed_weight.dense()

    def paths(self) -> Iterator[Array]:
        """The paths of the packed weight, float32 `[..., i, o]`."""
        return self.packed_weight.paths()

    def pack(self, name: str) -> WeightNode:
        """The packed weight with its scales and levels rounded to 16 bits.

        Raises:
          BadInput: one of them leaves the float16 range; the message begins with `name`.
        """
        lead = len(self.shape) - 2
        if getattr(self.packed_weight, "layer_k", None) is not None:
            # Scales of 0 are right where a layer has fewer paths, and nowhere else.
            layers = [FixedWeight(one).pack(f"{name} of layer {n}")
                      for n, one in enumerate(unstacked(self.packed_weight))]
            return stacked(layers)

        def rounded(declared: Leaf, array: Array) -> Array:
            if declared.role not in TRAINED:
                return array
            return to_half(array, declared.role, name, lead, declared.role == "scale")

        return jax.tree.map(rounded, declaration(self.packed_weight), self.packed_weight)

    def cost(self) -> Cost:
        """Cost per token of the packed weight."""
        return self.packed_weight.cost()


def fixed(params: Params) -> Params:
    """The tree with each packed weight as a `FixedWeight`; `pack` is its inverse.

    Example:
      >>> student = fixed(load_packed("runs/mine/packed")[1])
    """

    def leaf(path: str, node: Param) -> Param:
        if not is_packed_node(node):
            return node
        if isinstance(node, Table):  # which stays one that is looked up
            return node.replace(matrix=leaf(path, node.matrix))
        wide = jax.tree.map(
            lambda declared, a: jnp.asarray(a, F32 if declared.role in TRAINED else None),
            declaration(node), node,
        )
        return FixedWeight(wide)

    return map_leaves(leaf, params)
