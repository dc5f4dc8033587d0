"""The benchmark of decoding on a tiny model: its rows, and that its parts do the work."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax import BadInput
from rabit_jax.experiments.bench import __main__ as bench
from rabit_jax.experiments.bench import decode as bench_decode
from rabit_jax.experiments.bench import shapes as bench_shapes
from rabit_jax.kernels import matmul
from rabit_jax.kernels.cpu.library import library
from rabit_jax.kernels.layout import stored_bytes
from rabit_jax.models.engine import init_cache, step

DECODE = ("decode --model tiny --layers 1 --context 6 --batch 2 --tokens 4 --repeats 2 "
          "--json").split()
TINY = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_hidden": 64,
        "vocab_size": 48, "max_position": 16}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A tiny model."""
    monkeypatch.setitem(bench_shapes.MODELS, "tiny", TINY)


@pytest.fixture
def plain(monkeypatch):
    """The reference product everywhere: it compiles in a fraction of the time."""
    monkeypatch.setattr(matmul, "choose", lambda *a, **k: "reference")


def test_rows_of_decoding_by_contract(plain, capsys):
    bench.run(DECODE)
    rows = json.loads(capsys.readouterr().out)["rows"]
    contract = {"model", "impl", "batch", "context", "tokens_per_second", "ratio_to_bf16",
                "ratio_to_f32"}
    impls = ["dense_bf16", "dense_f32", "packed_k2", "packed_k2_head8",
             "packed_k2_head8_act8"]
    assert [(row["impl"], row["part"]) for row in rows] == [
        (impl, part) for impl in impls for part in bench_decode.PARTS]
    for n, row in enumerate(rows):
        assert contract <= set(row) and row["model"] == "tiny" and row["layers"] == 1
        assert row["batch"] == 2 and row["context"] == 6
        dense = rows[n % 4 + 4]["milliseconds"]
        assert row["ratio_to_f32"] == pytest.approx(dense / row["milliseconds"])
        speed = row["batch"] / row["milliseconds"] * 1e3 if row["part"] == "step" else None
        assert row["tokens_per_second"] == (speed and pytest.approx(speed))
    # A row of bits is one block; scales are 2 bytes, h once per joined matrix.
    shapes = bench_shapes.linears(bench_shapes.model_config("tiny"), "tiny")
    size = sum(2 * (s.outputs * (stored_bytes(s.inputs) if library() else 32)
                    + 2 * (s.outputs + s.inputs * len(s.rows))) for s in shapes)
    dense = 2 * sum(s.inputs * s.outputs for s in shapes)
    (packed,) = {r["bytes"] for r in rows
                 if r["impl"].startswith("packed_k2") and r["part"] == "block linears"}
    assert packed == size
    assert {r["bytes_over_bf16"] for r in rows
            if r["impl"] == "packed_k2" and r["part"] == "block linears"} == {size / dense}


def test_the_timed_loop_is_the_engine_step_by_step(plain):
    engine = bench_decode.random_engine(bench_shapes.model_config("tiny"), 2)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(engine))
    token, cache = jnp.zeros(2, jnp.int32), init_cache(engine.config, 2, 5)
    last, after = bench_decode.decode_tokens(engine, token, init_cache(engine.config, 2, 5), 5)
    one = jax.jit(step)
    for _ in range(5):
        logits, cache = one(engine, token[:, None], cache)
        token = jnp.argmax(logits, axis=-1)
    np.testing.assert_array_equal(last, token)
    np.testing.assert_allclose(after["k"], cache["k"], rtol=1e-4, atol=1e-5)
    assert int(after["length"]) == 5


@pytest.mark.parametrize("k", [None, 1])
def test_parts_of_a_step_do_all_of_its_work(k, plain):
    engine = bench_decode.random_engine(bench_shapes.model_config("tiny", dtype="bfloat16"), k)
    case = bench_decode.Decoding(engine, batch=2, context=6, tokens=4)
    x = bench_decode.block_linears(engine, case.x)
    assert x.shape == (2, 1, 32) and np.isfinite(np.asarray(x, np.float32)).all()
    y, keys, _ = bench_decode.attention(engine, case.heads, case.k + 0, case.v + 0, jnp.int32(5), 6)
    assert y.shape == (2, 1, 32)
    changed = np.any(np.asarray(keys, np.float32) != np.asarray(case.k, np.float32) * 0,
                     axis=(0, 1, 2, 4))
    assert changed.all() and np.isfinite(np.asarray(y, np.float32)).all()
    assert bench_decode.head(engine, case.x[:, 0]).shape == (2,)


def test_the_batch_at_which_dense_overtakes_is_told():
    def rows(ratios):
        return [{"part": "step", "impl": "packed_k2", "context": 9, "batch": b, "ratio_to_f32": r,
                 "repeats": 3, "tokens": 4} for b, r in ratios.items()]

    assert bench_decode.remarks(rows({1: 2.0, 8: 0.8, 4: 1.1}))[1:] == [
        "context 9: dense_f32 overtakes packed_k2 at batch 8"]
    assert bench_decode.remarks(rows({1: 2.0, 4: 1.1}))[1:] == [
        "context 9: dense_f32 overtakes packed_k2 at no batch up to 4"]


def test_models_that_do_not_fit_are_told(monkeypatch):
    monkeypatch.setattr(bench_decode, "free_memory", lambda: 10**5)
    with pytest.raises(BadInput, match="dense_bf16 0.0 GB.*take fewer layers with --layers"):
        bench.run(DECODE)
