"""A tiny decoder, its students, and batches that the tests of this room share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax.models.config import ModelConfig
from rabit_jax.models.decoder import Decoder, init_params
from rabit_jax.weights.residual_sign import ResidualSign

TINY = ModelConfig(
    vocab_size=53, d_model=16, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=4, d_hidden=24,
    initializer_range=0.3, remat=True,
)


@pytest.fixture(scope="session")
def model():
    return Decoder(TINY)


@pytest.fixture(scope="session")
def teacher():
    return jax.jit(init_params, static_argnums=0)(TINY, jax.random.key(0))


@pytest.fixture(scope="session")
def make_student():
    """`make(teacher, k)` -> its params with every linear a ResidualSign, norms moved a little."""

    def node(kernel, k, rng):
        *lead, i, o = kernel.shape
        latent = kernel + 0.03 * rng.normal(size=kernel.shape)
        size = 0.25 * 0.5 ** np.arange(k)[:, None]
        g = size * np.exp(0.1 * rng.normal(size=(*lead, k, o)))
        h = np.exp(0.1 * rng.normal(size=(*lead, k, i)))
        return ResidualSign(*(jnp.asarray(a, jnp.float32) for a in (latent, g, h)))

    def make(teacher, k):
        rng = np.random.default_rng(k)
        student = jax.tree.map(lambda a: a, teacher)
        for block in ("attn", "mlp"):
            for part in student["layers"][block].values():
                part["kernel"] = node(np.asarray(part["kernel"]), k, rng)
        student["layers"]["attn_norm"]["scale"] = 1.3 * teacher["layers"]["attn_norm"]["scale"]
        return student

    return make


@pytest.fixture(scope="session")
def batches():
    """Two batches with padding of different lengths on the right."""
    rng = np.random.default_rng(5)
    lengths = np.array([[9, 4, 7, 1], [2, 9, 9, 5]])
    return [
        {"tokens": rng.integers(0, 53, (4, 9)), "mask": np.arange(9)[None] < n[:, None]}
        for n in lengths
    ]
