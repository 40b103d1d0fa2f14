"""Reading the log: `interactions`, or `train`, `valid` and `test` where the split comes with the data."""

from __future__ import annotations

import dataclasses
import math
import pathlib

import numpy as np

from kgrec_jax.data.dataset import Interactions
from kgrec_jax.data.tables import Coded, Table, find_table, read_table
from kgrec_jax.errors import KgrecError

PARTS = ("train", "valid", "test")


@dataclasses.dataclass(frozen=True)
class Log:
    """What the files of a folder say about who touched what, each pair once."""

    interactions: Interactions
    part: np.ndarray  # [n] int8: 0 train, 1 valid, 2 test
    user_ids: tuple[str, ...]
    item_ids: tuple[str, ...]
    has_fixed_split: bool
    has_fixed_valid: bool
    has_timestamps: bool
    has_ratings: bool
    notes: tuple[str, ...]


def log_files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Part -> file: {"train": interactions} or the files of a fixed split; empty where the folder has no log."""
    single = find_table(folder, "interactions")
    fixed = {part: path for part in PARTS if (path := find_table(folder, part))}
    if single and fixed:
        names = ", ".join(p.name for p in fixed.values())
        raise KgrecError(f"{folder}: found both {single.name} and {names}, expected one log or one fixed split; move "
                         "one away")
    if fixed and not {"train", "test"} <= set(fixed):
        names = ", ".join(p.name for p in fixed.values())
        raise KgrecError(f"{folder}: found {names} alone, expected train and test together; "
                         f"name a log that is still to be split interactions.tsv")
    return {"train": single} if single else fixed


def read_log(folder: pathlib.Path, user_ids: list[str], item_ids: list[str] | None, min_rating: float,
             behaviours: tuple[str, ...] = ()) -> Log:
    """Read, check and deduplicate the log.

    `user_ids` are the rows that users.tsv gives; others are added behind them. `item_ids` are the rows of items.tsv,
    and any other item is an error; None: the items are those of the log. A pair that stands twice in one file counts
    once: the latest timestamp, without timestamps the last row. The same pair in two parts of a fixed split is an
    error. `behaviours` (NAME=WEIGHT each) say what a row of a kind is worth: a pair's row of the most weight counts,
    and its rating is that weight, times the rating where there is one.
    """
    files, worth = log_files(folder), behaviour_weights(behaviours)
    users = {u: row for row, u in enumerate(user_ids)}
    items = {i: row for row, i in enumerate(item_ids or [])}
    optional = {"rating": "float", "timestamp": "int", **({"behaviour": "id"} if worth else {})}
    tables = {part: read_table(path, {"user_id": "id", "item_id": "id"}, optional) for part, path in files.items()}
    has_timestamps = bool(tables) and all("timestamp" in t for t in tables.values())
    has_ratings = bool(tables) and all("rating" in t for t in tables.values())
    if min_rating and tables and not has_ratings:
        raise KgrecError(f"data.min_rating: found {min_rating:g} for {folder}, whose log has no column rating, "
                         f"expected 0; leave --data.min-rating away")
    notes, rows, parts = [], [], []
    for part, table in tables.items():
        log = _rows(table, users, items, closed=item_ids is not None, has_timestamps=has_timestamps,
                    has_ratings=has_ratings)
        weight = _worth(table, worth, folder) if worth else None
        keep = _latest(log, max(len(items), 1), has_timestamps, weight)
        if not keep.all():
            which = "the behaviour of most weight" if worth else "the latest" if has_timestamps else "the last row"
            notes.append(f"{table.path.name}: {int((~keep).sum()):,} rows repeat a pair of user and item; {which} of "
                         "each counts")
        if min_rating:
            low = keep & (log.rating < min_rating)
            keep &= ~low
            notes.append(f"{table.path.name}: {int(low.sum()):,} of {len(log):,} rows are rated under {min_rating:g} "
                         "and left out")
        if table.ignored:
            notes.append(f"{table.path.name}: columns not used: {', '.join(table.ignored)}")
        if weight is not None:
            log = dataclasses.replace(log, rating=log.rating * weight)
        rows.append(log.take(keep))
        parts.append(np.full(len(rows[-1]), PARTS.index(part), np.int8))
    interactions = Interactions.concatenate(rows) if rows else Interactions.empty()
    part = np.concatenate(parts) if parts else np.zeros(0, np.int8)
    if tables and not len(interactions):
        raise KgrecError(f"data.min_rating: found no interaction rated {min_rating:g} or more in {folder}; lower "
                         "--data.min-rating")
    if len(tables) > 1:
        _check_disjoint(tables, interactions, part, list(users), list(items))
    added = len(users) - len(user_ids)
    if user_ids and added:
        notes.append(f"users: {added:,} users of the log are not in the user table (first: "
                     f"{list(users)[len(user_ids)]}); added")
    return Log(interactions, part, tuple(users), tuple(items), "test" in tables, "valid" in tables, has_timestamps,
               has_ratings or bool(worth), tuple(notes))


def behaviour_weights(words: tuple[str, ...]) -> dict[str, float]:
    """Behaviour -> weight of data.behaviours, NAME=WEIGHT each; KgrecError for anything else."""
    out: dict[str, float] = {}
    for word in words:
        name, _, value = word.rpartition("=")
        try:
            weight = float(value)
        except ValueError:
            weight = math.nan
        if not name or name in out or not 0 < weight < math.inf:
            raise KgrecError(f"data.behaviours: found {word!r}, expected NAME=WEIGHT with a weight above 0, each name "
                             "once, as in view=0.2 purchase=1")
        out[name] = weight
    return out


def _worth(table: Table, worth: dict[str, float], folder: pathlib.Path) -> np.ndarray:
    """[n] float32 weights of the rows' behaviours."""
    if "behaviour" not in table:
        raise KgrecError(f"data.behaviours: found {', '.join(worth)} for {folder}, whose {table.path.name} has no "
                         "column behaviour, expected none; leave --data.behaviours away")
    column = table["behaviour"]
    unknown, row = column.strangers(worth)
    if unknown:
        raise KgrecError(f"{table.where(row)}: found the behaviour {unknown[0]!r}, expected one of {', '.join(worth)}; "
                         f"add {unknown[0]}=WEIGHT to --data.behaviours")
    return np.array([worth[value] for value in column.values], np.float32)[column.codes]


