"""The stage of task ptq that tunes every block on its output, first block first.

Two streams of states go through the blocks on disk: those of the full-precision model, whose blocks
say what each output should be, and those of the blocks that are tuned and packed already; where
tuning is nested, one of the latter for each number of paths. One block is in memory. A run that was
stopped goes on at the block that it had reached.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rabit_jax import BadInput, hosts
from rabit_jax.calibration.blockwise import block_nodes
from rabit_jax.experiments.engine.job import Job, block_name
from rabit_jax.experiments.engine.records import Record
from rabit_jax.experiments.engine.signals import stopping_between_steps
from rabit_jax.experiments.engine.stages import Ids, Read, Stage
from rabit_jax.experiments.engine.sweeps import (
    FirstPaths,
    FromBlocks,
    FromCheckpoint,
    Sweep,
    tuned_block,
)
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
    students = _students(job, teacher)
    begin = next((n for n in range(layers) if not pieces.has(block_name(n))), layers)
    sweeps = (teacher, *students.values())
    if begin == 0 and not pieces.has(sweeps[-1].name("x", 0)):
        hosts.first_does(lambda: _check_disk(job, sweeps))
        for sweep in sweeps:
            sweep.embed()
    with progress("tune", layers, begin) as bar:
        for n in range(begin, layers):
            tuned = _tune_block(job, teacher, students, n, bar)
            bar.update(n + 1, before=tuned.before, after=tuned.after)
            job.check_stop()
    pieces.drop(*(sweep.name("x", n) for sweep in sweeps for n in range(layers + 1)))


def _students(job: Job, teacher: Sweep) -> dict[int, Sweep]:
    """The passes of the tuned blocks by their number of paths; 0, the last, has all of them."""
    source = FromBlocks(job.checkpoint, job.tuned, block_name)
    found = {n: dataclasses.replace(teacher, source=FirstPaths(source, n), prefix=f"student{n}-")
             for n in list(job.config.tune.prefixes)[:-1]}
    return found | {0: dataclasses.replace(teacher, source=source, prefix="student-")}


def _tune_block(
    job: Job, teacher: Sweep, students: Mapping[int, Sweep], n: int, bar: Progress
) -> Tuned:
    """Block n from its params on disk to its tuned and packed file."""
    sweeps = (teacher, *students.values())
    for student in students.values():
        if not job.tuned.has(student.name("x", n)):  # stopped before it was made
            student.forward(n - 1, student.source.block(n - 1))
    job.tuned.drop(*(sweep.name("x", n - 1) for sweep in sweeps))
    section = job.config.tune
    with job.step("tune", n, section.sequences * section.length) as fields:
        if not teacher.pieces.has(teacher.name("x", n + 1)):
            teacher.forward(n, teacher.source.block(n))

        def done(step: int, loss: float) -> None:
            bar.update(n, block=n, steps=step, held_out_loss=loss)

        tuned = tune_block(
            tuned_block(job.model_config),
            teacher.placed(_trainable(job, n)),
            _block_inputs(job, teacher, students, n),
            teacher.mapped("x", n + 1)[: section.sequences],
            section,
            section.held_out,
            seed=job.config.seed + n,
            extra={"local": jnp.asarray(teacher.local(n))},
            done=done,
            mesh=job.mesh,
            nested=section.prefixes,
        )
        _write(job, n, tuned)
        fields |= {"before": tuned.before, "after": tuned.after, "epochs": len(tuned.losses),
                   **_by_paths(tuned)}
    for student in students.values():
        student.forward(n, student.source.block(n))
    job.tuned.drop(*(sweep.name("x", n) for sweep in sweeps))
    return tuned


def _block_inputs(
    job: Job, teacher: Sweep, students: Mapping[int, Sweep], n: int
) -> np.ndarray | dict[int, np.ndarray]:
    """What block n is tuned on: `x` of `tune_block`."""
    section = job.config.tune
    if section.inputs == "teacher":
        students = dict.fromkeys(students, teacher)
    x = [sweep.mapped("x", n)[: section.sequences] for sweep in students.values()]
    return dict(zip(section.prefixes, x, strict=True)) if section.nested else x[0]


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
    record = {"before": tuned.before, "after": tuned.after, "losses": list(tuned.losses),
              **_by_paths(tuned)}
    job.tuned.write_block(block_name(n), packed, None, record, plain)


def _by_paths(tuned: Tuned) -> dict[str, float]:
    """The errors of the models of the first paths, as records name them."""
    return {f"after_{n}": error for n, error in tuned.nested.items()}


def _check_disk(job: Job, sweeps: Sequence[Sweep]) -> None:
    """Raise BadInput where the states, two of each pass, will not fit on the disk."""
    needed = 2 * sum(one.state_bytes() for one in sweeps)
    free = shutil.disk_usage(job.folder.path).free
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
