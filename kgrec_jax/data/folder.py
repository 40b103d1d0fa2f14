"""The dataset folder, read with checks and written: the project's own format, which every importer produces."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import shutil

import numpy as np

from kgrec_jax.data.dataset import Dataset, Interactions
from kgrec_jax.data.interactions import SplitConfig
from kgrec_jax.data.log import PARTS, log_files, read_log
from kgrec_jax.data.media import check_names, read_media
from kgrec_jax.data.media_files import find_media_files, write_media_files
from kgrec_jax.data.rdf import rdf_files
from kgrec_jax.data.rdf_terms import format_of
from kgrec_jax.data.tables import SUFFIXES, Coded, Table, find_table, read_table, write_tsv
from kgrec_jax.data.texts import join_columns, split_title
from kgrec_jax.data.triples import check_unique, read_graph, triple_files
from kgrec_jax.errors import KgrecError

_STEMS = ("interactions", *PARTS, "items", "users", "entities", "relations", "triples",
          *(f"triples.{part}" for part in PARTS))


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the data are and how they are read."""

    path: str = ""  # the dataset folder; $NAME is a variable of the environment
    name: str = ""  # what to call the data set; "" takes the folder's name
    languages: tuple[str, ...] = ("en",)  # of names and texts in an RDF graph, in order of preference
    text_columns: tuple[str, ...] = ()  # columns of items.tsv that make an item's text, in order; none: all but the ids
    min_rating: float = 0.0  # leave out interactions that are rated lower; 0: every row counts, whatever its rating
    # NAME=WEIGHT of each kind of row in the column behaviour, as in view=0.2 purchase=1: it becomes the row's rating
    behaviours: tuple[str, ...] = ()
    split: SplitConfig = SplitConfig()  # how the interactions are cut into train, valid and test


@dataclasses.dataclass(frozen=True)
class _Items:
    """The item table; `ids` is None where the folder has none and the log must say which items there are."""

    ids: list[str] | None
    entities: list[str]
    names: list[str]
    texts: list[str]


def expanded(path: str) -> pathlib.Path:
    """A path with ~ and $NAME or ${NAME} replaced; KgrecError naming a variable that is not set."""
    unset = [name for name in re.findall(r"\$\{?([A-Za-z_]\w*)\}?", path) if not os.environ.get(name)]
    if unset and not pathlib.Path(path).expanduser().exists():  # a name may have a dollar sign of its own
        raise KgrecError(f"data.path: found {path}, but {unset[0]} is not set, expected a variable of the environment; "
                         f"export {unset[0]}=FOLDER, or give --data.path")
    return pathlib.Path(os.path.expandvars(path)).expanduser()


def read_folder(path: pathlib.Path | str, cfg: DataConfig = DataConfig()) -> Dataset:
    """Read and check a dataset folder; a pure graph comes out with no items and no users.

    Every bad row is an error that names file and line. What is merely noteworthy is counted in `Dataset.notes`.
    """
    folder = pathlib.Path(path)
    if not folder.is_dir():
        found = "a file" if folder.exists() else "no such folder"
        raise KgrecError(f"data.path: found {found} at {folder}, expected a dataset folder; check --data.path")
    rdf = rdf_files(folder)
    if not (log_files(folder) or triple_files(folder) or find_table(folder, "items") or rdf):
        names, strange = sorted(p.name for p in folder.iterdir())[:5], _rdf_notes(folder)
        raise KgrecError(f"{folder}: found {', '.join(names) or 'nothing'}, expected interactions.tsv, train.tsv and "
                         f"test.tsv, items.tsv, triples.tsv or graph.ttl; {(strange or ['see kgrec data import'])[0]}")
    items = _read_items(folder, cfg.text_columns)
    users, user_notes = _read_users(folder)
    log = read_log(folder, users, items.ids, cfg.min_rating, cfg.behaviours)
    if items.ids is None:  # an item's name is its id then, which says nothing to an encoder: no text, no entity name
        item_ids = item_names = list(log.item_ids)
        entities, texts, entity_names = item_ids, [""] * len(item_ids), [""] * len(item_ids)
    else:
        item_ids, item_names, entities, texts = items.ids, items.names, items.entities, items.texts
        entity_names = ["" if name == item else name for name, item in zip(item_names, item_ids, strict=True)]
    graph, graph_notes = read_graph(folder, entities, entity_names, texts, rdf, cfg.languages)
    if rdf and items.ids is not None:  # the graph names what the item table does not
        texts = graph.entity_texts[:len(item_ids)]
        item_names = [name or item for name, item in zip(graph.entity_names, item_ids)]
    empty = sum(not text for text in texts) if items.ids is not None else 0
    table = find_table(folder, "items")
    item_notes = [f"{table.name}: {empty:,} of {len(texts):,} items have no text"] if table and empty else []
    rows = {item: row for row, item in enumerate(item_ids)}
    media, (raw, media_notes) = read_media(folder, rows), find_media_files(folder, rows)
    check_names(folder, media, raw)
    notes = (*item_notes, *user_notes, *log.notes, *graph_notes, *media_notes, *_rdf_notes(folder),
             *_stray_notes(folder))
    return Dataset(cfg.name or folder.resolve().name, log.user_ids, tuple(item_ids), tuple(item_names), tuple(texts),
                   log.interactions, log.part, log.has_fixed_split, log.has_fixed_valid, log.has_timestamps,
                   log.has_ratings, graph, media, notes, raw)


