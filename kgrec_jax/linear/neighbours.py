"""Neighbourhood models: item-kNN and user-kNN by cosine with shrinkage (Sarwar et al. 2001; Herlocker et al. 1999)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import scipy.sparse as sp

from kgrec_jax.linear.parts import ItemWeights, UserNeighbours

NEIGHBOURS = (50, 100, 200)  # the values of k that are compared on validation
SHRINK = 10.0
ITEM_WORK = 2e10  # products of an item-item matrix from which item-kNN is left out: about half an hour with its choice
USER_WORK = 1e6  # products and users that a list of user-kNN goes through from which it is left out: some 20 ms a list
_DENSE = 1 << 26  # numbers in a block of similarities; above, they are kept sparse
_PRODUCTS = 2e7  # pairs of items in a sparse block


def skip_reasons(train: sp.csr_matrix) -> dict[str, str]:
    """Row -> why it cannot be had of a matrix [Nu, I] in reasonable time; empty where both can."""
    users, items = train.getnnz(axis=1).astype(np.float64), train.getnnz(axis=0).astype(np.float64)
    out, work = {}, float(np.square(users).sum())
    if work > ITEM_WORK:
        out["item-knn"] = (f"{work:.2g} pairs of items in the histories, more than the {ITEM_WORK:.0e} that it is tried "
                           "on")
    each = float(np.square(items).sum()) / max(len(users), 1) + len(users)
    if each > USER_WORK:
        out["user-knn"] = (f"each list would go through {len(users):,} users and {each - len(users):,.0f} of their "
                           f"items, more than the {USER_WORK:,.0f} that it is tried with")
    return out


def item_knn(train: sp.csr_matrix, num_neighbours: int = 100, shrink: float = SHRINK, block: int = 2048) -> ItemWeights:
    """The `num_neighbours` most similar items of each candidate, cosine with shrinkage.

    Works through the candidates in blocks, so that its memory is block × I and not I × I; where that is much, what is
    0 is not kept either.

    Args:
      train: [Nu, I] binary.
    """
    num_items = train.shape[1]
    counts = train.getnnz(axis=0)
    norms = np.sqrt(counts.astype(np.float32))  # [I]
    by_item = train.T.tocsr()
    if block * num_items > _DENSE:
        weights = sp.vstack(list(_sparse_blocks(train, by_item, norms, num_neighbours, shrink))).T.tocsr()
        return ItemWeights(weights.astype(np.float32), counts > 0)
    columns = []
    for start in range(0, num_items, block):
        stop = min(start + block, num_items)
        similarity = (by_item[start:stop] @ train).toarray()  # [b, I] co-counts
        similarity /= norms[start:stop, None] * norms[None, :] + np.float32(shrink + 1e-9)
        similarity[np.arange(stop - start), np.arange(start, stop)] = 0.0
        k = min(num_neighbours, num_items)
        top = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        values = np.take_along_axis(similarity, top, axis=1).ravel()
        rows = np.repeat(np.arange(stop - start), k)
        kept = values > 0
        columns.append(sp.csr_matrix((values[kept], (rows[kept], top.ravel()[kept])), shape=similarity.shape))
    weights = sp.vstack(columns).T.tocsr()  # [I history, I candidate]
    return ItemWeights(weights.astype(np.float32), counts > 0)


def _sparse_blocks(train: sp.csr_matrix, by_item: sp.csr_matrix, norms: np.ndarray, num_neighbours: int,
                   shrink: float) -> Iterator[sp.csr_matrix]:
    """The nearest of some candidates after others, [b, I]: as many as have `_PRODUCTS` pairs in the histories."""
    work = np.cumsum(by_item @ train.getnnz(axis=1).astype(np.float64))  # [I]
    start = 0
    while start < len(norms):
        before = work[start - 1] if start else 0.0
        stop = max(start + 1, int(np.searchsorted(work, before + _PRODUCTS, side="right")))
        found = (by_item[start:stop] @ train).tocsr()  # [b, I] co-counts
        row = np.repeat(np.arange(stop - start), np.diff(found.indptr))
        values = found.data / (norms[start:stop][row] * norms[found.indices] + np.float32(shrink + 1e-9))
        values[found.indices == start + row] = 0.0
        kept = np.ones(len(values), bool)
        for one in np.flatnonzero(np.diff(found.indptr) > num_neighbours):
            own = slice(found.indptr[one], found.indptr[one + 1])
            kept[own] = False
            kept[own.start + np.argpartition(-values[own], num_neighbours - 1)[:num_neighbours]] = True
        kept &= values > 0
        yield sp.csr_matrix((values[kept], (row[kept], found.indices[kept])), shape=found.shape)
        start = stop


def user_knn(train: sp.csr_matrix, num_neighbours: int = 100, shrink: float = SHRINK) -> UserNeighbours:
    """User-kNN over the training matrix [Nu, I]."""
    return UserNeighbours(train, num_neighbours, shrink, train.getnnz(axis=0) > 0)
