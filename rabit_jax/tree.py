"""Params trees: paths of leaves, rules on paths, maps over leaves and over stacked layers.

A params tree is a nested dict whose leaves are arrays and weight nodes; a weight node is one leaf.
Imports nothing of the package but `BadInput` and the named types.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, TypeAlias, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import PyTree

from rabit_jax.errors import BadInput
from rabit_jax.types import Array, Param, Params, Shape, Spec, Weight

if TYPE_CHECKING:
    from typing_extensions import TypeIs

Rules: TypeAlias = Sequence[tuple[str, Spec | None]]
T = TypeVar("T")
Class = TypeVar("Class", bound=type)


@dataclass_transform(frozen_default=True, field_specifiers=(struct.field,))
def pytree_dataclass(cls: Class) -> Class:
    """A frozen dataclass whose fields are children in JAX trees, but those `pytree_node=False`.

    `flax.struct.dataclass` registers by `jax.tree_util.register_dataclass`, and JAX (0.10 to 0.12)
    compares the structures of such nodes by their static fields alone: two classes whose static
    fields agree have equal structures. A compiled function may then take the program of one for
    the other, whenever their hashes meet in one slot of its cache. Nodes registered with functions
    are compared by class as well, so this registers functions.

    Example:
      >>> @pytree_dataclass
      ... class Scaled(WeightNode):
      ...     latent: Array = leaf("latent", "i o")
      ...     bits: int = flax.struct.field(pytree_node=False, default=2)
    """
    data = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(data)
    children = [f.name for f in fields if f.metadata.get("pytree_node", True)]
    statics = [f.name for f in fields if f.name not in children]
    keys = [jax.tree_util.GetAttrKey(name) for name in children]

    def values(node: object) -> tuple[list, tuple]:
        return [getattr(node, n) for n in children], tuple(getattr(node, n) for n in statics)

    def with_keys(node: object) -> tuple[list[tuple], tuple]:
        found, aux = values(node)
        return list(zip(keys, found, strict=True)), aux

    def build(aux: tuple, found: Iterable[object]) -> object:
        # JAX fills trees with placeholders, so no __post_init__ may look at the children.
        node = object.__new__(data)
        for names, parts in ((children, found), (statics, aux)):
            for name, part in zip(names, parts, strict=True):
                object.__setattr__(node, name, part)
        return node

    jax.tree_util.register_pytree_with_keys(data, with_keys, build, values)
    if "replace" not in dir(data):
        data.replace = dataclasses.replace
    return data


def is_weight(x: object) -> TypeIs[Weight]:
    """Whether `x` is a weight node: the test that stops tree functions from entering it."""
    return hasattr(type(x), "matmul") and hasattr(type(x), "dense")


def path_name(path: tuple) -> str:
    """A key path as "layers/attn/q/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaves(params: PyTree[T]) -> Iterator[tuple[str, T]]:
    """`(path, leaf)` of a params tree; a weight node is one leaf."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_weight)
    return ((path_name(path), leaf) for path, leaf in flat)


def map_leaves(function: Callable[..., T], params: PyTree, *rest: PyTree) -> PyTree[T]:
    """Apply `function(path, leaf, ...)` to every array and weight node of the tree."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaf: function(path_name(path), *leaf), params, *rest, is_leaf=is_weight
    )


def tree_bytes(tree: PyTree[Array | jax.ShapeDtypeStruct]) -> int:
    """Bytes of all arrays of a tree, or of its outline."""
    return sum(prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def weights_of(params: Params) -> dict[str, Weight]:
    """The weight nodes of a tree by path."""
    return {path: leaf for path, leaf in leaves(params) if is_weight(leaf)}


def per_layer(function: Callable[..., T], *arrays: Array) -> T:
    """Apply a function of one matrix over all leading axes, one layer at a time.

    `lax.map`, not `vmap`: the peak memory is that of one layer. The number of leading axes is read
    off the first array, a matrix `[..., i, o]`.
    """
    lead = arrays[0].shape[:-2]
    if not lead:
        return function(*arrays)
    flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[len(lead) :]), arrays)
    out = jax.lax.map(lambda a: function(*a), flat)
    return jax.tree.map(lambda a: a.reshape(*lead, *a.shape[1:]), out)


