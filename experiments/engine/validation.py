"""Raw YAML trees become frozen dataclasses: pydantic validates, each error is told in one sentence.

The dataclasses of a config are plain ones with plain annotations, many of them the library's own.
Their pydantic schema is made here from those annotations, because YAML needs readers of its own:
YAML 1.1 takes `3e-3` for text, an override is text throughout, and `true` is no number.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, TypeGuard, TypeVar

from pydantic import BeforeValidator, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, ErrorDetails, SchemaValidator, core_schema

from rabit_jax.errors import BadInput
from rabit_jax.types import Json, Spec
from rabit_jax.weights.representations import specs, type_name

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")
Annotation: TypeAlias = Any  # what stands behind the colon of a field; Python has no type for it
Tree: TypeAlias = Json  # what YAML gives
MISSING = dataclasses.MISSING
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_UNKNOWN = "unexpected_keyword_argument"  # pydantic's names of errors
_RANGES = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number")


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
    first = next((error for error in errors if error["type"] == _UNKNOWN), errors[0])
    raise _refusal(cls, first)


# Annotations


def is_section(kind: Annotation) -> TypeGuard[type[DataclassInstance]]:
    """Whether an annotation is a dataclass, which is a mapping in YAML."""
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def hints(cls: type) -> dict[str, Annotation]:
    """Return the annotation of each field that the constructor of a dataclass takes."""
    resolved = typing.get_type_hints(cls, include_extras=True)
    return {f.name: resolved[f.name] for f in dataclasses.fields(cls) if f.init}


def unwrap(wanted: Annotation) -> tuple[Annotation, bool]:
    """Return (X, True) for `X | None`, else (X, False); bounds as of `PositiveInt` are taken off.

    Raises:
      TypeError: another union, which is a mistake of the dataclass and not of a config.
    """
    kind, optional = _without_none(wanted)
    return (typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind), optional


def _without_none(wanted: Annotation) -> tuple[Annotation, bool]:
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
        tree = {"type": typing.cast(Any, base).type, **tree} if isinstance(base, specs()) else tree
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
    inner, optional = _without_none(wanted)
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
        return int(number)
    if isinstance(number, bool) or not isinstance(number, int):
        raise ValueError("not an integer")
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


# Errors


def _refusal(cls: type, error: ErrorDetails) -> BadInput:
    """Return one of pydantic's errors as a sentence."""
    kind, loc, value = error["type"], error["loc"], error["input"]
    key, wanted = _place(cls, loc)
    reason = error.get("ctx", {}).get("error")
    if isinstance(reason, BadInput):
        return BadInput(f"{key}: {reason}" if key else str(reason))
    if kind == _UNKNOWN:
        return _nested(key, str(loc[-1])) if "." in str(loc[-1]) else unknown(cls, key)
    if loc and loc[-1] == "[key]":
        key, _ = _place(cls, loc[:-2])
        return BadInput(f"the config key {key!r} has the name {shown(value)} in it: quote the name")
    if kind == "missing" and isinstance(loc[-1], int):  # a list that is too short
        key, wanted = _place(cls, loc[:-1])
        return wrong(key, value, wanted)
    if kind == "missing":
        return BadInput(
            f"the config key {key!r} is missing: give it {named(wanted)}, such as {loc[-1]}: "
            f"{example(wanted)}"
        )
    if kind.startswith("union_tag"):
        return wrong(f"{key}.type", value.get("type"), Literal[tuple(variants(unwrap(wanted)[0]))])
    if kind in _RANGES:
        bound = error["msg"].removeprefix("Input should be ")
        return BadInput(f"the config key {key!r} is {shown(value)}: it must be {bound}")
    return wrong(key, value, wanted)


def _place(cls: type, loc: Iterable[int | str]) -> tuple[str, Annotation]:
    """Return the dotted key and the annotation of the place that pydantic's `loc` leads to."""
    key, wanted = "", cls
    for part in loc:
        kind, _ = unwrap(wanted)
        if members := variants(kind):
            wanted = members[str(part)]  # pydantic puts the tag of a union between the keys
        elif typing.get_origin(kind) is tuple:
            key, args = f"{key}[{part}]", typing.get_args(kind)
            wanted = args[0] if args[-1] is Ellipsis else args[min(int(part), len(args) - 1)]
        else:
            key, wanted = f"{key}.{part}" if key else str(part), child(kind, str(part))
    return key, wanted


