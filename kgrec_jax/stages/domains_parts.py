"""What towers of several domains are made from and leave: the tables of the graph, the texts, a part for each domain.

The control of a domain is made by the same functions from a union of that domain alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from kgrec_jax import checkpoint
from kgrec_jax.data.domains import Union
from kgrec_jax.models.domain_towers import DomainPart
from kgrec_jax.stages import graph, item_features
from kgrec_jax.stages.domains_config import DomainsExperiment
from kgrec_jax.stages.domains_towers import Content, fit_shared
from kgrec_jax.stages.fuse_cut import inner_cut
from kgrec_jax.workdir import Run


@dataclasses.dataclass(frozen=True)
class SharedRun(Run):
    """The run folder of what domains share; its data are the union of theirs."""

    union: Union

    @functools.cached_property
    def dataset(self) -> Union:
        """What the stages ask of a data set that has no log: the items' words and the graph."""
        return self.union


@dataclasses.dataclass(frozen=True)
class Trained:
    """One domain's part of towers that were trained twice."""

    inner: DomainPart  # on the inner cuts: what a gate is learned with
    final: DomainPart  # on all that the splits leave to fit


def trained_parts(experiment: DomainsExperiment, run: SharedRun, alone: Mapping[str, Run], steps: int,
                  text: np.ndarray | None) -> dict[str, Trained]:
    """{domain: its part} of towers over the domains of `run`; `alone` has the ordinary run of each.

    text [I, d]: vectors of the union's items. No interaction that a domain holds out is in any of the trainings.
    """
    _train_tables(experiment, run)
    content, cfg = Content(run.union, text, *_tables(run)), experiment.fuse
    fit = functools.partial(fit_shared, cfg.tower, experiment.domains.heads, cfg.training, steps, content, run=run,
                            seed=experiment.seed)
    inner = fit({name: inner_cut(base.split, cfg.gate.inner_share, experiment.seed).fit
                 for name, base in alone.items()}, run.stage("towers_inner"))
    final = fit({name: base.split.fit for name, base in alone.items()}, run.stage("towers"))
    return {name: Trained(inner[name], final[name]) for name in alone}


def union_texts(experiment: DomainsExperiment, run: SharedRun, alone: Mapping[str, Run]) -> np.ndarray | None:
    """[I, d] vectors of all items' texts by the released encoder, or n-grams where it does not know the language.

    Where every domain's own run read its texts with that encoder, these are taken over and nothing is read twice.
    """
    held = run.stage("fuse") / "text.npz"
    if not held.is_file():
        own = [item_features.read_texts(base.experiment, base, None, None) for base in alone.values()]
        if all(source == item_features.RELEASED for _, source, _ in own):
            vectors = np.concatenate([vectors for vectors, _, _ in own])
            item_features.save_texts(held, vectors, item_features.RELEASED, {})
    return item_features.read_texts(experiment.ordinary, run, None, None)[0]


def of_domain(union: Union, name: str, rows: Any) -> Any:
    """The piece [I_d, …] of one domain of rows [I, …] over the items of all; None of None."""
    at = union.names.index(name)
    return None if rows is None else rows[union.starts[at]:union.starts[at + 1]]


def _train_tables(experiment: DomainsExperiment, run: SharedRun) -> None:
    """Tables V and U of the union, by the structural scorer alone."""
    cfg = dataclasses.replace(
        experiment.graph, encoder_mode="off", rules="off", unseen_share=0.0, text_eval=1, mixture_triples=1,
        bi_encoder=dataclasses.replace(experiment.graph.bi_encoder, mode="off"))
    run.ensure("graph", lambda _, held: graph.run(dataclasses.replace(held.experiment, graph=cfg), held))


def _tables(run: SharedRun) -> tuple[np.ndarray | None, np.ndarray | None]:
    folder = run.stage("graph") / "tables"
    if not folder.is_dir():
        return None, None
    held = checkpoint.load_tree(folder)
    return np.asarray(held["entity"], np.float32), np.asarray(held["relation"], np.float32)
