"""The server, called by OpenAI's own client."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import pytest

from rabit_jax.data.tokenizer import train_tokenizer
from rabit_jax.experiments import generate as generate_command
from rabit_jax.experiments import serve as command
from rabit_jax.experiments.bench import __main__ as bench
from rabit_jax.experiments.serving import app
from rabit_jax.experiments.serving.app import Served, application
from rabit_jax.experiments.serving.settings import Settings
from rabit_jax.experiments.serving.texts import Choice, Prompt
from rabit_jax.experiments.serving.worker import Worker
from rabit_jax.formats.hf import save_hf
from rabit_jax.formats.packed_model import load_model
from rabit_jax.models import serving
from rabit_jax.models.config import ModelConfig
from rabit_jax.models.prepared import prepare
from tests.small_models import CHAT_TEMPLATE, save_random_folders

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
httpx2 = pytest.importorskip("httpx2")

CONFIG = ModelConfig(
    vocab_size=300, d_model=32, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=8, d_hidden=48,
    bos_id=0, eos_ids=(), max_position=2048,
)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dense and a packed folder of a tiny random model with a chat template."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(["[user] the cat sat on the mat\n[assistant] the cat"] * 3, 300)
    tokenizer.chat_template = CHAT_TEMPLATE
    save_random_folders(root, CONFIG, tokenizer)
    return root


class Running:
    """A server in this process, and its worker; `endless` texts have no end token."""

    def __init__(self, folder, rows=2, waiting=8, context=2048, api_key=None, most_body=1 << 16,
                 endless=False):
        model, params, self.tokenizer = load_model(folder)
        engine = prepare(model.config, params)
        ends = () if endless else model.config.eos_ids
        self.worker = Worker(engine, self.tokenizer, ends, rows, waiting, context)
        served = Served("tiny", 0, self.tokenizer, model.config.vocab_size, self.worker, api_key,
                        most_body)
        self.socket = socket.create_server(("127.0.0.1", 0))  # clients wait until it is served
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(
            application(served), log_level="warning", lifespan="off"))
        self.thread = threading.Thread(
            target=lambda: asyncio.run(self.server.serve(sockets=[self.socket])))
        self.worker.start()
        self.thread.start()

    def client(self, kind=openai.OpenAI, key="any"):
        return kind(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120)

    def health(self):
        return httpx2.get(f"{self.url}/healthz").json()

    def post(self, path, **settings):
        return httpx2.post(f"{self.url}/v1/{path}", timeout=60, **settings)

    def close(self):
        self.server.should_exit = True
        self.thread.join()
        self.worker.close(now=True)


@contextlib.contextmanager
def running(*args, **settings):
    one = Running(*args, **settings)
    try:
        yield one
    finally:
        one.close()


@pytest.fixture(scope="module")
def packed(folders):
    with running(folders / "packed") as one:
        yield one


@pytest.fixture(scope="module")
def client(packed):
    with packed.client() as one:
        yield one


def greedy(folder, prompt, steps, capsys):
    """What `experiments.generate` makes of a prompt."""
    capsys.readouterr()
    assert generate_command.main(["--model", str(folder), "--greedy", "--prompt", prompt,
                                  "--max-new-tokens", str(steps)]) == 0
    return capsys.readouterr().out.removesuffix("\n").removeprefix(prompt)


def test_a_completion_is_the_text_of_generate(folders, client, packed, capsys):
    wanted = greedy(folders / "packed", "the cat", 12, capsys)
    settings = {"model": "tiny", "prompt": "the cat", "max_tokens": 12, "temperature": 0}
    found = client.completions.create(**settings)
    assert found.choices[0].text == wanted and found.choices[0].finish_reason == "length"
    read = len(packed.tokenizer.encode("the cat"))
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (read, 12)
    # The same as ids, and in a stream.
    ids = {**settings, "prompt": packed.tokenizer.encode("the cat")}
    assert client.completions.create(**ids).choices[0].text == wanted
    chunks = list(client.completions.create(**settings, stream=True,
                                            stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks[:-1]) == wanted and len(chunks) > 3
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 12


def test_a_chat_is_the_template_continued(folders, client, capsys):
    prompt = "[system] be brief\n[user] the cat?\n[assistant]"
    wanted = greedy(folders / "packed", prompt, 10, capsys)
    messages = [{"role": "developer", "content": "be brief"},
                {"role": "user", "content": [{"type": "text", "text": "the cat?"}]}]
    settings = {"model": "tiny", "messages": messages, "temperature": 0}
    found = client.chat.completions.create(**settings, max_completion_tokens=10)
    assert found.choices[0].message.content == wanted
    assert found.choices[0].message.role == "assistant"
    chunks = list(client.chat.completions.create(**settings, max_tokens=10, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == wanted
    assert chunks[-1].choices[0].finish_reason == "length"


def test_end_tokens_end_a_text(folders, tmp_path, client):
    settings = {"model": "tiny", "prompt": "the cat", "max_tokens": 12, "temperature": 0}
    told = client.completions.create(**settings, logprobs=0).choices[0].logprobs
    tokenizer = load_model(folders / "packed")[2]
    at = next(n for n in range(2, 12) if told.tokens[n] not in told.tokens[:n]
              and "\ufffd" not in told.tokens[n])
    token = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(told.tokens[at])[0])
    folder = shutil.copytree(folders / "packed", tmp_path / "packed")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [299, token]}))
    with running(folder) as one, one.client() as other:
        found = other.completions.create(**settings)
    assert found.choices[0].finish_reason == "stop" and found.usage.completion_tokens == at + 1
    assert found.choices[0].text == "".join(told.tokens[:at]) or "\ufffd" in found.choices[0].text


def test_stop_strings_end_a_text_across_chunks(client):
    settings = {"model": "tiny", "prompt": "the cat", "max_tokens": 24, "temperature": 0}
    whole = client.completions.create(**settings).choices[0].text
    at = next(n for n in range(4, len(whole) - 3) if whole.find(whole[n : n + 3]) == n)
    stop = whole[at : at + 3]
    for stops in (stop, ["never there", stop]):
        found = client.completions.create(**settings, stop=stops)
        assert (found.choices[0].text, found.choices[0].finish_reason) == (whole[:at], "stop")
        chunks = list(client.completions.create(**settings, stop=stops, stream=True))
        assert "".join(c.choices[0].text for c in chunks) == whole[:at]
    # What may be the beginning of a stop string is given when it is none.
    found = client.completions.create(**settings, stop=[whole[-2:] + "never"])
    assert (found.choices[0].text, found.choices[0].finish_reason) == (whole, "length")


def test_seeds_and_several_choices(client):
    settings = {"model": "tiny", "prompt": "the cat", "max_tokens": 8, "temperature": 1.0}

    def texts(**more):
        return [c.text for c in client.completions.create(**settings, **more).choices]

    assert texts(seed=5) == texts(seed=5) != texts(seed=6)
    three = texts(seed=5, n=3)
    assert len(set(three)) == 3 and three[:1] == texts(seed=5)
    assert texts(seed=2**62) != texts(seed=2**61)
    assert texts() != texts()
    # A nucleus of one token is greedy; two prompts with two texts each come in order.
    plain = client.completions.create(**{**settings, "temperature": 0}).choices[0].text
    assert texts(top_p=1e-6, seed=1) == texts(top_p=0, seed=2) == [plain]
    prompts = {"prompt": ["the cat", "on the mat"]}
    both = client.completions.create(**(settings | prompts), n=2, seed=5)
    assert [c.index for c in both.choices] == [0, 1, 2, 3]
    assert [c.text for c in both.choices[:2]] == three[:2]


def test_log_probabilities(client):
    settings = {"model": "tiny", "max_tokens": 6, "temperature": 0}
    found = client.completions.create(**settings, prompt="the cat", logprobs=3).choices[0]
    told = found.logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.text_offset) == 6
    for token, log, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        # Greedy: the chosen token is the likeliest.
        assert log <= 0 and max(top.values()) == pytest.approx(log) and token in top
    chat = client.chat.completions.create(
        **settings, messages=[{"role": "user", "content": "the cat"}], logprobs=True,
        top_logprobs=2, stream=True)
    tokens = [t for c in chat for t in (c.choices[0].logprobs or _none).content or ()]
    assert len(tokens) == 6 and all(len(t.top_logprobs) == 2 for t in tokens)
    assert all(t.top_logprobs[0].token == t.token for t in tokens)
    assert all(bytes(t.bytes).decode(errors="replace") == t.token for t in tokens)


class _none:
    content = None


def test_32_streams_at_once_are_what_each_is_alone(folders):
    prompts = [f"the {'cat ' * (n % 5)}sat on {n}" for n in range(32)]
    with running(folders / "dense", rows=8, waiting=32) as one:
        with one.client() as plain:
            settings = {"model": "tiny", "max_tokens": 9, "temperature": 0}
            wanted = [plain.completions.create(**settings, prompt=p).choices[0].text
                      for p in prompts]

        async def text(client, prompt):
            stream = await client.completions.create(**settings, prompt=prompt, stream=True)
            return "".join([chunk.choices[0].text async for chunk in stream])

        async def all_of_them():
            async with one.client(openai.AsyncOpenAI) as client:
                return await asyncio.gather(*(text(client, prompt) for prompt in prompts))

        assert asyncio.run(all_of_them()) == wanted
        assert len(set(wanted)) > 16
        assert len(one.worker._held) == 8  # they shared a batch
        assert one.health() == {"status": "ok", "model": "tiny", "running": 0, "waiting": 0}


def test_short_prompts_that_wait_are_read_in_one_call(folders, monkeypatch):
    """Sixteen in one call, a long one alone in two pieces, then four in one call."""
    model, params, tokenizer = load_model(folders / "dense")
    engine, sizes = prepare(model.config, params), []

    def counted(name, read):
        def call(engine, *args):
            sizes.append((name, args[0 if name == "together" else 1].size))
            return read(engine, *args)

        monkeypatch.setattr(serving, read.__name__, call)

    counted("piece", serving.read)
    counted("together", serving.read_together)
    prompts = [[5 + n] * (1 + n % 7) for n in range(20)]
    prompts.insert(16, [9] * 300)

    def texts(prompts):
        made = [[] for _ in prompts]
        settings = Settings(6, 0.0, 1.0, 0)
        worker = Worker(engine, tokenizer, (), 32, 32, 1024)
        worker.submit([Prompt(ids, [Choice(settings, own.append)])
                       for ids, own in zip(prompts, made, strict=True)])
        worker.start()
        worker.close()
        return ["".join(piece.text for piece in own) for own in made]

    together = texts(prompts)
    assert sizes == [("together", 64), ("piece", 256), ("piece", 64), ("together", 64)]
    assert together == [texts([ids])[0] for ids in prompts] and len(set(together)) > 8


def test_who_goes_frees_the_slot_and_who_comes_too_many_is_told(folders):
    long = {"model": "tiny", "prompt": "the cat", "max_tokens": 2000, "temperature": 0}
    short = {**long, "max_tokens": 4}
    with (running(folders / "packed", rows=1, waiting=1, endless=True) as one,
          one.client() as client):
        stream = client.completions.create(**long, stream=True)
        next(iter(stream))
        (row,) = (row for row in one.worker._held if row)
        with ThreadPoolExecutor(1) as pool:
            second = pool.submit(client.completions.create, **short)
            while one.health()["waiting"] == 0 and not second.done():
                pass
            with pytest.raises(openai.RateLimitError, match="queue is full") as full:
                client.completions.create(**short)
            assert int(full.value.response.headers["retry-after"]) >= 1
            assert full.value.body["code"] == "queue_full"
            stream.close()
            assert second.result().usage.completion_tokens == 4
        assert row.choice.cancelled and row.made < 2000
        # The same of a request that is not streamed.
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.2).completions.create(**long)
        assert client.completions.create(**short).usage.completion_tokens == 4
        assert one.health()["running"] == 0


def test_keys(folders):
    with running(folders / "dense", api_key="secret") as one:
        for key in ("wrong", "secre"):
            with one.client(key=key) as client, pytest.raises(openai.AuthenticationError):
                client.models.list()
        for headers in ({}, {"Authorization": "Bearer sécret".encode()}):
            found = one.post("completions", json={"prompt": "a"}, headers=headers)
            assert found.status_code == 401 and found.headers["www-authenticate"] == "Bearer"
        with one.client(key="secret") as client:
            assert [model.id for model in client.models.list()] == ["tiny"]
            assert client.models.retrieve("tiny").owned_by == "rabit_jax"
        assert one.health()["status"] == "ok"


def test_a_key_may_have_any_characters(folders):
    with running(folders / "dense", api_key="clé") as one:
        headers = {"Authorization": "Bearer clé".encode()}
        assert httpx2.get(f"{one.url}/v1/models", headers=headers).status_code == 200


def test_the_benchmark_counts_what_the_server_made(packed, capsys):
    assert bench.main(["server", "--url", f"{packed.url}/v1", "--streams", "1,2", "--tokens", "6",
                       "--repeats", "1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["streams"], row["tokens"]) for row in rows] == [(1, 6), (2, 12)]
    assert all(0 < row["first_token"] <= row["first_token_max"] < row["seconds"] for row in rows)
    nobody = "http://127.0.0.1:1/v1"
    for url, message in [(packed.url, "answers 404"), (nobody, "cannot be called")]:
        assert bench.main(["server", "--url", url]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("path, body, status, message", [
    ("completions", {}, 400, "prompt is missing"),
    ("completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens is '0'"),
    ("completions", {"prompt": "a", "temperature": 3}, 400, "temperature is '3'"),
    ("completions", {"prompt": "a", "top_p": -0.1}, 400, "top_p is '-0.1'"),
    ("completions", {"prompt": "a", "top_k": 40}, 400, "top_k is '40', which is not implemented"),
    ("completions", {"prompt": "a", "best_of": 3}, 400, "best_of is 3"),
    ("completions", {"prompt": "a", "frequency_penalty": 1}, 400, "is not implemented"),
    ("completions", {"prompt": "a", "max_token": 1}, 400, "unknown field max_token"),
    ("completions", {"prompt": "a", "max_tokens": 2048}, 400, "context of 2048 tokens"),
    ("completions", {"prompt": ""}, 400, "a prompt is empty"),
    ("completions", {"prompt": []}, 400, "prompt is empty"),
    ("completions", {"prompt": [[1], []]}, 400, "a prompt is empty"),
    ("completions", {"prompt": [300]}, 400, "vocabulary ends at 299"),
    ("completions", {"prompt": [-1]}, 400, "prompt is '[-1]': wanted a text, a list of"),
    ("completions", {"prompt": [2**32]}, 400, "wanted a text, a list of token ids"),
    ("completions", {"prompt": "a", "stop": 5}, 400, "stop is '5': wanted a text or a list"),
    ("completions", {"prompt": "a", "n": 11}, 400, "takes 10 at most"),
    ("completions", {"prompt": "a", "model": "other"}, 404, "no model 'other'"),
    ("completions", [1], 400, "wanted a JSON object"),
    ("completions", {"prompt": "x" * 70000}, 400, "more than 65536 bytes"),
    ("completions", {"prompt": "\ud800"}, 400, "lone surrogate"),
    ("chat/completions", {"messages": []}, 400, "messages"),
    ("chat/completions", {"messages": [{"role": "tool", "content": "a"}]}, 400, "messages.0.role"),
    ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400,
     "messages.0.content is"),
    ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}, 400,
     "top_logprobs is 2 without logprobs"),
    ("chat/completions", {"messages": [{"role": "user", "content": "forbidden"}]}, 400,
     "refuses the conversation (not so)"),
    ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "tools": [1]}, 400,
     "tools is"),
    ("nothing", {}, 404, "Not Found"),
])
def test_bad_requests_are_one_sentence(packed, path, body, status, message):
    found = packed.post(path, content=json.dumps(body))
    assert found.status_code == status
    error = found.json()["error"]
    assert message in error["message"] and "\n" not in error["message"]


def test_errors_name_their_field_and_code(client, packed):
    """As OpenAI's, by which programs tell a full context from a wrong name."""
    settings = {"model": "tiny", "prompt": "a", "max_tokens": 1}
    for change, param, code in (
        ({"max_tokens": 4000}, "prompt", "context_length_exceeded"), ({"n": 0}, "n", None),
        ({"temperature": 5}, "temperature", None), ({"stop": [1]}, "stop", None),
        ({"echo": True}, "echo", None), ({"model": "no"}, "model", "model_not_found"),
        ({"extra_body": {"foo": 1}}, "foo", None),
    ):
        with pytest.raises(openai.APIStatusError) as error:
            client.completions.create(**{**settings, **change})
        assert (error.value.param, error.value.code) == (param, code), change
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="tiny", messages=[{"role": "tool", "content": "a"}])
    assert error.value.param == "messages.0.role"


