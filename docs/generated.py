"""Sphinx extension: the pages that are made from the code, and docstrings as this code has them.

Before the sources are read it writes `_generated/api/*.md`, a page for every package with all of
its modules, `_generated/config.md`, every setting of a run and of an ablation with its type,
default and what its class says about it, and copies of the notebooks with their stored outputs. No
package and no setting can be left out.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import jax
from pydantic import TypeAdapter

from rabit_jax.errors import BadInput
from rabit_jax.experiments.ablation.config import Ablation
from rabit_jax.experiments.engine.annotations import MISSING, hints, is_section, unwrap, variants
from rabit_jax.experiments.engine.settings import RunConfig

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PACKAGES = {
    "signs": ("rabit_jax/signs", "The coupled walk, its straight-through rules, SVID, importance"),
    "weights": ("rabit_jax/weights", "Representations and their specs, `convert`, `describe`"),
    "calibration": ("rabit_jax/calibration", "Channel statistics by probes, taps, or blocks"),
    "models": ("rabit_jax/models", "Config, block, decoder, generation"),
    "formats": ("rabit_jax/formats", "Hugging Face and packed folders, tokenizers, hub, cards"),
    "data": ("rabit_jax/data", "Text, tokenizer, token cache, deterministic batches"),
    "train": ("rabit_jax/train", "Losses, optimisers, the step, the loop, checkpoints, sharding"),
    "evaluate": ("rabit_jax/evaluate", "Perplexity, tasks, diagnostics, sign flips"),
    "integrations": ("rabit_jax/integrations", "Packed models in programs of others"),
    "kernels": ("kernels", "Packed bit layout and the packed products by device"),
    "experiments": ("experiments", "The commands, their settings and reports"),
}


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("builder-inited", lambda _: write_pages(DOCS / "_generated"))
    app.connect("autodoc-process-docstring", plain_docstring, priority=1)
    return {"parallel_read_safe": True}


def write_pages(folder: Path) -> None:
    """Write every generated page, only where it changed, so that Sphinx reads it only then."""
    pages = {f"api/{package}.md": package_page(package) for package in PACKAGES}
    pages["config.md"] = config_page()
    for file in (ROOT / "experiments" / "notebooks").glob("*.ipynb"):
        pages[f"notebooks/{file.name}"] = file.read_text(encoding="utf-8")
    for name, text in pages.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")


def package_page(package: str) -> str:
    """The API page of a package: a section for each of its modules."""
    folder, about = PACKAGES[package]
    parts = [f"# {package}\n\n{about}.\n"]
    for file in sorted((ROOT / folder).rglob("*.py")):
        path = file.relative_to(ROOT).with_suffix("").parts
        path = path if path[0] == "rabit_jax" else ("rabit_jax", *path)
        name = ".".join(path).removesuffix(".__init__")
        if file.name != "__init__.py":
            lines = [f".. automodule:: {name}", *(f".. autofunction:: {f}" for f in wrapped(name))]
            text = "\n\n".join(lines)
            parts.append(f"## {name}\n\n```{{eval-rst}}\n{text}\n```\n")
    return "\n".join(parts)


def wrapped(module: str) -> list[str]:
    """Full names of public functions with a backward of their own: automodule passes over them."""
    return [
        f"{module}.{name}"
        for name, value in vars(importlib.import_module(module)).items()
        if isinstance(value, jax.custom_vjp) and value.__module__ == module and name[0] != "_"
    ]


def config_page() -> str:
    """The reference of settings: a section for each dataclass."""
    text = [
        "# Settings\n",
        "Made from the classes that a config file is read into. A key is written as it stands in "
        "the first column, in a file as nested sections or on the command line as `a.b=c`. "
        "`--dry-run` prints all of them with their values.\n",
        "(settings-of-a-run)=\n## A run: `experiments.run`\n",
        *sections(RunConfig, "", RunConfig(), {}),
        "(settings-of-an-ablation)=\n## An ablation: `experiments.ablate`\n",
        *sections(Ablation, "", None, {RunConfig: "experiments.run"}),
    ]
    return "\n".join(text)


def sections(cls: type, key: str, base: Any, written: dict[type, str]) -> list[str]:
    """The table of a dataclass and those of the dataclasses among its fields.

    `base` holds the defaults, None where there are none; `written` is where a class is described.
    """
    texts, types = descriptions(cls), hints(cls)
    rows, below = [], []
    for field in dataclasses.fields(cls):
        if field.name not in types:
            continue
        dotted, kind = f"{key}.{field.name}" if key else field.name, types[field.name]
        value = default_of(field) if base is None else getattr(base, field.name)
        text = markdown(texts.get(field.name, ""))
        inner = unwrap(kind)[0]
        repeated = get_origin(inner) is tuple
        item = get_args(inner)[0] if repeated else inner
        nested = [m for m in variants(item).values() or [item] if is_section(m)]
        place = f"{dotted}[]" if repeated else dotted
        # A choice of classes, or of what a list holds, is described where it first stands.
        known = nested if repeated or len(nested) > 1 or base is None else []
        known = [member for member in known if member in written]
        written |= {member: place for member in nested if member not in known}
        for member in nested:
            if member not in known:
                own = value if isinstance(value, member) else empty(member)
                below += sections(member, place, own, written)
        if known:
            places = sorted({written[member] for member in known})
            text += f" Its keys are those of {', '.join(f'`{place}`' for place in places)}."
        if known or repeated or not nested:
            rows.append(f"| `{dotted}` | {type_name(kind)} | {shown(value)} | {text} |")
    title = f"### `{key}`: {cls.__name__}\n" if key else ""
    head = "| key | type | default | what it is |\n|---|---|---|---|\n"
    table = head + "\n".join(rows) + "\n" if rows else ""
    summary, _, _ = (inspect.getdoc(cls) or "").partition("\n\n")
    return [title, f"{markdown(summary)}\n", table, *below]


def empty(cls: type) -> Any:
    """The class with its own defaults, None where a field must be given."""
    try:
        return cls()
    except (BadInput, TypeError):
        return None


def descriptions(cls: type) -> dict[str, str]:
    """Field -> text of the section Attributes, of a class and those that it comes from."""
    found: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        text = inspect.cleandoc(owner.__doc__ or "") + "\n"
        section = re.search(r"^Attributes:\n((?:  .*\n?|\n)+)", text, re.M)
        for line in re.split(r"\n(?=  \S)", section.group(1) if section else ""):
            name, colon, text = line.strip().partition(": ")
            if colon and name.isidentifier():
                found[name] = " ".join(text.split())
    return found


BOUNDS = {"exclusiveMinimum": "above", "minimum": "at least", "maximum": "at most"}


def type_name(kind: Any) -> str:
    """The type of a field for people, with its bounds."""
    if get_origin(kind) is Annotated:
        schema = TypeAdapter(kind).json_schema()
        bounds = [f"{word} {schema[name]:g}" for name, word in BOUNDS.items() if name in schema]
        return ", ".join([type_name(get_args(kind)[0]), *bounds])
    inner, optional = unwrap(kind)
    if variants(inner):
        text = "a choice by `type`"
    elif get_origin(inner) is tuple:
        text = f"list of {type_name(get_args(inner)[0])}"
    elif get_origin(inner) is dict:
        text = f"mapping of names to {type_name(get_args(inner)[1])}"
    elif get_origin(inner) is Literal:
        text = ", ".join(f"`{choice!r}`" for choice in get_args(inner))
    else:
        name = inner.__name__ if isinstance(inner, type) and not get_args(inner) else str(inner)
        text = "`" + re.sub(r"[\w.]+\.(?=\w)", "", name) + "`"
    return f"{text} or null" if optional else text


def default_of(field: dataclasses.Field) -> Any:
    """What a field is without being set, MISSING where it must be."""
    factory = field.default_factory
    return field.default if factory is MISSING else factory()


def shown(value: Any) -> str:
    """A default in a table."""
    if value is MISSING:
        return "must be given"
    if dataclasses.is_dataclass(value):
        return ""
    value = list(value) if isinstance(value, tuple) else value
    return "`" + repr(value).replace("|", "\\|") + "`"


def markdown(text: str) -> str:
    """A docstring's paragraph in one line of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


