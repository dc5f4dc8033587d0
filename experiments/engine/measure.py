"""What the stages measure of a model: perplexity, divergence, diagnostics, errors."""

from __future__ import annotations

import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from rabit_jax import LLAMA_ENDS, hosts
from rabit_jax.data.tokens import TokenText
from rabit_jax.evaluate.diagnostics import diagnose
from rabit_jax.evaluate.perplexities import Perplexity, padded_batches, perplexity
from rabit_jax.experiments.engine.inputs import Inputs
from rabit_jax.progress import progress
from rabit_jax.train.losses import distillation_loss
from rabit_jax.train.sharding import batch_sharding, row_shards
from rabit_jax.tree import is_weight, map_leaves, weights_of
from rabit_jax.types import Param, Params


def scores(run: Inputs, params: Params, label: str) -> dict:
    """Perplexity on the evaluation text, and on the unseen if there is one."""
    result = figures(_perplexity(run, params, label, run.text.held_out))
    if run.text.unseen:
        found = _perplexity(run, params, f"{label}, unseen", run.text.unseen)
        result["unseen"] = figures(found)
    return result


def figures(found: Perplexity) -> dict:
    """Perplexity as the summary holds it."""
    return {
        "ppl": found.ppl,
        "bits_per_byte": found.bits_per_byte,
        "nats_per_token": found.nats_per_token,
        "context": found.context,
        "scored_tokens": found.tokens,
    }


def _perplexity(run: Inputs, params: Params, label: str, text: TokenText) -> Perplexity:
    """Perplexity on all windows of a text, with a progress bar."""
    rows = run.text.windows(text)
    with progress(f"perplexity, {label}", len(rows)) as bar:
        return perplexity(
            run.model,
            params,
            rows,
            batch_size=run.config.evaluate.batch_size,
            chunk=run.config.compute.chunk,
            text_bytes=text.bytes,
            total_tokens=len(text.tokens),
            progress=lambda done, _: bar.update(done),
            batch_sharding=batch_sharding(run.mesh),
        )


def watched_nats(run: Inputs, params: Params) -> float:
    """Nats per token on the evaluation windows that are watched during training."""
    settings = run.config.evaluate
    return perplexity(
        run.model,
        params,
        run.text.windows()[: settings.watch_windows],
        batch_size=settings.batch_size,
        chunk=run.config.compute.chunk,
        batch_sharding=batch_sharding(run.mesh),
    ).nats_per_token


def _windows(run: Inputs, count: int) -> Iterator[dict]:
    """The first `count` evaluation windows on the mesh, in batches with the mask of real tokens.

    The last batch is filled up with rows of padding, so that every window is measured.
    """
    rows, devices = run.text.windows()[:count], row_shards(run.mesh)
    size = min(run.config.evaluate.batch_size, len(rows) + -len(rows) % devices)
    for tokens, real in padded_batches(rows, size):
        batch = {"tokens": tokens, "mask": np.broadcast_to(real, tokens.shape)}
        yield hosts.on_mesh(batch, batch_sharding(run.mesh))


def divergence(run: Inputs, params: Params) -> float:
    """`KL(teacher || model)` in nats per token, over the evaluation windows watched in training."""

    @jax.jit
    def summed(params, teacher, batch):
        found = distillation_loss(run.model, params, teacher, batch, 0.0, run.config.compute.chunk)
        return found["kl"]

    total, tokens = 0.0, 0
    for batch in _windows(run, run.config.evaluate.watch_windows):
        total += float(summed(params, run.teacher, batch))
        tokens += int(jnp.sum(batch["mask"]))
    return total / tokens


def reconstruction_errors(teacher: Params, student: Params) -> dict[str, list[float]]:
    """`|W - W_hat|^2 / |W|^2` of every quantised linear, one number per layer."""
    kernels = weights_of(student)
    errors = {}

    @jax.jit
    def error(w, node):
        size = jnp.maximum((w**2).sum((-1, -2)), jnp.finfo(jnp.float32).tiny)
        return ((w - node.dense()) ** 2).sum((-1, -2)) / size

    map_leaves(
        lambda p, w: errors.update({p: error(w, kernels[p])}) if p in kernels else None, teacher
    )
    return {p: np.atleast_1d(np.asarray(hosts.whole(e))).ravel().tolist()
            for p, e in errors.items()}


def diagnostics(run: Inputs, student: Params, drive: str = "teacher") -> dict:
    """Inter-path adaptation of a student's blocks on the evaluation windows."""

    def plain(path: str, leaf: Param) -> Param:
        return leaf.dense() if is_weight(leaf) and re.fullmatch(LLAMA_ENDS, path) else leaf

    student = map_leaves(plain, student)
    return diagnose(
        run.features,
        run.teacher,
        student,
        _windows(run, run.config.evaluate.diagnostic_windows),
        drive=drive,
        batch_sharding=batch_sharding(run.mesh),
    )
