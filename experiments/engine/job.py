"""What the stages of task ptq share: a model, its text, and its blocks in pieces on disk."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from functools import cached_property
from typing import Protocol

import jax
import numpy as np

from rabit_jax import BadInput, Stats, convert, hosts
from rabit_jax.data.tokens import TokenText
from rabit_jax.experiments.engine.fitting import Measure
from rabit_jax.experiments.engine.folder import RunFolder
from rabit_jax.experiments.engine.inputs import (
    abstract_params,
    check_batches,
    check_settings,
    check_teacher,
)
from rabit_jax.experiments.engine.machine import peak_memory
from rabit_jax.experiments.engine.pieces import Pieces
from rabit_jax.experiments.engine.settings import RunConfig, Tune
from rabit_jax.experiments.engine.sweeps import FromCheckpoint, Sweep
from rabit_jax.experiments.engine.text import Section, Text
from rabit_jax.formats.checkpoint import Checkpoint
from rabit_jax.formats.tokenizer import read_tokenizer
from rabit_jax.models.config import ModelConfig
from rabit_jax.progress import progress
from rabit_jax.train.sharding import make_mesh, param_shardings, replicated, row_shards
from rabit_jax.tree import layer_keys, leaves, match_rules
from rabit_jax.types import Array, Params, Spec, Tokenizer
from rabit_jax.weights.budget import path_specs

STATS = "calibration.safetensors"  # in the run's folder
ALLOCATION = "allocation.json"  # in the pieces: how many paths each matrix of each block has


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
        # Not on all devices unless asked: blocks of a small model are faster on one.
        self.mesh = make_mesh(config.mesh) if config.mesh or hosts.several() else None
        self.text = Text(config, self.mesh)
        self.blocks, self.tuned = Pieces(folder.path / "blocks"), Pieces(folder.path / "tune")
        self.stopped, self.measure = False, Measure()

    def check(self) -> None:
        """Read the text and refuse what cannot work, before anything is written.

        Raises:
          BadInput: rules that select no kernel or one outside the blocks, text that is too short,
            sequences that are longer than the model's.
        """
        check_settings(self.config, self.model_config)
        check_teacher(self.config.teacher.path)
        check_batches(self.config, row_shards(self.mesh) if self.mesh else 1)
        config = self.config
        if config.calibrate.mode != "none":
            self.text.rows(config.calibrate, 0, config.seed + 1)
        if config.tune.epochs:
            self._check_windows(config.tune)
        if config.end_to_end.steps:
            self.text.rows(config.end_to_end, 0, config.seed)
        if config.evaluate.models:
            for text in self.texts().values():
                self.text.windows(text)

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

    def everywhere(
        self, params: Params, stats: dict[str, Stats] | None
    ) -> tuple[Params, dict[str, Stats] | None]:
        """Params and statistics of a block on the mesh, where several processes initialise it
        together; in one process they stay where they are."""
        if self.mesh is None or not hosts.several():
            return params, stats
        placed = hosts.on_mesh(params, param_shardings(params, self.mesh))
        return placed, stats and hosts.on_mesh(stats, replicated(self.mesh))

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

    def forward(self, sweep: Sweep, stage: str, keep: bool) -> None:
        """The forward pass from the last state that is there; `keep` the states it passes."""
        layers = sweep.config.n_layers
        have = max(n for n in range(layers + 1) if sweep.pieces.has(sweep.name("x", n)))
        with progress(stage.replace("_", " "), layers, have) as bar:
            for n in range(have, layers):
                with self.step(stage, n, sweep.tokens.size):
                    sweep.forward(n, sweep.source.block(n))
                if not keep:
                    sweep.pieces.drop(sweep.name("x", n))
                bar.update(n + 1)
                self.check_stop()

    def check_stop(self) -> None:
        """Raise KeyboardInterrupt where a signal came, to any process."""
        self.stopped = hosts.any_asks(self.stopped)
        if self.stopped:
            raise KeyboardInterrupt

    def forget(self) -> None:
        """Drop the calibration tokens, which only one stage reads."""
        self.__dict__.pop("calibration", None)


def block_name(n: int) -> str:
    """Name of a packed block."""
    return f"block-{n:03}.safetensors"


def trained(config: RunConfig) -> bool:
    """Whether what was initialised is trained before it is packed."""
    return bool(config.tune.epochs or config.end_to_end.steps)


def padded(rows: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows `[n, t]` filled up to a multiple of `size`, and the mask of real tokens."""
    real = np.arange(len(rows) + -len(rows) % size) < len(rows)
    tokens = np.pad(rows, ((0, len(real) - len(rows)), (0, 0)))
    return tokens, np.repeat(real[:, None], tokens.shape[1], axis=1)
