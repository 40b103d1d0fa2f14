"""Another order of a user's best items, in which something is given up of the score for variety or calibration.

Both ways are greedy: the list begins empty and takes, one after another, the candidate with the best balance. Scores
are brought to [0, 1] over each user's candidates first, so that a trade-off means the same for every user and model.
A trade-off of 0 keeps the order of the scores; 1 asks for the other side alone (its ties go by the score).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import scipy.sparse as sp

from kgrec_jax.errors import KgrecError
from kgrec_jax.evaluation.beyond_accuracy import SMOOTHING, ItemVectors, divergence, profile

CANDIDATES = 100  # highest items of each user that are ordered anew
_DENSE = 20_000_000  # shares that are held as a dense table: 80 MB
_USERS = 128  # of a block: 128 · 100² cosines are 5 MB


@dataclasses.dataclass(frozen=True)
class Rerank:
    """What is balanced with the score, and how much of it."""

    kind: Literal["mmr", "calibrated"]  # variety by content, or the history's shares of kinds
    tradeoff: float  # from 0, the order of the scores, to 1

    @property
    def flag(self) -> str:
        """As the command line calls it."""
        return "--diversity" if self.kind == "mmr" else "--calibrate"


@dataclasses.dataclass(frozen=True)
class Material:
    """What a reordering knows of the items; None where the data have nothing to say."""

    vectors: ItemVectors | None
    shares: sp.csr_matrix | None  # [I, C] p(kind | item)

    def check(self, how: Rerank) -> None:
        """KgrecError where the reordering has nothing to go by, or its trade-off is out of bounds."""
        if not 0 <= how.tradeoff <= 1:
            raise KgrecError(f"{how.flag}: found {how.tradeoff:g}, expected a number from 0 to 1")
        if how.kind == "mmr" and self.vectors is None:
            raise KgrecError(f"{how.flag}: found a recommender without text and without a graph, expected one of them: "
                             "nothing says which items are alike")
        if how.kind == "calibrated" and self.shares is None:
            raise KgrecError(f"{how.flag}: found a recommender without kinds of items, expected a column such as "
                             "genres in items.tsv or such a relation in the graph when the run was made")

    def reorder(self, how: Rerank, items: np.ndarray, scores: np.ndarray, k: int,
                history: sp.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
        """(items [n, k], their scores [n, k]) out of candidates [n, C] by falling score, -1 past the last.

        history [n, I]: of the users, for calibration. Raises KgrecError as `check` does.
        """
        self.check(how)
        out = np.full((len(items), k), -1, np.int64)
        table = self.shares if how.kind == "calibrated" else None
        if table is not None and np.prod(table.shape) <= _DENSE:  # looked up many times faster
            table = table.toarray()
        for start in range(0, len(items), _USERS):
            rows = slice(start, start + _USERS)
            some, value = items[rows], unit_scores(scores[rows], items[rows] >= 0)
            if how.kind == "mmr":
                out[rows] = mmr(value, self.vectors.similarities(some), k, how.tradeoff)
                continue
            target = profile(history[rows], self.shares)
            for n, (candidates, own, wanted) in enumerate(zip(some, value, target, strict=True)):
                kinds = np.flatnonzero(wanted)  # the others add nothing to the divergence
                rows_of = table[np.maximum(candidates, 0)]
                own_kinds = rows_of[:, kinds].toarray() if sp.issparse(rows_of) else rows_of[:, kinds]
                has = np.asarray(rows_of.sum(axis=1)).ravel() > 0
                out[start + n] = calibrated(own, own_kinds, has, wanted[kinds], k, how.tradeoff)
        place = np.maximum(out, 0)
        there = out >= 0
        chosen = np.where(there, np.take_along_axis(items, place, axis=1), -1).astype(np.int32)
        value = np.where(there, np.take_along_axis(scores, place, axis=1), -np.inf).astype(np.float32)
        return chosen, value


def unit_scores(scores: np.ndarray, exists: np.ndarray) -> np.ndarray:
    """[n, C] float64: each row from 0 (its lowest candidate) to 1 (its highest), -inf where there is no candidate."""
    values = np.where(exists, scores, np.nan).astype(np.float64)
    high = np.max(np.where(exists, values, -np.inf), axis=1, keepdims=True, initial=-np.inf)
    low = np.min(np.where(exists, values, np.inf), axis=1, keepdims=True, initial=np.inf)
    span = np.where(high > low, high - low, 1.0)
    return np.where(exists, (values - np.where(np.isfinite(low), low, 0.0)) / span, -np.inf)


def mmr(scores: np.ndarray, similarity: np.ndarray, k: int, tradeoff: float) -> np.ndarray:
    """[n, k] places of the candidates chosen, -1 where there are fewer.

    Maximal marginal relevance (Carbonell & Goldstein, "The use of MMR", SIGIR 1998): the next is
    argmax_i (1 − λ) s_i − λ max_{j chosen} cos(i, j). scores [n, C] in [0, 1], -inf where there is no candidate;
    similarity [n, C, C].
    """
    n, width = scores.shape
    rows, free = np.arange(n), np.isfinite(scores)
    nearest = np.zeros((n, width))
    base = np.where(free, scores, 0.0)
    out = np.full((n, k), -1, np.int64)
    for place in range(min(k, width)):
        # Of equals the one with the higher score: candidates come in that order, and argmax takes the first.
        # Before anything is chosen there is nothing to differ from, so the first is the best by score.
        value = base if place == 0 else (1.0 - tradeoff) * base - tradeoff * nearest
        best = np.where(free, value, -np.inf).argmax(axis=1)
        there = free[rows, best]
        out[there, place] = best[there]
        free[rows, best] = False
        toward = similarity[rows, best]  # [n, C]
        nearest = toward.astype(np.float64) if place == 0 else np.maximum(nearest, toward)
    return out


def calibrated(scores: np.ndarray, shares: np.ndarray, has_kind: np.ndarray, target: np.ndarray, k: int,
               tradeoff: float, smoothing: float = SMOOTHING) -> np.ndarray:
    """[k] places of one user's chosen candidates, -1 where there are fewer.

    Steck, "Calibrated recommendations", RecSys 2018, equation 7, greedy: the next is the i that maximises
    (1 − λ) Σ_{j in list + i} s_j − λ KL(p ‖ q(list + i)). scores [C] in [0, 1], -inf where there is no candidate;
    shares [C, G] and target [G]: p(g | i) and p(g) over the kinds of the history; has_kind [C]: whether an item has
    any kind.
    """
    free = np.isfinite(scores)
    base = np.where(free, scores, 0.0)
    total, count = np.zeros(len(target)), 0
    out = np.full(k, -1, np.int64)
    for place in range(min(k, int(free.sum()))):
        value = (1.0 - tradeoff) * base
        if target.any():
            size = np.maximum(count + has_kind, 1)[:, None]
            value = value - tradeoff * divergence(target[None], (total[None] + shares) / size, smoothing)
        best = int(np.where(free, value, -np.inf).argmax())
        out[place] = best
        free[best] = False
        total, count = total + shares[best], count + int(has_kind[best])
    return out
