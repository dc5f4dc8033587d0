"""A tiny decoder that the tests of this room share."""

import jax
import pytest

from rabit_jax.models import Decoder, ModelConfig, init_params

TINY = ModelConfig(
    vocab_size=61, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=12, d_hidden=40,
    initializer_range=0.3, bos_id=1, eos_ids=(2,), max_position=48,
)


@pytest.fixture
def config():
    return TINY


@pytest.fixture(scope="session")
def model():
    return Decoder(TINY)


@pytest.fixture(scope="session")
def params():
    return jax.jit(init_params, static_argnums=0)(TINY, jax.random.key(0))


@pytest.fixture(scope="session")
def apply():
    """`apply(model, params, tokens, mask, hidden_states)`, compiled once for each of its kinds."""
    def run(model, params, tokens, mask=None, hidden_states=False):
        return model.apply({"params": params}, tokens, mask, hidden_states)

    return jax.jit(run, static_argnums=(0, 4))


@pytest.fixture(scope="session")
def tokens():
    return jax.random.randint(jax.random.key(1), (2, 9), 0, TINY.vocab_size)
