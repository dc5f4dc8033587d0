"""`--plan`: what a run takes on devices that need not be here.

Every program of the run is compiled for the target, from shapes alone. The compiler says how many
bytes a device holds and which collectives it carries out; FLOPs are counted in the program. Where a
program does not fit, options that save memory are tried one after another until it does.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import jax

from rabit_jax.errors import BadInput, first_line
from rabit_jax.experiments.engine.config import load_config
from rabit_jax.experiments.engine.console import table
from rabit_jax.experiments.engine.inputs import check_batches, check_settings
from rabit_jax.experiments.engine.settings import RunConfig
from rabit_jax.experiments.planning.collectives import find_collectives
from rabit_jax.experiments.planning.flops import Flops, count_flops
from rabit_jax.experiments.planning.programs import (
    Program,
    device_bytes,
    find_programs,
    model_config,
)
from rabit_jax.experiments.planning.targets import GB, Target, find_target
from rabit_jax.progress import progress, say
from rabit_jax.train.sharding import make_mesh, row_shards

REACHED = 0.45  # share of the peak FLOP/s, bandwidth and link speed that estimates of time assume


@dataclass(frozen=True)
class Planned:
    """What one program takes, on each device.

    Attributes:
      program: stage that runs it, or "decode".
      parts: bytes of its arguments by what they are: trained, frozen, teacher, optimizer, ...
      temporaries: bytes that the compiler plans besides: activations, gradients, updates.
      peak: bytes of arguments, results and temporaries, what is updated in place counted once.
      flops: of one call, on each device.
      collective_bytes: that a device sends in one call; None where that is not known.
      collectives: the same by kind.
      seconds: estimate for one call; see `estimate`.
      tokens: of one call, on all devices together.
      fits: whether the peak is within what a program may use.
      compile_seconds: how long the compiler took.
      error: what the compiler said where it could not compile it; the figures are then 0.
    """

    program: str
    parts: dict[str, int]
    temporaries: int = 0
    peak: int = 0
    flops: float = 0.0
    collective_bytes: float | None = 0.0
    collectives: dict[str, float] | None = field(default_factory=dict)
    seconds: float = 0.0
    tokens: int = 0
    fits: bool = False
    compile_seconds: float = 0.0
    error: str = ""


def plan(
    file: str, overrides: Sequence[str], name: str, as_json: bool = False
) -> int:
    """Print the plan of a config for a target; 0 where all fits, else 3.

    Raises:
      BadInput: a config, target or mesh that cannot be.
    """
    target = find_target(name)
    config = load_config(RunConfig, file, overrides)
    if target.compiler == "cpu" and target.chip.platform == "gpu":
        say("XLA's CUDA plugin is not installed, so the programs are compiled for a CPU, whose "
            "temporaries are larger: `pip install jax-cuda13-pjrt nvidia-cuda-nvcc nvidia-nvvm` "
            "(none of them needs a GPU) gives a GPU's")
    found = planned(config, target)
    advice = {one.program: _advice(file, overrides, target, one.program)
              for one in found if not one.fits}
    if as_json:
        print(json.dumps({
            "target": target.name, "devices": target.count, "memory_bytes": target.memory,
            "compiler": target.compiler, "mesh": dict(_mesh(config, target).shape),
            "programs": [asdict(one) for one in found], "not_planned": _block_wise(config),
            "advice": {program: None if tried is None else tried[0]
                       for program, tried in advice.items()},
        }, indent=1))
    else:
        _print(config, target, found, advice)
    return 0 if all(one.fits for one in found) else 3


def planned(config: RunConfig, target: Target, only: str = "") -> list[Planned]:
    """Compile and measure the programs of a run, or the one called `only`."""
    mesh = _mesh(config, target)
    check_settings(config, model_config(config))
    check_batches(config, row_shards(mesh))
    programs = [p for p in find_programs(config, mesh) if only in ("", p.name)]
    found = []
    with progress(f"plan for {target.name}", len(programs)) as bar:
        for program in programs:
            found.append(_measured(program, target, mesh.size))
            bar.update(len(found))
    return found


def _mesh(config: RunConfig, target: Target) -> jax.sharding.Mesh:
    """The mesh that the run makes of these devices; task ptq takes one unless a mesh is given."""
    alone = config.task == "ptq" and not config.mesh
    return make_mesh(config.mesh, target.devices[:1] if alone else target.devices)


def _block_wise(config: RunConfig) -> list[str]:
    """The stages that hold one block at a time, which are not compiled."""
    if config.task == "qat":
        return []
    return ["quantise", *(["tune"] if config.tune.epochs else [])]


def _measured(program: Program, target: Target, devices: int) -> Planned:
    """Compile a program of so many devices and read what the compiler plans."""
    parts = {name: device_bytes(tree) for name, tree in program.parts.items()}
    parts = {name: size for name, size in parts.items() if size}
    begin = time.perf_counter()
    planned = Planned(program.name, parts, tokens=program.tokens)
    if not program.compiled:
        size = sum(parts.values())
        return replace(planned, peak=size, fits=size <= target.memory,
                       seconds=size / target.chip.bandwidth / REACHED)
    try:
        compiled = program.function.lower(*program.arguments).compile(target.options)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        short = _too_large(error, target)
        return replace(planned, error=short or first_line(error)[:300], peak=sum(parts.values()),
                       compile_seconds=time.perf_counter() - begin)
    memory = compiled.memory_analysis()
    peak = (memory.argument_size_in_bytes + memory.output_size_in_bytes
            + memory.temp_size_in_bytes - memory.alias_size_in_bytes)
    kinds = _collectives(compiled, devices)
    moved = None if kinds is None else sum(kinds.values())
    flops = count_flops(program.function, *program.arguments)
    alone = program.name == "decode"
    shares = (1, 1) if alone else (devices, _optimizer_shards(program))
    own = flops.optimizer.total()
    counted = (flops.total - own) / shares[0] + own / shares[1]
    return replace(
        planned, temporaries=memory.temp_size_in_bytes, peak=peak, flops=counted,
        collective_bytes=moved, collectives=kinds, fits=peak <= target.memory,
        seconds=estimate(flops, shares, peak, moved or 0.0, target),
        compile_seconds=time.perf_counter() - begin)


def _collectives(compiled: Any, devices: int) -> dict[str, float] | None:
    """Bytes that a device sends by kind of collective; None where the program cannot be read."""
    try:
        text = compiled.as_text()
    except RuntimeError as error:  # a libtpu whose programs this jaxlib does not know
        say(f"the bytes that are sent are not known: this jaxlib cannot read what libtpu compiles "
            f"({first_line(error)[:100]}); `pip install 'jax[tpu]'` has the one that fits")
        return None
    found: dict[str, float] = {}
    for one in find_collectives(text, devices):
        found[one.kind] = found.get(one.kind, 0.0) + one.moved
    return found


def _too_large(error: Exception, target: Target) -> str:
    """In one sentence, where a TPU's compiler refuses what its memory does not hold."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text and "exceeded hbm capacity" not in text.lower():
        return ""
    where = text.find("Used ")
    detail = text[where : text.find(".", where + 12)] if where >= 0 else first_line(error)[:160]
    return f"the compiler for {target.kind} finds that it does not fit: {detail}"


