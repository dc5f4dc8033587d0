"""A conversation with a model: what `python -m experiments.generate --chat` runs.

Answers go to stdout, everything else to stderr. A line of stdin is a question.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator

import jax
from jinja2 import TemplateError

from rabit_jax.data.conversations import Messages
from rabit_jax.errors import BadInput, first_line
from rabit_jax.experiments.engine.continuing import Text, Writer
from rabit_jax.experiments.engine.signals import interrupted_by_keys
from rabit_jax.formats.tokenizer import check_ids, encode
from rabit_jax.progress import say
from rabit_jax.types import Tokenizer

# Every turn reads the whole conversation again; its length is rounded up to a multiple of this, or
# each turn would be compiled anew.
MULTIPLE = 64


def chat(writer: Writer, tokenizer: Tokenizer, system: str | None) -> None:
    """Answers the lines of stdin until `/exit` or their end; `/reset` forgets the conversation.

    Ctrl-C stops an answer; what it said by then stays in the conversation.

    Args:
      writer: the model; an answer is shorter than its `max_new_tokens` where the context ends.
      tokenizer: of transformers, with a chat template.
      system: what opens every conversation, or None.

    Raises:
      BadInput: a tokenizer without a chat template, a template that refuses the conversation,
        text that is not UTF-8, or logits that are not finite.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise BadInput("the model's tokenizer has no chat template, so it cannot be talked to: "
                       "continue a text with --prompt, or add chat_template.jinja to the folder")
    opening: Messages = [{"role": "system", "content": system}] if system else []
    messages, key = list(opening), writer.key
    for turn, line in enumerate(_lines()):
        if line == "/exit":
            break
        if line == "/reset":
            messages = list(opening)
            say("a new conversation")
            continue
        asked = [*messages, {"role": "user", "content": line}]
        now = dataclasses.replace(writer, key=jax.random.fold_in(key, turn))
        text = _answer(now, tokenizer, asked)
        if text:
            messages = [*asked, {"role": "assistant", "content": text}]
    if writer.speed.read:
        say(str(writer.speed))


def _lines() -> Iterator[str]:
    """The lines of stdin that are not blank; on a terminal behind a prompt."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
            line.encode()
        except UnicodeError as error:
            raise BadInput(f"a question is not UTF-8 text ({error}): convert it first") from error
        if not line:
            return
        if line.strip():
            yield line.strip()


def _answer(writer: Writer, tokenizer: Tokenizer, messages: Messages) -> str:
    """Prints the answer to the last message and returns it; "" where it does not fit."""
    ids = template_ids(tokenizer, messages, writer.model.config.vocab_size)
    most = writer.model.config.max_position
    if len(ids) >= most:
        say(f"the conversation now has {len(ids)} tokens and the model a context of {most}, so the "
            "question was left out: ask something shorter, or begin again with /reset")
        return ""
    writer = dataclasses.replace(writer, max_new_tokens=min(writer.max_new_tokens, most - len(ids)))
    text = Text(tokenizer, ids, writer.model.config.eos_ids)
    try:
        with interrupted_by_keys():
            for (new,) in writer.write([ids], MULTIPLE):
                print(text.add(new), end="", flush=True)
    except KeyboardInterrupt:
        pass
    print(text.rest(), flush=True)
    return text.whole()


def template_ids(tokenizer: Tokenizer, messages: Messages, vocab_size: int) -> list[int]:
    """Token ids of the conversation up to where the answer begins.

    Raises:
      BadInput: a template that refuses the conversation or cannot be applied, or a token that the
        model does not have.
    """
    try:
        # The template writes the special tokens itself, so the tokenizer adds none.
        text = str(tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False))
    except TemplateError as error:
        raise BadInput(f"the chat template refuses the conversation ({error}): leave the system "
                       "message out or correct the template") from error
    except Exception as error:  # a template is a program, and fails like one
        raise BadInput(f"the chat template cannot be applied ({first_line(error)}): correct "
                       "chat_template in the folder") from error
    (ids,) = encode(tokenizer, [text])
    if not ids:
        raise BadInput("the chat template gives an empty text: correct chat_template in the folder")
    check_ids(ids, tokenizer, vocab_size)
    return ids
