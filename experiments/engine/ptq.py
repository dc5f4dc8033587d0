"""The first stage of task ptq: blocks of a full-precision model calibrated, initialised and packed.

A forward pass keeps the input of every block on disk, a backward pass brings the gradients; each
block is calibrated, initialised, packed and written before the next is read, so that one block is
in memory. A run that was stopped goes on at the block that it had reached. Stages that train come
between this one and the scores, see `tuning` and `end_to_end`.
"""

from __future__ import annotations

import dataclasses
import shutil
import time

import jax

from rabit_jax import BadInput, Stats, hosts
from rabit_jax.calibration.blockwise import (
    block_nodes,
    first_of,
    init_block,
    relative_error,
)
from rabit_jax.experiments.engine.job import ALLOCATION, STATS, Job, block_name, trained
from rabit_jax.experiments.engine.packing import keep_stats, pack_model, sizes, stacked_stats
from rabit_jax.experiments.engine.records import Record
from rabit_jax.experiments.engine.signals import stopping_between_steps
from rabit_jax.experiments.engine.stages import Ids, Read, Stage
from rabit_jax.experiments.engine.sweeps import FromCheckpoint, Sweep
from rabit_jax.formats.folder import fingerprint
from rabit_jax.progress import progress
from rabit_jax.tree import leaves
from rabit_jax.types import Array, Params
from rabit_jax.weights.budget import Option, path_specs, sensitivity, share_out, stored_bits


def option_name(n: int, k: int) -> str:
    """Name of a block packed with k paths in every matrix whose spec allows so many."""
    return f"option-{n:03}-{k}.safetensors"


def errors_name(n: int) -> str:
    """Name of the record of a block's errors at each k, which is there when its options are."""
    return f"options-{n:03}.json"


def quantise(job: Job, continues: bool) -> Record:
    """Calibrate, initialise and pack every block that is not there yet; then the packed model."""
    with stopping_between_steps(job, "after this block"):
        _quantise_blocks(job)
        if job.config.init.budget:
            choose_paths(job)
    calibration, layers = job.calibration, range(job.model_config.n_layers)
    if not trained(job.config):
        pack_model(job)
    elif calibration:
        keep_stats(job, stacked_stats(job))
    records = [job.blocks.read_block(block_name(n))[2]["relative_error"] for n in layers]
    return {
        "tokens": 0 if calibration is None else calibration.tokens.size,
        "relative_error": {path: [record[path] for record in records] for path in job.specs},
        **({"k": chosen["k"]} if (chosen := job.blocks.record(ALLOCATION)) else {}),
        **({} if trained(job.config) else sizes(job)),
    }


def _quantise_blocks(job: Job) -> None:
    layers, blocks, sweep = job.model_config.n_layers, job.blocks, job.calibration
    mode = job.config.calibrate.mode
    order = list(range(layers))
    if mode == "full":
        order.reverse()
    made = errors_name if job.config.init.budget else block_name
    left = [] if blocks.has(ALLOCATION) else [n for n in order if not blocks.has(made(n))]
    if sweep and left == order:
        _start(job, sweep)
    keys = job.keys()
    with progress("calibrate and pack" if sweep else "pack", layers, layers - len(left)) as bar:
        for done, n in enumerate(left, layers - len(left) + 1):
            error = _quantise_block(job, sweep, n, keys)
            bar.update(done, block=n, relative_error=error)
            job.check_stop()
    blocks.drop(*(f"{kind}-{n:03}" for n in range(layers + 1) for kind in ("x", "dx")))


def _quantise_block(
    job: Job, sweep: Sweep | None, n: int, keys: dict[str, Array]
) -> float:
    """Block n from its params on disk to its packed file; returns its mean relative error."""
    with job.step("init", n, sweep.tokens.size if sweep else 0) as fields:
        params = FromCheckpoint(job.checkpoint).block(n)
        params = sweep.placed(params) if sweep else params
        begin = time.perf_counter()
        stats = _statistics(job, sweep, n, params)
        fields["calibrate_seconds"] = time.perf_counter() - begin
        params, stats = job.everywhere(params, stats)
        if job.config.init.budget:
            errors = _write_options(job, n, params, stats, keys)
        else:
            packed, errors = init_block(params, n, job.specs, stats, keys)
            job.blocks.write_block(block_name(n), packed, stats, {"relative_error": errors})
        fields["relative_error"] = sum(errors.values()) / len(errors)
    if sweep:
        job.blocks.drop(sweep.name("x", n), sweep.name("dx", n + 1))
    return fields["relative_error"]


