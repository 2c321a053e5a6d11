"""The distance between two runs' figures, and the least distance that counts.

All figures are logarithms: a shift of 0.18 is 20 % more.

Two runs of one commit differ in two ways. One shows in their rounds: Yuen's test for unequal variances takes it from
there, and a fifth of the rounds may be outliers on either side. The other does not show, as all rounds of a row are
taken within seconds of each other. `run_to_run` learns it from shifts that ought to be 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Logs = NDArray[np.float64]

SMALLEST = 0.05
"""The least change that counts, however quiet the machine."""

FEWEST_ROUNDS = 6
"""Fewest rounds for trimmed means: with fewer, Student's t does not cover their errors, and ranges are compared."""

FEWEST_CONTROLS = 8
"""Fewest shifts that ought to be 0 from which noise is learnt."""


@dataclass(frozen=True)
class Shift:
    """A difference of trimmed means.

    Attributes:
        square: square of the standard error that shows in the rounds.
        freedom: that square's degrees of freedom.
    """

    value: float
    square: float
    freedom: float

    def over(self, unit: float) -> Shift:
        """Convert to another unit."""
        return Shift(self.value / unit, self.square / unit**2, self.freedom)

    def margin(self, noise: RunToRun, tail: float) -> float:
        """Compute the least shift that counts.

        Args:
            noise: between the runs.
            tail: probability that a shift that ought to be 0 exceeds it, up and down each.
        """
        square = self.square + noise.deviation**2
        # Satterthwaite's degrees of freedom of a sum
        lost = self.square**2 / self.freedom + noise.deviation**4 / noise.freedom
        freedom = square**2 / lost if lost > 0 else math.inf
        return max(math.log1p(SMALLEST), student_quantile(tail, freedom) * math.sqrt(square))


@dataclass(frozen=True)
class RunToRun:
    """The standard deviation of shifts that ought to be 0, beyond what rounds show, and its degrees of freedom."""

    deviation: float
    freedom: float

    def times(self, factor: float) -> RunToRun:
        return RunToRun(self.deviation * factor, self.freedom)


def shift(before: Logs, after: Logs) -> Shift:
    """Compute the shift from one run to another."""
    (old, old_square, old_freedom), (new, new_square, new_freedom) = trimmed(before), trimmed(after)
    square = old_square + new_square
    lost = old_square**2 / old_freedom + new_square**2 / new_freedom
    return Shift(new - old, square, square**2 / lost if lost > 0 else math.inf)


def trimmed(logs: Logs) -> tuple[float, float, int]:
    """Trim a fifth at either end. Return the mean, its squared standard error, and the square's degrees of freedom.

    Source: Yuen, "The two-sample trimmed t for unequal population variances", Biometrika 61 (1974).
    """
    n, cut = len(logs), len(logs) // 5
    ordered = np.sort(logs)
    middle = ordered[cut : n - cut]
    winsorized = np.clip(ordered, middle[0], middle[-1])
    deviations = float(np.square(winsorized - winsorized.mean()).sum())
    return float(middle.mean()), deviations / (len(middle) * (len(middle) - 1)), len(middle) - 1


def run_to_run(controls: Sequence[Shift], least: float, unknown: float) -> RunToRun:
    """Estimate τ of shifts that ought to be 0.

    Shifts d with variances τ² + v have P(d² - v < τ²) = P(|z| < 1) for a normal z, whatever the v. So τ² is that
    quantile of d² - v, and nearly a third of the shifts may be outliers. It has about a third of the degrees of freedom
    that a mean of squares would have.

    Args:
        least: the result is at least this.
        unknown: the result for too few shifts.
    """
    if len(controls) < FEWEST_CONTROLS:
        return RunToRun(unknown, math.inf)
    within_one = 2 * NormalDist().cdf(1) - 1
    square = float(np.quantile([control.value**2 - control.square for control in controls], within_one))
    return RunToRun(max(least, math.sqrt(max(square, 0.0))), len(controls) / 3)


def shift_and_margin_of_ranges(before: Logs, after: Logs, smallest: float) -> tuple[float, float]:
    """Compute the difference of medians, and the least one that sets all figures of one run apart from the other's."""
    value = float(np.median(after) - np.median(before))
    overlap = before.max() - after.min() if value > 0 else after.max() - before.min()
    return value, max(math.log1p(smallest), abs(value) + float(overlap))


def student_quantile(tail: float, freedom: float) -> float:
    """Approximate the value that Student's t exceeds with probability `tail`, to 2 % from five degrees of freedom on.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5.
    """
    z = NormalDist().inv_cdf(1 - tail)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))
