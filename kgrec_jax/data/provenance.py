"""Where each triple of a folder comes from: the columns `source` and `confidence` of triples.tsv, which may be absent.

`source` says who states the triple (a file, a column of a table, a sentence), `confidence` how sure that is, from 0 to
1. They are for people and for reports: nothing is trained on them, and readers of the graph pass over them.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping

import numpy as np

from kgrec_jax.data.tables import Table, read_table
from kgrec_jax.data.triples import PROVENANCE, TRIPLE_COLUMNS, triple_files
from kgrec_jax.errors import KgrecError


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What the triple tables of a folder say of their rows; all of it empty for a graph in RDF."""

    files: Mapping[str, int]  # triple table -> its rows
    distinct: int  # triples, however often they are stated
    sources: Mapping[str, int]  # source -> rows, the most frequent first; empty without the column
    several: int  # triples that more than one source states
    confidence: np.ndarray  # [rows of the tables with the column] float64, 0 to 1

    @property
    def repeated(self) -> int:
        """Rows that state a triple again."""
        return sum(self.files.values()) - self.distinct


def read_provenance(folder: pathlib.Path) -> Provenance:
    """Rows, repeats and sources of the triples; KgrecError for an empty source, or a confidence that is none."""
    terms: dict[str, int] = {}
    sources: dict[str, int] = {}
    blocks, named = [np.zeros((0, 3), np.int64)], [np.zeros(0, np.int64)]
    confidence, files = [np.zeros(0)], {}
    for path in triple_files(folder).values():
        table = read_table(path, TRIPLE_COLUMNS, PROVENANCE)
        blocks.append(np.stack([_codes(table, column, terms) for column in TRIPLE_COLUMNS], 1))
        named.append(_codes(table, "source", sources) if "source" in table else np.full(table.num_rows, -1))
        if "confidence" in table:
            confidence.append(_checked(table))
        files[path.name] = table.num_rows
    said, triple = np.concatenate(named), np.unique(np.concatenate(blocks), axis=0, return_inverse=True)[1].reshape(-1)
    pairs = np.unique(np.stack([triple, said], 1), axis=0)[:, 0]  # a triple once for each of its sources
    count = np.bincount(said[said >= 0], minlength=len(sources))
    names = list(sources)
    order = np.argsort(-count, kind="stable").tolist()
    return Provenance(files, int(triple.max(initial=-1)) + 1, {names[k]: int(count[k]) for k in order},
                      int((np.bincount(pairs) > 1).sum()) if len(pairs) else 0, np.concatenate(confidence))


def _codes(table: Table, column: str, known: dict[str, int]) -> np.ndarray:
    """[T] int64 rows of the values among those known, which grow by what is new."""
    values = np.array([known.setdefault(v, len(known)) for v in table[column].values], np.int64)
    return values[table[column].codes]


def _checked(table: Table) -> np.ndarray:
    values = table["confidence"]
    bad = np.flatnonzero((values < 0) | (values > 1))
    if len(bad):
        raise KgrecError(f"{table.where(int(bad[0]))}: found the confidence {values[bad[0]]:g} ({len(bad):,} such "
                         "rows), expected a number from 0 to 1; correct the column confidence")
    return values
