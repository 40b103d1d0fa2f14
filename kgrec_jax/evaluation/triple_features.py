"""What a scorer says of a triple, in numbers that mean the same for every query, and triples that are probably false.

Features are of both directions, (h, r, ?) and (t, r + R, ?): a scorer is seldom wrong about a triple in the same way
twice.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kgrec_jax.evaluation.link_prediction import KnownTails, ScoreBlock, block_ranks, other_answers, queries_at_once

FEATURES = ("tail score", "tail z", "tail log rank", "tail log known", "head score", "head z", "head log rank",
            "head log known")


def triple_features(score_block: ScoreBlock, triples: np.ndarray, *, known: KnownTails, num_entities: int,
                    block: int = 0, advance: Callable[[int], None] | None = None) -> np.ndarray:
    """Features [T, 8] float64 of `triples` [T, 3], in the order of `FEATURES`.

    Of each direction: the score; the score less the mean of its query's scores over all entities, in their standard
    deviations; the logarithm of the filtered realistic rank (1 is 0); log(1 + known answers of the query, the triple
    itself apart). `known` are the triples that are filtered out of the ranks and counted as answers. `block` triples
    are compared at once, 0: as many as keep a block under 64 MiB. `advance` is called with triples done, each twice.
    """
    block = queries_at_once(num_entities, block)
    head, relation, tail = triples.astype(np.int32).reshape(-1, 3).T
    both = [_direction(score_block, h, r, t, known, num_entities, block, advance)
            for h, r, t in ((head, relation, tail), (tail, relation + np.int32(known.num_relations), head))]
    return np.concatenate(both, axis=1)


def _direction(score_block: ScoreBlock, heads: np.ndarray, relations: np.ndarray, tails: np.ndarray, known: KnownTails,
               num_entities: int, block: int, advance: Callable[[int], None] | None) -> np.ndarray:
    """[T, 4]: score, z, log rank, log known of tails [T] of the queries (heads, relations)."""
    out = np.zeros((len(heads), 4))
    order = np.lexsort((relations, heads))  # triples of one query stand together, and its scores are computed once
    for start in range(0, len(order), block):
        some = order[start:start + block]
        h, r, t = heads[some], relations[some], tails[some]
        new = np.append(True, (h[1:] != h[:-1]) | (r[1:] != r[:-1]))
        first, row = np.flatnonzero(new), np.cumsum(new) - 1
        # Lengths are rounded up to powers of two: a handful of compilations instead of one a block.
        asked = np.minimum(np.arange(_power_of_two(len(first))), len(first) - 1)
        padded = np.minimum(np.arange(_power_of_two(len(some))), len(some) - 1)
        scores = jnp.asarray(score_block(h[first][asked], r[first][asked]), jnp.float32)
        others = other_answers(known, h[padded], r[padded], t[padded])
        ranks = block_ranks(scores, row[padded], t[padded], others, num_entities)
        out[some, :2] = np.asarray(_score_and_z(scores, row[padded], t[padded], num_entities), np.float64)[:len(some)]
        out[some, 2] = np.log(ranks[:len(some)])
        out[some, 3] = np.log1p(np.bincount(others[0], minlength=len(some))[:len(some)])
        if advance is not None:
            advance(len(some))
    return out


def _power_of_two(count: int) -> int:
    return max(8, 1 << (count - 1).bit_length())


@jax.jit
def _score_and_z(scores: jax.Array, rows: jax.Array, tails: jax.Array, num_entities: jax.Array) -> jax.Array:
    """(score, z) [m, 2] of tails [m] of the queries that `rows` [m] of `scores` [b, Np] belong to."""
    real = (jnp.arange(scores.shape[1]) < num_entities)[None, :]
    count = jnp.asarray(num_entities, jnp.float32)
    mean = jnp.where(real, scores, 0.0).sum(axis=1) / count  # [b]
    spread = jnp.where(real, (scores - mean[:, None]) ** 2, 0.0).sum(axis=1) / count
    own = scores[rows, tails]
    return jnp.stack([own, (own - mean[rows]) * jax.lax.rsqrt(spread[rows] + 1e-12)], axis=1)


def corrupt(triples: np.ndarray, facts: np.ndarray, *, known: KnownTails, seed: int,
            tries: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """(place [n], corrupted triples [n, 3]): `triples` [T, 3] with one end replaced each, so that it is probably false.

    The new end is drawn uniformly from the distinct entities that stand in that place of the relation among `facts`
    [F, 3], so that its type is right and only knowledge can tell; `known` facts are never drawn. Which end is drawn at
    even odds, and the other where the first has no free entity; a triple whose ends are both without one (every entity
    of the slot is a known answer) has no corruption, and its place is left out.
    """
    rng = np.random.default_rng([seed, 43])
    slots = {}
    for relation in np.unique(triples[:, 1]):
        own = facts[facts[:, 1] == relation]
        slots[int(relation)] = (np.unique(own[:, 0]), np.unique(own[:, 2]))
    out, done = np.array(triples, np.int32), np.zeros(len(triples), bool)
    first = rng.integers(2, size=len(triples))
    for turn in range(2):
        for place in np.flatnonzero(~done):
            h, r, t = (int(x) for x in triples[place])
            head_side = (first[place] + turn) % 2 == 0
            pool = slots[r][0 if head_side else 1]
            query = (t, r + known.num_relations) if head_side else (h, r)
            new = _free(rng, pool, known.pairs(*(np.array([x], np.int32) for x in query))[1], h if head_side else t,
                        tries)
            if new >= 0:
                out[place, 0 if head_side else 2] = new
                done[place] = True
    return np.flatnonzero(done), out[done]


def _free(rng: np.random.Generator, pool: np.ndarray, answers: np.ndarray, own: int, tries: int) -> int:
    """An entity of `pool` that is neither a known answer nor `own`, drawn uniformly; -1 where there is none."""
    for new in rng.choice(pool, tries) if len(pool) else ():
        if new != own and not _holds(answers, new):
            return int(new)
    free = np.setdiff1d(pool, np.append(answers, own))
    return int(rng.choice(free)) if len(free) else -1


def _holds(ordered: np.ndarray, value: int) -> bool:
    place = int(np.searchsorted(ordered, value))
    return place < len(ordered) and ordered[place] == value
