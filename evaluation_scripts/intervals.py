"""Intervals around a share and around a mean difference."""

import math
from statistics import NormalDist

import numpy as np


def wilson_interval(successes: float, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of a share that stays within 0 and 1 for few pairs too.

    The roots p of |share - p| = z * sqrt(p (1 - p) / total) (Wilson, 1927, Journal of the American Statistical
    Association 22, 209-212; recommended by Brown, Cai and DasGupta, 2001, https://doi.org/10.1214/ss/1009213286).
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap_interval(
    differences: list[float], confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Interval of the mean of paired differences: quantiles of the means of samples drawn from them with replacement.

    The percentile bootstrap (Efron, 1979, https://doi.org/10.1214/aos/1176344552). It is too narrow for very few pairs.
    """
    draws = np.random.default_rng(seed).integers(len(differences), size=(resamples, len(differences)))
    means = np.asarray(differences, dtype=np.float64)[draws].mean(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
