"""Models fetched from and pushed to a hub: a local server that answers as the hub does."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from rabit_jax.experiments import push
from rabit_jax.formats.hf import load_hf, save_hf
from rabit_jax.formats.packed_model import save_packed
from rabit_jax.kernels.layout import packed_bytes
from rabit_jax.models.config import ModelConfig
from rabit_jax.models.decoder import param_shapes
from rabit_jax.weights.sign_paths import PackedSign

CONFIG = ModelConfig(vocab_size=300, d_model=32, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=16,
                     d_hidden=32, eos_ids=(0,), max_position=32)
UP = "layers/mlp/up/kernel"
SHA = "0" * 40
NOWHERE = "http://127.0.0.1:9"  # nobody listens at the port that discards


class Hub(BaseHTTPRequestHandler):
    """The requests of huggingface_hub that these tests make, for the models of `server.models`."""

    def log_message(self, *_):
        pass

    def answer(self, status, content=b"", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.partition("?")[0].strip("/").split("/")
        api = path[:2] == ["api", "models"]
        repo, rest = "/".join(path[2:4] if api else path[:2]), path[4:] if api else path[2:]
        files = self.server.models.get(repo)
        if api and not rest and repo in self.server.created:
            self.answer(200, {"id": repo, "private": self.server.created[repo], "tags": []})
        elif files is None:
            self.answer(401 if repo == "org/private" else 404, X_Error_Code="RepoNotFound")
        elif api and rest[:1] == ["tree"]:
            self.answer(200, [{"type": "file", "path": n, "oid": self.etag(b), "size": len(b)}
                              for n, b in files.items()])
        elif api:
            self.answer(200, {"id": repo, "modelId": repo, "sha": SHA, "private": False,
                              "tags": [], "downloads": 0, "siblings": []})
        elif repo == "org/gated":  # its listing is public, its files are not
            self.answer(401, X_Error_Code="GatedRepo")
        else:
            content = files[rest[-1]]
            self.answer(200, content, ETag=f'"{self.etag(content)}"', X_Repo_Commit=SHA)

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.posted.append(self.path)
        if self.headers.get("Authorization") != "Bearer good":
            self.answer(401, {"error": "Invalid username or password."})
        elif self.path == "/api/repos/create":
            made = json.loads(body)
            name = f"{made['organization']}/{made['name']}"
            known = name in self.server.models
            if not known:
                self.server.created[name] = made.get("visibility") == "private"
            self.answer(409 if known else 200, {"url": f"{self.server.url}/{name}"})
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            self.answer(200, {"files": [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]]})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.decode().splitlines()]
            repo = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            self.server.uploaded[repo] = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines if line["key"] == "file"}
            where = f"{self.server.url}/{repo}/commit/{SHA}"
            self.answer(200, {"commitUrl": where, "commitOid": SHA})
        else:
            self.answer(404)

    @staticmethod
    def etag(content):
        return hashlib.sha1(content).hexdigest()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A dense and a packed model, and a folder that is none."""
    root, rng = tmp_path_factory.mktemp("hub"), np.random.default_rng(0)
    params = {p: rng.normal(size=s).astype(np.float32) for p, s in param_shapes(CONFIG).items()}
    save_hf(root / "dense", CONFIG, unflatten_dict(params, sep="/"))
    (l, i, o), up = params[UP].shape, UP
    packed = PackedSign(np.zeros((l, 1, o, packed_bytes(i)), np.uint8),
                        np.ones((l, 1, o), np.float16), np.ones((l, 1, i), np.float16), None)
    save_packed(root / "packed", CONFIG, unflatten_dict({**params, up: packed}, sep="/"),
                base="org/model")
    (root / "packed" / ".hidden").write_text("not for the hub")
    (root / "thesis").mkdir()
    (root / "thesis" / "chapter.tex").touch()
    return root


@pytest.fixture(scope="module")
def server(place):
    found = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    found.url = f"http://127.0.0.1:{found.server_port}"
    found.posted, found.created, found.uploaded = [], {}, {}
    dense = {f.name: f.read_bytes() for f in (place / "dense").iterdir()}
    pickled = {"config.json": dense["config.json"], "pytorch_model.bin": b"x"}
    found.models = {"org/model": dense, "org/gated": dense, "org/pickled": pickled}
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


