"""What a graph looks like in numbers: its relations, pairs of relations that say the same, degrees and components."""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.sparse as sp
import scipy.sparse.csgraph

from kgrec_jax.data.dataset import Graph
from kgrec_jax.data.graph import relation_overlaps

_MANY = 1.5  # tails a head, or heads a tail, from which a relation counts as "many" (Bordes et al. 2013)


@dataclasses.dataclass(frozen=True)
class Relations:
    """A row a relation, over its distinct triples."""

    triples: np.ndarray  # [R] int64
    heads: np.ndarray  # [R] int64 distinct ones
    tails: np.ndarray  # [R] int64 distinct ones
    symmetric: np.ndarray  # [R] float64 share of the pairs (a, b), a other than b, that stand reversed too
    loops: np.ndarray  # [R] int64 triples from an entity to itself

    @property
    def functionality(self) -> np.ndarray:
        """[R] distinct heads a triple: 1 where each head has one tail (Suchanek et al. 2011, PARIS)."""
        return self.heads / np.maximum(self.triples, 1)

    @property
    def inverse_functionality(self) -> np.ndarray:
        """[R] distinct tails a triple: 1 where each tail has one head."""
        return self.tails / np.maximum(self.triples, 1)

    def kind(self, row: int) -> str:
        """`1-1`, `1-n`, `n-1` or `n-n`: heads a tail, then tails a head; many from 1.5 on average."""
        count = self.triples[row]
        sides = (count >= _MANY * self.tails[row], count >= _MANY * self.heads[row])
        return "-".join("n" if many else "1" for many in sides)


@dataclasses.dataclass(frozen=True)
class RelationPair:
    """Two relations whose pairs of entities largely agree, `first` having the fewer of them."""

    first: int
    second: int
    reverse: bool  # (a, b) of the one stands as (b, a) in the other
    shared: int  # pairs of entities
    share_first: float  # of the pairs of the first
    share_second: float


@dataclasses.dataclass(frozen=True)
class Leak:
    """How far a given link-prediction part can be read off the training part (Toutanova & Chen 2015)."""

    triples: int
    unseen: int  # triples with an entity that the training part does not have
    linked: int  # triples whose two entities a training triple joins, in either direction
    reversed: int  # of these, those that a training triple joins in the other direction


def distinct(graph: Graph) -> np.ndarray:
    """[T, 3] int64 the triples of all parts, each once, in ascending order."""
    return np.unique(graph.triples.astype(np.int64), axis=0).reshape(-1, 3)


def relation_statistics(graph: Graph) -> Relations:
    """Counts of each relation, over the distinct triples of all parts."""
    triples, r, n = distinct(graph), graph.num_relations, graph.num_entities
    head, relation, tail = triples.T
    size = np.bincount(relation, minlength=r)
    loop = head == tail
    forward, backward = (relation * n + head) * n + tail, (relation * n + tail) * n + head
    mirrored = np.isin(backward, forward) & ~loop  # r n n stays below 2**63 for 10,000 relations of 30 million entities
    proper = size - np.bincount(relation[loop], minlength=r)
    return Relations(size, _distinct_ends(relation, head, n, r), _distinct_ends(relation, tail, n, r),
                     np.bincount(relation[mirrored], minlength=r) / np.maximum(proper, 1), size - proper)


def _distinct_ends(relation: np.ndarray, end: np.ndarray, n: int, r: int) -> np.ndarray:
    return np.bincount(np.unique(relation * n + end) // max(n, 1), minlength=r)


def similar_relations(graph: Graph, min_share: float = 0.8, min_pairs: int = 2) -> list[RelationPair]:
    """Pairs of relations of which one has at least `min_share` of its pairs in the other, straight or reversed.

    Those that agree from both sides come first: duplicates and inverses, which put the answer of a test triple into
    training where a split is random. Pairs that share fewer than `min_pairs` pairs of entities are no evidence.
    """
    triples, found = distinct(graph), []
    if not len(triples):
        return found
    size = np.bincount(triples[:, 1], minlength=graph.num_relations)
    overlaps = relation_overlaps(triples, graph.num_entities, graph.num_relations)
    for reverse, overlap in zip((False, True), overlaps, strict=True):
        pairs = sp.coo_matrix(sp.triu(overlap, 1))
        for a, b, shared in zip(pairs.row.tolist(), pairs.col.tolist(), pairs.data.tolist(), strict=True):
            a, b = sorted((a, b), key=lambda k: (size[k], k))
            if shared >= min_pairs and shared >= min_share * size[a]:
                found.append(RelationPair(a, b, reverse, shared, shared / int(size[a]), shared / int(size[b])))
    return sorted(found, key=lambda p: (-p.share_second, -p.shared, p.first, p.second))


def degrees(graph: Graph) -> np.ndarray:
    """[2, N] int64 distinct triples that each entity is the head, and the tail, of."""
    triples = distinct(graph)
    return np.stack([np.bincount(triples[:, k], minlength=graph.num_entities) for k in (0, 2)])


def degree_table(degree: np.ndarray) -> list[tuple[int, int, int]]:
    """(lowest, highest, entities) of degree 0, 1, 2, 3–4, 5–8, … up to the largest; ends with an entity, no gaps."""
    rows, low, high = [], 0, 0
    while low <= degree.max(initial=0):
        rows.append((low, high, int(((degree >= low) & (degree <= high)).sum())))
        low, high = high + 1, max(2 * high, 1)
    return rows if len(degree) else []


def components(graph: Graph) -> np.ndarray:
    """Sizes of the connected components in entities, largest first; an entity without a triple is one by itself."""
    n = graph.num_entities
    ends = graph.triples[:, 0], graph.triples[:, 2]
    joined = sp.csr_matrix((np.ones(len(graph.triples), bool), ends), shape=(n, n))
    _, label = scipy.sparse.csgraph.connected_components(joined, directed=False)
    return np.sort(np.bincount(label))[::-1] if n else np.zeros(0, np.int64)


def leaks(graph: Graph) -> dict[str, Leak]:
    """`valid` and `test` of a given link-prediction split against its training part; empty without a split."""
    n, out = graph.num_entities, {}
    train = graph.triples[graph.part == 0].astype(np.int64)
    seen = np.zeros(n, bool)
    seen[train[:, [0, 2]]] = True
    pairs = np.unique(train[:, 0] * n + train[:, 2])
    for part, name in ((1, "valid"), (2, "test")):
        rows = graph.triples[graph.part == part].astype(np.int64)
        if not len(rows):
            continue
        straight = np.isin(rows[:, 0] * n + rows[:, 2], pairs)
        turned = np.isin(rows[:, 2] * n + rows[:, 0], pairs)
        out[name] = Leak(len(rows), int((~seen[rows[:, [0, 2]]].all(1)).sum()), int((straight | turned).sum()),
                         int(turned.sum()))
    return out
