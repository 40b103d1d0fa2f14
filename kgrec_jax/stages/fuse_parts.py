"""Fitting the parts of the fused score on one log: the closed forms, the towers, and what they are chosen by."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp

from kgrec_jax.data.dataset import Interactions
from kgrec_jax.linear import ridge
from kgrec_jax.linear.choose import LinearChoice
from kgrec_jax.linear.ease import ease
from kgrec_jax.linear.neighbours import item_knn, user_knn
from kgrec_jax.linear.parts import Constant, Part
from kgrec_jax.linear.popularity import popularity
from kgrec_jax.linear.spectral import spectral
from kgrec_jax.models.recommender import TOWER, FusedModel, Scale, TowerPart
from kgrec_jax.models.tower_config import TowerConfig
from kgrec_jax.models.towers import FREE, ItemFeatures
from kgrec_jax.stages import item_features
from kgrec_jax.stages.fuse_encoder import EncoderTraining, fit_text_towers
from kgrec_jax.stages.fuse_propagation import Propagator
from kgrec_jax.stages.fuse_rows import FurtherRows, fit_ials, profile
from kgrec_jax.stages.fuse_towers import TowerTraining, fit_towers
from kgrec_jax.stages.item_features import ItemContent

ROW_ONLY = ("ease",)  # closed forms that are measured beside the fused score and are no part of it


@dataclasses.dataclass(frozen=True)
class Fitter:
    """Fits all parts on one log; everything that does not depend on the log is held."""

    shape: TowerConfig
    training: TowerTraining
    run: Any
    content: ItemContent
    kernel: np.ndarray | None  # [I, I] of the chosen features; None without features or without EASE
    content_l2: float
    linear: LinearChoice
    seed: int
    propagator: Propagator | None = None
    further: FurtherRows = FurtherRows()
    without: tuple[str, ...] = ()  # closed forms that are left out, as a log of this size takes them too long
    choice: ridge.Choice | None = None  # how `kernel` was made
    encoder: EncoderTraining | None = None  # what of an encoder learns with the towers; None: nothing
    ensemble: int = 1  # how many towers are trained, each from a beginning of its own, and count together

    @property
    def num_items(self) -> int:
        """I."""
        return self.run.dataset.num_items

    @property
    def with_ease(self) -> bool:
        """Whether EASE is fitted; iALS takes its place."""
        return "ease" not in self.without

    def closed_forms(self, log: Interactions, folder: pathlib.Path) -> dict[str, Part]:
        """The parts of behaviour and content, by name, and the rows that `further` asks for.

        `ease` is the baseline row, `collaborative` the part of the score: EASE, or iALS where EASE cannot be had.
        """
        matrix, choice = log.matrix(self.run.dataset.num_users, self.num_items), self.linear
        out: dict[str, Part] = {"popularity": popularity(matrix)}
        if "item-knn" not in self.without:
            out["item-knn"] = item_knn(matrix, choice.item_neighbours)
        if "user-knn" not in self.without:
            out["user-knn"] = user_knn(matrix, choice.user_neighbours)
        out["spectral"] = spectral(matrix, choice.rank)
        if self.with_ease:
            out["ease"] = out["collaborative"] = ease(matrix, choice.plain_ease_l2)
            if (choice.ease_l2, choice.ease_dropout) != (choice.plain_ease_l2, 0.0):
                out["collaborative"] = ease(matrix, choice.ease_l2, choice.ease_dropout)
        else:
            out["collaborative"] = fit_ials(matrix, choice, folder, self.run, self.seed)
        if self.kernel is not None:
            out["features"] = ridge.content(out["collaborative"], self.kernel, self.content_l2)
            base = out["popularity"]
            values = ridge.predicted(base.values, base.known, self.kernel, self.content_l2)
            out["expected-popularity"] = Constant(values, np.diagonal(self.kernel) > 0)
        if self.content.links is not None:
            out["graph"] = profile(item_features.unit_rows(self.content.links))
        if self.content.text is not None:
            out["text"] = profile(item_features.unit_rows(item_features.centred(self.content.text)))
        return out | self.further.fit(log, matrix, choice, self.content, folder, self.run, self.seed)

    def features(self, log: Interactions) -> ItemFeatures:
        """What the item tower reads; free rows are present for the log's items alone."""
        content = self.content
        head, relation, tail = item_features.item_edges(content, self.num_items)
        dense = {**({"text": content.text} if content.text is not None else {}), **content.media}
        present = {name: np.abs(vectors).sum(1) > 0 for name, vectors in dense.items()}
        present["graph"] = np.isin(np.arange(self.num_items), head)
        present[FREE] = np.isin(np.arange(self.num_items), log.item)
        none = np.zeros((1, 1), np.float32)
        entity = none if content.entity is None else content.entity
        relations = none if content.relation is None else content.relation
        return jax.tree.map(jnp.asarray, ItemFeatures(dense, present, entity, relations, head, relation, tail))

    def tower(self, log: Interactions, folder: pathlib.Path) -> TowerPart:
        """The towers trained on one log; checkpoints and metrics go to `folder`."""
        features = self.features(log)
        if self.encoder is not None:
            return fit_text_towers(self.shape, self.training, self.encoder, features, log, folder, self.run, self.seed)
        places = [(folder, self.seed), *((folder.with_name(f"{folder.name}_{n}"), _member_seed(self.seed, n))
                                         for n in range(1, self.ensemble))]
        first, *others = (fit_towers(self.shape, self.training, features, log, place, self.run, seed)
                          for place, seed in places)
        return dataclasses.replace(first, others=tuple(others))

    def with_texts(self, vectors: np.ndarray) -> Fitter:
        """The same with other text vectors [I, d], under the weights that were chosen for the first ones."""
        content, kernel = dataclasses.replace(self.content, text=vectors), self.kernel
        if self.choice is not None and "text" in self.choice.weights:
            kernel = ridge.combine(kernels_of(content, self.choice.weights), self.choice)
        return dataclasses.replace(self, content=content, kernel=kernel)

    def model(self, log: Interactions, folder: pathlib.Path, gate: Any) -> tuple[FusedModel, dict[str, Part]]:
        """(the fused model on one log under a gate, all its parts but the towers by name).

        What an encoder has learned with the towers, the closed forms read as well: a query and a new item have one
        vector for all.
        """
        tower = None if self.encoder is None else self.tower(log, folder)
        parts = (self if tower is None else self.with_texts(tower.tuned.vectors)).closed_forms(log, folder)
        if self.propagator is not None:
            parts[self.propagator.shape.kind] = self.propagator.fit(
                self.content.graph, log, folder / "propagation", self.run, self.seed)
        apart = {*ROW_ONLY, *self.further.names} - set(self.further.joined)
        if not self.with_ease:
            apart |= {"ials"}  # it is `collaborative` already
        fused = {name: part for name, part in parts.items() if name not in apart}
        matrix = log.matrix(self.run.dataset.num_users, self.num_items)
        tower = tower or self.tower(log, folder)
        return FusedModel(fused, tower, gate, (*fused, TOWER), matrix.getnnz(axis=0), scale_of(matrix)), parts


def _member_seed(seed: int, member: int) -> int:
    """A seed for a member of an ensemble that is no other run's."""
    return int(np.random.SeedSequence([seed, member]).generate_state(1)[0] >> 1)


def kernels_of(content: ItemContent, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """Name -> kernel [I, I] of the content's blocks, of all or of those named."""
    blocks = content.blocks()
    return {name: ridge.kernel(blocks[name]) for name in (blocks if names is None else names)}


def scale_of(matrix: sp.csr_matrix) -> Scale:
    """Mean and deviation of log history length and log popularity."""
    users, items = np.log1p(matrix.getnnz(axis=1)), np.log1p(matrix.getnnz(axis=0))
    users, items = users[users > 0], items[items > 0]
    return Scale(float(users.mean()), float(users.std() + 1e-6), float(items.mean()), float(items.std() + 1e-6))
