"""What a run keeps between its starts: records, pieces, metrics, token cache, checkpoints."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax import Stats
from rabit_jax.data.tokenizer import train_tokenizer
from rabit_jax.data.tokens import tokenise, tokenise_stream
from rabit_jax.experiments.engine import inputs, qat, stages
from rabit_jax.experiments.engine.folder import RunFolder
from rabit_jax.experiments.engine.metrics import Metrics
from rabit_jax.experiments.engine.pieces import Pieces
from rabit_jax.experiments.engine.settings import RunConfig
from rabit_jax.train.checkpoints import Checkpoints, abstract
from rabit_jax.weights.sign_paths import PackedSign
from tests.fuzz.mutations import damaged, json_bytes, mutated

PATHS = ("../../etc/passwd", "/etc/passwd", "teacher/../../x")


def harmed(content, rng):
    """A record damaged as bytes, or changed as a tree without its checksum."""
    if rng.random() < 0.5:
        return damaged(content, rng)
    return json_bytes(mutated(json.loads(content), rng, *PATHS), rng)


def test_records_of_stages(tmp_path, fuzz):
    """A record is read as it was written, or its stage is done again; a checksum tells."""
    folder = RunFolder(RunConfig(name="run", output=str(tmp_path)))
    stage = next(s for s in qat.STAGES if s.name == "calibrate")
    read = stages.Read("calibrate", {"calibrate": RunConfig().calibrate, "the text": "digest"})
    stats = {"layers/attn/q/kernel": Stats(jnp.ones((1, 8)), jnp.ones((1, 8)))}
    inputs.write_stats(folder.path / "calibration.safetensors", stats)
    wanted = stages.complete(folder, stage, {**read.record(), "id": read.key, "result": {"a": 1}})
    wanted.pop("sha256", None)
    file = folder.path / "stages" / "calibrate.json"
    whole = file.read_bytes()
    started = folder.path / "stages" / "calibrate.started"

    def make(rng):
        for other in file.parent.iterdir():
            other.unlink()
        content = harmed(whole, rng)
        (file if rng.random() < 0.8 else started).write_bytes(content)
        return len(content)

    def use():
        found = stages.completed(folder, stage, read.key)
        if found is not None and "sha256" in json.loads(file.read_bytes()):
            assert found == wanted
        stages._check_resumable(folder, [stage], stage, read)

    fuzz(7, make, use, 200)


def test_pieces_of_blocks(tmp_path, fuzz):
    """Arrays and packed blocks come back to the bit, or are refused."""
    pieces = Pieces(tmp_path / "blocks")
    rng = np.random.default_rng(0)
    node = PackedSign(jnp.asarray(rng.integers(0, 256, (1, 2, 8, 32), np.uint8)),
                      jnp.ones((1, 2, 8), jnp.float16), jnp.ones((1, 2, 256), jnp.float16))
    stats = {"layers/attn/q/kernel": Stats(np.ones((1, 256), np.float32),
                                           np.ones((1, 8), np.float32))}
    pieces.write_block("block-000.safetensors", {"layers/attn/q/kernel": node}, stats, {"e": 0.5},
                       {"layers/attn_norm/scale": np.ones((1, 4), np.float32)})
    with pieces.writing("x-000") as write:
        write(np.arange(12, dtype=np.float32))
    names = ["block-000.safetensors", "x-000", "x-000.crc32"]
    wholes = {name: (pieces.folder / name).read_bytes() for name in names}

    def read():
        found, measured, record = pieces.read_block("block-000.safetensors")
        arrays = [np.asarray(a) for a in [*found["layers/attn/q/kernel"].__dict__.values()]
                  if a is not None]
        state = pieces.mapped("x-000", (12,), "float32").tobytes()
        state += b"".join(a.tobytes() for a in pieces.reading("x-000", (4,), "float32"))
        return [a.tobytes() for a in arrays], str(measured), record, state

    wanted, last = read(), []

    def make(rng):
        for name in last:
            (pieces.folder / name).write_bytes(wholes[name])
        last[:] = [names[int(rng.integers(3))]]
        content = damaged(wholes[last[0]], rng, 1500)
        (pieces.folder / last[0]).write_bytes(content)
        return len(wholes[last[0]])

    def use():
        assert read() == wanted

    fuzz(8, make, use, 200)


def test_lines_of_metrics(tmp_path, fuzz):
    metrics = Metrics(tmp_path)
    lines = [{"stage": "qat", "step": n, "tokens": 8 * n, "loss": 2.0} for n in range(6)]
    whole = "".join(json.dumps(line) + "\n" for line in lines).encode()

    def make(rng):
        tree = [mutated(line, rng) if rng.random() < 0.3 else line for line in lines]
        content = b"\n".join(json_bytes(one, rng) for one in tree) if rng.random() < 0.5 else \
            damaged(whole, rng)
        metrics.file.write_bytes(content)
        return len(content)

    def use():
        found = metrics.lines()
        metrics.forget(("teacher",))
        kept = metrics.lines()
        assert len(kept) == len([x for x in found if x.get("during", x["stage"]) != "teacher"])

    fuzz(9, make, use, 200)


def test_token_caches(tmp_path, fuzz):
    """The tokens of a text are those of that text, whatever the cache holds."""
    texts = ["the file is read", "a list of lines", "and the end of it"]
    tokenizer = train_tokenizer(texts, 270)
    cache = tmp_path / "cache"

    def read():
        stream = tokenise_stream(lambda: [(texts, 0)], {"a": 1}, tokenizer, cache)
        found = tokenise(texts, tokenizer, cache)
        return [(t.tokens.tobytes(), t.tokens.dtype, t.bytes, t.documents, t.digest)
                for t in (found, stream)]

    wanted = read()
    originals = {f.name: f.read_bytes() for f in cache.iterdir()}
    names = sorted(originals)
    assert len(names) == 3

    def make(rng):
        for name, content in originals.items():
            (cache / name).write_bytes(content)
        name = names[int(rng.integers(3))]
        json_file = name.endswith(".json")
        content = harmed(originals[name], rng) if json_file else damaged(originals[name], rng)
        if json_file and "sha256" not in content.decode(errors="replace") \
                and "recipe" not in name:
            content = content + b"}"  # a header without its checksum is one of 0.1
        (cache / name).write_bytes(content)
        return sum(map(len, originals.values()))

    def use():
        assert read() == wanted

    accepted, refused = fuzz(10, make, use, 400,
                             again=(152, 165, 514, 4328, 4507, 5897))
    assert not refused


@pytest.fixture
def saved(tmp_path):
    state = {"w": jnp.arange(24, dtype=jnp.float32).reshape(4, 6), "count": jnp.int32(3)}
    folder = tmp_path / "qat"
    with Checkpoints(folder) as kept:
        kept.save(1, state)
        kept.save(2, {**state, "count": jnp.int32(4)})
    return folder, state


def test_checkpoints(saved, tmp_path, fuzz):
    """A checkpoint is restored to the bit, or the one before it is."""
    folder, state = saved
    kept = tmp_path / "kept"
    shutil.copytree(folder, kept)
    files = sorted(f.relative_to(folder) for f in (folder / "2").rglob("*") if f.is_file())
    target = abstract(state)

    def make(rng):
        for place in tmp_path.glob("qat*"):
            shutil.rmtree(place)
        shutil.copytree(kept, folder)
        name = files[int(rng.integers(len(files)))]
        whole = (folder / name).read_bytes()
        try:
            content = harmed(whole, rng)
        except ValueError:
            content = damaged(whole, rng)
        if rng.random() < 0.1:
            (folder / name).unlink()
        elif rng.random() < 0.05:
            (folder / name).unlink()
            (folder / name).symlink_to("/dev/zero" if rng.random() < 0.5 else "nowhere")
        else:
            (folder / name).write_bytes(content)
        return 10_000

    def use():
        with Checkpoints(folder) as checkpoints:
            step, found = checkpoints.restore_last(target)
        assert step in (1, 2) and int(found["count"]) == step + 2
        assert np.asarray(found["w"]).tobytes() == np.asarray(state["w"]).tobytes()

    fuzz(11, make, use, 2000, again=(312, 814, 1116, 1252, 1544, 1689, 2478, 2692))
