"""What may import what: optional packages, circles, the direction between folders, and names."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What a folder, or a file beside the folders, may import besides itself. "experiments" is above
# all others, and `rabit_jax/public.py` gathers the public names of the library.
BASE = {"errors", "types", "atomic", "hosts", "json_text", "locks", "workspaces", "progress",
        "tree"}
WEIGHTS = BASE | {"signs", "kernels", "weights"}
DATA = WEIGHTS | {"calibration", "models", "formats", "data"}
MAY = {
    "errors": set(), "types": set(), "workspaces": {"errors"},
    "atomic": {"errors", "workspaces"}, "locks": {"errors"},
    "hosts": {"errors", "types"}, "json_text": {"types"},
    "progress": {"errors", "types"},
    "tree": {"errors", "types"},
    "kernels": {"errors", "atomic", "progress", "workspaces"},
    "signs": BASE,
    "weights": BASE | {"signs", "kernels"},
    "calibration": WEIGHTS,
    "models": WEIGHTS,
    "formats": WEIGHTS | {"calibration", "models"},
    "data": DATA - {"data"},
    "integrations": DATA - {"data"},
    "train": DATA - {"data"},
    "evaluate": DATA | {"train"},
    "experiments": DATA | {"train", "evaluate", "rabit_jax"},
    "public": WEIGHTS | {"calibration", "models", "formats"},
    "rabit_jax": {"public"},
}

SCRIPT = """
import importlib, sys

ABSENT = ("torch", "triton", "jax_triton", "jax_cuda13_plugin", "lm_eval", "wandb", "gemlite",
          "humming", "starlette", "uvicorn")

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
    """Name -> file of every module, each once: the links to folders at the root are not followed.

    `Path.rglob` of Python 3.11 and 3.12 enters no linked folder.
    """
    found = {}
    for folder in ("rabit_jax", "kernels", "experiments"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            parts = parts if folder == "rabit_jax" else ("rabit_jax", *parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(tree, names):
    """The modules of ours that a file imports anywhere: in functions and for type checking too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "an import relative to its file"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full in names or node.module in names:
                    yield full if full in names else node.module


def graph():
    names = modules()
    return {name: set(imports(ast.parse(file.read_text()), names)) - {name}
            for name, file in names.items()}


def folder(name):
    """`rabit_jax.models.config` -> "models"; `rabit_jax` stands for itself."""
    return name.split(".")[1] if "." in name else name


def circle(edges):
    """The modules of one circle of imports, or None."""
    try:
        graphlib.TopologicalSorter(edges).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


def wrong_direction(edges):
    """`importer -> imported` for each import that `MAY` has no place for."""
    return [f"{name} -> {other}" for name, others in edges.items() for other in sorted(others)
            if folder(other) not in MAY[folder(name)] | {folder(name)}]


def test_all_modules_import_without_what_is_optional():
    # The integrations import the program that they are for, which looks for torch.
    names = [name for name in modules() if folder(name) != "integrations"]
    assert "rabit_jax.signs.ste" in names and "rabit_jax.kernels.reference" in names
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *names], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["imported", str(len(names))]


def test_no_modules_import_each_other_in_a_circle():
    assert (found := circle(graph())) is None, " -> ".join(found)


def test_folders_import_in_one_direction():
    edges = graph()
    assert {folder(name) for name in edges} == MAY.keys()
    assert not wrong_direction(edges)
    # The table itself holds no circle, or it would allow one of folders.
    assert circle(MAY) is None


def test_broken_rules_are_found():
    names = {"rabit_jax.a", "rabit_jax.b", "rabit_jax.b.c"}
    text = ("import rabit_jax.a\nfrom rabit_jax.b import c, other\n"
            "def f():\n    from rabit_jax import a\n    import jax\n")
    assert list(imports(ast.parse(text), names)) == [
        "rabit_jax.a", "rabit_jax.b.c", "rabit_jax.b", "rabit_jax.a"]
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) is not None
    assert wrong_direction({"rabit_jax.kernels.layout": {"rabit_jax.weights.seam"},
                            "rabit_jax.weights.seam": {"rabit_jax.kernels.layout"}}) == [
        "rabit_jax.kernels.layout -> rabit_jax.weights.seam"]


@pytest.mark.parametrize("name", ["rabit_jax", "calibration", "data", "evaluate", "formats",
                                  "models", "signs", "train", "weights"])
def test_no_module_carries_a_name_that_its_package_exports(name):
    package = ROOT / "rabit_jax" / ("" if name == "rabit_jax" else name)
    beside = {path.stem for path in package.iterdir()} - {"__init__", "__pycache__"}
    file = package / "__init__.py"
    nodes = ast.walk(ast.parse(file.read_text() if file.exists() else ""))
    exported = {alias.asname or alias.name for node in nodes if isinstance(node, ast.ImportFrom)
                for alias in node.names}
    assert not beside & exported
