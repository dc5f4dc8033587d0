"""The statistics of an ablation: means with intervals, paired comparisons, the search's choice."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.special

from rabit_jax.evaluate.gap import GapClosed, gap_closed
from rabit_jax.experiments.ablation.cells import Cell, Plan, Row
from rabit_jax.experiments.ablation.runner import Summary, lookup, read_summary

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
    "packed.whole_model_bits_per_weight",
    "cost.multiplications",
    "cost.additions",
    "cost.lookups",
    "cost.bytes",
    "gap_closed",
    "teacher.ppl",
    "teacher.unseen.ppl",
)
Found = Sequence[tuple[Cell, Summary | None]]


@dataclass(frozen=True)
class Estimate:
    """Mean of `n` numbers and half the width of its 95% interval, None for a single number.

    `ends` are the ends of an interval that does not lie evenly around the mean.
    """

    mean: float
    half: float | None
    n: int
    ends: tuple[float, float] | None = None


def estimate(values: Iterable[float | None]) -> Estimate | None:
    """`mean +- t_{0.975, n-1} s / sqrt(n)` of the values that are not None; None without any.

    `s` is the sample's standard deviation, t the quantile of Student's distribution. With a value
    that is not finite the mean is not finite either, and there is no interval.
    """
    found = np.array([value for value in values if value is not None], float)
    if not found.size:
        return None
    n, mean = len(found), float(found.sum() / len(found))
    if n == 1 or not math.isfinite(mean):
        return Estimate(mean, None, n)
    # Rounding of the mean would give equal numbers a tiny spread.
    spread = 0.0 if found.min() == found.max() else found.std(ddof=1)
    return Estimate(mean, float(scipy.special.stdtrit(n - 1, 0.975) * spread / math.sqrt(n)), n)


def as_estimate(found: GapClosed | None) -> Estimate | None:
    """A share of a gap as tables and figures show estimates."""
    if found is None:
        return None
    ends = None if found.low is None or found.high is None else (found.low, found.high)
    return Estimate(found.share, None, found.n, ends)


@dataclass(frozen=True)
class Results:
    """Every cell of an ablation with its summary, None where that is missing.

    Attributes:
      plan: the ablation.
      chosen: label of a row -> value that its search chose.
      trials: the cells of the search.
      cells: the cells of all rows and seeds.
    """

    plan: Plan
    chosen: Mapping[str, float]
    trials: Found
    cells: Found

    def by_seed(self, label: str) -> dict[int, Summary]:
        """Summaries of a row's complete cells by seed."""
        return {cell.seed: found for cell, found in self.cells if cell.row == label and found}

    def estimate(self, label: str, key: str) -> Estimate | None:
        """Mean of a metric over the seeds of a row; "gap_closed" is the ratio of mean gaps."""
        summaries = self.by_seed(label).values()
        if key != "gap_closed":
            return estimate(lookup(summary, key) for summary in summaries)
        names = ("teacher.ppl", "init.ppl", "qat.ppl")
        return as_estimate(_closed(tuple(lookup(s, name) for name in names) for s in summaries))

    def summaries(self) -> list[Summary]:
        """The summaries of all complete cells, those of the search included."""
        return [found for _, found in (*self.trials, *self.cells) if found]

    def at_edge(self, row: Row) -> bool:
        """Whether the chosen value is the smallest or the largest that was searched."""
        value = self.chosen.get(row.label) if row.trials else None
        return value is not None and value in (min(row.trials), max(row.trials))


def collect(plan: Plan) -> Results:
    """Read the summaries of all complete cells."""
    trials = [(cell, read_summary(cell)) for cell in plan.trials()]
    chosen = choose(trials)
    cells = [(cell, read_summary(cell)) for cell in plan.cells(chosen)]
    return Results(plan, chosen, trials, cells)


def choose(trials: Found) -> dict[str, float]:
    """The value with the lowest finite held-out perplexity of the student, by row."""
    chosen: dict[str, float] = {}
    lowest: dict[str, float] = {}
    for cell, summary in trials:
        ppl = lookup(summary, "qat.ppl")
        if cell.value is None or ppl is None or not math.isfinite(ppl):
            continue
        if ppl < lowest.get(cell.row, math.inf):
            lowest[cell.row], chosen[cell.row] = ppl, cell.value
    return chosen


@dataclass(frozen=True)
class Comparison:
    """A row against a baseline, paired over the seeds that both have.

    Attributes:
      label: name of the comparison in the config.
      row: label of the row.
      baseline: label of the row that it is compared with.
      gap_closed: share of the baseline's gap to the teacher that the row closes, on held-out text;
        None where the baseline has no gap.
      difference: `ln ppl` of the row minus that of the baseline, on held-out text.
      unseen_gap_closed: on unseen text.
      unseen_difference: on unseen text.
    """

    label: str
    row: str
    baseline: str
    gap_closed: GapClosed | None
    difference: Estimate | None
    unseen_gap_closed: GapClosed | None
    unseen_difference: Estimate | None


def comparisons(results: Results) -> list[Comparison]:
    """Every comparison that the config asks for."""
    found = []
    for label, (row, baseline) in results.plan.ablation.compare.items():
        ours, theirs = results.by_seed(row), results.by_seed(baseline)
        pairs = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
        found.append(
            Comparison(label, row, baseline, *_paired(pairs, ""), *_paired(pairs, ".unseen"))
        )
    return found


def _paired(
    pairs: Sequence[tuple[Summary, Summary]], text: str
) -> tuple[GapClosed | None, Estimate | None]:
    """Gap closed and difference on one text ("" or ".unseen"), over the pairs that have both.

    All cells share one teacher, whose perplexity is read from the row's cell.
    """
    key, taught = f"qat{text}.ppl", f"teacher{text}.ppl"
    found = [(lookup(ours, taught), lookup(theirs, key), lookup(ours, key))
             for ours, theirs in pairs]
    share = _closed(found)
    measured = [(_log(base), _log(row)) for _, base, row in found]
    return share, estimate(row - base for base, row in measured
                           if row is not None and base is not None)


def _closed(found: Iterable[tuple[float | None, ...]]) -> GapClosed | None:
    """`gap_closed` of (teacher, start, end) of each run; runs that lack a number are left out."""
    whole = [run for run in found if None not in run]
    return gap_closed(*zip(*whole, strict=True)) if whole else None  # pyright: ignore


def _log(value: float | None) -> float | None:
    return None if value is None or not value > 0 else math.log(value)
