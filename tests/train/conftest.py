"""A tiny teacher, its student, and one device or eight."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from rabit_jax import LLAMA_LINEARS, ResidualSignSpec, convert
from rabit_jax.models.config import ModelConfig
from rabit_jax.models.decoder import Decoder, init_params
from rabit_jax.train.losses import distillation_loss
from rabit_jax.train.optimizer import OptimizerConfig
from rabit_jax.train.sharding import AXES
from rabit_jax.train.trainer import make_trainer

CONFIG = ModelConfig(
    vocab_size=64,
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    d_hidden=64,
    remat=True,
)


def grid(data, tensor, fsdp=1):
    """A mesh of the first data * fsdp * tensor devices."""
    devices = np.asarray(jax.devices()[: data * fsdp * tensor])
    return Mesh(devices.reshape(data, fsdp, tensor), AXES)


def ragged(step, rows=8, length=12):
    """Batch `step`: random tokens with padding on the right of some rows."""
    rng = np.random.default_rng(step)
    lengths = rng.integers(4, length + 1, rows)
    return {
        "tokens": rng.integers(0, 64, (rows, length)).astype(np.int32),
        "mask": np.arange(length)[None] < lengths[:, None],
    }


@pytest.fixture(scope="session")
def model():
    return Decoder(CONFIG)


@pytest.fixture(scope="session")
def teacher():
    return jax.tree.map(
        lambda x: 4 * x if x.ndim > 2 else x, init_params(CONFIG, jax.random.key(0))
    )


@pytest.fixture(scope="session")
def student(teacher):
    return convert(teacher, [(LLAMA_LINEARS, ResidualSignSpec(k=2, rounds=5))])


@pytest.fixture(scope="session")
def loss(model):
    return lambda params, teacher, batch: distillation_loss(
        model, params, teacher, batch, gamma=0.5, chunk=5
    )


@pytest.fixture
def build(loss, student, teacher):
    """Builds a trainer on a mesh."""

    def make(mesh=None, steps=60, **settings):
        config = OptimizerConfig(
            lr=2e-3, freeze=("embedding", "head"), **settings.pop("optimizer", {})
        )
        return make_trainer(
            loss, student, config, steps, teacher=teacher, mesh=mesh or grid(1, 1), **settings
        )

    return make


@pytest.fixture
def batches():
    return ragged


@pytest.fixture
def meshes():
    return grid
