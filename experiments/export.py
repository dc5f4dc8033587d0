"""Write the dense Hugging Face folder of a packed model: `python -m experiments.export --help`.

transformers, vLLM and other programs read that folder; it has the size of an unquantised model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rabit_jax.errors import BadInput
from rabit_jax.experiments.engine.console import EXIT_CODES, common_options, main_guard
from rabit_jax.formats.families import tensor_names
from rabit_jax.formats.folder import find_folder, read_generation
from rabit_jax.formats.hf import save_hf
from rabit_jax.formats.model_card import CARD, base_and_licence, dense_card
from rabit_jax.formats.packed_model import load_model
from rabit_jax.models.config import DTYPES
from rabit_jax.models.decoder import param_shapes
from rabit_jax.progress import loading, progress

EXAMPLES = """\
examples:
  python -m experiments.export --model runs/quickstart/packed --output runs/quickstart/dense
  python -m experiments.export --model org/packed-model --output dense --dtype float32
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, or 2 for bad input (one sentence on stderr)."""
    args = _parser().parse_args(argv)
    return main_guard(lambda: _run(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.export", epilog=f"{EXAMPLES}\n{EXIT_CODES}",
        description="Write the dense Hugging Face folder of a packed (or dense) model.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common_options(parser)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", 
        help="model folder, packed or dense, a run folder for its packed model, or a hub id")
    add("--output", required=True, metavar="DIR",
        help="where to write; a model folder of that name is replaced")
    add("--dtype", default="bfloat16", choices=DTYPES,
        help="of the stored tensors; default %(default)s. Only float32 holds the packed model's "
             "matrices without rounding")
    return parser


def _run(args: argparse.Namespace) -> None:
    source, target = find_folder(args.model), Path(args.output)
    if target.resolve() == source.resolve():
        raise BadInput(f"--output {target} is the model itself: choose another folder")
    with loading(args.model) as done:
        model, params, tokenizer = load_model(source, done)
    shapes = param_shapes(model.config)
    total = sum(1 for path, shape in shapes.items() for _ in tensor_names(path, shape))
    base, licence = base_and_licence(source)
    card = dense_card(target.name, args.model, args.dtype, base, licence)
    with progress("export", total) as bar:
        save_hf(target, model, params, tokenizer, args.dtype, read_generation(source),
                texts={CARD: card}, done=bar.update)
    print(f"dense model: {target}")


if __name__ == "__main__":
    sys.exit(main())
