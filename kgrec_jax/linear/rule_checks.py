"""What a graph's regularities say against a triple, and what its rules add to the items."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import scipy.sparse as sp

from kgrec_jax.data.dataset import Graph
from kgrec_jax.errors import KgrecError
from kgrec_jax.linear.link_index import LinkIndex
from kgrec_jax.linear.rule_scorer import RuleScorer
from kgrec_jax.linear.rules import entity_name


@dataclasses.dataclass(frozen=True)
class CheckConfig:
    """When a triple is doubtful."""

    functional: float = 0.98  # a relation is functional where this share of its heads has one tail alone
    type_share: float = 0.005  # an end is of a foreign kind where fewer of its like take part in the relation
    min_entities: int = 20  # heads of a relation from which a regularity is believed


@dataclasses.dataclass(frozen=True)
class Doubt:
    """One regularity that a triple breaks."""

    kind: Literal["functional", "inverse functional", "domain", "range"]
    share: float  # of the relation's heads (tails) with one tail (head); or of the end's like in the relation
    entities: tuple[int, ...]  # functional kinds: the tails (heads) that stand there already
    relation: int = -1  # domain and range: what the end is known by, a row of 2R

    def text(self, graph: Graph, triple: np.ndarray) -> str:
        """The doubt in words, for its triple (head, relation, tail)."""
        head, relation, tail = (int(x) for x in triple)
        name = graph.relation_names[relation]
        if self.kind in ("functional", "inverse functional"):
            ends, end = ("heads", "tail") if self.kind == "functional" else ("tails", "head")
            there = " and ".join(entity_name(graph, e) for e in self.entities[:2])
            return f"{name} has one {end} for {self.share:.0%} of its {ends}, here {there} already"
        entity = head if self.kind == "domain" else tail
        known = graph.relation_names[self.relation % graph.num_relations]
        side = "head" if self.relation < graph.num_relations else "tail"
        return (f"{entity_name(graph, entity)} is a {side} of {known}, and {self.share:.1%} of those are a "
                f"{'head' if self.kind == 'domain' else 'tail'} of {name}")


class TripleChecker:
    """Functional relations, observed domains and ranges of a graph's training triples.

    The kind of an entity is what it is linked by: its end fits a relation where it takes part in it through another
    triple, or where one of its other relations shares enough of its entities with it. A triple that is stated itself
    is judged by all the others.
    """

    def __init__(self, graph: Graph, cfg: CheckConfig = CheckConfig()):
        for field in ("functional", "type_share"):
            if not 0 <= getattr(cfg, field) <= 1:
                raise KgrecError(f"{field}: found {getattr(cfg, field)}, expected a share from 0 to 1")
        self.cfg, self.graph, self.index = cfg, graph, LinkIndex.of(graph)
        n, twice, index = graph.num_entities, 2 * graph.num_relations, self.index
        relation = np.repeat(np.arange(twice), np.diff(index.step_starts))
        ones = np.ones(len(relation), np.int64)
        self._edges = sp.csr_matrix((ones, (index.step_head, relation)), shape=(n, twice))  # [N, 2R] counts
        has = self._edges.copy()
        has.data[:] = 1
        self._both = (has.T @ has).tocsr()  # [2R, 2R] entities that both relations leave
        self._size = np.asarray(has.sum(axis=0)).reshape(-1)  # [2R] entities that each leaves
        single = sp.csr_matrix((self._edges.data == 1, self._edges.indices, self._edges.indptr), shape=(n, twice))
        self._single = np.asarray(single.sum(axis=0)).reshape(-1) / np.maximum(self._size, 1)  # [2R]

    def contradicted(self, triples: np.ndarray) -> list[tuple[Doubt, ...]]:
        """What speaks against each of `triples` [T, 3], relations of R; an empty tuple where nothing does."""
        triples = self.index.check(triples)
        stated = self.index.has(triples[:, 1], triples[:, 0], triples[:, 2])
        return [self._doubts(int(h), int(k), int(t), bool(own)) for (h, k, t), own in zip(triples, stated)]

    def lines(self, triples: np.ndarray) -> list[str]:
        """All doubts of each of `triples` [T, 3] in words, "" where nothing speaks against it."""
        triples = np.asarray(triples).reshape(-1, 3)
        return ["; ".join(doubt.text(self.graph, t) for doubt in some)
                for t, some in zip(triples, self.contradicted(triples), strict=True)]

    def _doubts(self, head: int, relation: int, tail: int, stated: bool) -> tuple[Doubt, ...]:
        back = relation + self.index.num_relations
        found = [self._functional(head, relation, tail, "functional"),
                 self._functional(tail, back, head, "inverse functional"),
                 self._foreign(head, relation, stated, "domain"), self._foreign(tail, back, stated, "range")]
        return tuple(doubt for doubt in found if doubt)

    def _functional(self, start: int, relation: int, end: int, kind: str) -> Doubt | None:
        share = float(self._single[relation])
        if share < self.cfg.functional or self._size[relation] < self.cfg.min_entities:
            return None
        there = self.index.follow(np.array([relation]), np.array([start]))[1]
        others = tuple(int(e) for e in there if e != end)
        return Doubt(kind, share, others) if others else None

    def _foreign(self, entity: int, relation: int, stated: bool, kind: str) -> Doubt | None:
        row = self._edges[entity]
        edges = dict(zip(row.indices.tolist(), row.data.tolist(), strict=True))
        if edges.pop(relation, 0) > stated or self._size[relation] < self.cfg.min_entities:
            return None
        known = [s for s in edges if self._size[s] >= self.cfg.min_entities]
        if not known:
            return None
        # A stated triple puts its own end among those that take part: that one does not count.
        shares = [(self._both[s, relation] - stated) / self._size[s] for s in known]
        best = int(np.argmax(shares))
        return Doubt(kind, float(shares[best]), (), known[best]) if shares[best] < self.cfg.type_share else None


@dataclasses.dataclass(frozen=True)
class ImpliedFacts:
    """Facts of the items that rules derive and the graph does not state."""

    matrix: sp.csr_matrix  # [I, F] float32, how sure each is
    columns: np.ndarray  # [F, 2] int32: relation of 2R, tail


def implied_facts(scorer: RuleScorer, num_items: int, *, min_confidence: float = 0.3, per_relation: int = 5,
                  min_items: int = 2) -> ImpliedFacts:
    """What the rules add to the items: unstated (relation, tail) of each, weighted by how sure it is, up to 1.

    Kept are the `per_relation` surest of each item and relation that reach `min_confidence`, in columns of at least
    `min_items` items; a column is a feature like those of `graph_features`. Raises KgrecError where there are more
    items than entities.
    """
    index = scorer.index
    if num_items > index.num_entities:
        raise KgrecError(f"num_items: found {num_items}, expected at most the {index.num_entities} entities")
    items, found = np.arange(num_items), [np.zeros((4, 0))]
    for relation in range(2 * index.num_relations if num_items else 0):
        scores = scorer.sparse(items, np.full(num_items, relation)).tocoo()
        sure = scorer.probability(scores.data)
        item, tail = scores.row.astype(np.int64), scores.col.astype(np.int64)
        new = (sure >= min_confidence) & ~index.has(np.full(len(item), relation), item, tail)
        item, tail, sure = item[new], tail[new], sure[new]
        order = np.lexsort((tail, -sure, item))
        first = np.searchsorted(item[order], item[order])
        kept = order[np.arange(len(order)) - first < per_relation]
        found.append(np.stack([item[kept], np.full(len(kept), relation), tail[kept], sure[kept]]))
    item, relation, tail, sure = np.concatenate(found, axis=1)
    code, column, count = np.unique((relation * index.num_entities + tail).astype(np.int64), return_inverse=True,
                                    return_counts=True)
    kept = np.flatnonzero(count >= min_items)
    matrix = sp.csr_matrix((sure.astype(np.float32), (item.astype(np.int64), column)),
                           shape=(num_items, len(code)))[:, kept]
    columns = np.stack(np.divmod(code[kept], max(index.num_entities, 1)), axis=1).astype(np.int32)
    return ImpliedFacts(matrix, columns)
