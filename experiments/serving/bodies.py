"""Bodies of requests, checked: OpenAI's fields, and which of them are implemented.

A field that would change the answer and is not implemented is refused, never passed over.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

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
    "modalities": (["text"],), "top_k": (0, -1), "min_p": (0,), "typical_p": (1,),
    "repetition_penalty": (1,), "min_tokens": (0,), "ignore_eos": (False,)}
DEFAULT_TOKENS = 16  # of a completion; a chat answer has what is left of the context
ShortText = Annotated[str, Field(max_length=1000)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
# What fields of several types want, for messages.
WANTED = {
    "prompt": "a text, a list of token ids, or a list of either",
    "stop": "a text or a list of at most 16 texts, each of at most 1000 characters",
    "content": 'a text, or a list of parts {"type": "text", "text": ...}'}


class BadField(BadInput):
    """A field that cannot be taken: its name, and OpenAI's code of the error where there is one."""

    def __init__(self, message: str, param: str | None, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, raw: object) -> object:
        """Drops what asks for nothing: clients send answers back with all their empty fields."""
        if not isinstance(raw, Mapping):
            return raw
        return {name: value for name, value in raw.items()
                if value is not None and (value != [] or name in cls.model_fields)}


class StreamOptions(_Body):
    """What is sent with a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Common(_Body):
    """The fields that both kinds of requests have."""

    model: str = ""
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
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
            raise BadField("prompt is empty: give some text to continue", "prompt")
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
      BadField: it is no object, a field is missing, unknown or out of range, or asks for what is
        not implemented.
    """
    if not isinstance(raw, Mapping):
        raise BadField(f"the body is {type(raw).__name__}, wanted a JSON object", None)
    left = {str(k): v for k, v in raw.items() if v is not None and k not in HARMLESS}
    for name, values in NEUTRAL.items():
        if name in left and (value := left.pop(name)) not in values:
            raise BadField(f"{name} is {str(value)[:80]!r}, which is not implemented: leave it out",
                           name)
    try:
        body = kind.model_validate(left)
    except ValidationError as error:
        raise _bad_field(kind, error) from None
    if isinstance(body, Completion) and body.best_of not in (None, body.n):
        raise BadField(f"best_of is {body.best_of}, which is not implemented: leave it out",
                       "best_of")
    if isinstance(body, Chat) and body.top_logprobs and not body.logprobs:
        raise BadField(f"top_logprobs is {body.top_logprobs} without logprobs: set logprobs to "
                       "true", "top_logprobs")
    return body


def _bad_field(kind: type[BaseModel], error: ValidationError) -> BadField:
    """The first fault."""
    first = error.errors(include_url=False)[0]
    where = first["loc"]
    several = next((n for n, part in enumerate(where) if part in WANTED), None)
    if several is not None and where[several + 1 :]:  # then come the types that were tried
        where, why = where[: several + 1], f"wanted {WANTED[str(where[several])]}"
    else:
        why = first["msg"]
    name = ".".join(map(str, where))
    if first["type"] == "extra_forbidden":
        known = ", ".join(sorted({*kind.model_fields, *HARMLESS}))
        return BadField(f"unknown field {name}: leave it out; known are {known}", name)
    if first["type"] == "missing":
        return BadField(f"{name} is missing", name)
    return BadField(f"{name or 'the body'} is {str(first['input'])[:80]!r}: {why}", name or None)
