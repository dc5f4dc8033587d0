"""The schema of a run: what stands in a config file and what may be overridden as `a.b=c`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, TypeAlias

import jax
import jax.numpy as jnp
from pydantic import Field

from rabit_jax import (
    LLAMA_ENDS,
    LLAMA_LINEARS,
    BadInput,
    ResidualSignSpec,
    convert,
    pack,
)
from rabit_jax.data.sources import DataConfig
from rabit_jax.experiments.engine.config import ADDED
from rabit_jax.models.config import ModelConfig
from rabit_jax.models.generation import HOTTEST
from rabit_jax.train.block_tuning import TuningConfig
from rabit_jax.train.health import HealthConfig
from rabit_jax.train.optimizer import OptimizerConfig, roles
from rabit_jax.types import Array, Params, Spec
from rabit_jax.weights.group_uniform import GroupUniformSpec

# Bounds are checked where a config is loaded, what concerns two settings by `__post_init__`.
# Sizes and steps are 32-bit integers on the device.
MOST = 2**31 - 1
PositiveInt: TypeAlias = Annotated[int, Field(gt=0, le=MOST)]
NonNegativeInt: TypeAlias = Annotated[int, Field(ge=0, le=MOST)]
NonNegative: TypeAlias = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Length: TypeAlias = Annotated[int, Field(ge=2, le=MOST)]  # one is read, the next is predicted


def check_folder_name(name: str, what: str) -> None:
    """Raises BadInput for a name that names no single folder."""
    if not name or "/" in name or name in (".", ".."):
        raise BadInput(f"name is {name!r}: it names {what}, so no '/' and not empty")
    # 200 bytes leave room for the ends of names of temporary folders beside it.
    if not name.isprintable() or len(name.encode(errors="replace")) > 200:
        raise BadInput(
            f"name is {name[:60]!r}: it names {what}, so printable characters alone and at most "
            "200 bytes"
        )


@dataclass(frozen=True)
class Compute:
    """How models run, whatever they were stored as.

    Attributes:
      dtype: dtype of the matrix products; "" takes the model's own.
      remat: recompute each block in the backward pass instead of keeping its activations.
      chunk: positions per piece of the vocabulary projection; 0 takes a sequence at once.
      remat_keep: what `remat` keeps all the same: "nothing", or the results of matrix "products".
      attention_block: queries per piece of attention, whose scores then take that many rows for
        each head; 0 makes the whole matrix of scores. Results are the same.
      teacher: what the teacher of a distillation is held in: "" as it is computed with, float32
        here; "bfloat16", which changes nothing where products are in bfloat16; or "int8", the
        kernels of the blocks rounded to 8 bits with a scale for each output, the rest in bfloat16.
        Measurements between steps read the teacher as it is again.
    """

    dtype: Literal["", "float32", "bfloat16", "float16"] = ""
    remat: bool = False
    chunk: NonNegativeInt = 256
    remat_keep: Literal["nothing", "products"] = field(default="nothing", metadata={ADDED: True})
    attention_block: NonNegativeInt = field(default=0, metadata={ADDED: True})
    teacher: Literal["", "bfloat16", "int8"] = field(default="", metadata={ADDED: True})

    def applied(self, config: ModelConfig) -> ModelConfig:
        """The decoder's settings with these."""
        return replace(
            config, dtype=self.dtype or config.dtype, remat=self.remat, remat_keep=self.remat_keep,
            attention_block=self.attention_block)

    def held(self, teacher: Params) -> Params:
        """The teacher's params as a distillation holds them; under `eval_shape` their shapes."""
        if not self.teacher:
            return teacher

        if self.teacher == "int8":
            rounded = convert(teacher, [(LLAMA_LINEARS, GroupUniformSpec(bits=8, group=0))])
            teacher = pack(rounded)

        def cast(leaf: Array, role: str) -> Array:
            matrix = role in ("matrix", "embedding", "head")
            return leaf.astype(jnp.bfloat16) if matrix else leaf

        return jax.tree.map(cast, teacher, roles(teacher))


@dataclass(frozen=True)
class Shape:
    """Shape of a teacher that is trained here; unused where `teacher.path` names one.

    Widths that are multiples of 256 pack without padding.
    """

    d_model: PositiveInt = 256
    n_layers: PositiveInt = 2
    n_heads: PositiveInt = 4
    n_kv_heads: PositiveInt = 4
    head_dim: PositiveInt = 64
    d_hidden: PositiveInt = 768
    tied_head: bool = True
    rope_theta: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10000.0
    max_position: PositiveInt = 2048


