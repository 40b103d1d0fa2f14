"""Columns of a dataset folder's items and entities that say more of a graph's entities: types, aliases."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Sequence

from kgrec_jax.data.dataset import Graph
from kgrec_jax.data.tables import find_table, read_header, read_table


def entity_cells(graph: Graph, folder: pathlib.Path,
                 columns: Sequence[str]) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """("FILE:COLUMN", [(entity, cell)]) of items and entities: the first of `columns` that each has, none otherwise.

    A row of the items is its entity where it names one, else the item itself; rows of nothing in the graph are left
    out.
    """
    rows = {identifier: row for row, identifier in enumerate(graph.entity_ids)}
    for stem, key in (("items", "item_id"), ("entities", "entity_id")):
        path = find_table(folder, stem)
        column = next((c for c in columns if path and c in read_header(path)), "")
        if not column:
            continue
        table = read_table(path, {key: "id", column: "text"}, {"entity_id": "text"} if stem == "items" else {})
        ids = table[key].strings()
        if stem == "items" and "entity_id" in table:
            ids = [e or i for e, i in zip(table["entity_id"], ids, strict=True)]
        yield f"{path.name}:{column}", [(rows[identifier], cell) for identifier, cell in
                                        zip(ids, table[column], strict=True) if identifier in rows]
