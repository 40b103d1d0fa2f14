"""The graph of RecBole's atomic files: the triples of .kg, the items joined to them by .link, and genres and years.

The joining is checked before it is believed. A .link file may carry the item ids of another release of the data set
(that of MovieLens-100K in RecBole does); every fact that it states of an item is then a fact about another item.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from kgrec_jax.data import names
from kgrec_jax.data.dataset import Graph
from kgrec_jax.data.graph import link_agreement
from kgrec_jax.data.importers.atomic import Item, find_atomic, read_atomic
from kgrec_jax.errors import KgrecError

Links = Literal["auto", "keep", "drop"]
Triple = tuple[str, str, str]
TRUSTED = 5.0  # standard deviations of agreement between links and item table: four other data sets have 19 to 80

# Freebase names a relation domain.type.property: the last part alone says nothing of a role (film.director.film).
FREEBASE_ROLES = {
    "film.actor.film": "acted in",
    "film.cinematographer.film": "shot",
    "film.content_rating.film": "rating of",
    "film.director.film": "directed",
    "film.film.cinematography": "cinematographer",
    "film.film.directed_by": "director",
    "film.film.genre": "film genre",
    "film.film.produced_by": "producer",
    "film.film.production_companies": "production company",
    "film.film.rating": "content rating",
    "film.film.subjects": "subject",
    "film.film.written_by": "writer",
    "film.film_subject.films": "subject of",
    "film.producer.film": "produced",
    "film.production_company.films": "made",
    "film.writer.film": "wrote",
}


def read_graph(source: Path, items: list[Item], left: list[Item], links: Links,
               notes: list[str]) -> tuple[dict[str, str], dict[str, dict[str, Sequence[str]]]]:
    """(entity of each item, tables of the graph): the triples of the .kg file, then genres and years as named entities.

    `links` "keep" joins the items to the entities that the .link file gives them; "drop" does not; "auto" does unless
    the links contradict the item table (`link_agreement`). An item that is not joined is an entity of its own, with its
    genres and year; the .kg file's triples are in the graph either way. `left` are items that are no candidates.
    """
    link_file = _links(source)
    facts = list(dict.fromkeys(_kg_triples(source)))
    foreign = {entity for head, _, tail in facts for entity in (head, tail)}
    joined = link_file if links != "drop" else {}
    linked = _item_entities(items, joined, foreign if link_file else set())
    own = _item_facts(items, linked)
    if joined and facts and own:
        score = _agreement(list(linked.values()), facts, own)
        if score < TRUSTED:
            if links == "auto":
                joined, linked = {}, _item_entities(items, {}, foreign)
                own = _item_facts(items, linked)
            notes.append(_warning(score, links, len(facts)))
    if joined and items:
        notes.append(_joined(items, joined, linked))
    elif links == "drop" and link_file:
        notes.append(f"the .link file is not used: the {len(facts):,} triples of the .kg file touch no item")
    if link_file and items and not joined and not own:
        notes.append("no triple names an item, so the graph is left out")
        return linked, {}
    titles = {joined[i.id]: i.title for i in left if i.id in joined}
    taken = set(linked.values())
    named = {e: titles.get(e, "") for h, _, t in facts for e in (h, t) if e not in taken}
    named |= {tail: tail.split("/", 1)[1] for _, _, tail in own}
    relations = {r: relation_name(r) for _, r, _ in facts} | {r: names.relation_name(r) for _, r, _ in own}
    triples = list(dict.fromkeys([*facts, *own]))
    if not triples:
        return linked, {}
    unnamed = sum(not name for name in named.values())
    notes.append(f"{len(triples):,} triples, {len(relations)} relations; {len(named) - unnamed:,} entities beside the "
                 f"items have a name, {unnamed:,} have none")
    head, relation, tail = zip(*triples)
    return linked, {"triples": {"head_id": head, "relation": relation, "tail_id": tail},
                    "relations": {"relation": list(relations), "name": list(relations.values())},
                    "entities": {"entity_id": list(named), "name": list(named.values())}}


def _item_entities(items: list[Item], links: dict[str, str], foreign: set[str]) -> dict[str, str]:
    """The entity of each item, all different: the linked one, else its own id, marked where `foreign` has it too.

    Of two items linked to one entity the second stays an entity of its own: each item has its row of the entity table.
    """
    linked: dict[str, str] = {}
    taken: set[str] = set()
    for i in items:
        own = f"item/{i.id}" if i.id in foreign else i.id
        entity = links.get(i.id, own)
        linked[i.id] = own if entity in taken else entity
        taken.add(linked[i.id])
    return linked


def _item_facts(items: list[Item], linked: dict[str, str]) -> list[Triple]:
    """What the item table says of the items: genres, then years."""
    facts = [(linked[i.id], "genre", f"genre/{genre}") for i in items for genre in i.genres]
    return facts + [(linked[i.id], "release_year", f"release_year/{i.year}") for i in items if i.year]


def _agreement(items: list[str], facts: list[Triple], own: list[Triple]) -> float:
    """`link_agreement` of the triples `facts`, which reach the items by the links, with the items' own."""
    row = {entity: k for k, entity in enumerate(items)}
    column: dict[str, int] = {}
    coded = np.array([(row.setdefault(h, len(row)), column.setdefault(r, len(column)), row.setdefault(t, len(row)))
                      for h, r, t in [*own, *facts]], np.int32)
    blank = ("",) * len(row)
    part = np.zeros(len(coded), np.int8)
    graph = Graph(tuple(row), blank, blank, tuple(column), tuple(column), coded, len(items), part)
    return link_agreement(graph, sorted({column[r] for _, r, _ in own}))


