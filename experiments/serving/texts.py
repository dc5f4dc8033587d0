"""Prompts and the texts that continue them, on their way from request to answer."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from rabit_jax.experiments.serving.settings import Failure, Piece, Settings, Tell, Token
from rabit_jax.experiments.serving.writing import Writing
from rabit_jax.models import serving


class Choice:
    """One text that a request wants.

    Args:
      settings: how it is made.
      tell: called by the worker with each `Piece`, or with the `Failure` that ends it.
    """

    def __init__(self, settings: Settings, tell: Tell) -> None:
        self.settings, self.tell = settings, tell
        self.cancelled = self.over = False

    @property
    def wanted(self) -> bool:
        """Whether somebody still waits for more of it."""
        return not (self.cancelled or self.over)

    def fail(self, failure: Failure) -> None:
        """End it."""
        self.over = True
        self.tell(failure)


@dataclass
class Prompt:
    """The ids of a prompt, and the texts that continue it."""

    ids: list[int]
    choices: list[Choice]

    @property
    def wanted(self) -> bool:
        """Whether somebody still waits for one of them."""
        return any(choice.wanted for choice in self.choices)


@dataclass(eq=False)
class Row:
    """A text that has a row of the batch.

    Attributes:
      choice: whose text it is.
      writing: its text.
      ends: tokens that end it.
      length: tokens in the cache.
      made: new tokens.
      text: to be told with the next piece.
      told: tokens to be reported with it, and how many were made.
    """

    choice: Choice
    writing: Writing
    ends: frozenset[int]
    length: int
    made: int = 0
    text: str = ""
    told: list[Token] = field(default_factory=list)
    untold: int = 0
    began: float = field(default_factory=time.monotonic)

    def add(self, made: serving.Made, index: int, n: int) -> str | None:
        """Add token n of what was made for row `index`; why the text ends there, or None."""
        token, settings = int(made.tokens[index][n]), self.choice.settings
        self.made += 1
        self.untold += 1
        if token in self.ends:
            return "stop"
        if settings.alternatives is not None:
            shown = zip(made.top[index][n].tolist(), made.top_logprobs[index][n].tolist(),
                        strict=True)
            top = tuple(shown)[: settings.alternatives]
            self.told.append(Token(token, float(made.logprob[index][n]), top))
        self.text += self.writing.add(token)
        if self.writing.stopped:
            return "stop"
        return "length" if self.made == settings.max_tokens else None

    def tell(self, finish: str | None) -> None:
        """Hand on the text and the tokens since the last time; nothing where there is no text and
        no end."""
        if finish and not self.writing.stopped:
            self.text += self.writing.rest()
        if self.text or finish:
            self.choice.tell(Piece(self.text, tuple(self.told), self.untold, finish))
            self.text, self.told, self.untold = "", [], 0
