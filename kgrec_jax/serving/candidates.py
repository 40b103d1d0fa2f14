"""Which triples may be missing: of each likely (head, relation) the best unknown tails, in bounded memory."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from kgrec_jax.evaluation.link_prediction import KnownTails, ScoreBlock, queries_at_once
from kgrec_jax.serving.slots import Slots

_HEADS = 4096  # heads of one relation whose candidates are held at once


@dataclasses.dataclass(frozen=True)
class Search:
    """Which queries are asked, and which of their answers are looked at."""

    per_query: int = 10  # best-ranked candidates of a query that are weighed
    any_tail: bool = False  # also tails that have never stood in this place of the relation
    type_confidence: float = 0.5  # share of a slot's entities in another slot from which the rest are asked for it


def likely_queries(slots: Slots, search: Search) -> dict[int, np.ndarray]:
    """{relation: heads}: what the type of a head makes plausible, see `Slots.plausible`; no relation without a head."""
    queries = {r: slots.plausible(r, search.type_confidence) for r in range(slots.num_relations)}
    return {r: heads for r, heads in queries.items() if len(heads)}


def some_queries(queries: Mapping[int, np.ndarray], limit: int, seed: int) -> dict[int, np.ndarray]:
    """At most `limit` of the queries, drawn by the seed without regard to their relation."""
    total = sum(len(heads) for heads in queries.values())
    if total <= limit:
        return dict(queries)
    kept = np.zeros(total, bool)
    kept[np.random.default_rng([seed, 47]).permutation(total)[:limit]] = True
    parts = np.split(kept, np.cumsum([len(heads) for heads in queries.values()])[:-1])
    some = {r: heads[part] for (r, heads), part in zip(queries.items(), parts, strict=True)}
    return {r: heads for r, heads in some.items() if len(heads)}


def candidates(score_block: ScoreBlock, queries: Mapping[int, np.ndarray], *, known: KnownTails, slots: Slots,
               num_entities: int, search: Search, advance: Callable[[int], None] | None = None) -> Iterator[np.ndarray]:
    """Blocks of triples [m, 3]: the best `per_query` unknown tails of each query, a few thousand heads a block.

    Known answers are left out, a tail that is the head itself too (unless the relation has such a fact), and, without
    `any_tail`, tails that never stood there. Memory does not grow with the number of queries. `advance` is called with
    the number of queries done.
    """
    block = queries_at_once(num_entities)
    count = min(search.per_query, num_entities)
    for relation, heads in queries.items():
        allowed = np.ones(num_entities, bool)
        if not search.any_tail:
            allowed[:] = False
            allowed[slots.entities(relation + slots.num_relations)] = True
        loops = _has_loop(known, relation, slots.entities(relation))
        for start in range(0, len(heads), _HEADS):
            found = []
            for first in range(start, min(start + _HEADS, len(heads)), block):
                some = heads[first:min(first + block, start + _HEADS)].astype(np.int32)
                found.append(_best_tails(score_block, some, relation, known, allowed, loops, count, block))
                if advance is not None:
                    advance(len(some))
            yield np.concatenate(found)


def _has_loop(known: KnownTails, relation: int, heads: np.ndarray) -> bool:
    rows, tails = known.pairs(heads, np.full(len(heads), relation))
    return bool((heads[rows] == tails).any())


def _best_tails(score_block: ScoreBlock, heads: np.ndarray, relation: int, known: KnownTails, allowed: np.ndarray,
                loops: bool, count: int, block: int) -> np.ndarray:
    """[m, 3] candidates of at most `block` heads of one relation."""
    padded = heads[np.minimum(np.arange(block), len(heads) - 1)]
    relations = np.full(block, relation, np.int32)
    rows, tails = known.pairs(heads, relations[:len(heads)])
    if not loops:
        rows = np.concatenate([rows, np.arange(len(heads), dtype=np.int32)])
        tails = np.concatenate([tails, heads])
    size = max(64, 1 << int(max(len(rows) - 1, 1)).bit_length())
    rows = np.concatenate([rows, np.full(size - len(rows), block, np.int32)])  # a row that is not there: dropped
    tails = np.concatenate([tails, np.zeros(size - len(tails), np.int32)])
    scores, best = _best(jnp.asarray(score_block(padded, relations)), rows, tails, allowed, count)
    scores, best = np.asarray(scores)[:len(heads)], np.asarray(best)[:len(heads)]
    row, place = np.nonzero(np.isfinite(scores))
    return np.stack([heads[row], np.full(len(row), relation), best[row, place]], axis=1).astype(np.int32)


@functools.partial(jax.jit, static_argnames="count")
def _best(scores: jax.Array, rows: jax.Array, tails: jax.Array, allowed: jax.Array, count: int):
    """Scores and entities [b, count] of the best tails; -inf where fewer are left."""
    scores = scores[:, :allowed.shape[0]].astype(jnp.float32)  # top_k of narrower floats is far slower on CPU
    scores = jnp.where(allowed[None, :] & ~jnp.isnan(scores), scores, -jnp.inf)
    return jax.lax.top_k(scores.at[rows, tails].set(-jnp.inf, mode="drop"), count)
