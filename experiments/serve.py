"""Serve a model over HTTP as OpenAI's API does: `python -m experiments.serve --help`.

Texts of all requests are made in one batch, which they enter and leave on their own.
"""

from __future__ import annotations

from rabit_jax.experiments.engine.signals import ENDED, SIGNALS, STOPPED, again, handling, watch

if __name__ == "__main__":
    watch(STOPPED, ENDED)  # before the imports below, which take seconds

import argparse
import asyncio
import contextlib
import dataclasses
import importlib
import ipaddress
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Protocol

from rabit_jax.errors import BadInput
from rabit_jax.experiments.engine.console import (
    EXIT_CODES,
    activation_option,
    cache_option,
    common_options,
    main_guard,
    paths_option,
)
from rabit_jax.experiments.engine.continuing import load_for_text
from rabit_jax.experiments.engine.streams import tell
from rabit_jax.experiments.serving.app import Served, application
from rabit_jax.experiments.serving.worker import Worker
from rabit_jax.models.decoder import Decoder
from rabit_jax.models.prepared import prepare
from rabit_jax.progress import progress, say
from rabit_jax.types import Tokenizer

KEY_VARIABLE = "RABIT_API_KEY"
EXAMPLES = """\
examples:
  python -m experiments.serve --model runs/quickstart/packed
  python -m experiments.serve --model runs/mine --slots 16 --context 4096 --port 8080
  RABIT_API_KEY=secret python -m experiments.serve --model model.gguf --host 0.0.0.0
  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
      -d '{"prompt": "The list", "max_tokens": 32, "temperature": 0}'
"""


