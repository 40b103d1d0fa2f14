"""SLIM: sparse linear item weights, not negative and with a zero diagonal (Ning & Karypis 2011, ICDM).

For each item j,  min_w ½ |x_j − X w|² + ½ β |w|² + λ |w|₁  with w ≥ 0 and w_j = 0.

The columns are independent, so coordinate descent runs over many of them at once. It needs nothing of the log but its
Gram matrix: coordinate i of every column becomes max(0, G_ij − Σ_{k≠i} G_ik w_kj − λ) / (G_ii + β).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp

from kgrec_jax.linear.ease import gram
from kgrec_jax.linear.parts import ItemWeights

MAX_ITEMS = 10_000  # a pass over all weights takes 2 I³ operations, and tens of passes are needed
_COLUMNS, _BLOCK = 1024, 64
_EXACT = jax.lax.Precision.HIGHEST


def skip_reason(num_items: int) -> str:
    """Why SLIM is not fitted to so many items; "" where it is."""
    if num_items <= MAX_ITEMS:
        return ""
    return f"{num_items:,} items: coordinate descent takes hours on more than {MAX_ITEMS:,}; ials needs no such matrix"


def slim(train: sp.csr_matrix, l1: float = 1.0, l2: float = 250.0, *, tolerance: float = 1e-4, passes: int = 100,
         advance: Callable[[int], None] | None = None) -> ItemWeights:
    """SLIM weights of a binary matrix [Nu, I], sparse.

    Args:
      l1: λ, at least 0. l2: β, positive.
      tolerance: a pass that changes no weight of a block of columns by more ends it. passes: at most so many.
      advance: called with the columns that are done, for a progress bar.
    """
    num_items = train.shape[1]
    rows = -(-num_items // _BLOCK) * _BLOCK
    matrix = jnp.asarray(np.pad(gram(train).astype(np.float32), (0, rows - num_items)))
    width, pieces = min(_COLUMNS, rows), []
    for start in range(0, num_items, width):
        columns = np.arange(start, min(start + width, num_items), dtype=np.int32)
        wanted = np.pad(columns, (0, width - len(columns)), mode="edge")
        found = _descend(matrix, wanted, jnp.float32(l1), jnp.float32(l2), jnp.float32(tolerance), passes)
        pieces.append(sp.csc_matrix(np.asarray(found)[:num_items, :len(columns)]))
        if advance:
            advance(len(columns))
    weights = sp.hstack(pieces).tocsr().astype(np.float32) if pieces else sp.csr_matrix((0, 0), dtype=np.float32)
    return ItemWeights(weights, train.getnnz(axis=0) > 0)


@functools.partial(jax.jit, static_argnames="passes")
def _descend(matrix: jax.Array, columns: jax.Array, l1: jax.Array, l2: jax.Array, tolerance: jax.Array,
             passes: int) -> jax.Array:
    """[I', C]: the weights of some columns, by passes over the coordinates in order.

    Coordinates are taken in blocks: one large product tells what the others explain, and what changes within the
    block is added to it, so each coordinate sees the newest values of all others.
    """

    def coordinate(i, state):
        explained, own, diagonal, target, first, change = state
        old = own[i]  # [C]
        left = target[i] - explained[i] + diagonal[i, i] * old - l1
        new = jnp.where(columns == first + i, 0.0, jnp.maximum(left, 0.0) / (diagonal[i, i] + l2))
        moved = new - old
        explained = explained + diagonal[:, i][:, None] * moved[None, :]
        return explained, own.at[i].set(new), diagonal, target, first, jnp.maximum(change, jnp.abs(moved).max())

    def block(b, state):
        weights, change = state
        first = b * _BLOCK
        rows = jax.lax.dynamic_slice_in_dim(matrix, first, _BLOCK)  # [K, I']
        explained = jnp.matmul(rows, weights, precision=_EXACT)  # [K, C]
        diagonal = jax.lax.dynamic_slice_in_dim(rows, first, _BLOCK, axis=1)
        own = jax.lax.dynamic_slice_in_dim(weights, first, _BLOCK)
        state = explained, own, diagonal, jnp.take(rows, columns, axis=1), first, change
        _, own, _, _, _, change = jax.lax.fori_loop(0, _BLOCK, coordinate, state)
        return jax.lax.dynamic_update_slice_in_dim(weights, own, first, axis=0), change

    def one_pass(state):
        weights, _, done = state
        weights, change = jax.lax.fori_loop(0, matrix.shape[0] // _BLOCK, block, (weights, jnp.float32(0.0)))
        return weights, change, done + 1

    def goes_on(state):
        return (state[1] > tolerance) & (state[2] < passes)

    start = jnp.zeros((matrix.shape[0], columns.shape[0]), jnp.float32)
    return jax.lax.while_loop(goes_on, one_pass, (start, jnp.float32(jnp.inf), jnp.int32(0)))[0]
