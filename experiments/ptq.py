"""Post-training: a full-precision model in, a packed model out, one block in memory, no training.

    python -m experiments.run --config experiments/configs/ptq.yaml teacher.path=FOLDER

A forward pass keeps the input of every block on disk, a backward pass brings the gradients; each
block is calibrated, initialised, packed and written before the next is read. The same command goes
on at the block where it was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from rabit_jax import BadInput, __version__, cost, describe
from rabit_jax.atomic import remove, write_text
from rabit_jax.experiments.engine.blockwise import (
    Job,
    block_name,
    pack_model,
    quantise,
    score,
    score_stage,
)
from rabit_jax.experiments.engine.config import section_hash
from rabit_jax.experiments.engine.console import table, watch_signals
from rabit_jax.experiments.engine.folder import RunFolder
from rabit_jax.experiments.engine.inputs import abstract_params
from rabit_jax.experiments.engine.machine import device, peak_memory, versions
from rabit_jax.experiments.engine.settings import RunConfig
from rabit_jax.experiments.engine.sweeps import FromCheckpoint, FromParams
from rabit_jax.experiments.report.run_card import write_card
from rabit_jax.experiments.report.summary import LABELS, costs, parameters
from rabit_jax.formats.checkpoint import open_checkpoint
from rabit_jax.formats.folder import fingerprint
from rabit_jax.formats.packed_model import load_packed, packed_bytes

STAGES = ("forward", "head", "init", "pack")


def execute(config: RunConfig, arguments: argparse.Namespace) -> int:
    """The run of a config whose task is ptq and that `check_config` has passed."""
    with open_checkpoint(config.teacher.path) as checkpoint:
        job = Job(config, RunFolder(config), checkpoint)
        check_rules(job)
        check_text(job)
        job.folder.open(arguments.resume)
        claim(job, arguments.resume)
        watch_signals(job, "after this block")
        try:
            quantise(job)
            pack_model(job)
            scored = score_models(job)
        finally:
            job.folder.close()
        command = " ".join(["python -m experiments.run", *arguments.command])
        summary = summarise(job, scored, command)
    write_text(job.folder.path / "summary.json", json.dumps(summary, indent=1))
    write_card(config, job.folder.path, summary)
    show(summary)
    print(f"packed model: {job.folder.path / 'packed'}")
    return 0


def check_config(config: RunConfig, arguments: argparse.Namespace) -> None:
    """Raise BadInput for settings that only a run with training has."""
    if not config.teacher.path:
        raise BadInput("task ptq trains nothing: set teacher.path to the model to be packed")
    if config.mesh:
        raise BadInput("task ptq runs on one device: leave mesh empty")
    if arguments.force or arguments.until != "generate":
        raise BadInput(
            "task ptq goes block by block and has no stages to --force or --until: remove "
            f"{Path(config.output) / config.name} to start again"
        )


def check_rules(job: Job) -> None:
    """Raise BadInput where the rules select nothing or what is not in a block."""
    if not job.specs:
        raise BadInput("init.quantise and init.keep leave no kernel to quantise")
    if other := [path for path in job.specs if not re.fullmatch(r"layers/.*/kernel", path)]:
        raise BadInput(
            f"init.quantise selects {other[0]}: a run quantises the kernels of the blocks, "
            "layers/.../kernel"
        )


def check_text(job: Job) -> None:
    """Raise BadInput where the text is too short, or sequences are longer than the model's."""
    config, most = job.config, job.model_config.max_position
    section, lengths = config.calibrate, {}
    if section.mode != "none":
        job.text.rows(section, 0, config.seed + 1)
        lengths["calibrate"] = section.length
    if config.evaluate.models:
        for text in job.texts().values():
            job.text.windows(text)
        lengths["evaluate"] = config.evaluate.context
    for name, length in lengths.items():
        if length > most:
            raise BadInput(
                f"{name} uses sequences of {length} tokens: the model has {most} positions; make "
                "it shorter"
            )


