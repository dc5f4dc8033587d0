"""How training trajectories diverge when the same run is cut differently over devices.

Floating-point sums depend on the mesh in the last bits. A full-precision run stays within rounding
of itself; a binarised one does not, because a sign near its threshold turns, and the turn is of
full size. So runs on different meshes are compared state by state (the tests do), never step by
step. This command shows it: eight simulated CPU devices, one state, one set of batches, four
meshes.

    python -m experiments.bench.mesh_trajectories --steps 60 --output docs/mesh-trajectories.svg
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from rabit_jax.experiments.engine.console import common_options, main_guard

DEVICES = 8
MESHES = {"data 8": (8, 1), "tensor 8": (1, 8), "data 2, tensor 4": (2, 4)}


def losses(shape: tuple[int, int], quantised: bool, steps: int) -> list[float]:
    """Training losses of a tiny student (or of its dense twin) on a mesh of the given shape."""
    # Imported here, after `main` has set the flags that JAX reads when it starts.
    import jax
    import numpy as np
    from jax.sharding import Mesh

    from rabit_jax import LLAMA_LINEARS, ResidualSignSpec, convert
    from rabit_jax.models.config import ModelConfig
    from rabit_jax.models.decoder import Decoder, init_params
    from rabit_jax.train.losses import distillation_loss
    from rabit_jax.train.optimizer import OptimizerConfig
    from rabit_jax.train.sharding import AXES
    from rabit_jax.train.trainer import make_trainer

    config = ModelConfig(
        vocab_size=256, d_model=64, n_layers=2, n_heads=8, n_kv_heads=8, head_dim=8, d_hidden=128
    )
    model, key = Decoder(config), jax.random.key(0)
    teacher = jax.tree.map(lambda w: 3 * w if w.ndim > 2 else w, init_params(config, key))
    other = jax.tree.map(
        lambda w: w + 0.02 * jax.random.normal(key, w.shape) if w.ndim > 2 else w, teacher
    )
    student = convert(teacher, [(LLAMA_LINEARS, ResidualSignSpec(k=2))]) if quantised else other
    mesh = Mesh(np.asarray(jax.devices()[: shape[0] * shape[1]]).reshape(shape), AXES)
    trainer = make_trainer(
        lambda p, t, b: distillation_loss(model, p, t, b, gamma=1.0),
        student,
        OptimizerConfig(lr=2e-3),
        steps,
        teacher=teacher,
        mesh=mesh,
    )
    state, found = trainer.state, []
    for step in range(steps):
        rows = np.random.default_rng(step).integers(0, 256, (8, 32)).astype(np.int32)
        batch = trainer.place({"tokens": rows})
        state, metrics = trainer.step(state, trainer.frozen, trainer.teacher, batch)
        found.append(float(metrics["loss"]))
    return found


def draw(steps: int, output: Path) -> dict[str, float]:
    """Plot the relative difference of the losses to one device; returns the last of each line."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes, last = figure.subplots(), {}
    for kind, style in (("residual signs", "-"), ("full precision", ":")):
        one = np.array(losses((1, 1), kind == "residual signs", steps))
        for n, (name, shape) in enumerate(MESHES.items()):
            other = np.array(losses(shape, kind == "residual signs", steps))
            gap = np.maximum(np.abs(other - one) / one, 1e-9)
            axes.semilogy(
                np.arange(1, steps + 1), gap, style, color=f"C{n}", label=f"{kind}, {name}"
            )
            last[f"{kind}, {name}"] = float(gap[-1])
    axes.set(xlabel="step", ylabel="relative difference of the loss to one device")
    axes.legend(fontsize=7)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, metadata={"Date": None})
    return last


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.bench.mesh_trajectories",
        description=__doc__,
        epilog="exit codes: 0 done, 2 bad options",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common_options(parser)
    parser.add_argument("--steps", type=int, default=60, help="steps of each run (default 60)")
    parser.add_argument(
        "--output", type=Path, default=Path("mesh-trajectories.svg"), help="the plot")
    arguments = parser.parse_args(argv)
    return main_guard(lambda: _run(arguments.steps, arguments.output))


def _run(steps: int, output: Path) -> None:
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={DEVICES}"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    for name, gap in draw(steps, output).items():
        print(f"{name}: relative difference {gap:.1e} after {steps} steps")


if __name__ == "__main__":
    sys.exit(main())
