"""Sweeps over the blocks of one model, states on disk, against the whole model at once."""

import jax
import numpy as np
import pytest

from rabit_jax import LLAMA_LINEARS, calibrate
from rabit_jax.experiments.engine.pieces import Pieces
from rabit_jax.experiments.engine.sweeps import FromParams, Sweep
from rabit_jax.models.config import ModelConfig
from rabit_jax.models.decoder import Decoder, init_params
from rabit_jax.train.losses import next_token_loss

LAYERS = 3
RULES = [(LLAMA_LINEARS, "measure")]
GEMMA = ModelConfig(
    vocab_size=61, d_model=32, n_layers=LAYERS, n_heads=4, n_kv_heads=2, head_dim=12, d_hidden=40,
    tied_head=True, window=4, local_layers=(True, False, True), local_rope_theta=100.0,
    qk_norm=True, post_norms=True, embed_scale=5.0, activation="gelu_tanh", final_softcap=20.0,
)


@pytest.mark.more
def test_ragged_batches_and_local_layers(tmp_path):
    params = jax.jit(init_params, static_argnums=0)(GEMMA, jax.random.key(1))
    rng = np.random.default_rng(0)
    mask = np.arange(16) < np.array([16, 9, 4, 12, 7, 16])[:, None]
    mask[3, :5] = False
    tokens = rng.integers(0, 61, mask.shape).astype(np.int32)
    halves = [{"tokens": tokens[rows], "mask": mask[rows]} for rows in np.split(np.arange(6), 2)]
    model = Decoder(GEMMA)
    wanted = calibrate(
        lambda p, b: next_token_loss(model, p, b, 5)[0], params, halves, RULES, clip=90.0
    )
    pieces = Pieces(tmp_path / "pieces")
    pieces.claim("key", False)
    sweep = Sweep(GEMMA, FromParams(params), pieces, tokens, mask, 3)
    sweep.embed()
    blocks = [sweep.source.block(n) for n in range(LAYERS)]
    for n, block in enumerate(blocks):
        sweep.forward(n, block)
    sweep.head_gradient(5, "data", jax.random.key(0))
    for n in reversed(range(LAYERS)):
        found = sweep.backward(n, blocks[n], tuple(wanted), 90.0)
        inputs = sweep.inputs(n, blocks[n], tuple(wanted), 90.0)
        for path, stats in wanted.items():
            np.testing.assert_allclose(found[path].s_in, stats.s_in[n], rtol=1e-5)
            np.testing.assert_allclose(found[path].s_out, stats.s_out[n], rtol=1e-5)
            np.testing.assert_allclose(inputs[path].s_in, stats.s_in[n], rtol=1e-5)
            np.testing.assert_array_equal(inputs[path].s_out, 1)


