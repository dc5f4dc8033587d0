"""Configs: typed frozen dataclasses, one YAML file, and `a.b=c` overrides on top."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import hashlib
import json
import math
import operator
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from rabit_jax.errors import BadInput
from rabit_jax.experiments.engine.console import EXIT_CODES
from rabit_jax.weights import SPECS, Spec

T = TypeVar("T")
_NULLS = ("null", "none", "~")
SHIPPED = Path(__file__).parents[1] / "configs"


def load_config(cls: type[T], file: str | Path | None, overrides: Sequence[str] = ()) -> T:
    """Return `cls` filled from its defaults, then the YAML `file`, then the overrides.

    A name that is no file here, such as `quickstart` or `quickstart.yaml`, is a config that comes
    with the package.
    A section that the file gives in part keeps the rest of its field's default. Overrides are
    `dotted.key=value`, later ones win; a tuple is `[a, b]` or `a,b`, None is `null`, an entry
    of a dict is `mesh.data=2`.

    Raises:
      BadInput: no such file, not YAML, an unknown key, a wrong type, a missing value.
    """
    tree = {} if file is None else _read_yaml(_config_file(Path(file)))
    for override in overrides:
        _apply(cls, tree, override)
    for key in _unknown_keys(cls, tree, "", None):
        raise _unknown(cls, key)
    return build(cls, tree)


def _config_file(file: Path) -> Path:
    """The file, or the config of that name that comes with the package."""
    shipped = {str(p.relative_to(SHIPPED).with_suffix("")): p for p in SHIPPED.rglob("*.yaml")}
    name = str(file).removesuffix(".yaml")
    if not file.is_file() and name in shipped:
        return shipped[name]
    if file.exists():
        return file
    raise BadInput(
        f"cannot read the config file {file}: No such file or directory; give the path of a YAML "
        f"file, or a config that comes with the package by its name: {', '.join(sorted(shipped))}"
    )


def config_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """Return the parser of a command that takes `--config FILE` and overrides."""
    found = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="YAML file, or the name of a config that comes with the package, such as quickstart",
    )
    found.add_argument(
        "overrides", nargs="*", metavar="a.b=c", help="settings that replace those of the file"
    )
    return found


def to_dict(config: Any) -> Any:
    """Return dataclasses, nested in whatever way, as the dicts, lists and scalars of JSON."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {str(key): to_dict(value) for key, value in config.items()}
    if isinstance(config, tuple | list):
        return [to_dict(item) for item in config]
    return str(config) if isinstance(config, Path) else config


def dump_yaml(config: Any) -> str:
    """Return the YAML that `load_config` reads back to an equal config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=100)


def difference(a: Any, b: Any) -> str:
    """Return one line `dotted.key: value in a -> value in b` per value that differs, "" if none."""
    left, right = dict(_flat(to_dict(a))), dict(_flat(to_dict(b)))
    lines = []
    for key in left | right:
        before, after = (repr(side[key]) if key in side else "(absent)" for side in (left, right))
        if before != after:
            lines.append(f"{key}: {before} -> {after}")
    return "\n".join(lines)


def section_hash(*objects: Any) -> str:
    """Return the SHA-256 (hex) of the JSON form of dataclasses, dicts, sequences and scalars.

    The same on every machine and Python; the order of dict keys does not matter, that of the
    objects does.
    """
    text = json.dumps(to_dict(objects), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class _Loader(yaml.SafeLoader):
    """The safe loader, but a key given twice is an error: YAML itself lets the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key is one word", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise BadInput(f"{source} is not valid YAML{where}: {problem}") from None


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise BadInput(f"cannot read the config file {file}: {reason}") from None
    tree = _parse_yaml(text, str(file))
    if tree is not None and not isinstance(tree, dict):
        raise BadInput(f"{file} holds {shown(tree)}; a config file is a mapping of keys to values")
    return tree or {}


def _apply(cls: type, tree: dict[str, Any], override: str) -> None:
    """Write one `a.b=c` into the raw tree, its value read by the type of the field."""
    dotted, equals, text = (part.strip() for part in override.partition("="))
    if not equals or not dotted:
        raise BadInput(f"the override {override!r} is not of the form a.b=c")
    wanted, base = cls, None
    *sections, last = dotted.split(".")
    for name in sections:
        wanted, base = child(wanted, name), default(wanted, name, base)
        tree = _descend(tree, name, wanted, base, cls, dotted)
    wanted = child(wanted, last)
    if wanted is None:
        raise _unknown(cls, dotted)
    tree[last] = _parse_override(text, wanted, override)


