"""From raw YAML values to the typed fields of a dataclass; `config.py` is the way in.

Fields may be int, float, bool, str, Literal, tuples, `dict[str, X]`, dataclasses, and any of
these `| None`. The field's type decides what a value means, never its spelling. Of dataclasses
joined by `|` each has a field `type: Literal[...]`, and the key `type` tells which one is meant.
"""

import dataclasses
import difflib
import functools
import math
import operator
import types
import typing
from typing import Any, TypeVar

from rabit_jax.errors import BadInput

T = TypeVar("T")

MISSING = dataclasses.MISSING
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def hints(cls: type) -> dict[str, Any]:
    """Return the type of each field that the constructor of a dataclass takes."""
    resolved = typing.get_type_hints(cls)
    return {f.name: resolved[f.name] for f in dataclasses.fields(cls) if f.init}


def unwrap(wanted: Any) -> tuple[Any, bool]:
    """Return (X, True) for `X | None`, else (X, False)."""
    if typing.get_origin(wanted) not in (typing.Union, types.UnionType):
        return wanted, False
    members = [m for m in typing.get_args(wanted) if m is not type(None)]
    optional = len(members) < len(typing.get_args(wanted))
    if len(members) == 1:
        return members[0], optional
    if not all(dataclasses.is_dataclass(m) and "type" in hints(m) for m in members):
        raise TypeError(
            f"a config field is {wanted}; of unions only `X | None` and dataclasses with a field "
            "`type` can be read"
        )
    return functools.reduce(operator.or_, members), optional


def variants(wanted: Any) -> dict[str, type]:
    """Return the dataclasses of a union by their `type`; {} for anything else."""
    if typing.get_origin(wanted) not in (typing.Union, types.UnionType):
        return {}
    return {typing.get_args(hints(m)["type"])[0]: m for m in typing.get_args(wanted)}


