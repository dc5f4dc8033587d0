"""The stage that keeps the teacher's likeliest tokens for every step of training, on disk.

The batch of a step is a function of seed and step, so the teacher needs to see it only once. There
is a file for each step, with checksums; a stage that was stopped goes on behind the last of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from rabit_jax import BadInput
from rabit_jax.experiments.engine.inputs import Inputs
from rabit_jax.experiments.engine.pieces import Pieces
from rabit_jax.experiments.engine.records import Record
from rabit_jax.experiments.engine.signals import stopping_between_steps
from rabit_jax.experiments.engine.stages import Ids, Read, Stage
from rabit_jax.progress import number, progress, say
from rabit_jax.train.losses import distillation_loss, head_of, kept_distillation_loss, likeliest
from rabit_jax.train.sharding import batch_sharding
from rabit_jax.types import Array, Batch, Params

NAME = "teacher_logits"
FOLDER = "teacher-logits"
ARRAYS = ("ids", "log_p", "log_rest")


def pieces_of(run: Inputs) -> Pieces:
    """The folder of a run with a piece for each step."""
    return Pieces(run.folder.path / FOLDER)


def step_name(step: int) -> str:
    """The piece of a step, counted from 0."""
    return f"step-{step:07}"


def teacher_logits(run: Inputs, continues: bool) -> Record:
    """Run the teacher over the batches of all steps of QAT and keep what `likeliest` gives."""
    section = run.config.qat
    pieces, batches = pieces_of(run), run.text.batches(section, run.config.seed)
    todo = [step for step in range(section.steps) if not pieces.has(step_name(step))]
    _announce(run, len(todo))

    @jax.jit
    def kept(params: Params, batch: Batch) -> dict[str, Array]:
        features = run.model.apply(
            {"params": params}, batch["tokens"], batch.get("mask"), method="features")[0]
        return likeliest(head_of(run.model, params), features, section.teacher_top,
                         run.config.compute.chunk)

    begin = section.steps - len(todo)
    with (stopping_between_steps(run, "after this batch"),
          progress(NAME, section.steps, start=begin) as bar):
        for count, step in enumerate(todo, begin + 1):
            found = jax.device_get(kept(run.teacher, batches(step)))
            found["ids"] = found["ids"].astype(_id_dtype(run.model_config.vocab_size))
            pieces.write_arrays(step_name(step), found)
            bar.update(count)
            if run.stopped:
                raise KeyboardInterrupt
    return {"bytes": piece_bytes(run) * section.steps, **_errors(run)}


def _id_dtype(vocabulary: int) -> str:
    return "uint16" if vocabulary <= 2**16 else "int32"


def piece_bytes(run: Inputs) -> int:
    """Bytes of the arrays of one step."""
    section = run.config.qat
    one = np.dtype(_id_dtype(run.model_config.vocab_size)).itemsize + 4
    return section.batch_size * section.length * (section.teacher_top * one + 4)


def _announce(run: Inputs, steps: int) -> None:
    """Say how much is going to be written; raise BadInput where the disk does not hold it."""
    wanted = steps * piece_bytes(run)
    free = shutil.disk_usage(_existing(run.folder.path)).free
    say(f"{NAME}: {steps} steps of {number(piece_bytes(run) / 1e6)} MB, "
        f"{number(wanted / 1e9)} GB in {run.folder.path / FOLDER} ({number(free / 1e9)} GB free)")
    if wanted > free:
        raise BadInput(
            f"qat.teacher_top {run.config.qat.teacher_top} keeps {number(wanted / 1e9)} GB, and "
            f"{number(free / 1e9)} GB are free at {run.folder.path}: keep fewer tokens, free some "
            "space, or set teacher_top to 0 to run the teacher in every step"
        )


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def _errors(run: Inputs) -> Record:
    """The mass that is not kept, and what that leaves out of the KL of the student at its start, on
    the first batch in nats per token."""
    section, batch = run.config.qat, kept_batches(run)(0)
    chunk = run.config.compute.chunk

    @jax.jit
    def sums(student: Params, teacher: Params, batch: Batch) -> tuple[Array, Array, Array]:
        exact = distillation_loss(run.model, student, teacher, batch, 0.0, chunk)["kl"]
        found = kept_distillation_loss(run.model, student, batch, chunk)["kl"]
        return exact, found, jax.numpy.sum(jax.numpy.exp(batch["log_rest"]))

    tokens = section.batch_size * section.length
    exact, found, rest = (float(n) / tokens
                          for n in sums(run.student_init, run.teacher, batch))
    say(f"{NAME}: {rest:.3%} of the teacher's mass is not kept; KL of the start {found:.5g} nats "
        f"per token, exact {exact:.5g}")
    return {"rest_mass": rest, "kl_start_kept": found, "kl_start_exact": exact}


def kept_batches(run: Inputs) -> Callable[[int], Batch]:
    """Step -> batch on the mesh, with the arrays that the stage has kept.

    The function raises BadInput where a piece is damaged or missing.
    """
    section, pieces = run.config.qat, pieces_of(run)
    plain, where = run.text.batches(section, run.config.seed), batch_sharding(run.mesh)

    def at(step: int) -> Batch:
        found, _ = pieces.read_arrays(step_name(step))
        kept = {name: found[name] for name in ARRAYS}
        kept["ids"] = kept["ids"].astype(np.int32)
        return {**plain(step), **jax.device_put(kept, where)}

    return at


def _inputs(run: Inputs, ids: Ids) -> Read:
    c, section = run.config, run.config.qat
    values = {name: getattr(section, name)
              for name in ("teacher_top", "steps", "batch_size", "length")}
    return Read(NAME, {**values, "dtype": c.compute.dtype, "seed": c.seed,
                       "the training text": run.text.train.digest,
                       "the result of stage init": ids["init"]})


STAGE = Stage(NAME, teacher_logits, _inputs, (FOLDER,), pieces=FOLDER,
              wanted=lambda config: bool(config.qat.teacher_top))
