"""The first and last stages of task ptq: a full-precision model in, a packed model out.

A forward pass keeps the input of every block on disk, a backward pass brings the gradients; each
block is calibrated, initialised, packed and written before the next is read, so that one block is
in memory. A run that was stopped goes on at the block that it had reached. Stages that train come
between the start and the scores, see `tuning` and `end_to_end`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from rabit_jax import BadInput, Stats, convert, pack
from rabit_jax.calibration.blockwise import block_nodes, init_block, relative_error
from rabit_jax.calibration.outliers import record_limbs
from rabit_jax.data.tokens import TokenText
from rabit_jax.evaluate.perplexities import from_nats
from rabit_jax.experiments.engine.fitting import Measure
from rabit_jax.experiments.engine.folder import RunFolder
from rabit_jax.experiments.engine.inputs import (
    abstract_params,
    check_lengths,
    check_rules,
    check_teacher,
    specs_of,
    write_stats,
)
from rabit_jax.experiments.engine.machine import peak_memory
from rabit_jax.experiments.engine.measure import figures
from rabit_jax.experiments.engine.pieces import Pieces
from rabit_jax.experiments.engine.records import Record
from rabit_jax.experiments.engine.settings import RunConfig, Tune
from rabit_jax.experiments.engine.signals import stopping_between_steps
from rabit_jax.experiments.engine.stages import Ids, Read, Stage
from rabit_jax.experiments.engine.sweeps import (
    FromBlocks,
    FromCheckpoint,
    FromParams,
    Source,
    Sweep,
)
from rabit_jax.experiments.engine.text import Section, Text
from rabit_jax.formats.checkpoint import Checkpoint
from rabit_jax.formats.folder import fingerprint, read_generation
from rabit_jax.formats.packed_model import load_packed, packed_bytes, save_packed
from rabit_jax.formats.tokenizer import read_tokenizer
from rabit_jax.models.config import ModelConfig
from rabit_jax.progress import progress
from rabit_jax.train.sharding import make_mesh, row_shards
from rabit_jax.tree import layer_keys, leaves, match_rules
from rabit_jax.types import Array, Params, Spec, Tokenizer
from rabit_jax.weights.budget import (
    Option,
    check_budget,
    path_specs,
    sensitivity,
    share_out,
    stored_bits,
)
from rabit_jax.weights.leaves import WeightNode
from rabit_jax.weights.mixed_stack import stacked


class Windows(Section, Protocol):
    """A section of the config that says how many windows are read."""

    @property
    def sequences(self) -> int:
        """How many."""
        ...


class Job:
    """A post-training run: its model, its text, and its pieces on disk.

    Attributes:
      blocks: inputs, gradients and packed blocks.
      tuned: inputs, outputs and packed blocks of tuning.
      stopped: whether the run shall end after this block.
      measure: what is measured of the stages that train.
    """

    def __init__(self, config: RunConfig, folder: RunFolder, checkpoint: Checkpoint):
        """Reads nothing yet."""
        self.config, self.folder, self.checkpoint = config, folder, checkpoint
        self.text = Text(config, None)
        self.blocks, self.tuned = Pieces(folder.path / "blocks"), Pieces(folder.path / "tune")
        self.stopped, self.measure = False, Measure()
        # Not on all devices unless asked: blocks of a small model are faster on one.
        self.mesh = make_mesh(config.mesh) if config.mesh else None

    def _check_rows(self) -> None:
        """Raises BadInput where a batch does not divide over the mesh."""
        parts = row_shards(self.mesh) if self.mesh else 1
        for name in ("calibrate", "tune", "end_to_end", "evaluate"):
            size = getattr(self.config, name).batch_size
            if size % parts:
                raise BadInput(f"{name}.batch_size is {size} for {parts} parts of the mesh (data x "
                               f"fsdp): make it a multiple of {parts}")

    def check(self) -> None:
        """Read the text and refuse what cannot work, before anything is written.

        Raises:
          BadInput: rules that select no kernel or one outside the blocks, text that is too short,
            sequences that are longer than the model's.
        """
        check_rules(match_rules(abstract_params(self.model_config), self.config.init.rules()))
        if self.config.init.budget:
            check_budget(self.config.init.budget, self.specs, self.shapes)
        check_teacher(self.config.teacher.path)
        self._check_rows()
        config, lengths = self.config, {}
        if config.calibrate.mode != "none":
            self.text.rows(config.calibrate, 0, config.seed + 1)
            lengths["calibrate"] = config.calibrate.length
        if config.tune.epochs:
            self._check_windows(config.tune)
            lengths["tune"] = config.tune.length
        if config.end_to_end.steps:
            self.text.rows(config.end_to_end, 0, config.seed)
            lengths["end_to_end"] = config.end_to_end.length
        if config.evaluate.models:
            for text in self.texts().values():
                self.text.windows(text)
            lengths["evaluate"] = config.evaluate.context
        check_lengths(lengths, self.model_config.max_position)

    def _check_windows(self, section: Tune) -> None:
        """Raises BadInput where windows would repeat, as those held out then were trained on."""
        found = len(self.text.train.tokens) // section.length - 1
        if found < section.sequences:
            raise BadInput(
                f"tune.sequences is {section.sequences}: the training text has {found} windows of "
                f"{section.length} tokens; give more text or lower it"
            )

    @cached_property
    def model_config(self) -> ModelConfig:
        """The model's own config with the run's compute dtype."""
        found = self.checkpoint.config
        return dataclasses.replace(found, dtype=self.config.compute.dtype or found.dtype)

    @cached_property
    def specs(self) -> dict[str, Spec]:
        """Spec by path of every kernel of a block that will be packed."""
        return match_rules(abstract_params(self.model_config), self.config.init.block_rules())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape `[l, i, o]` of every kernel of a block that will be packed, by path."""
        found = dict(leaves(abstract_params(self.model_config)))
        return {path: found[path].shape for path in self.specs}

    def layer_specs(self, n: int) -> dict[str, Spec]:
        """Spec by path of the kernels of block n: with a budget each has its own k."""
        if not self.config.init.budget:
            return self.specs
        record = self.blocks.record(ALLOCATION)
        assert record is not None, "layer_specs is called once the paths are chosen"
        return {path: path_specs(spec)[record["k"][path][n] - 1]
                for path, spec in self.specs.items()}

    def abstract_student(self) -> Params:
        """Shapes of the whole model, initialised and not yet packed."""
        return jax.eval_shape(
            lambda p: convert(p, self.config.init.rules()), abstract_params(self.model_config)
        )

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokeniser; None where the folder has none and no text is read."""
        return read_tokenizer(self.checkpoint.folder, self.checkpoint.config)

    def keys(self) -> dict[str, Array]:
        """Keys of the initialisation by path, one for each layer."""
        lead = {path: (self.model_config.n_layers,) for path in self.specs}
        return layer_keys(jax.random.key(self.config.seed), lead)

    @cached_property
    def calibration(self) -> Sweep | None:
        """The passes over the calibration text; None where the run is data-free."""
        section = self.config.calibrate
        if section.mode == "none":
            return None
        return self.sweep(section, self.config.seed + 1, self.blocks)

    def sweep(self, section: Windows, seed: int, pieces: Pieces, prefix: str = "") -> Sweep:
        """The passes of the full-precision model over the training windows of a section."""
        size = section.batch_size
        steps = range(-(-section.sequences // size))
        found = np.concatenate([self.text.rows(section, step, seed) for step in steps])
        return Sweep(self.model_config, FromCheckpoint(self.checkpoint), pieces,
                     *padded(found[: section.sequences], size), size, prefix, self.mesh)

    def texts(self) -> dict[str, TokenText]:
        """The texts that models are scored on."""
        found = {"held_out": self.text.held_out, "unseen": self.text.unseen}
        return {name: text for name, text in found.items() if text}

    @contextlib.contextmanager
    def step(self, stage: str, n: int, tokens: int) -> Iterator[dict[str, float]]:
        """Time a piece of work and log it; fields put into the dict go into the line too."""
        begin, fields = time.perf_counter(), {}
        yield fields
        seconds = time.perf_counter() - begin
        self.folder.metrics.log({"stage": stage, "step": n, "tokens": tokens, "seconds": seconds,
                                 "peak_memory_bytes": peak_memory(), **fields})

    def check_stop(self) -> None:
        """Raise KeyboardInterrupt where a signal came."""
        if self.stopped:
            raise KeyboardInterrupt

    def forget(self) -> None:
        """Drop the calibration tokens, which only one stage reads."""
        self.__dict__.pop("calibration", None)


STATS = "calibration.safetensors"  # in the run's folder


ALLOCATION = "allocation.json"  # in the pieces: how many paths each matrix of each block has


def block_name(n: int) -> str:
    """Name of a packed block."""
    return f"block-{n:03}.safetensors"


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
        write_stats(job.folder.path / STATS, stacked_stats(job))
    records = [job.blocks.read_block(block_name(n))[2]["relative_error"] for n in layers]
    return {
        "tokens": 0 if calibration is None else calibration.tokens.size,
        "relative_error": {path: [record[path] for record in records] for path in job.specs},
        **({"k": chosen["k"]} if (chosen := job.blocks.record(ALLOCATION)) else {}),
        **({} if trained(job.config) else sizes(job)),
    }


def trained(config: RunConfig) -> bool:
    """Whether what was initialised is trained before it is packed."""
    return bool(config.tune.epochs or config.end_to_end.steps)


def sizes(job: Job) -> Record:
    """Bits and bytes of the packed folder."""
    found = packed_bytes(job.folder.path / "packed")
    return {
        "bits_per_weight": found["bits_per_weight"],
        "stored_bits_per_weight": found["stored_bits_per_weight"],
        "linear_bytes": found["linear_bytes"],
        "bytes": found["file_bytes"],
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
    for n in range(layers + 1):
        for kind in ("x", "dx"):
            blocks.drop(f"{kind}-{n:03}")


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
        if job.config.init.budget:
            errors = _write_options(job, n, params, stats, keys)
        else:
            packed, errors = init_block(params, n, job.specs, stats, keys)
            job.blocks.write_block(block_name(n), packed, stats, {"relative_error": errors})
        fields["relative_error"] = sum(errors.values()) / len(errors)
    if sweep:
        job.blocks.drop(sweep.name("x", n))
        job.blocks.drop(sweep.name("dx", n + 1))
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
            weighed[path].append(float(sensitivity(kernels[path][None], node, own)[0]))
            found[path] = float(relative_error(kernels[path], node)[0])
            packed[path] = node.pack(f"{path} of layer {n}")
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
    for n in layers:
        for k in most:
            blocks.drop(option_name(n, k))


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
        _check_disk(job, sweep)
        sweep.embed()
    if section.mode == "full" and not blocks.has(sweep.name("dx", layers)):
        _forward(job, sweep, "forward", keep=True)
        with job.step("head", layers, sweep.tokens.size):
            key = jax.random.key(job.config.seed)
            sweep.head_gradient(job.config.compute.chunk, section.labels, key)
        blocks.drop(sweep.name("x", layers))


def _forward(job: Job, sweep: Sweep, stage: str, keep: bool) -> None:
    """The forward pass from the last state that is there; `keep` the states it passes."""
    layers = sweep.config.n_layers
    have = max(n for n in range(layers + 1) if sweep.pieces.has(sweep.name("x", n)))
    with progress(stage.replace("_", " "), layers, have) as bar:
        for n in range(have, layers):
            with job.step(stage, n, sweep.tokens.size):
                sweep.forward(n, sweep.source.block(n))
            if not keep:
                sweep.pieces.drop(sweep.name("x", n))
            bar.update(n + 1)
            job.check_stop()


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


def pack_model(job: Job) -> None:
    """Put the packed blocks together to the folder `packed/`, and keep the statistics beside it."""
    folder, done = job.folder.path / "packed", job.blocks.record("packed.json")
    if done and _size(folder) == done["bytes"]:
        return
    layers = job.model_config.n_layers
    with job.step("pack", layers, 0):
        params, stats = stacked_blocks(job, FromBlocks(job.checkpoint, job.blocks, block_name))
        if stats:
            write_stats(job.folder.path / STATS, stats)
        write_packed(job, params, stats)
    job.blocks.write_record("packed.json", {"bytes": _size(folder)})


def write_packed(job: Job, params: Params, stats: dict[str, Stats] | None) -> None:
    """Write `packed/` from packed params and the statistics, which choose the limbs."""
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


def _size(folder: Path) -> int | None:
    file = folder / "model.safetensors"
    return file.stat().st_size if file.exists() else None


# The stage that makes each model where a run trains.
_MADE_BY = {"teacher": "quantise", "init": "quantise", "tuned": "tune", "packed": "pack"}


def _score(label: str, source: Callable[[Job], Source]) -> Stage[Job]:
    """The stage that scores a model on each text, with one block in memory."""
    pieces, held_out = f"scores/{label}", f"perplexity_{label}"
    # How the lines of each text are named in metrics.jsonl.
    names = {"held_out": held_out, "unseen": f"{held_out}_unseen"}

    def work(job: Job, continues: bool) -> Record:
        found = {name: _perplexity(job, Pieces(job.folder.path / pieces), name, names[name], source)
                 for name in job.texts()}
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


def _perplexity(
    job: Job, pieces: Pieces, name: str, stage: str, source: Callable[[Job], Source]
) -> Record:
    """Perplexity on one text; a result that is there is read."""
    if record := pieces.record(f"{name}.json"):
        return record
    text = job.texts()[name]
    rows, size = job.text.windows(text), job.config.evaluate.batch_size
    tokens, mask = padded(rows, size)
    sweep = Sweep(job.model_config, source(job), pieces, tokens, mask, size, f"{name}-", job.mesh)
    states = [sweep.name("x", n) for n in range(job.model_config.n_layers + 1)]
    if not any(map(pieces.has, states)):
        sweep.embed()
    with stopping_between_steps(job, "after this block"):
        _forward(job, sweep, stage, keep=False)
    with job.step(stage, len(states), tokens.size):
        nats = sweep.nats(job.config.compute.chunk)
    found = figures(from_nats(nats, len(rows), rows.shape[1], text.bytes, len(text.tokens)))
    pieces.write_record(f"{name}.json", found)
    pieces.drop(states[-1])
    return found


def padded(rows: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows `[n, t]` filled up to a multiple of `size`, and the mask of real tokens."""
    real = np.arange(len(rows) + -len(rows) % size) < len(rows)
    tokens = np.pad(rows, ((0, len(real) - len(rows)), (0, 0)))
    return tokens, np.repeat(real[:, None], tokens.shape[1], axis=1)


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
SCORES = (
    _score("teacher", lambda job: FromCheckpoint(job.checkpoint)),
    _score("init", lambda job: FromBlocks(job.checkpoint, job.blocks, block_name)),
    _score("tuned", lambda job: FromBlocks(job.checkpoint, job.tuned, block_name)),
    _score("packed", lambda job: FromParams(load_packed(job.folder.path / "packed")[1])),
)
