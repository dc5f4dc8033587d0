"""Continue prompts with a dense or packed model folder: `python -m experiments.generate --help`.

The text goes to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.monitoring
import numpy as np

from experiments.console import main_guard, say
from rabit_jax.errors import BadInput
from rabit_jax.models import Decoder, generate
from rabit_jax.models.packed_io import load_model

EXAMPLES = """\
examples:
  python -m experiments.generate --model runs/quickstart/packed --prompt "The list"
  python -m experiments.generate --model runs/quickstart/packed --greedy --max-new-tokens 32 \\
      --prompt "One prompt" --prompt "and another, in the same batch"
  python -m experiments.generate --model runs/quickstart/packed --prompt - < prompt.txt
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, or 2 for bad input (one sentence on stderr)."""
    args = _parser().parse_args(argv)
    return main_guard(lambda: _run(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.generate", epilog=EXAMPLES,
        description="Continue prompts with a dense or packed model.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="model folder, dense or packed, or a hub id")
    add("--prompt", required=True, action="append", metavar="TEXT",
        help="text to continue; - reads it from stdin; give it several times for a batch")
    add("--max-new-tokens", type=int, default=64, metavar="N", help="default %(default)s")
    add("--temperature", type=float, default=0.8, metavar="T",
        help="default %(default)s; lower is closer to the likeliest text, 0 is --greedy")
    add("--top-p", type=float, default=0.95, metavar="P",
        help="sample from the likeliest tokens that hold this probability; default %(default)s")
    add("--seed", type=int, default=0, help="the same seed gives the same text; default 0")
    add("--greedy", action="store_true", help="always take the likeliest token")
    return parser


def _run(args: argparse.Namespace) -> None:
    prompts = [_text(prompt) for prompt in args.prompt]
    if not 0 <= args.seed < 2**32:
        raise BadInput(f"--seed is {args.seed}, wanted 0 to {2**32 - 1}")
    model, params, tokenizer = load_model(args.model)
    if tokenizer is None:
        raise BadInput(f"{args.model} holds no tokenizer, so text cannot be read or written: put "
                       "the model's tokenizer.json and tokenizer_config.json there")
    ids = tokenizer(prompts, return_attention_mask=False)["input_ids"]
    rows, seconds = _generate(model, params, ids, args)
    texts = [prompt + _decode(tokenizer, old, new, model.config.eos_ids)
             for prompt, old, new in zip(prompts, ids, rows, strict=True)]
    print("\n\n".join(texts), flush=True)
    count = sum(map(len, rows))
    say(f"{count} tokens in {seconds:.2f} s, {count / seconds:,.1f} tokens/s "
        f"(reading {'the prompts' if len(ids) > 1 else 'the prompt'} included, compilation not)")


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


def _generate(
    model: Decoder, params: Any, ids: list[list[int]], args: argparse.Namespace
) -> tuple[list[list[int]], float]:
    """New tokens of each prompt, its end token included, and the seconds they took."""
    tokens, mask = pad_left(ids)
    with Stopwatch() as watch:
        out = np.asarray(generate(
            model, params, tokens, mask, max_new_tokens=args.max_new_tokens,
            temperature=0.0 if args.greedy else args.temperature, top_p=args.top_p,
            key=jax.random.key(args.seed), eos_ids=model.config.eos_ids,
        ))
    return [until_end(row, model.config.eos_ids) for row in out.tolist()], watch.seconds


def pad_left(ids: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Token lists as int32 `[b, t]`, padded with 0 on the left, and the mask of real tokens."""
    longest = max(map(len, ids))
    lengths = np.array([len(row) for row in ids])
    mask = np.arange(longest)[None] >= longest - lengths[:, None]
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = np.concatenate([np.asarray(row, np.int32) for row in ids])
    return tokens, mask


def until_end(row: list[int], eos_ids: Sequence[int]) -> list[int]:
    """The tokens up to and with the first that is in `eos_ids`; all where none is."""
    ends = [n for n, token in enumerate(row) if token in eos_ids]
    return row[: ends[0] + 1] if ends else row


def _decode(tokenizer: Any, old: list[int], new: list[int], eos_ids: Sequence[int]) -> str:
    """Text of the new tokens; decoded behind the prompt, for some tokenizers drop a first space."""
    if new[-1] in eos_ids:
        new = new[:-1]

    def text(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    return text(old + new)[len(text(old)):]


class Stopwatch:
    """Seconds from the last compilation inside the block, or else from its start, to its end."""

    EVENT = "/jax/core/compile/backend_compile_duration"

    def __enter__(self) -> Stopwatch:
        self.start = time.perf_counter()
        jax.monitoring.register_event_duration_secs_listener(self._heard)
        return self

    def _heard(self, event: str, _: float, **__: Any) -> None:
        if event == self.EVENT:
            self.start = time.perf_counter()

    def __exit__(self, *_: Any) -> None:
        self.seconds = time.perf_counter() - self.start
        jax.monitoring.unregister_event_duration_listener(self._heard)


if __name__ == "__main__":
    sys.exit(main())
