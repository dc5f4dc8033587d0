"""Packed blocks put together to the folder `packed/` of a run of task ptq."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from rabit_jax import Stats, convert, hosts, pack
from rabit_jax.calibration.outliers import record_limbs
from rabit_jax.experiments.engine.inputs import specs_of, write_stats
from rabit_jax.experiments.engine.job import STATS, Job, block_name
from rabit_jax.experiments.engine.records import Record
from rabit_jax.experiments.engine.sweeps import FromBlocks
from rabit_jax.formats.folder import read_generation
from rabit_jax.formats.packed_model import packed_bytes, save_packed
from rabit_jax.progress import progress
from rabit_jax.types import Params
from rabit_jax.weights.leaves import WeightNode
from rabit_jax.weights.mixed_stack import stacked


def pack_model(job: Job) -> None:
    """Put the packed blocks together to the folder `packed/`, and keep the statistics beside it."""
    done = job.blocks.record("packed.json")
    if done and _size(job) == done["bytes"]:
        return
    layers = job.model_config.n_layers
    with job.step("pack", layers, 0):
        params, stats = stacked_blocks(job, FromBlocks(job.checkpoint, job.blocks, block_name))
        if stats:
            keep_stats(job, stats)
        hosts.first_does(lambda: write_packed(job, params, stats))
    job.blocks.write_record("packed.json", {"bytes": _size(job)})


def keep_stats(job: Job, stats: dict[str, Stats]) -> None:
    """Keep the statistics of all layers in the run's folder."""
    hosts.first_does(lambda: write_stats(job.folder.path / STATS, stats))


def write_packed(job: Job, params: Params, stats: dict[str, Stats] | None) -> None:
    """Write `packed/` from packed params and the statistics, which choose the limbs; the work of
    one process."""
    if stats:
        params = record_limbs(params, stats)
    save_packed(
        job.folder.path / "packed", job.checkpoint.config, params, job.tokenizer,
        specs_of(job.config.init), read_generation(job.checkpoint.folder),
        job.config.teacher.path,
    )


def stacked_blocks(job: Job, source: FromBlocks) -> tuple[Params, dict[str, Stats] | None]:
    """All params with the layers of the packed blocks stacked, embedding and head packed where the
    rules say so, and the statistics if any."""
    layers = job.model_config.n_layers
    packed, stats = [], []
    with progress("pack", layers) as bar:
        for n in range(layers):
            one, measured, _ = source.pieces.read_block(source.name(n))
            packed.append(one)
            stats.append(measured)
            bar.update(n + 1)
    params = {path: _stacked(packed, path) if path in packed[0] else job.checkpoint.read(path)
              for path in job.checkpoint.shapes}
    stacked = jax.tree.map(lambda *s: jnp.stack(s), *stats) if stats[0] else None
    key = jax.random.key(job.config.seed)
    params = convert(unflatten_dict(params, sep="/"), job.config.init.end_rules(), key=key)
    return pack(params), stacked


def stacked_stats(job: Job) -> dict[str, Stats]:
    """The statistics of all layers."""
    found = [job.blocks.read_block(block_name(n))[1] for n in range(job.model_config.n_layers)]
    return jax.tree.map(lambda *s: jnp.stack(s), *found)


def _stacked(packed: list[Params], path: str) -> WeightNode:
    """The node `[l, i, o]` of a kernel; the layers are taken out of `packed`, or memory would hold
    them twice."""
    return stacked([jax.tree.map(lambda a: a[0], one.pop(path)) for one in packed])


def _size(job: Job) -> int | None:
    """Bytes of the packed file that is there."""
    file = job.folder.path / "packed" / "model.safetensors"
    return hosts.first_does(lambda: file.stat().st_size if file.exists() else None)


def sizes(job: Job) -> Record:
    """Bits and bytes of the packed folder."""
    found = hosts.first_does(lambda: packed_bytes(job.folder.path / "packed"))
    return {
        "bits_per_weight": found["bits_per_weight"],
        "stored_bits_per_weight": found["stored_bits_per_weight"],
        "linear_bytes": found["linear_bytes"],
        "bytes": found["file_bytes"],
    }
