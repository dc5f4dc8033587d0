"""Upload a model folder to the Hugging Face hub: `python -m experiments.push --help`."""

from __future__ import annotations

from rabit_jax.experiments.engine.signals import ENDED, STOPPED, watch

if __name__ == "__main__":
    watch(STOPPED, ENDED)  # before the imports below, which take seconds

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rabit_jax.errors import BadInput
from rabit_jax.experiments.engine.console import EXIT_CODES, common_options, main_guard, table
from rabit_jax.formats.checkpoint import open_checkpoint
from rabit_jax.formats.folder import find_folder, is_model_folder, is_run_folder, read_json
from rabit_jax.formats.hub import ID, why
from rabit_jax.formats.packed_model import is_packed, load_packed
from rabit_jax.progress import say

EXAMPLES = """\
examples:
  python -m experiments.push --model runs/mine/packed --repo org/name
      lists what would be uploaded
  python -m experiments.push --model runs/mine/packed --repo org/name --private --yes-upload
      uploads it; log in first by `hf auth login`
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, or 2 for bad input (one sentence on stderr)."""
    args = _parser().parse_args(argv)
    return main_guard(lambda: _run(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.push", epilog=f"{EXAMPLES}\n{EXIT_CODES}",
        description="Upload a model folder, packed or dense, to the Hugging Face hub.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common_options(parser)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR",
        help="model folder, or a run folder for its packed model")
    add("--repo", required=True, metavar="ORG/NAME", help="model repository on the hub")
    add("--yes-upload", action="store_true",
        help="really upload; without it the files are only listed")
    add("--private", action="store_true", help="for a new repository: only its members see it")
    return parser


def _run(args: argparse.Namespace) -> None:
    folder = Path(os.path.expanduser(args.model))
    if is_run_folder(folder):
        folder = find_folder(folder)
    if "/" not in args.repo or not ID.fullmatch(args.repo):
        raise BadInput(f"--repo is {args.repo!r}, wanted an owner and a name such as org/name")
    _check(folder)
    files = [f for f in sorted(folder.iterdir()) if f.is_file() and not f.name.startswith(".")]
    sizes = [f.stat().st_size for f in files]
    rows = [*((f.name, size) for f, size in zip(files, sizes, strict=True)), ("total", sum(sizes))]
    table(f"{folder} to {args.repo}", ("file", "bytes"), rows, stdout=True)
    if not args.yes_upload:
        print("nothing was uploaded: the same command with --yes-upload does it")
        return
    _upload(folder, args.repo, args.private, [f.name for f in files])


def _check(folder: Path) -> None:
    """Refuses a folder that is no model, or one that could not be read back."""
    if not folder.is_dir():
        raise BadInput(f"no model folder {folder}")
    if not is_model_folder(folder):
        raise BadInput(f"{folder} is no model folder, it lacks config.json or safetensors: give "
                       "the folder that a run, save_packed or the export wrote")
    if is_packed(read_json(folder / "config.json")):
        load_packed(folder)  # which verifies every checksum
        return
    with open_checkpoint(folder):
        pass


def _upload(folder: Path, repo: str, private: bool, names: list[str]) -> None:
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise BadInput("you are not logged in to the hub: run `hf auth login`")
    api = HfApi()
    try:
        # None leaves a new repository's visibility to the owner's settings.
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise BadInput(f"{repo} exists and is public: make it private on the hub, or leave "
                           "--private out")
        say(f"uploading {len(names)} files to {repo}")
        api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=names,
                          commit_message="Upload model")
    except BadInput:
        raise
    except Exception as error:  # network and hub raise many kinds
        raise BadInput(f"nothing or not all was uploaded to {repo}: {why(error, repo)}") from error
    print(f"uploaded: {api.endpoint}/{repo}")


if __name__ == "__main__":
    sys.exit(main())
