"""The stage of task ptq that tunes every block on its output, first block first.

Two streams of states go through the blocks on disk: those of the full-precision model, whose blocks
say what each output should be, and those of the blocks that are tuned and packed already. One block
is in memory. A run that was stopped goes on at the block that it had reached.
"""

from __future__ import annotations

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np

from rabit_jax import BadInput, hosts
from rabit_jax.calibration.blockwise import block_nodes
from rabit_jax.experiments.engine.job import Job, block_name
from rabit_jax.experiments.engine.records import Record
from rabit_jax.experiments.engine.signals import stopping_between_steps
from rabit_jax.experiments.engine.stages import Ids, Read, Stage
from rabit_jax.experiments.engine.sweeps import FromBlocks, FromCheckpoint, Sweep, tuned_block
from rabit_jax.formats.packed_file import named_parts
from rabit_jax.progress import Progress, progress
from rabit_jax.train.block_tuning import Tuned, tune_block
from rabit_jax.tree import is_weight, leaves, map_leaves
from rabit_jax.types import Params


def trained_name(n: int) -> str:
    """Name of the weights of a tuned block before packing."""
    return f"trained-{n:03}.safetensors"


def tune(job: Job, continues: bool) -> Record:
    """Tune and pack every block that is not there yet."""
    layers = job.model_config.n_layers
    with stopping_between_steps(job, "after this block"):
        _tune_blocks(job)
    records = [job.tuned.read_block(block_name(n))[2] for n in range(layers)]
    section = job.config.tune
    names = ("before", "after", "losses")
    return {
        "tokens": section.sequences * section.length,
        **{name: [record[name] for record in records] for name in names},
    }


def _tune_blocks(job: Job) -> None:
    layers, pieces = job.model_config.n_layers, job.tuned
    teacher = job.sweep(job.config.tune, job.config.seed + 2, pieces, "teacher-")
    source = FromBlocks(job.checkpoint, pieces, block_name)
    student = dataclasses.replace(teacher, source=source, prefix="student-")
    begin = next((n for n in range(layers) if not pieces.has(block_name(n))), layers)
    if begin == 0 and not pieces.has(student.name("x", 0)):
        hosts.first_does(lambda: _check_disk(job, teacher))
        teacher.embed()
        student.embed()
    with progress("tune", layers, begin) as bar:
        for n in range(begin, layers):
            tuned = _tune_block(job, teacher, student, n, bar)
            bar.update(n + 1, before=tuned.before, after=tuned.after)
            job.check_stop()
    pieces.drop(*(sweep.name("x", n) for sweep in (teacher, student) for n in range(layers + 1)))


def _tune_block(job: Job, teacher: Sweep, student: Sweep, n: int, bar: Progress) -> Tuned:
    """Block n from its params on disk to its tuned and packed file."""
    if not student.pieces.has(student.name("x", n)):  # stopped before it was made
        student.forward(n - 1, student.source.block(n - 1))
        job.tuned.drop(teacher.name("x", n - 1), student.name("x", n - 1))
    section = job.config.tune
    with job.step("tune", n, section.sequences * section.length) as fields:
        if not teacher.pieces.has(teacher.name("x", n + 1)):
            teacher.forward(n, teacher.source.block(n))
        inputs = student if section.inputs == "quantised" else teacher

        def done(step: int, loss: float) -> None:
            bar.update(n, block=n, steps=step, held_out_loss=loss)

        tuned = tune_block(
            tuned_block(job.model_config),
            teacher.placed(_trainable(job, n)),
            inputs.mapped("x", n)[: section.sequences],
            teacher.mapped("x", n + 1)[: section.sequences],
            section,
            section.held_out,
            seed=job.config.seed + n,
            extra={"local": jnp.asarray(teacher.local(n))},
            done=done,
            mesh=job.mesh,
        )
        _write(job, n, tuned)
        fields |= {"before": tuned.before, "after": tuned.after, "epochs": len(tuned.losses)}
    student.forward(n, student.source.block(n))
    job.tuned.drop(teacher.name("x", n), student.name("x", n))
    return tuned


def _trainable(job: Job, n: int) -> Params:
    """The block as it was initialised: the statistics of its calibration give the same nodes."""
    params = FromCheckpoint(job.checkpoint).block(n)
    _, stats, _ = job.blocks.read_block(block_name(n))
    params, stats = job.everywhere(params, stats)
    nodes = dict(block_nodes(params, n, job.layer_specs(n), stats, job.keys()))
    return map_leaves(
        lambda path, leaf: jax.tree.map(lambda a: a[0], nodes[path]) if path in nodes else leaf,
        params,
    )


def _write(job: Job, n: int, tuned: Tuned) -> None:
    """Keep a tuned block: its packed weights, and its norms and biases where they trained."""
    params = hosts.whole(tuned.params)
    found = {path: jax.tree.map(lambda a: a[None], leaf) for path, leaf in leaves(params)}
    packed = {path: leaf.pack(f"{path} of layer {n}")
              for path, leaf in found.items() if is_weight(leaf)}
    plain = {path: np.asarray(leaf) for path, leaf in found.items() if not is_weight(leaf)}
    if job.config.tune.keep_latents:
        arrays = {f"{path}:{part}": array for path, leaf in found.items() if is_weight(leaf)
                  for part, array in named_parts(leaf).items()}
        job.tuned.write_arrays(trained_name(n), arrays)
    record = {"before": tuned.before, "after": tuned.after, "losses": list(tuned.losses)}
    job.tuned.write_block(block_name(n), packed, None, record, plain)


def _check_disk(job: Job, sweep: Sweep) -> None:
    """Raise BadInput where the states will not fit on the disk."""
    needed, free = 4 * sweep.state_bytes(), shutil.disk_usage(job.folder.path).free
    if needed > free:
        raise BadInput(
            f"tuning keeps {needed / 1e9:.1f} GB of states in {job.tuned.folder}, where "
            f"{free / 1e9:.1f} GB are free: set output to another disk, or lower tune.sequences "
            "or tune.length"
        )


def _inputs(job: Job, ids: Ids) -> Read:
    c = job.config
    return Read("tune", {"tune": c.tune, "compute": c.compute, "seed": c.seed,
                         "the training text": job.text.train.digest,
                         "the result of stage quantise": ids["quantise"]})


STAGE = Stage("tune", tune, _inputs, pieces="tune", metrics=("tune",),
              wanted=lambda config: bool(config.tune.epochs))
