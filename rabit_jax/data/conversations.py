"""Conversations as training text: what the chat template of the teacher makes of them.

A chat model has seen conversations between the tokens of its template, so it is distilled on such
text. A document is one whole conversation; tokens of the template are read as special tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from jinja2 import TemplateError

from rabit_jax.errors import BadInput
from rabit_jax.types import Tokenizer

Messages: TypeAlias = list[dict[str, str]]  # each with `role` and `content`
Render: TypeAlias = Callable[[object], str | None]

# The names that ShareGPT's files have for the roles of chat templates.
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def messages_of(held: object) -> Messages | None:
    """The messages that a dataset's row holds; None where it holds no conversation.

    Taken are lists of `{"role", "content"}`, and of `{"from", "value"}` with ShareGPT's roles.

    Example:
      >>> messages_of([{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}])
      [{'role': 'user', 'content': 'Why?'}, {'role': 'assistant', 'content': 'So.'}]
    """
    if not isinstance(held, list) or not held:
        return None
    found: Messages = []
    for message in held:
        if not isinstance(message, dict):
            return None
        role = message.get("role") or ROLES.get(str(message.get("from")))
        content = message.get("content", message.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            return None
        found.append({"role": role, "content": content})
    return found


def rendering(tokenizer: Tokenizer) -> Render:
    """A function of what a row holds that gives the conversation as the chat template writes it.

    It gives None for what is no conversation, and for one that the template refuses, as some do
    where roles do not alternate.

    Raises:
      BadInput: a tokenizer without a chat template.
    """
    if not tokenizer.chat_template:
        raise BadInput("a part of data.mix holds conversations and the tokenizer of the teacher has"
                       " no chat template; take a chat model, or leave the part out")

    def render(held: object) -> str | None:
        messages = messages_of(held)
        if messages is None:
            return None
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False))
        except TemplateError:
            return None

    return render
