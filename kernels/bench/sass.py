"""Machine code of Triton kernels without a GPU: compiled ahead of time, disassembled and counted.

A kernel that reads packed signs is as fast as memory only while it issues few instructions per
sign. How many is read off the disassembly of its hot loop, the loop with the most tensor
instructions, or off the whole program where all loops are unrolled:

    instructions per bit = instructions of a warp * 32 lanes / signs that the warp multiplies

The signs follow from the tensor instructions, each of which multiplies a fixed number of them.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

Row: TypeAlias = dict[str, Any]  # of a table, by column
LANES = 32
# Instructions by what they do; the first part of the name decides, and anything else is "other".
CLASSES = {
    "logic": ("LOP", "LOP3", "SHF", "SHL", "SHR", "PRMT", "POPC", "BMSK", "SGXT", "BREV", "FLO"),
    "address": ("IADD", "IADD3", "IMAD", "LEA", "VIADD", "IABS", "ISCADD", "VIADDMNMX", "VIMNMX",
                "IMNMX"),
    "predicate": ("PLOP3", "ISETP", "SEL", "FSETP", "FSEL", "P2R", "R2P", "VOTE"),
    "convert": ("I2F", "I2FP", "F2I", "F2F", "F2FP", "I2I", "I2IP"),
    "float": ("FADD", "FMUL", "FFMA", "HADD2", "HMUL2", "HFMA2", "MUFU", "FMNMX"),
    "tensor": ("BMMA", "IMMA", "HMMA", "QMMA", "IGMMA", "HGMMA", "QGMMA"),
    "move": ("MOV", "CS2R", "S2R", "R2UR", "S2UR"),
    "global": ("LDG", "LDGSTS", "STG", "UTMALDG", "UBLKCP"),
    "shared": ("LDS", "LDSM", "STS", "STSM", "SHFL"),
    "constant": ("LDC", "ULDC"),
    "local": ("LDL", "STL"),
    "barrier": ("BAR", "DEPBAR", "LDGDEPBAR", "WARPSYNC", "WARPGROUP", "SYNCS", "MEMBAR", "FENCE",
                "BSSY", "BSYNC"),
    "control": ("BRA", "EXIT", "CALL", "RET", "NOP", "BREAK"),
}
# What runs on the integer units, the scarce ones in these kernels.
INTEGER = ("logic", "address", "predicate")
_CLASS_OF = {name: kind for kind, names in CLASSES.items() for name in names}
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


class Instruction(NamedTuple):
    """One line of a disassembly: its address, name with modifiers, and operands as text."""

    address: int
    name: str
    operands: str


class Compiled(NamedTuple):
    """A disassembled kernel, and what its compiler decided.

    Attributes:
      instructions: all of them, in order of their addresses.
      registers: per thread.
      spills: bytes per thread of stack and local memory.
      layouts: Triton's own text of the kernel, in which it has chosen what each lane holds.
    """

    instructions: list[Instruction]
    registers: int
    spills: int
    layouts: str


def compile_kernel(
    kernel: Any, types: dict[str, str], constants: Mapping[str, object], arch: int, warps: int,
    stages: int,
) -> Compiled:
    """A `triton.jit` function for a compute capability such as 90.

    Args:
      kernel: the function.
      types: Triton's type of each argument that is no constant, such as `*i32`; arrays are taken
        to begin at multiples of 16 bytes, as JAX's do.
      constants: the values of all others.
      arch: compute capability times 10.
      warps: warps of a program.
      stages: stages of the loads of a loop.

    Raises:
      Exception: whatever Triton raises for a kernel that it cannot compile.
    """
    from triton.compiler import ASTSource

    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in types}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return _compile(source, arch, warps, stages)


def compile_ir(text: str, arch: int, warps: int, stages: int) -> Compiled:
    """A kernel given as the text of Triton's intermediate representation."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ttir"
        path.write_text(text)
        return _compile(str(path), arch, warps, stages)


