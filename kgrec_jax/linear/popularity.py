"""Popularity: the baseline that personalises nothing, and a part that knows the base rate of an item."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from kgrec_jax.linear.parts import Constant


def popularity(train: sp.csr_matrix) -> Constant:
    """log(1 + number of training users of an item); knows every item that has any.

    Args:
      train: [Nu, I] binary.
    """
    counts = train.getnnz(axis=0)
    return Constant(np.log1p(counts).astype(np.float32), counts > 0)
