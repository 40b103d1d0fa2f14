"""The smooth part of a log: an ideal low-pass filter on the normalised matrix (GF-CF; Shen et al. 2021, CIKM)."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import scipy.sparse.linalg

from kgrec_jax.linear.parts import Factors


def spectral(train: sp.csr_matrix, rank: int = 32, seed: int = 0) -> Factors:
    """Projects a history onto the `rank` leading right singular vectors of D_u^-½ X D_i^-½.

    Args:
      train: [Nu, I] binary.
    """
    users, items = train.getnnz(axis=1), train.getnnz(axis=0)
    rank = min(rank, min(train.shape) - 1)
    if rank < 1:
        zeros = np.zeros((train.shape[1], 1), np.float32)
        return Factors(zeros, zeros.T.copy(), items > 0)
    scale_users = sp.diags(1.0 / np.sqrt(np.maximum(users, 1)))
    root = np.sqrt(np.maximum(items, 1)).astype(np.float64)
    normalised = (scale_users @ train.astype(np.float64)) @ sp.diags(1.0 / root)
    start = np.random.default_rng(seed).normal(size=min(train.shape))  # fixes ARPACK's start, hence its result
    _, _, vectors = scipy.sparse.linalg.svds(normalised, k=rank, v0=start)  # [rank, I]
    encode = (vectors / root).T  # [I, rank]
    decode = vectors * root  # [rank, I]
    return Factors(encode.astype(np.float32), decode.astype(np.float32), items > 0)
