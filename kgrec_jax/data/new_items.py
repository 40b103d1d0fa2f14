"""Items that come after a run was trained: a dataset folder, or an item table alone."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np

from kgrec_jax.data.dataset import Dataset, Graph, Interactions
from kgrec_jax.data.folder import DataConfig, read_folder, read_items
from kgrec_jax.data.tables import SUFFIXES, find_table
from kgrec_jax.errors import KgrecError


def read_new_items(path: pathlib.Path | str, cfg: DataConfig) -> Dataset:
    """The items of a folder or of a table (items.tsv, .csv, .parquet), as a data set in which nobody touched them.

    Raises KgrecError for what `read_folder` refuses, and for a folder without an item table. A log is not read into it:
    it is counted in `notes`.
    """
    path = pathlib.Path(path)
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise KgrecError(f"FOLDER: found the file {path}, expected a dataset folder or an item table "
                             f"({', '.join(f'items{suffix}' for suffix in SUFFIXES)})")
        items = read_items(path, cfg.text_columns)
        names = ["" if name == item else name for name, item in zip(items.names, items.ids, strict=True)]
        graph = Graph(tuple(items.entities), tuple(names), tuple(items.texts), (), (), np.zeros((0, 3), np.int32),
                      len(items.ids), np.zeros(0, np.int8))
        return Dataset(path.stem, (), tuple(items.ids), tuple(items.names), tuple(items.texts), Interactions.empty(),
                       np.zeros(0, np.int8), False, False, False, False, graph, {})
    if not path.is_dir():
        raise KgrecError(f"FOLDER: found nothing at {path}, expected a dataset folder or an item table")
    if find_table(path, "items") is None:
        raise KgrecError(f"{path}: found no items.tsv, expected the table of the new items (item_id, title, texts)")
    found = read_folder(path, cfg)
    if not len(found.interactions):
        return found
    note = (f"{path}: its {len(found.interactions):,} interactions are not learned from; add them to the data set and "
            "run it again for that")
    return dataclasses.replace(found, interactions=Interactions.empty(), part=np.zeros(0, np.int8), user_ids=(),
                               notes=(*found.notes, note))
