"""Every GPU kernel compiled without a GPU, and how many instructions its hot loop takes per sign.

The case is one row of activations times two paths of 4,096 outputs by 22,272 inputs in a stack of
layers, whose last inputs fill no whole block. Pallas kernels are compiled here by the installed
Triton, on a device by the one inside XLA.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import jax
import jax.numpy as jnp

from rabit_jax.errors import BadInput
from rabit_jax.kernels.bench import sass
from rabit_jax.kernels.bench.sass import Row
from rabit_jax.kernels.layout import packed_bytes

INPUTS, OUTPUTS, LAYERS, PATHS = 22272, 4096, 2, 2
# The types of the kernels' arguments besides the activations.
TYPES = {"layer": "*i32", "bits": "*u8", "total": "*i32", "scale": "*fp32", "g": "*fp16",
         "y": "*fp32"}
COLUMNS = {name: name for name in (
    "kernel", "arch", "instructions_per_bit", "integer_per_bit", "registers", "spills", "load_bits",
    "tensor_instruction")}
EXAMPLES = """examples:
  python -m experiments.bench aot
  python -m experiments.bench aot --archs sm_89,sm_90 --json > aot.json
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--archs", default="sm_89,sm_90", metavar="ARCHS",
                        help="architectures to compile for (default sm_89,sm_90)")


def measure(options: argparse.Namespace) -> list[Row]:
    """The rows of `report` for the architectures of the command line."""
    return report(options.archs.split(","))


def remarks(rows: Sequence[Row]) -> list[str]:
    """The line below the table."""
    return ["per bit and lane: instructions of a warp * 32 / packed signs that it multiplies"]


def report(archs: Sequence[str]) -> list[Row]:
    """Rows of every kernel and architecture.

    Args:
      archs: such as `["sm_89", "sm_90"]`.

    Returns:
      dicts of `kernel`, `arch`, `instructions_per_bit` and `integer_per_bit` (per lane: warp
      instructions * 32 / signs), `registers`, `spills` in bytes, `load_bits`,
      `tensor_instruction`, and `classes`, the instructions per bit of each class.

    Raises:
      BadInput: an architecture that is not `sm_` and a number, or Triton is not installed.
    """
    numbers = [_number(arch) for arch in archs]
    if importlib.util.find_spec("triton") is None:
        raise BadInput("compiling kernels needs triton: pip install triton")
    return [{"kernel": name, "arch": arch, **row(number)}
            for name, row in KERNELS.items() for arch, number in zip(archs, numbers, strict=True)]


def _number(arch: str) -> int:
    if not (arch.startswith("sm_") and arch[3:].isdigit()):
        raise BadInput(f"{arch!r} is no architecture: give names such as sm_89 or sm_90")
    return int(arch[3:])


def compile_triton(impl: str, limbs: int, arch: int, batch: int = 1) -> sass.Compiled:
    """The kernel of `triton_int8` or `triton_b1` for a compute capability such as 90."""
    from rabit_jax.kernels.gpu import triton_b1, triton_int8

    shape = (LAYERS, PATHS, OUTPUTS, packed_bytes(INPUTS))
    if impl == "triton_int8":
        cut, constants, _ = triton_int8.plan(batch, shape, (OUTPUTS,), limbs)
        kernel, made = triton_int8.int8_partials, {"q": "*i8"}
        warps, stages = cut.warps, cut.stages
    else:
        constants, _ = triton_b1.plan(batch, shape, (OUTPUTS,), limbs)
        kernel, made = triton_b1.b1_partials, {"planes": "*i32"}
        warps, stages = triton_b1.WARPS, triton_b1.STAGES
    return sass.compile_kernel(kernel, {**TYPES, **made}, constants, arch, warps, stages)


def _triton(impl: str, limbs: int, signs: float, arch: int) -> Row:
    return sass.measure(compile_triton(impl, limbs, arch), signs)


def _pallas(impl: str, limbs: int, signs: float, arch: int) -> Row:
    from importlib import import_module

    module = import_module(f"rabit_jax.kernels.gpu.{impl}")
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (
        ((1, PATHS, 1, INPUTS), jnp.float32),
        ((LAYERS, PATHS, OUTPUTS, packed_bytes(INPUTS)), jnp.uint8),
        ((LAYERS, PATHS, OUTPUTS), jnp.float16), ((), jnp.int32))]

    def product(u, bits, g, layer):
        return module.signs_matmul(u, bits, g, layer, (OUTPUTS,), limbs)

    text, warps, stages = pallas_ir(product, shapes)
    return sass.measure(sass.compile_ir(text, arch, warps, stages), signs)


def pallas_ir(function: Callable, shapes: Sequence[jax.ShapeDtypeStruct]) -> tuple[str, int, int]:
    """Triton's representation of the one Pallas kernel in a function, its warps and its stages."""
    from jax._src.pallas.triton import lowering

    texts, lower = [], lowering.lower_jaxpr_to_triton_module

    def keep(*args, **kwargs):
        made = lower(*args, **kwargs)
        texts.append(made.module.operation.get_asm(enable_debug_info=False))
        return made

    lowering.lower_jaxpr_to_triton_module = keep
    try:
        with _some_gpu(), warnings.catch_warnings():
            # Said by jax 0.12 whenever such a kernel is lowered.
            warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated")
            traced = jax.jit(function).trace(*shapes)
            lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    finally:
        lowering.lower_jaxpr_to_triton_module = lower
    if len(texts) != 1:
        raise ValueError(f"the function holds {len(texts)} kinds of Pallas kernels, wanted 1")
    warps, stages = (re.search(rf"num_{name} = (\d+)", lowered) for name in ("warps", "stages"))
    if warps is None or stages is None:
        raise ValueError("the lowered kernel does not say how many warps and stages it has")
    return texts[0], int(warps[1]), int(stages[1])


@contextmanager
def _some_gpu() -> Iterator[None]:
    """A GPU to lower for, which jax 0.12 wants named and earlier versions assume."""
    if jax.__version_info__ < (0, 11):
        yield
        return
    from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

    with use_abstract_mesh(AbstractMesh((), (), abstract_device=AbstractDevice(
            "NVIDIA H200", None, "cuda"))):
        yield


# With the signs that one tensor instruction multiplies. One-bit: 8 rows of 256 inputs for 16 planes
# in Triton, 16 rows for 8 planes in Pallas. Int8: 16 rows of 32 inputs; one row of activations
# fills no more of its columns with 3 limbs than with 2.
KERNELS: dict[str, Callable[[int], Row]] = {
    "triton_b1 limbs=2": partial(_triton, "triton_b1", 2, 8 * 256),
    "triton_b1 limbs=3": partial(_triton, "triton_b1", 3, 8 * 256 / 2),
    "triton_int8 limbs=2": partial(_triton, "triton_int8", 2, 16 * 32),
    "pallas_b1 limbs=2": partial(_pallas, "pallas_b1", 2, 16 * 256 / 2),
    "pallas_b1 limbs=3": partial(_pallas, "pallas_b1", 3, 16 * 256 / 3),
    "pallas_int8 limbs=2": partial(_pallas, "pallas_int8", 2, 16 * 32),
}
