"""Which entities and relations of a graph a surface form may mean: by name and alias, never by likeness."""

from __future__ import annotations

import pathlib
import re

from kgrec_jax.data.dataset import Graph
from kgrec_jax.data.entity_columns import entity_cells
from kgrec_jax.data.graph import short_title
from kgrec_jax.data.importers.surface import entity_key, relation_key
from kgrec_jax.data.names import relation_name

ALIASES = ("aliases", "alias", "also_known_as")  # columns of entities.tsv and items.tsv, values between "|"


class Linker:
    """Looks forms up among the names of a graph.

    A full name counts before an alias; names without what stands in brackets behind them are aliases: `Heat` means
    `Heat (1995)`, unless something is called just `Heat`.
    """

    def __init__(self, graph: Graph, folder: pathlib.Path | None = None):
        self.graph = graph
        self._names: dict[str, list[int]] = {}
        self._aliases: dict[str, list[int]] = {}
        for row, name in enumerate(graph.entity_names):
            if not name:
                continue
            _enter(self._names, entity_key(name), row)
            for alias in (short_title(name), re.sub(r"\s*\([^()]*\)$", "", name)):
                _enter(self._aliases, entity_key(alias), row)
        for _, cells in entity_cells(graph, folder, ALIASES) if folder else ():
            for row, cell in cells:
                for alias in cell.split("|"):
                    _enter(self._aliases, entity_key(alias), row)
        self._relations: dict[str, list[int]] = {}
        for row, pair in enumerate(zip(graph.relation_ids, graph.relation_names, strict=True)):
            for name in (pair[1], relation_name(pair[0])):
                _enter(self._relations, relation_key(name), row)

    def entities(self, form: str) -> tuple[str, ...]:
        """Ids of the entities that the form may mean: none, one, or several that share a name."""
        key = entity_key(form)
        found = self._names.get(key) or self._aliases.get(key, ())
        return tuple(self.graph.entity_ids[row] for row in found)

    def relations(self, form: str) -> tuple[str, ...]:
        """Ids of the relations that the form may mean."""
        return tuple(self.graph.relation_ids[row] for row in self._relations.get(relation_key(form), ()))


def _enter(table: dict[str, list[int]], key: str, row: int) -> None:
    if key and row not in table.setdefault(key, []):
        table[key].append(row)