def _write_options(
    job: Job, n: int, params: Params, stats: dict[str, Stats] | None, keys: dict[str, Array]
) -> dict[str, float]:
    """Block n packed with each number of paths, and the errors of all; returns the relative errors
    with the most paths."""
    kernels, errors = dict(leaves(params)), {}
    weighed: dict[str, list[float]] = {path: [] for path in job.specs}
    every = {path: path_specs(spec) for path, spec in job.specs.items()}
    for k in range(1, 1 + max(map(len, every.values()))):
        specs = {path: own[k - 1] for path, own in every.items() if len(own) >= k}
        packed, found = {}, {}
        for path, node in block_nodes(params, n, specs, stats, keys):
            own = jax.tree.map(lambda s: s[None], stats[path]) if stats else None
            weighed[path].append(first_of(sensitivity(kernels[path][None], node, own)))
            found[path] = first_of(relative_error(kernels[path], node))
            packed[path] = hosts.whole(node).pack(f"{path} of layer {n}")
        job.blocks.write_block(option_name(n, k), packed, stats, {"relative_error": found})
        errors |= found
    job.blocks.write_record(errors_name(n), {"errors": weighed})
    return errors


def choose_paths(job: Job) -> None:
    """Share the budget out, then make every block of the options that were chosen."""
    blocks, layers = job.blocks, range(job.model_config.n_layers)
    every = {path: path_specs(spec) for path, spec in job.specs.items()}
    record = blocks.record(ALLOCATION)
    if record is None:
        found = [blocks.record(errors_name(n)) for n in layers]
        if None in found:
            raise BadInput(f"{blocks.folder} lacks {errors_name(found.index(None))}, which was "
                           "damaged: run again")
        bits = {p: [stored_bits(one, job.shapes[p][-2:]) for one in own]
                for p, own in every.items()}
        options = {p: [list(map(Option, bits[p], one["errors"][p])) for one in found if one]
                   for p in every}
        record = {"k": share_out(options, job.config.init.budget, job.shapes)}
        blocks.write_record(ALLOCATION, record)
    most = range(1, 1 + max(map(len, every.values())))
    for n in layers:
        if not blocks.has(block_name(n)):
            options = {k: blocks.read_block(option_name(n, k)) for k in most}
            own = {path: options[ks[n]] for path, ks in record["k"].items()}
            stats = {p: found[1][p] for p, found in own.items() if found[1] is not None}
            errors = {p: found[2]["relative_error"][p] for p, found in own.items()}
            blocks.write_block(block_name(n), {p: found[0][p] for p, found in own.items()},
                               stats or None, {"relative_error": errors})
    blocks.drop(*(option_name(n, k) for n in layers for k in most))


def _statistics(job: Job, sweep: Sweep | None, n: int, params: Params) -> dict[str, Stats] | None:
    """Statistics of one block, as the mode of the calibration asks."""
    if sweep is None:
        return None
    section = job.config.calibrate
    measure = sweep.backward if section.mode == "full" else sweep.inputs
    return measure(n, params, tuple(job.specs), section.clip)


def _start(job: Job, sweep: Sweep) -> None:
    """What comes before the first packed block: the embedding, and for gradients the forward pass
    and the head."""
    section, layers, blocks = job.config.calibrate, job.model_config.n_layers, job.blocks
    if not blocks.has(sweep.name("x", 0)):
        hosts.first_does(lambda: _check_disk(job, sweep))
        sweep.embed()
    if section.mode == "full" and not blocks.has(sweep.name("dx", layers)):
        job.forward(sweep, "forward", keep=True)
        with job.step("head", layers, sweep.tokens.size):
            key = jax.random.key(job.config.seed)
            sweep.head_gradient(job.config.compute.chunk, section.labels, key)
        blocks.drop(sweep.name("x", layers))


def _check_disk(job: Job, sweep: Sweep) -> None:
    """Raise BadInput where the states will not fit on the disk."""
    states = job.model_config.n_layers + 3 if job.config.calibrate.mode == "full" else 2
    needed = states * sweep.state_bytes()
    free = shutil.disk_usage(job.blocks.folder).free
    if needed > free:
        raise BadInput(
            f"the calibration keeps {needed / 1e9:.1f} GB of states in {job.blocks.folder}, where "
            f"{free / 1e9:.1f} GB are free: set output to another disk, lower "
            "calibrate.sequences or calibrate.length, or set calibrate.mode to activations"
        )


def _quantise_inputs(job: Job, ids: Ids) -> Read:
    c = job.config
    text = None if c.calibrate.mode == "none" else job.text.train.digest
    return Read("ptq", {"calibrate": c.calibrate, "init": c.init, "compute": c.compute,
                        "seed": c.seed, "the training text": text,
                        f"the files of {c.teacher.path}": fingerprint(c.teacher.path)}, flat=True)


QUANTISE = Stage(
    "quantise",
    quantise,
    _quantise_inputs,
    leaves=("packed", STATS),
    pieces="blocks",
    metrics=("forward", "head", "init", "pack"),
    wanted=lambda config: not trained(config),
)
# The same work where training follows, which leaves the packing to a later stage.
START = dataclasses.replace(QUANTISE, leaves=(STATS,), wanted=trained)
