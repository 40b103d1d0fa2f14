"""RecBole's atomic files (.inter .item .user .kg .link) into a dataset folder, with a graph that people can read:
genres and years become named entities in it."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from kgrec_jax.data import names
from kgrec_jax.data.dataset import Graph
from kgrec_jax.data.graph import link_agreement
from kgrec_jax.data.importers.atomic import Atomic, read_atomic
from kgrec_jax.data.tables import Coded, read_table, write_tsv
from kgrec_jax.errors import KgrecError

TRUSTED = 5.0  # standard deviations of agreement between links and item table: four other data sets have 19 to 80
UNKNOWN = {"", "unknown", "unkonwn", "nan", "none"}  # the second as MovieLens-100K has it in RecBole

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


Columns = Mapping[str, Coded | Sequence[str]]


def import_recbole(source: Path, out: Path, split: Path | None = None) -> list[str]:
    """Write the dataset folder `out` from the atomic files in `source`; returns lines that say what was done.

    `split` is a folder with train.tsv, test.tsv and perhaps valid.tsv by the same ids: it replaces the .inter file, and
    the items are then those that it names (RecBole ranks no others). Without it NAME.{train,valid,test}.inter are a
    fixed split, and NAME.inter is to be split. `out` must not exist or be empty; it appears complete or not at all.
    """
    source, out = Path(source), Path(out)
    if not source.is_dir():
        raise KgrecError(f"{source}: found no folder, expected one with RecBole's files (.inter .item .kg .link)")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise KgrecError(f"{out}: found a file or a folder that is not empty, expected a new one; choose another OUT")
    notes: list[str] = []
    tables: dict[str, Columns] = _split_folder(Path(split)) if split else _inter_parts(source, notes)
    used = {value for part in tables.values() for value in part["item_id"].values}
    items, left = _items(source, used, restrict=split is not None, notes=notes)
    linked, graph = _graph(source, items, left, notes)
    if items:
        tables["items"] = _item_columns(items, linked)
    tables.update(graph)
    users = _find(source, ".user")
    if users:
        file = read_atomic(users)
        user = file.column("user_id", "user")
        tables["users"] = {("user_id" if c == user else c): values for c, values in file.columns.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        folder = Path(scratch) / "folder"
        folder.mkdir()
        for name, columns in tables.items():
            write_tsv(folder / f"{name}.tsv", columns)
        if out.exists():
            out.rmdir()
        folder.rename(out)
    return notes


@dataclasses.dataclass(frozen=True)
class Item:
    """A row of the .item file, its columns by what they mean."""

    id: str
    title: str
    year: str
    genres: tuple[str, ...]
    extra: dict[str, str]


def _find(source: Path, suffix: str) -> Path | None:
    found = sorted(p for p in source.iterdir() if p.name.endswith(suffix) and p.name.count(".") == 1)
    if len(found) > 1:
        raise KgrecError(f"{source}: found {', '.join(p.name for p in found)}, expected one {suffix} file")
    return found[0] if found else None


def _inter_parts(source: Path, notes: list[str]) -> dict[str, Columns]:
    fixed = {n: sorted(source.glob(f"*.{n}.inter")) for n in ("train", "valid", "test")}
    if fixed["train"] and fixed["test"]:
        return {n: _interactions(read_atomic(files[0], log=True), notes) for n, files in fixed.items() if files}
    inter = _find(source, ".inter")
    if not inter:
        raise KgrecError(f"{source}: found no .inter file, expected NAME.inter with user, item [rating] [timestamp]")
    return {"interactions": _interactions(read_atomic(inter, log=True), notes)}


def _interactions(file: Atomic, notes: list[str]) -> Columns:
    """user_id item_id [rating] [timestamp] of an .inter file, whatever its columns are called."""
    user = file.column("user_id", "user", kind="token")
    tokens = [c for c, kind in file.types.items() if kind == "token" and c != user]
    item = file.column("item_id", "item", kind="token") or (tokens + [""])[0]
    if not user or not item:
        raise KgrecError(f"{file.path}:1: found the columns {', '.join(file.columns)}, expected a user and an item "
                         "column of type token")
    out = {"user_id": file.columns[user], "item_id": file.columns[item]}
    rating = file.column("rating", kind="float")
    if rating:
        out["rating"] = file.columns[rating]
    timestamp = file.column("timestamp", kind="float")
    if timestamp:
        out["timestamp"] = [_whole(v, file.path, n) for n, v in enumerate(file.columns[timestamp], start=2)]
    ignored = sorted(set(file.columns) - {user, item, rating, timestamp})
    if ignored:
        notes.append(f"{file.path.name}: columns not used: {', '.join(ignored)}")
    return out


def _whole(value: str, path: Path, line: int) -> str:
    """RecBole types a timestamp as float (8.81e8); ours are whole numbers."""
    try:
        return value if value.isdecimal() else str(int(float(value)))
    except (ValueError, OverflowError):
        raise KgrecError(f"{path}:{line}: found the timestamp {value!r}, expected a number of seconds") from None


def _split_folder(split: Path) -> dict[str, Columns]:
    paths = {name: split / f"{name}.tsv" for name in ("train", "valid", "test")}
    if not paths["valid"].is_file():
        del paths["valid"]
    ids, optional = {"user_id": "id", "item_id": "id"}, {"rating": "text", "timestamp": "text"}
    return {name: read_table(path, ids, optional).columns for name, path in paths.items()}


def _items(source: Path, used: set[str], *, restrict: bool, notes: list[str]) -> tuple[list[Item], list[Item]]:
    """(items, items left out) of the .item file; every item that interactions name must be one of its rows."""
    path = _find(source, ".item")
    if not path:
        return [], []
    file = read_atomic(path)
    ids = "item_id" if "item_id" in file.columns else next(iter(file.columns))
    title = file.column("title", "name")
    year = file.column("release_year", "year")
    genres = file.column("class", "genre", "categor", kind="token_seq")
    rest = [c for c, kind in file.types.items() if c not in (ids, title, year, genres) and kind != "float_seq"]
    found: dict[str, Item] = {}
    for row, values in enumerate(zip(*file.columns.values()), start=2):
        item = _item(dict(zip(file.columns, values)), ids, title, year, genres, rest)
        if item.id in found:
            raise KgrecError(f"{path}:{row}: found the item {item.id!r} a second time, expected one row an item; "
                             "remove one")
        found[item.id] = item
    missing = sorted(used - found.keys())
    if missing:
        raise KgrecError(f"{path}: found no row for the item {missing[0]!r} ({len(missing):,} such items), which has "
                         "interactions; expected one row an item; add it")
    left = [i for i in found.values() if restrict and i.id not in used]
    if left:
        notes.append(f"{len(left):,} items of {path.name} that the split does not name are left out")
    return [i for i in found.values() if not restrict or i.id in used], left


def _item(value: dict[str, str], ids: str, title: str, year: str, genres: str, rest: Sequence[str]) -> Item:
    name = value[title].strip() if title else ""
    written = re.search(r"\((\d{4})\)$", name)
    when = value[year].strip() if year else ""
    when = when if re.fullmatch(r"\d{4}", when) else written[1] if written else ""
    if when and name and not written:
        name = f"{name} ({when})"
    kinds = tuple(dict.fromkeys(g for g in value[genres].split() if g.lower() not in UNKNOWN)) if genres else ()
    return Item(value[ids], name or value[ids], when, kinds, {c: value[c].strip() for c in rest})


def _item_columns(items: list[Item], linked: dict[str, str]) -> Columns:
    columns = {"item_id": [i.id for i in items], "entity_id": [linked[i.id] for i in items],
               "title": [i.title for i in items], "genres": [", ".join(i.genres) for i in items]}
    columns |= {extra: [i.extra[extra] for i in items] for extra in items[0].extra}
    return {name: values for name, values in columns.items() if any(values)}


def _graph(source: Path, items: list[Item], left: list[Item],
           notes: list[str]) -> tuple[dict[str, str], dict[str, Columns]]:
    """(entity of each item, tables of the graph): the triples of the .kg file, then genres and years as named entities.

    Of two items linked to one entity the second stays an entity of its own: each item has its row of the entity table.
    """
    links = _links(source)
    linked: dict[str, str] = {}
    taken: set[str] = set()
    for i in items:
        entity = links.get(i.id, i.id)
        linked[i.id] = i.id if entity in taken else entity
        taken.add(linked[i.id])
    if links and items:
        shared = sum(links.get(i.id, i.id) != linked[i.id] for i in items)
        notes.append(f"{sum(i.id in links for i in items) - shared:,} of {len(items):,} items are linked to the graph"
                     + (f"; {shared:,} share their entity with an earlier item and stand alone" if shared else ""))
    triples = dict.fromkeys(_kg_triples(source))
    titles = {links[i.id]: i.title for i in left if i.id in links}
    named = {e: titles.get(e, "") for h, _, t in triples for e in (h, t) if e not in taken}
    relations = {r: relation_name(r) for _, r, _ in triples}
    for relation, values in (("genre", [i.genres for i in items]), ("release_year", [(i.year,) for i in items])):
        for i, found in zip(items, values):
            for value in filter(None, found):
                entity = f"{relation}/{value}"
                triples[linked[i.id], relation, entity] = None
                named[entity] = value
                relations[relation] = names.relation_name(relation)
    if not triples:
        return linked, {}
    unnamed = sum(not name for name in named.values())
    notes.append(f"{len(triples):,} triples, {len(relations)} relations; {len(named) - unnamed:,} entities beside the "
                 f"items have a name, {unnamed:,} have none")
    if links:
        notes += _agreement(list(linked.values()), list(named), list(relations), list(triples))
    head, relation, tail = zip(*triples)
    return linked, {"triples": {"head_id": head, "relation": relation, "tail_id": tail},
                    "relations": {"relation": list(relations), "name": list(relations.values())},
                    "entities": {"entity_id": list(named), "name": list(named.values())}}


def _agreement(items: list[str], others: list[str], relations: list[str],
               triples: list[tuple[str, str, str]]) -> list[str]:
    """A warning where the links contradict the item table: they may carry the ids of another release of the data."""
    row = {entity: k for k, entity in enumerate((*items, *others))}
    column = {relation: k for k, relation in enumerate(relations)}
    coded = np.array([(row[h], column[r], row[t]) for h, r, t in triples], np.int32)
    blank = ("",) * len(row)
    graph = Graph(tuple(row), blank, blank, tuple(relations), tuple(relations), coded, len(items),
                  np.zeros(len(coded), np.int8))
    score = link_agreement(graph, [column[r] for r in ("genre", "release_year") if r in column])
    if not score < TRUSTED:
        return []
    return [f"warning: the .link file contradicts the item table: items that share a linked neighbour have genres and "
            f"years no more alike than by chance ({score:.1f} standard deviations; true links reach tens). Its ids may be "
            "those of another release, and directors or sequels those of other items"]


def _links(source: Path) -> dict[str, str]:
    """Item -> entity of the .link file."""
    path = _find(source, ".link")
    if not path:
        return {}
    file = read_atomic(path)
    if len(file.columns) < 2:
        raise KgrecError(f"{path}:1: found the column {', '.join(file.columns)}, expected item_id and entity_id")
    item, entity = list(file.columns.values())[:2]
    return dict(zip(item, entity))


def _kg_triples(source: Path) -> Iterator[tuple[str, str, str]]:
    path = _find(source, ".kg")
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