def match_rules(params: Params, rules: Rules) -> dict[str, Spec]:
    """Decide each leaf's spec: the first rule `(regex, spec or None)` that fullmatches its path.

    Returns:
      `{path: spec}` of the leaves whose rule names a spec.

    Raises:
      BadInput: params that are no tree of arrays, rules that are no pairs, a rule that matches no
        path, names one layer of a stack, or selects something that is no matrix or is a weight node
        already.
    """
    found = dict(leaves(params))
    if not found or ("" in found and not hasattr(found[""], "shape")):
        raise BadInput(f"params are a {type(params).__name__}, wanted a tree of arrays, such as "
                       "variables['params'] of a Flax model")
    chosen: dict[str, Spec | None] = {}
    for pattern, spec in _pairs(rules):
        hits = [path for path in found if _fullmatch(pattern, path)]
        if not hits:
            raise BadInput(_no_match(pattern, found))
        for path in hits:
            chosen.setdefault(path, spec)
    selected = {path: spec for path, spec in chosen.items() if spec is not None}
    for path in selected:
        _check_matrix(path, found[path])
    return selected


def _pairs(rules: object) -> list[tuple[str, Spec | None]]:
    """The rules, each a regex and a spec or None."""
    wanted = "wanted a list of pairs (regex, spec), such as [(r'layers/.*/kernel', spec)]"
    if not isinstance(rules, Sequence) or isinstance(rules, str):
        raise BadInput(f"rules are a {type(rules).__name__}, {wanted}")
    for rule in rules:
        pair = isinstance(rule, Sequence) and not isinstance(rule, str) and len(rule) == 2
        if not pair or not isinstance(rule[0], str):
            raise BadInput(f"a rule is {str(rule)[:80]!r}, {wanted}")
    return list(rules)


def _fullmatch(pattern: str, path: str) -> bool:
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error as error:
        raise BadInput(f"rule {pattern!r} is no regular expression: {error}") from None


def _check_matrix(path: str, leaf: Param) -> None:
    if is_weight(leaf):
        raise BadInput(
            f"{path} is a {type(leaf).__name__} already: convert the full-precision params"
        )
    if not hasattr(leaf, "shape"):
        raise BadInput(f"{path} is a {type(leaf).__name__}, wanted an array: give the params")
    if leaf.ndim < 2 or not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise BadInput(
            f"{path} is {leaf.dtype}{list(leaf.shape)}, no float matrix [..., in, out]: "
            "narrow the rule that selects it"
        )


def _no_match(pattern: str, found: Mapping[str, Param]) -> str:
    unstacked = re.sub(
        r"(?<=[A-Za-z])_\d+(?=/)", "", re.sub(r"/(\\d\+|\[[\d-]+\]|\d+)(?=/)", "", pattern)
    )
    for path, leaf in found.items():
        if unstacked != pattern and len(leaf.shape) > 2 and _fullmatch(unstacked, path):
            return (
                f"rule {pattern!r} names one layer of a stack: {path} holds all {leaf.shape[0]} "
                f"layers in one array {list(leaf.shape)}, and a rule applies to the whole of it; "
                f"write {unstacked!r}"
            )
    kernels = [path for path, leaf in found.items() if getattr(leaf, "ndim", 2) >= 2]
    nearest = difflib.get_close_matches(pattern, kernels, n=3, cutoff=0) or kernels[:3]
    return f"rule {pattern!r} matches no parameter; the nearest paths are {', '.join(nearest)}"


def layer_keys(key: Array, lead: Mapping[str, Shape]) -> dict[str, Array]:
    """PRNG keys by path, one for each matrix of a kernel, in the shape of its leading axes `lead`.

    So a layer draws the same numbers whether it is converted alone or in its stack.
    """
    own = {path: jax.random.fold_in(key, n) for n, path in enumerate(lead)}
    return {path: split_key(own[path], axes) if axes else own[path] for path, axes in lead.items()}


def split_key(key: Array, lead: Sequence[int]) -> Array:
    """PRNG keys of shape `lead`: `key` itself where it holds them already, else one split so."""
    key = _typed(key)
    return key if key.ndim else jax.random.split(key, tuple(lead))


def fold_key(key: Array, n: int) -> Array:
    """`jax.random.fold_in(key, n)` of one key, or of each of an array of them."""
    key = _typed(key)
    folded = jax.vmap(lambda one: jax.random.fold_in(one, n))(key.reshape(-1))
    return folded.reshape(key.shape)


def _typed(key: Array) -> Array:
    raw = not jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return jax.random.wrap_key_data(key) if raw else key
