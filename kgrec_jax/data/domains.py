"""Several data sets as one catalogue over one graph: equal ids of entities and relations are one row.

A domain keeps its users and its item rows; its items lie in one piece of the joined catalogue. What is joined is the
graph: an entity that several folders name by the same id is there once, whether it is an item in them or not, and so
are its edges. An id that is a bare whole number is a row of somebody's table and says nothing outside of its folder, so
it stays apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from kgrec_jax.data.dataset import Dataset, Graph
from kgrec_jax.data.graph import short_title

MIN_AGREEMENT = 0.5  # share of two domains' common items with the same name, below which their ids mean other things
_MIN_COMPARED = 5  # common items with names on both sides, from which that can be told


@dataclasses.dataclass(frozen=True)
class Union:
    """The items of all domains, one domain after another, and the graph that they share."""

    names: tuple[str, ...]  # [D] of the domains
    starts: tuple[int, ...]  # [D + 1]: the items of domain d are the rows starts[d] … starts[d + 1] - 1
    item_ids: tuple[str, ...]  # [I]
    item_names: tuple[str, ...]  # [I]
    item_texts: tuple[str, ...]  # [I]
    item_entity: np.ndarray  # [I] int32 entity of each item; items of several domains may have the same one
    graph: Graph  # of distinct entities, the items' first; training triples alone, each once
    media: Mapping[str, tuple[np.ndarray, np.ndarray]]  # name -> ([I, d] float32, present [I] bool)
    notes: tuple[str, ...]  # what was joined, in lines
    common: Mapping[str, int]  # how many items, entities and relations are in more than one domain

    @property
    def num_items(self) -> int:
        """I."""
        return len(self.item_ids)


def union(datasets: Mapping[str, Dataset]) -> Union:
    """The union of data sets, by the names of their domains."""
    names = tuple(datasets)
    apart, notes = _disagreeing(datasets)
    item_keys = [_keys(datasets[name].graph.entity_ids[:datasets[name].num_items], name, apart) for name in names]
    other_keys = [_keys(datasets[name].graph.entity_ids[datasets[name].num_items:], name, apart) for name in names]
    relation_keys = [_keys(datasets[name].graph.relation_ids, name, frozenset()) for name in names]
    row: dict[tuple[str, str], int] = {}
    for keys in (*item_keys, *other_keys):  # the items' entities first, as in every graph
        for key in keys:
            row.setdefault(key, len(row))
    relation: dict[tuple[str, str], int] = {}
    for keys in relation_keys:
        for key in keys:
            relation.setdefault(key, len(relation))
    places = [np.array([row[key] for key in (*items, *others)], np.int32)
              for items, others in zip(item_keys, other_keys, strict=True)]  # [N_d] of each domain's entities
    item_entity = np.concatenate([place[:len(keys)] for place, keys in zip(places, item_keys, strict=True)])
    relations = [np.array([relation[key] for key in keys], np.int32) for keys in relation_keys]
    graph = _graph(datasets, row, relation, places, relations, len(np.unique(item_entity)))
    common = {"items": _shared(item_keys), "relations": _shared(relation_keys),
              "entities": _shared([[*items, *others] for items, others in zip(item_keys, other_keys, strict=True)])}
    starts = np.cumsum([0, *(data.num_items for data in datasets.values())])
    notes += [f"domains: media {', '.join(data.raw_media)} of {name}: what its own run learns from the files is no "
              "part of the shared towers" for name, data in datasets.items() if data.raw_media]
    said = (f"domains: {len(row):,} entities, {common['entities']:,} of them in more than one domain; "
            f"{len(relation):,} relations, {common['relations']:,} in more than one; {common['items']:,} items are "
            "items of more than one")
    joined = {field: tuple(value for data in datasets.values() for value in getattr(data, field))
              for field in ("item_ids", "item_names", "item_texts")}
    return Union(names, tuple(int(s) for s in starts), **joined, item_entity=item_entity, graph=graph,
                 media=_media(datasets, starts), notes=(*notes, said), common=common)


def _keys(ids: tuple[str, ...], domain: str, apart: frozenset[tuple[str, str]]) -> list[tuple[str, str]]:
    """What each id is known by: ("", id) where it means the same everywhere, else (domain, id)."""
    return [(domain, i) if i.isdecimal() or (domain, i) in apart else ("", i) for i in ids]


def _shared(keys: list[list[tuple[str, str]]]) -> int:
    """How many keys are in more than one list."""
    count: dict[tuple[str, str], int] = {}
    for one in keys:
        for key in set(one):
            count[key] = count.get(key, 0) + 1
    return sum(n > 1 for n in count.values())


def _disagreeing(datasets: Mapping[str, Dataset]) -> tuple[frozenset[tuple[str, str]], list[str]]:
    """(domain and id of items whose ids are those of other films in an earlier domain, what is to be said of them)."""
    apart: set[tuple[str, str]] = set()
    notes: list[str] = []
    seen: list[tuple[str, dict[str, str]]] = []
    for name, data in datasets.items():
        mine = {entity: title for entity, title in zip(data.graph.entity_ids, data.item_names) if
                not entity.isdecimal()}
        for other, titles in seen:
            both = [e for e in mine if e in titles]
            same = sum(_plain(mine[e]) == _plain(titles[e]) for e in both)
            if not both:
                continue
            wrong = len(both) >= _MIN_COMPARED and same < MIN_AGREEMENT * len(both)
            apart |= {(name, e) for e in both} if wrong else set()
            notes.append(f"domains: {len(both):,} items of {name} have the entity_id of an item of {other}, {same:,} "
                         "of them its name too" + (": the ids mean other things, these items stay apart" if wrong else
                                                   ""))
        seen.append((name, mine))
    return frozenset(apart), notes


def _plain(title: str) -> str:
    return short_title(title).casefold().strip()


def _graph(datasets: Mapping[str, Dataset], row: Mapping[tuple[str, str], int],
           relation: Mapping[tuple[str, str], int], places: list[np.ndarray], relations: list[np.ndarray],
           num_items: int) -> Graph:
    """The joined graph; a name or a text is that of the first domain that has one."""
    words = {field: [""] * len(row) for field in ("entity_names", "entity_texts")}
    named = [""] * len(relation)
    triples = []
    for data, place, rel in zip(datasets.values(), places, relations, strict=True):
        graph = data.graph
        for field, out in words.items():
            for at, word in zip(place, getattr(graph, field)):
                out[at] = out[at] or word
        for at, word in zip(rel, graph.relation_names):
            named[at] = named[at] or word
        rows = graph.triples[graph.part == 0]
        if len(rows):
            triples.append(np.stack([place[rows[:, 0]], rel[rows[:, 1]], place[rows[:, 2]]], axis=1))
    joined = np.unique(np.concatenate(triples), axis=0) if triples else np.zeros((0, 3), np.int32)
    ids = tuple(f"{domain}/{i}" if domain else i for domain, i in row)
    relation_ids = tuple(f"{domain}/{i}" if domain else i for domain, i in relation)
    return Graph(ids, tuple(words["entity_names"]), tuple(words["entity_texts"]), relation_ids, tuple(named),
                 joined.astype(np.int32), num_items, np.zeros(len(joined), np.int8))


def _media(datasets: Mapping[str, Dataset], starts: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Vectors of equal name and width are one block over all items; of another width, a block of its own."""
    widths: dict[str, set[int]] = {}
    for data in datasets.values():
        for name, (vectors, _) in data.media.items():
            widths.setdefault(name, set()).add(vectors.shape[1])
    out: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for start, data in zip(starts, datasets.values()):
        for name, (vectors, present) in data.media.items():
            width = vectors.shape[1]
            block = name if len(widths[name]) == 1 else f"{name}-{width}"
            if block not in out:
                out[block] = np.zeros((int(starts[-1]), width), np.float32), np.zeros(int(starts[-1]), bool)
            out[block][0][start:start + data.num_items] = vectors
            out[block][1][start:start + data.num_items] = present
    return out
