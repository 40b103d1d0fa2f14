"""Columns of an item table as relations: genres, years and prices become entities that items share."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from kgrec_jax.data.buckets import number
from kgrec_jax.data.folder import read_folder
from kgrec_jax.data.graph_extend import Fact, check_new, extend_folder
from kgrec_jax.data.importers import columns as col
from kgrec_jax.data.importers.linking import Linker
from kgrec_jax.data.importers.surface import entity_key
from kgrec_jax.data.names import relation_name
from kgrec_jax.data.tables import SUFFIXES, Table, find_table, read_header, read_table
from kgrec_jax.data.triples import check_unique
from kgrec_jax.errors import KgrecError


@dataclasses.dataclass(frozen=True)
class TablesConfig:
    """Which table, and what is made of its columns."""

    items: Path  # a table with a row an item, or a dataset folder with items.tsv
    columns: tuple[str, ...] = ()  # COLUMN=CHOICE, where the column's own look is not to decide
    item: str = ""  # the column with the item's id; "": item_id, else id, else the first one that ends so
    only: bool = False  # leave out the columns that `columns` does not name
    link: bool = False  # a value that one entity of the folder's graph is called by, and no item, is that entity
    choice: col.ColumnConfig = col.ColumnConfig()


@dataclasses.dataclass(frozen=True)
class _Relation:
    """What one column gave."""

    facts: list[Fact]
    names: dict[str, str]  # entity -> name
    line: str


def tables_to_graph(cfg: TablesConfig, out: Path) -> list[str]:
    """Write the dataset folder `out` with a triple (item, column, value) for each value; returns what was done.

    Of a folder everything else is taken over and its graph is extended; of a single table `out` gets the items as they
    are and the graph. Each triple's source is `FILE:COLUMN`. Values that differ by case alone are one entity, called
    as most cells write it. Raises KgrecError for a table that cannot be read, choices that do not fit it, and where no
    column gives a relation.
    """
    check_new(out)
    base = cfg.items if cfg.items.is_dir() else None
    path = find_table(base, "items") if base else cfg.items
    if path is None:
        raise KgrecError(f"{base}: found no items.tsv, expected a dataset folder with items, or the table itself")
    if path.suffix not in SUFFIXES:
        raise KgrecError(f"{path}: found the suffix {path.suffix or 'none'}, expected .tsv, .csv or .parquet with a "
                         "header; convert it")
    table, item = _read(path, "item_id" if base else cfg.item)
    ids = table[item].strings()
    entities = [e or i for e, i in zip(table.columns.get("entity_id", [""] * len(ids)), ids, strict=True)]
    if cfg.link and base is None:
        raise KgrecError(f"--link: found a table alone ({path}), expected a dataset folder whose entities have names")
    known = _entities(base, entities) if cfg.link else {}
    found = _relations(cfg, table, item, entities, known)
    facts = [fact for relation in found.values() for fact in relation.facts]
    notes = [relation.line for relation in found.values()]
    if not facts:
        raise KgrecError(f"{path}: found no column that gives a relation ({'; '.join(notes)}), expected one; choose "
                         "with --columns COLUMN=category|list:SEPARATOR|buckets:N")
    named = {e: name for relation in found.values() for e, name in relation.names.items()}
    clash = next(iter(named.keys() & set(entities)), "")
    if clash:
        raise KgrecError(f"{path}: found the item {clash!r}, which is also the entity of a value, expected ids of "
                         "their own; leave the column out with --columns COLUMN=skip or rename the item")
    relations = {name: relation_name(name) for name, relation in found.items() if relation.facts}
    tables = None
    if base is None:
        rest = {c: table[c] for c in table.columns if c not in (item, "item_id")}
        tables = {"items": {"item_id": ids} | rest}
    done = extend_folder(base, out, facts, named, relations, tables)
    attached = len({fact.head for fact in facts})
    notes.append(f"{out}: {done.added:,} triples added, {len(named):,} entities of values, {len(relations):,} "
                 f"relations; {attached:,} of {len(ids):,} items have one")
    if done.known:
        notes.append(f"{done.known:,} triples stand in the graph of {base} already")
    return notes


def _read(path: Path, item: str) -> tuple[Table, str]:
    header = read_header(path)
    if item and item not in header:
        raise KgrecError(f"--item: found {item!r}, expected a column of {path}: {', '.join(header)}")
    ends = [c for c in header if c.lower().endswith("id") and c != "entity_id"]
    item = item or next((c for name in ("item_id", "id") for c in header if c.lower() == name), (ends or [""])[0])
    if not item:
        raise KgrecError(f"{path}:1: found the columns {', '.join(header)}, expected one with the item's id; name it "
                         "with --item COLUMN")
    table = read_table(path, {item: "id"}, rest_as_text=True)
    check_unique(table, item)
    return table, item


def _entities(base: Path, items: Sequence[str]) -> dict[str, str]:
    """Key of a name -> the only entity of the graph that has it and is no item."""
    linker, own = Linker(read_folder(base).graph, base), set(items)
    keys = {entity_key(name) for name in linker.graph.entity_names if name}
    found = {key: [e for e in linker.entities(key) if e not in own] for key in keys}
    return {key: ends[0] for key, ends in found.items() if len(ends) == 1}


def _relations(cfg: TablesConfig, table: Table, item: str, entities: Sequence[str],
               known: Mapping[str, str]) -> dict[str, _Relation]:
    chosen = dict(col.parse_choice(words) for words in cfg.columns)
    possible = [c for c in table.columns if c not in (item, "item_id", "entity_id")]
    for column in chosen:
        if column not in possible:
            raise KgrecError(f"--columns: found {column!r}, expected a column of {table.path}: {', '.join(possible)}")
    out = {}
    for column in possible:
        values = [col.clean(value) for value in table[column]]
        choice = chosen.get(column)
        if choice is None:
            choice = col.Choice("skip", reason="--columns does not name it") if cfg.only else \
                col.choose(column, values, cfg.choice)
        out[column] = _relation(table.path.name, column, choice, values, entities, known)
    return out


def _relation(file: str, column: str, choice: col.Choice, values: Sequence[str],
              entities: Sequence[str], known: Mapping[str, str]) -> _Relation:
    left, merged = 0, 0
    if choice.kind == "skip":
        return _Relation([], {}, f"{column}: 'skip', for {choice.reason}")
    if choice.kind == "buckets":
        numbers = np.array([number(value) if value else np.nan for value in values])
        if not np.isfinite(numbers).any():
            raise KgrecError(f"--columns: found buckets for {column}, whose values are no numbers (first: "
                             f"{next((v for v in values if v), 'none')!r}), expected category, list or skip")
        rows = [[name] if name else [] for name in col.bucket_names(numbers, choice)]
        left = sum(bool(value) and not row for value, row in zip(values, rows, strict=True))
    else:
        rows = [col.split(v, choice.separator) if choice.kind == "list" else [v] if v else [] for v in values]
    count = Counter(value for row in rows for value in row)
    spelling: dict[str, str] = {}
    for value, _ in count.most_common():
        merged += spelling.setdefault(value.casefold(), value) != value
    ids = {v: (known.get(entity_key(v)) if choice.kind != "buckets" else "") or f"{column}/{v}" for v in
           spelling.values()}
    facts = [Fact(entity, column, ids[value], f"{file}:{column}", 1.0)
             for entity, row in zip(entities, rows, strict=True)
             for value in dict.fromkeys(spelling[value.casefold()] for value in row)]
    names = {identifier: value for value, identifier in ids.items()}
    linked = sum(not identifier.startswith(f"{column}/") for identifier in ids.values())
    line = (f"{column}: {choice.words()!r}, for {choice.reason}: {len(facts):,} triples to {len(names):,} values, "
            f"{sum(not row for row in rows):,} items without")
    line += f"; {linked:,} of these are entities of the graph" if linked else ""
    line += f"; {left:,} cells are no numbers (not used)" if left else ""
    return _Relation(facts, names, line + (f"; {merged:,} differ by case alone (merged)" if merged else ""))
