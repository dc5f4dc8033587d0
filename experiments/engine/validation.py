"""Raw YAML trees become frozen dataclasses: pydantic validates, each error is told in one sentence.

The dataclasses of a config are plain ones with plain annotations, many of them the library's own.
Their pydantic schema is made here from those annotations, because YAML needs readers of its own:
YAML 1.1 takes `3e-3` for text, an override is text throughout, and `true` is no number.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias, TypeVar

from pydantic import BeforeValidator, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, SchemaValidator, core_schema

from rabit_jax.experiments.engine.annotations import (
    MISSING,
    Annotation,
    default,
    hints,
    is_section,
    unwrap,
    variants,
    without_none,
)
from rabit_jax.experiments.engine.refusals import UNKNOWN, refusal
from rabit_jax.types import Json
from rabit_jax.weights.representations import specs, type_name

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")
Tree: TypeAlias = Json  # what YAML gives
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def build(cls: type[T], tree: Tree) -> T:
    """Return the dataclass `cls` with the values of a raw tree.

    What a section leaves out comes from the default of the field that holds the section, so
    `teacher: {resume: true}` keeps the other settings of the default teacher. Numbers may be given
    as text, as in `3e-3`, and lists fill tuples; nothing else is converted.

    Raises:
      BadInput: an unknown key, a value missing or of a wrong type, or what `__post_init__` refuses;
        the message names the dotted key.
    """
    try:
        return _validator(cls, specs()).validate_python(_fill(cls, tree, None))
    except ValidationError as failed:
        errors = failed.errors(include_url=False)
    # A misspelt key makes its section incomplete as well, so it is what has to be put right first.
    first = next((error for error in errors if error["type"] == UNKNOWN), errors[0])
    raise refusal(cls, first)


def _fill(wanted: Annotation, tree: object, base: object) -> object:
    """Return the raw tree with all that its sections leave out, from `base` or the classes."""
    kind, optional = unwrap(wanted)
    if typing.get_origin(kind) is tuple and isinstance(tree, list):
        return [_fill(typing.get_args(kind)[0], item, None) for item in tree]
    members = variants(kind)
    if tree is None and not optional and (members or is_section(kind)):
        tree = {}
    if not isinstance(tree, dict):
        return tree
    if members:
        tree = {"type": type_name(type(base)), **tree} if isinstance(base, specs()) else tree
        kind = members.get(str(tree.get("type")))
    if not is_section(kind):
        return tree
    base = base if isinstance(base, kind) else None
    filled = {str(name): value for name, value in tree.items()}  # YAML reads a bare `on:` as True
    for name, inner in hints(kind).items():
        left_out = default(kind, name, base)
        if name in tree:
            filled[name] = _fill(inner, tree[name], left_out)
        elif left_out is not MISSING:
            filled[name] = left_out
    return filled


# The schema


@cache
def _validator(cls: type, known: tuple[type, ...]) -> SchemaValidator:
    """The validator of a class while these classes of specs are known."""
    made: dict[type, CoreSchema] = {}
    root = _schema(cls, made)
    return SchemaValidator(core_schema.definitions_schema(root, list(made.values())))


def _schema(wanted: Annotation, made: dict[type, CoreSchema]) -> CoreSchema:
    """Return the schema of an annotation; that of each dataclass is added to `made`."""
    inner, optional = without_none(wanted)
    if optional:
        return core_schema.nullable_schema(_schema(inner, made))
    kind, _ = unwrap(wanted)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if members := variants(kind):
        choices = {name: _schema(member, made) for name, member in members.items()}
        return core_schema.tagged_union_schema(choices, discriminator="type")
    if is_section(kind):
        return _section_schema(kind, made)
    if origin is tuple:
        items = [_schema(item, made) for item in args if item is not Ellipsis]
        endless = 0 if args[-1] is Ellipsis else None
        schema = core_schema.tuple_schema(items, variadic_item_index=endless)
        return core_schema.no_info_before_validator_function(_read_list, schema)
    if origin is dict:
        return core_schema.dict_schema(_schema(args[0], made), _schema(args[1], made))
    return _scalar_schema(wanted, kind)


def _section_schema(cls: type[DataclassInstance], made: dict[type, CoreSchema]) -> CoreSchema:
    ref = f"{cls.__module__}.{cls.__qualname__}"
    if cls not in made:
        made[cls] = {"type": "none"}  # holds the place while its fields, which may name it, are met
        wanted = hints(cls).items()
        fields = [core_schema.dataclass_field(name, _schema(kind, made)) for name, kind in wanted]
        made[cls] = core_schema.dataclass_schema(
            cls,
            core_schema.dataclass_args_schema(cls.__name__, fields),
            [name for name, _ in wanted],
            post_init=hasattr(cls, "__post_init__"),
            config={"extra_fields_behavior": "forbid"},
            ref=ref,
        )
    return core_schema.definition_reference_schema(ref)


def _scalar_schema(wanted: Annotation, kind: Annotation) -> CoreSchema:
    """Return pydantic's schema of a scalar with its bounds, after a reader of ours."""
    literal = typing.get_origin(kind) is Literal
    reader = partial(_read_choice, typing.get_args(kind)) if literal else _READERS[kind]
    return TypeAdapter(Annotated[wanted, BeforeValidator(reader)]).core_schema


def _read_int(value: object) -> int:
    try:
        number = int(value) if isinstance(value, str) else value
    except ValueError:  # 1e3
        number = _read_float(value)
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    if isinstance(number, bool) or not isinstance(number, int):
        raise ValueError("not an integer")
    if abs(number) >= 2**63:  # more than arrays and counters of the libraries hold
        raise ValueError("not an integer of 64 bits")
    return number


def _read_float(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("not a number")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError("more than a float holds") from None
    if math.isnan(number):
        raise ValueError("nan is not a number")
    return number


def _read_bool(value: object) -> bool:
    word = str(value).lower()
    if not isinstance(value, bool | str) or word not in _WORDS:
        raise ValueError("neither true nor false")
    return _WORDS[word]


def _read_str(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("not a text")
    # A lone surrogate can be written to no file, and no path can hold a NUL.
    if "\0" in value or not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError("not a text that a file can hold")
    return value


def _read_choice(choices: tuple[object, ...], value: object) -> object:
    for choice in choices:
        if (type(choice), choice) == (type(value), value) or str(choice) == value:
            return choice
    raise ValueError("none of the choices")


def _read_list(value: object) -> object:
    if not isinstance(value, list | tuple):
        raise ValueError("not a list")
    return value


_READERS: dict[type, Callable[[object], object]] = {
    int: _read_int,
    float: _read_float,
    bool: _read_bool,
    str: _read_str,
}