def _warning(score: float, links: Links, num_facts: int) -> str:
    found = ("warning: the .link file contradicts the item table: items that share a linked neighbour have genres and "
             f"years no more alike than by chance ({score:.1f} standard deviations; true links reach tens). Its ids "
             "may be those of another release. ")
    if links == "keep":
        return found + "Items are linked as it says all the same: directors or sequels may be those of other items"
    return found + (f"Items are therefore not joined to it: they keep genres and years, and the {num_facts:,} triples "
                    "of the .kg file stay in the graph without touching an item, so that no reason rests on them; "
                    "links = keep joins them as the file says")


def _joined(items: list[Item], links: dict[str, str], linked: dict[str, str]) -> str:
    shared = sum(i.id in links and links[i.id] != linked[i.id] for i in items)
    return (f"{sum(i.id in links for i in items) - shared:,} of {len(items):,} items are linked to the graph"
            + (f"; {shared:,} share their entity with an earlier item and stand alone" if shared else ""))


def _links(source: Path) -> dict[str, str]:
    """Item -> entity of the .link file."""
    path = find_atomic(source, ".link")
    if not path:
        return {}
    file = read_atomic(path)
    if len(file.columns) < 2:
        raise KgrecError(f"{path}:1: found the column {', '.join(file.columns)}, expected item_id and entity_id")
    item, entity = list(file.columns.values())[:2]
    return dict(zip(item, entity))


def _kg_triples(source: Path) -> Iterator[tuple[str, str, str]]:
    path = find_atomic(source, ".kg")
    if not path:
        return iter(())
    file = read_atomic(path, log=True)
    wanted = [file.column(f"{part}_id", part) for part in ("head", "relation", "tail")]
    if not all(wanted):
        raise KgrecError(f"{path}:1: found the columns {', '.join(file.columns)}, expected head_id relation_id tail_id")
    return zip(*(file.columns[c].strings() for c in wanted))


def relation_name(relation: str) -> str:
    """Words for a relation: its role where Freebase's identifier does not say it, else the identifier's last part."""
    return FREEBASE_ROLES.get(relation) or names.relation_name(relation.rsplit(".", 1)[-1] or relation)