SPECIAL = re.compile(r"(`[^`\n]*`)|([*|\\]|(?<=\w)_(?=\W|$))")
ITEM = re.compile(r"^\s*(\*|-|\d+\.) ")


def plain_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]):
    """Make reStructuredText of a docstring: equations and other text keep `*`, `|` and `_`.

    A line that is indented below a paragraph is a block that stands as it is.
    """
    lines[:] = [escaped(line) for line in blocks(lines)]


def blocks(lines: list[str]) -> list[str]:
    """Mark as literal each block that is indented by four or more below a line of text."""
    made: list[str] = []
    literal = -1
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if literal >= 0 and line.strip() and indent < literal:
            literal = -1
        before = next((old for old in reversed(lines[:number]) if old.strip()), "")
        gap = number > 0 and not lines[number - 1].strip()
        deeper = indent - (len(before) - len(before.lstrip()))
        starts = literal < 0 and gap and deeper >= 4 and not line.lstrip().startswith(">>>")
        if starts and not ITEM.match(before):
            made += [" " * (len(before) - len(before.lstrip())) + "::", ""]
            literal = indent
        made.append(("\0" if literal >= 0 else "") + line)
    return made


def escaped(line: str) -> str:
    """A line with the marks of reStructuredText escaped outside of code and literal blocks."""
    if line.startswith("\0"):
        return line[1:]
    if line.lstrip().startswith((">>>", "...")) or line.strip() == "::":
        return line
    item = ITEM.match(line)
    start = item.end() if item else 0
    return line[:start] + SPECIAL.sub(
        lambda m: m.group(1) or "\\" + m.group(2), line[start:]
    )
