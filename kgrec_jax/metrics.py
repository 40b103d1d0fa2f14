"""Top-k ranking metrics of each user, in expectation over the orders of equal scores.

A scorer that gives many items the same score has no order of its own among them; reporting the order that a sort
happened to leave rewards or punishes luck. So each metric here is its exact mean over all orders of the tied items, in
closed form. It needs four integers for each of the first K places of a list: the size of the tied group that holds the
place, how many candidates and how many relevant ones stand ahead of that group, and how many relevant ones are in it.

Every function returns one float64 a user; a caller reduces them to (sum, count), and only it knows which users count.
Sums run along rows, not through BLAS, whose rounding changes with the number of rows. Binary relevance throughout.
Without ties the values are those of the textbook definitions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class TiedRanks:
    """What the first K places of each of n lists hold. Places past the last candidate have size 0."""

    above: np.ndarray  # [n, K] int64 candidates ahead of the tied group that holds this place
    size: np.ndarray  # [n, K] int64 candidates in that group, those past place K too
    relevant_above: np.ndarray  # [n, K] int64
    relevant_in: np.ndarray  # [n, K] int64
    total: np.ndarray  # [n] int64 relevant candidates of the user, listed or not

    @functools.cached_property
    def chance(self) -> np.ndarray:
        """[n, K] probability that the item at each place is relevant."""
        return self.relevant_in / np.maximum(self.size, 1)

    @functools.cached_property
    def first_hit(self) -> np.ndarray:
        """[n, K] probability that the first relevant item of the list stands at each place.

        Nothing relevant so far, a place in its group has been preceded by `before` irrelevant items, so it is relevant
        with probability relevant_in / (size - before): sampling without replacement.
        """
        before = np.arange(self.size.shape[1]) - self.above
        hazard = np.minimum(self.relevant_in / np.maximum(self.size - before, 1), 1.0)
        none_before = np.ones_like(hazard)
        np.cumprod(1.0 - hazard[:, :-1], axis=1, out=none_before[:, 1:])
        return none_before * hazard

    @functools.cached_property
    def precision_gain(self) -> np.ndarray:
        """[n, K] expected precision at each place where it is relevant, else 0.

        Given a relevant item at a place, each of the `before` others ahead of it in its group is relevant with
        probability (relevant_in - 1) / (size - 1).
        """
        place = np.arange(1, self.size.shape[1] + 1)
        others = (self.relevant_in - 1) / np.maximum(self.size - 1, 1)
        hits_to_here = self.relevant_above + 1 + (place - 1 - self.above) * others
        return self.chance * hits_to_here / place


def tied_ranks(
    values: np.ndarray,
    relevant: np.ndarray,
    count: np.ndarray,
    last_size: np.ndarray,
    last_relevant: np.ndarray,
    total: np.ndarray,
) -> TiedRanks:
    """The tied groups of the K highest scores of each user.

    `values` [n, K] falling scores and `relevant` [n, K] bool, of which the first `count` [n] exist; only the group of
    the last place can go on beyond it, so `last_size` [n] and `last_relevant` [n] count it over all candidates.
    """
    n, width = values.shape
    place = np.arange(width)
    exists = place < count[:, None]  # [n, K]
    first = np.ones((n, width), bool)
    first[:, 1:] = (values[:, 1:] != values[:, :-1]) | ~exists[:, 1:]
    start = np.maximum.accumulate(np.where(first, place, 0), axis=1)
    next_first = np.concatenate([np.where(first[:, 1:], place[1:], width), np.full((n, 1), width)], axis=1)
    end = np.minimum.accumulate(next_first[:, ::-1], axis=1)[:, ::-1]

    seen = np.zeros((n, width + 1), np.int64)
    np.cumsum(relevant & exists, axis=1, out=seen[:, 1:])
    relevant_above = np.take_along_axis(seen, start, axis=1)
    relevant_in = np.take_along_axis(seen, end, axis=1) - relevant_above
    size = end - start
    last = exists & (end == width)
    size = np.where(last, last_size[:, None], size)
    relevant_in = np.where(last, last_relevant[:, None], relevant_in)
    return TiedRanks(
        above=np.where(exists, start, 0),
        size=np.where(exists, size, 0),
        relevant_above=np.where(exists, relevant_above, 0),
        relevant_in=np.where(exists, relevant_in, 0),
        total=total,
    )


def _per_relevant(value: np.ndarray, most: np.ndarray) -> np.ndarray:
    """`value / most`, and 0 for a user with nothing relevant."""
    return np.where(most > 0, value / np.maximum(most, 1e-300), 0.0)


def recall(ranks: TiedRanks, k: int) -> np.ndarray:
    """[n] share of the user's relevant items among the first k."""
    return _per_relevant(ranks.chance[:, :k].sum(axis=1), ranks.total)


def precision(ranks: TiedRanks, k: int) -> np.ndarray:
    """[n] share of the k places that hold a relevant item; a place that no candidate fills is a miss."""
    return ranks.chance[:, :k].sum(axis=1) / k


def ndcg(ranks: TiedRanks, k: int) -> np.ndarray:
    """[n] gain 1/log2(place + 1) over that of an ideal list of min(relevant, k) items (Järvelin & Kekäläinen 2002)."""
    discount = 1.0 / np.log2(np.arange(2, k + 2))
    ideal = np.concatenate([np.zeros(1), np.cumsum(discount)])[np.minimum(ranks.total, k)]
    chance = ranks.chance[:, :k]
    return _per_relevant((chance * discount[: chance.shape[1]]).sum(axis=1), ideal)


def hit(ranks: TiedRanks, k: int) -> np.ndarray:
    """[n] probability that the first k hold at least one relevant item."""
    return ranks.first_hit[:, :k].sum(axis=1)


def mrr(ranks: TiedRanks, k: int) -> np.ndarray:
    """[n] reciprocal place of the first relevant item, 0 when it stands past place k."""
    first = ranks.first_hit[:, :k]
    return (first / np.arange(1, first.shape[1] + 1)).sum(axis=1)


def average_precision(ranks: TiedRanks, k: int) -> np.ndarray:
    """[n] mean over min(relevant, k) of the precision at each relevant place up to k."""
    return _per_relevant(ranks.precision_gain[:, :k].sum(axis=1), np.minimum(ranks.total, k))


METRICS = {
    "recall": recall,
    "ndcg": ndcg,
    "mrr": mrr,
    "hit": hit,
    "precision": precision,
    "map": average_precision,
}


def per_user_metrics(ranks: TiedRanks, ks: Sequence[int]) -> dict[str, np.ndarray]:
    """Each metric at each k: {"ndcg@10": [n] float64, …}."""
    return {f"{name}@{k}": metric(ranks, k) for k in ks for name, metric in METRICS.items()}
