"""GPTQ folders as GPTQModel loads and runs them: its matrices and logits are ours.

`make gptqmodel` installs it into a folder of its own, since it asks for a PyTorch of its own; it
runs with that of the test requirements.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tokenizers import Tokenizer, models

from rabit_jax import GroupUniformSpec, UniformResidualSpec, dense
from rabit_jax.formats.families import hf_name
from rabit_jax.models.decoder import Decoder
from tests.formats.test_gptq import CONFIG, exported, packed_of

INSTALLED = Path(__file__).parents[2] / ".cache" / "gptqmodel"

CASES = {
    "one": (UniformResidualSpec(k=1, group=32, rounds=1), ()),
    "two": (UniformResidualSpec(k=2, group=32, rounds=1), ()),
    "two_in_four": (UniformResidualSpec(k=2, group=32, rounds=1), ("--bits", "4")),
    "three": (UniformResidualSpec(k=3, group=96, rounds=1), ()),
    "codes_2": (GroupUniformSpec(bits=2, group=16), ()),
    "codes_4": (GroupUniformSpec(bits=4, group=32), ()),
    "codes_8": (GroupUniformSpec(bits=8, group=32), ()),
}

LOAD = """
import sys
import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel

tokens = torch.tensor(np.load("tokens.npy"))
for name in sys.argv[1:]:
    model = GPTQModel.load(f"{name}/gptq", backend=BACKEND.GPTQ_TORCH, device="cpu",
                           dtype=torch.float16).model
    with torch.no_grad():
        found = {"logits": model(tokens).logits.float().numpy()}
    for path, module in model.named_modules():
        if type(module).__name__ == "TorchLinear":
            found[path] = module.dequantize_weight().float().numpy()
    np.savez(f"{name}.npz", **found)
"""


@pytest.mark.more
@pytest.mark.skipif(not INSTALLED.is_dir(), reason="`make gptqmodel` installs GPTQModel")
def test_gptqmodel_runs_the_folders(tmp_path, capsys):
    pytest.importorskip("torch", reason="the reference runs on PyTorch")
    vocabulary = {f"w{n}": n for n in range(CONFIG.vocab_size)}
    wanted = {}
    tokens = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (2, 12))
    np.save(tmp_path / "tokens.npy", tokens)
    for name, (spec, more) in CASES.items():
        wanted[name] = packed_of(spec)
        code, said = exported(wanted[name], tmp_path / name, capsys, *more)
        assert code == 0, said.err
        # It refuses a model without a tokenizer.
        Tokenizer(models.WordLevel(vocabulary, unk_token="w0")).save(
            str(tmp_path / name / "gptq" / "tokenizer.json"))
    env = {**os.environ, "PYTHONPATH": str(INSTALLED), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", LOAD, *CASES], cwd=tmp_path, env=env,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for name, params in wanted.items():
        found = np.load(tmp_path / f"{name}.npz")
        values = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), dense(params))
        logits = np.asarray(jax.jit(Decoder(CONFIG).apply)({"params": values}, tokens))
        # It multiplies in float16.
        np.testing.assert_allclose(found["logits"], logits, atol=3e-3 * np.abs(logits).max())
        linears = {path: value for path, value in flatten_dict(values, sep="/").items()
                   if "/attn/" in path or "/mlp/" in path}
        assert len(found.files) == 1 + CONFIG.n_layers * len(linears)
        for path, value in linears.items():
            for layer in range(CONFIG.n_layers):
                own = found[hf_name(path, layer).removesuffix(".weight")]
                # Packed codes have an offset in float16 besides, which the zero point rounds.
                near = (1.5e-3 if name.startswith("codes") else 2**-11) * np.abs(value[layer]).max()
                np.testing.assert_allclose(own, value[layer], rtol=0, atol=near)
