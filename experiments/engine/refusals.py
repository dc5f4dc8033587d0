"""Errors of a config, one sentence each: the key, what was found and what is wanted."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable, Iterator
from typing import Literal

from pydantic_core import ErrorDetails

from rabit_jax.errors import BadInput
from rabit_jax.experiments.engine.annotations import (
    Annotation,
    child,
    hints,
    is_section,
    unwrap,
    variants,
)

UNKNOWN = "unexpected_keyword_argument"  # pydantic's names of errors
_RANGES = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number")


def refusal(cls: type, error: ErrorDetails) -> BadInput:
    """Return one of pydantic's errors as a sentence."""
    kind, loc, value = error["type"], error["loc"], error["input"]
    if loc and loc[-1] == "[key]":
        key, _ = _place(cls, loc[:-2])
        return BadInput(f"the config key {key!r} has the name {shown(value)} in it: quote the name")
    key, wanted = _place(cls, loc)
    reason = error.get("ctx", {}).get("error")
    if isinstance(reason, BadInput):
        return BadInput(f"{key}: {reason}" if key else str(reason))
    if kind == UNKNOWN:
        return _nested(key, str(loc[-1])) if "." in str(loc[-1]) else unknown(cls, key)
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
    elif kind is int and str(value).lstrip("-").isdecimal():
        hint = " of 64 bits"
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
