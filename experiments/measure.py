"""What the stages measure of a model: perplexity, divergence, diagnostics, errors."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from experiments.inputs import Inputs
from rabit_jax.evaluate import Perplexity, diagnose
from rabit_jax.train import distillation_loss
from rabit_jax.train.sharding import batch_sharding
from rabit_jax.weights.convert import map_leaves, weights_of


def scores(run: Inputs, params: Any, label: str) -> dict:
    """Perplexity as the summary holds it."""

    def figures(found: Perplexity) -> dict:
        return {
            "ppl": found.ppl,
            "bits_per_byte": found.bits_per_byte,
            "nats_per_token": found.nats_per_token,
            "context": found.context,
            "scored_tokens": found.tokens,
        }

    result = figures(run.perplexity(params, label))
    if run.text.unseen:
        result["unseen"] = figures(run.perplexity(params, f"{label}, unseen", run.text.unseen))
    return result


def divergence(run: Inputs, params: Any) -> float:
    """`KL(teacher || model)` in nats per token, over the evaluation windows watched in training."""

    @jax.jit
    def summed(params, teacher, batch):
        found = distillation_loss(run.model, params, teacher, batch, 0.0, run.config.compute.chunk)
        return found["kl"]

    total, tokens = 0.0, 0
    for batch in run.windows(run.config.evaluate.watch_windows):
        total += float(summed(params, run.teacher, batch))
        tokens += batch["tokens"].size
    return total / tokens


def reconstruction_errors(teacher: Any, student: Any) -> dict[str, list[float]]:
    """`|W - W_hat|^2 / |W|^2` of every quantised linear, one number per layer."""
    kernels = weights_of(student)
    errors = {}

    @jax.jit
    def error(w, node):
        return ((w - node.dense()) ** 2).sum((-1, -2)) / (w**2).sum((-1, -2))

    map_leaves(
        lambda p, w: errors.update({p: error(w, kernels[p])}) if p in kernels else None, teacher
    )
    return {p: np.atleast_1d(np.asarray(e)).ravel().tolist() for p, e in errors.items()}


def diagnostics(run: Inputs, student: Any, drive: str = "teacher") -> dict:
    """Inter-path adaptation of a student on the evaluation windows."""
    return diagnose(
        _features(run),
        run.teacher,
        student,
        run.windows(run.config.evaluate.diagnostic_windows),
        drive=drive,
        batch_sharding=batch_sharding(run.mesh),
    )


def _features(run: Inputs) -> Any:
    """The one function object that runs the decoder for the diagnostics, so that it compiles
    once."""
    if "features" not in run.__dict__:
        run.features = lambda params, batch: run.model.apply(
            {"params": params}, batch["tokens"], batch.get("mask"), method="features"
        )[0]
    return run.features
