"""Full ranking of all candidates for every user: exact, tie-aware, in blocks of fixed shape on the device.

The device sorts out the K highest scores of each user and counts whatever ties with the last of them
(`ranking_heads.py`): a few integers a user. The metrics follow from those on the host in float64 (`metrics.py`), so
that their values depend neither on the block size nor on the device. Memory is one block of scores and a number for
each metric and user.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp

from kgrec_jax.errors import KgrecError
from kgrec_jax.evaluation.ranking_heads import Block, Heads, ScoreBlock, blocks
from kgrec_jax.metrics import per_user_metrics, recall, tied_ranks

_MEASURED = 4096  # users whose metrics are worked out at a time
_LEVELS = ("low", "middle", "high")


@dataclasses.dataclass(frozen=True)
class RankingResult:
    """The metrics of one scorer over one set of candidates, for each user who has something to be found there."""

    users: np.ndarray  # [n] int32 rows of the users
    per_user: dict[str, np.ndarray]  # "ndcg@10" -> [n] float64
    coverage: dict[str, float]  # "coverage@10" -> share of the candidates in anybody's list, ties by item row
    num_candidates: int
    buckets: dict[str, dict[str, dict[str, float]]] = dataclasses.field(default_factory=dict)
    warm: RankingResult | None = None  # among the items with an interaction in the fit part, those to be found there
    cold: RankingResult | None = None  # the same among the items without one
    lists: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0), np.int32))  # [n, K], -1 past the end
    beyond: dict[str, float] = dataclasses.field(default_factory=dict)  # "gini@10" -> …, see `beyond_accuracy`

    def means(self) -> dict[str, float]:
        """{metric: mean over the users}, coverage and what else is known of the lists too."""
        each = {name: float(values.mean()) for name, values in self.per_user.items()}
        return each | self.coverage | self.beyond


@dataclasses.dataclass
class _View:
    """One set of candidates and the groups of them that are counted apart; fills up block by block."""

    candidates: np.ndarray  # [I] bool
    groups: np.ndarray  # [V, I] bool, the first one all candidates
    ks: tuple[int, ...]
    total: np.ndarray  # [Nu, V] int64 relevant candidates of each user
    pending: list[tuple[np.ndarray, ...]] = dataclasses.field(default_factory=list)  # blocks that are not measured yet
    waiting: int = 0  # users in them
    users: list[np.ndarray] = dataclasses.field(default_factory=list)
    metrics: list[list[dict[str, np.ndarray]]] = dataclasses.field(default_factory=list)  # some users, a group
    listed: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)  # k -> [I] bool
    lists: list[np.ndarray] = dataclasses.field(default_factory=list)  # [n, K] int32, ties by item row

    @staticmethod
    def over(candidates: np.ndarray, groups: Sequence[np.ndarray], ks: tuple[int, ...],
             relevant: sp.csr_matrix) -> _View:
        stacked = np.stack([candidates, *(candidates & g for g in groups)])
        total = np.asarray(relevant @ stacked.T.astype(np.int64))
        return _View(candidates, stacked, ks, total, listed={k: np.zeros(len(candidates), bool) for k in ks})

    def add(self, block: Block, heads: Heads) -> None:
        """Take in a block, and measure when there are enough users: many small blocks are slow to measure alone."""
        keep, num_items, width = self.total[block.users, 0] > 0, len(self.candidates), heads.items.shape[1]
        keys = block.row * num_items + block.item  # rising
        listed = np.arange(len(keep))[:, None] * num_items + heads.items  # [b, K]
        place = np.minimum(np.searchsorted(keys, listed), max(len(keys) - 1, 0))
        relevant = keys[place] == listed if len(keys) else np.zeros(listed.shape, bool)
        ties = block.scores == heads.values[block.row, width - 1]
        row, item = block.row[ties], block.item[ties]
        last = np.stack([np.bincount(row[group[item]], minlength=len(keep)) for group in self.groups], axis=1)
        self.pending.append(tuple(x[keep] for x in (
            block.users, heads.values, heads.items, relevant, heads.last_size, heads.count, last)))
        self.waiting += int(keep.sum())
        if self.waiting >= _MEASURED:
            self.measure()

    def measure(self) -> None:
        """The metrics of the pending users."""
        if not self.waiting:
            return
        users, values, items, relevant, last_size, count, last = (np.concatenate(x) for x in zip(*self.pending))
        self.pending, self.waiting = [], 0
        self.users.append(users)
        by_group = []
        for v, group in enumerate(self.groups):
            ranks = tied_ranks(values, relevant & group[items], count, last_size, last[:, v], self.total[users, v])
            # Of the groups beside the first, recall alone is told.
            by_group.append(per_user_metrics(ranks, self.ks) if v == 0 else
                            {f"recall@{k}": recall(ranks, k) for k in self.ks})
        self.metrics.append(by_group)
        exists = np.arange(items.shape[1]) < count[:, None]
        self.lists.append(np.where(exists, items, -1))
        for k in self.ks:
            self.listed[k][items[:, :k][exists[:, :k]]] = True

    def result(self) -> RankingResult | None:
        """None where nobody has anything to find among the candidates."""
        self.measure()
        users = np.concatenate(self.users) if self.users else np.zeros(0, np.int32)
        if not len(users):
            return None
        size = int(self.candidates.sum())
        coverage = {f"coverage@{k}": float(listed.sum() / size) for k, listed in self.listed.items()}
        return RankingResult(users.astype(np.int32), self.group(0), coverage, size, lists=np.concatenate(self.lists))

    def group(self, v: int) -> dict[str, np.ndarray]:
        """{metric: [n]} of one group of items over all users of the view."""
        return {name: np.concatenate([some[v][name] for some in self.metrics]) for name in self.metrics[0][v]}


def levels(counts: np.ndarray) -> np.ndarray:
    """[n] 0 for a count of nothing, else 1, 2, 3 for its third of the others; equal counts share one level."""
    some = counts[counts > 0]
    if not len(some):
        return np.zeros(len(counts), np.int64)
    edges = np.quantile(some, [1 / 3, 2 / 3], method="inverted_cdf")
    return np.where(counts > 0, 1 + np.searchsorted(edges, counts, side="left"), 0)


def evaluate_ranking(
    score_block: ScoreBlock,
    *,
    known: sp.csr_matrix,
    relevant: sp.csr_matrix,
    num_items: int,
    candidates: np.ndarray | None = None,
    fit: sp.csr_matrix | None = None,
    ks: Sequence[int] = (10, 20),
    block: int = 256,
) -> RankingResult:
    """Rank all candidates for every user who has a relevant one among them.

    score_block: user rows [b] -> scores [b, I], always called with the same b (the last block repeats a user); an array
    of JAX is used up, so it has to be a new one each time.
    known [Nu, I]: left out of each user's list. relevant [Nu, I]: to be found. candidates [I] bool: default all items.
    fit [Nu, I]: what the model was fitted on (default: known); it says which items are warm and which cold, and cuts
    items by popularity and users by activity into thirds.
    Raises KgrecError where nobody has anything to be found, a relevant item is known, or a score is NaN.
    """
    candidates = np.ones(num_items, bool) if candidates is None else np.asarray(candidates, bool)
    known, relevant = _pairs(known), _pairs(relevant)
    fit = known if fit is None else _pairs(fit)
    ks = tuple(sorted(ks))
    clash = relevant.multiply(known).nnz
    if clash:
        raise KgrecError(
            f"evaluation: found {clash} held-out pairs that the users already know, expected none; cut the split again"
        )
    popularity = np.bincount(fit.indices, minlength=num_items)  # [I]
    item_level = levels(popularity)
    views = {"all": _View.over(candidates, [item_level == n for n in (1, 2, 3)], ks, relevant)}
    is_cold = candidates & (popularity == 0)
    if is_cold.any():
        views["warm"] = _View.over(candidates & ~is_cold, [], ks, relevant)
        views["cold"] = _View.over(is_cold, [], ks, relevant)
    users = np.flatnonzero(views["all"].total[:, 0] > 0)
    if not len(users):
        raise KgrecError("evaluation: found no user with a held-out item among the candidates, expected at least one")
    width = min(max(ks), num_items)
    active = [view for view in views.values() if view.total[users, 0].any()]
    sets = np.stack([view.candidates for view in active])
    for found in blocks(score_block, users, known, relevant, sets, width, block):
        for view, heads in zip(active, found.heads, strict=True):
            view.add(found, heads)
    whole = views["all"].result()
    activity = levels(fit.getnnz(axis=1))[whole.users]
    buckets = {"item_popularity": _by_item(views["all"], ks), "user_activity": _by_user(whole, activity)}
    warm, cold = (views["warm"].result(), views["cold"].result()) if is_cold.any() else (whole, None)
    return dataclasses.replace(whole, buckets=buckets, warm=warm, cold=cold)


def _by_item(view: _View, ks: Sequence[int]) -> dict[str, dict[str, float]]:
    """Recall of the relevant items of each third by popularity, in lists of all candidates."""
    out = {}
    total = view.total[np.concatenate(view.users)]
    for v, name in enumerate(_LEVELS, start=1):
        has = total[:, v] > 0
        if has.any():
            metrics = view.group(v)
            out[name] = {f"recall@{k}": float(metrics[f"recall@{k}"][has].mean()) for k in ks}
            out[name] |= {"users": int(has.sum()), "items": int(view.groups[v].sum())}
    return out


def _by_user(result: RankingResult, activity: np.ndarray) -> dict[str, dict[str, float]]:
    """All metrics of the users of each third by activity, and of those without any history."""
    out = {}
    for level, name in enumerate(("none", *_LEVELS)):
        rows = activity == level
        if rows.any():
            out[name] = {metric: float(values[rows].mean()) for metric, values in result.per_user.items()}
            out[name]["users"] = int(rows.sum())
    return out


def _pairs(matrix: sp.csr_matrix) -> sp.csr_matrix:
    """What is not 0, each pair once and in order, as bool; the places of a matrix that is so already are not copied."""
    matrix = matrix.tocsr()
    if not (matrix.has_canonical_format and matrix.data.all()):
        matrix = (matrix != 0).tocsr()
        matrix.sum_duplicates()
    return sp.csr_matrix((np.ones(matrix.nnz, bool), matrix.indices, matrix.indptr), shape=matrix.shape)


def top_k(
    score_block: ScoreBlock,
    *,
    users: np.ndarray,
    known: sp.csr_matrix,
    num_items: int,
    k: int,
    candidates: np.ndarray | None = None,
    block: int = 256,
) -> tuple[np.ndarray, np.ndarray]:
    """The k best candidates of each user, the known ones left out: items [n, k] int32 and scores [n, k] float32.

    Falling by score, equal scores by item row. Where a user has fewer candidates, the rest is item -1 with score -inf.
    """
    candidates = np.ones(num_items, bool) if candidates is None else np.asarray(candidates, bool)
    known, users, width = _pairs(known), np.asarray(users), min(k, num_items)
    items = np.full((len(users), k), -1, np.int32)
    values = np.full((len(users), k), -np.inf, np.float32)
    done = 0
    for found in blocks(score_block, users, known, None, candidates[None], width, block):
        (heads,), rows = found.heads, slice(done, done + len(found.users))
        items[rows, :width] = np.where(np.isneginf(heads.values), -1, heads.items)
        values[rows, :width] = heads.values
        done += len(found.users)
    return items, values
