"""The model card of a run's packed folder: what of a run's summary a reader of the hub needs.

It is apart from the report because post-training runs write a card and no report.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rabit_jax import __version__
from rabit_jax.atomic import write_text
from rabit_jax.data.sources import DataConfig
from rabit_jax.experiments.engine.settings import RunConfig
from rabit_jax.experiments.report.page import Summary
from rabit_jax.formats.folder import find_folder
from rabit_jax.formats.model_card import CARD, base_and_licence, packed_card
from rabit_jax.formats.packed_model import kept_in_16_bits
from rabit_jax.formats.rendering import code, plain
from rabit_jax.progress import number


def write_card(config: RunConfig, folder: Path, summary: Summary) -> Path:
    """Write `packed/README.md` in a run's folder from its summary; returns its path."""
    base = config.teacher.path or None
    packed, path = summary["packed"], folder / "packed" / CARD
    versions = {"rabit_jax": __version__, **summary["versions"]}  # 0.1 did not write its own
    facts = {
        "file": f"{number(packed['bytes'])} bytes with its header; dense in 16 bits "
                f"{number(summary['dense']['bytes'])} bytes",
        "made with": code(summary["spec"]),
        "data": code(changed_settings(config.data)),
        "tokens": ", ".join(f"{k} {number(n)}" for k, n in summary["tokens"].items() if n),
        "command": code(summary["command"]),
        "versions": plain(", ".join(f"{k} {v}" for k, v in versions.items())),
        "device": plain(summary["device"]),
    }
    scores = [
        (label, f"{model['ppl']:.2f}", f"{model['bits_per_byte']:.3f}", model["context"])
        for label, model in (("base, full precision", summary["teacher"]), ("this model", packed))
        if model and "ppl" in model
    ]
    licence = base_and_licence(find_folder(base))[1] if base else None
    text = packed_card(summary["name"], packed["bits_per_weight"],
                       packed["stored_bits_per_weight"], base, licence, scores, facts,
                       packed["whole_model_bits_per_weight"], kept_in_16_bits(path.parent))
    write_text(path, text)
    return path


def changed_settings(data: DataConfig) -> str:
    """The source and the settings that are not defaults, as a command line would give them."""
    found = {f.name: (getattr(data, f.name), f.default) for f in dataclasses.fields(data)}
    return " ".join(
        f"{name}={value}" for name, (value, default) in found.items()
        if name == "source" or (value and value != default and name != "cache")
    )