def _descend(
    tree: dict[str, Any], name: str, wanted: Any, base: Any, cls: type, dotted: str
) -> dict[str, Any]:
    """Return the raw section below `name`, made where the file has none."""
    if wanted is None:
        raise _unknown(cls, dotted)
    if tree.get(name) is None:
        tree[name] = dict(base) if isinstance(base, dict) else {}
    if not isinstance(tree[name], dict):
        raise wrong(name, tree[name], f"a mapping, for the override of {dotted!r} to fill")
    return tree[name]


def _parse_override(text: str, wanted: Any, override: str) -> Any:
    """Return the raw value that YAML would have given; scalars stay text."""
    kind, optional = unwrap(wanted)
    if optional and text.lower() in _NULLS:
        return None
    origin = typing.get_origin(kind)
    if origin is tuple and not text.startswith("["):
        return [item.strip() for item in text.split(",")] if text else []
    if origin in (tuple, dict) or dataclasses.is_dataclass(kind) or variants(kind):
        return _parse_yaml(text, f"the value of the override {override!r}")
    return text


def _unknown_keys(wanted: Any, tree: Any, key: str, base: Any) -> Iterator[str]:
    """Yield the dotted keys of the raw tree that the type has no field for."""
    wanted = unwrap(wanted)[0]
    if variants(wanted) and isinstance(tree, dict):
        wanted = variant(wanted, tree, base, key)
    if dataclasses.is_dataclass(wanted) and isinstance(tree, dict):
        known = hints(wanted)
        for name, value in tree.items():
            dotted = f"{key}.{name}" if key else str(name)
            if name in known:
                yield from _unknown_keys(known[name], value, dotted, default(wanted, name, base))
            else:
                yield dotted
    elif typing.get_origin(wanted) is tuple and isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from _unknown_keys(typing.get_args(wanted)[0], value, f"{key}[{index}]", None)


def _known_keys(wanted: Any, key: str, inside: tuple = ()) -> Iterator[str]:
    """Yield every dotted key of a dataclass; the items of a tuple are `rules[].name`.

    A dataclass that stands within itself (`inside`) is not opened again.
    """
    wanted = unwrap(wanted)[0]
    if typing.get_origin(wanted) is tuple:
        yield from _known_keys(typing.get_args(wanted)[0], f"{key}[]", inside)
    for member in variants(wanted).values() or [wanted]:
        if not dataclasses.is_dataclass(member) or member in inside:
            continue
        for name, kind in hints(member).items():
            dotted = f"{key}.{name}" if key else name
            yield dotted
            yield from _known_keys(kind, dotted, (*inside, member))


def _unknown(cls: type, key: str) -> BadInput:
    """Return the error for a key that no field has; it names the nearest one that has."""
    nearest = max(
        _known_keys(cls, ""), key=lambda known: difflib.SequenceMatcher(None, key, known).ratio()
    )
    if nearest == key:
        section, _, name = key.rpartition(".")
        return BadInput(
            f"the config key {key!r} does not go with the chosen {section}.type: leave it out, or "
            f"choose a type that has {name}"
        )
    return BadInput(f"unknown config key {key!r}: the nearest key is {nearest!r}")


def _flat(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, dict) or (key and not tree):
        yield key, tree
        return
    for name, value in tree.items():
        yield from _flat(value, f"{key}.{name}" if key else name)
MISSING = dataclasses.MISSING
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def hints(cls: type) -> dict[str, Any]:
    """Return the type of each field that the constructor of a dataclass takes."""
    resolved = typing.get_type_hints(cls)
    return {f.name: resolved[f.name] for f in dataclasses.fields(cls) if f.init}


def unwrap(wanted: Any) -> tuple[Any, bool]:
    """Return (X, True) for `X | None`, else (X, False); `Spec` means any of `SPECS`."""
    if wanted is Spec:
        return functools.reduce(operator.or_, SPECS), False
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
    wanted, _ = unwrap(wanted) if wanted is Spec else (wanted, False)
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