@dataclass(frozen=True)
class Training:
    """One training stage.

    Attributes:
      steps: optimiser steps.
      batch_size: sequences per step.
      length: tokens per sequence.
      accumulate: pieces that a batch is cut into to save memory.
      log_every: steps between lines of metrics.jsonl.
      save_every: steps between checkpoints.
      watch_every: steps between measurements on the evaluation text: perplexity, and for a
        quantised student diagnostics and sign flips.
      optimizer: optimiser, learning rates, what is frozen.
      health: what a step is tested for, and what is done about a fault.
    """

    steps: PositiveInt = 300
    batch_size: PositiveInt = 8
    length: Length = 256
    accumulate: PositiveInt = 1
    log_every: PositiveInt = 10
    save_every: PositiveInt = 100
    watch_every: PositiveInt = 100
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    health: HealthConfig = field(default=HealthConfig(), metadata={ADDED: True})

    def __post_init__(self):
        """Raises BadInput where the pieces of a batch are not equal."""
        if self.batch_size % self.accumulate:
            raise BadInput(
                f"accumulate is {self.accumulate}: it must divide batch_size, which is "
                f"{self.batch_size}"
            )


@dataclass(frozen=True)
class Teacher(Training):
    """The full-precision model: a folder or hub id, or one trained here on the run's own text.

    Attributes:
      path: folder or hub id of a Llama-family model; "" trains a model of the section `model`.
    """

    path: str = ""


@dataclass(frozen=True)
class Calibrate:
    """The calibration pass.

    Attributes:
      mode: "full" measures inputs and output gradients; for task ptq also "activations", inputs
        alone without a backward pass, or "none", which reads no text.
      sequences: how many training windows it measures.
      batch_size: sequences per gradient pass; the last one may hold fewer.
      length: tokens per sequence.
      labels: next tokens of the data, or drawn from the teacher.
      clip: percentile at which the norms of single tokens are clipped; 100 does not clip.
    """

    mode: Literal["full", "activations", "none"] = "full"
    sequences: PositiveInt = 128
    batch_size: PositiveInt = 8
    length: Length = 256
    labels: Literal["data", "sampled"] = "data"
    clip: Annotated[float, Field(gt=0, le=100)] = 100.0


@dataclass(frozen=True)
class PathSpec:
    """A representation of their own for some of the matrices.

    Attributes:
      paths: a regular expression on parameter paths such as "layers/attn/[kv]/kernel".
      spec: as `init.spec`.
    """

    paths: str
    spec: Spec = field(default_factory=ResidualSignSpec)


@dataclass(frozen=True)
class Init:
    """What is quantised, and how it starts.

    Attributes:
      quantise: regular expressions on parameter paths such as "layers/attn/q/kernel".
      keep: paths that stay as they are although `quantise` names them.
      spec: representation and initialisation; `spec.type` names it, the other keys are its own.
      by_path: other representations for some paths, such as a larger k; the first that matches
        goes before `quantise` and after `keep`.
      budget: stored bits per weight of the blocks, such as 2.2, which are then spent where they
        save most error: each layer of each matrix gets its own k, at most that of its spec (type
        residual). 0 gives all of them that k.
      embedding: representation of the embedding, and of the head where it is not tied; null keeps
        them in 16 bits. They are not calibrated, and train unless `qat.optimizer.freeze` names
        embedding and head, as it does by default. A path in `by_path` goes before it.
    """

    quantise: tuple[str, ...] = (LLAMA_LINEARS,)
    keep: tuple[str, ...] = ()
    spec: Spec = field(default_factory=ResidualSignSpec)
    by_path: tuple[PathSpec, ...] = field(default=(), metadata={ADDED: True})
    budget: NonNegative = field(default=0.0, metadata={ADDED: True})
    embedding: Spec | None = field(default=None, metadata={ADDED: True})

    def rules(self) -> list[tuple[str, Spec | None]]:
        """The rules of `convert`."""
        kept: list[tuple[str, Spec | None]] = [(pattern, None) for pattern in self.keep]
        kept += [(one.paths, one.spec) for one in self.by_path]
        kept += [(LLAMA_ENDS, self.embedding)] if self.embedding else []
        return kept + [(pattern, self.spec) for pattern in self.quantise]

    def block_rules(self) -> list[tuple[str, Spec | None]]:
        """Those of the blocks' kernels, which are calibrated."""
        return [(LLAMA_ENDS, None), *self.rules()]

    def end_rules(self) -> list[tuple[str, Spec | None]]:
        """Those of embedding and head, which are not."""
        return [("layers/.*", None), *self.rules()]

    def __str__(self) -> str:
        """The specs as results name them."""
        others = [f"{one.paths}: {one.spec}" for one in self.by_path]
        others += [f"embedding: {self.embedding}"] if self.embedding else []
        others += [f"budget: {self.budget:g} bits"] if self.budget else []
        return "; ".join([str(self.spec), *others])


