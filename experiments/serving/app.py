"""The HTTP side: routes, keys, limits, streams; Starlette is imported where it is used.

Nothing here computes: requests become prompts of the worker, and its pieces answers.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from rabit_jax.errors import BadInput
from rabit_jax.experiments.engine.chat import template_ids
from rabit_jax.experiments.serving.answers import Answer, fault
from rabit_jax.experiments.serving.bodies import BadField, Chat, Common, Completion, read_body
from rabit_jax.experiments.serving.settings import Failure, Piece, Settings
from rabit_jax.experiments.serving.texts import Choice, Prompt
from rabit_jax.experiments.serving.worker import Full, Worker
from rabit_jax.formats.tokenizer import check_ids, prompt_ids
from rabit_jax.json_text import parse
from rabit_jax.types import Json, Tokenizer

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

Result = TypeVar("Result")


@dataclass(frozen=True)
class Served:
    """What the server serves, and its limits.

    Attributes:
      name: of the model.
      created: when it was loaded, in seconds.
      tokenizer: of the model.
      vocab_size: rows of its table.
      worker: makes the texts.
      api_key: that clients must send; None wants none.
      most_body: bytes of a request's body.
    """

    name: str
    created: int
    tokenizer: Tokenizer
    vocab_size: int
    worker: Worker
    api_key: str | None
    most_body: int


class Refused(Exception):
    """A request that is answered by an error."""

    def __init__(
        self, status: int, message: str, headers: Mapping[str, str] | None = None,
        code: str | None = None, param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})


class Gone(Exception):
    """The client has closed the connection."""


@dataclass
class Work:
    """The texts of one request in the making; `pieces` gives what comes of them, by index."""

    worker: Worker
    prompts: list[Prompt]
    choices: list[Choice]
    pieces: asyncio.Queue[tuple[int, Piece | Failure]]

    def cancel(self) -> None:
        """Nobody waits for the answer."""
        self.worker.cancel(self.choices)


def application(served: Served) -> Starlette:
    """The ASGI application."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.routing import Route

    async def healthz(request: Request) -> Response:
        worker = served.worker
        failed = worker.failure is not None
        return reply({"status": "failed" if failed else "ok", "model": served.name,
                      "running": worker.running, "waiting": worker.waiting},
                     503 if failed else 200)

    async def models(request: Request) -> Response:
        return reply({"object": "list", "data": [_model(served)]})

    async def model(request: Request) -> Response:
        _check_model(served, request.path_params["name"])
        return reply(_model(served))

    async def completions(request: Request) -> Response:
        body = read_body(Completion, await _json(request, served.most_body))
        ids = await asyncio.to_thread(_completion_ids, served, body)
        wanted = [body.settings(body.max_tokens, body.logprobs) for _ in ids]
        return await _answered(request, served, body, ids, wanted)

    async def chat(request: Request) -> Response:
        body = read_body(Chat, await _json(request, served.most_body))
        turns = [message.turn() for message in body.messages]
        ids = await asyncio.to_thread(_chat_ids, served, turns)
        most = body.max_completion_tokens or body.max_tokens
        if most is None:
            most = max(served.worker.context - len(ids), 1)
        alternatives = body.top_logprobs if body.logprobs else None
        return await _answered(request, served, body, [ids], [body.settings(most, alternatives)])

    async def refused(request: Request, error: Exception) -> Response:
        if isinstance(error, Refused):
            return reply(fault(error.status, error.message, error.code, error.param),
                         error.status, error.headers)
        if isinstance(error, HTTPException):
            message = f"{request.method} {request.url.path}: {error.detail}"
            return reply(fault(error.status_code, message), error.status_code, error.headers)
        if isinstance(error, Gone):
            return reply(fault(499, "the client has gone"), 499)
        if isinstance(error, BadField):
            return reply(fault(400, str(error), error.code, error.param), 400)
        if isinstance(error, BadInput):
            return reply(fault(400, str(error)), 400)
        # Starlette raises it again behind the answer, and uvicorn logs it.
        return reply(fault(500, "the server has failed at this request, its log says why"), 500)

    def guarded(answer: Callable[[Request], Awaitable[Response]]) -> Callable:
        async def checked(request: Request) -> Response:
            _check_key(request, served.api_key)
            return await answer(request)

        return checked

    routes = [
        Route("/healthz", healthz),
        Route("/v1/models", guarded(models)),
        Route("/v1/models/{name:path}", guarded(model)),
        Route("/v1/completions", guarded(completions), methods=["POST"]),
        Route("/v1/chat/completions", guarded(chat), methods=["POST"]),
    ]
    handlers = dict.fromkeys((Refused, Gone, HTTPException, BadInput, Exception), refused)
    return Starlette(routes=routes, exception_handlers=handlers)


