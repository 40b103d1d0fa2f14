"""What variety and calibration of the fused lists cost in accuracy, on the test users of a finished run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from matplotlib.figure import Figure

from kgrec_jax.data.tables import write_tsv
from kgrec_jax.evaluation.beyond_accuracy import ListMeasures, exposure
from kgrec_jax.evaluation.plots import save_png
from kgrec_jax.evaluation.ranking import top_k
from kgrec_jax.serving.recommender import Recommender
from kgrec_jax.serving.rerank import CANDIDATES, Rerank

TRADEOFFS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
MAX_USERS = 2000
K = 10
COLUMNS = ("way", "tradeoff", "ndcg@10", "diversity@10", "miscalibration@10", "novelty@10", "coverage@10")


def list_ndcg(lists: np.ndarray, relevant: sp.csr_matrix, k: int = K) -> np.ndarray:
    """[n] NDCG@k of lists [n, ≥k] as they stand, with what is to be found [n, I] (Järvelin & Kekäläinen 2002)."""
    place = np.maximum(lists[:, :k], 0)
    found = np.asarray(relevant[np.arange(len(lists))[:, None], place].todense(), bool) & (lists[:, :k] >= 0)
    discount = 1.0 / np.log2(np.arange(2, k + 2))
    ideal = np.concatenate([[0.0], np.cumsum(discount)])[np.minimum(relevant.getnnz(axis=1), k)]
    gain = (found * discount[:found.shape[1]]).sum(axis=1)
    return np.divide(gain, ideal, out=np.zeros(len(lists)), where=ideal > 0)


def measure_tradeoffs(recommender: Recommender, measures: ListMeasures, relevant: sp.csr_matrix, seed: int,
                      tradeoffs: Sequence[float] = TRADEOFFS) -> list[dict[str, Any]]:
    """A row for each way and trade-off: NDCG@10 of the lists, and what they are like (COLUMNS).

    relevant [Nu, I]: what is to be found, by whom; of more than MAX_USERS users that many are drawn by the seed. A way
    that the data have nothing for has no row.
    """
    users = np.flatnonzero(relevant.getnnz(axis=1))
    if len(users) > MAX_USERS:
        users = np.sort(np.random.default_rng((seed, 31)).choice(users, MAX_USERS, replace=False))
    histories, num_items = recommender.histories, len(recommender.item_ids)
    items, scores = top_k(
        lambda rows: recommender.model.scores(histories.take(rows)), users=users, known=recommender.known,
        num_items=num_items, k=min(CANDIDATES, num_items), candidates=measures.candidates,
        block=max(8, min(256, 2_000_000 // num_items)))
    material, wanted, history = recommender.material, relevant[users], histories.matrix[users]
    rows = []
    for kind, there in (("mmr", material.vectors is not None), ("calibrated", material.shares is not None)):
        for tradeoff in tradeoffs if there else ():
            lists, _ = material.reorder(Rerank(kind, tradeoff), items, scores, K, history)
            each = measures.per_user(lists, users)
            row = {"way": kind, "tradeoff": tradeoff, "ndcg@10": float(list_ndcg(lists, wanted).mean())}
            row |= {f"{name}@{K}": float(np.nanmean(v)) for name, v in each.items() if np.isfinite(v).any()}
            shown = exposure(lists, num_items) > 0
            rows.append(row | {"coverage@10": float(shown.sum() / measures.candidates.sum())})
    return rows


def write_tradeoffs(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """tradeoff.tsv and plots/tradeoff.png of a run folder."""
    write_tsv(folder / "tradeoff.tsv", {c: [_cell(row.get(c, "")) for row in rows] for c in COLUMNS})
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    plot_tradeoffs(rows, folder / "plots" / "tradeoff.png")


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


@dataclasses.dataclass(frozen=True)
class _Panel:
    way: str
    metric: str
    title: str


_PANELS = (_Panel("mmr", "diversity@10", "variety: --diversity"),
           _Panel("calibrated", "miscalibration@10", "calibration: --calibrate"))


def plot_tradeoffs(rows: Sequence[dict[str, Any]], path: Path) -> Path | None:
    """NDCG@10 against what is gained, a panel for each way, a point for each trade-off; None without a row."""
    panels = [(panel, [r for r in rows if r["way"] == panel.way]) for panel in _PANELS]
    panels = [(panel, own) for panel, own in panels if own]
    if not panels:
        return None
    figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    for axis, (panel, own) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axis.plot([r[panel.metric] for r in own], [r["ndcg@10"] for r in own], marker="o", color="#5e81ac")
        for row in own:
            axis.annotate(f"{row['tradeoff']:g}", (row[panel.metric], row["ndcg@10"]), xytext=(4, 4),
                          textcoords="offset points", fontsize="small")
        axis.set(title=panel.title, xlabel=panel.metric, ylabel="NDCG@10")
        axis.spines[["top", "right"]].set_visible(False)
        if panel.metric.startswith("miscalibration"):
            axis.invert_xaxis()  # the better side is the right one in both panels
    return save_png(figure, path)


def lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The table for a terminal."""
    names = [c for c in COLUMNS if any(c in row for row in rows)]
    shown = [names] + [[f"{row[c]:.4f}" if isinstance(row.get(c), float) and c != "tradeoff" else str(row.get(c, ""))
                        for c in names] for row in rows]
    width = [max(len(row[n]) for row in shown) for n in range(len(names))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, width, strict=True)).rstrip() for row in shown]
