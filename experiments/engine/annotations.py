"""What the annotations of a config's fields stand for: sections, specs by their type, values."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypeGuard

from rabit_jax.types import Spec
from rabit_jax.weights.representations import specs, type_name

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Annotation: TypeAlias = Any  # what stands behind the colon of a field; Python has no type for it
MISSING = dataclasses.MISSING


def is_section(kind: Annotation) -> TypeGuard[type[DataclassInstance]]:
    """Whether an annotation is a dataclass, which is a mapping in YAML."""
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


@functools.cache
def hints(cls: type) -> dict[str, Annotation]:
    """Return the annotation of each field that the constructor of a dataclass takes."""
    resolved = typing.get_type_hints(cls, include_extras=True)
    return {f.name: resolved[f.name] for f in dataclasses.fields(cls) if f.init}


def unwrap(wanted: Annotation) -> tuple[Annotation, bool]:
    """Return (X, True) for `X | None`, else (X, False); bounds as of `PositiveInt` are taken off.

    Raises:
      TypeError: another union, which is a mistake of the dataclass and not of a config.
    """
    kind, optional = without_none(wanted)
    return (typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind), optional


def without_none(wanted: Annotation) -> tuple[Annotation, bool]:
    """Return (X, True) for `X | None`, else (X, False), with the bounds of X."""
    if typing.get_origin(wanted) not in (typing.Union, types.UnionType):
        return wanted, False
    members = [m for m in typing.get_args(wanted) if m is not type(None)]
    if len(members) > 1:
        raise TypeError(f"a config field is {wanted}; the only union that can be read is X | None")
    return members[0], True


def variants(kind: Annotation) -> dict[str, type[DataclassInstance]]:
    """Return the dataclasses that the annotation `Spec` stands for, by their `type`; else {}."""
    return {type_name(m): m for m in specs()} if kind is Spec else {}


def child(wanted: Annotation, name: str) -> Annotation:
    """Return the annotation below `name` in a section or dict, None where there is none."""
    kind, _ = unwrap(wanted)
    if typing.get_origin(kind) is dict:
        return typing.get_args(kind)[1]
    if variants(kind) and name == "type":
        return str
    sections = variants(kind).values() or [kind]
    return next((hints(s)[name] for s in sections if is_section(s) and name in hints(s)), None)


def default(wanted: Annotation, name: str, base: object = None) -> object:
    """Return what a field is when left out: that of the section `base`, else the class's own.

    MISSING where it has to be given.
    """
    if dataclasses.is_dataclass(base):
        return getattr(base, name, MISSING)
    kind, _ = unwrap(wanted)
    for field in dataclasses.fields(kind) if is_section(kind) else ():
        if field.name == name:
            factory = field.default_factory
            return field.default if factory is MISSING else factory()
    return MISSING
