"""The edges of a graph in the two orders that rules are counted in: by pair of entities and by relation."""

from __future__ import annotations

import dataclasses

import numpy as np

from kgrec_jax.data.dataset import Graph
from kgrec_jax.data.graph import edges
from kgrec_jax.errors import KgrecError


@dataclasses.dataclass(frozen=True)
class LinkIndex:
    """Training edges in both directions (row r + R walks r backwards), each once, without edges to itself."""

    num_entities: int  # N
    num_relations: int  # R, without inverses
    pair_keys: np.ndarray  # [M] int64, sorted: head * N + tail of each linked pair
    pair_starts: np.ndarray  # [M + 1] int64: the relations of pair m are pair_relations[pair_starts[m]:…[m + 1]]
    pair_relations: np.ndarray  # [E] int32, sorted within each pair
    near: np.ndarray  # [N + 1] int64: the pairs with head u are near[u]:near[u + 1]
    step_starts: np.ndarray  # [2R + 1] int64: the edges of relation s are step_head[step_starts[s]:…[s + 1]]
    step_head: np.ndarray  # [E] int32, sorted within each relation
    step_tail: np.ndarray  # [E] int32, sorted within each (relation, head)
    edge_keys: np.ndarray  # [E] int64, sorted: (relation * N + head) * N + tail of the same edges

    @staticmethod
    def of(graph: Graph) -> LinkIndex:
        """The index of the training triples of `graph`."""
        head, relation, tail = edges(graph)
        true = head != tail
        head, relation, tail = head[true], relation[true], tail[true]
        n, twice = graph.num_entities, 2 * graph.num_relations
        by_pair = np.lexsort((relation, tail, head))
        keys = head[by_pair].astype(np.int64) * n + tail[by_pair]
        pair_keys, first = np.unique(keys, return_index=True)
        by_step = np.argsort(relation, kind="stable")
        edge_keys = (relation[by_step].astype(np.int64) * n + head[by_step]) * n + tail[by_step]
        return LinkIndex(
            n, graph.num_relations, pair_keys, np.append(first, len(keys)).astype(np.int64), relation[by_pair],
            np.searchsorted(pair_keys // max(n, 1), np.arange(n + 1)),
            np.searchsorted(relation[by_step], np.arange(twice + 1)), head[by_step], tail[by_step], edge_keys)

    @property
    def tails(self) -> np.ndarray:
        """[M] the tail of each linked pair."""
        return self.pair_keys % max(self.num_entities, 1)

    def inverse(self, relation: np.ndarray | int) -> np.ndarray | int:
        """The same edges walked the other way."""
        return (relation + self.num_relations) % (2 * self.num_relations)

    def step(self, relation: int) -> tuple[np.ndarray, np.ndarray]:
        """(head [n], tail [n]) of all edges of one relation of 2R."""
        cut = slice(self.step_starts[relation], self.step_starts[relation + 1])
        return self.step_head[cut], self.step_tail[cut]

    def pairs_of(self, head: np.ndarray, tail: np.ndarray) -> np.ndarray:
        """[n] int64 the pair of each (head, tail), -1 where no edge links them."""
        if not len(self.pair_keys):
            return np.full(len(head), -1, np.int64)
        wanted = head.astype(np.int64) * self.num_entities + tail
        place = np.minimum(np.searchsorted(self.pair_keys, wanted), len(self.pair_keys) - 1)
        return np.where(self.pair_keys[place] == wanted, place, -1)

    def follow(self, relation: np.ndarray, entity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(row [n], tail [n]): the edges of relation[k] that leave entity[k], for each row k of both."""
        low, counts = self._span(relation, entity)
        return np.repeat(np.arange(len(entity)), counts), self.step_tail[ranges(low, counts)]

    def count(self, relation: np.ndarray, entity: np.ndarray) -> np.ndarray:
        """[n] how many edges of relation[k] leave entity[k]."""
        return self._span(relation, entity)[1]

    def _span(self, relation: np.ndarray, entity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        start = (relation.astype(np.int64) * self.num_entities + entity) * self.num_entities
        low = np.searchsorted(self.edge_keys, start)
        return low, np.searchsorted(self.edge_keys, start + self.num_entities) - low

    def has(self, relation: np.ndarray, head: np.ndarray, tail: np.ndarray) -> np.ndarray:
        """[n] bool, whether each edge is there."""
        if not len(self.edge_keys):
            return np.zeros(len(head), bool)
        wanted = (np.asarray(relation, np.int64) * self.num_entities + head) * self.num_entities + tail
        place = np.minimum(np.searchsorted(self.edge_keys, wanted), len(self.edge_keys) - 1)
        return self.edge_keys[place] == wanted

    def check(self, triples: np.ndarray) -> np.ndarray:
        """`triples` as [T, 3] int64; KgrecError where one lies outside the graph's entities and R relations."""
        triples = np.asarray(triples, np.int64).reshape(-1, 3)
        n, r = self.num_entities, self.num_relations
        if len(triples) and (triples.min() < 0 or triples[:, [0, 2]].max() >= n or triples[:, 1].max() >= r):
            low, high = (tuple(int(x) for x in ends) for ends in (triples.min(axis=0), triples.max(axis=0)))
            raise KgrecError(f"triples: found ids from {low} to {high}, expected entities below {n} and relations "
                             f"below {r}, none negative")
        return triples

    def facts_of(self, entity: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(row [n], relation [n], tail [n]): all edges that leave each of `entity`."""
        pairs = np.diff(self.near)[entity]
        pair = ranges(self.near[entity], pairs)
        counts = np.diff(self.pair_starts)[pair]
        row = np.repeat(np.repeat(np.arange(len(entity)), pairs), counts)
        return row, self.pair_relations[ranges(self.pair_starts[pair], counts)], np.repeat(self.tails[pair], counts)


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """start, start + 1, … for `counts` places from each of `starts`, one after another: [Σ counts] int64."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - counts), counts)


def chunks(sizes: np.ndarray, limit: int) -> list[slice]:
    """Consecutive slices of `sizes` whose sums stay under `limit`; a larger single one has a slice of its own."""
    total, out, start = np.concatenate([[0], np.cumsum(sizes)]), [], 0
    while start < len(sizes):
        stop = max(int(np.searchsorted(total, total[start] + limit, "right")) - 1, start + 1)
        out.append(slice(start, stop))
        start = stop
    return out
