"""Reading the graph of a folder: triples, names and texts of entities, names of relations."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from kgrec_jax.data.dataset import Graph
from kgrec_jax.data.log import PARTS
from kgrec_jax.data.names import is_key, name_from_id, relation_name
from kgrec_jax.data.rdf import RdfGraph, read_rdf
from kgrec_jax.data.tables import Table, find_table, read_table
from kgrec_jax.data.texts import join_columns, separator
from kgrec_jax.errors import KgrecError

TRIPLE_COLUMNS = {"head_id": "id", "relation": "id", "tail_id": "id"}
PROVENANCE = {"source": "id", "confidence": "float"}  # may be absent; see data/provenance.py


def triple_files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Part -> file: {"train": triples} or the files of a fixed link-prediction split; empty without a graph."""
    single = find_table(folder, "triples")
    fixed = {part: path for part in PARTS if (path := find_table(folder, f"triples.{part}"))}
    if single and fixed:
        names = ", ".join(p.name for p in fixed.values())
        raise KgrecError(f"{folder}: found both {single.name} and {names}, expected one graph or one fixed split; move "
                         "one away")
    if fixed and "train" not in fixed:
        raise KgrecError(f"{folder}: found {', '.join(p.name for p in fixed.values())} alone, expected triples.train "
                         f"too; name a graph without a split triples.tsv")
    return {"train": single} if single else fixed


def read_graph(folder: pathlib.Path, item_entities: Sequence[str], item_names: Sequence[str],
               item_texts: Sequence[str], rdf: Sequence[pathlib.Path] = (),
               languages: Sequence[str] = ("en",)) -> tuple[Graph, list[str]]:
    """The graph and counted warnings.

    Entities: the items in their order, then entities.tsv's, then those of triples alone. `rdf` are files to be read
    instead of triples.tsv, for names and texts in `languages` where the tables have none.
    """
    notes: list[str] = []
    rows = {e: row for row, e in enumerate(item_entities)}
    num_items = len(rows)
    names, texts = list(item_names), list(item_texts)
    listed = _read_entities(folder, rows, names, texts, notes)
    relations: dict[str, int] = {}
    files = triple_files(folder)
    if files and rdf:
        raise KgrecError(f"{folder}: found both {next(iter(files.values())).name} and {rdf[0].name}, expected one "
                         "graph; move one away")
    tables = {part: read_table(path, TRIPLE_COLUMNS) for part, path in files.items()}
    triples, part = _read_triples(tables, rows, relations, notes)
    said: RdfGraph | None = None
    if rdf:
        own = dict(zip(item_entities, item_entities, strict=True))
        said = read_rdf(rdf, languages, own, min(2, os.cpu_count() or 1))
        triples, part = _take_rdf(said, rows, relations, num_items, notes)
    unlisted = list(rows)[len(names):]
    if unlisted and listed and not said:
        notes.append(f"entities: {len(unlisted):,} entities of the triples are not in the entity table (first: "
                     f"{unlisted[0]}); their names come from their ids")
    names += [name_from_id(e) for e in unlisted] if not said else [""] * len(unlisted)
    texts += [""] * len(unlisted)
    if said:
        _fill(said, list(rows), num_items, names, texts)
    if num_items and len(triples) and not (triples[:, [0, 2]] < num_items).any():
        where = rdf[0] if rdf else tables["train"].path
        head = said.entity_ids[0] if said else tables["train"]["head_id"].values[0]
        raise KgrecError(f"{where}: found {len(triples):,} triples and no item in any of them (such as head "
                         f"{head!r}), expected items by their entity_id (such as "
                         f"{item_entities[0]!r}); correct the column entity_id of the item table")
    for table in tables.values():
        ignored = [column for column in table.ignored if column not in PROVENANCE]
        if ignored:
            notes.append(f"{table.path.name}: columns not used: {', '.join(ignored)}")
    unnamed = sum(not name for name in names[num_items:])
    if unnamed:
        notes.append(f"entities: {unnamed:,} of {len(names) - num_items:,} have no name; each is known by its vector "
                     "alone")
    relation_names = tuple(_relation_names(folder, relations, said.names if said else {}, notes))
    graph = Graph(tuple(rows), tuple(names), tuple(texts), tuple(relations), relation_names, triples, num_items, part)
    return graph, notes


def _read_entities(folder: pathlib.Path, rows: dict[str, int], names: list[str], texts: list[str],
                   notes: list[str]) -> bool:
    """Append the entities of the entity table to `rows`, `names` and `texts`; whether there is such a table."""
    path = find_table(folder, "entities")
    if path is None:
        return False
    table = read_table(path, {"entity_id": "id", "name": "text"}, rest_as_text=True)
    check_unique(table, "entity_id")
    ids = table["entity_id"].strings()
    joined = join_columns({c: table[c] for c in table.columns if c not in ("entity_id", "name")}, len(ids))
    num_items = len(rows)
    for identifier, name, text in zip(ids, table["name"], joined, strict=True):
        if identifier in rows:  # an item: the item table speaks for it
            continue
        rows[identifier] = len(rows)
        names.append("" if is_key(identifier) and name == identifier else name.strip())
        texts.append(text)
    items = len(ids) - (len(rows) - num_items)
    if items:
        notes.append(f"{path.name}: {items:,} rows are items; their names and texts come from the item table")
    return True