def _nested(key: str, name: str) -> BadInput:
    section, _, last = name.rpartition(".")
    return BadInput(
        f"unknown config key {key!r}: a file has its sections nested, as in "
        f"{section}: {{{last}: ...}}"
    )


def unknown(cls: type, key: str) -> BadInput:
    """Return the error for a key that no field has; it names the nearest one that has."""
    closest = nearest(key, _known_keys(cls, ""))
    if closest == key:
        section, _, name = key.rpartition(".")
        return BadInput(
            f"the config key {key!r} does not go with the chosen {section}.type: leave it out, or "
            f"choose a type that has {name}"
        )
    return BadInput(f"unknown config key {key!r}: the nearest key is {closest!r}")


def _known_keys(wanted: Annotation, key: str, inside: tuple[type, ...] = ()) -> Iterator[str]:
    """Yield every dotted key of a dataclass; the items of a tuple are `rules[].name`.

    A dataclass that stands within itself (`inside`) is not opened again.
    """
    kind, _ = unwrap(wanted)
    if typing.get_origin(kind) is tuple:
        yield from _known_keys(typing.get_args(kind)[0], f"{key}[]", inside)
    for member in variants(kind).values() or [kind]:
        if not is_section(member) or member in inside:
            continue
        for name, inner in hints(member).items():
            dotted = f"{key}.{name}" if key else name
            yield dotted
            yield from _known_keys(inner, dotted, (*inside, member))


def nearest(word: str, known: Iterable[str]) -> str:
    """Return the most similar of the known words."""
    return max(known, key=lambda choice: difflib.SequenceMatcher(None, word, choice).ratio())


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` where one of the known words is near, else ""."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def wrong(key: str, value: object, wanted: Annotation) -> BadInput:
    """Return the error for a value of a wrong type; where text is wanted it says to quote."""
    kind, _ = unwrap(wanted)
    origin = typing.get_origin(kind)
    choices = typing.get_args(kind) if origin is Literal else ()
    hint = f", such as {example(kind)}" if origin in (tuple, dict) else ""
    if isinstance(value, str) and choices:
        hint = did_you_mean(value, map(str, choices))
    elif kind is float and str(value).strip(".").lower() == "nan":
        hint = " other than nan"
    elif (kind is str or any(isinstance(c, str) for c in choices)) and isinstance(value, bool):
        hint = " (YAML reads a bare yes, no, on or off as true or false: quote the word)"
    elif kind is str and isinstance(value, str):
        hint = " without NUL and lone surrogates"
    elif kind is str and value is not None and not isinstance(value, list | dict):
        hint = " (put it in quotes)"
    return BadInput(f"the config key {key!r} is {shown(value)}, wanted {named(wanted)}{hint}")


def shown(value: object) -> str:
    """Return a value for a message, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def named(wanted: Annotation) -> str:
    """Return a type in words: `int`, `one of 'a', 'b'`, `a list of str`, `float or null`."""
    kind, optional = unwrap(wanted)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        name = f"one of {', '.join(map(repr, args))}"
    elif origin is tuple and args[-1] is Ellipsis:
        name = f"a list of {named(args[0])}".replace("of a mapping", "of mappings")
    elif origin is tuple:
        name = f"{len(args)} values"
    elif origin is dict:
        name = f"a mapping of names to {named(args[1])}"
    elif is_section(kind):
        name = f"a mapping with the keys {', '.join(hints(kind))}"
    elif members := variants(kind):
        name = f"a mapping with the key type, one of {', '.join(members)}"
    else:
        name = kind.__name__
    return f"{name} or null" if optional else name


def example(wanted: Annotation) -> str:
    """Return a value of a type as YAML has it: `3`, `[text, text]`, `{name: 1e-3}`."""
    kind, _ = unwrap(wanted)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return str(args[0])
    if origin is tuple:
        items = args[:1] * 2 if args[-1] is Ellipsis else args
        return f"[{', '.join(map(example, items))}]"
    if origin is dict:
        return f"{{name: {example(args[1])}}}"
    if is_section(kind) or variants(kind):
        return f"{{{next(iter(hints(kind))) if is_section(kind) else 'type'}: ...}}"
    return _EXAMPLES[kind]


_EXAMPLES = {int: "3", float: "1e-3", bool: "true", str: "text"}
