"""What a closed-form part of the score is: a function of a history, for known users and new ones alike."""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.sparse as sp


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

    def scores(self, history: sp.csr_matrix) -> np.ndarray:
        """[b, I] float32 for histories [b, I]; blocks of users bound the memory to about 64 M similarities."""
        norms = np.sqrt(self.train.getnnz(axis=1).astype(np.float32))  # [Nu]
        rows = max(1, 64_000_000 // max(1, self.train.shape[0]))
        blocks = [self._block(history[start:start + rows], norms) for start in range(0, history.shape[0], rows)]
        return np.concatenate(blocks) if blocks else np.zeros(history.shape, np.float32)

    def _block(self, history: sp.csr_matrix, norms: np.ndarray) -> np.ndarray:
        own = np.sqrt(history.getnnz(axis=1).astype(np.float32))  # [b]
        similarity = (history @ self.train.T).toarray()  # [b, Nu]
        similarity /= own[:, None] * norms[None, :] + np.float32(self.shrink + 1e-9)
        k = min(self.num_neighbours, similarity.shape[1])
        top = np.argpartition(-similarity, k - 1, axis=1)[:, :k]  # [b, k]
        values = np.take_along_axis(similarity, top, axis=1)
        rows = np.repeat(np.arange(len(similarity)), k)
        nearest = sp.csr_matrix((values.ravel(), (rows, top.ravel())), shape=similarity.shape)
        return np.asarray((nearest @ self.train).toarray(), np.float32)


Part = ItemWeights | Factors | Constant | UserNeighbours