def _compile(source: object, arch: int, warps: int, stages: int) -> Compiled:
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope():
        knobs.cache.dir = folder
        made = triton.compile(source, target=GPUTarget("cuda", arch, LANES), options=options)
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        code, usage = _dump(cubin, "-sass"), _dump(cubin, "-res-usage")
        return Compiled(parse(code), *_usage(usage), made.asm["ttgir"])


def _dump(cubin: Path, what: str) -> str:
    from triton import knobs

    tool = knobs.nvidia.cuobjdump.path
    done = subprocess.run([tool, what, str(cubin)], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _usage(text: str) -> tuple[int, int]:
    found = _USAGE.search(text)
    if found is None:
        raise ValueError(f"cuobjdump printed no resource usage: {text[:200]}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def parse(text: str) -> list[Instruction]:
    """The instructions of what `cuobjdump -sass` prints."""
    return [Instruction(int(m[1], 16), m[2], m[3].strip()) for m in _LINE.finditer(text)]


def kind(instruction: Instruction) -> str:
    """A key of `CLASSES`, "uniform" for the unit that all lanes share, or "other"."""
    name = instruction.name.split(".")[0]
    # Multiplications by nothing are how the multiplier copies a register.
    if instruction.name.startswith("IMAD.MOV") or (
            instruction.name == "IMAD.U32" and ", RZ, RZ," in instruction.operands):
        return "move"
    if name not in _CLASS_OF and name.startswith("U"):
        return "uniform"
    return _CLASS_OF.get(name, "other")


def hot_loop(instructions: Sequence[Instruction]) -> list[Instruction]:
    """The loop with the most tensor instructions, the shortest of such; without one, everything."""
    best = (0, 0, list(instructions))
    for at, name, operands in instructions:
        target = re.search(r"0x([0-9a-f]+)", operands) if name.startswith("BRA") else None
        if target is None or int(target[1], 16) > at:
            continue
        body = [one for one in instructions if int(target[1], 16) <= one.address <= at]
        best = max(best, (count(body)["tensor"], -len(body), body), key=lambda found: found[:2])
    return best[2]


def count(instructions: Sequence[Instruction]) -> Counter:
    """How many instructions there are of each class."""
    return Counter(map(kind, instructions))


def load_bits(instructions: Sequence[Instruction]) -> int:
    """Width of the narrowest loads from global memory that carry a sixteenth of all bits or more.

    So single values that a program reads once do not count, but weights always do.
    """
    widths = Counter()
    for one in instructions:
        if one.name.split(".")[0] in ("LDG", "LDGSTS"):
            width = re.search(r"\.[US]?(8|16|64|128|256)(?:\.|$)", one.name)
            widths[int(width[1]) if width else 32] += int(width[1]) if width else 32
    total = sum(widths.values())
    return min((width for width, bits in widths.items() if 16 * bits >= total), default=0)


def measure(compiled: Compiled, signs: float) -> Row:
    """The numbers of a kernel whose tensor instructions multiply `signs` packed signs each.

    Returns:
      `instructions_per_bit`, `integer_per_bit`, `registers`, `spills` in bytes, `load_bits`,
      `tensor_instruction`, and `classes`, instructions per bit of each class; all per bit and lane.

    Raises:
      ValueError: the kernel has no tensor instruction, or more than one kind of them.
    """
    body = hot_loop(compiled.instructions)
    classes = count(body)
    names = {one.name for one in body if kind(one) == "tensor"}
    if len(names) != 1:
        raise ValueError(f"the kernel has tensor instructions {sorted(names)}, wanted one kind")
    share = LANES / (classes["tensor"] * signs)
    return {
        "instructions_per_bit": len(body) * share,
        "integer_per_bit": sum(classes[name] for name in INTEGER) * share,
        "registers": compiled.registers,
        "spills": compiled.spills,
        "load_bits": load_bits(body),
        "tensor_instruction": names.pop(),
        "classes": {name: n * share for name, n in sorted(classes.items())},
    }
