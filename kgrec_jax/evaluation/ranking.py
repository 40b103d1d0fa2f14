"""Full ranking of all candidates for every user: exact, tie-aware, in blocks of fixed shape on the device.

The device sorts out the K highest scores of each user and counts whatever ties with the last of them: a few integers a
user. The metrics follow from those on the host in float64 (`metrics.py`), so that their values depend neither on the
block size nor on the device. Memory is one block of scores and a number for each metric and user.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp

from kgrec_jax.errors import KgrecError
from kgrec_jax.metrics import per_user_metrics, tied_ranks

ScoreBlock = Callable[[np.ndarray], "jax.Array | np.ndarray"]  # user rows [b] -> scores [b, I]

_KNOWN, _RELEVANT = 1, 2  # bits of the flags that travel to the device beside a block of scores
_MAX_SCORES = 2**25  # scores of one block: 128 MB in float32
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


class _Heads(NamedTuple):
    """The K best of each user of a block, and what ties with the last of them."""

    values: jax.Array  # [b, K] float32, -inf past the last candidate
    items: jax.Array  # [b, K] int32
    relevant: jax.Array  # [b, K] bool
    count: jax.Array  # [b] int32 candidates of the user, the known ones left out
    last_size: jax.Array  # [b] int32 candidates whose score equals values[:, -1]
    last_relevant: jax.Array  # [b, V] int32 relevant ones of those, in each group of items
    has_nan: jax.Array  # [b] bool


@functools.partial(jax.jit, static_argnames="width")
def _heads(scores: jax.Array, flags: jax.Array, candidates: jax.Array, groups: jax.Array, *, width: int) -> _Heads:
    scores = scores.astype(jnp.float32)
    allowed = ((flags & _KNOWN) == 0) & candidates[None, :]  # [b, I]
    has_nan = jnp.any(allowed & jnp.isnan(scores), axis=1)
    # A candidate is never -inf, which marks the rest; and top_k sorts -0 below 0, which are one score.
    limit = jnp.finfo(jnp.float32)
    scores = jnp.where(scores == 0, jnp.zeros_like(scores), jnp.clip(scores, limit.min, limit.max))
    scores = jnp.where(allowed, scores, -jnp.inf)
    # Equal scores come in the order of the rows. Without the barrier XLA merges the slice below into top_k, no longer
    # sees that it is one, and sorts whole rows: many times slower.
    values, items = jax.lax.optimization_barrier(jax.lax.top_k(scores, width))  # [b, K]
    relevant = ((flags & _RELEVANT) != 0) & allowed
    last = allowed & (scores == values[:, -1:])  # [b, I]
    counts = [jnp.sum(last & relevant & groups[v][None, :], axis=1) for v in range(groups.shape[0])]
    return _Heads(
        values=values,
        items=items.astype(jnp.int32),
        relevant=jnp.take_along_axis(relevant, items, axis=1),
        count=jnp.sum(allowed, axis=1),
        last_size=jnp.sum(last, axis=1),
        last_relevant=jnp.stack(counts, axis=1),
        has_nan=has_nan,
    )


@dataclasses.dataclass
class _View:
    """One set of candidates and the groups of them that are counted apart; fills up block by block."""

    candidates: np.ndarray  # [I] bool
    groups: np.ndarray  # [V, I] bool, the first one all candidates
    ks: tuple[int, ...]
    total: np.ndarray  # [Nu, V] int64 relevant candidates of each user
    users: list[np.ndarray] = dataclasses.field(default_factory=list)
    metrics: list[list[dict[str, np.ndarray]]] = dataclasses.field(default_factory=list)  # a block, a group
    listed: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)  # k -> [I] bool
    lists: list[np.ndarray] = dataclasses.field(default_factory=list)  # [b, K] int32 of each block, ties by item row

    @staticmethod
    def over(
        candidates: np.ndarray, groups: Sequence[np.ndarray], ks: tuple[int, ...], relevant: sp.csr_matrix
    ) -> _View:
        stacked = np.stack([candidates, *(candidates & g for g in groups)])
        total = np.asarray(relevant.astype(np.int64) @ stacked.T.astype(np.int64))
        return _View(candidates, stacked, ks, total, listed={k: np.zeros(len(candidates), bool) for k in ks})

    def add(self, users: np.ndarray, heads: _Heads) -> None:
        """Take in the real (unpadded) first rows of a block."""
        h = _Heads(*(np.asarray(x)[: len(users)] for x in heads))
        if h.has_nan.any():
            raise _nan_error(users[h.has_nan][0])
        keep = self.total[users, 0] > 0
        users, h = users[keep], _Heads(*(x[keep] for x in h))
        self.users.append(users)
        by_group = []
        for v, group in enumerate(self.groups):
            ranks = tied_ranks(
                h.values, h.relevant & group[h.items], h.count, h.last_size, h.last_relevant[:, v], self.total[users, v]
            )
            by_group.append(per_user_metrics(ranks, self.ks))
        self.metrics.append(by_group)
        exists = np.arange(h.items.shape[1]) < h.count[:, None]
        self.lists.append(np.where(exists, h.items, -1))
        for k in self.ks:
            self.listed[k][h.items[:, :k][exists[:, :k]]] = True

    def result(self) -> RankingResult | None:
        """None where nobody has anything to find among the candidates."""
        users = np.concatenate(self.users) if self.users else np.zeros(0, np.int32)
        if not len(users):
            return None
        size = int(self.candidates.sum())
        coverage = {f"coverage@{k}": float(listed.sum() / size) for k, listed in self.listed.items()}
        return RankingResult(users.astype(np.int32), self.group(0), coverage, size, lists=np.concatenate(self.lists))

    def group(self, v: int) -> dict[str, np.ndarray]:
        """{metric: [n]} of one group of items over all users of the view."""
        return {name: np.concatenate([block[v][name] for block in self.metrics]) for name in self.metrics[0][v]}


def _nan_error(user: int) -> KgrecError:
    return KgrecError(
        f"scores of user row {user}: found NaN, expected numbers; the model diverged (lower its learning rate)"
    )


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

    score_block: user rows [b] -> scores [b, I], always called with the same b (the last block repeats a user).
    known [Nu, I]: left out of each user's list. relevant [Nu, I]: to be found. candidates [I] bool: default all items.
    fit [Nu, I]: what the model was fitted on (default: known); it says which items are warm and which cold, and cuts
    items by popularity and users by activity into thirds.
    Raises KgrecError where nobody has anything to be found, a relevant item is known, or a score is NaN.
    """
    candidates = np.ones(num_items, bool) if candidates is None else np.asarray(candidates, bool)
    known, relevant = (known != 0).tocsr(), (relevant != 0).tocsr()
    fit = known if fit is None else (fit != 0).tocsr()
    ks = tuple(sorted(ks))
    clash = relevant.multiply(known).nnz
    if clash:
        raise KgrecError(
            f"evaluation: found {clash} held-out pairs that the users already know, expected none; cut the split again"
        )
    popularity = np.asarray(fit.sum(axis=0)).ravel()  # [I]
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
    for rows, scores, flags in _blocks(score_block, users, known, relevant, num_items, block):
        for view in active:
            view.add(rows, _heads(scores, flags, view.candidates, view.groups, width=width))
    whole = views["all"].result()
    activity = levels(np.asarray(fit.sum(axis=1)).ravel())[whole.users]
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


