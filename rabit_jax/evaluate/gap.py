"""The gap to the teacher, and the share of it that is closed: one definition for every report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.special


@dataclass(frozen=True)
class GapClosed:
    """A share of a gap and its 95% interval; 1 is the teacher, 0 the start.

    Attributes:
      share: the share.
      low: lower end of the interval; None for a single run, or where it has no end.
      high: upper end, None where `low` is.
      n: number of runs.
    """

    share: float
    low: float | None
    high: float | None
    n: int


def gap_closed(
    teacher: Sequence[float], start: Sequence[float], end: Sequence[float]
) -> GapClosed | None:
    """Share of the gap in log-perplexity between `start` and the teacher that `end` closes.

        share = 1 - mean(ln end - ln teacher) / mean(ln start - ln teacher)

    a ratio of means over paired runs, such as those of one seed: a run whose start is at the
    teacher counts like any other, and no run is left out. The interval is Fieller's, of a ratio of
    two means that are correlated; it has no end where the mean gap of the starts is not
    distinguished from 0.

    Args:
      teacher: perplexities `[n]`.
      start: perplexities `[n]` of what is compared with.
      end: perplexities `[n]`.

    Returns:
      The share with its interval; None without runs, with a perplexity that is not positive and
      finite, or with no gap on the average.

    Example:
      >>> round(gap_closed([48.0], [54.2], [49.1]).share, 2)
      0.81
    """
    found = np.array([teacher, start, end], float)
    if not found.size or not (np.isfinite(found) & (found > 0)).all():
        return None
    logs = np.log(found)
    below, above = logs[1] - logs[0], logs[2] - logs[0]
    if below.mean() <= 0:
        return None
    ends = _fieller(above, below)
    low, high = (1 - ends[1], 1 - ends[0]) if ends else (None, None)
    return GapClosed(float(1 - above.mean() / below.mean()), low, high, len(below))


def _fieller(a: np.ndarray, b: np.ndarray) -> tuple[float, float] | None:
    """95% interval of `mean(a) / mean(b)`, paired; None for one pair, or an unbounded interval."""
    n = len(a)
    if n < 2:
        return None
    t2 = float(scipy.special.stdtrit(n - 1, 0.975)) ** 2
    (aa, ab), (_, bb) = (np.cov(a, b) / n).tolist()
    mean_a, mean_b = float(a.mean()), float(b.mean())
    square = mean_b**2 - t2 * bb
    if square <= 0:
        return None
    middle = mean_a * mean_b - t2 * ab
    root = math.sqrt(max(middle**2 - square * (mean_a**2 - t2 * aa), 0.0))
    return (middle - root) / square, (middle + root) / square
