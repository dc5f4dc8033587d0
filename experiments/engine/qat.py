"""The stages of task qat that train: a full-precision teacher, a calibrated start, distillation.

Each takes the run's inputs, leaves files, and returns what the summary needs.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float

from rabit_jax import calibrate, convert, hosts
from rabit_jax.atomic import remove
from rabit_jax.calibration.probes import Batch
from rabit_jax.evaluate.sign_statistics import disordered_share, mean_flip_rate, snapshot
from rabit_jax.experiments.engine import taught
from rabit_jax.experiments.engine.fitting import distillation, fit
from rabit_jax.experiments.engine.inputs import Inputs, abstract_params
from rabit_jax.experiments.engine.measure import (
    diagnostics,
    reconstruction_errors,
    watched_nats,
)
from rabit_jax.experiments.engine.qat_results import evaluate, packing, samples
from rabit_jax.experiments.engine.records import Record
from rabit_jax.experiments.engine.settings import RunConfig
from rabit_jax.experiments.engine.stages import Ids, Read, Stage
from rabit_jax.experiments.engine.taught import kept_batches
from rabit_jax.formats.folder import fingerprint, is_model_folder
from rabit_jax.formats.hf import save_hf
from rabit_jax.models.decoder import Decoder, init_params
from rabit_jax.progress import progress, say
from rabit_jax.train.loop import Record as Logged
from rabit_jax.train.loop import Watch
from rabit_jax.train.losses import (
    distillation_loss,
    dominant_term,
    kept_distillation_loss,
    next_token_loss,
)
from rabit_jax.train.optimizer import merge
from rabit_jax.train.sharding import batch_sharding, param_shardings
from rabit_jax.train.step import Loss, next_tokens
from rabit_jax.train.trainer import Trainer, make_trainer
from rabit_jax.tree import match_rules, tree_bytes
from rabit_jax.types import Array, Params
from rabit_jax.weights.budget import apply_budget


def teacher_loss(config: RunConfig, model: Decoder) -> Loss:
    """What the stage teacher minimises."""

    def loss(params: Params, _: Params, batch: Batch) -> dict[str, Array]:
        return {"loss": next_token_loss(model, params, batch, config.compute.chunk)[0]}

    return loss


def calibration_loss(
    config: RunConfig, model: Decoder
) -> Callable[[Params, Batch], Float[Array, ""]]:
    """What is differentiated to calibrate; `batch["row"]: [b]` numbers the windows."""

    def loss(params: Params, batch: Batch) -> Array:
        key = jax.random.fold_in(jax.random.key(config.seed), batch["row"][0])
        return next_token_loss(
            model, params, batch, config.compute.chunk, config.calibrate.labels, key)[0]

    return loss


def student_loss(config: RunConfig, model: Decoder) -> Loss:
    """What the stage qat minimises."""

    section, chunk = config.qat, config.compute.chunk

    def kept(params: Params, _: None, batch: Batch) -> dict[str, Array]:
        return kept_distillation_loss(model, params, batch, chunk)

    return kept if section.teacher_top else distillation(model, section, chunk)


def teacher(run: Inputs, continues: bool) -> Record:
    """Train the full-precision model on the run's text, or note the folder of a given one."""
    section = run.config.teacher
    if section.path:
        return {"path": section.path, "tokens": 0}
    where = param_shardings(abstract_params(run.model_config), run.mesh)
    params = jax.jit(lambda key: init_params(run.model_config, key), out_shardings=where)(
        jax.random.key(run.config.seed)
    )
    trainer = make_trainer(
        teacher_loss(run.config, run.model),
        params,
        section.optimizer,
        section.steps,
        mesh=run.mesh,
        accumulate=section.accumulate,
        health=section.health,
        count=next_tokens,
    )
    tokens = section.batch_size * section.length

    def after(step: int, trainable: Params, _: object) -> None:
        run.folder.metrics.log(
            {
                "stage": "validation",
                "during": "teacher",
                "step": step,
                "tokens": step * tokens,
                "nats_per_token": watched_nats(run, merge(trainable, trainer.frozen)),
            }
        )

    watch = Watch(section.watch_every, lambda _: None, after)
    state = fit(run, "teacher", section, trainer, continues, watch)
    trained = hosts.whole(trainer.params(state), everywhere=False)
    hosts.first_does(partial(_save_teacher, run, trained))
    return {
        "path": run.teacher_folder,
        "tokens": section.steps * tokens,
    }


