"""The programs of a run as shapes: its training steps, the calibration pass, one decode step.

Nothing is loaded: parameters are shapes, and the losses and steps are those that the stages run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from rabit_jax import convert, pack
from rabit_jax.calibration.probes import insert_probes, zero_sums
from rabit_jax.experiments.engine.config import shipped_model
from rabit_jax.experiments.engine.fitting import distillation
from rabit_jax.experiments.engine.inputs import abstract_params
from rabit_jax.experiments.engine.qat import calibration_loss, student_loss, teacher_loss
from rabit_jax.experiments.engine.settings import RunConfig, Training
from rabit_jax.formats.checkpoint import read_config
from rabit_jax.models.config import ModelConfig
from rabit_jax.models.decoder import Decoder
from rabit_jax.models.engine import init_cache
from rabit_jax.models.engine import step as decode_step
from rabit_jax.models.prepared import prepare
from rabit_jax.train.checkpoints import abstract
from rabit_jax.train.sharding import batch_sharding, param_shardings, replicated
from rabit_jax.train.step import Loss, next_tokens, real_tokens
from rabit_jax.train.trainer import make_program
from rabit_jax.tree import match_rules
from rabit_jax.types import Array, Batch, Params
from rabit_jax.weights.fixed import fixed
from rabit_jax.weights.table import is_table


@dataclass(frozen=True)
class Program:
    """A function of a run, to be compiled for shapes.

    Attributes:
      name: of the stage that runs it, or "decode".
      section: of the config, whose options change its memory; "" where there are none.
      function: jitted.
      arguments: shapes with shardings.
      parts: the same arguments by what they are: parameters, optimizer, teacher, ...
      tokens: of one call, on all devices together.
      compiled: whether it is compiled; where not, its arguments are counted and nothing else.
    """

    name: str
    section: str
    function: Any
    arguments: tuple
    parts: dict[str, PyTree]
    tokens: int
    compiled: bool = True


def model_config(config: RunConfig) -> ModelConfig:
    """The decoder of a run. The vocabulary of one that is trained here is the largest that its
    tokeniser may have, since no text is read."""
    if config.teacher.path:
        found = read_config(shipped_model(config.teacher.path))
    else:
        found = ModelConfig(
            vocab_size=config.data.vocab_size, **dataclasses.asdict(config.model))
    return config.compute.applied(found)


def find_programs(config: RunConfig, mesh: Mesh) -> Iterator[Program]:
    """The programs of a run on a mesh, in the order of its stages."""
    decoder = model_config(config)
    model, params = Decoder(decoder), abstract_params(decoder)
    placed = abstract(params, param_shardings(params, mesh))
    if config.task == "ptq":
        if config.end_to_end.steps:
            yield _end_to_end(config, model, placed, mesh)
    else:
        if not config.teacher.path:
            yield training("teacher", config.teacher, teacher_loss(config, model), placed, None,
                           mesh, count=next_tokens)
        yield _calibration(config, model, placed, mesh)
        student = jax.eval_shape(lambda p: convert(p, config.init.rules()), params)
        top = config.qat.teacher_top
        held = None if top else _held(config, params, mesh)
        yield training("qat", config.qat, student_loss(config, model), student, held, mesh,
                       project=config.qat.project_scales, top=top)
    yield decoding(config, decoder, params, mesh)


def training(
    name: str, section: Training, loss: Loss, params: Params, teacher: Params | None, mesh: Mesh,
    project: bool = True, count: Callable[[Batch], Array] = real_tokens, top: int = 0,
) -> Program:
    """The step of a training stage; `top` of the teacher's tokens are in its batches."""
    program = make_program(
        loss, params, section.optimizer, section.steps, mesh=mesh, accumulate=section.accumulate,
        project=project, count=count, health=section.health)
    batch = {"tokens": _tokens(section.batch_size, section.length, mesh)}
    if top:
        size, where = (section.batch_size, section.length), batch_sharding(mesh)
        batch |= {
            "ids": jax.ShapeDtypeStruct((*size, top), jnp.int32, sharding=where),
            "log_p": jax.ShapeDtypeStruct((*size, top), jnp.float32, sharding=where),
            "log_rest": jax.ShapeDtypeStruct(size, jnp.float32, sharding=where),
        }
    state = program.state
    parts = {"trained": state.trainable, "frozen": program.frozen, "teacher": teacher,
             "optimizer": (state.opt_state, state.step), "batch": batch}
    return Program(name, name, program.step, (state, program.frozen, teacher, batch), parts,
                   section.batch_size * section.length)


