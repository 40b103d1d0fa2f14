"""A graph that new items join, or that items leave: its entities in another order, with their triples."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from kgrec_jax.data.dataset import Graph
from kgrec_jax.data.graph import Neighbours, neighbours
from kgrec_jax.errors import KgrecError


@dataclasses.dataclass(frozen=True)
class Joined:
    """A graph after a change of its items, and how its rows came from those before."""

    graph: Graph
    order: np.ndarray  # [N'] the row that each entity had, -1 for one that was not there
    place: np.ndarray  # [N] the row that each entity has now, -1 for one that left
    unknown_entities: tuple[str, ...] = ()  # of the new triples, each once: those left out of the graph
    unknown_relations: tuple[str, ...] = ()
    left_out: int = 0  # triples with one of these
    about_others: int = 0  # triples without a new item, which are left out too

    def of_items(self, first: int) -> Neighbours:
        """The neighbours of the items from row `first` on, in rows that begin with 0."""
        graph, last = self.graph, self.graph.num_items
        own = _about(graph, first)
        held = neighbours(dataclasses.replace(graph, triples=graph.triples[own], part=graph.part[own]), last)
        start = held.indptr[first]
        return Neighbours(held.indptr[first:] - start, held.relation[start:], held.entity[start:])


def reordered(graph: Graph, order: np.ndarray, num_items: int) -> Joined:
    """The graph with its entities in the order [N'] of rows (-1: a new one, without id or name as yet).

    Triples of entities that are in it no longer leave with them.
    """
    place = np.full(graph.num_entities, -1, np.int64)
    place[order[order >= 0]] = np.flatnonzero(order >= 0)
    head, tail = place[graph.triples[:, 0]], place[graph.triples[:, 2]]
    kept = (head >= 0) & (tail >= 0)
    triples = np.stack([head, graph.triples[:, 1], tail], 1)[kept].astype(np.int32)

    def taken(values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(values[row] if row >= 0 else "" for row in order.tolist()) if values else ()

    out = dataclasses.replace(graph, entity_ids=taken(graph.entity_ids), entity_names=taken(graph.entity_names),
                              entity_texts=taken(graph.entity_texts), triples=triples, num_items=num_items,
                              part=graph.part[kept])
    return Joined(out, order, place)


def join(graph: Graph, new: Graph, turned: Mapping[str, str]) -> Joined:
    """`graph` with the items of `new` behind its own, and the triples of `new` that are about them.

    A new item may be an entity that the graph knows already: it keeps its triples. Entities and relations that the
    graph does not know stay out of it, for nothing was learned of them, and are told. `turned`: relations that were
    merged into the reverse of others. Raises KgrecError for an entity that is another item's.
    """
    first, count = graph.num_items, new.num_items
    rows = {entity: row for row, entity in enumerate(graph.entity_ids)}
    before = np.array([rows.get(entity, -1) for entity in new.entity_ids[:count]], np.int64)
    taken = np.flatnonzero((before >= 0) & (before < first))
    if len(taken):
        raise KgrecError(f"entity_id: found {new.entity_ids[taken[0]]!r}, which is the entity of an item that is there "
                         f"already ({graph.entity_names[before[taken[0]]]}), expected one of its own for each item")
    others = np.setdiff1d(np.arange(first, graph.num_entities), before)
    joined = reordered(graph, np.concatenate([np.arange(first), before, others]), first + count)
    ids, names = list(joined.graph.entity_ids), list(joined.graph.entity_names)
    for n in range(count):
        ids[first + n] = new.entity_ids[n]
        names[first + n] = new.entity_names[n] or names[first + n]
    place = np.array([first + n if n < count else joined.place[rows[entity]] if entity in rows else -1
                      for n, entity in enumerate(new.entity_ids)], np.int64)
    relations = {relation: row for row, relation in enumerate(graph.relation_ids)}
    kinds = np.array([relations.get(turned.get(r, r), -1) for r in new.relation_ids], np.int64)
    reverse = np.array([r in turned for r in new.relation_ids], bool)
    triples = new.triples.astype(np.int64)
    ends = place[triples[:, [0, 2]]].reshape(-1, 2)  # [T, 2]
    kind = kinds[triples[:, 1]]
    flip = reverse[triples[:, 1]]
    ends[flip] = ends[flip][:, ::-1]
    about = (triples[:, [0, 2]] < count).any(1)
    known = (ends >= 0).all(1) & (kind >= 0)
    block = np.stack([ends[:, 0], kind, ends[:, 1]], 1)[about & known].astype(np.int32)
    own = _about(joined.graph, first) & (joined.graph.part == 0)  # of entities that the graph knew
    block = np.unique(np.concatenate([block, joined.graph.triples[own]]), axis=0)
    strange = triples[about & ~known]
    unknown = np.unique(strange[:, [0, 2]])
    grown = dataclasses.replace(
        joined.graph, entity_ids=tuple(ids), entity_names=tuple(names),
        triples=np.concatenate([joined.graph.triples[~own], block]),
        part=np.concatenate([joined.graph.part[~own], np.zeros(len(block), np.int8)]))
    return dataclasses.replace(
        joined, graph=grown,
        unknown_entities=tuple(new.entity_ids[e] for e in unknown if place[e] < 0),
        unknown_relations=tuple(new.relation_ids[r] for r in np.unique(strange[:, 1]) if kinds[r] < 0),
        left_out=int((about & ~known).sum()), about_others=int((~about).sum()))


def _about(graph: Graph, first: int) -> np.ndarray:
    """[T] bool: triples of the items from row `first` on."""
    ends = graph.triples[:, [0, 2]]
    return ((ends >= first) & (ends < graph.num_items)).any(1)
