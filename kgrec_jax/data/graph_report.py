"""A dataset folder's graph in figures and findings, by names instead of ids: what `kgrec data inspect` says."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kgrec_jax.data import graph_statistics as stats
from kgrec_jax.data.dataset import Dataset, Graph
from kgrec_jax.data.folder import DataConfig, read_folder
from kgrec_jax.data.graph import name_by_items, neighbours
from kgrec_jax.data.graph_types import EndTypes, Types, end_types, read_types
from kgrec_jax.data.names import relation_name
from kgrec_jax.data.provenance import Provenance, read_provenance
from kgrec_jax.data.rdf import rdf_files
from kgrec_jax.data.tables import find_table, read_table
from kgrec_jax.errors import KgrecError

_QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
_HUBS, _SHOWN = 10, 5  # entities of the highest degree; findings of a kind in words
_SURE = 0.9  # share of the typed ends from which the others look like errors


@dataclasses.dataclass(frozen=True)
class InspectConfig:
    """What counts as a finding."""

    min_share: float = 0.8  # of a relation's pairs that another holds, from which the two are reported
    type_relations: tuple[str, ...] = ()  # relations that state types; none: those called type, instance of or P31
    languages: tuple[str, ...] = ("en",)  # of names in RDF, best first


@dataclasses.dataclass(frozen=True)
class GraphReport:
    """The findings of `inspect_graph`: plain values, so that `dataclasses.asdict` is its JSON."""

    name: str
    entities: int  # items included
    triples: Mapping[str, int]  # part -> distinct triples
    relations: list[dict[str, Any]]  # a row each, the most frequent first
    pairs: list[dict[str, Any]]  # relations that hold each other's pairs, straight or reversed
    items: dict[str, int]
    quality: dict[str, Any]
    degree: dict[str, Any]
    types: dict[str, Any]
    provenance: dict[str, Any]
    splits: dict[str, dict[str, int]]
    notes: list[str]

    def render(self) -> list[str]:
        """Lines for the terminal: figures, the relations as a table, then what looks wrong."""
        from kgrec_jax.data.graph_render import render  # words apart from figures

        return render(self)


def inspect_graph(path: pathlib.Path | str, cfg: InspectConfig = InspectConfig()) -> tuple[GraphReport, np.ndarray]:
    """The report on a dataset folder's graph, and [2, N] how many triples each entity is head and tail of.

    Raises KgrecError for a folder that cannot be read and for one without a graph.
    """
    folder = pathlib.Path(path)
    dataset = read_folder(folder, DataConfig(languages=cfg.languages))
    graph = dataset.graph
    if not len(graph.triples):
        raise KgrecError(f"{folder}: found no triples, expected a folder with a graph (triples.tsv or graph.ttl)")
    degree, types = stats.degrees(graph), read_types(graph, folder, cfg.type_relations)
    ends = end_types(graph, types)
    relations, said = stats.relation_statistics(graph), read_provenance(folder)
    names = np.array(graph.relation_names, object)
    pairs = [{"first": names[p.first], "second": names[p.second], "reverse": p.reverse, "shared": p.shared,
              "share_first": p.share_first, "share_second": p.share_second}
             for p in stats.similar_relations(graph, cfg.min_share)]
    parts = np.bincount(graph.part, minlength=3).tolist()
    triples = dict(zip(("train", "valid", "test"), parts, strict=True)) if any(parts[1:]) else {"all": parts[0]}
    attached = int((degree.sum(0)[:graph.num_items] > 0).sum())
    return GraphReport(
        dataset.name, graph.num_entities, triples, _relation_rows(graph, relations, ends), pairs,
        {"all": graph.num_items, "attached": attached, "not_attached": graph.num_items - attached},
        _quality(folder, dataset, degree, relations, said), _degree(graph, degree), _types(graph, types, ends),
        _provenance(folder, said), {name: dataclasses.asdict(leak) for name, leak in stats.leaks(graph).items()},
        list(dataset.notes)), degree


def _relation_rows(graph: Graph, found: stats.Relations, ends: Sequence[EndTypes]) -> list[dict[str, Any]]:
    of_end = {(e.relation, e.end): e for e in ends}
    rows = []
    for r in np.argsort(-found.triples, kind="stable").tolist():
        row = {"relation": graph.relation_names[r], "id": graph.relation_ids[r], "triples": int(found.triples[r]),
               "heads": int(found.heads[r]), "tails": int(found.tails[r]), "kind": found.kind(r),
               "functionality": float(found.functionality[r]),
               "inverse_functionality": float(found.inverse_functionality[r]),
               "symmetric": float(found.symmetric[r]), "loops": int(found.loops[r])}
        for end in ("head", "tail"):
            if e := of_end.get((r, end)):
                row |= {f"{end}_type": e.leading, f"{end}_type_share": e.share}
        rows.append(row)
    return rows


def _quality(folder: pathlib.Path, dataset: Dataset, degree: np.ndarray, found: stats.Relations,
             said: Provenance) -> dict[str, Any]:
    graph = dataset.graph
    path = find_table(folder, "relations")
    labelled: set[str] = set()
    if path:
        table = read_table(path, {"relation": "id", "name": "text"})
        labelled = {r for r, name in zip(table["relation"].strings(), table["name"], strict=True) if name.strip()}
    bare = [r for r, name in zip(graph.relation_ids, graph.relation_names, strict=True)
            if r not in labelled and name == relation_name(r)]
    unnamed = [e for e, name in zip(graph.entity_ids, graph.entity_names, strict=True) if not name]
    sizes = stats.components(graph)
    return {"repeated_rows": said.repeated, "self_loops": int(found.loops.sum()),
            "isolated_entities": int((degree.sum(0) == 0).sum()), "relations_without_label": bare,
            "entities_without_name": len(unnamed), "first_without_name": unnamed[:_SHOWN],
            "components": len(sizes), "largest_component": int(sizes[0])}


def entity_label(graph: Graph, entity: int) -> str:
    """An entity's name, else its id."""
    return graph.entity_names[entity] or graph.entity_ids[entity]