class Server(Protocol):
    """What is used of `uvicorn.Server`."""

    started: bool
    should_exit: bool
    force_exit: bool
    capture_signals: Callable[[], contextlib.AbstractContextManager[None]]

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer requests until `should_exit`."""
        ...


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 130 once it was stopped, or 2 for bad input."""
    args = _parser().parse_args(argv)
    return main_guard(lambda: _run(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.serve", epilog=f"{EXAMPLES}\n{EXIT_CODES}",
        description="Serve a dense or packed model over HTTP: /v1/completions, "
                    "/v1/chat/completions, /v1/models and /healthz, as OpenAI's clients call them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common_options(parser)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR",
        help="model folder, dense or packed, a run folder for its packed model, a GGUF file, or a "
             "hub id")
    add("--name", metavar="NAME", help="what clients call the model; default: from --model")
    add("--host", default="127.0.0.1", metavar="ADDRESS",
        help="address to listen at; default %(default)s, which this machine alone reaches")
    add("--port", type=int, default=8000, metavar="N",
        help="default %(default)s; 0 takes a free one")
    add("--slots", type=int, default=8, metavar="N",
        help="most texts that are made at once; default %(default)s")
    add("--queue", type=int, default=64, metavar="N",
        help="most texts that wait for a slot, further ones are answered by 429; default "
             "%(default)s")
    add("--context", type=int, metavar="N",
        help="most tokens of a prompt and its text; default: the positions of the model")
    add("--head-bits", type=int, choices=(8,), metavar="8",
        help="round a dense head to 8 bits, as experiments.generate does")
    paths_option(parser)
    cache_option(parser)
    activation_option(parser)
    add("--max-body", type=int, default=1 << 20, metavar="BYTES",
        help="largest body of a request; default %(default)s")
    add("--api-key", metavar="KEY", default=os.environ.get(KEY_VARIABLE),
        help="what clients must send as bearer token; default: the environment's "
             f"{KEY_VARIABLE}, which other users of the machine cannot read from the process list")
    return parser


def _run(args: argparse.Namespace) -> None:
    _check(args)
    uvicorn = _library()
    # Until requests can come a signal ends the process.
    with contextlib.closing(_bound(args.host, args.port)) as sock:
        model, tokenizer, worker = _loaded(args)
        name = args.name or _name_of(args.model)
        served = Served(name, int(time.time()), tokenizer, model.config.vocab_size, worker,
                        args.api_key or None, args.max_body)
        config = uvicorn.Config(application(served), access_log=False, log_level="warning",
                                lifespan="off")
        server: Server = uvicorn.Server(config)
        worker.failed = lambda: setattr(server, "should_exit", True)
        worker.start()
        try:
            with handling(_Stopping(server, worker).asked, SIGNALS):
                asyncio.run(_serve(server, sock, _line(args, name, sock, worker)))
        finally:
            worker.close(now=server.force_exit)
    if worker.failure is not None:
        raise worker.failure
    raise KeyboardInterrupt  # a server ends in no other way; `main_guard` gives the exit code


def _check(args: argparse.Namespace) -> None:
    for option, least, most in (("port", 0, 65535), ("slots", 1, 1024), ("queue", 0, 10**6),
                                ("context", 2, 2**31 - 1), ("max_body", 1, 2**40)):
        value = getattr(args, option)
        if value is not None and not least <= value <= most:
            raise BadInput(f"--{option.replace('_', '-')} is {value}, wanted {least} to {most}")


def _library() -> ModuleType:
    """uvicorn, which Starlette's applications run on."""
    try:
        importlib.import_module("starlette")
        return importlib.import_module("uvicorn")
    except ImportError:
        raise BadInput("the server needs starlette and uvicorn, which are not installed: pip "
                       "install starlette uvicorn, or the package as '.[serve]'") from None


def _bound(host: str, port: int) -> socket.socket:
    """A socket with the address, which listens once the model is there.

    Raises:
      BadInput: the address cannot be had.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(family, kind)
    except OSError as error:
        raise BadInput(f"--host {host} is no address here ({error.strerror or error}): 127.0.0.1 "
                       "or 0.0.0.0 is one") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise BadInput(f"cannot listen at {host}:{port} ({error.strerror}): choose another --port "
                       "or end what listens there") from None
    return sock


def _loaded(args: argparse.Namespace) -> tuple[Decoder, Tokenizer, Worker]:
    """The model, its tokenizer, and the worker with its programs compiled."""
    model, params, tokenizer = load_for_text(args.model, args.paths)
    positions = model.config.max_position
    if (args.context or positions) > positions:
        raise BadInput(f"--context is {args.context}, the model has {positions} positions: ask for "
                       "no more")
    engine = prepare(model.config, params, args.head_bits, args.cache_bits,
                     args.activation_bits)
    worker = Worker(engine, tokenizer, model.config.eos_ids, args.slots, args.queue,
                    args.context or positions)
    with progress("compile", worker.warm_steps()) as bar:
        worker.warm(bar)
    return model, tokenizer, worker


def _name_of(model: str) -> str:
    """The name of the model: that of its folder or file, of `packed` in a run that of the run."""
    path = Path(model)
    if not path.exists():
        return model
    path = Path(os.path.abspath(path))  # a link keeps its name: the hub's cache links to digests
    return path.parent.name if path.name == "packed" else path.name.removesuffix(".gguf")


def _line(args: argparse.Namespace, name: str, sock: socket.socket, worker: Worker) -> str:
    """What is said when requests can come."""
    host, port = sock.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    line = (f"serving {name} at http://{shown}:{port}/v1, {worker.rows} texts at once, context "
            f"{worker.context}; Ctrl-C stops")
    open_to_all = not ipaddress.ip_address(host.partition("%")[0]).is_loopback
    warning = ("\nwarning: whoever reaches this address can use the model: set --api-key"
               if open_to_all and not args.api_key else "")
    return line + warning


async def _serve(server: Server, sock: socket.socket, line: str) -> None:
    """Serves until the server is asked to end; says `line` once it listens."""
    # Ours answer the signals: uvicorn would end the process by the signal itself.
    server.capture_signals = contextlib.nullcontext
    task = asyncio.ensure_future(server.serve(sockets=[sock]))
    while not server.started and not task.done():
        await asyncio.sleep(0.01)
    if server.started:
        say(line)
    await task


@dataclasses.dataclass
class _Stopping:
    """What a signal ends: the server, at first with what it has taken on."""

    server: Server
    worker: Worker

    def asked(self, number: int, _: object) -> None:
        """Answers a signal."""
        if self.server.should_exit:
            self.server.force_exit |= again(number)
            return
        self.server.should_exit = True
        waiting = self.worker.running + self.worker.waiting
        tell(f"stopping after {waiting} running texts (again to stop at once)\n")


if __name__ == "__main__":
    sys.exit(main())
