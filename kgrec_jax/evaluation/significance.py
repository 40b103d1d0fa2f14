"""How far a mean over users may be trusted: bootstrap intervals and paired differences."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

MANY_USERS = 50_000  # from here on the bootstrap of a mean and its normal limit differ in the fourth digit of the width


def bootstrap_ci(per_user: np.ndarray, seed: int, n: int = 1000, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval (low, high) of the mean of `per_user` [users] over `n` resamples of them (Efron 1979)."""
    low, high = _intervals(per_user[:, None], seed, n, level)
    return float(low[0]), float(high[0])


def bootstrap_cis(per_user: Mapping[str, np.ndarray], seed: int, n: int = 1000) -> dict[str, list[float]]:
    """{metric: [low, high]} for metrics of the same users, from the same resamples."""
    low, high = _intervals(np.stack(list(per_user.values()), axis=1), seed, n, 0.95)
    return {name: [float(a), float(b)] for name, a, b in zip(per_user, low, high)}


def _intervals(values: np.ndarray, seed: int, n: int, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Intervals of the column means of `values` [users, M]."""
    users = len(values)
    if users >= MANY_USERS:
        from scipy.stats import norm

        half = norm.ppf((1 + level) / 2) * values.std(axis=0, ddof=1) / np.sqrt(users)
        return values.mean(axis=0) - half, values.mean(axis=0) + half
    rng = np.random.default_rng(seed)
    means = np.empty((n, values.shape[1]))
    for row in range(n):
        means[row] = np.bincount(rng.integers(users, size=users), minlength=users) @ values / users
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def paired_difference(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """(mean of a - b, its standard error) over the same users; the error of a single user is unknown: NaN."""
    if a.shape != b.shape:
        raise ValueError(f"paired_difference: found {a.shape} and {b.shape}, expected the same users on both sides")
    difference = a - b
    if len(difference) < 2:
        return float(difference.mean()), float("nan")
    return float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(len(difference)))


def paired_over_seeds(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """(mean of a - b, its standard error, deviation between seeds) of trainings [S, users] of two models.

    The error is that of users: each counts with its mean over the seeds, so that no user counts as several. What
    another seed would change is the deviation of the seeds' means; NaN for a single one.
    """
    if a.shape != b.shape:
        raise ValueError(f"paired_over_seeds: found {a.shape} and {b.shape}, expected the same seeds and users")
    mean, error = paired_difference(a.mean(axis=0), b.mean(axis=0))
    means = (a - b).mean(axis=1)
    return mean, error, float(means.std(ddof=1)) if len(means) > 1 else float("nan")
