"""What entities are said to be, and which triples are at odds with it."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp

from kgrec_jax.data.dataset import Graph
from kgrec_jax.data.entity_columns import entity_cells
from kgrec_jax.data.names import local_name, relation_name
from kgrec_jax.errors import KgrecError

TYPE_RELATIONS = ("type", "rdf:type", "rdf type", "has type", "entity type", "instance of", "p31")
TYPE_COLUMNS = ("type", "types", "entity_type")


@dataclasses.dataclass(frozen=True)
class Types:
    """Which types each entity has, and who says so."""

    names: tuple[str, ...]  # [Y]
    of: sp.csr_matrix  # [N, Y] bool
    relations: tuple[int, ...]  # rows of the relations that state types
    said_by: tuple[str, ...]  # the same in words, and columns of tables

    @property
    def count(self) -> np.ndarray:
        """[N] types of each entity."""
        return np.diff(self.of.indptr)


@dataclasses.dataclass(frozen=True)
class EndTypes:
    """What the heads, or the tails, of a relation's triples are."""

    relation: int
    end: str  # "head" or "tail"
    typed: int  # triples whose end has a type
    leading: str  # the type that most of these have
    share: float  # of the typed ones
    odd: int  # an entity without the leading type, -1 for none


def read_types(graph: Graph, folder: pathlib.Path | None = None, relations: Sequence[str] = ()) -> Types:
    """Types by the graph's type relations, and by a column `type` of the folder's items and entities.

    Type relations are those called type, instance of or P31, or `relations` by their id or name. A cell may hold
    several types between "|" or ";". Raises KgrecError for a relation that the graph does not have.
    """
    rows = _type_relations(graph, relations)
    known: dict[str, int] = {}
    entity, kind = [], []
    for head, _, tail in graph.triples[np.isin(graph.triples[:, 1], rows)].tolist():
        entity.append(head)
        kind.append(known.setdefault(graph.entity_names[tail] or graph.entity_ids[tail], len(known)))
    said_by = [graph.relation_names[r] for r in rows]
    for source, cells in entity_cells(graph, folder, TYPE_COLUMNS) if folder else ():
        said_by.append(source)
        for row, cell in cells:
            for name in filter(None, (part.strip() for part in re.split(r"[|;]", cell))):
                entity.append(row)
                kind.append(known.setdefault(name, len(known)))
    of = sp.csr_matrix((np.ones(len(entity), bool), (entity, kind)), shape=(graph.num_entities, max(len(known), 1)))
    of.sum_duplicates()
    return Types(tuple(known), of.astype(bool), tuple(rows), tuple(said_by))


def _type_relations(graph: Graph, wanted: Sequence[str]) -> list[int]:
    both = list(zip(graph.relation_ids, graph.relation_names, strict=True))
    for name in wanted:
        if not any(name in pair for pair in both):
            raise KgrecError(f"--type-relation: found {name!r}, expected one of the graph's relations, such as "
                             f"{both[0][1] if both else 'none'!r}")
    if wanted:
        return [k for k, pair in enumerate(both) if set(pair) & set(wanted)]
    return [k for k, (identifier, name) in enumerate(both)
            if {local_name(identifier).lower(), relation_name(identifier).lower(), name.lower()} & set(TYPE_RELATIONS)]


def end_types(graph: Graph, types: Types) -> list[EndTypes]:
    """The leading type of each relation's heads and tails, where any of them has a type; type relations are left out.

    An entity of several types counts for each of them, so that a type that stands above others leads.
    """
    out, of, holders = [], types.of.astype(np.int64), types.of.tocsc()
    count = types.count
    for end, column in (("head", 0), ("tail", 2)):
        shape = (graph.num_relations, graph.num_entities)
        ones = np.ones(len(graph.triples), np.int64)
        uses = sp.csr_matrix((ones, (graph.triples[:, 1], graph.triples[:, column])), shape=shape)
        having = (uses @ of).tocsr()  # [R, Y]
        typed = uses @ (count > 0).astype(np.int64)
        for r in range(graph.num_relations):
            row = having[r]
            if r in types.relations or not row.nnz:
                continue
            best = int(row.indices[row.data.argmax()])
            ends = uses[r].indices
            of_best = holders.indices[holders.indptr[best]:holders.indptr[best + 1]]
            odd = ends[(count[ends] > 0) & ~np.isin(ends, of_best)]
            out.append(EndTypes(r, end, int(typed[r]), types.names[best], float(row.data.max() / typed[r]),
                                int(odd.min()) if len(odd) else -1))
    return sorted(out, key=lambda e: (e.relation, e.end))
