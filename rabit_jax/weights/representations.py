"""The list of weight representations: specs by config type, packed nodes by header type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rabit_jax.errors import BadInput
from rabit_jax.weights.codebook import CodebookSpec, PackedCodebook
from rabit_jax.weights.dual_binary import DualBinarySpec, PackedDualBinary
from rabit_jax.weights.frozen_path import FrozenPathSpec
from rabit_jax.weights.group_uniform import GroupUniformSpec, PackedGroupUniform
from rabit_jax.weights.independent_sign import IndependentSignSpec
from rabit_jax.weights.low_rank_sign import LowRankSignSpec, PackedLowRank
from rabit_jax.weights.reshaped import Reshaped
from rabit_jax.weights.residual_sign import ResidualSignSpec
from rabit_jax.weights.scaled_weight import ScaledSpec, ScaledWeight
from rabit_jax.weights.sign_paths import PackedSign
from rabit_jax.weights.sum_weight import SumSpec, SumWeight
from rabit_jax.weights.uniform_residual import UniformResidualSpec

# What stands under `init.spec` in a config; the field `type` tells which.
SPECS = (
    ResidualSignSpec,
    IndependentSignSpec,
    FrozenPathSpec,
    UniformResidualSpec,
    LowRankSignSpec,
    GroupUniformSpec,
    DualBinarySpec,
    CodebookSpec,
    ScaledSpec,
    SumSpec,
)
PACKED_TYPES = {
    "sign": PackedSign,
    "low_rank": PackedLowRank,
    "group_uniform": PackedGroupUniform,
    "dual_binary": PackedDualBinary,
    "codebook": PackedCodebook,
    "sum": SumWeight,
    "scaled": ScaledWeight,
    "reshaped": Reshaped,
}


def abstract_packed(header: Mapping[str, Any]) -> Any:
    """The packed node of one matrix as shapes and dtypes, from what its `header()` returned.

    Raises:
      BadInput: a type that this version does not know, or fields that are missing or of no sense.
    """
    kind = header.get("type") if isinstance(header, Mapping) else None
    if kind not in PACKED_TYPES:
        raise BadInput(
            f"a packed weight has the type {kind!r}: the types are {', '.join(PACKED_TYPES)}"
        )
    try:
        return PACKED_TYPES[kind].abstract(header)
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"the header of a packed {kind} weight is damaged ({error})") from error


def is_packed_node(node: Any) -> bool:
    """Whether a weight node is in its deployed form, all terms of a sum included."""
    if isinstance(node, SumWeight):
        return all(map(is_packed_node, node.terms))
    if isinstance(node, ScaledWeight):
        return is_packed_node(node.inner)
    if isinstance(node, Reshaped):
        return is_packed_node(node.matrix)
    return isinstance(node, tuple(PACKED_TYPES.values()))
