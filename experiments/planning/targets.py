"""The devices that a run can be planned for, and how a program is compiled for them without them.

`cpu:8` simulates eight devices on this machine. TPU topologies are compiled by libtpu and GPUs by
XLA's CUDA plugin, both on a CPU host; each is a pip package, and neither needs the accelerator.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
from jax.experimental import topologies

from rabit_jax.errors import BadInput, first_line
from rabit_jax.progress import say
from rabit_jax.types import Device, Json

GB = 10**9
GIB = 2**30
Platform = Literal["cpu", "gpu", "tpu"]


@dataclass(frozen=True)
class Chip:
    """What a device of a kind can do, by its maker's data sheet.

    Attributes:
      platform: what compiles for it.
      memory: bytes that a program may use: on a GPU 95% of the memory, less 0.6 GB for CUDA itself;
        0 for a share of this machine's memory.
      flops16: dense bfloat16 FLOP/s.
      flops32: FLOP/s of float32 products as XLA does them by default (TF32 on NVIDIA, three passes
        of bfloat16 on a TPU).
      bandwidth: bytes/s of its memory.
      link: bytes/s to its neighbours, in one direction.
      described: what the compiler is told: a TPU's name, or fields of XLA's GpuDeviceInfo.
    """

    platform: Platform
    memory: int
    flops16: float
    flops32: float
    bandwidth: float
    link: float
    described: str = ""


def _nvidia(
    name: str, capability: tuple[int, int], gib: float, processors: int, clock: float,
    shared: int, cache: int, flops16: float, flops32: float, bandwidth: float, link: float,
) -> Chip:
    """A GPU; `shared` is the shared memory in KiB of a processor, `cache` the L2 in MiB."""
    memory = int(gib * GIB)
    text = f"""
      gpu_device_info {{
        threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
        shared_memory_per_core: {shared * 1024} shared_memory_per_block_optin: {(shared - 1) * 1024}
        threads_per_core_limit: 2048 core_count: {processors} fpus_per_core: 128
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        memory_bandwidth: {int(bandwidth)} l2_cache_size: {cache * 2**20} clock_rate_ghz: {clock}
        device_memory_size: {memory} registers_per_core_limit: 65536
        registers_per_block_limit: 65536
        cuda_compute_capability {{ major: {capability[0]} minor: {capability[1]} }}
      }}
      platform_name: "CUDA"
      dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
      device_description_str: "{name}"
    """
    usable = int(0.95 * memory - 0.6 * GB)
    return Chip("gpu", usable, flops16, flops32, bandwidth, link, text)


_HOPPER: Json = {"capability": (9, 0), "processors": 132, "clock": 1.98, "shared": 228,
                           "cache": 50, "flops16": 989e12, "flops32": 494e12, "link": 450e9}
_AMPERE: Json = {"capability": (8, 0), "processors": 108, "clock": 1.41, "shared": 164,
                           "cache": 40, "flops16": 312e12, "flops32": 156e12, "link": 300e9}
CHIPS = {
    "cpu": Chip("cpu", 0, 1e11, 1e11, 3e10, 1e10),
    "h100": _nvidia("NVIDIA H100 80GB HBM3", gib=79.6, bandwidth=3.35e12, **_HOPPER),
    "h200": _nvidia("NVIDIA H200", gib=139.8, bandwidth=4.8e12, **_HOPPER),
    "a100-80gb": _nvidia("NVIDIA A100-SXM4-80GB", gib=79.3, bandwidth=2.04e12, **_AMPERE),
    "a100-40gb": _nvidia("NVIDIA A100-SXM4-40GB", gib=39.6, bandwidth=1.56e12, **_AMPERE),
    "l40s": _nvidia("NVIDIA L40S", (8, 9), 44.5, 142, 2.52, 100, 96, 362e12, 183e12, 864e9, 32e9),
    "rtx4090": _nvidia("NVIDIA GeForce RTX 4090", (8, 9), 23.6, 128, 2.52, 100, 72, 165e12, 82e12,
                       1.01e12, 32e9),
    "v4": Chip("tpu", int(30.75 * GIB), 275e12, 92e12, 1.2e12, 45e9, "v4"),
    "v5e": Chip("tpu", int(15.75 * GIB), 197e12, 66e12, 8.1e11, 45e9, "v5e"),
    "v5p": Chip("tpu", int(95.0 * GIB), 459e12, 153e12, 2.77e12, 90e9, "v5p"),
    "v6e": Chip("tpu", int(31.25 * GIB), 918e12, 306e12, 1.64e12, 90e9, "v6e"),
}
EXAMPLES = "cpu:8, h100:8, a100-80gb:4, h200:1, v5e:8x8, v5p:4x4x4"


@dataclass(frozen=True)
class Target:
    """Devices that a run is planned for.

    Attributes:
      name: as the command line gives it.
      kind: a name of `CHIPS`.
      count: number of devices.
      memory: bytes that a program may use on each.
      devices: those that programs are compiled for; none of them computes.
      compiler: the platform of these devices, "cpu", "cuda" or "tpu". Where it is "cpu" for a GPU,
        the plugin was not there and the plan is a CPU's: parameters and collectives are the same,
        but temporaries hold 16-bit products in float32, which a GPU does not.
    """

    name: str
    kind: str
    count: int
    memory: int
    devices: Sequence[Device] = field(repr=False)
    compiler: str

    @property
    def chip(self) -> Chip:
        """What a device can do."""
        return CHIPS[self.kind]

    @property
    def options(self) -> dict[str, Any]:
        """Options of the compiler: where there is no GPU, none of its kernels can be timed."""
        return {"xla_gpu_autotune_level": 0} if self.compiler in ("cuda", "gpu") else {}


def known_chip(device_kind: str) -> Chip | None:
    """What a device can do by the name that JAX gives it, such as "NVIDIA H200" or "TPU v5 lite";
    None for a CPU and for what `CHIPS` does not list."""
    tpus = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p",
            "TPU v5p": "v5p", "TPU v6 lite": "v6e", "TPU v6e": "v6e"}
    if device_kind in tpus:
        return CHIPS[tpus[device_kind]]
    return next((chip for chip in CHIPS.values() if f'"{device_kind}"' in chip.described), None)


def find_target(name: str) -> Target:
    """The target of a name such as `h100:8` or `v5e:4x4`.

    Raises:
      BadInput: an unknown kind, a number of devices that it cannot have, or a compiler that is not
        installed.
    """
    kind, _, size = name.lower().partition(":")
    if kind not in CHIPS:
        raise BadInput(f"--plan is {name!r}: the kinds of device are {', '.join(CHIPS)}; write for "
                       f"example {EXAMPLES}")
    if not re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,3}){0,2}", size or "1"):
        raise BadInput(f"--plan is {name!r}: behind the colon stands how many devices there are, "
                       f"for example {EXAMPLES}")
    # A plan computes nothing: JAX need not look for accelerators, nor say which it does not find.
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.CRITICAL)
    jax.config.update("jax_platforms", "cpu")
    sides = [int(n) for n in (size or "1").split("x")]
    count, chip = math.prod(sides), CHIPS[kind]
    if chip.platform == "tpu":
        devices = _tpu_devices(kind, sides)
    elif chip.platform == "gpu" and (found := _gpu_devices(chip, count)):
        devices = found
    else:
        devices = _cpu_devices(count)
    memory = chip.memory or _host_memory() // count
    return Target(name, kind, count, memory, devices, devices[0].platform)


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cpu_devices(count: int) -> Sequence[Device]:
    """That many devices, simulated on this machine."""
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        pass  # JAX has started; there may be enough of them
    found = jax.devices("cpu")
    if len(found) < count:
        raise BadInput(
            f"--plan cpu:{count} was asked for where JAX has started with {len(found)} devices: "
            f"set XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return found[:count]


def _tpu_devices(kind: str, sides: list[int]) -> Sequence[Device]:
    """The chips of a TPU topology, by libtpu."""
    if importlib.util.find_spec("libtpu") is None:
        raise BadInput("a plan for a TPU is compiled by libtpu, which is not installed: "
                       "`pip install 'jax[tpu]'` has the one that fits (it needs no TPU)")
    if len(sides) == 1:
        sides = _square(sides[0])
    if kind in ("v4", "v5p"):
        sides += [1] * (3 - len(sides))
    # libtpu asks for the machine's metadata, and writes what it does not find there to stderr.
    for name, value in {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
                        "TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_WORKER_ID": "0"}.items():
        os.environ.setdefault(name, value)
    shape = "x".join(map(str, sides))
    try:
        topology = topologies.get_topology_desc(f"{kind}:{shape}", "tpu")
    except Exception as error:  # libtpu raises several types
        raise BadInput(f"libtpu knows no topology {kind}:{shape} ({first_line(error)[:160]}): give "
                       "one that Google Cloud offers, such as v5e:4x4") from error
    # A v4 has two cores a chip, which JAX joins: one device for each place.
    places = {tuple(device.coords): device for device in topology.devices}
    return list(places.values()) if kind in ("v4",) else topology.devices


def _square(count: int) -> list[int]:
    """The most square rectangle of that many chips."""
    side = next(n for n in range(math.isqrt(count), 0, -1) if count % n == 0)
    return [side, count // side]


def _gpu_devices(chip: Chip, count: int) -> Sequence[Device] | None:
    """That many GPUs of one host, by XLA's CUDA plugin; None where that cannot be loaded."""
    # JAX has no public way to a topology of a plugin whose devices are not there.
    from jax._src.lib import xla_client  # pyright: ignore[reportPrivateImportUsage]

    library = _cuda_plugin()
    if library is None:
        return None
    try:
        api = (None if xla_client.pjrt_plugin_loaded("cuda")
               else xla_client.load_pjrt_plugin_dynamically("cuda", str(library)))
        if not xla_client.pjrt_plugin_initialized("cuda"):
            xla_client.initialize_pjrt_plugin("cuda")
        api = api or xla_client.load_pjrt_plugin_dynamically("cuda", str(library))
        topology = xla_client.make_c_api_device_topology(
            api, "plan", target_config=chip.described, topology=f"1x1x{count}")
        return topologies.TopologyDescription(topology._make_compile_only_devices()).devices
    except Exception as error:  # whatever another version of the plugin lacks
        say(f"the CUDA plugin cannot compile without a GPU ({first_line(error)[:160]})")
        return None


def _cuda_plugin() -> Path | None:
    """The library of `jax-cuda13-pjrt` or `jax-cuda12-pjrt`; the tools of CUDA from pip are put on
    the path, where XLA looks for them."""
    for name in ("xla_cuda13", "xla_cuda12"):
        for folder in sys.path:
            file = Path(folder) / "jax_plugins" / name / "xla_cuda_plugin.so"
            if not file.is_file():
                continue
            for tool in sorted(Path(folder).glob("nvidia/*/bin/ptxas")):
                if shutil.which("ptxas") is None:
                    os.environ["PATH"] = f"{tool.parent}{os.pathsep}{os.environ.get('PATH', '')}"
            return file if shutil.which("ptxas") else None
    return None
