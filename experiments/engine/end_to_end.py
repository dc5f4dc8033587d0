"""The stages of task ptq behind tuning: distillation of the whole student, then packing.

By default the student is the packed model with its scales, levels and norms in float32. Its signs
and codes are constant, so there are no latents and the optimiser's state is small. Where latents
are not frozen, those that tuning has kept train too, which is quantisation-aware training of all.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from rabit_jax import hosts, pack
from rabit_jax.experiments.engine.fitting import distillation, fit, keep, kept
from rabit_jax.experiments.engine.inputs import abstract_params
from rabit_jax.experiments.engine.job import Job, block_name, trained
from rabit_jax.experiments.engine.packing import (
    sizes,
    stacked_blocks,
    stacked_stats,
    write_packed,
)
from rabit_jax.experiments.engine.records import Record
from rabit_jax.experiments.engine.stages import Ids, Read, Stage
from rabit_jax.experiments.engine.sweeps import FromBlocks
from rabit_jax.experiments.engine.tuning import trained_name
from rabit_jax.formats.packed_file import part_names
from rabit_jax.models.decoder import Decoder
from rabit_jax.train.checkpoints import abstract
from rabit_jax.train.optimizer import merge, partition, roles
from rabit_jax.train.sharding import one_device_mesh, param_shardings
from rabit_jax.train.trainer import make_trainer
from rabit_jax.tree import leaves, map_leaves, tree_bytes, weights_of
from rabit_jax.types import Params, Weight
from rabit_jax.weights.fixed import fixed
from rabit_jax.weights.mixed_stack import stacked

NAME = "end_to_end"


def end_to_end(job: Job, continues: bool) -> Record:
    """Distil the teacher into what the section does not freeze."""
    section, compute = job.config.end_to_end, job.config.compute
    trainer = make_trainer(
        distillation(Decoder(compute.applied(job.model_config)), section, compute.chunk),
        _student(job),
        section.optimizer,
        section.steps,
        teacher=compute.held(_teacher(job)),
        mesh=job.mesh or one_device_mesh(),
        accumulate=section.accumulate,
        health=section.health,
    )
    state_bytes = tree_bytes(trainer.state)
    state = fit(job, NAME, section, trainer, continues)
    keep(job.folder, "scales", state.trainable)
    tokens = section.steps * section.batch_size * section.length
    return {"tokens": tokens, "state_bytes": state_bytes}


def _teacher(job: Job) -> Params:
    """The full-precision model, on a mesh parameter by parameter."""
    if job.mesh is None:
        flat = {path: jnp.asarray(job.checkpoint.read(path)) for path in job.checkpoint.shapes}
        return unflatten_dict(flat, sep="/")
    where = dict(leaves(param_shardings(abstract_params(job.model_config), job.mesh)))
    flat = {path: hosts.on_mesh(job.checkpoint.read(path), where[path])
            for path in job.checkpoint.shapes}
    return unflatten_dict(flat, sep="/")


def _student(job: Job) -> Params:
    """The blocks as tuned, or as initialised where no tuning was asked for."""
    pieces = job.tuned if job.config.tune.epochs else job.blocks
    params, _ = stacked_blocks(job, FromBlocks(job.checkpoint, pieces, block_name))
    params = fixed(jax.tree.map(jnp.asarray, params))
    if not job.config.end_to_end.trains_latents:
        return params
    layers = range(job.model_config.n_layers)
    arrays = [job.tuned.read_arrays(trained_name(n))[0] for n in layers]

    def latents(path: str, node: Weight) -> Weight:
        found = [jax.tree.map(lambda part, one=one: one.pop(f"{path}:{part}")[0],
                              part_names(node)) for one in arrays]
        return jax.tree.map(jnp.asarray, stacked(found))

    shapes = weights_of(job.abstract_student())
    return map_leaves(
        lambda path, leaf: latents(path, shapes[path]) if path in job.specs else leaf, params
    )


def packing(job: Job, continues: bool) -> Record:
    """Write the packed model with what training has left."""
    with job.step("pack", job.model_config.n_layers, 0):
        student, section = _student(job), job.config.end_to_end
        if section.steps:
            student = _trained(job, student)
        stats = stacked_stats(job) if job.calibration else None
        hosts.first_does(lambda: write_packed(job, pack(student), stats))
    return sizes(job)


def _trained(job: Job, student: Params) -> Params:
    """The student with what training has left, whole in every process."""
    names, freeze = roles(student), job.config.end_to_end.optimizer.freeze
    trainable, frozen = partition(student, names, freeze)
    target = abstract(trainable)
    if job.mesh is not None and hosts.several():
        where, _ = partition(param_shardings(student, job.mesh), names, freeze)
        target = abstract(trainable, where)
    return merge(hosts.whole(kept(job.folder, "scales", target, NAME)), frozen)


def _inputs(job: Job, ids: Ids) -> Read:
    c = job.config
    last = "tune" if "tune" in ids else "quantise"
    return Read(NAME, {NAME: c.end_to_end, "compute": c.compute, "seed": c.seed,
                       "the training text": job.text.train.digest,
                       f"the result of stage {last}": ids[last]})


def _pack_inputs(job: Job, ids: Ids) -> Read:
    last = next(name for name in (NAME, "tune", "quantise") if name in ids)
    return Read("pack", {f"the result of stage {last}": ids[last]})


STAGE = Stage(NAME, end_to_end, _inputs, ("checkpoints/scales",),
              wanted=lambda config: bool(config.end_to_end.steps))
PACK = Stage("pack", packing, _pack_inputs, ("packed",), metrics=("pack",), wanted=trained)
