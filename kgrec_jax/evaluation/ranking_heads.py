"""The best candidates of a block of users, found on the device: exact, equal scores in the order of the items' rows.

One pass over a block of scores finds the highest one of each short run of items. The K best stand in the K best runs,
so that only those are sorted. What is known and what is to be found travels as lists of pairs, what is known is marked
in the scores' own place, and what comes back is a few numbers a user: nothing but the scores has their size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp

from kgrec_jax.errors import KgrecError

# User rows [b] -> scores [b, I]; an array of JAX must be a new one each time, for it is used up.
ScoreBlock = Callable[[np.ndarray], "jax.Array | np.ndarray"]

_MAX_SCORES = 2**25  # of one block: 128 MB in float32
# On processors 8 MB, or 32 users where these are more: memory beyond 32 MB goes back to the system after each block and
# comes again page by page, which takes as long as the ranking.
_NEAR_SCORES, _NEAR_USERS = 2**21, 32


@dataclasses.dataclass(frozen=True)
class Heads:
    """The K best of each user of a block among one set of candidates, and what ties with the last of them."""

    values: np.ndarray  # [b, K] float32, -inf past the last candidate
    items: np.ndarray  # [b, K] int32
    last_size: np.ndarray  # [b] int64 candidates whose score equals values[:, -1], where that is one
    count: np.ndarray  # [b] int64 candidates of each user, the known ones left out


@dataclasses.dataclass(frozen=True)
class Block:
    """The heads of some users among each set of candidates, and the scores of what is to be found."""

    users: np.ndarray  # [b] rows of the users
    heads: tuple[Heads, ...]  # one a set
    row: np.ndarray  # [r] int64 places in `users` of the relevant pairs, rising
    item: np.ndarray  # [r] int32 their items, rising in each row
    scores: np.ndarray  # [r] float32 their scores, as in `values`


def blocks(
    score_block: ScoreBlock,
    users: np.ndarray,
    known: sp.csr_matrix,
    relevant: sp.csr_matrix | None,
    sets: np.ndarray,
    width: int,
    block: int,
) -> Iterator[Block]:
    """One block of users after another: the `width` best items of each user among each set of candidates [V, I].

    Known items are left out. The first set holds all others. Raises KgrecError for a score that is NaN.
    """
    num_items = sets.shape[1]
    size = min(block, len(users), block_size(num_items))
    starts = range(0, len(users), size)
    left_out, found = (_Pairs.of(matrix, users, starts, size) for matrix in (known, relevant))
    on_device, everything = jnp.asarray(sets), tuple(sets.all(axis=1).tolist())
    counts = (sets.sum(axis=1) - known @ sets.T.astype(np.int64)).T  # [V, Nu]
    for start in starts:
        rows = users[start : start + size]
        padded = np.concatenate([rows, np.full(size - len(rows), rows[-1])]).astype(np.int32)
        row, item = found.block(rows)
        count = counts[:, rows]  # [V, b]
        pairs = *left_out.padded(*left_out.block(rows)), *found.padded(row, item)
        for least in (-np.inf, np.finfo(np.float32).min):
            scores = _fresh(score_block(padded), (size, num_items), least)
            left, best = _search(scores, *pairs, on_device, width=width, everything=everything)
            values, items, at = map(np.asarray, best)
            # A candidate whose score is -inf looks like what is left out; it does not once it is raised a little.
            exists = np.arange(width) < count[:, :, None]  # [V, b, K]
            if not (np.isneginf(values[:, : len(rows), :width]) & exists).any():
                break
        if (values[0, : len(rows), 0] == np.inf).any():
            raise _nan_error(rows[values[0, : len(rows), 0] == np.inf][0])
        heads = tuple(_heads(left, sets[v], values[v], items[v], width, count[v]) for v in range(len(sets)))
        yield Block(rows, heads, row, item, at[: len(row)])


def block_size(num_items: int) -> int:
    """How many users at most are ranked at a time."""
    if jax.default_backend() == "cpu":
        return max(_NEAR_SCORES // num_items, min(_NEAR_USERS, _MAX_SCORES // num_items), 1)
    return max(_MAX_SCORES // num_items, 1)


def _fresh(scores: jax.Array | np.ndarray, shape: tuple[int, int], least: float) -> jax.Array:
    """A block of scores as float32 that may be used up, none below `least`."""
    if scores.shape != shape:
        raise ValueError(f"score_block gave {scores.shape} for {shape[0]} users, expected {shape}")
    if not (isinstance(scores, jax.Array) and scores.dtype == jnp.float32):
        scores = jnp.array(scores, jnp.float32)
    return scores if np.isneginf(least) else jnp.maximum(scores, jnp.float32(least))


def _heads(left: jax.Array, chosen: np.ndarray, values: np.ndarray, items: np.ndarray, width: int,
           count: np.ndarray) -> Heads:
    """The rows of the users of `count`; where the score of the last place goes on beyond it, its ties are counted."""
    real = slice(len(count))
    last = values[:, width - 1]  # [b]
    size = (values[:, :width] == last[:, None]).sum(axis=1)
    if (values[real, width] == last[real])[np.isfinite(last[real])].any():
        size = np.asarray(_count(left, chosen, last)).astype(np.int64)
    return Heads(values[real, :width], items[real, :width], size[real], count)


@functools.partial(jax.jit, static_argnames=("width", "everything"), donate_argnums=0)
def _search(scores, known_row, known_item, relevant_row, relevant_item, sets, *, width, everything):
    """(scores [b, I] without the known, ([V, b, K + 1] the highest, their items, the scores of the relevant pairs)).

    The scores are given away: what is known becomes -inf in their place. `everything`: which sets hold all items; for
    these, nothing else of the size of the scores is made.
    """
    scores = scores.at[known_row, known_item].set(-jnp.inf, mode="drop")
    best = [_highest(scores if everything[v] else jnp.where(sets[v], scores, -jnp.inf), width + 1)
            for v in range(sets.shape[0])]
    at = _comparable(scores.at[relevant_row, relevant_item].get(mode="fill", fill_value=-jnp.inf))
    return scores, (jnp.stack([values for values, _ in best]), jnp.stack([items for _, items in best]), at)


def _comparable(scores: jax.Array) -> jax.Array:
    """The scores in one order: a NaN is inf, an inf the highest number; and top_k sorts -0 below 0, which are equal."""
    scores = jnp.where(scores == 0, jnp.zeros_like(scores), jnp.minimum(scores, jnp.finfo(scores.dtype).max))
    return jnp.where(jnp.isnan(scores), jnp.inf, scores)


def _highest(scores: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    """(values, items) [b, width] of the highest scores [b, I], equal ones by item; -inf where there are fewer.

    Each of the `width` best runs of items (by highest score, then by place) has an item that is ahead of all items of
    the other runs, so these can be left out.
    """
    users, num_items = scores.shape
    run = 1 << int(max(np.log2(num_items / width), 0.0) / 2 + 0.5)  # a power of two: its maximum is vectorised
    if run < 3:
        values, items = _top_k(_comparable(scores), min(width, num_items))
        values = jnp.pad(values, ((0, 0), (0, width - values.shape[1])), constant_values=-jnp.inf)
        return values, jnp.pad(items, ((0, 0), (0, width - items.shape[1])))
    # The plain maximum of the plain scores: XLA would write down anything else before it takes the maximum.
    highest = jax.lax.reduce_window(scores, -jnp.inf, jax.lax.max, (1, run), (1, run), ((0, 0), (0, -num_items % run)))
    best = jnp.sort(_top_k(_comparable(highest), width)[1], axis=1)  # [b, width]
    # Gathered item by item: gathered run by run, XLA would lay out all scores anew.
    within = (best[:, :, None] * run + jnp.arange(run)[None, None, :]).reshape(users, width * run)
    found = jnp.take_along_axis(scores, within, axis=1, mode="clip")
    values, place = _top_k(jnp.where(within < num_items, _comparable(found), -jnp.inf), width)
    return values, jnp.minimum(jnp.take_along_axis(within, place, axis=1), num_items - 1)


def _top_k(scores: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    # Without the barrier XLA merges a slice of the result into top_k, no longer sees that it is one, and sorts whole
    # rows: many times slower.
    return jax.lax.optimization_barrier(jax.lax.top_k(scores, width))


@jax.jit
def _count(left: jax.Array, chosen: jax.Array, last: jax.Array) -> jax.Array:
    """[b] how many candidates have the score `last` [b]."""
    return jnp.sum((_comparable(left) == last[:, None]) & chosen[None, :], axis=1)


@dataclasses.dataclass(frozen=True)
class _Pairs:
    """The pairs (place of a user in its block, item) of a matrix, block by block, padded to one length."""

    matrix: sp.csr_matrix | None
    length: int  # a power of two, so that few lengths are compiled
    nowhere: int  # a place that no user has

    @staticmethod
    def of(matrix: sp.csr_matrix | None, users: np.ndarray, starts: range, size: int) -> _Pairs:
        if matrix is None or not len(starts):
            return _Pairs(None, 1, size)
        most = int(np.add.reduceat(matrix.getnnz(axis=1)[users], list(starts)).max())
        return _Pairs(matrix, 1 << max(most - 1, 0).bit_length(), size)

    def block(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(places [r] int64, items [r] int32) of these users."""
        if self.matrix is None:
            return np.zeros(0, np.int64), np.zeros(0, np.int32)
        start, count = self.matrix.indptr[rows], self.matrix.indptr[rows + 1] - self.matrix.indptr[rows]
        place = np.repeat(np.arange(len(rows)), count)
        within = np.arange(len(place)) - np.repeat(np.cumsum(count) - count, count)
        return place, self.matrix.indices[np.repeat(start, count) + within].astype(np.int32)

    def padded(self, place: np.ndarray, item: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same as int32 [length], the rest at no user."""
        out = np.full(self.length, self.nowhere, np.int32), np.zeros(self.length, np.int32)
        out[0][: len(place)], out[1][: len(item)] = place, item
        return out


def _nan_error(user: int) -> KgrecError:
    return KgrecError(
        f"scores of user row {user}: found NaN, expected numbers; the model diverged (lower its learning rate)"
    )
