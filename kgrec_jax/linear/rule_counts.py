"""What a rule's numbers are counted from: how often a body and a head hold together, and a body alone.

Support comes from closed triangles: for each linked pair (x, y), the common neighbours z of the end with fewer edges.
Only bodies that ever meet a head are multiplied out, and of those only the ones that a lower bound of their size leaves
a chance, so no product of two hubs is formed. Entities of a body are pairwise distinct (object identity, as in Meilicke
et al., "Anytime Bottom-Up Rule Learning for Knowledge Graph Completion", 2019).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import scipy.sparse as sp

from kgrec_jax.linear.link_index import LinkIndex, chunks, ranges

CHUNK = 4_000_000  # rows of the largest temporary arrays
SAMPLED_ROWS = 64  # a sampled body is estimated from at least so many of its first entities


def step_supports(index: LinkIndex) -> tuple[np.ndarray, np.ndarray]:
    """(key [n] int64 = head * 2R + first, count [n]) of first(x, y) ⇒ head(x, y), head of R, first ≠ head."""
    twice, total = 2 * index.num_relations, Counter()
    counts = np.diff(index.pair_starts)
    several = np.flatnonzero(counts > 1)
    for cut in chunks(counts[several] ** 2, CHUNK):
        pair = several[cut]
        _, first, head = _products(index, pair, pair)
        true = (head < index.num_relations) & (first != head)
        total.add(head[true].astype(np.int64) * twice + first[true])
    return total.result()


def path_supports(index: LinkIndex, min_support: int) -> tuple[np.ndarray, np.ndarray]:
    """(key [n] int64 = (head * 2R + first) * 2R + second, count [n]) of first(x, z) ∧ second(z, y) ⇒ head(x, y).

    head of R; x, y, z distinct; a pair (x, y) counts once however many z there are. Counts under `min_support` are left
    out.
    """
    total = Counter()
    for key in _triangles(index):
        total.add(key)
    keys, counts = total.result()
    return keys[counts >= min_support], counts[counts >= min_support]


class Counter:
    """Counts of int64 keys that come in chunks, in memory proportional to the distinct ones."""

    def __init__(self) -> None:
        self._keys, self._counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, keys: np.ndarray) -> None:
        """Count each of `keys` once."""
        self._waiting.append(np.unique(keys, return_counts=True))
        # Merged when as much waits as is held: each key is moved a logarithmic number of times.
        if sum(len(k) for k, _ in self._waiting) > len(self._keys) + CHUNK:
            self._merge()

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """(distinct keys, sorted; their counts)."""
        self._merge()
        return self._keys, self._counts

    def _merge(self) -> None:
        keys = np.concatenate([self._keys, *(k for k, _ in self._waiting)])
        counts = np.concatenate([self._counts, *(c for _, c in self._waiting)])
        self._keys, inverse = np.unique(keys, return_inverse=True)
        self._counts = np.bincount(inverse, weights=counts, minlength=len(self._keys)).astype(np.int64)
        self._waiting = []


def _triangles(index: LinkIndex) -> Iterator[np.ndarray]:
    """Chunks of keys, each (pair, body, head) once; a pair is walked from its end with fewer neighbours."""
    n, degree, tails = index.num_entities, np.diff(index.near), index.tails
    head = index.pair_keys // max(n, 1)
    own = np.flatnonzero(degree[head] * n + head < degree[tails] * n + tails)  # each unordered pair from one end
    a, b = head[own], tails[own]
    for cut in chunks(degree[a], CHUNK):
        width = degree[a[cut]]
        row = np.repeat(np.arange(cut.start, cut.stop), width)
        left = ranges(index.near[a[cut]], width)  # pairs (a, z)
        right = index.pairs_of(tails[left], b[row])  # pairs (z, b)
        met = right >= 0
        row, left, right = row[met], left[met], right[met]
        sizes = np.diff(index.pair_starts)[left] * np.diff(index.pair_starts)[right]
        bounds = np.searchsorted(row, np.arange(cut.start, cut.stop + 1))
        per_pair = np.add.reduceat(np.append(sizes, 0), bounds[:-1]) * (np.diff(bounds) > 0)
        for part in chunks(per_pair, CHUNK):
            some = slice(bounds[part.start], bounds[part.stop])
            yield _keys(index, own[row[some]], left[some], right[some])


def _keys(index: LinkIndex, pair: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Keys of `path_supports` for the triangles (pair, left, right), each once a pair."""
    r, twice = index.num_relations, 2 * index.num_relations
    row, first, second = _products(index, left, right)
    pairs, place = np.unique(pair, return_inverse=True)
    body = np.unique((place[row].astype(np.int64) * twice + first) * twice + second)
    pair = pairs[body // (twice * twice)]
    first, second = body // twice % twice, body % twice
    counts = np.diff(index.pair_starts)[pair]
    head = index.pair_relations[ranges(index.pair_starts[pair], counts)].astype(np.int64)
    first, second = np.repeat(first, counts), np.repeat(second, counts)
    backwards = head >= r  # the triple runs from b to a, so the path is read from its other end
    turned = np.where(backwards, index.inverse(second), first), np.where(backwards, index.inverse(first), second)
    return (np.where(backwards, head - r, head) * twice + turned[0]) * twice + turned[1]


def _products(index: LinkIndex, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row, relation of left, relation of right): every combination of the relations of two pairs, row by row."""
    counts = np.diff(index.pair_starts)
    n, m = counts[left], counts[right]
    row = np.repeat(np.arange(len(left)), n * m)
    within = ranges(np.zeros(len(left), np.int64), n * m)
    first = index.pair_relations[index.pair_starts[left][row] + within // m[row]]
    return row, first, index.pair_relations[index.pair_starts[right][row] + within % m[row]]


class Bodies:
    """Sizes of bodies first(x, z) ∧ second(z, y), one product at a time.

    `limit` caps the paths of one product; above it the size is estimated from a random part of the x.
    """

    def __init__(self, index: LinkIndex, limit: int, seed: int):
        self._index, self._limit, self._seed = index, limit, seed
        self._rows: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = {}

    def at_least(self, first: int, second: int) -> int:
        """A lower bound of the body's size, without multiplying: the widest step of each x, less x itself."""
        x, _ = self._index.step(first)
        width = self._widths(first, second)[1]
        if not len(x):
            return 0
        starts = np.flatnonzero(np.append(True, x[1:] != x[:-1]))
        return int(np.maximum(np.maximum.reduceat(width, starts) - 1, 0).sum())

    def pairs(self, first: int, second: int) -> tuple[np.ndarray, np.ndarray, float]:
        """(x [n], y [n], share): the distinct pairs that the body links, or those of a share of the x."""
        x, _ = self._index.step(first)
        heads, starts, columns, local = self._compact(second)
        place, width = self._widths(first, second)
        xs, row = np.unique(x, return_inverse=True)
        share, keep = 1.0, width > 0
        paths = int(width.sum())
        if paths > self._limit:
            count = min(len(xs), max(SAMPLED_ROWS, -(-len(xs) * self._limit // paths)))
            rng = np.random.default_rng((self._seed, first, second))
            keep &= np.isin(row, rng.choice(len(xs), count, replace=False))
            share = count / len(xs)
        left = sp.csr_matrix((np.ones(keep.sum(), bool), (row[keep], place[keep])), shape=(len(xs), len(heads)))
        right = sp.csr_matrix((np.ones(len(local), bool), local, starts), shape=(len(heads), len(columns)))
        product = left @ right
        x, y = np.repeat(xs, np.diff(product.indptr)), columns[product.indices]
        return x[x != y], y[x != y], share

    def _widths(self, first: int, second: int) -> tuple[np.ndarray, np.ndarray]:
        """For each edge (x, z) of `first`: the place of z among the heads of `second`, and its edges there."""
        _, z = self._index.step(first)
        heads, starts, _, _ = self._compact(second)
        if not len(heads):
            return np.zeros(len(z), np.int64), np.zeros(len(z), np.int64)
        place = np.minimum(np.searchsorted(heads, z), len(heads) - 1)
        return place, np.where(heads[place] == z, np.diff(starts)[place], 0)

    def _compact(self, relation: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(heads, starts, distinct tails, tails as their places): the relation's matrix without empty lines."""
        if relation not in self._rows:
            head, tail = self._index.step(relation)
            heads, first = np.unique(head, return_index=True)
            columns, local = np.unique(tail, return_inverse=True)
            self._rows[relation] = heads, np.append(first, len(head)), columns, local
        return self._rows[relation]


class Facts:
    """What is said of single entities, as columns of a binary matrix: s(x, c) for each (s, c), and s(x, ·)."""

    def __init__(self, index: LinkIndex, min_count: int):
        n, twice = index.num_entities, 2 * index.num_relations
        relation = np.repeat(np.arange(twice), np.diff(index.step_starts))
        code = relation * n + index.step_tail
        kept, inverse, count = np.unique(code, return_inverse=True, return_counts=True)
        column = np.where(count >= min_count, np.cumsum(count >= min_count) - 1, -1)[inverse]
        kept = kept[count >= min_count]
        self.relation = np.concatenate([kept // max(n, 1), np.arange(twice)]).astype(np.int32)  # [F + 2R]
        self.constant = np.concatenate([kept % max(n, 1), np.full(twice, -1)]).astype(np.int32)  # -1: any
        self.num_stated = len(kept)  # F columns with a constant, then 2R without
        rows = np.concatenate([index.step_head[column >= 0], index.step_head])
        columns = np.concatenate([column[column >= 0], relation + len(kept)])
        self.matrix = sp.csr_matrix((np.ones(len(rows), np.int32), (rows, columns)), shape=(n, len(self.relation)))
        self.matrix.data[:] = 1  # an entity has s(x, ·) once, however many c
        self.count = np.asarray(self.matrix.sum(axis=0)).reshape(-1)  # [F + 2R]

    def implications(self, min_support: int, min_confidence: float, keep: int) -> np.ndarray:
        """[n, 4] int64 (body column, head column, support, body with any fact of the head's relation).

        At most `keep` bodies for each head, the surest first. A head has a constant. Left out are bodies that the head
        contains, s(x, ·) ⇒ s(x, c), and those with the head's constant, which are cases of first(x, y) ⇒ head(x, y).
        Blocks of columns bound the memory.
        """
        stated, found = self.num_stated, [np.zeros((0, 4), np.int64)]
        heads, closed = self.matrix[:, :stated], self.matrix[:, stated:]
        bodies = self.matrix.T.tocsr()
        step = max(1, 4 * CHUNK // max(self.matrix.shape[1], 1))
        for start in range(0, self.matrix.shape[1], step):
            block = bodies[start:start + step]
            both = (block @ heads).tocoo()
            body, head, support = both.row + start, both.col, both.data.astype(np.int64)
            sure = (support >= min_support) & (support / self.count[body] >= min_confidence)
            sure &= self.constant[body] != self.constant[head]
            sure &= (self.constant[body] >= 0) | (self.relation[body] != self.relation[head])
            body, head, support = body[sure], head[sure], support[sure]
            with_any = (block @ closed).toarray()[body - start, self.relation[head]]
            found.append(np.stack([body, head, support, with_any], 1).astype(np.int64))
            if sum(map(len, found)) > CHUNK:
                found = [self._best(np.concatenate(found), keep)]
        return self._best(np.concatenate(found), keep)

    def _best(self, found: np.ndarray, keep: int) -> np.ndarray:
        """The `keep` surest rows of each head column, of equally sure ones those with more support."""
        order = np.lexsort((found[:, 0], -found[:, 2], -found[:, 2] / self.count[found[:, 0]], found[:, 1]))
        head = found[order, 1]
        first = np.searchsorted(head, head)  # where each head's run begins
        return found[order][np.arange(len(head)) - first < keep]