def _blocks(
    score_block: ScoreBlock,
    users: np.ndarray,
    known: sp.csr_matrix,
    relevant: sp.csr_matrix | None,
    num_items: int,
    block: int,
) -> Iterator[tuple[np.ndarray, jax.Array, np.ndarray]]:
    """(user rows, scores [b, I], flags [b, I] uint8) of one block after another; b is fixed, the rows may be fewer."""
    size = max(1, min(block, len(users), _MAX_SCORES // num_items))
    for start in range(0, len(users), size):
        rows = users[start : start + size]
        padded = np.concatenate([rows, np.full(size - len(rows), rows[-1])]).astype(np.int32)
        scores = score_block(padded)
        if scores.shape != (size, num_items):
            raise ValueError(f"score_block gave {scores.shape} for {size} users, expected {(size, num_items)}")
        flags = np.zeros((size, num_items), np.uint8)
        for matrix, bit in ((known, _KNOWN), (relevant, _RELEVANT)):
            if matrix is not None:
                part = matrix[rows]
                flags[np.repeat(np.arange(len(rows)), np.diff(part.indptr)), part.indices] |= bit
        yield rows, jnp.asarray(scores), flags


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
    known = (known != 0).tocsr()
    width = min(k, num_items)
    items = np.full((len(users), k), -1, np.int32)
    values = np.full((len(users), k), -np.inf, np.float32)
    done = 0
    for rows, scores, flags in _blocks(score_block, np.asarray(users), known, None, num_items, block):
        heads = _heads(scores, flags, candidates, candidates[None, :], width=width)
        if np.asarray(heads.has_nan)[: len(rows)].any():
            raise _nan_error(rows[np.asarray(heads.has_nan)[: len(rows)]][0])
        value = np.asarray(heads.values)[: len(rows)]
        items[done : done + len(rows), :width] = np.where(np.isneginf(value), -1, np.asarray(heads.items)[: len(rows)])
        values[done : done + len(rows), :width] = value
        done += len(rows)
    return items, values
