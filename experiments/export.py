"""Write a packed model for other programs: `python -m experiments.export --help`.

Formats that hold quantised weights are exact: every matrix is stored as the integers and 16-bit
steps that it consists of, and what a format cannot hold so is refused with the reason.
"""

from __future__ import annotations

from rabit_jax.experiments.engine.signals import ENDED, STOPPED, watch

if __name__ == "__main__":
    watch(STOPPED, ENDED)  # before the imports below, which take seconds

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rabit_jax.errors import BadInput
from rabit_jax.experiments.engine.console import (
    EXIT_CODES,
    common_options,
    main_guard,
    paths_option,
)
from rabit_jax.formats.families import tensor_names
from rabit_jax.formats.folder import find_folder, read_generation
from rabit_jax.formats.gguf_blocks import TYPES
from rabit_jax.formats.gguf_writing import save_gguf
from rabit_jax.formats.gptq import BITS, Layout, save_gptq
from rabit_jax.formats.hf import save_hf
from rabit_jax.formats.model_card import CARD, base_and_licence, dense_card, gptq_card
from rabit_jax.formats.packed_model import load_model
from rabit_jax.models.config import DTYPES
from rabit_jax.models.decoder import Decoder, param_shapes
from rabit_jax.progress import loading, progress
from rabit_jax.types import Params, Tokenizer
from rabit_jax.weights.conversion import LLAMA_LINEARS

GGUF = {"gguf": "exact", "gguf-f32": "f32", "gguf-f16": "f16",
        **{f"gguf-{name.lower()}": name for name in TYPES}}
FORMATS = ("hf", "gptq", *GGUF)
EXAMPLES = f"""\
formats:
  hf         dense folder of Hugging Face in --dtype, for transformers, vLLM and others
  gptq       folder in GPTQ's layout of 2, 3, 4 or 8 bits, for transformers with gptqmodel; with
             --bits 4 or 8 and matrices of {{type: uniform}} for vLLM, too
  gguf       file of llama.cpp, each matrix in the smallest type that holds it exactly
  gguf-f32   the same with dense matrices, exactly; gguf-f16 rounds them
  gguf-TYPE  all matrices of the blocks in one type: {', '.join(name.lower() for name in TYPES)}
gptq, gguf and gguf-TYPE want one scale for each group of inputs and none for each input, such as of
init.spec={{type: uniform, k: 2, group: 64}} (k = 1 for gguf-q1_0, with groups of 128).

examples:
  python -m experiments.export --model runs/quickstart/packed --output runs/quickstart/dense
  python -m experiments.export --model org/packed-model --output dense --dtype float32
  python -m experiments.export --model runs/mine --format gptq --output mine-gptq
  python -m experiments.export --model runs/mine --format gptq --bits 4 --output mine-vllm
  python -m experiments.export --model runs/mine --format gguf --output mine.gguf
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, or 2 for bad input (one sentence on stderr)."""
    args = _parser().parse_args(argv)
    return main_guard(lambda: _run(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.export", epilog=f"{EXAMPLES}\n{EXIT_CODES}",
        description="Write a packed (or dense) model for other programs.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common_options(parser)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR",
        help="model folder, packed or dense, a run folder for its packed model, or a hub id")
    add("--format", default="hf", choices=FORMATS, metavar="FORMAT",
        help=f"{', '.join(FORMATS)}; default %(default)s, see below")
    add("--output", required=True, metavar="PATH",
        help="where to write: a folder, of hf and gptq; a file NAME.gguf otherwise. A model of "
             "that name is replaced")
    add("--dtype", choices=DTYPES,
        help="of the tensors that are not quantised, for hf and gptq; default bfloat16 for hf, "
             "float16 for gptq. Only float32 holds the matrices of hf without rounding")
    add("--bits", type=int, choices=BITS,
        help="of gptq's codes; default: the fewest that hold all matrices. vLLM reads 4 and 8")
    paths_option(parser)
    return parser


def _run(args: argparse.Namespace) -> None:
    source, target = find_folder(args.model), Path(args.output)
    _check_target(args, source, target)
    with loading(args.model) as done:
        model, params, tokenizer = load_model(source, done, args.paths)
    shapes = param_shapes(model.config)
    # A linear layer is four tensors in GPTQ's layout.
    parts = {path: 4 if args.format == "gptq" and re.fullmatch(LLAMA_LINEARS, path) else 1
             for path in shapes}
    total = sum(parts[path] for path, shape in shapes.items() for _ in tensor_names(path, shape))
    write = {"hf": _write_hf, "gptq": _write_gptq}.get(args.format, _write_gguf)
    with progress("export", total) as bar:
        found = write(args, source, model, params, tokenizer, bar.update)
    print(f"{found}: {target}")


def _check_target(args: argparse.Namespace, source: Path, target: Path) -> None:
    """Raises BadInput for a target or a dtype that does not go with the format."""
    if os.path.realpath(target) == os.path.realpath(source):
        raise BadInput(f"--output {target} is the model itself: choose another folder")
    if args.bits is not None and args.format != "gptq":
        raise BadInput(f"--bits goes with gptq; --format {args.format} says what is stored")
    if args.format not in GGUF:
        return
    if args.dtype is not None:
        raise BadInput(f"--dtype goes with hf and gptq; --format {args.format} says what is stored")
    if target.suffix != ".gguf" or target.is_dir():
        raise BadInput(f"--output {target} is no name of a GGUF file: end it in .gguf")


Done = Callable[[int], None]


def _write_hf(
    args: argparse.Namespace, source: Path, model: Decoder, params: Params,
    tokenizer: Tokenizer | None, done: Done,
) -> str:
    dtype = args.dtype or "bfloat16"
    card = dense_card(Path(args.output).name, args.model, dtype, *base_and_licence(source))
    save_hf(args.output, model, params, tokenizer, dtype, read_generation(source),
            texts={CARD: card}, done=done)
    return "dense model"


def _write_gptq(
    args: argparse.Namespace, source: Path, model: Decoder, params: Params,
    tokenizer: Tokenizer | None, done: Done,
) -> str:
    dtype = args.dtype or "float16"

    def card(layout: Layout) -> dict[str, str]:
        return {CARD: gptq_card(Path(args.output).name, args.model, layout, dtype,
                                *base_and_licence(source))}

    layout = save_gptq(args.output, model, params, tokenizer, dtype, read_generation(source), card,
                       done, args.bits)
    return (f"GPTQ folder of {layout.bits} bits, groups of {layout.group}, checkpoint_format "
            f"{layout.version}")


def _write_gguf(
    args: argparse.Namespace, source: Path, model: Decoder, params: Params,
    tokenizer: Tokenizer | None, done: Done,
) -> str:
    types = save_gguf(args.output, model, params, tokenizer, GGUF[args.format],
                      Path(args.output).stem, base_and_licence(source)[1], done)
    return "GGUF file, " + ", ".join(f"{count} tensors {name}" for name, count in types.items())


if __name__ == "__main__":
    sys.exit(main())
