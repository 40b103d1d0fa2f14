"""The knowledge graph as arrays: inverse relations merged, neighbours, item features, and words for what has no name.

Edges have a direction and a row of the relation table: `r` walks a triple from head to tail, `r + R` from tail to head.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp
import scipy.sparse.linalg

from kgrec_jax.data.dataset import Graph


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """What `merge_inverse_relations` found, in names of relations."""

    merged: tuple[tuple[str, str, float], ...]  # (kept, dropped, share of pairs that stand in both directions)
    symmetric: tuple[tuple[str, float], ...]  # (relation, share of its pairs that it holds in both directions)
    contained: tuple[tuple[str, str, float], ...]  # (relation, the one that holds its pairs reversed, share)
    triples_before: int
    triples_after: int
    given_split: bool  # a graph with a given link-prediction split stays as it is
    turned: tuple[tuple[str, str], ...] = ()  # ids of (a relation that was merged away, the one that has its triples)

    def lines(self) -> list[str]:
        """The report in words, one line a finding."""
        if self.given_split:
            return ["graph: its link-prediction split is given, so relations are left as they are"]
        out = [f"graph: {a} = {b} reversed ({share:.0%} of the pairs): merged" for a, b, share in self.merged]
        out += [f"graph: {r} is symmetric ({share:.0%}): each pair kept once" for r, share in self.symmetric]
        out += [f"graph: {share:.0%} of {a} are in {b} reversed: those dropped" for a, b, share in self.contained]
        if self.triples_after < self.triples_before:
            out.append(f"graph: {self.triples_before:,} triples became {self.triples_after:,}")
        return out


def merge_inverse_relations(graph: Graph, min_overlap: float = 0.8) -> tuple[Graph, MergeReport]:
    """The graph with every fact stated once, and what was merged.

    Two relations are inverse where at least `min_overlap` of the larger one's distinct pairs stand reversed in the
    other, and each is the other's best match (`directed` has a better one than `written by`, even where most directors
    write). The one whose heads are more often items stays, its tail being a property of the item; the other's triples
    are turned round. A relation that is its own inverse keeps each pair once. Where a small relation is mostly
    contained in a larger one reversed, their meanings may differ, so only the triples that stand in both are dropped
    from the small one. After this a random split does not put a fact into training and its reverse into the test.
    A graph with a given link-prediction split is returned as it is, for its figures are compared with others'.
    """
    before = len(graph.triples)
    if graph.part.any() or not before:
        return graph, MergeReport((), (), (), before, before, bool(before))
    n, r = graph.num_entities, graph.num_relations
    triples = np.unique(graph.triples.astype(np.int64), axis=0)
    overlap = _reversed_overlap(triples, n, r)  # [R, R] pairs of r that stand reversed in s
    size = np.bincount(triples[:, 1], minlength=r)
    share = overlap / np.maximum(np.maximum(size[:, None], size[None, :]), 1)
    symmetric = [k for k in range(r) if share[k, k] >= min_overlap]
    item_heads = np.bincount(triples[triples[:, 0] < graph.num_items, 1], minlength=r) / np.maximum(size, 1)
    np.fill_diagonal(share, 0)
    share[symmetric] = share[:, symmetric] = 0
    best = share.argmax(1)
    merged, target = [], np.arange(r)
    for k in range(r):
        s = int(best[k])
        if k < s and best[s] == k and share[k, s] >= min_overlap:
            kept, dropped = (k, s) if item_heads[k] >= item_heads[s] else (s, k)
            target[dropped] = kept
            merged.append((kept, dropped, float(share[k, s])))
    turned = target[triples[:, 1]] != triples[:, 1]
    triples[turned] = triples[turned][:, [2, 1, 0]]
    triples[:, 1] = target[triples[:, 1]]
    triples = _drop_mirrored(np.unique(triples, axis=0), n, symmetric)
    triples, contained = _drop_contained(triples, n, r, min_overlap, symmetric)
    names = graph.relation_names
    report = MergeReport(tuple((names[a], names[b], s) for a, b, s in merged),
                         tuple((names[k], float(overlap[k, k] / size[k])) for k in symmetric),
                         tuple((names[a], names[b], s) for a, b, s in contained), before, len(triples), False,
                         tuple((graph.relation_ids[b], graph.relation_ids[a]) for a, b, _ in merged))
    return _with_triples(graph, triples), report


def _keys(triples: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """[T] int64 keys of (head, tail) and of (tail, head)."""
    return triples[:, 0] * n + triples[:, 2], triples[:, 2] * n + triples[:, 0]


def relation_overlaps(triples: np.ndarray, n: int, r: int) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Of distinct `triples` [T, 3] int64 over n entities: [R, R] counts of the pairs (a, b) of relation r for which
    (a, b), and for which (b, a), stands in relation s too."""
    holds, held = _pairs_held(triples, n, r)
    return (holds @ holds.T).tocsr(), (holds @ held.T).tocsr()


