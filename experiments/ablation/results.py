"""What the finished cells of an ablation say: metrics, means with intervals, paired comparisons."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.special

from rabit_jax.experiments.ablation.cells import Cell, Plan, Row
from rabit_jax.experiments.ablation.runner import read

DIAGNOSED = ("path_correlation", "residual_alignment", "slope", "relative_mse")
METRICS = (
    "qat.ppl",
    "qat.bits_per_byte",
    "qat.unseen.ppl",
    "qat.unseen.bits_per_byte",
    "qat.kl",
    "init.ppl",
    *(f"diagnostics.qat.mean.{name}" for name in DIAGNOSED),
    "flip_rate",
    "step_seconds",
    "training_memory_bytes",
    "state_bytes",
    "packed.bits_per_weight",
    "packed.stored_bits_per_weight",
    "cost.multiplications",
    "cost.additions",
    "cost.lookups",
    "cost.bytes",
    "gap_closed",
    "teacher.ppl",
    "teacher.unseen.ppl",
)
Summary = Mapping[str, Any]


@dataclass(frozen=True)
class Estimate:
    """Mean of `n` numbers and half the width of its 95% interval, None for a single number."""

    mean: float
    half: float | None
    n: int


def estimate(values: Iterable[float | None]) -> Estimate | None:
    """`mean +- t_{0.975, n-1} s / sqrt(n)` of the values that are there; None without any.

    `s` is the sample's standard deviation, t the quantile of Student's distribution. A value that
    is not finite makes the mean so, and leaves the interval out.
    """
    found = np.array([value for value in values if value is not None], float)
    if not found.size:
        return None
    n, mean = len(found), float(found.sum() / len(found))
    if n == 1 or not math.isfinite(mean):
        return Estimate(mean, None, n)
    # Equal numbers have no spread, whatever rounding makes of their mean.
    spread = 0.0 if found.min() == found.max() else found.std(ddof=1)
    return Estimate(mean, float(scipy.special.stdtrit(n - 1, 0.975) * spread / math.sqrt(n)), n)


def lookup(summary: Any, key: str) -> float | None:
    """The number under a dotted key; None where a part of it is missing, null or no number."""
    for name in key.split("."):
        summary = summary.get(name) if isinstance(summary, Mapping) else None
    number = isinstance(summary, int | float) and not isinstance(summary, bool)
    return summary if number else None


@dataclass(frozen=True)
class Results:
    """Every cell of an ablation with its summary, None where that is missing.

    Attributes:
      plan: the ablation.
      chosen: label of a row -> value that its search chose.
      trials: cells of the search.
      cells: all others.
    """

    plan: Plan
    chosen: Mapping[str, float]
    trials: Sequence[tuple[Cell, Summary | None]]
    cells: Sequence[tuple[Cell, Summary | None]]

    def of(self, label: str) -> dict[int, Summary]:
        """Summaries of a row's complete cells by seed."""
        return {cell.seed: found for cell, found in self.cells if cell.row == label and found}

    def estimate(self, label: str, key: str) -> Estimate | None:
        """Mean of a metric over the seeds of a row."""
        return estimate(lookup(summary, key) for summary in self.of(label).values())

    def every(self) -> list[Summary]:
        """All summaries that are there."""
        return [found for _, found in (*self.trials, *self.cells) if found]

    def edge(self, row: Row) -> bool:
        """Whether the chosen value is the smallest or the largest that was searched."""
        value = self.chosen.get(row.label) if row.trials else None
        return value is not None and value in (min(row.trials), max(row.trials))


def collect(plan: Plan) -> Results:
    """Read what is there."""
    trials = [(cell, read(cell)) for cell in plan.trials()]
    chosen = choose(trials)
    return Results(plan, chosen, trials, [(cell, read(cell)) for cell in plan.cells(chosen)])


def choose(trials: Iterable[tuple[Cell, Summary | None]]) -> dict[str, float]:
    """The value with the lowest finite held-out perplexity of the student, by row."""
    best: dict[str, tuple[float, float]] = {}
    for cell, summary in trials:
        found = lookup(summary, "qat.ppl")
        if found is not None and math.isfinite(found):
            before = best.get(cell.row)
            if before is None or found < before[0]:
                best[cell.row] = found, cell.value
    return {row: value for row, (_, value) in best.items()}


@dataclass(frozen=True)
class Comparison:
    """A row against a baseline, paired over the seeds that both have.

    With `L = ln ppl`, per seed: the share `1 - (L_row - L_teacher) / (L_baseline - L_teacher)` of
    the gap to the teacher that the baseline leaves and the row closes, and `L_row - L_baseline`.

    Attributes:
      label: as the config names it.
      row: the row.
      baseline: what it is compared with.
      share: on held-out text; None where the baseline leaves no gap.
      difference: on held-out text.
      unseen_share: on unseen text.
      unseen_difference: on unseen text.
    """

    label: str
    row: str
    baseline: str
    share: Estimate | None
    difference: Estimate | None
    unseen_share: Estimate | None
    unseen_difference: Estimate | None


def comparisons(results: Results) -> list[Comparison]:
    """Every comparison that the config asks for."""
    found = []
    for label, (row, baseline) in results.plan.ablation.compare.items():
        ours, theirs = results.of(row), results.of(baseline)
        pairs = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
        found.append(
            Comparison(label, row, baseline, *_paired(pairs, ""), *_paired(pairs, ".unseen"))
        )
    return found


def _paired(
    pairs: Sequence[tuple[Summary, Summary]], text: str
) -> tuple[Estimate | None, Estimate | None]:
    """Share and difference on one text; a seed without a number there is left out."""
    shares, differences = [], []
    for ours, theirs in pairs:
        row, teacher, own = (
            _log(lookup(summary, f"{model}{text}.ppl"))
            for summary, model in ((ours, "qat"), (ours, "teacher"), (theirs, "teacher"))
        )
        base = _log(lookup(theirs, f"qat{text}.ppl"))
        if row is None or base is None:
            continue
        differences.append(row - base)
        if teacher is not None and own is not None and base > own:
            shares.append(1 - (row - teacher) / (base - own))
    return estimate(shares), estimate(differences)


def _log(value: float | None) -> float | None:
    return None if value is None or not value > 0 else math.log(value)
