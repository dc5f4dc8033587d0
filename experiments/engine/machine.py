"""What a result was obtained on: device, versions, memory."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from rabit_jax import __version__
from rabit_jax.kernels.cpu.library import status
from rabit_jax.types import Json

PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "numpy",
)


def device() -> str:
    """The accelerator, or the processor and its cores."""
    kind = jax.devices()[0].device_kind
    if jax.default_backend() != "cpu":
        return kind
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_processor()}, {cores} cores"


def _processor() -> str:
    """Model name where Linux tells it, else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def versions() -> dict[str, str]:
    """Versions of this package, of Python and of the packages that a result depends on."""
    found = {"rabit_jax": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def version_lines() -> str:
    """Versions of this package, of jax, jaxlib and Python, the device, and on a CPU what multiplies
    packed weights; a line each."""
    known = versions()
    found = {name: known.get(name) for name in ("rabit_jax", "jax", "jaxlib", "python")}
    found["device"] = device()
    if jax.default_backend() == "cpu":
        found["packed products"] = status()
    return "\n".join(f"{name} {value}" for name, value in found.items())


def peak_memory() -> int:
    """Peak resident bytes of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def report(command: str, rows: Sequence[Json]) -> Json:
    """The one JSON object of a benchmark: where, when, with what, how, and the rows."""
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"device": device(), "date": date, "versions": versions(), "command": command,
            "rows": list(rows)}
