"""Continue prompts, or talk: `python -m experiments.generate --help`; model folder dense or packed.

The text goes to stdout, everything else to stderr.
"""

from __future__ import annotations

from rabit_jax.experiments.engine.signals import ENDED, STOPPED, watch

if __name__ == "__main__":
    watch(STOPPED, ENDED)  # before the imports below, which take seconds

import argparse
import sys
from collections.abc import Sequence

import jax

from rabit_jax.errors import BadInput
from rabit_jax.experiments.engine.chat import chat
from rabit_jax.experiments.engine.console import (
    EXIT_CODES,
    activation_option,
    cache_option,
    common_options,
    main_guard,
    paths_option,
)
from rabit_jax.experiments.engine.continuing import Text, Writer, load_for_text
from rabit_jax.formats.tokenizer import prompt_ids
from rabit_jax.models.prepared import prepare
from rabit_jax.progress import say
from rabit_jax.types import Tokenizer
from rabit_jax.weights.description import describe

NEW_TOKENS, NEW_TOKENS_CHAT = 64, 512
EXAMPLES = """\
examples:
  python -m experiments.generate --model runs/quickstart/packed --prompt "The list"
  python -m experiments.generate --model runs/quickstart/packed --greedy --max-new-tokens 32 \\
      --prompt "One prompt" --prompt "and another, in the same batch"
  python -m experiments.generate --model runs/quickstart/packed --prompt - < prompt.txt
  python -m experiments.generate --model path/to/chat-model --chat --system "Answer briefly."
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, or 2 for bad input (one sentence on stderr)."""
    args = _parser().parse_args(argv)
    return main_guard(lambda: _run(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.generate", epilog=f"{EXAMPLES}\n{EXIT_CODES}",
        description="Continue prompts with a dense or packed model, or talk to it.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common_options(parser)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR",
        help="model folder, dense or packed, a run folder for its packed model, or a hub id")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", action="append", metavar="TEXT",
                      help="text to continue; - reads it from stdin; give it several times for a "
                           "batch")
    what.add_argument("--chat", action="store_true",
                      help="talk to a model whose tokenizer has a chat template; /reset begins "
                           "again, /exit or Ctrl-D ends, Ctrl-C stops an answer")
    add("--system", metavar="TEXT", help="with --chat: instructions that open the conversation")
    add("--max-new-tokens", type=int, metavar="N",
        help=f"default {NEW_TOKENS}, with --chat {NEW_TOKENS_CHAT} for an answer")
    add("--temperature", type=float, default=0.8, metavar="T",
        help="default %(default)s; lower is closer to the likeliest text, 0 is --greedy")
    add("--top-p", type=float, default=0.95, metavar="P",
        help="sample from the likeliest tokens that hold this probability; default %(default)s")
    add("--seed", type=int, default=0, help="the same seed gives the same text; default 0")
    add("--greedy", action="store_true", help="always take the likeliest token")
    add("--head-bits", type=int, choices=(8,), metavar="8",
        help="round a dense head to 8 bits, one scale for each token: a CPU then reads a quarter "
             "of its float32 bytes; default: the head as it is")
    paths_option(parser)
    cache_option(parser)
    activation_option(parser)
    return parser


def _run(args: argparse.Namespace) -> None:
    prompts = [_text(prompt) for prompt in args.prompt or ()]
    if not 0 <= args.seed < 2**32:
        raise BadInput(f"--seed is {args.seed}, wanted 0 to {2**32 - 1}")
    if args.system is not None and not args.chat:
        raise BadInput("--system is for --chat alone: put it into the prompt")
    writer, tokenizer, size = _load(args)
    if args.chat:
        return chat(writer, tokenizer, args.system)
    ids = [prompt_ids(tokenizer, prompt, writer.model.config.vocab_size) for prompt in prompts]
    if len(ids) == 1 and sys.stdout.isatty():
        _print_as_it_comes(writer, tokenizer, prompts[0], ids[0])
    else:
        print("\n\n".join(_continued(writer, tokenizer, prompts, ids)), flush=True)
    say(str(writer.speed))
    if size:
        say(f"bits per weight: {size}")


def _load(args: argparse.Namespace) -> tuple[Writer, Tokenizer, str]:
    """The model, ready to write, its tokenizer, and the bits per weight of a packed one."""
    model, params, tokenizer = load_for_text(args.model, args.paths)
    count = args.max_new_tokens
    if count is None:
        count = NEW_TOKENS_CHAT if args.chat else NEW_TOKENS
    temperature = 0.0 if args.greedy else args.temperature
    engine = prepare(model.config, params, args.head_bits, args.cache_bits,
                     args.activation_bits)
    writer = Writer(model, engine, count, temperature, args.top_p, jax.random.key(args.seed))
    size = describe(params)
    return writer, tokenizer, size.size if size.quantised else ""


def _text(prompt: str) -> str:
    """The prompt itself, or what stdin holds without its last line break."""
    try:
        text = sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt
        text.encode()
    except UnicodeError as error:
        raise BadInput(f"a prompt is not UTF-8 text ({error}): convert it first") from error
    if not text.strip():
        raise BadInput("empty prompt: give some text to continue")
    return text


def _print_as_it_comes(writer: Writer, tokenizer: Tokenizer, prompt: str, ids: list[int]) -> None:
    """Prints the prompt and its continuation piece by piece."""
    text = Text(tokenizer, ids, writer.model.config.eos_ids)
    shown = prompt
    for (new,) in writer.write([ids]):
        print(shown + text.add(new), end="", flush=True)
        shown = ""
    print(text.rest(), flush=True)


def _continued(
    writer: Writer, tokenizer: Tokenizer, prompts: Sequence[str], ids: Sequence[list[int]]
) -> list[str]:
    """Each prompt with its continuation."""
    texts = [Text(tokenizer, old, writer.model.config.eos_ids) for old in ids]
    for rows in writer.write(ids):
        for text, new in zip(texts, rows, strict=True):
            text.add(new)
    return [prompt + text.whole() for prompt, text in zip(prompts, texts, strict=True)]


if __name__ == "__main__":
    sys.exit(main())