def _read_triples(tables: dict[str, Table], rows: dict[str, int], relations: dict[str, int],
                  notes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """[T, 3] int32 distinct triples and [T] int8 part; `rows` and `relations` grow by what is new."""
    blocks, parts = [np.zeros((0, 3), np.int32)], [np.zeros(0, np.int8)]
    for part, table in tables.items():
        columns = []
        for name, known in (("head_id", rows), ("relation", relations), ("tail_id", rows)):
            codes = np.array([known.setdefault(v, len(known)) for v in table[name].values], np.int32)
            columns.append(codes[table[name].codes])
        block = np.stack(columns, 1)  # [T, 3]
        order, repeats = _sorted(block)
        first = np.sort(order[~repeats])
        if len(first) < len(block):
            notes.append(f"{table.path.name}: {len(block) - len(first):,} rows repeat a triple; each counts once")
        blocks.append(block[first])
        parts.append(np.full(len(first), PARTS.index(part), np.int8))
    triples, part = np.concatenate(blocks), np.concatenate(parts)
    _check_disjoint(tables, triples, part, list(rows), list(relations))
    return triples, part


def _sorted(triples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[T] an order that brings equal triples together, first row first; [T] whether each repeats the one before."""
    order = np.lexsort(triples.T)
    ordered = triples[order]
    repeats = np.zeros(len(order), bool)
    repeats[1:] = (ordered[1:] == ordered[:-1]).all(1)
    return order, repeats


def _check_disjoint(tables: dict[str, Table], triples: np.ndarray, part: np.ndarray, entities: list[str],
                    relations: list[str]) -> None:
    order, repeats = _sorted(triples)
    if not repeats.any():
        return
    head, relation, tail = triples[order[np.argmax(repeats)]]
    where = np.flatnonzero((triples == [head, relation, tail]).all(1))
    files = " and ".join(tables[PARTS[p]].path.name for p in part[where])
    raise KgrecError(f"{tables['train'].path.parent}: found the triple ({entities[head]}, {relations[relation]}, "
                     f"{entities[tail]}) in {files} ({int(repeats.sum()):,} such triples), expected each in one part; "
                     "remove it from one of them")


def _take_rdf(said: RdfGraph, rows: dict[str, int], relations: dict[str, int], num_items: int,
              notes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """As `_read_triples`, from RDF."""
    entity = np.array([rows.setdefault(e, len(rows)) for e in said.entity_ids], np.int32)
    relation = np.array([relations.setdefault(r, len(relations)) for r in said.relation_ids], np.int32)
    block = said.triples
    if len(block):
        block = np.stack([entity[block[:, 0]], relation[block[:, 1]], entity[block[:, 2]]], 1)
    order, repeats = _sorted(block)
    first = np.sort(order[~repeats])
    notes += said.notes
    if len(first) < len(block):
        notes.append(f"graph: {len(block) - len(first):,} statements repeat a triple; each counts once")
    seen = np.zeros(len(rows), bool)
    seen[entity] = True
    absent = np.flatnonzero(~seen[:num_items])
    if len(absent) and len(block):
        notes.append(f"graph: {len(absent):,} of {num_items:,} items are nowhere in it (first: "
                     f"{list(rows)[absent[0]]}); see the column entity_id of the item table")
    return block[first], np.zeros(len(first), np.int8)


def _fill(said: RdfGraph, entities: list[str], num_items: int, names: list[str], texts: list[str]) -> None:
    """Names and texts from RDF where the tables have none; an item whose text is its title gets the description."""
    for row, entity in enumerate(entities):
        title = names[row]
        names[row] = title or said.names.get(entity, "") or ("" if row < num_items else name_from_id(entity))
        text = said.texts.get(entity, "")
        if row >= num_items:
            texts[row] = texts[row] or text
        elif texts[row] in ("", title):  # an item's text begins with its name
            pieces = [piece for piece in (names[row], text) if piece]
            texts[row] = separator(pieces[0]).join(pieces) if pieces else ""


def _relation_names(folder: pathlib.Path, relations: dict[str, int], labels: Mapping[str, str],
                    notes: list[str]) -> list[str]:
    path = find_table(folder, "relations")
    given: dict[str, str] = dict(labels)
    if path is not None:
        table = read_table(path, {"relation": "id", "name": "text"})
        check_unique(table, "relation")
        given |= {r: name for r, name in zip(table["relation"].strings(), table["name"], strict=True) if name.strip()}
        missing = [r for r in relations if r not in given]
        if missing:
            notes.append(f"{path.name}: {len(missing):,} relations of the triples are not listed (first: "
                         f"{missing[0]}); their names come from their ids")
    return [given.get(r, "").strip() or relation_name(r) for r in relations]


def check_unique(table: Table, column: str) -> None:
    """An error naming both lines where an identifier stands twice."""
    codes = table[column].codes
    if len(table[column].values) == len(codes):
        return
    _, first = np.unique(codes, return_index=True)
    row = int(np.setdiff1d(np.arange(len(codes)), first)[0])
    earlier = int(np.argmax(codes == codes[row]))
    raise KgrecError(f"{table.where(row)}: found the {column} {table[column].values[codes[row]]!r} a second time "
                     f"(first: {table.where(earlier).rsplit('/', 1)[-1]}), expected each once; remove or rename one")