def test_an_answer_can_be_sent_back_as_it_came(client):
    messages = [{"role": "user", "content": "the cat"}]
    settings = {"model": "tiny", "temperature": 0, "max_tokens": 4}
    said = client.chat.completions.create(**settings, messages=messages).choices[0].message
    more = {"role": "user", "content": "more"}
    found = client.chat.completions.create(**settings, messages=[*messages, said, more])
    plain = {"role": "assistant", "content": said.content}
    wanted = client.chat.completions.create(**settings, messages=[*messages, plain, more])
    assert found.choices[0].message.content == wanted.choices[0].message.content
    # Other servers' answers have more fields that are empty; such an assistant said nothing.
    empty = {**plain, "content": None, "tool_calls": [], "annotations": [], "audio": None}
    found = client.chat.completions.create(**settings, messages=[*messages, empty, more])
    assert found.usage.prompt_tokens < wanted.usage.prompt_tokens


def test_a_fault_of_ours_is_an_error_of_openais_form(packed, monkeypatch):
    monkeypatch.setattr(app, "template_ids", lambda *_: 1 / 0)
    body = {"messages": [{"role": "user", "content": "a"}]}
    found = packed.post("chat/completions", json=body)
    assert found.status_code == 500 and found.json()["error"]["type"] == "server_error"