def variant(wanted: Any, tree: Any, base: Any, key: str) -> type:
    """Return the dataclass of a union that a raw mapping means, by its `type` or that of `base`.

    Raises:
      BadInput: no mapping, or a `type` that none of them has.
    """
    found = variants(wanted)
    if not isinstance(tree, dict):
        raise wrong(key, tree, "a mapping")
    kind = tree.get("type", getattr(base, "type", None))
    if kind not in found:
        near = difflib.get_close_matches(str(kind), found, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise BadInput(
            f"the config key {f'{key}.type'!r} is {shown(kind)}, wanted one of "
            f"{', '.join(map(repr, found))}{hint}"
        )
    return found[kind]


def child(wanted: Any, name: str) -> Any:
    """Return the type below `name` in a dataclass or dict type, None where there is none."""
    wanted = unwrap(wanted)[0]
    if typing.get_origin(wanted) is dict:
        return typing.get_args(wanted)[1]
    for member in variants(wanted).values():
        if name == "type":
            return str
        if name in hints(member):
            return hints(member)[name]
    return hints(wanted).get(name) if dataclasses.is_dataclass(wanted) else None


def default(wanted: Any, name: str, base: Any = None) -> Any:
    """Return what a dataclass field is when left out: that of `base`, else the field's default."""
    if dataclasses.is_dataclass(base):
        return getattr(base, name, MISSING)
    wanted = unwrap(wanted)[0]
    for field in dataclasses.fields(wanted) if dataclasses.is_dataclass(wanted) else ():
        if field.name == name:
            factory = field.default_factory
            return field.default if factory is MISSING else factory()
    return MISSING


def build(cls: type[T], tree: Any, key: str = "", base: Any = None) -> T:
    """Return `cls` from a raw mapping; fields it leaves out come from `base` or the defaults.

    Raises:
      BadInput: a value missing or of the wrong type, or what `__post_init__` refuses; the
        message names the dotted key, or the section `key`.
    """
    if not isinstance(tree, dict):
        raise wrong(key, tree, f"a mapping with the keys {', '.join(hints(cls))}")
    values = {}
    for name, wanted in hints(cls).items():
        dotted, left_out = f"{key}.{name}" if key else name, default(cls, name, base)
        if name in tree:
            values[name] = coerce(tree[name], wanted, dotted, left_out)
        elif left_out is MISSING:
            raise BadInput(f"the config key {dotted!r} is missing: give it {named(wanted)}")
        else:
            values[name] = left_out
    try:
        return cls(**values)
    except BadInput as error:
        raise BadInput(f"{key}: {error}" if key else str(error)) from None


def coerce(value: Any, wanted: Any, key: str, left_out: Any = None) -> Any:
    """Return `value`, as YAML or an override gave it, as the type `wanted`; else raise BadInput."""
    kind, optional = unwrap(wanted)
    if value is None and optional:
        return None
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if variants(kind):
        value = {} if value is None else value
        base = left_out if isinstance(left_out, args) else None
        kind = variant(kind, value, base, key)
    if dataclasses.is_dataclass(kind):
        base = left_out if isinstance(left_out, kind) else None
        return build(kind, {} if value is None else value, key, base)
    if origin is tuple and isinstance(value, list):
        return _coerce_items(value, args, key)
    if origin is dict and isinstance(value, dict):
        return {coerce(k, str, key): coerce(v, args[1], f"{key}.{k}") for k, v in value.items()}
    try:
        return _as_literal(value, args) if origin is typing.Literal else _SCALARS[kind](value)
    except (ValueError, KeyError):
        raise wrong(key, value, named(wanted), origin is typing.Literal or kind is str) from None


def wrong(key: str, value: Any, wanted: str, text_wanted: bool = False) -> BadInput:
    """Return the error for a value of the wrong type; where text is wanted it says to quote."""
    hint = ""
    if text_wanted and isinstance(value, bool):
        hint = " (YAML reads a bare yes, no, on or off as true or false: quote the word)"
    elif text_wanted and value is not None and not isinstance(value, str | list | dict):
        hint = " (put it in quotes)"
    return BadInput(f"the config key {key!r} is {shown(value)}, wanted {wanted}{hint}")


def shown(value: Any) -> str:
    """Return a value for a message, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def named(wanted: Any) -> str:
    """Return a type in words: `int`, `one of 'a', 'b'`, `a list of str`, `float or null`."""
    kind, optional = unwrap(wanted)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        name = f"one of {', '.join(map(repr, args))}"
    elif origin is tuple:
        name = f"a list of {' and '.join(named(a) for a in args if a is not Ellipsis)}"
    elif origin is dict:
        name = f"a mapping of names to {named(args[1])}"
    else:
        plain = dataclasses.is_dataclass(kind) or variants(kind)
        name = "a mapping" if plain else kind.__name__
    return f"{name} or null" if optional else name


def _coerce_items(value: list[Any], kinds: tuple[Any, ...], key: str) -> tuple[Any, ...]:
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    if len(kinds) != len(value):
        raise wrong(key, value, f"{len(kinds)} values")
    pairs = zip(value, kinds, strict=True)
    return tuple(coerce(item, kind, f"{key}[{index}]") for index, (item, kind) in enumerate(pairs))


def _as_int(value: Any) -> int:
    number = _as_float(value)
    if not number.is_integer():
        raise ValueError
    exact = isinstance(value, int) or (isinstance(value, str) and value.isdigit())
    return int(value if exact else number)


def _as_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    number = float(value)
    if math.isnan(number):
        raise ValueError
    return number


def _as_bool(value: Any) -> bool:
    return value if isinstance(value, bool) else _WORDS[str(value).lower()]


def _as_str(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _as_literal(value: Any, allowed: tuple[Any, ...]) -> Any:
    for choice in allowed:
        if (type(choice), choice) == (type(value), value) or str(choice) == value:
            return choice
    raise ValueError


_SCALARS = {int: _as_int, float: _as_float, bool: _as_bool, str: _as_str}
