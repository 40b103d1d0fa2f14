"""RecBole's atomic files (.inter .item .user .kg .link) into a dataset folder, with a graph that people can read:
genres and years become named entities in it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from kgrec_jax.data.importers import write_new_folder
from kgrec_jax.data.importers.atomic import Atomic, Item, find_atomic, read_atomic
from kgrec_jax.data.importers.recbole_graph import Links, read_graph
from kgrec_jax.data.tables import Coded, read_table
from kgrec_jax.errors import KgrecError

UNKNOWN = {"", "unknown", "unkonwn", "nan", "none"}  # the second as MovieLens-100K has it in RecBole

Columns = Mapping[str, Coded | Sequence[str]]


def import_recbole(source: Path, out: Path, split: Path | None = None, links: Links = "auto") -> list[str]:
    """Write the dataset folder `out` from the atomic files in `source`; returns lines that say what was done.

    `split` is a folder with train.tsv, test.tsv and perhaps valid.tsv by the same ids: it replaces the .inter file, and
    the items are then those that it names (RecBole ranks no others). Without it NAME.{train,valid,test}.inter are a
    fixed split, and NAME.inter is to be split. `links`: whether items are joined to the entities of the .link file;
    auto does so unless the item table contradicts it. `out` must not exist or be empty; it appears complete or not at
    all.
    """
    source, out = Path(source), Path(out)
    if not source.is_dir():
        raise KgrecError(f"{source}: found no folder, expected one with RecBole's files (.inter .item .kg .link)")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise KgrecError(f"{out}: found a file or a folder that is not empty, expected a new one; choose another OUT")
    if links not in get_args(Links):
        raise KgrecError(f"links: found {links!r}, expected one of {', '.join(get_args(Links))}")
    notes: list[str] = []
    tables: dict[str, Columns] = _split_folder(Path(split)) if split else _inter_parts(source, notes)
    used = {value for part in tables.values() for value in part["item_id"].values}
    items, left = _items(source, used, restrict=split is not None, notes=notes)
    linked, graph = read_graph(source, items, left, links, notes)
    if items:
        tables["items"] = _item_columns(items, linked)
    tables.update(graph)
    users = find_atomic(source, ".user")
    if users:
        file = read_atomic(users)
        user = file.column("user_id", "user")
        tables["users"] = {("user_id" if c == user else c): values for c, values in file.columns.items()}
    write_new_folder(out, tables)
    return notes


def _inter_parts(source: Path, notes: list[str]) -> dict[str, Columns]:
    fixed = {n: sorted(source.glob(f"*.{n}.inter")) for n in ("train", "valid", "test")}
    if fixed["train"] and fixed["test"]:
        return {n: _interactions(read_atomic(files[0], log=True), notes) for n, files in fixed.items() if files}
    inter = find_atomic(source, ".inter")
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
    path = find_atomic(source, ".item")
    if not path:
        # A .link file needs rows to stand in even where nothing else is known of the items.
        return [Item(i, i, "", (), {}) for i in sorted(used)] if find_atomic(source, ".link") else [], []
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
