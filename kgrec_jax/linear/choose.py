"""Hyper-parameters of the closed forms, chosen by NDCG@10 on held-out interactions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import scipy.sparse as sp

from kgrec_jax.linear.ease import ease, gram
from kgrec_jax.linear.ials import Settings, ials
from kgrec_jax.linear.neighbours import NEIGHBOURS, item_knn, user_knn
from kgrec_jax.linear.parts import Part
from kgrec_jax.linear.slim import slim
from kgrec_jax.linear.spectral import spectral

EASE_L2 = (30.0, 60.0, 120.0, 250.0, 500.0, 1000.0, 2000.0)
DROPOUT = (0.33, 0.5)
RANKS = (16, 32, 64, 128)
SLOW_FROM = 6_000  # items; above, each inverse takes tens of seconds and only a part of the grid is tried
IALS_L2 = (0.001, 0.003, 0.01, 0.03, 0.1)
IALS_UNOBSERVED = (0.03, 0.1, 0.3, 1.0)
IALS_DIMS = (32, 64, 128)
IALS_COMPARED = 2_000_000  # interactions on which iALS's settings are compared, all of those of some users
SLIM_L1 = (0.1, 0.3, 1.0, 3.0)
SLIM_L2 = (30.0, 100.0, 300.0, 1000.0)
SLIM_SLOW_FROM = 3_000  # items; above, a fit takes minutes and the l2 alone is chosen
_MAX_USERS = 4_000  # users on which settings are compared
_SCORES = 1 << 26  # of one block of users


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
    ials_dim: int = 64
    ials_l2: float = IALS_L2[2]
    ials_unobserved: float = IALS_UNOBSERVED[1]
    slim_l1: float = SLIM_L1[1]
    slim_l2: float = SLIM_L2[2]

    @property
    def ials(self) -> Settings:
        """What iALS is fitted with."""
        return Settings(self.ials_dim, self.ials_l2, self.ials_unobserved)


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
    block, each = max(1, min(block, _SCORES // train.shape[1])), []
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


def choose_ials(train: sp.csr_matrix, heldout: sp.csr_matrix, seed: int = 0) -> tuple[Settings, float]:
    """(settings of iALS, their NDCG@10): λ, then α, then λ once more, and then the width.

    λ and α stand beside numbers of entries, so what is best for some of the users is so for all; the width may be a
    little small where the log is larger than `IALS_COMPARED`.
    """
    lengths = np.diff(train.indptr)
    if train.nnz > IALS_COMPARED:
        order = np.random.default_rng(seed).permutation(len(lengths))
        users = np.sort(order[np.cumsum(lengths[order]) <= IALS_COMPARED])
        train, heldout = train[users], heldout[users]
    best = Settings(IALS_DIMS[1], IALS_L2[2], IALS_UNOBSERVED[1])
    seen: dict[Settings, float] = {}

    def value(settings: Settings) -> float:
        if settings not in seen:
            seen[settings] = judge(ials(train, settings, seed=seed), train, heldout)
        return seen[settings]

    for name, grid in (("l2", IALS_L2), ("unobserved", IALS_UNOBSERVED), ("l2", IALS_L2), ("dim", IALS_DIMS)):
        start = grid.index(getattr(best, name))
        found, _ = _climb(grid, lambda x, n=name: value(dataclasses.replace(best, **{n: x})), start)
        best = dataclasses.replace(best, **{name: found})
    return best, value(best)


def choose_slim(train: sp.csr_matrix, heldout: sp.csr_matrix) -> tuple[float, float, float]:
    """(l1, l2, their NDCG@10) of SLIM."""
    l1, l2 = SLIM_L1[1], SLIM_L2[2]
    found: dict[tuple[float, float], float] = {}

    def value(l1: float, l2: float) -> float:
        if (l1, l2) not in found:
            found[l1, l2] = judge(slim(train, l1, l2, tolerance=1e-3), train, heldout)
        return found[l1, l2]

    l2, score = _climb(SLIM_L2, lambda x: value(l1, x), SLIM_L2.index(l2))
    if train.shape[1] <= SLIM_SLOW_FROM:
        l1, _ = _climb(SLIM_L1, lambda x: value(x, l2), SLIM_L1.index(l1))
        l2, score = _climb(SLIM_L2, lambda x: value(l1, x), SLIM_L2.index(l2))
    return l1, l2, score


def choose_linear(train: sp.csr_matrix, heldout: sp.csr_matrix, *, with_ease: bool,
                  with_ials: bool = False, with_slim: bool = False, without: tuple[str, ...] = (), seed: int = 0,
                  say: Callable[[str], None]) -> LinearChoice:
    """Settings of each closed form fitted on `train` and judged on `heldout`, both binary [Nu, I].

    With nothing held out, or without an item of many, the defaults stand, as they do for item-kNN and user-kNN where
    `without` names them.
    """
    start = 3
    default = LinearChoice(100, 100, EASE_L2[start], 0.0, EASE_L2[start], 32, {})
    if not heldout.nnz:
        return default
    scores: dict[str, float] = {}
    item_k, user_k = default.item_neighbours, default.user_neighbours
    if "item-knn" not in without:
        item_k, scores["item-knn"] = _best(list(NEIGHBOURS), lambda k: judge(item_knn(train, k), train, heldout))
    if "user-knn" not in without:
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
    further: dict[str, float] = {}
    if with_ials:
        chosen, scores["ials"] = choose_ials(train, heldout, seed)
        further |= {"ials_dim": chosen.dim, "ials_l2": chosen.l2, "ials_unobserved": chosen.unobserved}
    if with_slim:
        further["slim_l1"], further["slim_l2"], scores["slim"] = choose_slim(train, heldout)
    say("closed forms: " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()) + " (NDCG@10, held out)")
    return LinearChoice(int(item_k), int(user_k), l2, dropout, plain, int(rank), scores, **further)
