"""Bodies of requests, checked: OpenAI's fields, and which of them are implemented.

A field that would change the answer and is not implemented is refused, never passed over.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rabit_jax.errors import BadInput
from rabit_jax.experiments.serving.settings import Settings

# Fields without effect on the text.
HARMLESS = frozenset({
    "user", "metadata", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "service_tier", "parallel_tool_calls"})
# Fields that are not implemented, and their values that ask for nothing.
NEUTRAL: dict[str, tuple] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "echo": (False,),
    "suffix": ("",), "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
    "function_call": ("none", "auto"), "response_format": ({"type": "text"},),
    "modalities": (["text"],)}
DEFAULT_TOKENS = 16  # of a completion; a chat answer has what is left of the context
ShortText = Annotated[str, Field(max_length=1000)]
TokenId = Annotated[int, Field(ge=0)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(_Body):
    """What is sent with a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Common(_Body):
    """The fields that both kinds of requests have."""

    model: str = ""
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1, le=128)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: ShortText | Annotated[list[ShortText], Field(max_length=16)] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    def settings(self, max_tokens: int, alternatives: int | None) -> list[Settings]:
        """The settings of each of the n texts; without a seed they are drawn at random."""
        seed = secrets.randbits(63) if self.seed is None else self.seed
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        # Texts of one request differ; the first has the seed itself.
        return [Settings(max_tokens, self.temperature, self.top_p,
                         (seed + n * 0x9E3779B97F4A7C15) % 2**64, tuple(s for s in stop if s),
                         alternatives) for n in range(self.n)]


class Completion(Common):
    """The body of `/v1/completions`."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    max_tokens: int = Field(DEFAULT_TOKENS, ge=1)
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = None

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, as texts or as ids.

        Raises:
          BadInput: there is none.
        """
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise BadInput("prompt is empty: give some text to continue")
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # pyright: ignore[reportReturnType]  (one list of ids)
        return self.prompt  # pyright: ignore[reportReturnType]


class Part(_Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] = ""
    name: str = ""

    def turn(self) -> dict[str, str]:
        """As chat templates read it."""
        text = self.content if isinstance(self.content, str) else "".join(
            part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class Chat(Common):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)


Body = TypeVar("Body", Completion, Chat)


def read_body(kind: type[Body], raw: object) -> Body:
    """The body of a request from its JSON.

    Raises:
      BadInput: it is no object, a field is missing, unknown or out of range, or asks for what is
        not implemented.
    """
    if not isinstance(raw, Mapping):
        raise BadInput(f"the body is {type(raw).__name__}, wanted a JSON object")
    left = {str(k): v for k, v in raw.items() if v is not None and k not in HARMLESS}
    for name, values in NEUTRAL.items():
        if name in left and (value := left.pop(name)) not in values:
            raise BadInput(f"{name} is {str(value)[:80]!r}, which is not implemented: leave it out")
    try:
        body = kind.model_validate(left)
    except ValidationError as error:
        raise BadInput(_sentence(kind, error)) from None
    if isinstance(body, Completion) and body.best_of not in (None, body.n):
        raise BadInput(f"best_of is {body.best_of}, which is not implemented: leave it out")
    return body


def _sentence(kind: type[BaseModel], error: ValidationError) -> str:
    """The first fault in one sentence."""
    first = error.errors(include_url=False)[0]
    # Where a field has one of several types, their names follow its own.
    path = [str(part) for part in first["loc"] if isinstance(part, int) or str(part).isidentifier()]
    name = ".".join(path) or "the body"
    if first["type"] == "extra_forbidden":
        known = ", ".join(sorted({*kind.model_fields, *HARMLESS}))
        return f"unknown field {'.'.join(map(str, first['loc']))}: leave it out; known are {known}"
    if first["type"] == "missing":
        return f"{name} is missing"
    return f"{name} is {str(first['input'])[:80]!r}: {first['msg']}"
