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
# Folders at the root, and where their modules lie in the wheel. Benchmarks are not in it.
FOLDERS = {"rabit_jax": "rabit_jax", "kernels": "rabit_jax/kernels",
           "experiments": "rabit_jax/experiments"}
NOT_SHIPPED = ("kernels/bench/", "experiments/bench/", "experiments/notebooks/")
BENCHMARKS = {"rabit-bench", "rabit-kernels-bench"}
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
# transformers imports `kernels` only where the metadata has a version that it likes; argv: whether
# to give it that version.
BESIDE_KERNELS = """
import importlib.metadata, importlib.util, pathlib, sys
import transformers
import transformers.utils.import_utils as utils

liked = sys.argv[1] == "yes"
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
# Our folder of that name is no package: a regular package hides it, wherever both are found.
assert importlib.util.find_spec("kernels.matmul") is None
assert importlib.util.find_spec("rabit_jax.kernels.layer") is None
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
    """The path in the wheel of every module that belongs there."""
    for folder, place in FOLDERS.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            if not file.relative_to(ROOT).as_posix().startswith(NOT_SHIPPED):
                yield f"{place}/{file.relative_to(ROOT / folder).as_posix()}"


def run(*command, cwd, paths=(), code=0, **environment):
    """What a command prints; it must end with this exit code."""
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTHONPATH")}
    if paths:
        environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**kept, **environment},
        capture_output=True, text=True, timeout=240,
    )
    assert done.returncode == code, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout if code == 0 else done.stderr


def build(kind, source, place):
    """Build "wheel", "sdist" or "editable" of a source folder into `place`, without a network."""
    script = f"import sys; from setuptools import build_meta as b; b.build_{kind}(sys.argv[1])"
    run(sys.executable, "-c", script, place, cwd=source)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder with the wheel, the archive and `site`, into which the wheel is installed."""
    place = tmp_path_factory.mktemp("package")
    source = place / "source"
    hidden = shutil.ignore_patterns("__pycache__", ".*", "runs", "build", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=hidden, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    wheel = ["wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    run(*pip, *wheel, "--wheel-dir", place, source, cwd=place)
    (wheel,) = place.glob("*.whl")
    run(*pip, "install", "--no-deps", "--no-index", "--target", place / "site", wheel, cwd=place)
    build("sdist", source, place)
    return place


@pytest.mark.parametrize("name", ["kernels", "experiments"])
def test_folders_at_the_root_are_imported_through_relative_links(name):
    link = ROOT / "rabit_jax" / name
    assert link.is_symlink() and os.readlink(link) == f"../{name}"
    # As a regular package the bare name would hide others, such as PyPI's `kernels`.
    assert not (ROOT / name / "__init__.py").exists()


@pytest.mark.more
def test_the_wheel_holds_every_module_and_nothing_outside_of_the_package(built):
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert sorted(n for n in names if n.endswith(".py")) == sorted(modules())
    info = f"rabit_jax-{rabit_jax.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"rabit_jax", info}
    configs = {f"rabit_jax/experiments/configs/{f.relative_to(ROOT / 'experiments/configs')}"
               for f in (ROOT / "experiments" / "configs").rglob("*") if f.is_file()}
    assert configs <= set(names)
    assert f"{info}/licenses/LICENSE" in names
    sources = {f"rabit_jax/kernels/cpu/native/{f.name}"
               for f in (ROOT / "kernels" / "cpu" / "native").iterdir()}
    assert sources <= set(names)
    assert len(names) < len(configs) + len(sources) + len(list(modules())) + 20


@pytest.mark.more
def test_the_archive_builds_without_the_repository(built, tmp_path):
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as held:
        assert not [member.name for member in held if member.issym() or member.islnk()]
        held.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    assert not [path for path in source.rglob("*") if path.is_symlink()]
    inside = {path.name for path in source.iterdir()}
    wanted = {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "pyproject.toml"}
    assert wanted | {f.name for f in ROOT.glob("requirements*.txt")} <= inside
    assert not {"tests", "docs", "runs"} & inside
    build("wheel", source, tmp_path)
    assert wheel_names(built) == wheel_names(tmp_path)


@pytest.mark.more
def test_an_archive_of_git_builds_the_same_wheel(built, tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone of the repository")
    who = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    # A commit of the files as they are now, which no branch ever sees; none where all is committed.
    commit = run("git", *who, "stash", "create", cwd=ROOT).strip() or "HEAD"
    run("git", "archive", "--output", tmp_path / "all.tar", commit, cwd=ROOT)
    with tarfile.open(tmp_path / "all.tar") as held:
        held.extractall(tmp_path / "source", filter="data")
    assert (tmp_path / "source" / "rabit_jax" / "kernels").is_symlink()
    build("wheel", tmp_path / "source", tmp_path)
    assert wheel_names(built) == wheel_names(tmp_path)


def wheel_names(place):
    """Names of the files in the one wheel of a folder."""
    (wheel,) = place.glob("*.whl")
    return sorted(zipfile.ZipFile(wheel).namelist())


@pytest.mark.more
def test_an_editable_installation_is_one_path_and_has_the_benchmarks(built, tmp_path):
    build("editable", built / "source", tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as held:
        held.extractall(tmp_path / "site")
    (entry,) = (path for path in (tmp_path / "site").iterdir() if path.is_file())
    assert entry.suffix == ".pth" and Path(entry.read_text().strip()) == built / "source"
    script = """
import site, sys
site.addsitedir(sys.argv.pop(1))
import rabit_jax.kernels.matmul as ours, kernels
from rabit_jax.experiments.benchmarks import main
print(ours.__file__, kernels.LayerRepository.__name__, flush=True)
main(["aot", "--help"])
"""
    shown = run(sys.executable, "-c", script, tmp_path / "site", cwd=tmp_path)
    first, _, rest = shown.partition("\n")
    assert first.split() == [
        str(built / "source/rabit_jax/kernels/matmul.py"), "LayerRepository"]
    assert "python -m experiments.bench aot" in rest


@pytest.mark.more
@pytest.mark.parametrize("name", ["experiments.run", "rabit_jax.experiments.run"])
def test_a_checkout_runs_without_being_installed(name):
    assert "exit codes" in run(sys.executable, "-m", name, "--help", cwd=ROOT)


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
    module = ["-m", "rabit_jax.experiments.run", "--help"]
    assert "exit codes" in run(sys.executable, *module, cwd=tmp_path, paths=[site])


@pytest.mark.more
@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_an_installed_package_says_where_the_benchmarks_are(name, built, tmp_path):
    site = built / "site"
    said = run(sys.executable, site / "bin" / name, "step", cwd=tmp_path, paths=[site], code=2)
    assert said.count("\n") == 1 and said.startswith("error: the benchmarks are not part of")
    assert "pip install -e ." in said


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
@pytest.mark.parametrize("checkout", [True, False])
def test_transformers_finds_the_other_package_kernels(checkout, liked, built, tmp_path):
    cwd, paths = (ROOT, []) if checkout else (tmp_path, [built / "site"])
    told = run(sys.executable, "-c", BESIDE_KERNELS, liked, cwd=cwd, paths=paths)
    if importlib.util.find_spec("torch") is None:
        pytest.skip("without torch everything was imported, but no model was run")
    assert told == "forward\n"


def test_the_citation_file_is_of_this_version_and_names_every_method():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0" and cited["version"] == rabit_jax.__version__
    assert all(ref["title"] and ref["authors"] and ref["type"] for ref in cited["references"])
    found = {i["value"] for ref in cited["references"] for i in ref.get("identifiers", ())}
    files = [f for folder in ("weights", "signs", "calibration")
             for f in (ROOT / "rabit_jax" / folder).glob("*.py")]
    named = {f"arXiv:{n}" for f in files for n in re.findall(r"arXiv (\d+\.\d+)", f.read_text())}
    assert named and named <= found
    assert f"## [{rabit_jax.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
