"""Training the towers that several domains share: what a step reads, the loss, and what it leaves for each domain."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kgrec_jax import losses, train
from kgrec_jax.data.dataset import Interactions
from kgrec_jax.data.domains import Union
from kgrec_jax.data.graph import edges
from kgrec_jax.data.history_batches import HistoryBatch, HistoryBatches
from kgrec_jax.models.domain_towers import DomainPart, DomainTowers, HeadsConfig
from kgrec_jax.models.tower_config import TowerConfig
from kgrec_jax.models.towers import FREE, ItemFeatures
from kgrec_jax.optim import make_optimizer
from kgrec_jax.sharding import REPLICATED
from kgrec_jax.stages import fuse_towers
from kgrec_jax.stages.fuse_towers import TowerTraining
from kgrec_jax.stages.graph import training_graph


@dataclasses.dataclass(frozen=True)
class Content:
    """What the towers read of the items beside who touched them."""

    union: Union
    text: np.ndarray | None  # [I, d] float32, 0 where an item has no text
    entity: np.ndarray | None  # [N, De] table V over the distinct entities of all domains
    relation: np.ndarray | None  # [2R, De] table U

    def features(self, logs: Mapping[str, Interactions]) -> ItemFeatures:
        """What the item tower reads; free rows are present for the items of the logs alone.

        An item's own vector and its edges are those of its entity, so two items that are one entity have the same.
        """
        union, entity, relation = self.union, self.entity, self.relation
        dense = {} if self.text is None else {"text": self.text}
        dense |= {name: np.where(present[:, None], vectors, 0.0).astype(np.float32)
                  for name, (vectors, present) in union.media.items()}
        head, edge_relation, tail = (np.zeros(0, np.int32),) * 3 if entity is None else item_edges(union)
        none = np.zeros((1, 1), np.float32)
        table = none if entity is None else np.concatenate([entity[union.item_entity], entity])  # [I + N, De]
        present = {name: np.abs(vectors).sum(1) > 0 for name, vectors in dense.items()}
        present["graph"] = np.isin(np.arange(union.num_items), head)
        present[FREE] = np.concatenate([np.isin(np.arange(stop - start), logs[name].item) for name, start, stop in
                                        zip(union.names, union.starts, union.starts[1:], strict=False)])
        return jax.tree.map(jnp.asarray, ItemFeatures(
            vectors=dense, present=present, entity=table, relation=none if relation is None else relation, head=head,
            edge_relation=edge_relation, tail=tail))


def item_edges(union: Union) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(head, relation, tail), each [E] int32, of the edges that leave the items' entities, sorted by head.

    Heads are item rows; a tail is a row of the table in which the items' own vectors come first: I + its entity.
    """
    head, relation, tail = edges(training_graph(union.graph)[0])
    first = np.searchsorted(head, union.item_entity)
    count = np.searchsorted(head, union.item_entity, side="right") - first  # [I]
    start = np.cumsum(count) - count
    edge = np.repeat(first - start, count) + np.arange(int(count.sum()))
    heads = np.repeat(np.arange(union.num_items), count)
    return heads.astype(np.int32), relation[edge], (union.num_items + tail[edge]).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class DomainBatches:
    """Step -> a batch of each domain, as many users of each in every step."""

    sources: tuple[HistoryBatches, ...]

    def __len__(self) -> int:
        return len(self.sources[0])

    def __getitem__(self, step: int) -> tuple[HistoryBatch, ...]:
        return tuple(source[step] for source in self.sources)


def batches(shape: TowerConfig, cfg: TowerTraining, steps: int, union: Union, logs: Mapping[str, Interactions],
            seed: int) -> DomainBatches:
    """What the towers learn from: the users of each domain, drawn as its own towers would draw them."""
    return DomainBatches(tuple(
        fuse_towers.batches(shape, cfg.batch, steps, logs[name], stop - start, seed)
        for name, start, stop in zip(union.names, union.starts, union.starts[1:], strict=False)))


def init(model: DomainTowers, features: ItemFeatures, key: jax.Array) -> Any:
    """Parameters of the shared towers and of every domain's heads."""
    return model.init(key, features, [np.full((1, 1), -1, np.int32)] * (len(model.starts) - 1))["params"]


def loss(cfg: TowerTraining, model: DomainTowers, params: Any, features: ItemFeatures,
         batch: tuple[HistoryBatch, ...], key: jax.Array) -> tuple[jax.Array, dict]:
    """Mean over the domains of λ_rec L_REC + λ_cf L_CF, each the mean over a domain's users in the batch.

    A domain's users are told their targets from the items of that domain alone. L_CF as in `fuse_towers.loss`.
    """
    told = model.apply({"params": params}, features, [b.history for b in batch], deterministic=False,
                       rngs={"dropout": key})
    total, metrics = jnp.zeros(()), {}
    for domain, (b, (users, items)) in enumerate(zip(batch, told, strict=True)):
        count = (b.weights.sum(1) > 0).sum().astype(jnp.float32)
        rec = losses.table_cross_entropy(users, items, b.targets, weights=b.weights).sum()
        free = params["items"]["item_embeddings"][model.starts[domain]:model.starts[domain + 1]]  # [I_d, D]
        mask = (b.history >= 0).astype(jnp.float32)  # [B, H]
        mean = (jnp.take(free, jnp.maximum(b.history, 0), axis=0) * mask[..., None]).sum(1)
        mean = mean / jnp.maximum(mask.sum(1, keepdims=True), 1.0)
        cf = losses.table_cross_entropy(mean * 10.0, free, b.targets, weights=b.weights).sum()
        total = total + (cfg.rec_weight * rec + cfg.cf_weight * cf) / jnp.maximum(count, 1.0)
        metrics[f"rec_loss_{domain}"] = (rec, count)
    return total / len(batch), metrics


def fit_shared(shape: TowerConfig, heads: HeadsConfig, cfg: TowerTraining, steps: int, content: Content,
               logs: Mapping[str, Interactions], folder: pathlib.Path, run: Any, seed: int) -> dict[str, DomainPart]:
    """{domain: its part of the score} of towers trained on one log of each; checkpoints go to `folder`."""
    union = content.union
    features = content.features(logs)
    source = batches(shape, cfg, steps, union, logs, seed)
    model = DomainTowers(shape, heads, union.starts)
    fitted = train.fit(
        workdir=folder, init_fn=lambda key: init(model, features, key), loss_fn=functools.partial(loss, cfg, model),
        constants=features, source=source, tx=make_optimizer(cfg.optim, steps), seed=seed, mesh=run.mesh,
        rules=REPLICATED, log_every=cfg.log_every, checkpoint_every=cfg.checkpoint_every,
        label=f"domains {folder.parent.name} {folder.name}", tracker=run.tracker)
    params = jax.device_get(fitted.params)
    known = np.any([np.asarray(p) for n, p in features.present.items() if n != "graph" or len(features.head)], axis=0)

    def apply(method: Any, *args: Any) -> np.ndarray:
        return np.asarray(jax.jit(functools.partial(model.apply, method=method),
                                  static_argnums=tuple(n + 1 for n, a in enumerate(args) if isinstance(a, int)))(
                                      {"params": params}, *args))

    vectors = apply(DomainTowers.item_vectors, features)
    parts = {}
    for domain, (name, start, stop) in enumerate(zip(union.names, union.starts, union.starts[1:], strict=False)):
        own = vectors[start:stop]
        parts[name] = DomainPart(shape, heads, union.starts, domain, params, own,
                                 apply(DomainTowers.domain_items, own, domain), known[start:stop])
    return parts
