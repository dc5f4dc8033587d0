"""One distillation step: RaBiT against dense training and against k independent latents.

The three students have the same decoder, teacher, loss, batch and optimiser (Muon on matrices and
latents, AdamW on scales and norms, embedding and head frozen) and start from the same params:

  dense        full-precision kernels, no quantisation: the same distillation without RaBiT
  residual     RaBiT, one latent from which all sign paths are derived
  independent  standard quantisation-aware training, one latent for each path

Steps are interleaved (dense, residual, independent, dense, ...) in one process on one device, after
one step of each that is not counted. step_seconds is the median, step_seconds_min the minimum;
step_time_ratio and step_time_ratio_min are those over dense's. state_bytes counts all that training
keeps between steps: trained params, latents, scales, optimiser state. peak_memory_bytes is the
compiler's own plan for one step, arguments + results + temporaries - results that reuse arguments,
teacher included; null where the compiler gives none.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import jax

from rabit_jax import LLAMA_LINEARS, IndependentSignSpec, ResidualSignSpec, convert
from rabit_jax.errors import BadInput
from rabit_jax.models.config import ModelConfig
from rabit_jax.models.decoder import Decoder, init_params
from rabit_jax.progress import Progress, progress, say
from rabit_jax.train.losses import distillation_loss
from rabit_jax.train.optimizer import OptimizerConfig, make_optimizer, partition, roles
from rabit_jax.train.step import Loss, TrainState, init_state, make_step
from rabit_jax.tree import tree_bytes
from rabit_jax.types import Batch, Json, Params

EXAMPLES = """examples:
  python -m experiments.bench step
  python -m experiments.bench step --json > step.json
  python -m experiments.bench step --width 512 --tokens 4096 --dtype bfloat16 --k 3 --gamma 1
"""
COLUMNS = {name: name for name in (
    "impl", "step_seconds", "step_time_ratio", "step_seconds_min", "step_time_ratio_min",
    "state_bytes", "state_bytes_ratio", "peak_memory_bytes")}
HEAD_DIM = 64
MAX_LENGTH = 512
OPTIMIZER = OptimizerConfig(freeze=("embedding", "head"))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("--width", type=int, default=1024, help="model width d, a multiple of 64 (default 1024)")
    add("--layers", type=int, default=2, help="number of blocks (default 2)")
    add("--tokens", type=int, default=2048,
        help="tokens of a batch, in rows of at most 512 (default 2048)")
    add("--vocab", type=int, default=4096, help="vocabulary (default 4096)")
    add("--steps", type=int, default=5, help="timed steps of each student (default 5)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32",
        help="dtype of the matrix products; state is float32 (default float32)")
    add("--k", type=int, default=2, help="sign paths, 1 to 4 (default 2)")
    add("--gamma", type=float, default=0.0,
        help="weight of the hidden states' error in the loss (default 0)")


def check(options: argparse.Namespace) -> None:
    """Raise BadInput for an option out of its range."""
    for name in ("width", "layers", "tokens", "vocab", "steps"):
        if getattr(options, name) < 1:
            raise BadInput(f"--{name} is {getattr(options, name)}, wanted a positive integer")
    if options.width % HEAD_DIM:
        raise BadInput(f"--width is {options.width}, wanted a multiple of {HEAD_DIM}")
    if options.tokens > MAX_LENGTH and options.tokens % MAX_LENGTH:
        raise BadInput(
            f"--tokens is {options.tokens}, wanted at most {MAX_LENGTH} or a multiple of it")
    if options.gamma < 0:
        raise BadInput(f"--gamma is {options.gamma}, wanted 0 or more")
    ResidualSignSpec(k=options.k)


@dataclass
class Variant:
    """A student under measurement: its compiled step, the arguments, and the times so far.

    Attributes:
      step: compiled `(state, frozen, teacher, batch) -> (state, metrics)`, which donates its state.
      state: replaced by each step.
      rest: frozen params, teacher, batch.
      seconds: one entry per timed step.
    """

    step: jax.stages.Compiled
    state: TrainState
    rest: tuple
    seconds: list[float]

    def run(self) -> float:
        """One step; returns its seconds."""
        begin = time.perf_counter()
        self.state, metrics = self.step(self.state, *self.rest)
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - begin

    def peak_memory(self) -> int | None:
        """Bytes the compiler plans for one step, see the head of this file."""
        plan = self.step.memory_analysis()
        if plan is None:
            return None
        return (plan.argument_size_in_bytes + plan.output_size_in_bytes
                + plan.temp_size_in_bytes - plan.alias_size_in_bytes)


def model_config(options: argparse.Namespace) -> ModelConfig:
    """A Llama of the asked width: heads of 64, hidden width 8/3 d up to a multiple of 64."""
    heads = options.width // HEAD_DIM
    hidden = -(-8 * options.width // (3 * HEAD_DIM)) * HEAD_DIM
    return ModelConfig(
        vocab_size=options.vocab, d_model=options.width, n_layers=options.layers, n_heads=heads,
        n_kv_heads=heads, head_dim=HEAD_DIM, d_hidden=hidden, dtype=options.dtype)


def students(options: argparse.Namespace, params: Params) -> dict[str, Params]:
    """The three params trees, all from `params`; the scales' fit is short, values cost no time."""
    fit = {"k": options.k, "rounds": 1}
    specs = {"residual": ResidualSignSpec(**fit), "independent": IndependentSignSpec(**fit)}
    return {"dense": params} | {
        name: convert(params, [(LLAMA_LINEARS, spec)]) for name, spec in specs.items()}


