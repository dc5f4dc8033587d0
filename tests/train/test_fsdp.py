"""What the compiled programs of a mesh with the axis fsdp hold and send, and Muon on it."""

import re
from math import prod

import jax
import numpy as np
import pytest

from rabit_jax import LLAMA_LINEARS, ResidualSignSpec, calibrate, convert
from rabit_jax.models.config import ModelConfig
from rabit_jax.models.decoder import Decoder, init_params
from rabit_jax.train.losses import distillation_loss, next_token_loss
from rabit_jax.train.optimizer import OptimizerConfig
from rabit_jax.train.sharding import batch_sharding, param_shardings
from rabit_jax.train.trainer import make_trainer

# Wide enough that norms and scales are a small part of the bytes; a number of layers that 8 and 4
# devices do not divide, and a size that no other axis has.
LAYERS = 3
WIDE = ModelConfig(vocab_size=256, d_model=128, n_layers=LAYERS, n_heads=8, n_kv_heads=8,
                   head_dim=16, d_hidden=512, tied_head=False)
GATHER = re.compile(r"= (.*?) (?:all-gather|all-gather-start)\(")


@pytest.fixture(scope="module")
def parts():
    model = Decoder(WIDE)
    teacher = init_params(WIDE, jax.random.key(0))
    return model, teacher, convert(teacher, [(LLAMA_LINEARS, ResidualSignSpec(k=2, rounds=1))])


def trainer_on(parts, mesh, **optimizer):
    model, teacher, student = parts
    return make_trainer(
        lambda p, t, b: distillation_loss(model, p, t, b, gamma=0.5, chunk=4), student,
        OptimizerConfig(lr=1e-3, clip=0.0, **optimizer), 10, teacher=teacher, mesh=mesh)


def compiled_step(trainer, rows=8):
    batch = trainer.place({"tokens": np.zeros((rows, 8), np.int32)})
    return trainer.step.lower(trainer.state, trainer.frozen, trainer.teacher, batch).compile()


def gathered_shapes(text):
    """Shapes of the results of every all-gather of a compiled program."""
    found = []
    for result in GATHER.findall(text):
        found += [tuple(map(int, dims.split(","))) for dims in re.findall(r"\[([\d,]+)\]", result)]
    return found


@pytest.mark.parametrize("name", ["adamw", pytest.param("muon", marks=pytest.mark.more)])
def test_no_stacked_parameter_is_gathered(parts, meshes, name):
    shapes = gathered_shapes(compiled_step(trainer_on(parts, meshes(2, 2, 2), name=name)).as_text())
    assert shapes, "the kernels of a layer are gathered"
    assert not [s for s in shapes if len(s) > 2 and s[0] >= LAYERS]
    # The largest is one kernel of one layer, or the head.
    assert max(map(prod, shapes)) <= max(128 * 512, 128 * 256)


def state_bytes(trainer):
    """Bytes of params and optimiser state on the first device, by the compiled program."""
    return compiled_step(trainer).memory_analysis().argument_size_in_bytes


@pytest.mark.more
@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 8, 1), (2, 2, 2), (1, 2, 4)])
def test_bytes_of_a_device_fall_with_fsdp_and_tensor(parts, meshes, shape):
    one = state_bytes(trainer_on(parts, meshes(1, 1), name="adamw"))
    data, tensor, fsdp = shape
    found = state_bytes(trainer_on(parts, meshes(*shape), name="adamw"))
    # Norms and the scales of one side are not split: 2% of the bytes here.
    assert found - one / (fsdp * tensor) < 0.03 * one


@pytest.mark.parametrize(
    "shape", [pytest.param((1, 1, 8), marks=pytest.mark.more), (2, 2, 2)])
def test_a_step_of_muon_is_that_of_one_device(parts, meshes, shape):
    """Its matrices are exchanged between devices, 3 layers over 8 and over 4 of them."""
    tokens = np.random.default_rng(0).integers(0, 256, (8, 8)).astype(np.int32)
    found = []
    for mesh in (meshes(1, 1), meshes(*shape)):
        trainer = trainer_on(parts, mesh, name="muon", warmup=0.0)
        before = jax.tree.map(np.asarray, trainer.state.trainable)
        state, _ = trainer.step(
            trainer.state, trainer.frozen, trainer.teacher, trainer.place({"tokens": tokens}))
        found.append(jax.tree.map(lambda a, b: np.asarray(a) - b, state.trainable, before))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        assert np.abs(a).max() > 0
        # Newton-Schulz in float32 multiplies rounding; an update is of the size of 1e-3.
        np.testing.assert_allclose(b, a, rtol=0, atol=2e-2 * np.abs(a).max())


def reductions(text):
    """`{shape: number of arrays}` that the all-reduces of a compiled program sum."""
    count = {}
    for result in re.findall(r"= (.*?) (?:all-reduce|all-reduce-start)\(", text):
        for dims in re.findall(r"\[([\d,]*)\]", result):
            count[dims] = count.get(dims, 0) + 1
    return count


def test_calibration_adds_one_all_reduce_for_each_statistic(parts, meshes, monkeypatch):
    """Over data alone, where nothing else of the shape of a statistic is summed."""
    model, teacher, _ = parts
    mesh = meshes(8, 1)
    where, rows = param_shardings(teacher, mesh), batch_sharding(mesh)
    texts = []
    real = jax.jit

    def kept(function, **options):
        compiled = real(function, **options)

        def call(*arguments):
            texts.append(compiled.lower(*arguments).compile().as_text())
            return compiled(*arguments)

        return call

    batch = jax.device_put({"tokens": np.ones((8, 8), np.int32), "mask": np.ones((8, 8), bool)},
                           rows)
    monkeypatch.setattr(jax, "jit", kept)
    calibrate(lambda p, b: next_token_loss(model, p, b)[0], jax.device_put(teacher, where),
              [batch], [(LLAMA_LINEARS, ResidualSignSpec())], shardings=where,
              batch_sharding=rows)
    monkeypatch.undo()
    found = reductions(next(text for text in texts if "all-reduce" in text))
    own = {"128": 0, "512": 0}
    for dims, number in found.items():
        last = dims.split(",")[-1]
        if dims and last in own and prod(map(int, dims.split(","))) <= LAYERS * int(last):
            own[last] += number
    # Two for each of q, k, v, o; gate and up read 128 channels and write 512, down the reverse.
    assert own == {"128": 8 + 2 + 1, "512": 2 + 1}
