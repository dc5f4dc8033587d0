"""How the native CPU kernel is compiled, found, chosen and done without."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax.errors import BadInput
from rabit_jax.kernels.cpu import library as module
from rabit_jax.kernels.cpu.library import library, status
from rabit_jax.kernels.layout import pack_bits
from rabit_jax.weights.laid import lay
from rabit_jax.weights.sign_paths import PackedSign

ROOT = Path(__file__).parents[2]
native = pytest.mark.skipif(library() is None, reason="no native CPU kernel on this machine")


@pytest.fixture(autouse=True)
def fresh():
    """Every test, and those after it, ask anew."""
    library.cache_clear()
    yield
    library.cache_clear()


def test_zero_switches_it_off_without_a_word(monkeypatch, capfd):
    monkeypatch.setenv("RABIT_NATIVE", "0")
    assert library() is None and status() == "JAX (RABIT_NATIVE=0)"
    assert capfd.readouterr().err == ""


@native
def test_an_instruction_set_is_chosen_by_its_name(monkeypatch):
    for name in library().isas:
        library.cache_clear()
        monkeypatch.setenv("RABIT_NATIVE", name)
        found = library()
        assert found.isas[found.isa] == name and status().startswith(f"native, {name}")
    library.cache_clear()
    monkeypatch.setenv("RABIT_NATIVE", "mmx")
    with pytest.raises(BadInput, match="RABIT_NATIVE is 'mmx', wanted 0, 1 or an instruction set"):
        library()


@pytest.mark.parametrize("compiler, why", [
    ("no-such-compiler", r"no C\+\+ compiler was found \(no-such-compiler\)"),
    ("false", "false does not compile it"),
])
def test_without_a_working_compiler_one_line_says_so(monkeypatch, capfd, tmp_path, compiler, why):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert library() is None and library() is None
    lines = capfd.readouterr().err.splitlines()
    told = [line for line in lines if "slower JAX path" in line]
    assert len(told) == 1 and re.search(why, told[0])
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_cache_folder_that_cannot_be_written_is_named(monkeypatch, capfd, tmp_path):
    tmp_path.chmod(0o500)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert library() is None
    assert str(tmp_path) in capfd.readouterr().err


def test_without_a_home_folder_one_line_says_so(monkeypatch, capfd):
    def nowhere():
        raise BadInput("there is no home folder")

    monkeypatch.setattr(module, "user_cache", nowhere)
    assert library() is None and module.status() == "JAX (there is no home folder)"
    assert "slower JAX path on this CPU: there is no home folder" in capfd.readouterr().err


def test_the_name_follows_sources_and_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "g++ -Dwhatever")
    if not shutil.which("g++"):
        pytest.skip("no g++ here")
    before = module._file()
    shutil.copytree(module.SOURCES, tmp_path / "native")
    monkeypatch.setattr(module, "SOURCES", tmp_path / "native")
    assert module._file() == before
    (tmp_path / "native" / "team.h").write_text("// another\n")
    assert module._file() != before


@native
def test_a_damaged_library_is_compiled_again(monkeypatch, tmp_path):
    sound, made = library().path, []
    file = tmp_path / "cpu.so"
    file.write_bytes(b"damaged")
    monkeypatch.setattr(module, "_file", lambda: file)
    monkeypatch.setattr(module, "compile_library", lambda new: made.append(
        shutil.copyfile(sound, new)))
    library.cache_clear()
    assert library().path == file and made and file.read_bytes() == sound.read_bytes()


@native
def test_a_wrong_library_is_not_kept(monkeypatch, capfd, tmp_path):
    sound = library().path
    monkeypatch.setattr(module, "_file", lambda: tmp_path / "cpu.so")
    monkeypatch.setattr(module, "compile_library", lambda new: shutil.copyfile(sound, new))
    monkeypatch.setattr(module, "_wrong", lambda found: "3 too much with avx2")
    library.cache_clear()
    assert library() is None and not (tmp_path / "cpu.so").exists()
    assert "computes 3 too much with avx2" in capfd.readouterr().err


@native
def test_weights_are_laid_and_multiplied_with_and_without_it(monkeypatch):
    rng = np.random.default_rng(0)
    signs = jnp.asarray(rng.integers(0, 2, (2, 2, 40, 300)).astype(bool))
    g, h = (jnp.asarray(rng.uniform(0.5, 1.5, (2, 2, n)).astype(np.float16)) for n in (40, 300))
    node = PackedSign(pack_bits(signs), g, h)
    xs = [rng.standard_normal((batch, 300)).astype(np.float32) for batch in (1, 70)]
    found = []
    for setting, axes in (("1", 5), ("0", 4)):
        monkeypatch.setenv("RABIT_NATIVE", setting)
        library.cache_clear()
        laid = lay([node], "cpu", 3)
        assert laid.bits.ndim == axes
        found.append([np.asarray(laid.matmul_at(jnp.asarray(x), 1)) for x in xs])
    for first, second in zip(*found, strict=True):
        np.testing.assert_allclose(first, second, rtol=0, atol=1e-5 * np.abs(first).max())


SCRIPT = """
import numpy as np
from rabit_jax.kernels.cpu.calls import signs_matmul
bits, ones = np.full((1, 1, 4, 32), 255, np.uint8), np.ones((1, 1, 4), np.float32)
x, h = np.ones((1, 256), np.float32), np.ones((1, 1, 1, 256), np.float32)
print(signs_matmul(x, bits, ones, h, 0, (4,), 2)[0, 0])
"""


@native
@pytest.mark.more
def test_two_processes_compile_it_at_once(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "RABIT_NATIVE"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    both = [subprocess.Popen([sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert out == "256.0\n" and "compiling the CPU kernel" in err
    assert [file.suffix for file in (tmp_path / "rabit_jax").iterdir()] == [".so"]


ARM = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64") or shutil.which(
    "qemu-aarch64-static")
HOST = shutil.which("g++") or shutil.which("c++")


@pytest.mark.more
@pytest.mark.parametrize("compiler, emulator, names, own", [
    pytest.param(HOST, None, ("avx2",), module.X86_FLAGS, id="x86-64", marks=pytest.mark.skipif(
        HOST is None or platform.machine() != "x86_64", reason="wants g++ on x86-64")),
    pytest.param(ARM[0], ARM[1], ("neon",), module.ARM_FLAGS, id="arm", marks=pytest.mark.skipif(
        None in ARM, reason="wants the packages g++-aarch64-linux-gnu and qemu-user")),
])
def test_loops_agree_with_portable_ones_without_xla(tmp_path, compiler, emulator, names, own):
    flags = [*module.FLAGS, "-O1", "-I", str(module.SOURCES)]
    sources = [f for f in module.SOURCES.glob("*.cc") if f.name != "ffi.cc"]
    objects = []
    for source in [*sources, Path(__file__).with_name("native_check.cc")]:
        objects.append(str(tmp_path / f"{source.stem}.o"))
        subprocess.run([compiler, *flags, *own.get(source.stem, ()), "-c", str(source), "-o",
                        objects[-1]], check=True)
    program = str(tmp_path / "check")
    subprocess.run([compiler, "-static", *objects, "-o", program], check=True)
    done = subprocess.run([emulator, program] if emulator else [program], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout
    assert set(names) <= set(done.stdout.split())