def _tokens(rows: int, length: int, mesh: Mesh) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=batch_sharding(mesh))


def _calibration(config: RunConfig, model: Decoder, params: Params, mesh: Mesh) -> Program:
    """One gradient pass of the calibration, as `calibrate` compiles it."""
    section, loss = config.calibrate, calibration_loss(config, model)
    selected = [p for p in match_rules(params, config.init.block_rules()) if not is_table(p)]

    def sums(params: Params, batch: Batch) -> PyTree:
        zeros = zero_sums(params, selected)
        return jax.grad(
            lambda z: loss(insert_probes(params, z, batch["mask"], section.clip), batch))(zeros)

    rows, where = section.batch_size, batch_sharding(mesh)
    batch = {
        "tokens": _tokens(rows, section.length, mesh),
        "mask": jax.ShapeDtypeStruct((rows, section.length), jnp.bool_, sharding=where),
        "row": jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=where),
    }
    return Program("calibrate", "calibrate", jax.jit(sums, out_shardings=replicated(mesh)),
                   (params, batch), {"teacher": params, "batch": batch}, rows * section.length)


def _end_to_end(config: RunConfig, model: Decoder, params: Params, mesh: Mesh) -> Program:
    """The step of the stage end_to_end, where the latents are packed and constant."""
    section = config.end_to_end
    loss = distillation(model, section, config.compute.chunk)

    def start(params: Params) -> Params:
        student = convert(params, config.init.rules())
        return student if section.trains_latents else fixed(pack(student))

    student = jax.eval_shape(start, params)
    return training("end_to_end", section, loss, student, _held(config, params, mesh), mesh)


def _held(config: RunConfig, params: Params, mesh: Mesh) -> Params:
    """The teacher as a step holds it, as shapes on the mesh."""
    shapes = jax.eval_shape(config.compute.held, params)
    return abstract(shapes, param_shardings(shapes, mesh))


def decoding(config: RunConfig, decoder: ModelConfig, params: Params, mesh: Mesh) -> Program:
    """One step of the decode engine on the packed model: one sequence, one device.

    For a CPU it is compiled. The products of packed signs on a GPU are kernels of Triton's, which
    need the device to be chosen; there weights and cache are counted, which is nearly all there is.
    """
    one = jax.sharding.SingleDeviceSharding(mesh.devices.flat[0])
    slots = config.evaluate.context
    engine = jax.eval_shape(
        lambda p: prepare(decoder, pack(convert(p, config.init.rules()))), params)
    cache = jax.eval_shape(lambda: init_cache(engine.config, 1, slots))
    engine, cache = (
        jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=one), tree)
        for tree in (engine, cache))
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    if not on_cpu:
        cache = {name: jax.ShapeDtypeStruct(
            a.shape, decoder.dtype if name in ("k", "v") else a.dtype, sharding=one)
            for name, a in cache.items()}
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32, sharding=one)
    parts = {"packed": engine, "cache": cache, "batch": tokens}
    return Program("decode", "", jax.jit(decode_step, donate_argnums=2), (engine, tokens, cache),
                   parts, 1, on_cpu)


def device_bytes(tree: PyTree) -> int:
    """Bytes of a tree of shapes on the device that holds most of it."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree))
