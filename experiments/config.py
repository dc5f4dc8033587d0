"""Configs: frozen dataclasses, one YAML file, and `a.b=c` overrides on top.

The classes are the schema. An unknown key, a value of the wrong type or a missing key is a
`BadInput` that names the dotted key. Where YAML surprises, the type of the field decides:
`1e-3` (a string to YAML) fills a float, `no` (False to YAML) never fills a str.

>>> @dataclasses.dataclass(frozen=True)
... class Train:
...     steps: int = 100
...     mesh: dict[str, int] = dataclasses.field(default_factory=dict)
>>> load_config(Train, None, ["steps=1e3", "mesh.data=2"])
Train(steps=1000, mesh={'data': 2})
"""

import argparse
import dataclasses
import difflib
import hashlib
import json
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from rabit_jax.errors import BadInput
from rabit_jax.experiments.coerce import (
    build,
    child,
    default,
    hints,
    shown,
    unwrap,
    variant,
    variants,
    wrong,
)
from rabit_jax.experiments.console import EXIT_CODES

T = TypeVar("T")

_NULLS = ("null", "none", "~")
SHIPPED = Path(__file__).parent / "configs"


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
