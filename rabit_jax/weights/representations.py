"""The list of weight representations, and the packed nodes that headers describe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeGuard

from rabit_jax.errors import BadInput
from rabit_jax.weights.codebook import Codebook, CodebookSpec, PackedCodebook
from rabit_jax.weights.dual_binary import DualBinary, DualBinarySpec, PackedDualBinary
from rabit_jax.weights.frozen_path import FrozenPath, FrozenPathSpec
from rabit_jax.weights.group_uniform import GroupUniform, GroupUniformSpec, PackedGroupUniform
from rabit_jax.weights.independent_sign import IndependentSign, IndependentSignSpec
from rabit_jax.weights.leaves import Header, WeightNode, parts
from rabit_jax.weights.low_rank_sign import LowRankSign, LowRankSignSpec, PackedLowRank
from rabit_jax.weights.reshaped import Reshaped
from rabit_jax.weights.residual_sign import ResidualSign, ResidualSignSpec
from rabit_jax.weights.scaled_weight import ScaledSpec, ScaledWeight
from rabit_jax.weights.sign_paths import PackedSign
from rabit_jax.weights.sum_weight import SumSpec, SumWeight
from rabit_jax.weights.uniform_residual import UniformResidual, UniformResidualSpec


class Representation(NamedTuple):
    """Classes of one representation: what makes it, what trains, what is deployed.

    `spec` stands under `init.spec` in a config, where its `type` tells which; None for a weight
    that `convert` makes by itself. `packed.header_type` tells which in a packed file.
    """

    spec: Any
    trained: type[WeightNode]
    packed: type[WeightNode]


REPRESENTATIONS = (
    Representation(ResidualSignSpec, ResidualSign, PackedSign),
    Representation(IndependentSignSpec, IndependentSign, PackedSign),
    Representation(FrozenPathSpec, FrozenPath, PackedSign),
    Representation(UniformResidualSpec, UniformResidual, PackedSign),
    Representation(LowRankSignSpec, LowRankSign, PackedLowRank),
    Representation(GroupUniformSpec, GroupUniform, PackedGroupUniform),
    Representation(DualBinarySpec, DualBinary, PackedDualBinary),
    Representation(CodebookSpec, Codebook, PackedCodebook),
    Representation(ScaledSpec, ScaledWeight, ScaledWeight),
    Representation(SumSpec, SumWeight, SumWeight),
    Representation(None, Reshaped, Reshaped),
)
SPECS = tuple(one.spec for one in REPRESENTATIONS if one.spec is not None)
PACKED_TYPES = {one.packed.header_type: one.packed for one in REPRESENTATIONS}


def abstract_packed(header: Header) -> Any:
    """The packed node of one matrix as shapes and dtypes, from what its `header()` returned.

    Raises:
      BadInput: a type that this version does not know, or fields that are missing or of no sense.
    """
    kind = header.get("type") if isinstance(header, Mapping) else None
    if not isinstance(kind, str) or kind not in PACKED_TYPES:
        raise BadInput(
            f"a packed weight has the type {kind!r}: the types are {', '.join(PACKED_TYPES)}"
        )
    try:
        return PACKED_TYPES[kind].abstract(header, abstract_packed)
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise BadInput(f"the header of a packed {kind} weight is damaged ({error})") from error


def is_packed_node(node: Any) -> TypeGuard[WeightNode]:
    """Whether a weight node is in its deployed form, all parts of a composite included."""
    if not isinstance(node, tuple(PACKED_TYPES.values())):
        return False
    return all(map(is_packed_node, parts(node)))
