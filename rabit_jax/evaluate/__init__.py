"""Evaluation: perplexity, diagnostics of inter-path adaptation, and statistics of the signs.

The adapter to lm-evaluation-harness is `rabit_jax.evaluate.harness`.
"""

from rabit_jax.evaluate.diagnostics import diagnose
from rabit_jax.evaluate.perplexities import Perplexity, perplexity, unigram_entropy
from rabit_jax.evaluate.sign_statistics import (
    disordered_share,
    flip_rate,
    mean_flip_rate,
    snapshot,
    weight_histogram,
)
from rabit_jax.evaluate.texts import read_text, text_windows

__all__ = [
    "Perplexity",
    "diagnose",
    "disordered_share",
    "flip_rate",
    "mean_flip_rate",
    "perplexity",
    "read_text",
    "snapshot",
    "text_windows",
    "unigram_entropy",
    "weight_histogram",
]