def _optimizer_shards(program: Program) -> int:
    """Over how many devices what trains is split; the others repeat the optimiser's work."""
    trained = program.parts.get("trained")
    leaves = jax.tree.leaves(trained)
    if not leaves:
        return 1
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    return max(1, round(whole / max(device_bytes(trained), 1)))


def estimate(
    flops: Flops, shares: tuple[int, int], touched: int, moved: float, target: Target
) -> float:
    """Seconds of one call, where each resource reaches 45% of its peak and none overlaps.

        t = (sum_dtype flops / peak(dtype) + touched / bandwidth + moved / link) / 0.45

    `touched` takes every planned byte as read or written once, `shares` how many devices share the
    FLOPs of the model and those of the optimiser. An estimate of the order of magnitude.
    """
    chip, total = target.chip, 0.0
    passes = flops.model + flops.recomputed
    for own, devices in zip((passes, flops.optimizer), shares, strict=True):
        for dtype, n in own.items():
            total += n / devices / (chip.flops32 if "32" in dtype else chip.flops16)
    return (total + touched / chip.bandwidth + moved / chip.link) / REACHED


def _advice(
    file: str, overrides: Sequence[str], target: Target, program: str
) -> tuple[list[str], int] | None:
    """The overrides with which a program fits and its peak then; None where none were found."""
    added: list[str] = []
    config = load_config(RunConfig, file, overrides)
    for option in _options(config, program, dict(_mesh(config, target).shape)):
        key = option.partition("=")[0]  # an option goes before one of the same name
        tried = [*(one for one in added if one.partition("=")[0] != key), option]
        try:
            changed = load_config(RunConfig, file, [*overrides, *tried])
            (one,) = planned(changed, target, program)
        except BadInput:
            continue  # an option that the rest of this config does not allow
        added = tried
        say(f"{program} with {' '.join(added)}: {_gb(one.peak)} a device")
        if one.fits:
            return added, one.peak
    return None


