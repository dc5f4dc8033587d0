"""The native CPU kernel: compiled once from the C++ sources in `native/`, then loaded.

The library lies in `$XDG_CACHE_HOME/rabit_jax` (`~/.cache/rabit_jax`) under a name made of the
sources, the flags, the compiler's version, jaxlib's version and the machine's architecture; which
instructions are used is decided when it runs. It is linked against neither Python nor jaxlib, whose
headers it is compiled with.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np

from rabit_jax.atomic import replacing
from rabit_jax.errors import BadInput, first_line
from rabit_jax.progress import say
from rabit_jax.workspaces import user_cache

SETTING = "RABIT_NATIVE"
SOURCES = Path(__file__).parent / "native"
SIGNS, TABLE, ATTENTION = "rabit_signs_matmul", "rabit_table_matmul", "rabit_attention"
COMPILERS = ("c++", "g++", "clang++")
# Without contraction of products and sums the same bits come out of every instruction set.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-pthread", "-w")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
# What the files of one instruction set need besides; each is entered only on a machine that has it.
X86_FLAGS = {
    "avx2": AVX2,
    "avxvnni": (*AVX2, "-mavxvnni"),
    "avx512": (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni",
               "-mavx512bf16", "-mprefer-vector-width=512"),
}
ARM_FLAGS = {"neon": ("-march=armv8.2-a+dotprod+fp16",)}


@dataclass(frozen=True)
class Library:
    """A loaded library whose calls XLA knows.

    Attributes:
      path: where it lies.
      isas: names of the instruction sets that this machine has, the best first.
      bfloat16: which of them multiply in bfloat16.
      isa: number of the one in use.
      suffix: of the names under which XLA knows its calls.
    """

    path: Path
    isas: tuple[str, ...]
    bfloat16: tuple[bool, ...]
    isa: int = 0
    suffix: str = ""


@functools.cache
def library() -> Library | None:
    """The library, compiled at the first call on a machine; None where JAX's path runs instead.

    The environment variable RABIT_NATIVE=0 switches it off; the name of an instruction set, such as
    RABIT_NATIVE=avx2, chooses that one. Where there is no compiler, or the sources do not compile,
    or the cache folder cannot be written, one line on stderr says so.

    Raises:
      BadInput: RABIT_NATIVE is something else, or names an instruction set that is not there.
    """
    wanted = os.environ.get(SETTING, "1")
    if wanted == "0":
        return None
    try:
        found = _load(_file())
    except Missing as error:
        say(f"packed weights take the slower JAX path on this CPU: {error}; {SETTING}=0 hides "
            "this line")
        return None
    if wanted in ("", "1"):
        return found
    if wanted not in found.isas:
        raise BadInput(f"{SETTING} is {wanted!r}, wanted 0, 1 or an instruction set of this "
                       f"machine: {', '.join(found.isas)}")
    return replace(found, isa=found.isas.index(wanted))


def status() -> str:
    """What multiplies packed weights on this CPU, in a few words; compiles nothing.

    >>> status()
    'native, avx512 with bfloat16'
    """
    if os.environ.get(SETTING) == "0":
        return f"JAX ({SETTING}=0)"
    try:
        file = _file()
    except Missing as error:
        return f"JAX ({error})"
    if not file.exists():
        return "native, to be compiled at first use"
    found = library()
    if found is None:
        return "JAX"
    return f"native, {found.isas[found.isa]}" + (
        " with bfloat16" if found.bfloat16[found.isa] else "")


class Missing(Exception):
    """Why there is no library, as the middle of a sentence."""


def _file() -> Path:
    """Where the library of these sources lies or will lie.

    Raises:
      Missing: no compiler, or no place to keep it.
    """
    compiler = _compiler()
    parts = [file.name + file.read_text(encoding="utf-8") for file in sorted(SOURCES.iterdir())]
    parts += [repr((FLAGS, _files())), _version(compiler), jaxlib.version.__version__,
              platform.machine(), platform.system()]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    try:
        return user_cache() / f"cpu-{key}.so"
    except BadInput as error:
        raise Missing(str(error)) from None


def _compiler() -> tuple[str, ...]:
    """The command of `$CXX`, or the first of `COMPILERS` that is there."""
    named = tuple(shlex.split(os.environ.get("CXX", "")))
    for command in [named] if named else [(name,) for name in COMPILERS]:
        if shutil.which(command[0]):
            return command
    looked = named[0] if named else ", ".join(COMPILERS)
    raise Missing(f"no C++ compiler was found ({looked})")


@functools.cache
def _version(compiler: tuple[str, ...]) -> str:
    """What the compiler says of itself."""
    try:
        done = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Missing(f"{compiler[0]} does not run ({first_line(error)})") from None
    return done.stdout


def _files() -> dict[str, tuple[str, ...]]:
    """The source files of this architecture, without their suffix, and their own flags."""
    x86, arm = platform.machine() in ("x86_64", "AMD64"), platform.machine() in ("aarch64", "arm64")
    names = [file.stem for file in sorted(SOURCES.glob("*.cc"))]
    own = (X86_FLAGS if x86 else {}) | (ARM_FLAGS if arm else {})
    return {name: own.get(name, ()) for name in names}


def _load(file: Path) -> Library:
    """Load the library, after compiling and testing it where it is not there.

    Raises:
      Missing: it can be neither loaded nor compiled.
    """
    if file.exists():
        with contextlib.suppress(OSError):  # damaged, or of a machine that shares the folder
            return _registered(file)
    try:
        say(f"compiling the CPU kernel with {_compiler()[0]}, once for this machine (about 15 s)")
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with replacing(file) as new:
            compile_library(new)
            found = _registered(new)
            if wrong := _wrong(found):
                raise Missing(f"what {_compiler()[0]} made of it computes {wrong}")
        return replace(found, path=file)
    except OSError as error:
        raise Missing(f"{file} cannot be written or loaded ({first_line(error)})") from None


def compile_library(target: Path) -> None:
    """Compile all sources, two at a time, and link them to `target`.

    Raises:
      Missing: the compiler does not take them.
      OSError: the target cannot be written.
    """
    compiler = _compiler()
    include = ["-isystem", jax.ffi.include_dir()]
    with tempfile.TemporaryDirectory(dir=target.parent) as place:
        def build(item: tuple[str, tuple[str, ...]]) -> str:
            name, own = item
            source, output = SOURCES / f"{name}.cc", os.path.join(place, f"{name}.o")
            _run([*compiler, *FLAGS, *own, *include, "-c", str(source), "-o", output])
            return output

        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            objects = list(pool.map(build, _files().items()))
        _run([*compiler, "-shared", "-pthread", *objects, "-o", str(target)])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr]
        raise Missing(f"{command[0]} does not compile it ({lines[0][:200]})")


_suffixes: dict[int, str] = {}  # by the address of a loaded library's first call


def _registered(file: Path) -> Library:
    """Load a library and make its calls known to XLA.

    A second library of one process, such as one that replaces a wrong one, gets names of its own.
    """
    loaded = ctypes.CDLL(str(file))
    address = ctypes.cast(getattr(loaded, SIGNS), ctypes.c_void_p).value or 0
    if address not in _suffixes:
        _suffixes[address] = f"_{len(_suffixes) + 1}" if _suffixes else ""
        for name in (SIGNS, TABLE, ATTENTION):
            call = jax.ffi.pycapsule(getattr(loaded, name))
            jax.ffi.register_ffi_target(name + _suffixes[address], call, platform="cpu")
    loaded.rabit_isa.restype, loaded.rabit_isa.argtypes = ctypes.c_char_p, [ctypes.c_int]
    names: list[str] = []
    while (name := loaded.rabit_isa(len(names))) is not None:
        names.append(name.decode())
    halves = tuple(bool(loaded.rabit_isa_bfloat16(n)) for n in range(len(names)))
    return Library(file, tuple(names), halves, suffix=_suffixes[address])


def _wrong(found: Library) -> str:
    """What is wrong with a product of 3 rows and 41 outputs, by each instruction set; "" if
    nothing."""
    rng = np.random.default_rng(0)
    batch, i, o = 3, 257, 41
    bits = rng.integers(0, 256, (1, 1, o, 64), np.uint8)
    order = np.unpackbits(bits.reshape(o, 2, 32, 1), axis=-1, bitorder="little").swapaxes(-1, -2)
    signs = order.reshape(o, -1)[:, :i] * 2.0 - 1.0
    x = rng.standard_normal((batch, i)).astype(np.float32)
    want, y = x @ signs.T, jax.ShapeDtypeStruct((batch, o), jnp.float32)
    ones = np.ones((1, 1, 1, o), np.float32), np.ones((1, 1, 1, i), np.float32)
    for n, isa in enumerate(found.isas):
        # Integers of two bytes and of one, and floats.
        for arithmetic, limbs, most in ((0, 2, 0.01), (0, 1, 1.0), (1, 2, 0.01)):
            settings = {"rows": np.array([o]), "limbs": np.int64(limbs), "isa": np.int64(n),
                        "group": np.int64(0), "arithmetic": np.int64(arithmetic)}
            call = jax.ffi.ffi_call(SIGNS + found.suffix, y)
            run = jax.jit(partial(call, **settings))
            arrays = x, bits, *ones, np.int32(0)
            # Compiled by hand, because a call would become part of a caller that is being traced.
            got = np.asarray(run.lower(*arrays).compile()(*arrays))
            if not np.abs(got - want).max() < most:
                return f"{np.abs(got - want).max():.3g} too much with {isa}"
    return ""
