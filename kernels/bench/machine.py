"""Facts about the machine for benchmarks: last-level cache, free memory, driver, copy speed."""

from __future__ import annotations

import os
import platform
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

MIB = 1 << 20
# L2 of NVIDIA devices by a part of their name, rounded up: too large a cache only costs memory.
NVIDIA_CACHE = {
    "B200": 128, "GB200": 128, "B100": 128, "5090": 96, "H200": 64, "H100": 64, "GH200": 64,
    "A100": 40, "4090": 72, "L40": 96, "6000 Ada": 96, "L4": 48, "3090": 8, "A6000": 8, "A10": 8,
}
UNKNOWN_CACHE = 64 * MIB
# A source and a target of this many caches each: launching the copy then costs next to nothing.
COPY_CACHES = 16


def last_level_cache() -> tuple[int, str]:
    """Bytes of the last-level cache of JAX's device, and where the number comes from."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return nvidia_cache(device.device_kind)
    return linux_cache(Path("/sys/devices/system/cpu"))


def nvidia_cache(kind: str) -> tuple[int, str]:
    """The same for an NVIDIA device of that name."""
    for part, size in NVIDIA_CACHE.items():
        if re.search(rf"\b{part}", kind):
            return size * MIB, f"the table's entry {part}"
    return UNKNOWN_CACHE, f"assumed, the table has no {kind}"


def linux_cache(root: Path) -> tuple[int, str]:
    """The same for this machine: all caches of the last level beside the cores of this process.

    Args:
      root: Linux's folder of processors, `/sys/devices/system/cpu`.
    """
    found: dict[tuple[int, str], int] = {}
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    for folder in (f for core in cores for f in root.glob(f"cpu{core}/cache/index*")):
        level, size, shared = ((folder / name).read_text().strip()
                               for name in ("level", "size", "shared_cpu_list"))
        found[int(level), shared] = int(size.removesuffix("K")) * 1024
    if not found:
        return UNKNOWN_CACHE, "assumed, this system does not tell"
    last = max(level for level, _ in found)
    total = sum(size for (level, _), size in found.items() if level == last)
    return total, f"level {last} as Linux tells"


def free_memory() -> int:
    """Bytes that arrays may still take on JAX's device."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        lines = ""
    if found := re.search(r"MemAvailable:\s+(\d+) kB", lines):
        return int(found[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def driver() -> str:
    """Version of the NVIDIA driver where there is one, else of the operating system's kernel."""
    try:
        line = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
        return re.sub(r"\s+", " ", line.removeprefix("NVRM version:")).strip()
    except OSError:
        return f"{platform.system()} {platform.release()}"


class Copy:
    """A big copy between two buffers; every word is read once and written once.

    The target is donated, so no page is newly mapped while the clock runs.
    """

    def __init__(self, cache: int) -> None:
        words = min(COPY_CACHES * cache, free_memory() // 16) // 4
        self._source, self._target = jnp.zeros(words, jnp.uint32), jnp.zeros(words, jnp.uint32)
        # Plus one: a plain copy is one memcpy, which XLA leaves to one core.
        self._copy = jax.jit(lambda source, target: source + jnp.uint32(1), donate_argnums=1,
                             keep_unused=True)
        self.bytes = 8 * words
        self.run()

    def run(self) -> float:
        """One copy; returns its seconds, on a GPU those of its kernel."""
        if jax.default_backend() != "cpu":
            return device_seconds(self._next)
        begin = time.perf_counter()
        jax.block_until_ready(self._next())
        return time.perf_counter() - begin

    def _next(self) -> jax.Array:
        self._target = self._copy(self._source, self._target)
        return self._target


def device_seconds(call: Callable[[], object]) -> float:
    """Seconds that the GPU's kernels of a call take together, without the gaps between them.

    Starting a program with many arguments takes a host longer than a packed product takes a large
    GPU, so a clock on the host would measure the host.
    """
    with tempfile.TemporaryDirectory(prefix="rabit-trace-") as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        [file] = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
    return 1e-9 * sum(
        event.duration_ns for plane in data.planes if "GPU" in plane.name
        for line in plane.lines if "Stream" in line.name for event in line.events)


def call_seconds(calls: int = 200) -> float:
    """Seconds of one call of a compiled function that does next to nothing."""
    nothing, x = jax.jit(lambda x: x + 1), jnp.zeros(1)
    jax.block_until_ready(nothing(x))
    begin = time.perf_counter()
    for _ in range(calls):
        jax.block_until_ready(nothing(x))
    return (time.perf_counter() - begin) / calls
