"""The list of weight representations, and the packed nodes that headers describe."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import (
    Literal,
    NamedTuple,
    TypeGuard,
    get_args,
    get_origin,
    get_type_hints,
)

from rabit_jax.errors import BadInput
from rabit_jax.weights.codebook import Codebook, CodebookSpec, PackedCodebook
from rabit_jax.weights.dual_binary import DualBinary, DualBinarySpec, PackedDualBinary
from rabit_jax.weights.frozen_path import FrozenPath, FrozenPathSpec
from rabit_jax.weights.group_uniform import GroupUniform, GroupUniformSpec, PackedGroupUniform
from rabit_jax.weights.grouped_sign import GroupedSign, PackedGroupedSign
from rabit_jax.weights.independent_sign import IndependentSign, IndependentSignSpec
from rabit_jax.weights.leaves import Header, WeightNode, parts
from rabit_jax.weights.low_rank_sign import LowRankSign, LowRankSignSpec, PackedLowRank
from rabit_jax.weights.reshaped import Reshaped
from rabit_jax.weights.residual_sign import ResidualSign, ResidualSignSpec
from rabit_jax.weights.scaled_weight import ScaledSpec, ScaledWeight
from rabit_jax.weights.sign_paths import PackedSign
from rabit_jax.weights.sum_weight import SumSpec, SumWeight
from rabit_jax.weights.table import Table
from rabit_jax.weights.uniform_residual import UniformResidual, UniformResidualSpec
from rabit_jax.weights.uniform_sign import PackedUniformSign, UniformSign


class Representation(NamedTuple):
    """Classes of one representation: what makes it, what trains, what is deployed.

    `spec` stands under `init.spec` in a config, where its `type` tells which; None for a weight
    that `convert` makes by itself. `packed.header_type` tells which in a packed file.
    """

    spec: type | None
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
    Representation(None, Table, Table),
    Representation(None, GroupedSign, PackedGroupedSign),
    Representation(None, UniformSign, PackedUniformSign),
)
SPECS = tuple(one.spec for one in REPRESENTATIONS if one.spec is not None)
PACKED_TYPES = {one.packed.header_type: one.packed for one in REPRESENTATIONS}
_own_specs: list[type] = []


def specs() -> tuple[type, ...]:
    """All classes of specs, those that `add_representation` has listed included."""
    return (*SPECS, *_own_specs)


@functools.cache
def type_name(spec: type) -> str:
    """The `type` by which a config names a class of specs.

    Raises:
      BadInput: the class is no dataclass with a field such as `type: Literal["mine"] = "mine"`.
    """
    found = get_type_hints(spec).get("type") if dataclasses.is_dataclass(spec) else None
    names = get_args(found) if get_origin(found) is Literal else ()
    if len(names) != 1:
        raise BadInput(f"{spec.__name__} has no `type` by which a config could name it: make it a "
                       'frozen dataclass with a field such as type: Literal["mine"] = "mine"')
    return names[0]


def add_representation(spec: type, packed: type[WeightNode] | None = None) -> None:
    """List a representation of your own, so that configs can name it and packed files hold it.

    Called where the class is defined; the commands import such a module by `--import MODULE`.

    Args:
      spec: a frozen dataclass with `init(w, stats, key) -> node`, `dense(node)` and a field `type`.
      packed: the deployed form of its nodes, unless that is one of this package. Its `header_type`
        is the type in a packed file.

    Raises:
      BadInput: a `type` or `header_type` that is missing or taken.

    Example:
      >>> add_representation(RowSignSpec, PackedRowSign)
    """
    name, taken = type_name(spec), {type_name(one): one for one in specs()}
    if taken.get(name, spec) is not spec:
        raise BadInput(f"the type {name!r} of {spec.__name__} is that of {taken[name].__name__}: "
                       "choose another")
    if packed is not None:
        kind = packed.header_type
        if not kind or PACKED_TYPES.get(kind, packed) is not packed:
            raise BadInput(f"{packed.__name__}.header_type is {kind!r}, which is empty or taken: "
                           "choose another")
        PACKED_TYPES[kind] = packed
    if name not in taken:
        _own_specs.append(spec)


def abstract_packed(header: Header) -> WeightNode:
    """The packed node of one matrix as shapes and dtypes, from what its `header()` returned.

    Raises:
      BadInput: a type that this version does not know, or fields that are missing or of no sense.
    """
    kind = header.get("type") if isinstance(header, Mapping) else None
    if not isinstance(kind, str) or kind not in PACKED_TYPES:
        raise BadInput(
            f"a packed weight has the type {kind!r}: the types are {', '.join(PACKED_TYPES)}; "
            "one of your own is known once its module is imported (--import MODULE)"
        )
    try:
        return PACKED_TYPES[kind].abstract(header, abstract_packed)
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise BadInput(f"the header of a packed {kind} weight is damaged ({error})") from error


def is_packed_node(node: object) -> TypeGuard[WeightNode]:
    """Whether a weight node is in its deployed form, all parts of a composite included."""
    if not isinstance(node, tuple(PACKED_TYPES.values())):
        return False
    return all(map(is_packed_node, parts(node)))
