"""Logs and item tables as most data sets are published (MovieLens, Kaggle; .csv, .tsv or .parquet with a header) into a
dataset folder. What a column means is guessed from its name; genres and release years become named entities."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from kgrec_jax.data.importers import write_new_folder
from kgrec_jax.data.log import PARTS
from kgrec_jax.data.tables import SUFFIXES, Coded, Table, find_table, read_header, read_table
from kgrec_jax.data.triples import check_unique
from kgrec_jax.errors import KgrecError


@dataclasses.dataclass(frozen=True)
class CsvColumns:
    """Names of columns in the source; "" guesses each from its name."""

    user: str = ""  # who
    item: str = ""  # touched what; in the item table too
    rating: str = ""  # how they liked it
    timestamp: str = ""  # when: seconds, or an ISO date
    title: str = ""  # name of an item


Columns = Mapping[str, Coded | Sequence[str] | np.ndarray]

# In lower case without blanks and underscores; earlier ones are preferred.
_NAMES = {
    "user": ("userid", "user", "uid", "username", "reviewerid", "customerid", "visitorid", "memberid", "accountid",
             "profileid"),
    "item": ("itemid", "item", "iid", "movieid", "movie", "filmid", "parentasin", "asin", "productid", "product",
             "bookid", "isbn", "trackid", "songid", "artistid", "albumid", "articleid", "newsid", "gameid", "appid",
             "videoid", "animeid", "recipeid", "businessid", "poiid", "venueid"),
    "rating": ("rating", "ratings", "score", "stars", "overall"),
    "timestamp": ("timestamp", "unixreviewtime", "time", "ts", "datetime", "date", "createdat", "ratedat", "eventtime"),
    "title": ("title", "name", "itemname", "itemtitle", "movietitle", "productname", "producttitle", "booktitle"),
}
_LOG_COLUMNS = ("user_id", "item_id", "rating", "timestamp")
_LOGS = ("interactions", "ratings", "log", "events", "reviews", "clicks")
_GENRES = ("genre", "genres", "category", "categories")
_UNKNOWN = ("", "unknown", "nan", "none", "null", r"\n", "(no genres listed)")


def import_csv(source: Path, out: Path, split: Path | None = None, columns: CsvColumns = CsvColumns(),
               items: Path | None = None) -> list[str]:
    """Write the dataset folder `out`; returns lines that say what was done.

    `source` is the log itself, or a folder whose log, item table and user table are told by their columns; `items`
    names the item table. `split` is a folder with train, test and perhaps valid by the same ids: it replaces the log.
    Rows are taken as they are: the reader of the folder counts a repeated pair once. `out` must not exist or be empty;
    it appears complete or not at all.
    """
    source, out = Path(source), Path(out)
    if not source.exists():
        raise KgrecError(f"{source}: found no such file or folder, expected a log in .csv, .tsv or .parquet; check the "
                         "path")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise KgrecError(f"{out}: found a file or a folder that is not empty, expected a new one; choose another OUT")
    notes: list[str] = []
    headers = {path: read_header(path) for path in _tables(source)}
    logs = _split_files(Path(split)) if split else _logs(source, headers, columns)
    read = {part: _read_log(path, columns, notes) for part, path in logs.items()}
    tables: dict[str, Columns] = {part: log for part, (_, log) in read.items()}
    item_path = Path(items) if items else _item_table(source, headers, columns)
    user_path = _user_table(source, headers, columns)
    if item_path:
        tables |= _item_tables(item_path, columns, read, notes)
    if user_path:
        tables["users"] = _users(user_path, columns)
    used = {*logs.values(), item_path, user_path}
    notes += [f"{path.name}: not read" for path in headers if path not in used]
    write_new_folder(out, tables)
    return notes


def _tables(source: Path) -> list[Path]:
    if source.is_dir():
        return sorted(p for p in source.iterdir() if p.suffix in SUFFIXES)
    if source.suffix not in SUFFIXES:
        raise KgrecError(f"{source}: found a file of the type {source.suffix or 'without suffix'}, expected .csv, .tsv "
                         f"or .parquet with a header; convert it")
    return [source]


def _find(kind: str, header: Sequence[str], columns: CsvColumns) -> str:
    """The column that is the `kind`, as named or guessed; "" for none."""
    named = getattr(columns, kind)
    if named:
        return named if named in header else ""
    plain = {re.sub(r"[\W_]+", "", column.lower()): column for column in reversed(header)}
    return next((plain[name] for name in _NAMES[kind] if name in plain), "")


def _find_item(header: Sequence[str], columns: CsvColumns) -> str:
    """The identifier in an item table, where a bare `id` is one too."""
    return _find("item", header, columns) or next((c for c in header if c.lower() == "id"), "")


def _split_files(split: Path) -> dict[str, Path]:
    found = {part: path for part in PARTS if (path := find_table(split, part))}
    if not {"train", "test"} <= set(found):
        raise KgrecError(f"{split}: found {', '.join(p.name for p in found.values()) or 'no table'}, expected "
                         f"train.tsv, test.tsv and perhaps valid.tsv")
    return found


def _logs(source: Path, headers: Mapping[Path, list[str]], columns: CsvColumns) -> dict[str, Path]:
    """Part of the dataset folder -> file."""
    if source.is_file():
        return {"interactions": source}
    logs = {p.stem.lower(): p for p, h in headers.items() if _find("user", h, columns) and _find("item", h, columns)}
    if {"train", "test"} <= set(logs):
        return {part: logs[part] for part in PARTS if part in logs}
    rated = [p for p in logs.values() if _find("rating", headers[p], columns)]
    known = [logs[stem] for stem in _LOGS if stem in logs]
    chosen = known[:1] or (rated if len(rated) == 1 else list(logs.values()))
    if len(chosen) == 1:
        return {"interactions": chosen[0]}
    if not headers:
        raise KgrecError(f"{source}: found no .csv, .tsv or .parquet file, expected a log of users and items; check "
                         "the path")
    if not chosen:
        seen = "; ".join(f"{p.name}: {', '.join(header[:8])}" for p, header in headers.items())
        raise KgrecError(f"{source}: found no table with a user and an item column ({seen}), expected a log with a "
                         f"header; name its columns (--columns.user, --columns.item)")
    raise KgrecError(f"{source}: found {', '.join(p.name for p in chosen)}, expected one log; give the file itself as "
                     "SOURCE")


def _read_log(path: Path, columns: CsvColumns, notes: list[str]) -> tuple[Table, Columns]:
    header = read_header(path)
    for kind in ("user", "item", "rating", "timestamp"):
        named = getattr(columns, kind)
        if named and named not in header:
            raise KgrecError(f"columns.{kind}: found {named!r}, expected one of the columns of {path}: "
                             f"{', '.join(header)}")
    meaning = {name: _find(name.removesuffix("_id"), header, columns) for name in _LOG_COLUMNS}
    user, item, rating, timestamp = meaning.values()
    if not user or not item:
        raise KgrecError(f"{path}:1: found the columns {', '.join(header)}, expected a header with one for the user "
                         "and one for the item; name them (--columns.user, --columns.item), or write a header line")
    kinds = {user: "id", item: "id", rating: "float", timestamp: "int"}
    table = _read_dated(path, {c: kind for c, kind in kinds.items() if c}, timestamp)
    guessed = ", ".join(f"{column} as {name}" for name, column in meaning.items() if column)
    notes.append(f"{path.name}: {table.num_rows:,} rows; {guessed}"
                 + (f"; columns not used: {', '.join(table.ignored)}" if table.ignored else ""))
    return table, {name: table[column] for name, column in meaning.items() if column}


def _read_dated(path: Path, kinds: Mapping[str, str], timestamp: str) -> Table:
    """The log, its timestamps as seconds: numbers as they are, ISO dates as seconds since 1970 (UTC)."""
    try:
        return read_table(path, kinds)
    except KgrecError as error:
        if not timestamp:
            raise
        numbers = error
    # Dates repeat, so that a coded column parses each once; anything else wrong with the file is raised again here.
    table = read_table(path, {**kinds, timestamp: "id"})
    dates = table[timestamp]
    try:
        written = pa.array([date.removesuffix(" UTC") for date in dates.values], pa.string())
        stamps = written.cast(pa.timestamp("us", tz="UTC" if _zoned(written[0].as_py()) else None))
    except pa.ArrowInvalid:
        raise numbers from None
    seconds = stamps.cast(pa.int64()).to_numpy() // 1_000_000
    return dataclasses.replace(table, columns={**table.columns, timestamp: seconds[dates.codes]})


def _zoned(date: str) -> bool:
    return re.search(r"(Z|[+-]\d\d:?(\d\d)?)$", date[10:]) is not None


def _item_table(source: Path, headers: Mapping[Path, list[str]], columns: CsvColumns) -> Path | None:
    """The table with an item and a title but no user; items.* before any other."""
    if source.is_file():
        return None
    found = [p for p, h in headers.items()
             if _find_item(h, columns) and _find("title", h, columns) and not _find("user", h, columns)]
    return next((p for p in found if p.stem == "items"), found[0] if found else None)


def _user_table(source: Path, headers: Mapping[Path, list[str]], columns: CsvColumns) -> Path | None:
    if source.is_file():
        return None
    return next((p for p, h in headers.items() if p.stem.startswith("user") and _find("user", h, columns)
                 and not _find("item", h, columns)), None)


def _users(path: Path, columns: CsvColumns) -> Columns:
    user = _find("user", read_header(path), columns)
    table = read_table(path, {user: "id"}, rest_as_text=True)
    check_unique(table, user)
    return {"user_id": table[user]} | {c: table[c] for c in table.columns if c not in (user, "user_id")}


def _item_tables(path: Path, columns: CsvColumns, logs: Mapping[str, tuple[Table, Columns]],
                 notes: list[str]) -> dict[str, Columns]:
    """The tables items, triples, entities and relations."""
    header = read_header(path)
    item, title = _find_item(header, columns), _find("title", header, columns)
    if not item:
        raise KgrecError(f"{path}:1: found the columns {', '.join(header)}, expected one for the item; name it "
                         "(--columns.item)")
    table = read_table(path, {item: "id"}, rest_as_text=True)
    check_unique(table, item)
    ids = table[item].strings()
    _check_known(path, set(ids), logs)
    out: dict[str, Columns] = {"items": {"item_id": ids}}
    if title:
        out["items"]["title"] = table[title]
    genre = next((c for c in header if c.lower() in _GENRES), "")
    values = [_genres(cell) for cell in table[genre]] if genre else [()] * len(ids)
    for column in header:
        if column not in (item, title, "item_id", "title", "entity_id"):
            out["items"][column] = [", ".join(v) for v in values] if column == genre else table[column]
    years = [re.search(r"\((\d{4})\)\s*$", t) for t in table[title]] if title else []
    triples = [(i, "genre", value) for i, found in zip(ids, values, strict=True) for value in found]
    triples += [(i, "release_year", year[1]) for i, year in zip(ids, years, strict=False) if year]
    notes.append(f"{path.name}: {len(ids):,} items; {len(triples):,} triples from genres and release years")
    if triples:
        head, relation, value = zip(*triples, strict=True)
        tail = [f"{r}/{v}" for r, v in zip(relation, value, strict=True)]
        entities = dict(zip(tail, value, strict=True))
        out |= {"triples": {"head_id": head, "relation": relation, "tail_id": tail},
                "entities": {"entity_id": list(entities), "name": list(entities.values())}}
    return out


def _genres(cell: str) -> tuple[str, ...]:
    """The values of a cell such as `Action|Drama` or `Action, Drama`, each once."""
    parts = (part.strip() for part in re.split(r"\||,", cell))
    return tuple(dict.fromkeys(part for part in parts if part.lower() not in _UNKNOWN))


def _check_known(path: Path, known: set[str], logs: Mapping[str, tuple[Table, Columns]]) -> None:
    for table, log in logs.values():
        unknown, row = log["item_id"].strangers(known)
        if unknown:
            raise KgrecError(f"{table.where(row)}: found the item {unknown[0]!r} ({len(unknown):,} such "
                             f"items), expected an item of {path.name}; add it there")
