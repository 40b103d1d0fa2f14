"""Filtered, tie-aware link prediction in both directions.

A triple (h, r, t) asks twice: which tail has (h, r, ?), and which head, as the tail of (t, r + R, ?) with the inverse
relation. Every other answer known to be true, in whatever part, is left out of the ranking (the filtered setting of
Bordes et al. 2013). A rank is the mean of the optimistic and the pessimistic rank among equal scores (the "realistic"
rank), so that a constant scorer gains nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from kgrec_jax.errors import KgrecError

ScoreBlock = Callable[[np.ndarray, np.ndarray], jax.Array]  # heads [b], relations [b] of 2R -> scores [b, >= N]


def add_inverses(triples: np.ndarray, num_relations: int) -> np.ndarray:
    """Every triple and, after all of them, its inverse (t, r + R, h): [T, 3] -> [2T, 3] int32."""
    head, relation, tail = triples.T
    inverse = np.stack([tail, relation + num_relations, head], axis=1)
    return np.concatenate([triples, inverse]).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class KnownTails:
    """All tails of each (head, relation) pair of a set of triples with their inverses, each once, as index lists."""

    keys: np.ndarray  # [Q] int64, sorted: head * 2R + relation
    starts: np.ndarray  # [Q + 1] int64
    tails: np.ndarray  # [n] int32, sorted within each pair
    num_relations: int  # R, without inverses

    @staticmethod
    def of(triples: np.ndarray, num_relations: int) -> KnownTails:
        """The lists of `triples` [T, 3], inverses added here."""
        head, relation, tail = add_inverses(triples, num_relations).astype(np.int64).T
        pairs = head * (2 * num_relations) + relation
        width = int(tail.max(initial=0)) + 1
        if int(pairs.max(initial=0)) < np.iinfo(np.int64).max // width:  # one number a triple sorts faster than three
            pairs, tail = np.divmod(np.unique(pairs * width + tail), width)
        else:
            pairs, tail = np.unique(np.stack([pairs, tail], axis=1), axis=0).T
        first = np.flatnonzero(np.append(True, pairs[1:] != pairs[:-1])) if len(pairs) else np.zeros(0, np.int64)
        starts = np.append(first, len(pairs)).astype(np.int64)
        return KnownTails(pairs[first], starts, tail.astype(np.int32), num_relations)

    def pairs(self, heads: np.ndarray, relations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(row [n], tail [n]): every known tail of each query row; a query without any has no row."""
        wanted = heads.astype(np.int64) * (2 * self.num_relations) + relations
        if not len(self.keys):
            return np.zeros(0, np.int32), np.zeros(0, np.int32)
        place = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        counts = np.where(self.keys[place] == wanted, self.starts[place + 1] - self.starts[place], 0)
        rows = np.repeat(np.arange(len(wanted)), counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return rows.astype(np.int32), self.tails[np.repeat(self.starts[place], counts) + within]


@jax.jit
def _ranks(scores: jax.Array, query: jax.Array, targets: jax.Array, rows: jax.Array, tails: jax.Array,
           num_entities: jax.Array):
    """Realistic ranks [t] of `targets` [t], each of the `query` [t] that asked, from scores [b, Np].

    (rows, tails) [F] are left out of the ranking of target `rows`; a row of t is padding.
    """
    t = targets.shape[0]
    own = scores[query, targets]  # [t]
    asked = scores[query]  # [t, Np]
    real = jnp.arange(scores.shape[1])[None, :] < num_entities
    # Twice the better ones and once the equal ones in a single pass. Written as "not ≤" and "not <", so that a NaN
    # anywhere makes a rank worse and never better.
    ahead = lambda s, o: (~(s <= o)).astype(jnp.int32) + (~(s < o)).astype(jnp.int32)  # noqa: E731
    count = jnp.sum(jnp.where(real, ahead(asked, own[:, None]), 0), axis=1)
    place = jnp.minimum(rows, t - 1)
    left_out = ahead(scores[query[place], tails], own[place])  # [F]
    count = count - jnp.zeros(t, jnp.int32).at[rows].add(left_out, mode="drop")
    # The target itself is among the equal ones unless its score is NaN.
    return 1.0 + 0.5 * (count - (own == own).astype(jnp.int32)).astype(jnp.float32)


def rank_tails(score_block: ScoreBlock, heads: np.ndarray, relations: np.ndarray, tails: np.ndarray, *,
               known: KnownTails, num_entities: int, block: int = 0) -> np.ndarray:
    """Filtered realistic rank of each tail, [Q] float64, 1 is best.

    Each distinct (head, relation) is scored once, whatever the number of its tails: of FB15k-237's 40,932 test queries
    22,850 are distinct. `score_block` is called with fixed-length blocks of them (the last one padded); columns past
    `num_entities` are ignored. `block` 0 takes as many at once as keep a block of scores under 64 MiB. The result does
    not depend on it.
    """
    block = queries_at_once(num_entities, block)
    piece = max(block // 4, 1)  # tails ranked at once: one shape, and little padding at the end of a block
    _, first, query = np.unique(heads.astype(np.int64) * (2 * known.num_relations) + relations, return_index=True,
                                return_inverse=True)
    query = query.reshape(-1)
    order = np.argsort(query, kind="stable")
    out = np.zeros(len(heads), np.float64)
    for start in range(0, len(first), block):
        asked = first[np.minimum(np.arange(start, start + block), len(first) - 1)]
        scores = score_block(heads[asked], relations[asked])
        low, high = np.searchsorted(query[order], [start, start + block])
        for at in range(low, high, piece):
            index = order[np.minimum(np.arange(at, at + piece), high - 1)]
            others = other_answers(known, heads[index], relations[index], tails[index])
            ranks = block_ranks(scores, query[index] - start, tails[index], others, num_entities)
            out[index] = ranks  # the padding repeats the last one
    return out


def queries_at_once(num_entities: int, block: int = 0) -> int:
    """Queries scored at once: `block`, or where it is 0 as many as keep the scores under 64 MiB."""
    return block if block > 0 else int(np.clip(2**24 // max(num_entities, 1), 8, 512))


def other_answers(known: KnownTails, heads: np.ndarray, relations: np.ndarray,
                  tails: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(row, tail) [F] of the known answers beside its own tail of each of [t] questions; a row of t is padding."""
    rows, filtered = known.pairs(heads, relations)
    others = filtered != tails[rows]
    rows, filtered = rows[others], filtered[others]
    # Lengths are rounded up to powers of four: a handful of compilations instead of one a block.
    size = 256
    while size < len(rows):
        size *= 4
    return (np.concatenate([rows, np.full(size - len(rows), len(tails), np.int32)]).astype(np.int32),
            np.concatenate([filtered, np.zeros(size - len(filtered), np.int32)]).astype(np.int32))


def block_ranks(scores: jax.Array, query: np.ndarray, tails: np.ndarray, others: tuple[np.ndarray, np.ndarray],
                num_entities: int) -> np.ndarray:
    """The rank of each tail [t] among the scores of its query, a row of `scores` [b, Np]: [t] float64.

    `others` are the `other_answers` of the same questions, which may serve the scores of several scorers.
    """
    ranks = _ranks(scores, query.astype(np.int32), tails.astype(np.int32), *others, num_entities)
    return np.asarray(ranks, np.float64)


def choices_mrr(score_choices: Callable[[np.ndarray, np.ndarray], Iterator[jax.Array]], count: int, triples: np.ndarray,
                *, known: KnownTails, num_entities: int, block: int = 64) -> np.ndarray:
    """Filtered MRR of `triples` [T, 3] in both directions by each of `count` ways to score them, [count] float64.

    `score_choices(heads, relations)` gives the scores [b, >= N] of one block of queries by every way in turn, so that
    what the ways have in common is computed once.
    """
    both, total = add_inverses(triples, known.num_relations), np.zeros(count)
    for start in range(0, len(both), block):
        chunk = both[start:start + block]
        padded = chunk[np.minimum(np.arange(block), len(chunk) - 1)]  # one shape, one compilation
        others = other_answers(known, *padded.T)
        for place, scores in enumerate(score_choices(padded[:, 0], padded[:, 1])):
            ranks = block_ranks(scores, np.arange(block), padded[:, 2], others, num_entities)
            total[place] += (1.0 / ranks[:len(chunk)]).sum()
    return total / len(both)


def rank_metrics(ranks: np.ndarray) -> dict[str, float]:
    """MRR, mean rank and Hits@1/3/10 of ranks [Q]; a rank between two places counts as a hit from the worse one."""
    metrics = {"mrr": float(np.mean(1.0 / ranks)), "mr": float(np.mean(ranks))}
    return metrics | {f"hits@{k}": float(np.mean(ranks <= k)) for k in (1, 3, 10)}


def evaluate_link_prediction(score_block: ScoreBlock, triples: np.ndarray, *, known: KnownTails, num_entities: int,
                             block: int = 0) -> dict[str, float]:
    """Both directions' metrics, and each apart under `tail/…` (h, r, ?) and `head/…` (?, r, t).

    `triples` [T, 3] without inverses; `known` holds the true triples of every part, these included. `queries` counts
    the ranks that were averaged. Raises KgrecError where there is no triple or one lies outside the tables.
    """
    if not len(triples):
        raise KgrecError("link prediction: found no triple to rank, expected at least one; raise graph.test_share")
    high = triples.max(axis=0)
    if triples.min() < 0 or max(high[0], high[2]) >= num_entities or high[1] >= known.num_relations:
        raise KgrecError(f"link prediction: found ids up to {tuple(int(x) for x in high)}, expected entities "
                         f"below {num_entities} and relations below {known.num_relations}")
    both = add_inverses(triples, known.num_relations)
    ranks = rank_tails(score_block, *both.T, known=known, num_entities=num_entities, block=block)
    forward, backward = ranks[:len(triples)], ranks[len(triples):]
    out = rank_metrics(ranks) | {"queries": float(len(ranks))}
    out |= {f"tail/{name}": value for name, value in rank_metrics(forward).items()}
    return out | {f"head/{name}": value for name, value in rank_metrics(backward).items()}
