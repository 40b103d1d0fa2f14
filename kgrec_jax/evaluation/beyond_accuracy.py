"""What lists are like beside being right: how even, novel, varied, personal and true to a user's taste they are.

Pure functions of lists: items [n, K] int, a row a user, -1 past the last item. Nothing of the size of users × users or
items × items is made; blocks of users bound the memory, and what is left of a user is one number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.sparse as sp

from kgrec_jax.evaluation.ranking import RankingResult

Block = np.ndarray | sp.csr_matrix
SMOOTHING = 0.01  # α of `miscalibration`
_USERS = 1024  # of a block


@dataclasses.dataclass(frozen=True)
class ItemVectors:
    """What items are like, for their cosine: the mean over blocks (text, graph, …) that both ends of a pair have.

    Each block's rows are brought to unit length and joined, so an item with m blocks has the norm √m and the joined
    vectors are divided by it: with all blocks present the cosine is the mean of the blocks' cosines.
    """

    blocks: Mapping[str, Block]  # name -> [I, d], a row of zeros where an item has none of it

    @property
    def names(self) -> str:
        """ "graph and text"."""
        return " and ".join(self.blocks)

    def rows(self, items: np.ndarray) -> tuple[list[Block], np.ndarray]:
        """(the blocks' rows [n, d] of items [n], together of unit length, present [n] bool)."""
        taken = [block[items] for block in self.blocks.values()]
        lengths = np.stack([_lengths(rows) for rows in taken])  # [blocks, n]
        some = lengths > 0
        count = some.sum(axis=0)
        scale = np.where(some, 1.0 / (np.maximum(lengths, 1e-30) * np.sqrt(np.maximum(count, 1))), 0.0)
        return [_scaled(rows, s.astype(np.float32)) for rows, s in zip(taken, scale, strict=True)], count > 0

    def similarities(self, items: np.ndarray) -> np.ndarray:
        """[b, C, C] float32 cosines between the items [b, C] of each row; those of an item without content are 0."""
        users, width = items.shape
        out = np.zeros((users, width, width), np.float32)
        for rows in self.rows(np.maximum(items, 0).ravel())[0]:
            if not sp.issparse(rows):
                cube = np.asarray(rows, np.float32).reshape(users, width, -1)
                out += np.matmul(cube, cube.transpose(0, 2, 1))
                continue
            for user in range(users):
                own = rows[user * width:(user + 1) * width]
                out[user] += (own @ own.T).toarray()
        return out


def _lengths(rows: Block) -> np.ndarray:
    squares = rows.multiply(rows).sum(axis=1) if sp.issparse(rows) else np.square(rows, dtype=np.float64).sum(axis=1)
    return np.sqrt(np.asarray(squares, np.float64).ravel())


def _scaled(rows: Block, scale: np.ndarray) -> Block:
    return sp.csr_matrix(sp.diags_array(scale) @ rows) if sp.issparse(rows) else rows * scale[:, None]


def indicator(lists: np.ndarray, num_columns: int) -> sp.csr_matrix:
    """[n, I] 1 where an item is in a user's list."""
    user, place = np.nonzero(lists >= 0)
    ones = np.ones(len(user), np.float32)
    return sp.csr_matrix((ones, (user, lists[user, place])), shape=(len(lists), num_columns))


def exposure(lists: np.ndarray, num_items: int) -> np.ndarray:
    """[I] int64: in how many lists each item is."""
    return np.bincount(lists[lists >= 0], minlength=num_items)


def gini(counts: np.ndarray) -> float:
    """Gini coefficient of the exposure `counts` [n] of all candidates: 0 where all are shown alike, near 1 for a few.

    G = Σ_j (2j − n − 1) x_(j) / (n Σ x), x ascending, j from 1 (Gini 1912; for lists: Fleder & Hosanagar,
    "Blockbuster culture's next rise or fall", Management Science 2009). NaN where nothing is shown.
    """
    ordered, n = np.sort(np.asarray(counts, np.float64)), len(counts)
    total = ordered.sum()
    return float(((2 * np.arange(1, n + 1) - n - 1) * ordered).sum() / (n * total)) if total else float("nan")


def novelty(lists: np.ndarray, popularity: np.ndarray, num_users: int) -> np.ndarray:
    """[n] mean self-information −log2 p(i) of the items listed, in bits; NaN for an empty list.

    p(i) = popularity(i) / users, of training (Zhou et al., "Solving the apparent diversity-accuracy dilemma of
    recommender systems", PNAS 2010). An item that nobody has touched counts as if one user had, else it would be
    infinitely novel.
    """
    bits = np.log2(num_users / np.maximum(np.asarray(popularity, np.float64), 1.0))
    there = lists >= 0
    total = np.where(there, bits[np.maximum(lists, 0)], 0.0).sum(axis=1)
    return _over(total, there.sum(axis=1))


def diversity(lists: np.ndarray, vectors: ItemVectors) -> np.ndarray:
    """[n] mean over a list's pairs of items of 1 − cosine; NaN where fewer than two of them have content.

    Intra-list diversity (Ziegler et al., "Improving recommendation lists through topic diversification", WWW 2005).
    Unit vectors x of m items: Σ over pairs of the cosine = (‖Σ x‖² − m) / 2, so no pair is ever formed.
    """
    out = np.full(len(lists), np.nan)
    for start in range(0, len(lists), _USERS):
        some = lists[start:start + _USERS]
        items, place = np.unique(some[some >= 0], return_inverse=True)
        if not len(items):
            continue
        numbered = np.full(some.shape, -1)
        numbered[some >= 0] = place.reshape(-1)
        there = indicator(numbered, len(items))
        rows, present = vectors.rows(items)
        count = there @ present.astype(np.float64)
        squares = np.zeros(len(some))
        for block in rows:
            squares += np.square(_lengths(there @ block))
        cosine = _over(squares - count, count * (count - 1))
        out[start:start + _USERS] = 1.0 - cosine
    return out


def personalisation(lists: np.ndarray, num_items: int) -> float:
    """1 − the mean over pairs of users of the share of their lists that they have in common; NaN for a single user.

    An item in c lists is common to c (c − 1) / 2 pairs, so the sum over all pairs follows exactly from the counts (the
    inter-user diversity of Zhou et al. 2010). The share is of the longest list, for users who have fewer left.
    """
    n, width = len(lists), int((lists >= 0).sum(axis=1).max(initial=0))
    if n < 2 or not width:
        return float("nan")
    counts = exposure(lists, num_items).astype(np.float64)
    return float(1.0 - (counts * (counts - 1)).sum() / (n * (n - 1.0)) / width)


def profile(indicators: sp.csr_matrix, shares: sp.csr_matrix) -> np.ndarray:
    """[n, C] distribution over kinds of the items in each row of [n, I]: mean p(g | i) of those that have a kind."""
    total = np.asarray((indicators @ shares).todense(), np.float64)
    size = total.sum(axis=1, keepdims=True)  # rows of `shares` add up to 1, so this counts the items with a kind
    return np.divide(total, size, out=np.zeros_like(total), where=size > 0)


def divergence(p: np.ndarray, q: np.ndarray, smoothing: float = SMOOTHING) -> np.ndarray:
    """[…] KL(p ‖ (1 − α) q + α p) in nats over the last axis (Steck 2018, equations 5 and 6), 0 where p = q."""
    mixed = (1.0 - smoothing) * q + smoothing * p
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, p * np.log(p / mixed), 0.0)
    return terms.sum(axis=-1)


