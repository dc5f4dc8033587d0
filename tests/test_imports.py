"""Every room imports on a machine without a GPU, and without what only some commands need."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

SCRIPT = """
import importlib, sys

ABSENT = ("torch", "triton", "jax_triton", "jax_cuda13_plugin", "lm_eval", "wandb")

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
for name in sys.argv[1:]:
    importlib.import_module(name)
found = [m for m in sys.modules if m.split(".")[0] in ABSENT]
assert not found, found
print("imported", len(sys.argv) - 1)
"""


def modules():
    for room in ("rabit_jax", "kernels", "experiments"):
        for file in sorted((ROOT / room).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            parts = parts if room == "rabit_jax" else ("rabit_jax", *parts)
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_all_modules_import_without_what_is_optional():
    names = list(modules())
    assert "rabit_jax.signs.ste" in names and "rabit_jax.kernels.reference" in names
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *names], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["imported", str(len(names))]