def _save_teacher(run: Inputs, trained: Params) -> None:
    folder = Path(run.teacher_folder)
    if not is_model_folder(folder):
        remove(folder)  # what damage has left of an earlier one, which may not be replaced unseen
    save_hf(folder, run.model, trained, run.text.tokenizer)


def calibration(run: Inputs, continues: bool) -> Record:
    """Measure the inputs and output gradients of every kernel of a block that will be quantised."""
    section, seed = run.config.calibrate, run.config.seed
    count = -(-section.sequences // section.batch_size)
    rows_at = run.text.batches(section, seed + 1)
    size = (section.batch_size, section.length)

    def batches() -> Iterator[Batch]:
        with progress("calibrate", count) as bar:
            for step in range(count):
                row = np.arange(size[0]) + step * size[0]
                # The last batch may hold more rows than are left to measure.
                mask = np.broadcast_to((row < section.sequences)[:, None], size)
                extra = {"mask": mask, "row": row}
                yield {**rows_at(step), **hosts.on_mesh(extra, batch_sharding(run.mesh))}
                bar.update(step + 1)

    stats = calibrate(
        calibration_loss(run.config, run.model),
        run.teacher,
        batches(),
        run.config.init.block_rules(),
        clip=section.clip,
        shardings=param_shardings(run.teacher, run.mesh),
        batch_sharding=batch_sharding(run.mesh),
    )
    run.save_stats(stats)
    return {"tokens": section.sequences * section.length}


def init(run: Inputs, continues: bool) -> Record:
    """Turn the selected kernels into weight nodes, layer by layer."""
    section, key = run.config.init, jax.random.key(run.config.seed)
    with progress("init", len(match_rules(run.teacher, section.rules()))) as bar:
        count = itertools.count(1)

        def done(_: str) -> None:
            bar.update(next(count))

        student = convert(run.teacher, section.block_rules(), run.stats, key, done=done)
        chosen = {}
        if section.budget:
            specs = match_rules(run.teacher, section.block_rules())
            student, chosen = apply_budget(run.teacher, student, specs, run.stats, section.budget)
        student = convert(student, section.end_rules(), key=key, done=done)
    run.save_init(student)
    return {
        **({"k": chosen} if chosen else {}),
        "relative_error": reconstruction_errors(run.teacher, student),
        "diagnostics": diagnostics(run, student),
    }


def qat(run: Inputs, continues: bool) -> Record:
    """Distil the teacher into the quantised student."""
    section = run.config.qat
    # Whether steps run the teacher as it is; measurements between them do in any case.
    as_it_is = not (section.teacher_top or run.config.compute.teacher)
    trainer = make_trainer(
        student_loss(run.config, run.model),
        run.student_init,
        section.optimizer,
        section.steps,
        teacher=None if section.teacher_top else run.config.compute.held(run.teacher),
        mesh=run.mesh,
        accumulate=section.accumulate,
        health=section.health,
        project=section.project_scales,
    )
    found = {} if as_it_is or section.teacher_top else {"teacher_kl": _teacher_kl(run, trainer)}
    dropped = ("student_init",) if as_it_is else ("student_init", "teacher")
    run.forget(*dropped)  # the state holds copies of what trains
    tokens, state_bytes = section.batch_size * section.length, tree_bytes(trainer.state)

    def after(step: int, trainable: Params, before: dict[str, Array]) -> None:
        student = merge(trainable, trainer.frozen)
        found, own = (diagnostics(run, student, drive) for drive in ("teacher", "student"))
        run.folder.metrics.log(
            {
                "stage": "diagnostics",
                "during": "qat",
                "step": step,
                "tokens": step * tokens,
                **found["mean"],
                **{f"student_{name}": value for name, value in own["mean"].items()},
                "layers": found["layers"],
                "nats_per_token": watched_nats(run, student),
                "flip_rate": mean_flip_rate(before, snapshot(student)),
                "disordered": disordered_share(student),
            }
        )
        run.forget(*dropped)

    def notice(record: Logged) -> str | None:
        kl, hidden = (float(record[name] or 0) for name in ("kl", "hidden_mse"))
        return dominant_term(kl, hidden, section.gamma)

    watch = Watch(section.watch_every, lambda t: snapshot(merge(t, trainer.frozen)), after)
    batches = kept_batches(run) if section.teacher_top else None
    state = fit(run, "qat", section, trainer, continues, watch, notice, batches)
    run.save_student(state.trainable)
    lines = [line for line in run.folder.metrics.lines() if line["stage"] == "qat"]
    return {
        "tokens": section.steps * tokens,
        "projected_in_logged_steps": sum(line.get("projected", 0) for line in lines),
        "state_bytes": state_bytes,
        **found,
    }


def _teacher_kl(run: Inputs, trainer: Trainer) -> float:
    """KL of the teacher to itself as a step holds it, in nats per token on the first batch."""
    section, chunk = run.config.qat, run.config.compute.chunk

    @jax.jit
    def summed(held: Params, teacher: Params, batch: Batch) -> Array:
        return distillation_loss(run.model, held, teacher, batch, 0.0, chunk)["kl"]

    batch = run.text.batches(section, run.config.seed)(0)
    total = float(summed(trainer.teacher, run.teacher, batch))
    kl = total / (section.batch_size * section.length)
    say(f"qat: the teacher in {run.config.compute.teacher} is {kl:.3g} nats per token from itself")
    return kl


def _inputs(
    name: str, sections: tuple[str, ...], texts: tuple[str, ...] = (), after: str = ""
) -> Callable[[Inputs, Ids], Read]:
    """The inputs of a stage: sections of the config, texts by digest, and the stage before it."""

    def found(run: Inputs, ids: Ids) -> Read:
        values = {section: getattr(run.config, section) for section in sections}
        if "train" in texts:
            values["the training text"] = run.text.train.digest
        if "held_out" in texts:
            held_out = (run.text.held_out, run.text.unseen)
            values["the evaluation text"] = [text.digest for text in held_out if text]
        if after:
            values[f"the result of stage {after}"] = ids[after]
        return Read(name, values)

    return found


def _qat_inputs(run: Inputs, ids: Ids) -> Read:
    """The inputs of training; what 0.1 began is another training unless gamma is 0."""
    sections = ("qat", "compute", "seed", "evaluate")
    read = _inputs("qat", sections, ("train", "held_out"), "init")(run, ids)
    other = "its error of the hidden states was not relative to the teacher's"
    return dataclasses.replace(read, changed=other if run.config.qat.gamma else "")


def _teacher_inputs(run: Inputs, ids: Ids) -> Read:
    """The files of a given teacher, or what one that is trained here depends on."""
    if path := run.config.teacher.path:
        return Read("teacher", {f"the file {f[0]} of {path}": f for f in fingerprint(path)})
    return _inputs("teacher", ("teacher", "model", "compute", "seed"), ("train",))(run, ids)


STAGES = (
    Stage("teacher", teacher, _teacher_inputs, ("teacher",)),
    Stage(
        "calibrate",
        calibration,
        _inputs("calibrate", ("calibrate", "init", "compute", "seed"), ("train",), "teacher"),
        ("calibration.safetensors",),
    ),
    Stage(
        "init",
        init,
        _inputs("init", ("init", "seed", "evaluate"), ("held_out",), "calibrate"),
        ("checkpoints/init",),
    ),
    taught.STAGE,
    Stage(
        "qat",
        qat,
        _qat_inputs,
        ("checkpoints/student",),
    ),
    Stage("evaluate", evaluate, _inputs("evaluate", ("evaluate",), ("held_out",), "qat")),
    Stage("pack", packing, _inputs("pack", ("evaluate",), ("held_out",), "qat"), ("packed",)),
    Stage("generate", samples, _inputs("generate", ("generate", "seed"), (), "pack")),
)