def miscalibration(lists: np.ndarray, history: sp.csr_matrix, shares: sp.csr_matrix) -> np.ndarray:
    """[n] divergence of a list's distribution over kinds from that of the user's history [n, I]; 0 is calibrated.

    C_KL of Steck, "Calibrated recommendations", RecSys 2018, all items with equal weight. NaN for a user whose history
    or list has no item with a kind.
    """
    out = np.full(len(lists), np.nan)
    users = max(16, min(_USERS, 4_000_000 // max(shares.shape[1], 1)))
    for start in range(0, len(lists), users):
        rows = slice(start, start + users)
        p = profile(history[rows], shares)
        q = profile(indicator(lists[rows], shares.shape[0]), shares)
        out[rows] = np.where((p.sum(axis=1) > 0) & (q.sum(axis=1) > 0), divergence(p, q), np.nan)
    return out


def _over(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    return np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)


@dataclasses.dataclass(frozen=True)
class ListMeasures:
    """What the lists of one run are measured with; what the data lack is None, and its figure then absent."""

    candidates: np.ndarray  # [I] bool
    popularity: np.ndarray  # [I] users of each item in the fit part
    history: sp.csr_matrix  # [Nu, I] of all users
    vectors: ItemVectors | None
    shares: sp.csr_matrix | None  # [I, C] kinds of the items, rows adding up to 1

    def __call__(self, lists: np.ndarray, users: np.ndarray, ks: Sequence[int]) -> dict[str, float]:
        """{"gini@10": …} of the lists [n, K] of user rows [n], cut to each k; means over the users who have a figure.

        A figure that nobody has is absent.
        """
        out: dict[str, float] = {}
        for k in ks:
            for name, value in self._of(lists[:, :k], users).items():
                if np.isfinite(value):
                    out[f"{name}@{k}"] = float(value)
        return out

    def added_to(self, result: RankingResult) -> RankingResult:
        """The result with these figures of its lists, at the same k."""
        ks = [int(name.rpartition("@")[2]) for name in result.coverage]
        return dataclasses.replace(result, beyond=self(result.lists, result.users, ks))

    def per_user(self, lists: np.ndarray, users: np.ndarray) -> dict[str, np.ndarray]:
        """{measure: [n]} of the lists [n, K] of user rows [n], of what the data allow; NaN where a user has none."""
        out = {"novelty": novelty(lists, self.popularity, self.history.shape[0])}
        if self.vectors is not None:
            out["diversity"] = diversity(lists, self.vectors)
        if self.shares is not None:
            out["miscalibration"] = miscalibration(lists, self.history[users], self.shares)
        return out

    def _of(self, lists: np.ndarray, users: np.ndarray) -> dict[str, float]:
        shown = exposure(lists, len(self.candidates))
        each = self.per_user(lists, users)
        return {"gini": gini(shown[self.candidates]), "personalisation": personalisation(lists, len(self.candidates)),
                **{name: float(np.nanmean(v)) for name, v in each.items() if np.isfinite(v).any()}}
