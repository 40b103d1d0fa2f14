"""Training the towers of the fused score on one log: what is learned from it, the loss, and what they leave."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kgrec_jax import losses, train
from kgrec_jax.data.dataset import Interactions
from kgrec_jax.data.history_batches import (
    CandidateBatch,
    CandidateBatches,
    HistoryBatch,
    HistoryBatches,
    PlaceBatch,
    PlaceBatches,
)
from kgrec_jax.data.loader import Source
from kgrec_jax.models.recommender import TowerPart
from kgrec_jax.models.tower_config import TowerConfig
from kgrec_jax.models.towers import ItemFeatures, RowEdges, Towers
from kgrec_jax.optim import OptimConfig, make_optimizer
from kgrec_jax.sharding import REPLICATED, Rules

TOWER_RULES: Rules = REPLICATED  # the towers are small: every device has them whole


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


def batches(shape: TowerConfig, batch: int, steps: int, log: Interactions, num_items: int, seed: int,
            multiple: int = 1) -> Source:
    """What the towers learn from in each step; `multiple`: of devices."""
    weight = None if shape.rating_weight == "none" else rating_weights(log)
    if shape.trained_on == "hidden-share":
        source: HistoryBatches | PlaceBatches = HistoryBatches.of(
            log, num_steps=steps, batch=batch, max_history=shape.max_history, seed=seed, weight=weight)
    else:
        source = PlaceBatches.of(log, shape.trained_on, num_steps=steps, batch=batch, max_history=shape.max_history,
                                 mask_share=shape.mask_share, seed=seed, weight=weight)
    if not shape.candidates:
        return source
    popularity = np.bincount(log.item, minlength=num_items)
    return CandidateBatches.of(source, popularity, shape.candidates, shape.candidate_power, multiple)


def rating_weights(log: Interactions) -> np.ndarray:
    """[n] float32: each rating over the mean rating, so that a target counts 1 on average."""
    return log.rating / np.maximum(log.rating.mean(dtype=np.float64), 1e-9).astype(np.float32)


def row_edges(features: ItemFeatures, rows: int) -> RowEdges:
    """Room for the edges of any so many items: for those of the items that have the most."""
    count = np.sort(np.bincount(np.asarray(features.head))) if features.head.shape[0] else np.zeros(1, np.int64)
    return RowEdges(max(1, int(count[-rows:].sum())))


def init(model: Towers, features: ItemFeatures, key: jax.Array) -> Any:
    """Parameters of the towers."""
    return model.init(key, features, np.full((1, 1), -1, np.int32))["params"]


def loss(cfg: TowerTraining, model: Towers, params: Any, features: ItemFeatures,
         batch: HistoryBatch | PlaceBatch | CandidateBatch, key: jax.Array) -> tuple[jax.Array, dict]:
    """λ_rec L_REC + λ_cf L_CF, means over the batch's users (of places: over the targets), and each as (sum, count).

    L_CF tells the targets from the mean free row of what is shown; of next items the last, which alone is not shown.
    L_MLM has no part in it: the encoder is frozen here, so there is nothing that it could train.
    """
    drawn = isinstance(batch, CandidateBatch)
    told, rows = (batch.told, batch.rows) if drawn else (batch, None)

    def against(queries: jax.Array, table: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        if drawn:
            return losses.sampled_cross_entropy(queries, table, targets, batch.candidates, batch.log_q, weights=weights)
        return losses.table_cross_entropy(queries, table, targets, weights=weights)

    apply = functools.partial(model.apply, {"params": params}, features, told.history, rngs={"dropout": key})
    if isinstance(told, HistoryBatch):
        users, items = apply(deterministic=False, rows=rows)
        rec = against(users, items, told.targets, told.weights)  # [B]
        count = (told.weights.sum(1) > 0).sum().astype(jnp.float32)
        cf_targets, cf_weights, cf_count, cf_scale = told.targets, told.weights, count, 1.0
    else:
        users, items = apply(told.place, deterministic=False, rows=rows, method=Towers.at_places)  # [B, T, D]
        rec = against(users.reshape(-1, users.shape[-1]), items, told.targets.reshape(-1), told.weights.reshape(-1))
        count = told.weights.sum()
        last = slice(-1, None) if model.cfg.trained_on == "next-item" else slice(None)
        cf_targets, cf_weights = told.targets[:, last], told.weights[:, last]
        cf_count = cf_weights.sum()
        cf_scale = count / jnp.maximum(cf_count, 1.0)
    free = params["items"]["item_embeddings"]
    if rows is not None:
        free = jnp.take(free, jnp.maximum(rows, 0), axis=0)
    mask = (told.history >= 0).astype(jnp.float32)  # [B, H]
    mean = (jnp.take(free, jnp.maximum(told.history, 0), axis=0) * mask[..., None]).sum(1)
    mean = mean / jnp.maximum(mask.sum(1, keepdims=True), 1.0)
    cf = against(mean * 10.0, free, cf_targets, cf_weights)
    total = (rec.sum() + cfg.cf_weight * cf_scale * cf.sum()) / jnp.maximum(count, 1.0)
    return total, {"rec_loss": (rec.sum(), count), "cf_loss": (cf.sum(), cf_count)}


def fit_towers(shape: TowerConfig, cfg: TowerTraining, features: ItemFeatures, log: Interactions, folder: pathlib.Path,
               run: Any, seed: int) -> TowerPart:
    """The towers trained on one log; checkpoints and metrics go to `folder`."""
    num_items, steps = run.dataset.num_items, cfg.num_steps(len(np.unique(log.user)))
    source = batches(shape, cfg.batch, steps, log, num_items, seed, run.mesh.shape["data"])
    edges = row_edges(features, source.num_rows) if isinstance(source, CandidateBatches) else None
    model = Towers(shape, num_items, edges)
    fitted = train.fit(
        workdir=folder, init_fn=lambda key: init(model, features, key), loss_fn=functools.partial(loss, cfg, model),
        constants=features, source=source, tx=make_optimizer(cfg.optim, steps), seed=seed, mesh=run.mesh,
        rules=TOWER_RULES, log_every=cfg.log_every, checkpoint_every=cfg.checkpoint_every,
        label=f"fuse {folder.name}", tracker=run.tracker)
    params = jax.device_get(fitted.params)
    item_parts = jax.jit(functools.partial(model.apply, method=Towers.item_parts))
    parts = jax.device_get(item_parts({"params": params}, features))
    known = np.any([np.asarray(p) for n, p in features.present.items() if n in parts], axis=0)
    return TowerPart(shape, params, np.asarray(sum(parts.values())), parts, known)
