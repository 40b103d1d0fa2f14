"""Metrics of fine-tuned heads: accuracy and F1, correlations. Plain NumPy."""

from __future__ import annotations

import numpy as np


def classification_metrics(predicted: np.ndarray, wanted: np.ndarray, classes: int) -> dict[str, float]:
    """Accuracy and macro F1 (the mean over all classes that occur in either) of rows [n] int."""
    scores = []
    for row in range(classes):
        hit = float(np.sum((predicted == row) & (wanted == row)))
        both = float(np.sum(predicted == row) + np.sum(wanted == row))
        if both:
            scores.append(2 * hit / both)
    return {"accuracy": float(np.mean(predicted == wanted)), "macro_f1": float(np.mean(scores))}


def regression_metrics(predicted: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    """Pearson, Spearman and the root of the mean squared error of values [n]; NaN where one is constant."""
    error = float(np.sqrt(np.mean(np.square(predicted - wanted))))
    by_rank = correlation(mean_ranks(predicted), mean_ranks(wanted))
    return {"pearson": correlation(predicted, wanted), "spearman": by_rank, "rmse": error}


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation of two vectors [n]; NaN where one of them is constant."""
    a, b = np.asarray(a, np.float64) - np.mean(a), np.asarray(b, np.float64) - np.mean(b)
    length = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / length if length > 0 else float("nan")


def mean_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks [n] from 1, the mean rank among equal values."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place.reshape(-1)]
