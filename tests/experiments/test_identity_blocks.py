"""Blocks whose output projections are zero, as in pruned or padded models, through both tasks."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from rabit_jax import LLAMA_LINEARS, ResidualSignSpec, calibrate, load_hf, save_hf
from rabit_jax.data.sources import DataConfig, documents
from rabit_jax.data.tokens import batch, tokenise
from rabit_jax.experiments import run as command
from rabit_jax.formats.packed_model import load_packed
from rabit_jax.train.losses import next_token_loss

PRUNED = {"attn/o": 1, "mlp/down": 2}  # projection -> layer


@pytest.fixture(scope="module")
def pruned(place, ptq_model):
    """`ptq_model` without the attention of one block and the MLP of another; its text's tokens."""
    model, params, tokenizer = load_hf(ptq_model)
    for name, layer in PRUNED.items():
        group, projection = name.split("/")
        kernel = params["layers"][group][projection]["kernel"]
        params["layers"][group][projection]["kernel"] = kernel.at[layer].set(0)
    save_hf(place / "pruned", model, params, tokenizer)
    data = DataConfig(source="files", files=(str(place / "train.txt"),),
                      eval_files=(str(place / "eval.txt"),))
    return place / "pruned", tokenise(documents(data)[0], tokenizer, place / "cache")


def run(place, name, pruned, **sections):
    config = {
        "name": name, "output": str(place / "runs"), "seed": 5,
        "data": {"source": "files", "files": [str(place / "train.txt")],
                 "eval_files": [str(place / "eval.txt")], "cache": str(place / "cache")},
        "teacher": {"path": str(pruned)},
        # 10 sequences in batches of 4: the last batch has 2.
        "calibrate": {"sequences": 10, "batch_size": 4, "length": 24},
        "init": {"spec": {"rounds": 2}}, "evaluate": {"context": 32, "windows": 6, "batch_size": 4},
    } | sections
    file = place / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    assert command.main(["--config", str(file)]) == 0
    folder = place / "runs" / name
    summary = json.loads((folder / "summary.json").read_text(), parse_constant=pytest.fail)
    assert math.isfinite(summary["packed"]["ppl"])
    _, params, _ = load_packed(folder / "packed")
    for path, layer in PRUNED.items():
        group, projection = path.split("/")
        dense = np.asarray(params["layers"][group][projection]["kernel"].dense())
        assert not dense[layer].any() and dense[0].any()
    return folder, summary


def test_post_training_packs_them_as_zeros_and_measures_every_sequence(place, pruned):
    folder, _ = run(place, "pruned-ptq", pruned[0], task="ptq")
    model, params, _ = load_hf(pruned[0])
    # The same 10 sequences in whole batches, by the calibration of a model in memory.
    rows = (batch(pruned[1].tokens, step, 5, 24, 5 + 1) for step in range(2))
    batches = [{"tokens": jnp.asarray(r), "mask": jnp.ones(r.shape, bool)} for r in rows]
    rules = [(LLAMA_LINEARS, ResidualSignSpec())]
    wanted = calibrate(lambda p, b: next_token_loss(model, p, b)[0], params, batches, rules)
    found = load_file(folder / "calibration.safetensors")
    for path, stats in wanted.items():
        for part in ("s_in", "s_out"):
            want = np.asarray(getattr(stats, part))
            np.testing.assert_allclose(found[f"{path}.{part}"], want, rtol=1e-4, atol=1e-7)
    assert not wanted["layers/attn/q/kernel"].s_out[1].any()


@pytest.mark.more
def test_training_keeps_them_zero_and_measures_every_window(place, pruned):
    # 12 sequences and 12 windows in batches of 8, on the 8 devices of the tests.
    _, summary = run(
        place, "pruned-qat", pruned[0], generate={"prompts": []},
        calibrate={"sequences": 12, "batch_size": 8, "length": 24},
        qat={"batch_size": 8, "length": 24, "steps": 3, "watch_every": 2},
        evaluate={"context": 32, "windows": 12, "batch_size": 8, "diagnostic_windows": 12,
                  "watch_windows": 12},
    )
    errors = summary["relative_error"]["qat"]
    assert errors["layers/attn/o/kernel"][1] == errors["layers/mlp/down/kernel"][2] == 0
    assert summary["tokens"]["calibrate"] == 12 * 24