def _degree(graph: Graph, degree: np.ndarray) -> dict[str, Any]:
    total = degree.sum(0)
    links = neighbours(graph, graph.num_entities)
    hubs = np.argsort(-total, kind="stable")[:_HUBS].tolist()
    return {"mean": float(total.mean()),
            "quantiles": {f"{q:g}": float(np.quantile(total, q, method="inverted_cdf")) for q in _QUANTILES},
            "table": [{"from": low, "to": high, "entities": count} for low, high, count in stats.degree_table(total)],
            "hubs": [{"entity": name_by_items(graph, links, e), "id": graph.entity_ids[e],
                      "head_of": int(degree[0, e]), "tail_of": int(degree[1, e])} for e in hubs]}


def _types(graph: Graph, types: Types, ends: Sequence[EndTypes]) -> dict[str, Any]:
    if not types.said_by:
        return {}
    several = np.flatnonzero(types.count > 1)
    first = [{"entity": entity_label(graph, e), "types": [types.names[t] for t in types.of[[e]].indices]}
             for e in several[:_SHOWN].tolist()]
    at_odds = [{"relation": graph.relation_names[e.relation], "end": e.end, "typed": e.typed, "type": e.leading,
                "share": e.share, "looks_wrong": e.share >= _SURE, "such_as": entity_label(graph, e.odd)}
               for e in ends if e.odd >= 0]
    return {"said_by": list(types.said_by), "types": len(types.names), "typed_entities": int((types.count > 0).sum()),
            "in_several": len(several), "first_in_several": first,
            "at_odds": sorted(at_odds, key=lambda f: -f["share"])}


def _provenance(folder: pathlib.Path, said: Provenance) -> dict[str, Any]:
    files = dict(said.files) or {path.name: -1 for path in rdf_files(folder)}  # RDF: the reader's notes have counts
    sure = said.confidence
    out: dict[str, Any] = {"files": files, "sources": dict(said.sources), "stated_by_several": said.several}
    if len(sure):
        out["confidence"] = {"rows": len(sure), "lowest": float(sure.min()), "mean": float(sure.mean()),
                             "below_1": int((sure < 1).sum())}
    return out
