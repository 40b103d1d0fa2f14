"""How far probabilities can be believed: Brier score, calibration error, area under the curve, and their picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import rankdata

from kgrec_jax.evaluation.plots import save_png

BINS = 15


@dataclasses.dataclass(frozen=True)
class Reliability:
    """Examples in bins of equal width by their probability; empty bins are left out."""

    probability: np.ndarray  # [K] mean of a bin
    frequency: np.ndarray  # [K] share of true ones
    count: np.ndarray  # [K]


def reliability(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> Reliability:
    """The bins of probabilities [n] and labels [n]; 1 belongs to the last bin."""
    place = np.minimum((np.asarray(probabilities) * bins).astype(np.int64), bins - 1)
    count = np.bincount(place, minlength=bins)
    filled = count > 0
    mean = [np.bincount(place, np.asarray(v, np.float64), minlength=bins)[filled] / count[filled]
            for v in (probabilities, labels)]
    return Reliability(mean[0], mean[1], count[filled])


def calibration_metrics(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> dict[str, float]:
    """Brier score, expected calibration error, area under the ROC curve, and counts; NaN where nothing can be said.

    The calibration error is Σ_k (n_k / n) |mean probability − share of true ones| over bins of equal width (Naeini et
    al. 2015). The area counts ties half.
    """
    labels = np.asarray(labels, bool)
    positives, n = int(labels.sum()), len(labels)
    counts = {"examples": float(n), "positives": float(positives)}
    if not n:
        return {"brier": float("nan"), "ece": float("nan"), "auc": float("nan"), **counts}
    held = reliability(probabilities, labels, bins)
    above = rankdata(probabilities)[labels].sum() - positives * (positives + 1) / 2
    pairs = positives * (n - positives)
    return {"brier": float(np.mean((probabilities - labels) ** 2)),
            "ece": float((held.count * np.abs(held.probability - held.frequency)).sum() / n),
            "auc": float(above / pairs) if pairs else float("nan"), **counts}


def precision_at(probabilities: np.ndarray, labels: np.ndarray, thresholds: tuple[float, ...]) -> dict[str, float]:
    """Of the examples with at least each probability: their number and the share of true ones (NaN where none)."""
    out: dict[str, float] = {}
    for threshold in thresholds:
        above = np.asarray(probabilities) >= threshold
        out[f"count@{threshold:g}"] = float(above.sum())
        out[f"precision@{threshold:g}"] = float(np.mean(np.asarray(labels)[above])) if above.any() else float("nan")
    return out


def plot_reliability(curves: Mapping[str, Reliability], path: Path) -> Path:
    """The share of true ones by probability, and how many examples there are, one column a name; returns the file."""
    figure = Figure(figsize=(4.5 * len(curves), 5.5), layout="constrained")
    axes = figure.subplots(2, len(curves), squeeze=False, height_ratios=(3, 1), sharex=True)
    for (upper, lower), (name, curve) in zip(axes.T, curves.items(), strict=True):
        upper.plot([0, 1], [0, 1], color="#d8dee9", linewidth=1)
        # Standard errors of a share: a bin of four examples proves little.
        error = np.sqrt(curve.frequency * (1 - curve.frequency) / curve.count)
        upper.errorbar(curve.probability, curve.frequency, yerr=error, marker="o", color="#5e81ac", elinewidth=1)
        upper.set(title=name, ylabel="share of facts", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        lower.bar(curve.probability, curve.count, width=0.8 / BINS, color="#4c566a")
        lower.set(xlabel="probability", ylabel="examples", yscale="log")
        for axis in (upper, lower):
            axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    return save_png(figure, path)
