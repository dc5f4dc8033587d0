"""Configs: typed frozen dataclasses, one YAML file, and `a.b=c` overrides on top."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from rabit_jax.errors import BadInput
from rabit_jax.experiments.engine.annotations import (
    Annotation,
    child,
    default,
    is_section,
    unwrap,
    variants,
)
from rabit_jax.experiments.engine.console import EXIT_CODES, common_options
from rabit_jax.experiments.engine.refusals import did_you_mean, shown, unknown, wrong
from rabit_jax.experiments.engine.validation import Tree, build

T = TypeVar("T")
ADDED = "added"  # in the metadata of a field that came after 0.1
SHIPPED = Path(__file__).parents[1] / "configs"
MOST_VALUES = 100_000  # of a YAML text once its aliases are written out
MOST_LEVELS = 50
MOST_BYTES = 1 << 18  # PyYAML reads some 20 kB a second


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
    tree = {} if file is None else read_yaml(file)
    return build(cls, with_overrides(cls, tree, overrides))


def shipped_model(path: str) -> str:
    """The folder under `configs/models` that holds the config.json of a hub id, or `path`."""
    folder = SHIPPED / "models" / path
    return str(folder) if path and (folder / "config.json").is_file() else path


def with_overrides(cls: type, tree: Tree, overrides: Sequence[str]) -> Tree:
    """Return a raw tree with overrides `a.b=c` of `cls`, each value read by the type of its field.

    Raises:
      BadInput: an override of another form or of an unknown key.
    """
    for text in overrides:
        tree = _with_override(cls, tree, text)
    return tree


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
        f"{did_you_mean(name, shipped)}"
    )


def config_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """Return the parser of a command that takes `--config FILE` and overrides."""
    found = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common_options(found)
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


def to_dict(config: object, recorded: bool = False) -> Any:
    """Return dataclasses, nested in whatever way, as the dicts, lists and scalars of JSON.

    Args:
      config: what is to be shown or stored.
      recorded: leave out the fields that came after 0.1 where they have their defaults, so that the
        records of earlier runs keep their keys, and their configs their text.
    """
    if dataclasses.is_dataclass(config):
        values = ((f, getattr(config, f.name)) for f in dataclasses.fields(config))
        return {f.name: to_dict(value, recorded) for f, value in values
                if not (recorded and ADDED in f.metadata and value == f.default)}
    if isinstance(config, dict):
        return {str(key): to_dict(value, recorded) for key, value in config.items()}
    if isinstance(config, tuple | list):
        return [to_dict(item, recorded) for item in config]
    return str(config) if isinstance(config, Path) else config


def dump_yaml(config: object) -> str:
    """Return the YAML that `load_config` reads back to an equal config."""
    tree = to_dict(config, recorded=True)
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)


def difference(a: object, b: object) -> str:
    """Return one line `dotted.key: value in a -> value in b` per value that differs, "" if none."""
    left, right = dict(_flat(to_dict(a))), dict(_flat(to_dict(b)))
    lines = []
    for key in left | right:
        before, after = (repr(side[key]) if key in side else "(absent)" for side in (left, right))
        if before != after:
            lines.append(f"{key}: {before} -> {after}")
    return "\n".join(lines)


def section_hash(*objects: object) -> str:
    """Return the SHA-256 (hex) of the JSON form of dataclasses, dicts, sequences and scalars.

    The same on every machine and Python; the order of dict keys does not matter, that of the
    objects does.
    """
    text = json.dumps(to_dict(objects, recorded=True), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class _TooDeep(Exception):
    """A YAML text is nested deeper than `MOST_LEVELS`."""


class _Loader(yaml.SafeLoader):
    """The safe loader, but a key given twice is an error: YAML itself lets the last one win.

    Nesting is counted as the text is scanned, for PyYAML takes time with its square.
    """

    def fetch_flow_collection_start(self, TokenClass: type) -> None:
        super().fetch_flow_collection_start(TokenClass)
        if self.flow_level > MOST_LEVELS:
            raise _TooDeep

    def add_indent(self, column: int) -> bool:
        if len(self.indents) > MOST_LEVELS:
            raise _TooDeep
        return super().add_indent(column)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> object:
        try:
            return super().construct_object(node, deep)
        # PyYAML lets pass what int(), date() and its own tables raise of a malformed scalar.
        except (ValueError, LookupError, AttributeError):
            kind = node.tag.rpartition(":")[2]
            problem = f"{shown(node.value)} is no {kind} (put it in quotes if it is text)"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
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
        loader = _Loader(text)
        node = loader.get_single_node()
        _check_size(node, source)
        return loader.construct_document(node) if node else None
    except (RecursionError, _TooDeep):
        raise _too_large(source) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise BadInput(f"{source} is not valid YAML{where}: {problem}") from None


def _check_size(root: yaml.Node | None, source: str) -> None:
    """Raise BadInput for nesting without end, and for aliases of aliases that multiply."""
    count, waiting = 0, [(root, 0)]
    while waiting:
        node, level = waiting.pop()
        count += 1
        if count > MOST_VALUES or level > MOST_LEVELS:
            raise _too_large(source)
        if isinstance(node, yaml.CollectionNode):
            parts = node.value
            if isinstance(node, yaml.MappingNode):
                parts = [part for pair in node.value for part in pair]
            waiting += [(part, level + 1) for part in parts]


def _too_large(source: str) -> BadInput:
    return BadInput(
        f"{source} is too large for a config: it may hold {MOST_VALUES} values, those of aliases "
        f"counted wherever they are used, nest {MOST_LEVELS} levels deep and have {MOST_BYTES} "
        "bytes"
    )


def read_yaml(name: str | Path) -> Tree:
    """Return the raw tree of a config file, or of the config of that name in the package.

    Raises:
      BadInput: no such file, not YAML, or no mapping.
    """
    file = _config_file(Path(name))
    try:
        with open(file, "rb") as content:
            found = content.read(MOST_BYTES + 1)  # a device or pipe may have no end
        if len(found) > MOST_BYTES:
            raise _too_large(str(file))
        text = found.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise BadInput(f"cannot read the config file {file}: {reason}") from None
    tree = _parse_yaml(text, str(file))
    if tree is None:
        raise BadInput(f"{file} holds no settings: a config file is a mapping of keys to "
                       "values, and {} takes the default of each")
    if not isinstance(tree, dict):
        raise BadInput(f"{file} holds {shown(tree)}; a config file is a mapping of keys to values")
    return tree


def _with_override(cls: type, tree: Tree, text: str) -> Tree:
    dotted, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not dotted:
        raise BadInput(f"the override {text!r} is not of the form a.b=c, such as qat.steps=400")
    wanted, base, path = cls, None, dotted.split(".")
    root = section = dict(tree)
    for depth, name in enumerate(path, 1):
        wanted, base = child(wanted, name), default(wanted, name, base)
        if wanted is None:
            raise unknown(cls, dotted)
        if depth == len(path):
            section[name] = _parse_override(value, wanted, text)
            break
        below = section.get(name)
        if below is None:
            below = base if isinstance(base, dict) else {}
        if not isinstance(below, dict):
            raise wrong(".".join(path[:depth]), below, wanted)
        section[name] = dict(below)  # a copy: an alias in the file may share it
        section = section[name]
    return root


def _parse_override(text: str, wanted: Annotation, override: str) -> Any:
    """Return the raw value that YAML would have given; scalars stay text."""
    kind, optional = unwrap(wanted)
    if optional and text.lower() in ("null", "none", "~"):
        return None
    origin = typing.get_origin(kind)
    if origin is tuple and not text.startswith("["):
        return [item.strip() for item in text.split(",")] if text else []
    if origin in (tuple, dict) or is_section(kind) or variants(kind):
        return _parse_yaml(text, f"the value of the override {override!r}")
    return text


def _flat(tree: object, key: str = "") -> Iterator[tuple[str, object]]:
    if not isinstance(tree, dict) or (key and not tree):
        yield key, tree
        return
    for name, value in tree.items():
        yield from _flat(value, f"{key}.{name}" if key else name)
