"""The shipped quickstart: cheap checks of its config, and the whole of it as a slow test."""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from rabit_jax import dense
from rabit_jax.experiments import run as command
from rabit_jax.experiments.engine.config import load_config
from rabit_jax.experiments.engine.settings import RunConfig
from rabit_jax.formats.packed_model import load_packed
from rabit_jax.models.engine import init_cache, step
from rabit_jax.models.prepared import prepare

FILE = Path(__file__).parents[2] / "experiments" / "configs" / "quickstart.yaml"


def test_its_widths_pack_without_padding():
    shape = load_config(RunConfig, FILE).model
    assert shape.d_model % 256 == shape.d_hidden % 256 == shape.n_heads * shape.head_dim % 256 == 0


def test_dry_run_needs_no_text_beyond_the_tokeniser(tmp_path, capsys):
    overrides = [f"output={tmp_path}/runs", f"data.cache={tmp_path}/cache"]
    assert command.main(["--config", str(FILE), *overrides, "--dry-run"]) == 0
    assert "layers/mlp/down/kernel" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_it_reaches_what_it_promises(tmp_path):
    overrides = [f"output={tmp_path}/runs", f"data.cache={tmp_path}/cache"]
    # Eight simulated devices in this suite: the batch divides over them.
    assert command.main(["--config", str(FILE), *overrides]) == 0
    found = json.loads((tmp_path / "runs" / "quickstart" / "summary.json").read_text())
    assert found["parameters"]["non_embedding"] >= 1.5e6
    assert math.log(found["teacher"]["ppl"]) <= found["unigram_nats"] - 1.5
    assert found["gap_closed"] >= 0.6
    assert found["qat"]["ppl"] <= 1.1 * found["teacher"]["ppl"]
    assert found["init"]["ppl"] < found["greedy"]["ppl"] < found["round_to_nearest"]["ppl"]
    assert found["packed"]["ppl"] == pytest.approx(found["qat"]["ppl"], rel=5e-3)
    assert found["packed"]["bits_identical"]
    packed_decoding_is_that_of_float32(tmp_path / "runs" / "quickstart" / "packed")


def packed_decoding_is_that_of_float32(folder, steps=64):
    """Greedy text from packed bits beside that from the float32 matrix of the same bits.

    Logits differ by at most 1e-3 of their standard deviation; texts are the same or part where the
    two likeliest tokens lie closer than twice that.
    """
    model, params, tokenizer = load_packed(folder)
    prompt = np.asarray([tokenizer("The function returns")["input_ids"]], np.int32)
    engines = [prepare(model.config, tree) for tree in (params, dense(params))]
    run = jax.jit(step)
    caches = [init_cache(e.config, 1, prompt.shape[1] + steps) for e in engines]
    tokens, largest = prompt, 0.0
    for n in range(steps):
        (found, caches[0]), (wanted, caches[1]) = (
            run(e, tokens, cache) for e, cache in zip(engines, caches, strict=True))
        found, wanted = np.asarray(found)[0], np.asarray(wanted)[0]
        error = float(np.abs(found - wanted).max())
        largest = max(largest, error / wanted.std())
        first, second = np.sort(wanted)[:-3:-1]
        if found.argmax() != wanted.argmax():
            print(f"texts part at token {n}: {first - second:.2e} apart, error {error:.2e}")
            assert first - second < 2 * error
        tokens = np.asarray([[wanted.argmax()]], np.int32)
    print(f"largest difference of logits over their standard deviation: {largest:.2e}")
    assert largest <= 1e-3