def _options(config: RunConfig, program: str, axes: dict[str, int]) -> list[str]:
    """Overrides that save memory and are not set yet, the cheapest in time and accuracy first."""
    section: Any = getattr(config, program, None)
    compute, spec = config.compute, config.init.spec
    found = []
    if section is None:
        return []
    if not compute.remat:
        found.append("compute.remat=true")
    if not compute.attention_block and section.length > 512:
        found.append("compute.attention_block=256")
    if compute.chunk > 256 or compute.chunk == 0:
        found.append("compute.chunk=256")
    rows = axes.get("data", 1) * axes.get("fsdp", 1)
    if program == "calibrate":
        return [*found, f"calibrate.batch_size={rows}"] if section.batch_size > rows else found
    if section.batch_size // section.accumulate > rows and section.batch_size % rows == 0:
        found.append(f"{program}.accumulate={section.batch_size // rows}")
    runs_teacher = program in ("qat", "end_to_end") and not getattr(section, "teacher_top", 0)
    if runs_teacher and not compute.teacher:
        found.append("compute.teacher=bfloat16")
    if section.optimizer.momentum != "bfloat16":
        found.append(f"{program}.optimizer.momentum=bfloat16")
    if program == "qat" and getattr(spec, "latent_dtype", "") == "float32":
        found.append("init.spec.latent_dtype=bfloat16")
    if runs_teacher and compute.teacher != "int8":
        found.append("compute.teacher=int8")
    if program == "qat" and runs_teacher and section.gamma == 0:
        found.append("qat.teacher_top=64")
    devices = axes.get("data", 1) * axes.get("tensor", 1) * axes.get("fsdp", 1)
    if axes.get("data", 1) > 1:
        if "fsdp" in axes:
            found.append(f"mesh={{data: 1, fsdp: {devices // axes['tensor']}, "
                         f"tensor: {axes['tensor']}}}")
        else:
            found.append(f"mesh={{data: 1, tensor: {devices}}}")
    return found


def _gb(size: float) -> str:
    return f"{size / GB:.3g} GB"


def _print(
    config: RunConfig, target: Target, found: Sequence[Planned],
    advice: dict[str, tuple[list[str], int] | None],
) -> None:
    """The plan as tables on stdout."""
    axes = ", ".join(f"{name} {n}" for name, n in _mesh(config, target).shape.items())
    kinds = list(dict.fromkeys(part for one in found for part in one.parts))
    rows = [[one.program, *(_gb(one.parts[k]) if k in one.parts else "-" for k in kinds),
             _gb(one.temporaries), _gb(one.peak), "yes" if one.fits else "NO"] for one in found]
    table(f"{config.name} on {target.name}: bytes a device of {_gb(target.memory)} ({axes})",
          ["program", *kinds, "temporaries", "peak", "fits"], rows, stdout=True)
    rows = [[one.program, one.tokens, f"{one.flops:.3g}",
             "-" if one.collective_bytes is None else _gb(one.collective_bytes),
             f"{one.seconds:.3g} s",
             f"{one.compile_seconds:.1f} s" if one.compile_seconds else "counted"]
            for one in found]
    table("one call", ["program", "tokens", "FLOPs a device", "sent by a device", "time, about",
                       "compiled in"], rows, stdout=True)
    for one in found:
        if one.error:
            print(f"{one.program}: {one.error}")
        if one.fits:
            continue
        way = advice[one.program]
        none = ("it runs on one device whatever the mesh: lower evaluate.context, take fewer bits, "
                "or a device with more memory" if one.program == "decode" else
                "none of the options that save memory makes it fit: take more devices, and split "
                "the model over them by the axes of mesh")
        print(f"{one.program} does not fit; " + (
            f"it does with {' '.join(way[0])} ({_gb(way[1])} a device)" if way else none))
    if left := _block_wise(config):
        print(f"not planned, for they hold one block of the model at a time: {', '.join(left)}")
    print(f"times assume {REACHED:.0%} of the peak FLOP/s, bandwidth and links, nothing overlapped")
