"""A graph as the graph stage sees it: its parts, its training queries, its known answers."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import numpy as np

from kgrec_jax.data.dataset import Graph
from kgrec_jax.data.graph import merge_inverse_relations
from kgrec_jax.data.link_batches import LinkRows, hide_entities, hold_out, merge_queries
from kgrec_jax.errors import KgrecError
from kgrec_jax.evaluation.link_prediction import KnownTails
from kgrec_jax.stages.graph_config import Config, check


@dataclasses.dataclass(frozen=True)
class LinkData:
    """A graph as this stage sees it: every fact stated once, some pairs held out."""

    graph: Graph
    part: np.ndarray  # [T] int8: 0 train, 1 valid, 2 test
    split: Literal["given", "held out by pairs", "unseen entities"]  # how the parts were made
    rows: LinkRows  # of the training triples

    def triples(self, part: int) -> np.ndarray:
        """[n, 3] triples of one part."""
        return self.graph.triples[self.part == part]

    @functools.cached_property
    def seen(self) -> np.ndarray:
        """[N] bool: whether an entity is in a training triple."""
        seen = np.zeros(self.graph.num_entities, bool)
        seen[self.triples(0)[:, [0, 2]]] = True
        return seen

    @functools.cached_property
    def known(self) -> KnownTails:
        """Every true answer of every part, for the filtered setting."""
        return KnownTails.of(self.graph.triples, self.graph.num_relations)


def training_graph(graph: Graph) -> tuple[Graph, list[str]]:
    """The graph that the tables of this stage belong to (inverse relations merged), and what was merged, in lines."""
    merged, report = merge_inverse_relations(graph)
    return merged, report.lines()


def link_data(cfg: Config, graph: Graph, seed: int) -> LinkData:
    """The parts of `graph` (given, held out by pairs, or by entities) and the training queries.

    With `unseen_share` the triples of hidden entities are the held-out parts, whatever split the folder gives.
    """
    check(cfg)  # here too, because the estimate at the start of a run asks first
    given = bool(graph.part.any()) and not cfg.unseen_share
    if cfg.unseen_share:
        part = hide_entities(graph.triples, graph.num_entities, cfg.unseen_share, seed=seed)
    elif given:
        part = graph.part
    else:
        part = hold_out(graph.triples, cfg.valid_share, cfg.test_share, seed=seed, limit=cfg.heldout_limit)
    if not (part == 0).any():
        raise KgrecError(f"graph: found no triple to train on among {len(part):,} ({(part == 1).sum():,} validation, "
                         f"{(part == 2).sum():,} test), expected at least one; lower graph.unseen_share or add some")
    kind = "given" if given else "unseen entities" if cfg.unseen_share else "held out by pairs"
    return LinkData(graph, part, kind, merge_queries(graph.triples[part == 0], graph.num_relations, cfg.tails))
