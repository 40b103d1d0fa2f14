"""EASE: the linear autoencoder with a zero diagonal, in closed form (Steck 2019, arXiv:1905.03375).

With `dropout` the Gram matrix's diagonal is regularised in proportion to itself, which is what training the autoencoder
with that dropout rate amounts to (EDLAE; Steck 2020, "Autoencoders that don't overfit towards the identity").
"""

from __future__ import annotations

import numpy as np
import scipy.linalg.lapack as lapack
import scipy.sparse as sp

from kgrec_jax.errors import KgrecError
from kgrec_jax.linear.parts import ItemWeights

FLOAT64_BELOW = 5_000  # items; above, float32 halves memory and time and changes no metric


def memory_needed(num_items: int) -> int:
    """Bytes that `ease` is allowed to count on: four float32 matrices I × I."""
    return 4 * num_items * num_items * 4


def free_memory() -> int:
    """Bytes of memory that are available now; where the system does not tell, 8 GiB are assumed."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 8 << 30


def skip_reason(num_items: int) -> str:
    """Why EASE cannot be fitted to so many items here; "" where it can."""
    needed, free = memory_needed(num_items), free_memory()
    if needed <= free // 2:
        return ""
    return (f"{num_items:,} items need {needed / 2**30:.1f} GiB for the item-item matrix, "
            f"more than half of the {free / 2**30:.1f} GiB that are free")


def gram(train: sp.csr_matrix) -> np.ndarray:
    """XᵀX, [I, I] in Fortran order; float64 below 5,000 items, else float32."""
    num_items = train.shape[1]
    dtype = np.float64 if num_items < FLOAT64_BELOW else np.float32
    out = np.zeros((num_items, num_items), dtype, order="F")
    by_item = train.T.tocsr()
    for start in range(0, num_items, 2048):
        out[:, start:start + 2048] = (by_item @ train[:, start:start + 2048]).toarray()
    return out


def invert_spd(matrix: np.ndarray, field: str) -> np.ndarray:
    """Inverse of a symmetric positive definite matrix, in place by potrf and potri (NumPy's inv holds nine copies)."""
    if not len(matrix):  # LAPACK refuses what has no rows
        return matrix
    potrf, potri = (lapack.dpotrf, lapack.dpotri) if matrix.dtype == np.float64 else (lapack.spotrf, lapack.spotri)
    factor, info = potrf(matrix, lower=1, overwrite_a=1, clean=0)
    if info == 0:
        matrix, info = potri(factor, lower=1, overwrite_c=1)
    if info != 0:
        raise KgrecError(f"{field}: the matrix is not positive definite (LAPACK info {info}); raise the regularisation")
    rows = 1024  # mirror the lower triangle block by block: no second copy of the matrix
    for start in range(0, len(matrix), rows):
        stop = min(start + rows, len(matrix))
        block = matrix[start:stop, start:stop]
        block[:] = np.tril(block) + np.tril(block, -1).T
        matrix[start:stop, stop:] = matrix[stop:, start:stop].T
    return matrix


def ease(train: sp.csr_matrix, l2: float, dropout: float = 0.0, gram_matrix: np.ndarray | None = None) -> ItemWeights:
    """EASE weights for a binary matrix [Nu, I].

    Args:
      l2: λ added to the diagonal. dropout: share p of the history dropped in the implied training; adds p/(1-p) of the
        diagonal to itself.
      gram_matrix: XᵀX from `gram`, when several λ are tried on the same data; it is not changed.
    """
    matrix = gram(train) if gram_matrix is None else gram_matrix.copy(order="F")
    diagonal = np.diagonal(matrix).copy()
    known = diagonal > 0
    index = np.arange(len(matrix))
    matrix[index, index] += l2 + dropout / (1.0 - dropout) * diagonal
    weights = invert_spd(matrix, "fuse.ease.l2")
    weights /= -np.diagonal(weights).copy()[None, :]
    weights[index, index] = 0.0
    return ItemWeights(np.ascontiguousarray(weights, np.float32), known)