def claim(job: Job, resume: bool) -> None:
    """Keep the pieces on disk that this run would make again the same, remove the others."""
    c = job.config
    text = None if c.calibrate.mode == "none" else job.text.train.digest
    files = fingerprint(c.teacher.path)
    key = section_hash(
        __version__, "ptq", c.calibrate, c.init, c.compute, c.seed, text, files
    )
    if not job.blocks.claim(key, resume):
        for name in ("packed", "calibration.safetensors"):
            remove(job.folder.path / name)
        _forget(job, *STAGES)
    texts = {name: t.digest for name, t in job.texts().items()} if c.evaluate.models else {}
    common = dataclasses.replace(c.evaluate, models=()), c.compute, files, texts
    for label in c.evaluate.models:
        own = section_hash(__version__, "ptq", *common, key if label == "packed" else "")
        if not job.scores[label].claim(own, resume):
            _forget(job, *(score_stage(label, name) for name in texts))
    # Training in the same folder would take what is written here for its own.
    for name in ("summary.json", "report.html", "stages/calibrate.json", "stages/pack.json"):
        remove(job.folder.path / name)


def _forget(job: Job, *stages: str) -> None:
    """Drop what was logged of stages that are done anew."""
    for stage in stages:
        job.folder.keep_metrics(stage, -1)
        remove(job.folder.path / "tensorboard" / stage)


def score_models(job: Job) -> dict[str, dict]:
    """Perplexity of the models that the config names."""
    sources = {
        "teacher": lambda: FromCheckpoint(job.checkpoint),
        "packed": lambda: FromParams(load_packed(job.folder.path / "packed")[1]),
    }
    return {name: score(job, name, sources[name]) for name in job.config.evaluate.models}


def summarise(job: Job, scored: dict[str, dict], command: str) -> dict[str, Any]:
    """The nested summary with the keys of every run; what needs training is null."""
    student, seconds = job.abstract_student(), {}
    # Lines of training, where the folder held such a run before, have no seconds.
    lines = [line for line in job.folder.metrics() if "seconds" in line]
    for line in lines:
        seconds[line["stage"]] = seconds.get(line["stage"], 0.0) + line["seconds"]
    calibration = job.calibration
    return {
        "name": job.config.name,
        "task": "ptq",
        "command": command,
        "seed": job.config.seed,
        "teacher": scored.get("teacher"),
        "init": None,
        "qat": None,
        "packed": {
            **scored.get("packed", {}),
            "bits_per_weight": describe(student).bits_per_weight,
            **packed_sizes(job),
        },
        "dense": {"bytes": describe(abstract_params(job.model_config)).deployed_bytes},
        "diagnostics": {"init": None, "qat": None},
        "relative_error": {"init": relative_errors(job)},
        "cost": cost(student)._asdict(),
        "tokens": {"calibrate": 0 if calibration is None else calibration.tokens.size},
        "seconds": seconds,
        "peak_memory_bytes": max([peak_memory(), *(n["peak_memory_bytes"] for n in lines)]),
        "parameters": parameters(job),
        "versions": versions(),
        "device": device(),
        "spec": str(job.config.init.spec),
    }


def relative_errors(job: Job) -> dict[str, list[float]]:
    """`|W - W_hat|^2 / |W|^2` of every packed kernel, one number per layer."""
    layers = range(job.model_config.n_layers)
    records = [job.blocks.read_block(block_name(n))[2]["relative_error"] for n in layers]
    return {path: [record[path] for record in records] for path in job.specs}


def packed_sizes(job: Job) -> dict:
    """What the summary says of the packed file."""
    sizes = packed_bytes(job.folder.path / "packed")
    return {
        "stored_bits_per_weight": sizes["stored_bits_per_weight"],
        "linear_bytes": sizes["linear_bytes"],
        "bytes": sizes["file_bytes"],
    }


def show(summary: dict[str, Any]) -> None:
    """The results table and the numbers one looks for first."""
    teacher, packed = summary["teacher"], summary["packed"]
    rows = []
    for name, bits in (("teacher", None), ("packed", packed["bits_per_weight"])):
        found = summary[name] or {}
        ppl = found.get("ppl")
        over = f"{100 * (ppl / teacher['ppl'] - 1):+.1f}%" if ppl and teacher else None
        rows.append((LABELS[name], ppl, found.get("bits_per_byte"), over, bits))
    context = next((m["context"] for m in (teacher, packed) if m and "context" in m), None)
    table(
        f"{summary['name']}, post-training" + (f", context {context}" if context else ""),
        ("model", "perplexity", "bits per byte", "over teacher", "bits per weight"), rows,
        stdout=True,
    )
    print(costs(summary))
