"""A dataset folder with more triples in its graph, each with its source and confidence: a new folder, never the old."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
import tempfile
from collections.abc import Mapping, Sequence

import numpy as np

from kgrec_jax.data.log import PARTS
from kgrec_jax.data.rdf import rdf_files
from kgrec_jax.data.tables import Table, find_table, read_table, write_tsv
from kgrec_jax.data.triples import PROVENANCE, TRIPLE_COLUMNS, triple_files
from kgrec_jax.errors import KgrecError

Triple = tuple[str, str, str]


@dataclasses.dataclass(frozen=True)
class Fact:
    """One triple to be added, by ids."""

    head: str
    relation: str
    tail: str
    source: str  # who states it
    confidence: float  # 0 to 1

    @property
    def triple(self) -> Triple:
        """(head, relation, tail)."""
        return self.head, self.relation, self.tail


@dataclasses.dataclass(frozen=True)
class Extended:
    """What `extend_folder` did with the facts."""

    added: int
    known: int  # stand in the folder's graph already, in whichever part
    repeated: int  # stand among the facts twice


def check_new(out: pathlib.Path) -> None:
    """KgrecError where `out` is a file or a folder with something in it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise KgrecError(f"{out}: found a file or a folder that is not empty, expected a new one; choose another --out")


def extend_folder(base: pathlib.Path | None, out: pathlib.Path, facts: Sequence[Fact], entities: Mapping[str, str],
                  relations: Mapping[str, str], tables: Mapping[str, Mapping[str, Sequence[str]]] | None = None
                  ) -> Extended:
    """Write `out`: all that `base` has, with `facts` in its graph, and `tables` by their names.

    `entities` and `relations` are {id: name} of what the facts bring along; where the base names one, its name stays.
    Facts go into the training part of a fixed split, and not at all where a part has them already. Triples of the base
    without a source get their file's name, without a confidence 1. `out` appears complete or not at all.
    """
    check_new(out)
    if base is not None and rdf_files(base):
        raise KgrecError(f"{base}: found a graph in RDF ({rdf_files(base)[0].name}), expected triples.tsv; convert it "
                         "with kgrec data graph build --rdf")
    files = triple_files(base) if base is not None else {}
    old = {part: read_table(path, TRIPLE_COLUMNS, PROVENANCE) for part, path in files.items()}
    known = {triple for table in old.values()
             for triple in zip(*(table[c].strings() for c in TRIPLE_COLUMNS), strict=True)}
    distinct = {fact.triple: fact for fact in reversed(facts)}  # the first of equal ones counts
    fresh = [fact for fact in reversed(distinct.values()) if fact.triple not in known]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        folder = pathlib.Path(scratch) / "folder"
        folder.mkdir()
        if base is not None:
            written = {find_table(base, stem) for stem in ("entities", "relations", *(tables or {}))}
            _copy(base, folder, written | {files[p] for p in files})
        for name, columns in (tables or {}).items():
            write_tsv(folder / f"{name}.tsv", columns)
        _write_triples(folder, files, old, fresh)
        _write_listed(base, folder, "entities", "entity_id", entities)
        _write_listed(base, folder, "relations", "relation", relations)
        if out.exists():
            out.rmdir()
        folder.rename(out)
    return Extended(len(fresh), len(distinct) - len(fresh), len(facts) - len(distinct))


def _copy(base: pathlib.Path, folder: pathlib.Path, without: set[pathlib.Path | None]) -> None:
    for path in sorted(base.iterdir()):
        if path in without:
            continue
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        else:
            shutil.copy2(path, folder / path.name)


def _write_triples(folder: pathlib.Path, files: Mapping[str, pathlib.Path], old: Mapping[str, Table],
                   fresh: Sequence[Fact]) -> None:
    new = [list(column) for column in zip(*((*f.triple, f.source) for f in fresh), strict=True)] or [[], [], [], []]
    sure = np.array([f.confidence for f in fresh])
    for part in files or ({PARTS[0]: None} if fresh else {}):
        columns, confidence = ([], [], [], []), np.zeros(0)
        if part in old:
            table = old[part]
            source = table["source"].strings() if "source" in table else [table.path.name] * table.num_rows
            columns = (*(table[c].strings() for c in TRIPLE_COLUMNS), source)
            confidence = table["confidence"] if "confidence" in table else np.ones(table.num_rows)
        if part == PARTS[0]:
            columns = [a + b for a, b in zip(columns, new, strict=True)]
            confidence = np.concatenate([confidence, sure])
        stem = files[part].stem if files else "triples"
        write_tsv(folder / f"{stem}.tsv", dict(zip((*TRIPLE_COLUMNS, "source"), columns, strict=True))
                  | {"confidence": [f"{c:.4g}" for c in confidence.tolist()]})


def _write_listed(base: pathlib.Path | None, folder: pathlib.Path, stem: str, key: str,
                  named: Mapping[str, str]) -> None:
    """The base's table of entities or relations, with those it lacks."""
    path = find_table(base, stem) if base is not None else None
    columns: dict[str, list[str]] = {key: [], "name": []}
    if path is not None:
        table = read_table(path, {key: "id", "name": "text"}, rest_as_text=True)
        columns = {c: table[c].strings() if c == key else list(table[c]) for c in table.columns}
    listed = set(columns[key])
    new = [identifier for identifier in named if identifier not in listed]
    for column, values in columns.items():
        values += new if column == key else [named[i] if column == "name" else "" for i in new]
    if columns[key]:
        write_tsv(folder / f"{stem}.tsv", columns)
