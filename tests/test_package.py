"""The built package: what is in it, that it runs away from the checkout, and beside others."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import rabit_jax

ROOT = Path(__file__).parents[1]
ROOMS = {"rabit_jax": "rabit_jax", "kernels": "rabit_jax/kernels"}
ROOMS["experiments"] = "rabit_jax/experiments"
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
# transformers imports `kernels` only where the metadata has a version that it likes; argv: whether
# to give it that version, whether this runs in the checkout's root.
BESIDE_KERNELS = """
import importlib.metadata, importlib.util, pathlib, sys
import transformers
import transformers.utils.import_utils as utils

liked, in_checkout = (word == "yes" for word in sys.argv[1:])
version = importlib.metadata.version
if liked:
    wanted = utils.KERNELS_MIN_VERSION
    importlib.metadata.version = lambda name: wanted if name == "kernels" else version(name)
    assert utils.is_kernels_available()
from transformers import AutoTokenizer
import rabit_jax.kernels.matmul
import rabit_jax.kernels.matmul as ours
import kernels

theirs = importlib.metadata.distribution("kernels").locate_file("kernels")
layer = sys.modules[kernels.LayerRepository.__module__]
assert pathlib.Path(layer.__file__).is_relative_to(theirs)
assert not hasattr(rabit_jax.kernels, "LayerRepository") and not hasattr(kernels, "nonsense")
spec = importlib.util.find_spec("kernels.matmul")
assert (spec is not None) == in_checkout, spec
assert spec is None or pathlib.Path(spec.origin) == pathlib.Path(ours.__file__)
if importlib.util.find_spec("torch"):
    import torch
    import transformers.integrations.hub_kernels as hub
    assert not liked or hub.LayerRepository is kernels.LayerRepository
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.LlamaConfig(vocab_size=32, num_key_value_heads=2, **sizes)
    model = transformers.LlamaForCausalLM(config)
    logits = model(torch.zeros(1, 4, dtype=torch.long)).logits
    assert logits.shape == (1, 4, 32) and torch.isfinite(logits).all()
    print("forward")
"""


def modules():
    """Path in the checkout -> path in the wheel, of every module."""
    for room, place in ROOMS.items():
        for file in sorted((ROOT / room).rglob("*.py")):
            yield file, f"{place}/{file.relative_to(ROOT / room).as_posix()}"


def run(*command, cwd, paths=(), **environment):
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTHONPATH")}
    if paths:
        environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**kept, **environment},
        capture_output=True, text=True, timeout=240,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder with the wheel, the archive and `site`, into which the wheel is installed."""
    place = tmp_path_factory.mktemp("package")
    source = place / "source"
    hidden = shutil.ignore_patterns("__pycache__", ".*", "runs", "build", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=hidden)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    run(*pip, *build, "--wheel-dir", place, source, cwd=place)
    (wheel,) = place.glob("*.whl")
    run(*pip, "install", "--no-deps", "--no-index", "--target", place / "site", wheel, cwd=place)
    archive = "import sys; from setuptools import build_meta as b; b.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", archive, place, cwd=source)
    return place


def test_no_module_is_called_like_one_of_the_other_package_kernels():
    files = run(sys.executable, "-c", "import importlib.metadata as m; print('\\n'.join("
                "map(str, m.files('kernels'))))", cwd=ROOT.parent).split()
    theirs = {file.split("/")[1].split(".")[0] for file in files if file.startswith("kernels/")}
    assert "layer" in theirs
    assert theirs & {path.stem for path in (ROOT / "kernels").iterdir()} == {"__init__"}


@pytest.mark.more
def test_the_wheel_holds_every_module_and_nothing_outside_of_the_package(built):
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert sorted(n for n in names if n.endswith(".py")) == sorted(to for _, to in modules())
    info = f"rabit_jax-{rabit_jax.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"rabit_jax", info}
    configs = {f"rabit_jax/experiments/configs/{f.relative_to(ROOT / 'experiments/configs')}"
               for f in (ROOT / "experiments" / "configs").rglob("*") if f.is_file()}
    assert configs <= set(names)
    assert f"{info}/licenses/LICENSE" in names
    assert len(names) < len(configs) + len(list(modules())) + 20


@pytest.mark.more
def test_the_archive_builds_without_the_repository(built, tmp_path):
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as held:
        held.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    inside = {path.name for path in source.iterdir()}
    wanted = {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "pyproject.toml"}
    assert wanted | {f.name for f in ROOT.glob("requirements*.txt")} <= inside
    assert not {"tests", "docs", "runs"} & inside
    again = "import sys; from setuptools import build_meta as b; b.build_wheel(sys.argv[1])"
    run(sys.executable, "-c", again, tmp_path, cwd=source)
    (first,), (second,) = built.glob("*.whl"), tmp_path.glob("*.whl")
    assert zipfile.ZipFile(first).namelist() == zipfile.ZipFile(second).namelist()


@pytest.mark.more
def test_installed_commands_run_in_another_folder(built, tmp_path):
    site = built / "site"
    assert {path.name for path in (site / "bin").iterdir()} == set(SCRIPTS)
    told = run(sys.executable, "-c", "import rabit_jax.kernels.matmul as m, importlib.metadata as d"
               "; print(m.__file__, d.version('rabit-jax'))", cwd=tmp_path, paths=[site]).split()
    assert told == [str(site / "rabit_jax/kernels/matmul.py"), rabit_jax.__version__]
    script = site / "bin" / "rabit-run"
    assert "exit codes" in run(sys.executable, script, "--help", cwd=tmp_path, paths=[site])
    settings = ["--config", "quickstart", "init.spec.k=3", "data.cache=cache", "--dry-run"]
    shown = run(sys.executable, script, *settings, cwd=tmp_path, paths=[site])
    assert "name: quickstart" in shown and "ResidualSign" in shown


@pytest.mark.more
@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_every_command_has_help_with_examples(name, monkeypatch, capsys):
    module, function = SCRIPTS[name].split(":")
    main = getattr(importlib.import_module(module), function)
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "python -m" in shown and "exit codes" in shown


@pytest.mark.more
@pytest.mark.parametrize("liked", ["yes", "no"])
@pytest.mark.parametrize("checkout", ["yes", "no"])
def test_transformers_finds_the_other_package_kernels(checkout, liked, built, tmp_path):
    cwd, paths = (ROOT, []) if checkout == "yes" else (tmp_path, [built / "site"])
    told = run(sys.executable, "-c", BESIDE_KERNELS, liked, checkout, cwd=cwd, paths=paths)
    if importlib.util.find_spec("torch") is None:
        pytest.skip("without torch everything was imported, but no model was run")
    assert told == "forward\n"


def test_the_citation_file_is_of_this_version_and_names_every_method():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0" and cited["version"] == rabit_jax.__version__
    assert all(ref["title"] and ref["authors"] and ref["type"] for ref in cited["references"])
    found = {i["value"] for ref in cited["references"] for i in ref.get("identifiers", ())}
    files = [f for room in ("weights", "init") for f in (ROOT / "rabit_jax" / room).glob("*.py")]
    named = {f"arXiv:{n}" for f in files for n in re.findall(r"arXiv (\d+\.\d+)", f.read_text())}
    assert named and named <= found
    assert f"## [{rabit_jax.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
