"""Statistics of paired runs.

With d the differences of n pairs, their mean m, their standard deviation s, and e = s / sqrt(n):

    interval        m -+ t(1 - a/2, n - 1) e
    paired t test   of m = 0; beside it Wilcoxon's signed-rank test, which assumes no distribution
    equivalence     two one-sided t tests (Schuirmann, 1987) of m <= -margin and of m >= margin; the
                    larger p. Below a, the difference is within the margin: the same as that the
                    interval of confidence 1 - 2a is
    Holm            of several variants' p of the t test, sorted: the k-th times how many are left,
                    and none below the one before it (Holm, 1979). That one counts
    power           the chance that the equivalence test shows a true difference of 0, if the
                    standard deviation is s. It is exact: over the distribution of the estimate s^
                    of s, the chance that |m| < margin - t(1 - a, n - 1) s^ / sqrt(n)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import integrate, stats

ALPHA = 0.05
WANTED_POWER = 0.8
_MOST_RUNS = 10_000


@dataclass(frozen=True)
class Comparison:
    """Paired differences.

    Attributes:
        count: pairs.
        mean, deviation: of the differences; the deviation is None for one pair, and so is all that
            needs it.
        interval: of the mean, with confidence 95%.
        inner: of the mean, with confidence 90%: the one that equivalence goes by.
        t_test, wilcoxon: p of no difference.
        holm: that of the t test, for as many variants as were compared.
        margin: of the equivalence test.
        equivalence: p of a difference as large as the margin.
        power: chance of the equivalence test, where there is no difference.
        needed: pairs for a power of 80%; None where `_MOST_RUNS` do not do.
    """

    count: int
    mean: float
    margin: float
    deviation: float | None = None
    interval: tuple[float, float] | None = None
    inner: tuple[float, float] | None = None
    t_test: float | None = None
    holm: float | None = None
    wilcoxon: float | None = None
    equivalence: float | None = None
    power: float | None = None
    needed: int | None = None

    @property
    def verdict(self) -> str:
        """Conclusion in words."""
        if self.equivalence is None or self.holm is None:
            return "one pair says nothing"
        if not self.deviation and not self.mean:
            return "all pairs are the same to the last digit, which says nothing"
        different = self.holm < ALPHA
        if self.equivalence < ALPHA:
            return "different, within the margin" if different else "equivalent within the margin"
        return "different" if different else "undecided"


def compare(differences: Sequence[float], margin: float) -> Comparison:
    """All that is said of differences.

    Args:
        differences: one for each pair, variant less original.
        margin: the largest difference that does not matter, in the same unit.
    """
    d = np.asarray(differences, float)
    count, mean = len(d), float(np.mean(d))
    if count < 2:
        return Comparison(count, mean, margin)
    deviation = float(np.std(d, ddof=1))
    error = deviation / math.sqrt(count)
    half, inner = (float(stats.t.ppf(1 - a, count - 1)) * error for a in (ALPHA / 2, ALPHA))
    t_test = _t_test(mean, error, count)
    return Comparison(
        count=count,
        mean=mean,
        margin=margin,
        deviation=deviation,
        interval=(mean - half, mean + half),
        inner=(mean - inner, mean + inner),
        t_test=t_test,
        holm=t_test,
        wilcoxon=float(stats.wilcoxon(d).pvalue) if np.any(d) else 1.0,
        equivalence=equivalence(mean, error, count, margin),
        power=power(deviation, count, margin),
        needed=needed(deviation, margin),
    )


def compare_all(differences: Mapping[str, Sequence[float]], margin: float) -> dict[str, Comparison]:
    """`compare` for each of several variants, which are as many chances to find a difference."""
    compared = {variant: compare(d, margin) for variant, d in differences.items()}
    known = {variant: c.t_test for variant, c in compared.items() if c.t_test is not None}
    least = 0.0
    for k, variant in enumerate(sorted(known, key=lambda variant: known[variant])):
        least = max(least, min(1.0, known[variant] * (len(known) - k)))
        compared[variant] = replace(compared[variant], holm=least)
    return compared


def _t_test(mean: float, error: float, count: int) -> float:
    if not error:
        return float(mean == 0)
    return float(2 * stats.t.sf(abs(mean) / error, count - 1))


def equivalence(mean: float, error: float, count: int, margin: float) -> float:
    """The larger p of two one-sided t tests.

    Args:
        mean: of the differences.
        error: the standard error of that mean.
        count: pairs.
        margin: see `compare`.
    """
    if not error:
        return float(abs(mean) >= margin)
    below, above = (mean + margin) / error, (margin - mean) / error
    return float(stats.t.sf(min(below, above), count - 1))


def power(deviation: float, count: int, margin: float) -> float:
    """The chance that `equivalence` is below 5% where there is no difference.

    Args:
        deviation: the true standard deviation of differences.
        count: pairs, at least 2.
        margin: see `compare`.
    """
    if not deviation:
        return 1.0
    df = count - 1
    critical = float(stats.t.ppf(1 - ALPHA, df))
    reach = margin * math.sqrt(count) / deviation  # the margin in true standard errors
    # u is the estimate of the deviation by the true one; u sqrt(df) has a chi distribution.
    density = stats.chi(df, scale=1 / math.sqrt(df))

    def passed(u: float) -> float:
        return float(density.pdf(u) * (2 * stats.norm.cdf(reach - critical * u) - 1))

    # Beyond ten standard deviations of u, which is about 1, nothing is left.
    highest = min(reach / critical, 1 + 10 / math.sqrt(2 * df))
    lowest = max(0.0, 1 - 10 / math.sqrt(2 * df))
    if highest <= lowest:
        return 0.0
    return float(np.clip(integrate.quad(passed, lowest, highest)[0], 0, 1))


def needed(deviation: float, margin: float) -> int | None:
    """The least pairs with a power of 80%; None where that is more than ten thousand."""
    if power(deviation, _MOST_RUNS, margin) < WANTED_POWER:
        return None
    low, high = 1, _MOST_RUNS  # the power of `high` is enough, that of `low` is not
    while high - low > 1:
        middle = (low + high) // 2
        if power(deviation, middle, margin) >= WANTED_POWER:
            high = middle
        else:
            low = middle
    return high
