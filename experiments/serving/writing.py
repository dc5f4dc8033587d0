"""The text of tokens as they come: whole characters, cut before the first stop string."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from rabit_jax.types import Tokenizer

UNFINISHED = "\ufffd"  # what an unfinished character is decoded as


class Writing:
    """One text.

    New tokens are decoded behind the last ones before them, since some tokenizers drop the first
    space of a text, and since a character may be spread over tokens.

    Args:
      tokenizer: of transformers.
      prompt: ids of the prompt.
      stop: strings that end the text; they are not part of it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.ids = list(prompt)  # those that new tokens are decoded with
        self.context = len(self.ids)  # how many of these are complete and written
        self.before = len(self._decode(self.ids))  # characters of the context
        self.shown = self.before
        self.held = ""  # it may be the beginning of a stop string
        self.stopped = False

    def add(self, token: int) -> str:
        """What of the text is certain now and was not before; sets `stopped` at a stop string."""
        self.ids.append(token)
        whole = self._decode(self.ids)
        certain = whole.rstrip(UNFINISHED)
        new, self.shown = certain[self.shown :], max(self.shown, len(certain))
        if certain == whole and len(whole) > self.before:
            self.ids = self.ids[self.context :]
            self.context = len(self.ids)
            self.before = self.shown = len(self._decode(self.ids))
        return self._passed(new)

    def rest(self) -> str:
        """What was held back, once no more tokens come."""
        new = self._decode(self.ids)[self.shown :]
        return self._passed(new, last=True)

    def _passed(self, new: str, last: bool = False) -> str:
        """The certain text that is before a stop string and no beginning of one."""
        text = self.held + new
        found = [at for at in map(text.find, self.stop) if at >= 0]
        if found:
            self.held, self.stopped = "", True
            return text[: min(found)]
        keep = 0 if last else beginning(text, self.stop)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True,
                                         clean_up_tokenization_spaces=False))


def beginning(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    longest = max((len(one) for one in stop), default=1) - 1
    return next((n for n in range(min(longest, len(text)), 0, -1)
                 if any(one.startswith(text[-n:]) for one in stop)), 0)


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The text of one token, with the space before it; unfinished characters as U+FFFD."""
    text = str(tokenizer.decode([token], skip_special_tokens=False,
                                clean_up_tokenization_spaces=False))
    stored = tokenizer.convert_ids_to_tokens(token)
    # A decoder of SentencePiece drops the first space of a text.
    dropped = isinstance(stored, str) and stored.startswith("▁") and not text.startswith(" ")
    return f" {text}" if dropped else text


def token_bytes(tokenizer: Tokenizer, token: int) -> list[int] | None:
    """The bytes of one token; None where it is part of a character and its bytes are not known."""
    text = token_text(tokenizer, token)
    if UNFINISHED not in text:
        return list(text.encode())
    stored = str(tokenizer.convert_ids_to_tokens(token))
    if named := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", stored):
        return [int(named[1], 16)]
    letters = _letters()
    return [letters[c] for c in stored] if all(c in letters for c in stored) else None


@lru_cache
def _letters() -> dict[str, int]:
    """The byte of each letter by which byte-level tokenizers spell it (Radford et al. 2019)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): b for n, b in enumerate(others)}
