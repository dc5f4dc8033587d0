"""The stages of task ptq that score a model on text, with one block in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from rabit_jax import describe
from rabit_jax.data.tokens import TokenText
from rabit_jax.evaluate.perplexities import from_nats
from rabit_jax.experiments.engine.job import Job, block_name, padded, trained
from rabit_jax.experiments.engine.measure import figures
from rabit_jax.experiments.engine.pieces import Pieces
from rabit_jax.experiments.engine.records import Record
from rabit_jax.experiments.engine.settings import RunConfig
from rabit_jax.experiments.engine.signals import stopping_between_steps
from rabit_jax.experiments.engine.stages import Ids, Read, Stage
from rabit_jax.experiments.engine.sweeps import (
    FromBlocks,
    FromCheckpoint,
    FromParams,
    Source,
    Sweep,
)
from rabit_jax.formats.folder import fingerprint
from rabit_jax.formats.packed_model import load_packed
from rabit_jax.weights.mixed_stack import at_most_paths

# The stage that makes each model where a run trains.
_MADE_BY = {"teacher": "quantise", "init": "quantise", "tuned": "tune", "packed": "pack"}


def _score(label: str, source: Callable[[Job], Source]) -> Stage[Job]:
    """The stage that scores a model on each text, with one block in memory."""
    pieces, held_out = f"scores/{label}", f"perplexity_{label}"
    # How the lines of each text are named in metrics.jsonl.
    names = {"held_out": held_out, "unseen": f"{held_out}_unseen"}

    def work(job: Job, continues: bool) -> Record:
        own = Pieces(job.folder.path / pieces)
        found = {name: _perplexity(job, own, name, text, names[name], source(job))
                 for name, text in job.texts().items()}
        return {**found.pop("held_out"), **found}

    def inputs(job: Job, ids: Ids) -> Read:
        c = job.config
        texts = {name: text.digest for name, text in job.texts().items()}
        settings = dataclasses.replace(c.evaluate, models=())
        stage = _MADE_BY[label] if trained(c) else "quantise"
        made = "" if label == "teacher" else ids[stage]
        return Read("ptq", {"evaluate": settings, "compute": c.compute,
                            f"the files of {c.teacher.path}": fingerprint(c.teacher.path),
                            "the evaluation text": texts,
                            f"the result of stage {stage}": made}, flat=True)

    def wanted(config: RunConfig) -> bool:
        there = label != "tuned" or bool(config.tune.epochs)
        return there and label in config.evaluate.models

    return Stage(f"score_{label}", work, inputs, (), pieces, tuple(names.values()), wanted)


def _score_nested(job: Job, continues: bool) -> Record:
    """Scores and sizes of the models of the first paths that were trained together."""
    found, pieces = {}, Pieces(job.folder.path / _NESTED.pieces)
    packed = load_packed(job.folder.path / "packed")[1]
    for n in _nested_models(job.config):
        params = at_most_paths(packed, n)
        size, source = describe(params), FromParams(params)
        scored = {name: _perplexity(job, pieces, f"{name}-{n}", text, _NESTED.metrics[0], source)
                  for name, text in job.texts().items()}
        found[str(n)] = {
            **scored.pop("held_out"), **scored,
            "stored_bits_per_weight": size.stored_bits_per_weight,
            "whole_model_bits_per_weight": size.whole_model_bits_per_weight,
        }
    return found


def _nested_models(config: RunConfig) -> list[int]:
    """The numbers of paths whose models were trained together, in whichever stage."""
    tuned = config.tune.prefixes if config.tune.epochs else {}
    trained = config.end_to_end.prefixes if config.end_to_end.steps else {}
    return sorted({*tuned, *trained})


def _perplexity(
    job: Job, pieces: Pieces, name: str, text: TokenText, stage: str, source: Source
) -> Record:
    """Perplexity on one text; a result that is there, under that name, is read."""
    if record := pieces.record(f"{name}.json"):
        return record
    rows, size = job.text.windows(text), job.config.evaluate.batch_size
    tokens, mask = padded(rows, size)
    sweep = Sweep(job.model_config, source, pieces, tokens, mask, size, f"{name}-", job.mesh)
    states = [sweep.name("x", n) for n in range(job.model_config.n_layers + 1)]
    if not any(map(pieces.has, states)):
        sweep.embed()
    with stopping_between_steps(job, "after this block"):
        job.forward(sweep, stage, keep=False)
    with job.step(stage, len(states), tokens.size):
        nats = sweep.nats(job.config.compute.chunk)
    found = figures(from_nats(nats, len(rows), rows.shape[1], text.bytes, len(text.tokens)))
    pieces.write_record(f"{name}.json", found)
    pieces.drop(states[-1])
    return found


# What it reads is what scoring the packed model reads.
_PACKED = _score("packed", lambda job: FromParams(load_packed(job.folder.path / "packed")[1]))
_NESTED = dataclasses.replace(
    _PACKED, name="score_nested", work=_score_nested, pieces="scores/nested",
    metrics=("perplexity_nested",), wanted=lambda config: _PACKED.wanted(config) and bool(
        _nested_models(config)))
SCORES = (
    _score("teacher", lambda job: FromCheckpoint(job.checkpoint)),
    _score("init", lambda job: FromBlocks(job.checkpoint, job.blocks, block_name)),
    _score("tuned", lambda job: FromBlocks(job.checkpoint, job.tuned, block_name)),
    _PACKED,
    _NESTED,
)