@dataclass(frozen=True)
class Nested:
    """Training of one model of k sign paths whose first paths can be models of their own.

    Attributes:
      nested: numbers of sign paths, such as [1, 2, 3], whose models are trained together: the
        packed model of k = 3 can then be read with `--paths 1` and 2 as well. A step costs a pass
        for each. Empty trains the whole model alone.
      nested_weights: of their losses, in that order; empty weighs all alike.
    """

    nested: tuple[PositiveInt, ...] = field(default=(), metadata={ADDED: True})
    nested_weights: tuple[NonNegative, ...] = field(default=(), metadata={ADDED: True})

    def __post_init__(self):
        """Raises BadInput for sizes or weights that do not fit."""
        super().__post_init__()  # pyright: ignore  # of the settings that these are part of
        if len(set(self.nested)) != len(self.nested):
            raise BadInput(f"nested is {list(self.nested)}: name each number of paths once")
        if self.nested_weights and len(self.nested_weights) != len(self.nested):
            raise BadInput(f"nested_weights has {len(self.nested_weights)} weights for the "
                           f"{len(self.nested)} numbers of paths in nested: give one for each")
        if self.nested_weights and not sum(self.nested_weights):
            raise BadInput("nested_weights are all 0: nothing would train")

    @property
    def prefixes(self) -> dict[int, float]:
        """Weight of the loss by number of paths, where training is nested."""
        weights = self.nested_weights or (1.0,) * len(self.nested)
        return dict(sorted(zip(self.nested, weights, strict=True)))


@dataclass(frozen=True)
class Tune(Nested, TuningConfig):
    """Tuning of block after block on its output, for task ptq: see `train.block_tuning`.

    Attributes:
      epochs: most passes over the windows of a block; 0 leaves tuning out.
      sequences: training windows, those held out included.
      length: tokens of a window.
      held_out: how many of the windows choose the epoch and are not trained on.
      inputs: of a block: what the blocks before it give once tuned and packed, "quantised", or
        what they give in full precision, "teacher".
      keep_latents: write the tuned latents to disk too, in the size of the blocks in float32, so
        that the stage end to end can train them.
      The others are those of `TuningConfig`, batch_size, patience, optimizer, and of `Nested`: the
        loss of a block is the geometric mean of those of its models, each from its own inputs.
    """

    epochs: NonNegativeInt = 0
    sequences: PositiveInt = 128
    length: Length = 512
    held_out: PositiveInt = 8
    inputs: Literal["quantised", "teacher"] = "quantised"
    keep_latents: bool = False

    def __post_init__(self):
        """Raises BadInput where nothing is left to train on."""
        super().__post_init__()
        if self.held_out >= self.sequences:
            raise BadInput(
                f"held_out is {self.held_out} of {self.sequences} sequences: leave some to train on"
            )


@dataclass(frozen=True)
class EndToEnd(Nested, Training):
    """Distillation of the whole student behind tuning, for task ptq.

    Attributes:
      steps: optimiser steps; 0 leaves this stage out.
      gamma: weight of the hidden-state error, as of task qat.
      watch_every: not read.
      optimizer: by default of scales, levels and norms alone: signs and codes are constant then,
        and the state is small. Without "latent" in `freeze` the latents that `tune.keep_latents`
        has kept train too.
    """

    steps: NonNegativeInt = 0
    gamma: NonNegative = 0.0
    optimizer: OptimizerConfig = OptimizerConfig(
        "relative", lr=2e-3, warmup=0.1, freeze=("embedding", "head", "matrix", "latent")
    )

    @property
    def trains_latents(self) -> bool:
        """Whether latents train."""
        return "latent" not in self.optimizer.freeze


@dataclass(frozen=True)
class Qat(Nested, Training):
    """Distillation of the quantised student.

    Attributes:
      gamma: weight of the hidden-state error, relative to the teacher's state at every token of
        every layer; 0 leaves it out.
      project_scales: keep scales positive after every step.
      teacher_top: how many of the teacher's likeliest tokens a stage before this one keeps on disk
        for every position of every step, so that a step runs no teacher; 0 runs it. The KL is
        exact on the kept tokens, all others count as one. Needs gamma 0, for hidden states are not
        kept.
    """

    gamma: NonNegative = 1.0
    project_scales: bool = True
    teacher_top: NonNegativeInt = field(default=0, metadata={ADDED: True})
    watch_every: PositiveInt = 50
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(freeze=("embedding", "head"))
    )

    def __post_init__(self):
        """Raises BadInput where more than its logits is wanted of a teacher that is not run."""
        super().__post_init__()
        if self.teacher_top and self.gamma:
            raise BadInput(
                f"teacher_top is {self.teacher_top} and gamma {self.gamma:g}: only logits are "
                "kept, so set gamma to 0, or teacher_top to 0 to run the teacher in every step"
            )
        if self.teacher_top and self.nested:
            raise BadInput("teacher_top and nested do not go together: leave one of them out")