def _reversed_overlap(triples: np.ndarray, n: int, r: int) -> np.ndarray:
    """[R, R] count of distinct pairs (a, b) of relation r for which (b, a) stands in relation s."""
    holds, held = _pairs_held(triples, n, r)
    return (holds @ held.T).toarray()


def _pairs_held(triples: np.ndarray, n: int, r: int) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """[R, P] which pairs of entities stand in each relation, and which stand in it reversed."""
    forward, backward = _keys(triples, n)
    pairs, codes = np.unique(np.concatenate([forward, backward]), return_inverse=True)
    half, ones = len(forward), np.ones(len(forward), np.int64)
    holds = sp.csr_matrix((ones, (triples[:, 1], codes[:half])), shape=(r, len(pairs)))
    held = sp.csr_matrix((ones, (triples[:, 1], codes[half:])), shape=(r, len(pairs)))
    return holds, held


def _drop_mirrored(triples: np.ndarray, n: int, symmetric: Sequence[int]) -> np.ndarray:
    """Of (a, r, b) and (b, r, a) with a symmetric r, only the one that starts at the lower row."""
    forward, backward = _keys(triples, n)
    mirror = np.zeros(len(triples), bool)
    for k in symmetric:
        own = triples[:, 1] == k
        mirror |= own & (triples[:, 0] > triples[:, 2]) & np.isin(backward, forward[own])
    return triples[~mirror]


def _drop_contained(triples: np.ndarray, n: int, r: int, min_overlap: float,
                    symmetric: Sequence[int]) -> tuple[np.ndarray, list[tuple[int, int, float]]]:
    overlap = _reversed_overlap(triples, n, r)
    np.fill_diagonal(overlap, 0)
    size = np.bincount(triples[:, 1], minlength=r)
    share = overlap / np.maximum(size, 1)[:, None]  # of the small relation's pairs
    share[size[:, None] > size[None, :]] = 0
    share[symmetric] = share[:, symmetric] = 0
    keep, found = np.ones(len(triples), bool), []
    forward, backward = _keys(triples, n)
    for small in np.flatnonzero(share.max(1, initial=0) >= min_overlap):
        large = int(share[small].argmax())
        keep &= ~((triples[:, 1] == small) & np.isin(backward, forward[(triples[:, 1] == large) & keep]))
        found.append((int(small), large, float(share[small, large])))
    return triples[keep], found


def _with_triples(graph: Graph, triples: np.ndarray) -> Graph:
    """The graph with other triples; relations that have none left leave the table."""
    used, compact = np.unique(triples[:, 1], return_inverse=True)
    rows = np.stack([triples[:, 0], compact.reshape(-1), triples[:, 2]], 1).astype(np.int32)
    return dataclasses.replace(graph, triples=rows, part=np.zeros(len(rows), np.int8),
                               relation_ids=tuple(graph.relation_ids[k] for k in used),
                               relation_names=tuple(graph.relation_names[k] for k in used))


