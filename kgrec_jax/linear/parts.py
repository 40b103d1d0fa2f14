"""What a closed-form part of the score is: a function of a history, for known users and new ones alike."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import scipy.sparse as sp

from kgrec_jax.linear.least_squares import padded, solve_rows


@dataclasses.dataclass(frozen=True)
class ItemWeights:
    """Scores items by a weighted sum over the history's items: X @ W (item-kNN, EASE, the feature ridge).

    Attributes:
      weights: [I, I] float32, dense or CSR; row = item of the history, column = candidate.
      known: [I] bool, the candidates that the part can say something about.
    """

    weights: np.ndarray | sp.csr_matrix
    known: np.ndarray

    def scores(self, history: sp.csr_matrix) -> np.ndarray:
        """[b, I] float32 for histories [b, I]."""
        out = history @ self.weights
        return np.asarray(out.toarray() if sp.issparse(out) else out, np.float32)

    def contributions(self, items: np.ndarray, candidate: int) -> np.ndarray:
        """[H] float32: what each item of a history adds to the score of `candidate`."""
        column = self.weights[items, candidate]
        return np.asarray(column.todense() if sp.issparse(column) else column, np.float32).ravel()


@dataclasses.dataclass(frozen=True)
class RidgeWeights(ItemWeights):
    """The weights of the feature ridge, with what gives an item that comes later a column (`ridge.later_columns`)."""

    inverse_diagonal: np.ndarray  # [I] float32 of (K + λ I)⁻¹ over the warm items, 0 for the others
    own: np.ndarray  # [I] float32: diagonal of B (K + λ I)⁻¹, 0 likewise


@dataclasses.dataclass(frozen=True)
class Factors:
    """Scores through two factor tables: X @ V @ W, V [I, D] and W [D, I] (truncated SVD, profiles of unit vectors)."""

    encode: np.ndarray | sp.csr_matrix  # [I, D] float32
    decode: np.ndarray | sp.csr_matrix  # [D, I] float32
    known: np.ndarray  # [I] bool

    def scores(self, history: sp.csr_matrix) -> np.ndarray:
        """[b, I] float32 for histories [b, I]."""
        out = (history @ self.encode) @ self.decode
        return np.asarray(out.toarray() if sp.issparse(out) else out, np.float32)

    def contributions(self, items: np.ndarray, candidate: int) -> np.ndarray:
        """[H] float32: what each item of a history adds to the score of `candidate`."""
        column = self.decode[:, [candidate]]
        out = self.encode[items] @ column
        return np.asarray(out.toarray() if sp.issparse(out) else out, np.float32).ravel()


@dataclasses.dataclass(frozen=True)
class Constant:
    """The same scores for everybody (popularity)."""

    values: np.ndarray  # [I] float32
    known: np.ndarray  # [I] bool

    def scores(self, history: sp.csr_matrix) -> np.ndarray:
        """[b, I] float32 for histories [b, I]."""
        return np.broadcast_to(self.values, (history.shape[0], len(self.values))).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class UserNeighbours:
    """User-kNN: what the most similar training users touched (cosine with shrinkage).

    Attributes:
      train: [Nu, I] binary CSR of the training users.
      num_neighbours: k. shrink: added to the product of the norms.
    """

    train: sp.csr_matrix
    num_neighbours: int
    shrink: float
    known: np.ndarray  # [I] bool

    @functools.cached_property
    def _by_item(self) -> sp.csr_matrix:
        """[I, Nu]: turning a log of millions takes longer than a block of lists."""
        return self.train.T.tocsr()

    def scores(self, history: sp.csr_matrix) -> np.ndarray:
        """[b, I] float32 for histories [b, I]; blocks of users bound the memory to about 64 M similarities."""
        norms = np.sqrt(self.train.getnnz(axis=1).astype(np.float32))  # [Nu]
        rows = max(1, 64_000_000 // max(1, self.train.shape[0]))
        blocks = [self._block(history[start:start + rows], norms) for start in range(0, history.shape[0], rows)]
        return np.concatenate(blocks) if blocks else np.zeros(history.shape, np.float32)

    def _block(self, history: sp.csr_matrix, norms: np.ndarray) -> np.ndarray:
        own = np.sqrt(history.getnnz(axis=1).astype(np.float32))  # [b]
        similarity = (history @ self._by_item).toarray()  # [b, Nu]
        similarity /= own[:, None] * norms[None, :] + np.float32(self.shrink + 1e-9)
        k = min(self.num_neighbours, similarity.shape[1])
        top = np.argpartition(-similarity, k - 1, axis=1)[:, :k]  # [b, k]
        values = np.take_along_axis(similarity, top, axis=1)
        rows = np.repeat(np.arange(len(similarity)), k)
        nearest = sp.csr_matrix((values.ravel(), (rows, top.ravel())), shape=similarity.shape)
        return np.asarray((nearest @ self.train).toarray(), np.float32)


@dataclasses.dataclass(frozen=True)
class FoldIn:
    """Matrix factorisation without rows of users: a history's vector is the least-squares solution for it (iALS).

    x = A⁻¹ Σ_j h_j with A = Σ_j h_j h_jᵀ + G + λ (n + m)^ν I over the n items j of the history; the score of i is
    x·h_i, a sum over the history of h_iᵀ A⁻¹ h_j (Hu, Koren, Volinsky 2008, §5).
    """

    items: np.ndarray  # [I, D] float32 h, 0 for an item that nobody touched
    shared: np.ndarray  # [D, D] float32 G: what the items of no history say, weighted
    l2: float  # λ
    rest: float  # m: the items of no history, weighted
    exponent: float  # ν
    known: np.ndarray  # [I] bool

    def user_vectors(self, history: sp.csr_matrix) -> np.ndarray:
        """[b, D] float32 for histories [b, I]."""
        ridge = self.l2 * (np.diff(history.indptr) + self.rest) ** self.exponent
        return np.asarray(solve_rows(history, padded(self.items), self.shared, ridge))[:-1]

    def scores(self, history: sp.csr_matrix) -> np.ndarray:
        """[b, I] float32 for histories [b, I]."""
        return self.user_vectors(history) @ self.items.T

    def contributions(self, items: np.ndarray, candidate: int) -> np.ndarray:
        """[H] float32: what each item of a history adds to the score of `candidate`."""
        vectors = self.items[items].astype(np.float64)
        system = vectors.T @ vectors + self.shared
        system[np.diag_indices(len(system))] += self.l2 * (len(items) + self.rest) ** self.exponent
        return (vectors @ np.linalg.solve(system, self.items[candidate].astype(np.float64))).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class UserFactors:
    """Matrix factorisation with a row for each training user (BPR-MF).

    A history that is the whole one of a training user is served by that user's row. Any other, and so that of a user
    who came after training, is served by Σ_j e_j / √n over its n items, where the e_j are the items' factors through a
    matrix that was fitted to turn training histories into their users' rows.
    """

    users: np.ndarray  # [Nu', D] float32: rows of the users with a history, in the order of `marks`
    marks: np.ndarray  # [Nu'] uint64, sorted: `history_marks` of their histories
    items: np.ndarray  # [I, D] float32
    encode: np.ndarray  # [I, D] float32 e
    known: np.ndarray  # [I] bool

    def user_vectors(self, history: sp.csr_matrix) -> np.ndarray:
        """[b, D] float32 for histories [b, I]."""
        out = scaled_rows(history) @ self.encode
        if len(self.marks):
            marks = history_marks(history)
            place = np.minimum(np.searchsorted(self.marks, marks), len(self.marks) - 1)
            same = self.marks[place] == marks
            out[same] = self.users[place[same]]
        return np.asarray(out, np.float32)

    def scores(self, history: sp.csr_matrix) -> np.ndarray:
        """[b, I] float32 for histories [b, I]."""
        return self.user_vectors(history) @ self.items.T


def scaled_rows(history: sp.csr_matrix) -> sp.csr_matrix:
    """Histories [b, I] over the square root of their length."""
    return (sp.diags((1.0 / np.sqrt(np.maximum(history.getnnz(axis=1), 1))).astype(np.float32)) @ history).tocsr()


def history_marks(history: sp.csr_matrix) -> np.ndarray:
    """[b] uint64, equal for equal sets of items and for no others but by a chance of 2⁻⁶⁴: sums of mixed item rows."""
    mixed = history.indices.astype(np.uint64) + np.uint64(1)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed ^ (mixed >> np.uint64(31)), dtype=np.uint64)])
    return sums[history.indptr[1:]] - sums[history.indptr[:-1]]


Part = ItemWeights | RidgeWeights | Factors | Constant | UserNeighbours | FoldIn | UserFactors
