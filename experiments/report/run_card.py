"""The model card of a run's packed folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rabit_jax import __version__
from rabit_jax.atomic import write_text
from rabit_jax.experiments.engine.settings import RunConfig
from rabit_jax.formats.folder import find_folder
from rabit_jax.formats.model_card import CARD, base_and_licence, packed_card
from rabit_jax.progress import number


def write_card(config: RunConfig, folder: Path, summary: dict[str, Any]) -> Path:
    """Writes `packed/README.md` of a run's folder with what its summary says; returns its path."""
    base = config.teacher.path or None
    packed, path = summary["packed"], folder / "packed" / CARD
    versions = {"rabit_jax": __version__, **summary["versions"]}
    facts = {
        "file": f"{number(packed['bytes'])} bytes; dense in 16 bits "
                f"{number(summary['dense']['bytes'])} bytes",
        "made with": f"`{summary['spec']}`",
        "data": f"`{_changed(config.data)}`",
        "tokens": ", ".join(f"{k} {number(n)}" for k, n in summary["tokens"].items() if n),
        "command": f"`{summary['command']}`",
        "versions": ", ".join(f"{k} {v}" for k, v in versions.items()),
        "device": summary["device"],
    }
    rows = [
        (label, f"{one['ppl']:.2f}", f"{one['bits_per_byte']:.3f}", one["context"])
        for label, one in (("base, full precision", summary["teacher"]), ("this model", packed))
        if one and "ppl" in one
    ]
    licence = base_and_licence(find_folder(base))[1] if base else None
    text = packed_card(summary["name"], packed["bits_per_weight"],
                       packed["stored_bits_per_weight"], base, licence, rows, facts)
    write_text(path, text)
    return path


def _changed(section: Any) -> str:
    """The source and the settings that are not defaults, as a command line would give them."""
    found = {f.name: (getattr(section, f.name), f.default) for f in dataclasses.fields(section)}
    return " ".join(
        f"{name}={value}" for name, (value, default) in found.items()
        if name == "source" or (value and value != default and name != "cache")
    )