def build(
    options: argparse.Namespace, names: Collection[str] = ("dense", "residual", "independent")
) -> dict[str, Variant]:
    """Compile the step of every student, or of those that are named."""
    config = model_config(options)
    model = Decoder(config)
    init = jax.jit(lambda key: init_params(config, key))
    teacher = init(jax.random.key(1))
    length = min(options.tokens, MAX_LENGTH)
    shape = (options.tokens // length, length)
    batch = {"tokens": jax.random.randint(jax.random.key(2), shape, 0, options.vocab)}

    def loss(params, teacher, batch):
        return distillation_loss(model, params, teacher, batch, options.gamma)

    found = {}
    for name, params in students(options, init(jax.random.key(0))).items():
        if name not in names:
            continue
        found[name] = compile_step(loss, params, teacher, batch, options.steps + 1)
        say(f"compiled {name}")
    return found


def compile_step(
    loss: Loss, params: Params, teacher: Params | None, batch: Batch, steps: int
) -> Variant:
    """The step of one student, as training runs it: Muon and AdamW, its state donated."""
    names = roles(params)
    trainable, frozen = partition(params, names, OPTIMIZER.freeze)
    names, _ = partition(names, names, OPTIMIZER.freeze)
    optimizer = make_optimizer(OPTIMIZER, names, steps)
    state = jax.jit(lambda tree: init_state(tree, optimizer))(trainable)
    step = jax.jit(make_step(loss, optimizer, names), donate_argnums=0)
    rest = (frozen, teacher, batch)
    return Variant(step.lower(state, *rest).compile(), state, rest, [])


def time_steps(variants: dict[str, Variant], steps: int, bar: Progress) -> None:
    """Run `steps` timed steps of each, taking turns, after one of each that is not counted."""
    for variant in variants.values():
        variant.run()
    for done in range(steps):
        for variant in variants.values():
            variant.seconds.append(variant.run())
        bar.update(done + 1, **{name: v.seconds[-1] for name, v in variants.items()})


def measure(options: argparse.Namespace) -> list[Json]:
    """Measure; one row per student, ratios over dense.

    Raises:
      BadInput: an option out of its range.
    """
    check(options)
    variants = build(options)
    with progress("step, seconds", total=options.steps) as bar:
        time_steps(variants, options.steps, bar)
    return rows_of(variants)


def rows_of(variants: dict[str, Variant]) -> list[Json]:
    """The rows of measured variants; "dense" must be among them."""

    def figures(variant: Variant) -> tuple[float, float, int]:
        return statistics.median(variant.seconds), min(variant.seconds), tree_bytes(variant.state)

    dense = figures(variants["dense"])
    rows = []
    for name, variant in variants.items():
        median, least, size = figures(variant)
        rows.append({
            "impl": name, "step_seconds": median, "step_time_ratio": median / dense[0],
            "step_seconds_min": least, "step_time_ratio_min": least / dense[1],
            "state_bytes": size, "state_bytes_ratio": size / dense[2],
            "peak_memory_bytes": variant.peak_memory(),
        })
    return rows


def remarks(rows: Sequence[Json]) -> list[str]:
    """The line below the table."""
    return ["ratios are over the row dense; peak_memory_bytes is the compiler's plan for one step"]
