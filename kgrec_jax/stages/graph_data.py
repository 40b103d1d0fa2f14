"""A graph as the graph stage sees it: its parts, its training queries, its known answers."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from kgrec_jax.data.dataset import Graph
from kgrec_jax.data.graph import merge_inverse_relations
from kgrec_jax.data.link_batches import LinkRows, hold_out, merge_queries
from kgrec_jax.evaluation.link_prediction import KnownTails
from kgrec_jax.stages.graph_config import Config, check


@dataclasses.dataclass(frozen=True)
class LinkData:
    """A graph as this stage sees it: every fact stated once, some pairs held out."""

    graph: Graph
    part: np.ndarray  # [T] int8: 0 train, 1 valid, 2 test
    given_split: bool
    rows: LinkRows  # of the training triples

    def triples(self, part: int) -> np.ndarray:
        """[n, 3] triples of one part."""
        return self.graph.triples[self.part == part]

    @functools.cached_property
    def known(self) -> KnownTails:
        """Every true answer of every part, for the filtered setting."""
        return KnownTails.of(self.graph.triples, self.graph.num_relations)


def training_graph(graph: Graph) -> tuple[Graph, list[str]]:
    """The graph that the tables of this stage belong to, and what was merged into what, in lines.

    Relations that state each other's facts the other way round are merged, unless the folder gives a split: then its
    test triples are a benchmark's, and every one of them counts.
    """
    if graph.part.any():
        return graph, []
    merged, report = merge_inverse_relations(graph)
    return merged, report.lines()


def link_data(cfg: Config, graph: Graph, seed: int) -> LinkData:
    """The parts of `graph` (given, or held out by pairs) and the training queries."""
    check(cfg)  # here too, because the estimate at the start of a run asks first
    given = bool(graph.part.any())
    part = graph.part if given else hold_out(graph.triples, cfg.valid_share, cfg.test_share, seed=seed,
                                             limit=cfg.heldout_limit)
    rows = merge_queries(graph.triples[part == 0], graph.num_relations, cfg.tails)
    return LinkData(graph, part, given, rows)
