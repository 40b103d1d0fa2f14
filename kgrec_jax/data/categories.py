"""Kinds of items: a column such as genres, or the relation of the graph that says the same; plain NumPy, no JAX."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import scipy.sparse as sp

from kgrec_jax.data.dataset import Dataset, Graph
from kgrec_jax.data.graph import neighbours
from kgrec_jax.data.importers.columns import SEPARATORS, clean, split
from kgrec_jax.data.names import name_from_id
from kgrec_jax.data.tables import find_table, read_header, read_table

COLUMNS = ("genres", "genre", "categories", "category", "tags")  # of items.tsv, the first that is there
_WORDS = ("genre", "genres", "category", "categories", "subject", "tag", "tags")  # of a relation's name
MIN_COVERED = 0.5  # share of the items that a relation must say something about
_SOME_CELLS = 0.02  # share of the cells in which a separator must be
MIN_SHARED = 5.0  # items of a value, on average: below, values tell items apart and name no kind


@dataclasses.dataclass(frozen=True)
class Categories:
    """p(g | i): which kinds each item is of, an item of several kinds in equal shares."""

    source: str  # "items.tsv:genres" or "relation film genre"
    values: tuple[str, ...]  # [C] names of the kinds
    shares: sp.csr_matrix  # [I, C] float32, rows add up to 1; a row is empty where nothing is said


def read_categories(dataset: Dataset, graph: Graph, folder: pathlib.Path | None) -> Categories | None:
    """The kinds of a data set's items; None where no column and no relation says any.

    A column of `folder`'s items called as in COLUMNS decides, unless its values tell items apart; then a relation of
    `graph` (inverse relations merged) whose name has such a word; then the first relation whose values are kinds: at
    least half of the items have one and a value has five items or more on average.
    """
    found = _by_column(dataset, folder) if folder is not None else None
    return found if found is not None else _by_relation(dataset, graph)


def _by_column(dataset: Dataset, folder: pathlib.Path) -> Categories | None:
    path = find_table(folder, "items")
    column = next((c for c in COLUMNS if path and c in read_header(path)), "")
    if not column:
        return None
    table = read_table(path, {"item_id": "id", column: "text"})
    cells = [clean(cell) for cell in table[column]]
    # The name of the column says that its values are kinds, so a separator in some of the cells can be nothing else.
    separator = next((s for s in SEPARATORS if sum(s in cell for cell in cells) >= _SOME_CELLS * len(cells)), "")
    row_of = {item: row for row, item in enumerate(dataset.item_ids)}
    pairs = [(row_of[item], value) for item, cell in zip(table["item_id"].strings(), cells, strict=True) if cell
             and item in row_of for value in (split(cell, separator) if separator else [cell])]
    names = tuple(sorted({value for _, value in pairs}))
    if len(names) < 2 or len(pairs) < MIN_SHARED * len(names):
        return None
    column_of = {name: n for n, name in enumerate(names)}
    items = np.array([item for item, _ in pairs], np.int64)
    values = np.array([column_of[value] for _, value in pairs], np.int64)
    return Categories(f"{path.name}:{column}", names, _shares(items, values, dataset.num_items, len(names)))


def _by_relation(dataset: Dataset, graph: Graph) -> Categories | None:
    if not len(graph.triples):
        return None
    links = neighbours(graph, dataset.num_items)
    item = np.repeat(np.arange(dataset.num_items), np.diff(links.indptr))
    outside = links.entity >= dataset.num_items  # another item is no kind
    item, relation, entity = item[outside], links.relation[outside], links.entity[outside]
    named = [bool(set(name.lower().split()) & set(_WORDS)) for name in graph.relation_names]
    # Forwards before backwards, and those that are called a kind before all others.
    order = sorted(np.unique(relation).tolist(), key=lambda r: (not named[r % graph.num_relations], r))
    for row in order:
        own = relation == row
        items, (values, column) = item[own], np.unique(entity[own], return_inverse=True)
        covered = len(np.unique(items)) / max(dataset.num_items, 1)
        if covered < MIN_COVERED or len(values) < 2 or len(items) < MIN_SHARED * len(values):
            continue
        names = tuple(graph.entity_names[e] or name_from_id(graph.entity_ids[e]) or graph.entity_ids[e] for e in values)
        source = f"relation {graph.relation_names[row % graph.num_relations]}"
        return Categories(source + (" reversed" if row >= graph.num_relations else ""), names,
                          _shares(items, column.reshape(-1), dataset.num_items, len(values)))
    return None


def _shares(items: np.ndarray, values: np.ndarray, num_items: int, num_values: int) -> sp.csr_matrix:
    """[I, C] of pairs, each counted once, rows adding up to 1."""
    there = sp.csr_matrix((np.ones(len(items), np.float32), (items, values)), shape=(num_items, num_values))
    there.sum_duplicates()
    there.data[:] = 1.0
    there.data /= np.repeat(np.diff(there.indptr), np.diff(there.indptr)).astype(np.float32)
    return there
