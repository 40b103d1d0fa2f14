"""Very many small least squares at once: the normal equations of a factor model, in fixed shapes on the device.

For each row u of a sparse binary matrix with entries S_u, over a table of vectors h,

    (Σ_{i∈S_u} h_i h_iᵀ + G + r_u I) x_u = Σ_{i∈S_u} h_i.

Rows are worked through in groups of one size, those of like length together; a group reads its entries a few columns at
a time, padded, and adds up, so that two compiled programs serve every length and memory is one group's matrices
[B, D, D] beside the tables. A row that is longer than `LONG` is cut into pieces that are summed before it is solved
(the dense batching of ALX; Mehta et al. 2021, arXiv:2112.02194).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp

WIDTH = 32  # entries of a row that are gathered at a time
LONG = 1024  # entries from which a row is cut into pieces
_EXACT = jax.lax.Precision.HIGHEST  # a TPU's bfloat16 would spoil the equations
_GROUP = 1 << 22  # numbers in the matrices of one group


def padded(table: np.ndarray) -> jax.Array:
    """[n + 1, D]: the table on the device, and a row of zeros that padding points to."""
    return jnp.asarray(np.pad(np.asarray(table, np.float32), ((0, 1), (0, 0))))


@jax.jit
def outer_sum(table: jax.Array) -> jax.Array:
    """Σ h hᵀ over the rows of a table [n, D]: [D, D]."""
    return jnp.einsum("nd,ne->de", table, table, precision=_EXACT)


def group_size(dim: int, count: int) -> int:
    """Rows that are solved together: a power of two that the matrices' memory and the number of rows allow."""
    most = 1 << (max(8, min(4096, _GROUP // (dim * dim))).bit_length() - 1)
    return min(most, 1 << max(3, (count - 1).bit_length()))


def solve_rows(rows: sp.csr_matrix, table: jax.Array, shared: jax.Array, ridge: np.ndarray) -> jax.Array:
    """x_u of every row: [m + 1, D], the last row zeros, as `padded`; 0 where a row has no entry.

    Args:
      rows: [m, n] binary CSR. table: [n + 1, D] from `padded`. shared: G [D, D]. ridge: r [m], positive.
    """
    lengths = np.diff(rows.indptr)
    order = np.argsort(-lengths, kind="stable")
    order = order[:int((lengths > 0).sum())]
    size, dim = group_size(table.shape[1], max(len(order), 1)), table.shape[1]
    out = jnp.zeros((rows.shape[0] + 1, dim), jnp.float32)
    for start in range(0, len(order), size):
        group = order[start:start + size]
        place = np.full(size, rows.shape[0] + 1, np.int32)  # beyond the end: padding of a group is written nowhere
        place[:len(group)] = group
        added = np.ones(size, np.float32)
        added[:len(group)] = ridge[group]
        out = _solve(out, *_equations(rows, table, group, size), shared, added, place)
    return out


def _equations(rows: sp.csr_matrix, table: jax.Array, group: np.ndarray, size: int) -> tuple[jax.Array, jax.Array]:
    """(Σ h hᵀ [B, D, D], Σ h [B, D]) of a group of rows, the longest first."""
    starts, lengths = rows.indptr[group].astype(np.int64), np.diff(rows.indptr)[group].astype(np.int64)
    if lengths[0] <= LONG:
        return _walk(rows, table, starts, lengths, size)
    pieces = -(-lengths // LONG)
    owner = np.repeat(np.arange(len(group)), pieces)
    begin = (np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * LONG
    starts, lengths = starts[owner] + begin, np.minimum(lengths[owner] - begin, LONG)
    normal, right = _nothing(size, table.shape[1])
    for at in range(0, len(owner), size):
        cut = slice(at, at + size)
        of = np.full(size, -1, np.int32)
        of[:len(owner[cut])] = owner[cut]
        normal, right = _join(normal, right, *_walk(rows, table, starts[cut], lengths[cut], size), of)
    return normal, right


def _walk(rows: sp.csr_matrix, table: jax.Array, starts: np.ndarray, lengths: np.ndarray,
          size: int) -> tuple[jax.Array, jax.Array]:
    """The same of pieces of rows, each given by its first entry and its length."""
    nothing = table.shape[0] - 1
    normal, right = _nothing(size, table.shape[1])
    for step in range(0, int(lengths.max()), WIDTH):
        at = step + np.arange(WIDTH)[None]
        there = at < lengths[:, None]
        entries = np.full((size, WIDTH), nothing, np.int32)
        entries[:len(starts)][there] = rows.indices[(starts[:, None] + at)[there]]
        normal, right = _add(normal, right, table, entries)
    return normal, right


def _nothing(size: int, dim: int) -> tuple[jax.Array, jax.Array]:
    return jnp.zeros((size, dim, dim), jnp.float32), jnp.zeros((size, dim), jnp.float32)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _add(normal: jax.Array, right: jax.Array, table: jax.Array, entries: jax.Array) -> tuple[jax.Array, jax.Array]:
    vectors = jnp.take(table, entries, axis=0, mode="clip")  # [B, W, D]
    return normal + jnp.einsum("bwd,bwe->bde", vectors, vectors, precision=_EXACT), right + vectors.sum(1)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _join(normal: jax.Array, right: jax.Array, more: jax.Array, more_right: jax.Array,
          owner: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Adds pieces to the rows that they are of; a product, since a scatter would add in no fixed order."""
    member = (owner[None, :] == jnp.arange(normal.shape[0])[:, None]).astype(jnp.float32)  # [B, pieces]
    return (normal + jnp.einsum("bp,pde->bde", member, more, precision=_EXACT),
            right + jnp.matmul(member, more_right, precision=_EXACT))


@functools.partial(jax.jit, donate_argnums=0)
def _solve(out: jax.Array, normal: jax.Array, right: jax.Array, shared: jax.Array, ridge: jax.Array,
           place: jax.Array) -> jax.Array:
    system = normal + shared[None] + ridge[:, None, None] * jnp.eye(normal.shape[1], dtype=jnp.float32)[None]
    lower = jax.lax.linalg.cholesky(system, symmetrize_input=False)
    half = jax.lax.linalg.triangular_solve(lower, right[..., None], left_side=True, lower=True)
    found = jax.lax.linalg.triangular_solve(lower, half, left_side=True, lower=True, transpose_a=True)
    return out.at[place].set(found[..., 0], mode="drop")
