"""The gap closed, and its interval against simulated pairs."""

import numpy as np
import pytest

from rabit_jax.evaluate.gap import gap_closed


def test_one_run_has_a_share_and_no_interval():
    found = gap_closed([48.0], [54.2], [49.1])
    wanted = 1 - np.log(49.1 / 48) / np.log(54.2 / 48)
    assert found.share == pytest.approx(wanted)
    assert (found.low, found.high, found.n) == (None, None, 1)


def test_without_a_gap_there_is_no_share():
    assert gap_closed([], [], []) is None
    assert gap_closed([48.0], [48.0], [47.0]) is None
    assert gap_closed([48.0], [47.0], [46.0]) is None
    for bad in (np.nan, np.inf, 0.0):
        assert gap_closed([48.0, 48.0], [54.0, bad], [49.0, 50.0]) is None


def test_every_run_counts_those_below_the_teacher_too():
    teacher, start, end = [32.0] * 3, [35.0, 36.0, 31.9], [33.0, 34.0, 31.0]
    below, above = (np.log(np.array(x) / 32) for x in (start, end))
    found = gap_closed(teacher, start, end)
    assert found.n == 3 and found.share == pytest.approx(1 - above.sum() / below.sum())


def test_gaps_that_are_not_told_from_0_leave_the_interval_without_an_end():
    found = gap_closed([32.0] * 3, [32.1, 31.9, 32.2], [33.0, 31.5, 32.0])
    assert found.low is None and found.high is None


def test_equal_runs_have_an_interval_of_no_width():
    found = gap_closed([32.0] * 3, [40.0] * 3, [34.0] * 3)
    assert found.low == pytest.approx(found.share) == found.high


def test_the_interval_holds_the_true_ratio_19_times_of_20():
    # Correlated normal gaps with means 0.2 and 0.08: the share closed is 0.6.
    rng, held, trials = np.random.default_rng(0), 0, 4000
    noise = rng.normal(size=(trials, 2, 4)) * 0.03
    for shared, own in noise:
        start, end = np.exp(0.2 + shared), np.exp(0.08 + 0.5 * shared + 0.5 * own)
        found = gap_closed(np.ones(4), start, end)
        held += found.low <= 0.6 <= found.high
    assert held / trials == pytest.approx(0.95, abs=0.012)