def test_what_asks_for_nothing_special_is_taken(packed):
    body = {"prompt": "a", "max_tokens": 1, "user": "me", "logit_bias": {}, "presence_penalty": 0,
            "temperature": None, "stop": None, "seed": -3, "top_k": -1, "min_p": 0.0}
    assert packed.post("completions", json=body).status_code == 200
    assert packed.post("completions", content=b"{").status_code == 400
    assert httpx2.get(f"{packed.url}/v1/completions").status_code == 405


def test_damaged_weights_fail_the_request_alone(folders, tmp_path):
    model, params, tokenizer = load_model(folders / "dense")
    params["final_norm"]["scale"] = jnp.full_like(params["final_norm"]["scale"], 3e38)
    save_hf(tmp_path / "huge", model, params, tokenizer)
    with running(tmp_path / "huge") as one, one.client() as client:
        settings = {"model": "tiny", "prompt": "the cat"}
        with pytest.raises(openai.InternalServerError, match="NaN or infinity"):
            client.completions.create(**settings)
        with pytest.raises(openai.APIError, match="NaN or infinity"):
            list(client.completions.create(**settings, stream=True))
        assert one.health() == {"status": "ok", "model": "tiny", "running": 0, "waiting": 0}


def test_a_worker_that_fails_is_told_to_all(folders, monkeypatch):
    with running(folders / "dense") as one, one.client() as client:
        # Reading, not decoding: a text whose first token ends it is never decoded.
        monkeypatch.setattr(one.worker, "_read", lambda: 1 / 0)
        for _ in range(2):
            with pytest.raises(openai.InternalServerError, match="its log says why"):
                client.completions.create(model="tiny", prompt="the cat")
        assert isinstance(one.worker.failure, ZeroDivisionError)
        assert one.health()["status"] == "failed"


