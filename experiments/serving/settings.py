"""What passes between a request and the worker that answers it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Settings:
    """How one text is made.

    Attributes:
      max_tokens: most new tokens, the end token among them.
      temperature, top_p: of sampling; temperature 0 takes the likeliest token.
      seed: the same seed gives the same text; 64 bits.
      stop: strings before which the text is cut.
      alternatives: how many of the likeliest tokens are reported beside each chosen one; None
        reports no probabilities.
    """

    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: tuple[str, ...] = ()
    alternatives: int | None = None


class Token(NamedTuple):
    """A token with its log-probability, and the likeliest ones in its place with theirs."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Piece(NamedTuple):
    """Some more of a text.

    Attributes:
      text: may be empty.
      tokens: those that are reported with it; empty where the settings ask for none.
      count: tokens that were made since the last piece.
      finish: None, "stop" or "length" in the last piece.
    """

    text: str
    tokens: tuple[Token, ...]
    count: int
    finish: str | None


class Failure(NamedTuple):
    """Why a text cannot be continued: the HTTP status, and one sentence."""

    status: int
    message: str


Tell = Callable[[Piece | Failure], None]
