"""Training the towers of the fused score on one log: what is learned from it, the loss, and what they leave."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

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
from kgrec_jax.models.towers import Fresh, ItemFeatures, RowEdges, Towers
from kgrec_jax.optim import OptimConfig, make_optimizer
from kgrec_jax.sharding import REPLICATED, Rules

TOWER_RULES: Rules = REPLICATED  # the towers are small: every device has them whole
UNCERTAINTY = "loss_log_variance"  # in the trained tree, beside the towers': {term: s}


@dataclasses.dataclass(frozen=True)
class TowerTraining:
    """How the towers are trained: the fields of fuse.Config that are about it."""

    steps: int
    batch: int
    optim: OptimConfig
    cf_weight: float
    log_every: int
    checkpoint_every: int
    rec_weight: float = 1.0
    mlm_weight: float = 0.0  # only where the encoder learns along
    loss_weights: Literal["fixed", "uncertainty"] = "fixed"

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


def init(cfg: TowerTraining, model: Towers, features: ItemFeatures, key: jax.Array, with_words: bool = False) -> Any:
    """Parameters of the towers, and of the loss where its weights are learned; `with_words`: L_MLM is a term of it."""
    params = model.init(key, features, np.full((1, 1), -1, np.int32))["params"]
    if cfg.loss_weights == "fixed":
        return params
    first = {"rec": cfg.rec_weight, "cf": cfg.cf_weight, **({"mlm": cfg.mlm_weight} if with_words else {})}
    return {**params, UNCERTAINTY: {term: jnp.float32(-np.log(weight)) for term, weight in first.items() if weight > 0}}


def towers_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """What `init` made without the parameters of the loss."""
    return {name: tree for name, tree in params.items() if name != UNCERTAINTY}


def term_weights(cfg: TowerTraining, params: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """({term: its weight in the loss}, what the weights themselves add to it) for the terms rec, cf and mlm.

    fixed: the λ of the config. uncertainty: exp(−s) with Σ s/2 added, s = log σ² learned (Kendall, Gal & Cipolla 2018,
    equation 10, whose terms of classification are L/σ² + log σ); at a constant L the optimum is s = log 2L. It begins
    at the λ of the config, and a term with a λ of 0 stays out.
    """
    fixed = {"rec": cfg.rec_weight, "cf": cfg.cf_weight, "mlm": cfg.mlm_weight}
    if UNCERTAINTY not in params:
        return fixed, 0.0
    learned = params[UNCERTAINTY]
    weights = {term: jnp.exp(-learned[term]) if term in learned else 0.0 for term in fixed}
    return weights, sum(learned.values()) / 2.0


def loss(cfg: TowerTraining, model: Towers, params: Any, features: ItemFeatures,
         batch: HistoryBatch | PlaceBatch | CandidateBatch, key: jax.Array, fresh: Fresh | None = None,
         words: tuple[jax.Array, jax.Array] | None = None) -> tuple[jax.Array, dict]:
    """λ_rec L_REC + λ_cf L_CF (+ λ_mlm L_MLM), means over the batch's users (of places: over the targets; of words:
    over those that are hidden), and each as (sum, count) beside its weight.

    L_CF tells the targets from the mean free row of what is shown; of next items the last, which alone is not shown.
    `fresh`: vectors that the step itself has made; `words`: (sum, count) of L_MLM, of an encoder that learns along.
    """
    drawn = isinstance(batch, CandidateBatch)
    told, rows = (batch.told, batch.rows) if drawn else (batch, None)

    def against(queries: jax.Array, table: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        if drawn:
            return losses.sampled_cross_entropy(queries, table, targets, batch.candidates, batch.log_q, weights=weights)
        return losses.table_cross_entropy(queries, table, targets, weights=weights)

    apply = functools.partial(model.apply, {"params": towers_of(params)}, features, told.history,
                              rngs={"dropout": key}, deterministic=False, rows=rows, fresh=fresh)
    if isinstance(told, HistoryBatch):
        users, items = apply()
        rec = against(users, items, told.targets, told.weights)  # [B]
        count = (told.weights.sum(1) > 0).sum().astype(jnp.float32)
        cf_targets, cf_weights, cf_count, cf_scale = told.targets, told.weights, count, 1.0
    else:
        users, items = apply(told.place, method=Towers.at_places)  # [B, T, D]
        rec = against(users.reshape(-1, users.shape[-1]), items, told.targets.reshape(-1), told.weights.reshape(-1))
        count = told.weights.sum()
        last = slice(-1, None) if model.cfg.trained_on == "next-item" else slice(None)
        cf_targets, cf_weights = told.targets[:, last], told.weights[:, last]
        cf_count = cf_weights.sum()
        cf_scale = count / jnp.maximum(cf_count, 1.0)
    cf = against(*_shown_free_rows(params["items"]["item_embeddings"], told.history, rows), cf_targets, cf_weights)
    weights, more = term_weights(cfg, params)
    total = (weights["rec"] * rec.sum() + weights["cf"] * cf_scale * cf.sum()) / jnp.maximum(count, 1.0) + more
    means = {"rec": (rec.sum(), count), "cf": (cf.sum(), cf_count)}
    if words is not None:
        means["mlm"] = words
        total = total + weights["mlm"] * words[0] / jnp.maximum(words[1], 1.0)
    return total, {f"{term}_loss": mean for term, mean in means.items()} | {
        f"{term}_weight": jnp.asarray(weights[term], jnp.float32) for term in means}


def _shown_free_rows(free: jax.Array, history: jax.Array, rows: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """(ten times the mean free row of what a history shows [B, D], the free rows that targets are told from)."""
    if rows is not None:
        free = jnp.take(free, jnp.maximum(rows, 0), axis=0)
    mask = (history >= 0).astype(jnp.float32)  # [B, H]
    mean = (jnp.take(free, jnp.maximum(history, 0), axis=0) * mask[..., None]).sum(1)
    mean = mean / jnp.maximum(mask.sum(1, keepdims=True), 1.0)
    return mean * 10.0, free


def tower_part(model: Towers, params: Any, features: ItemFeatures) -> TowerPart:
    """What trained towers leave: the items' vectors, made once, and what makes users' vectors."""
    params = towers_of(params)
    item_parts = jax.jit(functools.partial(model.apply, method=Towers.item_parts))
    parts = jax.device_get(item_parts({"params": params}, features))
    known = np.any([np.asarray(p) for n, p in features.present.items() if n in parts], axis=0)
    return TowerPart(model.cfg, params, np.asarray(sum(parts.values())), parts, known)


def fit_towers(shape: TowerConfig, cfg: TowerTraining, features: ItemFeatures, log: Interactions, folder: pathlib.Path,
               run: Any, seed: int) -> TowerPart:
    """The towers trained on one log; checkpoints and metrics go to `folder`."""
    num_items, steps = run.dataset.num_items, cfg.num_steps(len(np.unique(log.user)))
    source = batches(shape, cfg.batch, steps, log, num_items, seed, run.mesh.shape["data"])
    edges = row_edges(features, source.num_rows) if isinstance(source, CandidateBatches) else None
    model = Towers(shape, num_items, edges)
    fitted = train.fit(
        workdir=folder, init_fn=lambda key: init(cfg, model, features, key), constants=features,
        loss_fn=functools.partial(loss, cfg, model), source=source, tx=make_optimizer(cfg.optim, steps), seed=seed,
        mesh=run.mesh, rules=TOWER_RULES, log_every=cfg.log_every, checkpoint_every=cfg.checkpoint_every,
        label=f"fuse {folder.name}", tracker=run.tracker)
    return tower_part(model, jax.device_get(fitted.params), features)