def _read_items(folder: pathlib.Path, text_columns: tuple[str, ...]) -> _Items:
    path = find_table(folder, "items")
    if path is None:
        if text_columns:
            raise KgrecError(f"data.text_columns: found {', '.join(text_columns)} for {folder}, which has no "
                             "items.tsv, expected none")
        return _Items(None, [], [], [])
    return read_items(path, text_columns)


def read_items(path: pathlib.Path, text_columns: tuple[str, ...] = ()) -> _Items:
    """The ids, entities, names and texts of an item table."""
    table = read_table(path, {"item_id": "id"}, {"entity_id": "text"}, rest_as_text=True)
    check_unique(table, "item_id")
    ids = table["item_id"].strings()
    available = [c for c in table.columns if c not in ("item_id", "entity_id")]
    unknown = [c for c in text_columns if c not in available]
    if unknown:
        raise KgrecError(f"data.text_columns: found {unknown[0]!r}, expected columns of {path}: "
                         f"{', '.join(available) or 'it has none'}")
    # The name leads the text wherever the file puts its column: truncation in an encoder cuts the end.
    ordered = text_columns or sorted(available, key=lambda c: (c != "title", c != "name"))
    texts = join_columns({c: table[c] for c in ordered}, len(ids))
    blank = [""] * len(ids)
    titles, names = table.columns.get("title", blank), table.columns.get("name", blank)
    names = [t.strip() or n.strip() or i for t, n, i in zip(titles, names, ids, strict=True)]
    entities = [e or i for e, i in zip(table.columns.get("entity_id", blank), ids, strict=True)]
    _check_entities(table, ids, entities)
    return _Items(ids, entities, names, texts)


def _check_entities(table: Table, ids: list[str], entities: list[str]) -> None:
    seen: dict[str, int] = {}
    for row, entity in enumerate(entities):
        if entity in seen:
            raise KgrecError(f"{table.where(row)}: found the items {ids[seen[entity]]!r} and {ids[row]!r} with the one "
                             f"entity_id {entity!r}, expected an entity of its own for each; leave the cell of one of "
                             "them empty")
        seen[entity] = row


def _read_users(folder: pathlib.Path) -> tuple[list[str], list[str]]:
    path = find_table(folder, "users")
    if path is None:
        return [], []
    table = read_table(path, {"user_id": "id"})
    check_unique(table, "user_id")
    notes = [f"{path.name}: columns not used: {', '.join(table.ignored)}"] if table.ignored else []
    return table["user_id"].strings(), notes


def _rdf_notes(folder: pathlib.Path) -> list[str]:
    """RDF under a name that the format does not know."""
    known = rdf_files(folder)
    names = sorted(p.name for p in folder.iterdir() if format_of(p) and p not in known)
    return [f"{name}: not read; the folder's graph is called graph.ttl, .nt, .nq, .trig or .rdf" for name in names]


