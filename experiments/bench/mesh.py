"""Bytes of a device and bytes that a training step sends, on 1, 2, 4 and 8 devices of each axis.

The distillation step of a small Llama (RaBiT with two paths, AdamW) is compiled for simulated CPU
devices; nothing is run. `state_bytes` are those of what trains and of the optimiser's state on one
device, `argument_bytes` those of all arguments of the program (teacher and frozen parameters too),
`temporary_bytes` what a step needs besides. `sent_bytes` are what a device sends in its collectives
by the usual ring algorithms, loops over layers counted as often as they turn. A CPU has no
reduce-scatter: it sums a gradient by an all-reduce and keeps its part, and so sends twice what an
accelerator would send there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from rabit_jax import LLAMA_LINEARS, ResidualSignSpec, convert
from rabit_jax.errors import BadInput
from rabit_jax.experiments.planning.collectives import find_collectives
from rabit_jax.models.config import ModelConfig
from rabit_jax.models.decoder import Decoder, init_params
from rabit_jax.progress import progress
from rabit_jax.train.losses import distillation_loss
from rabit_jax.train.optimizer import OptimizerConfig
from rabit_jax.train.sharding import AXES
from rabit_jax.train.trainer import Trainer, make_trainer
from rabit_jax.types import Json, Params

EXAMPLES = """examples:
  python -m experiments.bench mesh
  python -m experiments.bench mesh --optimizer muon --json > mesh.json
"""
COLUMNS = {"axis": "axis", "devices": "devices", "state_bytes": "state",
           "state_ratio": "of one device", "argument_bytes": "all arguments",
           "temporary_bytes": "temporary", "sent_bytes": "sent in a step"}
SIZES = (1, 2, 4, 8)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("--width", type=int, default=256, help="model width d, a multiple of 64 (default 256)")
    add("--layers", type=int, default=8, help="number of blocks (default 8)")
    add("--vocab", type=int, default=2048, help="vocabulary (default 2048)")
    add("--rows", type=int, default=8, help="sequences of a batch, a multiple of 8 (default 8)")
    add("--length", type=int, default=128, help="tokens of a sequence (default 128)")
    add("--optimizer", choices=("adamw", "muon"), default="adamw", help="(default adamw)")


def check(options: argparse.Namespace) -> None:
    """Raise BadInput for an option out of its range, or where devices cannot be simulated."""
    for name, unit in (("width", 64), ("layers", 1), ("vocab", 8), ("rows", 8), ("length", 2)):
        value = getattr(options, name)
        if value < 1 or value % unit:
            raise BadInput(f"--{name} is {value}, wanted a positive multiple of {unit}")
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", max(SIZES))
    except RuntimeError:  # JAX has started, with the devices that its flags name
        pass
    if len(jax.devices()) < max(SIZES):
        raise BadInput(f"JAX has started with {len(jax.devices())} devices, this wants "
                       f"{max(SIZES)}: run it in a process of its own")


def measure(options: argparse.Namespace) -> list[Json]:
    """Compile the step for every mesh; one row each.

    Raises:
      BadInput: an option out of its range.
    """
    check(options)
    heads = options.width // 64
    config = ModelConfig(
        vocab_size=options.vocab, d_model=options.width, n_layers=options.layers, n_heads=8 * heads,
        n_kv_heads=8 * heads, head_dim=8, d_hidden=3 * options.width, remat=True)
    teacher = jax.jit(lambda key: init_params(config, key))(jax.random.key(0))
    student = convert(teacher, [(LLAMA_LINEARS, ResidualSignSpec(k=2, rounds=1))])
    places = [(axis, n) for axis in AXES for n in SIZES if n > 1 or axis == AXES[0]]
    rows: list[Json] = []
    with progress("mesh", len(places)) as bar:
        for axis, n in places:
            trainer = _trainer(options, config, teacher, student, axis, n)
            row = {"axis": axis if n > 1 else "-", "devices": n, **_figures(options, trainer, n)}
            first = rows[0] if rows else row
            rows.append({**row, "state_ratio": row["state_bytes"] / first["state_bytes"]})
            bar.update(len(rows))
    return rows


def _trainer(
    options: argparse.Namespace, config: ModelConfig, teacher: Params, student: Params, axis: str,
    devices: int,
) -> Trainer:
    model = Decoder(config)
    sizes = [devices if name == axis else 1 for name in AXES]
    mesh = Mesh(np.asarray(jax.devices()[:devices]).reshape(sizes), AXES)
    return make_trainer(
        lambda p, t, b: distillation_loss(model, p, t, b, gamma=1.0), student,
        OptimizerConfig(name=options.optimizer, freeze=("embedding", "head")), 10,
        teacher=teacher, mesh=mesh)


def _figures(options: argparse.Namespace, trainer: Trainer, devices: int) -> dict[str, int]:
    """Bytes of the compiled step on one device."""
    batch = trainer.place({"tokens": np.zeros((options.rows, options.length), np.int32)})
    step = trainer.step.lower(  # pyright: ignore[reportFunctionMemberAccess]  (a jitted function)
        trainer.state, trainer.frozen, trainer.teacher, batch).compile()
    plan = step.memory_analysis()
    sent = sum(one.moved for one in find_collectives(step.as_text(), devices))
    # What is kept of the state is written over it: its bytes are those that results alias.
    return {"state_bytes": plan.alias_size_in_bytes, "argument_bytes": plan.argument_size_in_bytes,
            "temporary_bytes": plan.temp_size_in_bytes, "sent_bytes": round(sent)}


def remarks(rows: Sequence[Json]) -> list[str]:
    """The line below the table."""
    return ["bytes of one device, by the program that XLA compiles for simulated CPU devices"]