# Orders on stdin, one JSON answer a line on stdout. The library reads its settings when imported.
CLIENT = """
import contextlib, io, json, os, sys
import numpy as np
from huggingface_hub import constants
from rabit_jax.errors import BadInput
from rabit_jax.experiments import push
from rabit_jax.formats import load_hf

def load(name):
    try:
        params = load_hf(name)[1]
    except BadInput as error:
        return str(error)
    return np.asarray(params["head"]["kernel"]).tolist()

def pushed(*arguments):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        return [push.main(arguments), out.getvalue()]

def settings(values):
    for name, value in values.items():
        setattr(constants, name, value)

orders = {"load": load, "push": pushed, "set": settings, "env": os.environ.update}
for line in sys.stdin:
    order, *arguments = json.loads(line)
    print(json.dumps(orders[order](*arguments)))
"""


@pytest.fixture(scope="module")
def client(server, tmp_path_factory):
    """`client(orders)` -> what each order but the settings gave, all in one process."""
    def run(orders):
        keep = {n: v for n, v in os.environ.items() if n not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
        own = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path_factory.mktemp("home")),
               "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        found = subprocess.run(
            [sys.executable, "-c", CLIENT], input="\n".join(map(json.dumps, orders)), text=True,
            capture_output=True, timeout=120, env={**keep, **own}, cwd=Path(__file__).parents[2])
        assert found.returncode == 0, found.stderr
        answers = [json.loads(line) for line in found.stdout.splitlines()]
        return [a for a, order in zip(answers, orders, strict=True) if order[0] in ("load", "push")]

    return run


def test_models_are_fetched_and_failures_explained(server, client, place):
    loaded, gated, missing, private, pickled, cached, none, offline = client([
        ["load", "org/model"], ["load", "org/gated"], ["load", "org/missing"],
        ["load", "org/private"], ["load", "org/pickled"],
        ["set", {"ENDPOINT": NOWHERE}], ["load", "org/model"], ["load", "org/new"],
        ["set", {"HF_HUB_OFFLINE": True}], ["load", "org/new"],
    ])
    params = load_hf(place / "dense")[1]
    assert loaded == cached == np.asarray(params["head"]["kernel"]).tolist()
    assert gated.startswith("no model folder org/gated, and org/gated is gated on the hub: accept "
                            f"its licence at {server.url}/org/gated and run `hf auth login`")
    for name, found in (("missing", missing), ("private", private)):
        assert found == (f"no model folder org/{name}, and the hub has no org/{name} that you may "
                         "read: check the name, or run `hf auth login` if it is private")
    assert "holds no model.safetensors and no model.safetensors.index.json: convert" in pickled
    for found in (none, offline):
        assert "the hub cannot be reached while this machine holds no copy of org/new" in found


def test_push(server, client, place):
    packed = place / "packed"

    def command(model="packed", repo="org/packed", *flags):
        return ["push", "--model", str(place / model), "--repo", repo, *flags]

    upload = command("packed", "org/packed", "--yes-upload")
    listed, thesis, nowhere, name, anonymous, refused, done, hidden, public, cut = client([
        command(), command("thesis"), command("none"), command(repo="packed"), upload,
        ["env", {"HF_TOKEN": "bad"}], upload, ["env", {"HF_TOKEN": "good"}],
        upload, command("dense", "org/dense", "--yes-upload", "--private"),
        command("packed", "org/model", "--yes-upload", "--private"),
        ["set", {"ENDPOINT": NOWHERE}], upload])
    files = {f.name: f.read_bytes() for f in packed.iterdir() if f.name != ".hidden"}
    assert listed[0] == 0 and "nothing was uploaded" in listed[1]
    for text in (*files, *(f"{len(c):,}" for c in [*files.values(), b"".join(files.values())])):
        assert text in listed[1]
    assert ".hidden" not in listed[1]
    for (code, text), message in (
        (thesis, "is no model folder"), (nowhere, "no model folder"),
        (name, "wanted an owner and a name"), (anonymous, "not logged in to the hub: run `hf auth"),
        (refused, "not logged in to the hub: run `hf auth login`"),
        (public, "org/model exists and is public"), (cut, "the hub cannot be reached"),
    ):
        assert code == 2 and message in " ".join(text.split()), text
    assert done[0] == 0 and f"uploaded: {server.url}/org/packed" in done[1]
    assert hidden[0] == 0
    assert server.created == {"org/packed": False, "org/dense": True}
    assert set(server.uploaded) == {"org/packed", "org/dense"}
    assert server.uploaded["org/packed"] == files


def test_a_damaged_model_is_not_pushed(place, tmp_path, capsys):
    damaged = tmp_path / "damaged"
    shutil.copytree(place / "packed", damaged)
    file = damaged / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert push.main(["--model", str(damaged), "--repo", "org/packed"]) == 2
    assert "its checksum differs" in " ".join(capsys.readouterr().err.split())