def _stray_notes(folder: pathlib.Path) -> list[str]:
    """Tables under a name that the format does not know: often a misspelt one."""
    tables = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES)
    return [f"{p.name}: not read, the format has no table of this name" for p in tables if p.stem not in _STEMS]


def write_folder(dataset: Dataset, path: pathlib.Path | str) -> None:
    """Write a data set as a folder that `read_folder` reads back to the same content; never over anything.

    The joined text of an item becomes one column `text` beside its title.
    """
    target = pathlib.Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise KgrecError(f"{target}: found something there already, expected a new or empty folder; choose another or "
                         "remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.with_name(f"{target.name}.tmp{os.getpid()}")
    folder.mkdir()
    try:
        _write_items(dataset, folder)
        if dataset.num_users:
            write_tsv(folder / "users.tsv", {"user_id": dataset.user_ids})
        for part in range(3) if dataset.has_fixed_split else ():
            rows = dataset.interactions.take(dataset.part == part)
            if len(rows) or PARTS[part] != "valid":
                write_interactions(folder / f"{PARTS[part]}.tsv", dataset, rows)
        if len(dataset.interactions) and not dataset.has_fixed_split:
            write_interactions(folder / "interactions.tsv", dataset, dataset.interactions)
        _write_graph(dataset, folder)
        _write_media(dataset, folder)
        write_media_files(dataset.raw_media, dataset.item_ids, folder)
        os.replace(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_interactions(path: pathlib.Path, dataset: Dataset, rows: Interactions) -> None:
    """Write interactions with the ids of `dataset` and the columns that its log has."""
    columns: dict[str, Coded | np.ndarray] = {"user_id": Coded(rows.user, list(dataset.user_ids)),
                                              "item_id": Coded(rows.item, list(dataset.item_ids))}
    if dataset.has_ratings:
        columns["rating"] = rows.rating
    if dataset.has_timestamps:
        columns["timestamp"] = rows.timestamp
    write_tsv(path, columns)


def _write_items(dataset: Dataset, folder: pathlib.Path) -> None:
    if not dataset.num_items:
        return
    titles, texts = [], []
    for item, name, text in zip(dataset.item_ids, dataset.item_names, dataset.item_texts, strict=True):
        rest = split_title(name, text)
        titles.append("" if name == item and rest is None else name)
        texts.append(text if rest is None else rest)
    columns = {"item_id": dataset.item_ids, "entity_id": dataset.graph.entity_ids[:dataset.num_items], "title": titles}
    if any(texts):
        columns["text"] = texts
    write_tsv(folder / "items.tsv", columns)


def _write_graph(dataset: Dataset, folder: pathlib.Path) -> None:
    graph, first = dataset.graph, dataset.num_items
    if graph.num_entities > first:
        write_tsv(folder / "entities.tsv", {"entity_id": graph.entity_ids[first:], "name": graph.entity_names[first:],
                                            "description": graph.entity_texts[first:]})
    if not len(graph.triples):
        return
    write_tsv(folder / "relations.tsv", {"relation": graph.relation_ids, "name": graph.relation_names})
    entities, relations = list(graph.entity_ids), list(graph.relation_ids)
    for part in range(3) if graph.part.any() else (-1,):
        rows = graph.triples[graph.part == part] if part >= 0 else graph.triples
        if len(rows):
            name = f"triples.{PARTS[part]}.tsv" if part >= 0 else "triples.tsv"
            write_tsv(folder / name, {"head_id": Coded(rows[:, 0], entities), "relation": Coded(rows[:, 1], relations),
                                      "tail_id": Coded(rows[:, 2], entities)})


def _write_media(dataset: Dataset, folder: pathlib.Path) -> None:
    for name, (vectors, present) in dataset.media.items():
        (folder / "media").mkdir(exist_ok=True)
        np.save(folder / "media" / f"{name}.npy", vectors[present])
        ids = [item for item, has in zip(dataset.item_ids, present, strict=True) if has]
        (folder / "media" / f"{name}.ids.txt").write_text("\n".join(ids) + "\n", encoding="utf-8")
