"""Fitting the parts of the fused score on one log: the closed forms, the towers, and what they are chosen by."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp

from kgrec_jax import losses, train
from kgrec_jax.data.dataset import Interactions
from kgrec_jax.data.history_batches import HistoryBatch, HistoryBatches
from kgrec_jax.linear import ridge
from kgrec_jax.linear.choose import LinearChoice
from kgrec_jax.linear.ease import ease
from kgrec_jax.linear.neighbours import item_knn, user_knn
from kgrec_jax.linear.parts import Constant, Factors, Part
from kgrec_jax.linear.popularity import popularity
from kgrec_jax.linear.spectral import spectral
from kgrec_jax.models.recommender import TOWER, FusedModel, Scale, TowerPart
from kgrec_jax.models.towers import FREE, ItemFeatures, TowerConfig, Towers
from kgrec_jax.optim import OptimConfig, make_optimizer
from kgrec_jax.sharding import REPLICATED, Rules
from kgrec_jax.stages import item_features
from kgrec_jax.stages.fuse_propagation import Propagator
from kgrec_jax.stages.item_features import ItemContent

TOWER_RULES: Rules = REPLICATED  # the towers are small: every device has them whole
ROW_ONLY = ("ease",)  # closed forms that are measured beside the fused score and are no part of it


@dataclasses.dataclass(frozen=True)
class TowerTraining:
    """How the towers are trained: the fields of fuse.Config that are about it."""

    steps: int
    batch: int
    optim: OptimConfig
    cf_weight: float
    log_every: int
    checkpoint_every: int

    def num_steps(self, num_users: int) -> int:
        """Steps for so many users with a history."""
        return self.steps or int(np.clip(40 * num_users // self.batch, 300, 1200))


def init(model: Towers, features: ItemFeatures, key: jax.Array) -> Any:
    """Parameters of the towers."""
    return model.init(key, features, np.full((1, 1), -1, np.int32))["params"]


def loss(cfg: TowerTraining, model: Towers, params: Any, features: ItemFeatures, batch: HistoryBatch,
         key: jax.Array) -> tuple[jax.Array, dict]:
    """λ_rec L_REC + λ_cf L_CF, means over the batch's users, and each term as (sum, count).

    L_MLM has no part in it: the encoder is frozen here, so there is nothing that it could train.
    """
    users, items = model.apply({"params": params}, features, batch.history, False, rngs={"dropout": key})
    rec = losses.table_cross_entropy(users, items, batch.targets, weights=batch.weights)  # [B]
    free = params["items"]["item_embeddings"]
    mask = (batch.history >= 0).astype(jnp.float32)  # [B, H]
    mean = (jnp.take(free, jnp.maximum(batch.history, 0), axis=0) * mask[..., None]).sum(1)
    mean = mean / jnp.maximum(mask.sum(1, keepdims=True), 1.0)
    cf = losses.table_cross_entropy(mean * 10.0, free, batch.targets, weights=batch.weights)
    count = (batch.weights.sum(1) > 0).sum().astype(jnp.float32)
    total = (rec.sum() + cfg.cf_weight * cf.sum()) / jnp.maximum(count, 1.0)
    return total, {"rec_loss": (rec.sum(), count), "cf_loss": (cf.sum(), count)}


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
    with_ease: bool
    seed: int
    propagator: Propagator | None = None

    @property
    def num_items(self) -> int:
        """I."""
        return self.run.dataset.num_items

    def closed_forms(self, log: Interactions) -> dict[str, Part]:
        """The parts without a loop, by name; `ease` is the baseline row, `collaborative` the part of the score."""
        matrix, choice = log.matrix(self.run.dataset.num_users, self.num_items), self.linear
        out: dict[str, Part] = {
            "popularity": popularity(matrix), "item-knn": item_knn(matrix, choice.item_neighbours),
            "user-knn": user_knn(matrix, choice.user_neighbours), "spectral": spectral(matrix, choice.rank)}
        if self.with_ease:
            out["ease"] = out["collaborative"] = ease(matrix, choice.plain_ease_l2)
            if (choice.ease_l2, choice.ease_dropout) != (choice.plain_ease_l2, 0.0):
                out["collaborative"] = ease(matrix, choice.ease_l2, choice.ease_dropout)
        if self.kernel is not None:
            out["features"] = ridge.content(out["collaborative"], self.kernel, self.content_l2)
            base = out["popularity"]
            values = ridge.predicted(base.values, base.known, self.kernel, self.content_l2)
            out["expected-popularity"] = Constant(values, np.diagonal(self.kernel) > 0)
        if self.content.links is not None:
            out["graph"] = _profile(item_features.unit_rows(self.content.links))
        if self.content.text is not None:
            out["text"] = _profile(item_features.unit_rows(item_features.centred(self.content.text)))
        return out

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
        cfg = self.training
        steps = cfg.num_steps(len(np.unique(log.user)))
        model, features = Towers(self.shape, self.num_items), self.features(log)
        source = HistoryBatches.of(log, num_steps=steps, batch=cfg.batch, max_history=self.shape.max_history,
                                   seed=self.seed)
        fitted = train.fit(
            workdir=folder, init_fn=lambda key: init(model, features, key), loss_fn=functools.partial(loss, cfg, model),
            constants=features, source=source, tx=make_optimizer(cfg.optim, steps), seed=self.seed, mesh=self.run.mesh,
            rules=TOWER_RULES, log_every=cfg.log_every, checkpoint_every=cfg.checkpoint_every,
            label=f"fuse {folder.name}", tracker=self.run.tracker)
        params = jax.device_get(fitted.params)
        item_parts = jax.jit(functools.partial(model.apply, method=Towers.item_parts))
        parts = jax.device_get(item_parts({"params": params}, features))
        known = np.any([np.asarray(p) for n, p in features.present.items() if n in parts], axis=0)
        return TowerPart(self.shape, params, np.asarray(sum(parts.values())), parts, known)

    def model(self, log: Interactions, folder: pathlib.Path, gate: Any) -> tuple[FusedModel, dict[str, Part]]:
        """(the fused model on one log under a gate, all its parts but the towers by name)."""
        parts = self.closed_forms(log)
        if self.propagator is not None:
            parts[self.propagator.shape.kind] = self.propagator.fit(
                self.content.graph, log, folder / "propagation", self.run, self.seed)
        fused = {name: part for name, part in parts.items() if name not in ROW_ONLY}
        matrix = log.matrix(self.run.dataset.num_users, self.num_items)
        tower = self.tower(log, folder)
        return FusedModel(fused, tower, gate, (*fused, TOWER), matrix.getnnz(axis=0), scale_of(matrix)), parts


def _profile(unit: np.ndarray | sp.csr_matrix) -> Factors:
    """Cosine of each item with the sum of the history's unit vectors [I, d]."""
    length = np.asarray(abs(unit).sum(axis=1)).ravel()
    return Factors(unit, sp.csr_matrix(unit.T) if sp.issparse(unit) else np.ascontiguousarray(unit.T), length > 0)


def scale_of(matrix: sp.csr_matrix) -> Scale:
    """Mean and deviation of log history length and log popularity."""
    users, items = np.log1p(matrix.getnnz(axis=1)), np.log1p(matrix.getnnz(axis=0))
    users, items = users[users > 0], items[items > 0]
    return Scale(float(users.mean()), float(users.std() + 1e-6), float(items.mean()), float(items.std() + 1e-6))