@dataclass(frozen=True)
class Evaluate:
    """Perplexity and diagnostics on the evaluation text.

    Attributes:
      context: tokens per window; always stated with a perplexity.
      batch_size: windows per pass.
      windows: how many windows; 0 takes all.
      watch_windows: how many windows the measurements during training read.
      diagnostic_windows: how many windows the diagnostics read.
      baselines: score greedy SVID and round-to-nearest too.
      part: which windows of the evaluation text: "all"; or, where one run chooses a setting for
        another, "search" for the last quarter of them and "report" for the others.
      models: which models task ptq scores; where empty, no evaluation text is read. "init" is the
        model before tuning, "tuned" that between tuning and the stage end to end.
    """

    context: Length = 256
    batch_size: PositiveInt = 8
    windows: NonNegativeInt = 0
    watch_windows: PositiveInt = 64
    diagnostic_windows: PositiveInt = 16
    baselines: bool = True
    models: tuple[Literal["teacher", "init", "tuned", "packed"], ...] = ("teacher", "packed")
    part: Literal["all", "search", "report"] = field(default="all", metadata={ADDED: True})


@dataclass(frozen=True)
class Generate:
    """Samples for the report.

    Attributes:
      prompts: what to continue.
      max_new_tokens: length of each continuation.
      temperature: 0 is greedy.
      top_p: nucleus.
    """

    prompts: tuple[str, ...] = ("The function returns", "If the file does not exist,")
    max_new_tokens: PositiveInt = 48
    temperature: Annotated[float, Field(ge=0, le=HOTTEST)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0


@dataclass(frozen=True)
class Hosts:
    """A run in several processes; which they are the environment says.

    Attributes:
      start_timeout: seconds in which all processes must have started.
      heartbeat: seconds of silence after which a process counts as dead and the run ends.
    """

    start_timeout: PositiveInt = 300
    heartbeat: PositiveInt = 100


@dataclass(frozen=True)
class RunConfig:
    """A whole run.

    Attributes:
      task: "qat" trains the quantised model; "ptq" packs a given one as it is initialised, block by
        block from disk, or tuned after that where `tune` and `end_to_end` ask for it, and reads of
        the sections below data, teacher.path, compute, calibrate, init, tune, end_to_end and
        evaluate.
      name: name of the run's folder.
      output: where run folders lie.
      seed: of initial weights, batches and samples.
      mesh: devices per axis of data, fsdp and tensor, such as {fsdp: 4, tensor: 2}; what it leaves
        is on data. Batches are split over data and fsdp, parameters and optimiser state over fsdp
        and tensor.
      hosts: limits of time for a run in several processes; it and `mesh` may differ where a run is
        resumed.
      wandb: project of Weights & Biases that metrics are sent to as well; "" sends nothing.
    """

    task: Literal["qat", "ptq"] = "qat"
    name: str = "run"
    output: str = "runs"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    mesh: dict[str, PositiveInt] = field(default_factory=dict)
    wandb: str = ""
    hosts: Hosts = field(default=Hosts(), metadata={ADDED: True})
    compute: Compute = field(default_factory=Compute)
    data: DataConfig = field(default_factory=DataConfig)
    model: Shape = field(default_factory=Shape)
    teacher: Teacher = field(default_factory=Teacher)
    calibrate: Calibrate = field(default_factory=Calibrate)
    init: Init = field(default_factory=Init)
    tune: Tune = field(default=Tune(), metadata={ADDED: True})
    end_to_end: EndToEnd = field(default=EndToEnd(), metadata={ADDED: True})
    qat: Qat = field(default_factory=Qat)
    evaluate: Evaluate = field(default_factory=Evaluate)
    generate: Generate = field(default_factory=Generate)

    def __post_init__(self):
        """Raises BadInput for a name that is no folder name, or a mode that the task has not."""
        check_folder_name(self.name, "the run's folder")
        if self.task == "qat" and self.calibrate.mode != "full":
            raise BadInput(
                f"calibrate.mode is {self.calibrate.mode!r}: task qat needs 'full', the other "
                "modes belong to task ptq"
            )
        if self.task == "qat" and (self.tune.epochs or self.end_to_end.steps):
            raise BadInput("tune.epochs and end_to_end.steps belong to task ptq: set task to ptq")
        latents = self.end_to_end.steps and self.end_to_end.trains_latents
        if latents and not (self.tune.epochs and self.tune.keep_latents):
            raise BadInput(
                "end_to_end.optimizer.freeze leaves latents to train, which are not kept: set "
                "tune.epochs and tune.keep_latents, or add latent to it"
            )