@pytest.mark.more
def test_the_command_serves_and_ends_with_what_it_has_taken_on(folders):
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.serve", "--model", folders / "packed", "--port", "0",
         "--slots", "1"], cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""}, stderr=subprocess.PIPE,
        text=True)
    try:
        line = next(line for line in process.stderr if line.startswith("serving "))
        assert line.startswith("serving ") and ", 1 texts at once, context 2048;" in line
        url = re.search(r"http://127\.0\.0\.1:\d+/v1", line)[0]
        with openai.OpenAI(base_url=url, api_key="any", max_retries=0, timeout=120) as client:
            name = client.models.list().data[0].id
            stream = client.completions.create(model=name, prompt="the cat", max_tokens=300,
                                               temperature=0, stream=True)
            next(chunks := iter(stream))
            process.send_signal(signal.SIGTERM)
            assert list(chunks)[-1].choices[0].finish_reason == "length"
        assert process.wait(60) == 130
        assert process.stderr.read().splitlines()[-1] == "stopped"
    finally:
        process.kill()
        process.stderr.close()


def test_a_terminal_that_closes_is_no_second_signal():
    server = types.SimpleNamespace(should_exit=False, force_exit=False)
    stopping = command._Stopping(server, types.SimpleNamespace(running=1, waiting=0))
    for number, at_once in ((signal.SIGTERM, False), (signal.SIGHUP, False), (signal.SIGINT, True)):
        stopping.asked(number, None)
        assert server.should_exit and server.force_exit == at_once


@pytest.mark.parametrize("args, message", [
    (["--slots", "0"], "--slots is 0"),
    (["--port", "70000"], "--port is 70000"),
    (["--context", "4096", "--port", "0"], "the model has 2048 positions"),
    (["--host", "nowhere.invalid"], "--host nowhere.invalid"),
])
def test_bad_options_are_one_sentence(folders, capsys, args, message):
    assert command.main(["--model", str(folders / "dense"), *args]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and len(err.splitlines()) == 1


def test_a_port_that_is_taken_is_named(folders, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert command.main(["--model", str(folders / "dense"), "--port", port]) == 2
    assert f"cannot listen at 127.0.0.1:{port}" in capsys.readouterr().err


def test_a_missing_library_is_named(folders, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert command.main(["--model", str(folders / "dense")]) == 2
    assert "pip install starlette uvicorn" in capsys.readouterr().err
