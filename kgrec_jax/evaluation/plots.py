"""The pictures of a run, written as PNG files. No display, no global state, and no text that comes from the data.

Titles and names in any script would need a font for it; the pictures hold names of models, stages and metrics only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kgrec_jax.evaluation.render import HEADLINE, RECALL, metric_title

_COLOURS = {"all": "#4c566a", "warm": "#d08770", "cold": "#5e81ac"}
_LEVEL_COLOURS = {"low": "#5e81ac", "middle": "#a3be8c", "high": "#d08770"}
_MAX_CURVES = 6  # evaluation figures in one picture


def draw_plots(models: Mapping[str, Mapping[str, Any]], folder: Path) -> list[Path]:
    """Draws plots/{models,buckets,curves}.png of a run folder; returns those that had something to show.

    `models` are the entries of the report; the curves come from every metrics.jsonl below the folder but controls'.
    """
    plots = folder / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    drawn = [
        plot_models(models, plots / "models.png"),
        plot_buckets(models, plots / "buckets.png"),
        plot_curves([f for f in sorted(folder.rglob("metrics.jsonl")) if "controls" not in f.relative_to(folder).parts],
                    folder, plots / "curves.png"),
    ]
    return [path for path in drawn if path is not None]


def plot_models(models: Mapping[str, Mapping[str, Any]], path: Path) -> Path | None:
    """The headline metrics of all models with their intervals, warm and cold items apart; None without a figure."""
    metrics = [m for m in HEADLINE if any(m in e for e in models.values())]
    if not metrics:
        return None
    sides = ["all", *(s for s in ("warm", "cold") if any("cold" in e for e in models.values()))]
    figure = Figure(figsize=(5.5 * len(metrics), 1.2 + 0.3 * len(models) * len(sides)), layout="constrained")
    axes = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axis, metric in zip(axes, metrics):
        for n, side in enumerate(sides):
            entries = [e if side == "all" else e.get(side, {}) for e in models.values()]
            _bars(axis, entries, metric, 0.8 * ((n + 0.5) / len(sides) - 0.5), 0.8 / len(sides), side, _COLOURS[side])
        _name_rows(axis, list(models), f"{metric_title(metric)} (95 % interval over users)")
    _legend(figure, axes[0])
    return save_png(figure, path)


def plot_buckets(models: Mapping[str, Mapping[str, Any]], path: Path) -> Path | None:
    """Recall of the relevant items of each third by popularity; None where no model has buckets."""
    buckets = {name: e["buckets"]["item_popularity"] for name, e in models.items() if "buckets" in e}
    if not any(RECALL in level for b in buckets.values() for level in b.values()):
        return None
    figure = Figure(figsize=(7, 1.2 + 0.8 * len(buckets)), layout="constrained")
    axis = figure.subplots()
    for n, (level, colour) in enumerate(_LEVEL_COLOURS.items()):
        entries = [b.get(level, {}) for b in buckets.values()]
        _bars(axis, entries, RECALL, 0.8 * ((n + 0.5) / 3 - 0.5), 0.8 / 3, f"{level} popularity", colour)
    _name_rows(axis, list(buckets), f"{metric_title(RECALL)} of the items of each third by popularity")
    _legend(figure, axis)
    return save_png(figure, path)


def plot_curves(files: Sequence[Path], root: Path, path: Path) -> Path | None:
    """Training loss, and evaluation figures between 0 and 1, of each stage by step; None where nothing was trained."""
    stages = {str(f.parent.relative_to(root)): _read_rows(f) for f in files}
    stages = {name: rows for name, rows in stages.items() if any("loss" in row for row in rows)}
    if not stages:
        return None
    figure = Figure(figsize=(10, 2.6 * len(stages)), layout="constrained")
    axes = figure.subplots(len(stages), 2, squeeze=False)
    for (left, right), (name, rows) in zip(axes, stages.items()):
        _curve(left, rows, "loss")
        left.set(title=f"{name}: training loss", xlabel="step")
        evaluations = [row for row in rows if "loss" not in row]
        figures = dict.fromkeys(key for row in evaluations for key in row if key != "step")
        shares = [k for k in figures if all(0 <= row[k] <= 1 for row in evaluations if row.get(k) is not None)]
        for key in shares[:_MAX_CURVES]:
            _curve(right, evaluations, key)
        if shares:
            right.set(title=f"{name}: evaluation", xlabel="step")
            right.legend(frameon=False, fontsize="small")
        else:
            right.set_axis_off()
    return save_png(figure, path)


def plot_controls(controls: Mapping[str, Any] | str, path: Path) -> Path | None:
    """How far the run is ahead of each control, warm and cold items apart; None, and no picture, without controls."""
    ahead = {} if isinstance(controls, str) else {n: e for n, e in controls.items() if "paired" in e}
    if not ahead:
        path.unlink(missing_ok=True)  # of a run that was trained anew since
        return None
    sides = ["all", *(s for s in ("warm", "cold") if any("cold" in e for e in ahead.values()))]
    figure = Figure(figsize=(5.5 * len(HEADLINE), 1.2 + 0.3 * len(ahead) * len(sides)), layout="constrained")
    for axis, metric in zip(figure.subplots(1, len(HEADLINE), squeeze=False)[0], HEADLINE):
        for n, side in enumerate(sides):
            pairs = [(e if side == "all" else e.get(side, {})).get("paired", {}).get(metric) for e in ahead.values()]
            entries = [{} if p is None else {metric: p["difference"], "ci95": {metric: p["ci95"]}} for p in pairs]
            _bars(axis, entries, metric, 0.8 * ((n + 0.5) / len(sides) - 0.5), 0.8 / len(sides), side, _COLOURS[side])
        axis.axvline(0.0, color="#2e3440", linewidth=0.8)
        _name_rows(axis, list(ahead), f"run ahead by, {metric_title(metric)} (95 % interval over users)")
    _legend(figure, figure.axes[0])
    return save_png(figure, path)


def _bars(
    axis: Axes, entries: Sequence[Mapping[str, Any]], metric: str, offset: float, height: float, label: str, colour: str
) -> None:
    """One horizontal bar a model, shifted by `offset` rows; a model without the figure has none."""
    rows = [n for n, e in enumerate(entries) if e.get(metric) is not None]
    values = np.array([entries[n][metric] for n in rows])
    spans = [entries[n].get("ci95", {}).get(metric, (v, v)) for n, v in zip(rows, values)]
    error = np.abs(np.array(spans, float).reshape(-1, 2).T - values[None, :])  # [2, models]
    axis.barh(np.array(rows) + offset, values, height, label=label, color=colour,
              xerr=error if error.any() else None, error_kw={"elinewidth": 1, "ecolor": "#2e3440"})


def _legend(figure: Figure, axis: Axes) -> None:
    """One legend under all panels, where no bar is."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)


def _name_rows(axis: Axes, names: Sequence[str], title: str) -> None:
    axis.set(title=title, yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
    axis.spines[["top", "right"]].set_visible(False)


def _curve(axis: Axes, rows: Sequence[Mapping[str, Any]], key: str) -> None:
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    axis.plot([p[0] for p in points], [p[1] for p in points], marker="." if len(points) < 30 else "", label=key)
    axis.spines[["top", "right"]].set_visible(False)


def _read_rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def save_png(figure: Figure, path: Path) -> Path:
    """Writes the picture under a temporary name and renames it."""
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=120)
    temporary.replace(path)
    return path
