"""The JSON of answers, as OpenAI's clients read it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from rabit_jax.experiments.serving.settings import Piece, Token
from rabit_jax.experiments.serving.writing import token_bytes, token_text
from rabit_jax.types import Json, Tokenizer


@dataclass
class Answer:
    """One answer in the making: of a chat or of a completion, streamed or whole.

    Attributes:
      chat: which of the two.
      model: its name.
      tokenizer: for the texts of single tokens.
      prompt_tokens: of all prompts.
      choices: how many texts it has.
      made: new tokens so far.
      offsets: characters that each text has so far.
      id, created: of the answer.
    """

    chat: bool
    model: str
    tokenizer: Tokenizer
    prompt_tokens: int
    choices: int
    made: int = 0
    offsets: list[int] = field(default_factory=list)
    id: str = ""
    created: int = 0

    def __post_init__(self) -> None:
        self.offsets = [0] * self.choices
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{secrets.token_hex(12)}"
        self.created = int(time.time())

    def opening(self) -> list[Json]:
        """The chunks before the text: in a chat one for each choice, with the role."""
        if not self.chat:
            return []
        return [self._whole([{"index": index, "delta": {"role": "assistant", "content": ""},
                              "logprobs": None, "finish_reason": None}], True)
                for index in range(self.choices)]

    def chunk(self, index: int, piece: Piece) -> Json:
        """A chunk of a stream."""
        self.made += piece.count
        if self.chat:
            choice = {"delta": {"content": piece.text} if piece.text or not piece.finish else {}}
        else:
            choice = {"text": piece.text}
        logprobs = self._logprobs(index, piece.tokens)
        self.offsets[index] += len(piece.text)
        return self._whole([{"index": index, **choice, "logprobs": logprobs,
                             "finish_reason": piece.finish}], True)

    def last(self) -> Json:
        """The chunk behind the text: how many tokens there were."""
        return {**self._whole([], True), "usage": self.usage()}

    def whole(self, pieces: Sequence[Sequence[Piece]]) -> Json:
        """The answer at once, from the pieces of each choice."""
        choices = []
        for index, own in enumerate(pieces):
            text = "".join(piece.text for piece in own)
            self.made += sum(piece.count for piece in own)
            tokens = [token for piece in own for token in piece.tokens]
            said = ({"message": {"role": "assistant", "content": text, "refusal": None}}
                    if self.chat else {"text": text})
            choices.append({"index": index, **said, "logprobs": self._logprobs(index, tokens),
                            "finish_reason": own[-1].finish})
        return {**self._whole(choices, False), "usage": self.usage()}

    def usage(self) -> Json:
        """Counts of tokens."""
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.made,
                "total_tokens": self.prompt_tokens + self.made}

    def _whole(self, choices: list[Json], chunk: bool) -> Json:
        kind = ("chat.completion" + ".chunk" * chunk) if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model,
                "choices": choices}

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> Json | None:
        if not tokens:
            return None
        if self.chat:
            return {"content": [self._shown(t.id, t.logprob) | {"top_logprobs": [
                self._shown(i, log) for i, log in t.top]} for t in tokens], "refusal": None}
        texts = [token_text(self.tokenizer, token.id) for token in tokens]
        starts = [self.offsets[index] + sum(map(len, texts[:n])) for n in range(len(texts))]
        return {
            "tokens": texts, "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{token_text(self.tokenizer, i): log for i, log in token.top}
                             | {text: token.logprob}
                             for token, text in zip(tokens, texts, strict=True)],
            "text_offset": starts}

    def _shown(self, token: int, logprob: float) -> Json:
        return {"token": token_text(self.tokenizer, token), "logprob": logprob,
                "bytes": token_bytes(self.tokenizer, token)}


def fault(
    status: int, message: str, code: str | None = None, param: str | None = None
) -> Json:
    """The JSON of an error; `param` is the field that it is about."""
    kind = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error",
            503: "server_error"}.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