def edges(graph: Graph, inverse: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(head, relation, tail), each [E] int32, sorted by head, relation, tail; training triples only, each once.

    With `inverse` every triple is walked both ways, backwards as relation r + R.
    """
    rows = graph.triples[graph.part == 0]
    if inverse:
        rows = np.concatenate([rows, np.stack([rows[:, 2], rows[:, 1] + graph.num_relations, rows[:, 0]], 1)])
    rows = np.unique(rows, axis=0) if len(rows) else rows.reshape(0, 3)  # sorted by head first
    return tuple(np.ascontiguousarray(rows[:, k], dtype=np.int32) for k in range(3))


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """Outgoing edges of rows 0 … n-1, in compressed rows: those of row i are `indptr[i]:indptr[i + 1]`."""

    indptr: np.ndarray  # [n + 1] int64
    relation: np.ndarray  # [E] int32, r + R for a triple walked backwards
    entity: np.ndarray  # [E] int32

    def of(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """(relation, entity) of the edges of one row."""
        cut = slice(self.indptr[row], self.indptr[row + 1])
        return self.relation[cut], self.entity[cut]


def neighbours(graph: Graph, num_rows: int) -> Neighbours:
    """What rows 0 … num_rows-1 of the entity table are linked to: num_items for the items, N for all entities."""
    head, relation, tail = edges(graph)
    indptr = np.searchsorted(head, np.arange(num_rows + 1))
    return Neighbours(indptr.astype(np.int64), relation[: indptr[-1]], tail[: indptr[-1]])


def graph_features(graph: Graph, num_items: int, min_items: int = 2, unit: bool = True) -> sp.csr_matrix:
    """[I, F] float32: an item's direct neighbours, weighted by idf; with `unit` each row of unit length (or empty).

    A neighbour of fewer than `min_items` items brings no two of them together and has no column; nor has one that all
    items share. Other items (a sequel) are neighbours like any other.
    """
    there = link_indicators(graph, num_items)
    columns, idf = link_terms(there, min_items)
    weighted = sp.csr_matrix(there[:, columns] @ sp.diags_array(idf), dtype=np.float32)
    if not unit:
        return weighted
    length = np.sqrt(np.asarray(weighted.multiply(weighted).sum(1)).reshape(-1))
    scale = np.divide(1.0, length, out=np.zeros_like(length), where=length > 0)
    return sp.csr_matrix(sp.diags_array(scale.astype(np.float32)) @ weighted, dtype=np.float32)


def link_indicators(graph: Graph, num_items: int) -> sp.csr_matrix:
    """[I, N] float32: 1 where an item is linked to an entity, by however many relations."""
    links = neighbours(graph, num_items)
    item = np.repeat(np.arange(num_items), np.diff(links.indptr))
    there = sp.csr_matrix((np.ones(len(item), np.float32), (item, links.entity)), shape=(num_items, graph.num_entities))
    there.data[:] = 1.0  # an entity that is both writer and director counts once
    return there


def link_terms(there: sp.csr_matrix, min_items: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """(entities [F] that bring items together, their idf [F] float32) of what `link_indicators` gives."""
    num_items, num_entities = there.shape
    count = np.bincount(there.indices, minlength=num_entities)
    columns = np.flatnonzero((count >= min_items) & (count < num_items))
    return columns, np.log(num_items / count[columns]).astype(np.float32)


def link_agreement(graph: Graph, relations: Sequence[int], rounds: int = 50) -> float:
    """How far the graph agrees with what is known of the items otherwise, in standard deviations of a permuted one.

    `relations` are those that come from a table of the items (genre, year); the others came with links to entities. Two
    items that share a rare neighbour by the latter should share the former more often than items drawn at random:
    the statistic is the sum over pairs of items of both similarities, its null the same with the items' links shuffled.
    Real links reach tens; under 5 the links point at the wrong entities. NaN where there is too little to say.
    """
    known = np.isin(graph.triples[:, 1], relations)
    items = graph.num_items
    own = graph_features(dataclasses.replace(graph, triples=graph.triples[known], part=graph.part[known]), items)
    linked = graph_features(dataclasses.replace(graph, triples=graph.triples[~known], part=graph.part[~known]), items)
    rows = np.flatnonzero((np.diff(own.indptr) > 0) & (np.diff(linked.indptr) > 0))
    if len(rows) < 20:
        return float("nan")
    own, linked = own[rows], linked[rows].T.tocsr()
    rng = np.random.default_rng(0)

    def shared(order: np.ndarray) -> float:
        return float(sp.linalg.norm(linked @ own[order]) ** 2)

    null = [shared(rng.permutation(len(rows))) for _ in range(rounds)]
    return (shared(np.arange(len(rows))) - float(np.mean(null))) / max(float(np.std(null)), 1e-12)


def describe_unnamed(graph: Graph) -> str:
    """One line on the entities without a name, "" where all have one."""
    unnamed = sum(not name for name in graph.entity_names)
    if not unnamed:
        return ""
    return (f"graph: {unnamed:,} of {graph.num_entities:,} entities have no name: they enter the encoder by their "
            "vectors alone, and reasons name them by their items")


def phrase(graph: Graph, links: Neighbours, relation: int, entity: int, *, without: int = -1,
           prefer: Sequence[int] = ()) -> str:
    """Words for the edge (relation, entity) of the item `without`; an unnamed entity is named by its other items.

    "director: Ridley Scott" where it has a name, else "same director as Alien and Aliens", and "" where no other item
    shares it: then it is no reason for anything. `links` are the neighbours of all entities
    (`neighbours(graph, graph.num_entities)`); items in `prefer` (a user's history) are named first.
    """
    role = graph.relation_names[relation % graph.num_relations]
    backwards = relation >= graph.num_relations
    name = short_title(graph.entity_names[entity])
    if name:
        return f"{role} of {name}" if backwards else f"{role}: {name}"
    shared = _items_by(graph, links, entity, relation, without, prefer)
    if not shared:
        return ""
    others = _listed(graph, shared)
    return f'linked by "{role}" like {others}' if backwards else f"same {role} as {others}"


def name_by_items(graph: Graph, links: Neighbours, entity: int) -> str:
    """A name for any entity: its own, else "director of Alien and Aliens" by its most frequent role, else its id."""
    if graph.entity_names[entity]:
        return graph.entity_names[entity]
    relation, other = links.of(entity)
    relation = relation[other < graph.num_items]
    if not len(relation):
        return graph.entity_ids[entity]
    seen, count = np.unique(relation, return_counts=True)
    role = int(seen[count.argmax()])
    shared = _items_by(graph, links, entity, _turned(graph, role), -1, ())
    return f"{graph.relation_names[role % graph.num_relations]} of {_listed(graph, shared)}"


def short_title(title: str) -> str:
    """A title as people say it, without the catalogue's year: "Birdcage, The (1996)" -> "The Birdcage"."""
    bare = re.sub(r"\s*\(\d{4}\)$", "", title) or title
    turned = re.fullmatch(r"(.+), (The|An?|L[ae]s?|Il|Der|Die|Das|El|Los)", bare)
    return f"{turned[2]} {turned[1]}" if turned else bare


def _turned(graph: Graph, relation: int) -> int:
    """The same edge seen from its other end."""
    return (relation + graph.num_relations) % (2 * graph.num_relations)


def _items_by(graph: Graph, links: Neighbours, entity: int, relation: int, without: int,
              prefer: Sequence[int]) -> list[int]:
    """Items that the relation links to the entity, preferred ones first, then by item row."""
    relations, others = links.of(entity)
    items = others[(relations == _turned(graph, relation)) & (others < graph.num_items) & (others != without)].tolist()
    preferred = set(prefer)
    return sorted(items, key=lambda item: item not in preferred)


def _listed(graph: Graph, items: Sequence[int]) -> str:
    """At most two items by their titles, joined by "and"."""
    return " and ".join(short_title(graph.entity_names[i] or graph.entity_ids[i]) for i in items[:2])
