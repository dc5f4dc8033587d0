"""Throughput of servers with OpenAI's API: ours, llama.cpp's, or one that runs at a URL.

--model starts `experiments.serve` of a model folder and --gguf llama-server of a GGUF file, one
after the other, each with as many slots as there are streams; without either --url is measured. For
each number of streams so many requests are sent at once, each with a prompt of its own, and all
are read to their end. tokens counts the new tokens by what the server says of each stream; seconds
is the time from the first request to the last end, tokens_per_second their ratio, first_token and
first_token_max the median and the longest time to the first text. What is shown is the fastest of
the repeats; one more before them is not counted, since a server may compile then.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from rabit_jax.errors import BadInput
from rabit_jax.experiments.bench.server_processes import running, started
from rabit_jax.experiments.bench.shapes import numbers
from rabit_jax.progress import progress
from rabit_jax.types import Json

EXAMPLES = """examples:
  python -m experiments.bench server --model runs/mine/packed --gguf mine.gguf,other-Q2_K.gguf
  python -m experiments.bench server
  python -m experiments.bench server --url http://127.0.0.1:8080/v1 --streams 1,16 --json
"""
COLUMNS = {"impl": "server", "streams": "streams", "tokens": "tokens", "seconds": "seconds",
           "tokens_per_second": "tokens/s", "first_token": "first token, s",
           "first_token_max": "the longest, s"}


class Stream(NamedTuple):
    """One answer: its new tokens, and seconds to its first text."""

    tokens: int
    first: float


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000/v1",
        help="of a server that runs (default %(default)s)")
    add("--model", default="", metavar="DIR,DIR", help="model folders to start our server with")
    add("--gguf", default="", metavar="FILE,FILE",
        help="GGUF files to start llama.cpp's server with, which is built on first use")
    add("--context", type=int, default=512, metavar="N",
        help="tokens of each slot of a started server (default %(default)s)")
    add("--activation-bits", default="16,8", metavar="N,N",
        help="of our server, which is started with each (default %(default)s)")
    add("--threads", type=int, default=os.cpu_count() or 1, metavar="N",
        help="of llama.cpp (default %(default)s)")
    add("--api-key", default="", metavar="KEY", help="bearer token, if it wants one")
    add("--streams", default="1,4,16,32", metavar="N,N",
        help="requests at once (default %(default)s)")
    add("--tokens", type=int, default=96, help="new tokens of each, at most (default %(default)s)")
    add("--prompt", default="Here is a long story, number {n}:", metavar="TEXT",
        help="{n} is the number of the stream (default %(default)r)")
    add("--repeats", type=int, default=3, help="default %(default)s")


def measure(options: argparse.Namespace) -> list[Json]:
    """A row for each number of streams.

    Raises:
      BadInput: a value out of its range, or a server that cannot be reached or refuses.
    """
    counts = numbers("streams", options.streams, 1 << 16)
    bits = numbers("activation-bits", options.activation_bits, 16)
    if set(bits) - {16, 8}:
        raise BadInput(f"--activation-bits is {options.activation_bits!r}, wanted 16, 8 or both")
    if options.tokens < 2 or options.repeats < 1:
        raise BadInput("--repeats must be at least 1 and --tokens at least 2")
    models, files = ([one for one in text.split(",") if one]
                     for text in (options.model, options.gguf))
    servers = started(models, files, max(counts), options.context, options.threads, bits)
    rows, total = [], max(1, len(servers)) * len(counts) * (options.repeats + 1)
    with progress("server", total) as bar:
        done = itertools.count(1)

        def tick(row: Json) -> None:
            bar.update(next(done), tokens_per_second=row["tokens_per_second"])

        def measured(label: str, url: str) -> list[Json]:
            return [_fastest(options, label, url, count, tick) for count in counts]

        for server in servers:
            with running(server) as url:
                rows += measured(server.label, url)
        if not servers:
            rows += measured(options.url, options.url.rstrip("/"))
    return rows


def _fastest(
    options: argparse.Namespace, label: str, url: str, count: int, tick: Callable[[Json], None]
) -> Json:
    """The row of the fastest repeat of so many streams at once; the first one is not counted."""
    found = []
    for _ in range(options.repeats + 1):
        found.append({"impl": label, **_together(options, url, count)})
        tick(found[-1])
    return max(found[1:], key=lambda row: row["tokens_per_second"])


def remarks(rows: Sequence[Json]) -> list[str]:
    """None."""
    return []


def _together(options: argparse.Namespace, url: str, count: int) -> Json:
    """The row of so many streams at once."""
    began = time.perf_counter()
    with ThreadPoolExecutor(count) as pool:
        streams = list(pool.map(lambda n: _stream(options, url, n), range(count)))
    seconds, tokens = time.perf_counter() - began, sum(stream.tokens for stream in streams)
    firsts = [stream.first for stream in streams]
    return {"streams": count, "tokens": tokens, "seconds": seconds,
            "tokens_per_second": tokens / seconds, "first_token": statistics.median(firsts),
            "first_token_max": max(firsts)}


def _stream(options: argparse.Namespace, url: str, number: int) -> Stream:
    began, first, tokens = time.perf_counter(), None, 0
    for event in _events(options, url, options.prompt.replace("{n}", str(number))):
        if "error" in event:
            raise BadInput(f"{url} failed: {event['error'].get('message')}")
        if event.get("usage"):
            tokens = event["usage"]["completion_tokens"]
        if first is None and event.get("choices"):
            first = time.perf_counter() - began
    if not tokens or first is None:
        raise BadInput(f"{url} did not say how many tokens it made: it must know "
                       "stream_options.include_usage")
    return Stream(tokens, first)


def _events(options: argparse.Namespace, url: str, prompt: str) -> Iterator[Json]:
    """The server-sent events of one completion."""
    body = {"prompt": prompt, "max_tokens": options.tokens, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {options.api_key}"}
    try:
        request = urllib.request.Request(
            f"{url}/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request) as answer:
            for line in answer:
                if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                    yield json.loads(line[6:])
    except urllib.error.HTTPError as error:
        with error:
            raise BadInput(f"{url} answers {error.code}: "
                           f"{error.read(300).decode(errors='replace')}") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{url} cannot be called ({error}): start the server "
                       "first") from None
