"""Perplexity, diagnostics of inter-path adaptation, and what the signs do while training."""

from rabit_jax.evaluate.diagnostics import diagnose
from rabit_jax.evaluate.perplexities import Perplexity, perplexity, unigram_entropy
from rabit_jax.evaluate.sign_statistics import (
    disordered_share,
    flip_rate,
    mean_flip_rate,
    snapshot,
    weight_histogram,
)

__all__ = [
    "Perplexity",
    "diagnose",
    "disordered_share",
    "flip_rate",
    "mean_flip_rate",
    "perplexity",
    "snapshot",
    "unigram_entropy",
    "weight_histogram",
]
