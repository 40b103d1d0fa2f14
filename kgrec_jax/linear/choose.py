"""Hyper-parameters of the closed forms, chosen by NDCG@10 on held-out interactions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import scipy.sparse as sp

from kgrec_jax.linear.ease import ease, gram
from kgrec_jax.linear.neighbours import NEIGHBOURS, item_knn, user_knn
from kgrec_jax.linear.parts import Part
from kgrec_jax.linear.spectral import spectral

EASE_L2 = (30.0, 60.0, 120.0, 250.0, 500.0, 1000.0, 2000.0)
DROPOUT = (0.33, 0.5)
RANKS = (16, 32, 64, 128)
SLOW_FROM = 6_000  # items; above, each inverse takes tens of seconds and only a part of the grid is tried
_MAX_USERS = 4_000  # users on which settings are compared


@dataclasses.dataclass(frozen=True)
class LinearChoice:
    """What was chosen, each with the NDCG@10 on the held-out interactions that chose it."""

    item_neighbours: int
    user_neighbours: int
    ease_l2: float
    ease_dropout: float  # of the part `collaborative`; the row `ease` is Steck's own, without
    plain_ease_l2: float
    rank: int
    scores: dict[str, float]


def ndcg10(scores: np.ndarray, seen: sp.csr_matrix, relevant: sp.csr_matrix) -> np.ndarray:
    """NDCG@10 of each user with something relevant, [n]; `scores` [b, I] is overwritten where `seen`."""
    rows = np.repeat(np.arange(seen.shape[0]), np.diff(seen.indptr))
    scores[rows, seen.indices] = -np.inf
    k = min(10, scores.shape[1])
    top = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    order = np.argsort(-np.take_along_axis(scores, top, axis=1), axis=1, kind="stable")
    top = np.take_along_axis(top, order, axis=1)  # [b, k]
    hits = np.asarray(relevant[np.arange(len(top))[:, None], top].todense())
    discount = 1.0 / np.log2(np.arange(2, k + 2))
    count = relevant.getnnz(axis=1)
    has = count > 0
    ideal = np.cumsum(discount)[np.minimum(count[has], k) - 1]
    return (hits @ discount)[has] / ideal


def judge(part: Part, train: sp.csr_matrix, relevant: sp.csr_matrix, block: int = 1024) -> float:
    """NDCG@10 of one part over the items that it knows; histories are the rows of `train`, which are left out."""
    users = np.flatnonzero(relevant.getnnz(axis=1) > 0)
    if len(users) > _MAX_USERS:
        users = np.sort(np.random.default_rng(0).choice(users, _MAX_USERS, replace=False))
    each = []
    for start in range(0, len(users), block):
        rows = users[start:start + block]
        scores = np.array(part.scores(train[rows]))
        scores[:, ~part.known] = -np.inf
        each.append(ndcg10(scores, train[rows], relevant[rows]))
    return float(np.concatenate(each).mean()) if each else 0.0


def _best(options: list, value: Callable[[object], float]) -> tuple[object, float]:
    values = [value(option) for option in options]
    at = int(np.argmax(values))
    return options[at], values[at]


def _climb(grid: tuple[float, ...], value: Callable[[float], float], start: int) -> tuple[float, float]:
    """The best of an ordered grid by walking up from `start`: half of the inverses of a full scan."""
    seen: dict[int, float] = {}

    def at(index: int) -> float:
        if index not in seen:
            seen[index] = value(grid[index])
        return seen[index]

    here = start
    while True:
        around = [i for i in (here - 1, here, here + 1) if 0 <= i < len(grid)]
        best = max(around, key=at)
        if best == here:
            return grid[here], at(here)
        here = best


def choose_linear(train: sp.csr_matrix, heldout: sp.csr_matrix, *, with_ease: bool,
                  say: Callable[[str], None]) -> LinearChoice:
    """Settings of each closed form fitted on `train` and judged on `heldout`, both binary [Nu, I].

    With nothing held out, or without an item of many, the defaults stand.
    """
    start = 3
    default = LinearChoice(100, 100, EASE_L2[start], 0.0, EASE_L2[start], 32, {})
    if not heldout.nnz:
        return default
    scores: dict[str, float] = {}
    item_k, scores["item-knn"] = _best(list(NEIGHBOURS), lambda k: judge(item_knn(train, k), train, heldout))
    user_k, scores["user-knn"] = _best(list(NEIGHBOURS), lambda k: judge(user_knn(train, k), train, heldout))
    ranks = [r for r in RANKS if r < min(train.shape)] or [1]
    rank, scores["spectral"] = _best(ranks, lambda r: judge(spectral(train, r), train, heldout))
    plain, l2, dropout = default.plain_ease_l2, default.ease_l2, 0.0
    if with_ease:
        matrix = gram(train)
        slow = train.shape[1] > SLOW_FROM
        plain, scores["ease"] = _climb(EASE_L2, lambda x: judge(ease(train, x, 0.0, matrix), train, heldout), start)
        l2, best = plain, scores["ease"]
        for share in () if slow else DROPOUT:
            found, value = _climb(EASE_L2, lambda x, p=share: judge(ease(train, x, p, matrix), train, heldout),
                                  EASE_L2.index(l2))
            if value > best:
                l2, dropout, best = found, share, value
        scores["collaborative"] = best
    say("closed forms: " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()) + " (NDCG@10, held out)")
    return LinearChoice(int(item_k), int(user_k), l2, dropout, plain, int(rank), scores)