def _rows(table: Table, users: dict[str, int], items: dict[str, int], *, closed: bool, has_timestamps: bool,
          has_ratings: bool) -> Interactions:
    """The table's rows as they stand; `users`, and `items` unless closed, grow by what is new."""
    user, item = table["user_id"], table["item_id"]
    if closed:
        unknown, row = item.strangers(items)
        if unknown:
            raise KgrecError(f"{table.where(row)}: found the item {unknown[0]!r} ({len(unknown):,} such "
                             f"items), expected an item of the item table; add it there, or remove the item table")
    n = table.num_rows
    return Interactions(_globalise(user, users), _globalise(item, items),
                        table["rating"].astype(np.float32) if has_ratings else np.ones(n, np.float32),
                        table["timestamp"] if has_timestamps else np.zeros(n, np.int64))


def _globalise(column: Coded, rows: dict[str, int]) -> np.ndarray:
    """[n] int32 rows of the column's values, new values appended to `rows`."""
    return np.array([rows.setdefault(v, len(rows)) for v in column.values], np.int32)[column.codes]


def _latest(log: Interactions, num_items: int, has_timestamps: bool, weight: np.ndarray | None = None) -> np.ndarray:
    """Mask of the row that counts for each (user, item): of the most weight, then the latest, the last among equals."""
    key = log.user.astype(np.int64) * num_items + log.item
    ordered = np.sort(key)
    keep = np.ones(len(key), bool)
    if not (ordered[1:] == ordered[:-1]).any():  # the usual case, and half the time of a stable sort
        return keep
    by = ([log.timestamp] if has_timestamps else []) + ([] if weight is None else [weight])
    order = np.lexsort((*by, key))
    keep[order[:-1]] = key[order[1:]] != key[order[:-1]]
    return keep


def _check_disjoint(tables: dict[str, Table], log: Interactions, part: np.ndarray, users: list[str],
                    items: list[str]) -> None:
    key = log.user.astype(np.int64) * len(items) + log.item
    order = np.argsort(key, kind="stable")
    same = np.flatnonzero(key[order[1:]] == key[order[:-1]])
    if not len(same):
        return
    first, second = order[same[0]], order[same[0] + 1]
    user, item = users[log.user[first]], items[log.item[first]]
    table = tables[PARTS[part[second]]]
    row = int(np.argmax((table["user_id"].codes == table["user_id"].values.index(user))
                        & (table["item_id"].codes == table["item_id"].values.index(item))))
    raise KgrecError(f"{table.where(row)}: found user {user!r} with item {item!r}, which "
                     f"{tables[PARTS[part[first]]].path.name} has too ({len(same):,} such pairs), expected each pair "
                     "in one part; remove it from one of them")