def reply(content: Json, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A response of JSON."""
    from starlette.responses import JSONResponse

    return JSONResponse(content, status, headers)


# what is checked before any work


def _check_key(request: Request, key: str | None) -> None:
    if key is None:
        return
    kind, _, found = request.headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not hmac.compare_digest(
            found.encode("latin-1"), key.encode()):  # Starlette reads the bytes as latin-1
        raise Refused(401, "the API key is missing or wrong: send it as Authorization: Bearer KEY",
                      {"WWW-Authenticate": "Bearer"}, "invalid_api_key")


def _check_model(served: Served, name: str) -> None:
    if name not in ("", served.name):
        raise Refused(404, f"there is no model {name!r} here, only {served.name!r}",
                      code="model_not_found", param="model")


def _model(served: Served) -> Json:
    return {"id": served.name, "object": "model", "created": served.created,
            "owned_by": "rabit_jax", "max_model_len": served.worker.context}


async def _json(request: Request, most: int) -> object:
    """The body of a request."""
    from starlette.requests import ClientDisconnect

    content = bytearray()
    try:
        async for part in request.stream():
            content += part
            if len(content) > most:
                raise BadInput(f"the body has more than {most} bytes, which is the most that this "
                               "server takes: send less")
    except ClientDisconnect:
        raise Gone from None
    try:
        return parse(bytes(content))
    except ValueError as error:
        raise BadInput(f"the body is no JSON ({error}): send a JSON object") from None


def _completion_ids(served: Served, body: Completion) -> list[list[int]]:
    found = []
    for prompt in body.prompts():
        if isinstance(prompt, str):
            _check_text(prompt)
            found.append(prompt_ids(served.tokenizer, prompt, served.vocab_size))
        else:
            check_ids(prompt, served.tokenizer, served.vocab_size)
            found.append(prompt)
    return found


def _chat_ids(served: Served, turns: list[dict[str, str]]) -> list[int]:
    if not getattr(served.tokenizer, "chat_template", None):
        raise BadInput(f"the tokenizer of {served.name} has no chat template: use /v1/completions")
    for turn in turns:
        _check_text(turn["content"])
    return template_ids(served.tokenizer, turns, served.vocab_size)


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeError:
        raise BadInput("a text holds half of a character (a lone surrogate): send whole "
                       "characters") from None


# answers


async def _answered(
    request: Request, served: Served, body: Common, ids: Sequence[list[int]],
    settings: Sequence[Sequence[Settings]],
) -> Response:
    """The response to prompts, each with the settings of its texts."""
    _check_model(served, body.model)
    _check_lengths(served, body, ids, settings)
    work = _submitted(served, ids, settings)
    prompt_tokens = sum(map(len, ids))
    answer = Answer(isinstance(body, Chat), served.name, served.tokenizer, prompt_tokens,
                    len(work.choices))
    if not body.stream:
        try:
            return reply(answer.whole(await _unless_gone(request, _all_pieces(work))))
        finally:
            work.cancel()
    from starlette.background import BackgroundTask
    from starlette.responses import StreamingResponse

    # The task runs also where the client goes before the first chunk.
    return StreamingResponse(
        _events(work, answer, body.stream_options.include_usage), media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        background=BackgroundTask(work.cancel))


def _check_lengths(
    served: Served, body: Common, ids: Sequence[list[int]], settings: Sequence[Sequence[Settings]]
) -> None:
    context, count = served.worker.context, sum(map(len, settings))
    most = served.worker.rows + served.worker.most_waiting
    name = "messages" if isinstance(body, Chat) else "prompt"
    if count > most:
        raise BadField(f"{count} texts are asked for, this server takes {most} at most: ask for "
                       "fewer", "n")
    for prompt, own in zip(ids, settings, strict=True):
        if not prompt:
            raise BadField("a prompt is empty: give some text to continue", name)
        if len(prompt) + own[0].max_tokens > context:
            raise BadField(f"the prompt has {len(prompt)} tokens and {own[0].max_tokens} new ones "
                           f"are asked for, which is more than the context of {context} tokens: "
                           "send or ask for less", name, "context_length_exceeded")


def _submitted(
    served: Served, ids: Sequence[list[int]], settings: Sequence[Sequence[Settings]]
) -> Work:
    """The texts, handed to the worker."""
    loop, pieces = asyncio.get_running_loop(), asyncio.Queue()
    prompts, choices = [], []
    for prompt, own in zip(ids, settings, strict=True):
        texts = [Choice(one, _teller(loop, pieces, len(choices) + n)) for n, one in enumerate(own)]
        # The worker takes choices out of its list.
        prompts.append(Prompt(prompt, list(texts)))
        choices += texts
    if served.worker.failure is not None:
        raise Refused(500, "the server has failed, its log says why")
    try:
        served.worker.submit(prompts)
    except Full as full:
        raise Refused(429, f"all {served.worker.rows} places are taken and the queue is full: try "
                           f"again in {full.seconds} s", {"Retry-After": str(full.seconds)},
                      "queue_full") from None
    return Work(served.worker, prompts, choices, pieces)


def _teller(
    loop: asyncio.AbstractEventLoop, pieces: asyncio.Queue[tuple[int, Piece | Failure]], index: int
) -> Callable[[Piece | Failure], None]:
    """What the worker's thread calls with a piece of text number `index`."""
    def tell(piece: Piece | Failure) -> None:
        if not loop.is_closed():
            try:
                loop.call_soon_threadsafe(pieces.put_nowait, (index, piece))
            except RuntimeError:  # the loop was closed meanwhile, so nobody waits
                pass

    return tell


async def _pieces(work: Work) -> AsyncIterator[tuple[int, Piece]]:
    """The pieces of all texts as they come, to the last one of each.

    Raises:
      Refused: a text failed.
    """
    left = len(work.choices)
    while left:
        index, piece = await work.pieces.get()
        if isinstance(piece, Failure):
            raise Refused(piece.status, piece.message)
        left -= piece.finish is not None
        yield index, piece


async def _all_pieces(work: Work) -> list[list[Piece]]:
    """The pieces of each text."""
    found: list[list[Piece]] = [[] for _ in work.choices]
    async for index, piece in _pieces(work):
        found[index].append(piece)
    return found


async def _events(work: Work, answer: Answer, usage: bool) -> AsyncIterator[str]:
    """The answer as server-sent events; work is cancelled where the client goes."""
    def event(content: Json) -> str:
        return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"

    try:
        for chunk in answer.opening():
            yield event(chunk)
        async for index, piece in _pieces(work):
            yield event(answer.chunk(index, piece))
        if usage:
            yield event(answer.last())
        yield "data: [DONE]\n\n"
    except Refused as error:
        yield event(fault(error.status, error.message))
    finally:
        work.cancel()


async def _unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """The result of some work, which ends when the client goes.

    Raises:
      Gone: it went.
    """
    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    done, left = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({done, left}, return_when=asyncio.FIRST_COMPLETED)
        if done.done():
            return done.result()
        raise Gone
    finally:
        done.cancel()
        left.cancel()
