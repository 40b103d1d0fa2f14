"""The structure training of the graph stage: a scorer learns entity and relation tables from merged queries.

One row for each distinct (head, relation) with all of its tails, inverse relations included.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kgrec_jax import train
from kgrec_jax.data.dataset import Graph
from kgrec_jax.data.link_batches import LinkBatch, LinkSource
from kgrec_jax.evaluation.link_prediction import ScoreBlock, evaluate_link_prediction
from kgrec_jax.models.graph_embedding import GRAPH_RULES, GraphEmbedding
from kgrec_jax.optim import make_optimizer
from kgrec_jax.sharding import padded_rows
from kgrec_jax.stages.graph_config import Config
from kgrec_jax.stages.graph_data import LinkData

# Floating-point operations of the structure training that take about half a minute on two cores: measured, they come to
# less a second than the encoder's, because gathered rows and passes over the tables wait for memory.
FLOP_BUDGET = 2e12
STRUCTURE_FLOPS = 7e10  # a second
MIN_STEPS = 600
# Adagrad's accumulators begin at 0.1, which is meant for gradients of a batch's sum rather than of its mean.
GRADIENT_SCALE = 2000.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """The steps that follow from the size of the data, and about how long they take on two cores."""

    steps: int
    candidates: int  # 0: all entities are rivals
    seconds: float


def make_plan(cfg: Config, num_rows: int, num_entities: int) -> Plan:
    """Steps and rivals of the structure training for so many query rows and entities."""
    sampled = cfg.rivals in ("sampled", "per-query") or (cfg.rivals == "auto" and num_entities > 8192)
    rivals = cfg.candidates if sampled else num_entities
    # Forward, backward and the second forward of the block-wise loss; then a few passes over the tables.
    products = 6.0 if cfg.rivals == "per-query" else 8.0
    flops = products * cfg.batch * rivals * cfg.dim + 100.0 * num_entities * cfg.dim
    passes = -(-cfg.epochs * num_rows // cfg.batch)
    steps = cfg.steps or int(min(max(passes, MIN_STEPS), max(FLOP_BUDGET // flops, 50)))
    return Plan(steps, cfg.candidates if sampled else 0, 4.0 + steps * max(flops / STRUCTURE_FLOPS, 0.004))


def make_model(cfg: Config, graph: Graph, devices: int) -> GraphEmbedding:
    """Tables for the entities and relations of `graph` on so many devices."""
    return GraphEmbedding(cfg.scorer, cfg.dim, graph.num_entities, graph.num_relations,
                          padded_rows(graph.num_entities, devices), cfg.options)


def structure_loss(cfg: Config, model: GraphEmbedding, tables: dict, batch: LinkBatch,
                   key: jax.Array | None = None) -> tuple[jax.Array, dict]:
    """Mean loss of an answer plus regularisers and relation prediction, and metrics as (sum, count).

    With a key scorers drop what `graph.options` asks for, and one answer a query predicts its relation.
    """
    count = jnp.maximum(batch.weight.sum(), 1.0)
    keys = (None, None) if key is None else tuple(jax.random.split(key))
    if cfg.loss == "margin":
        link = model.margin_losses(tables, batch, margin=cfg.margin, temperature=cfg.adversarial, key=keys[0]).sum()
    else:
        link = model.structure_loss(tables, batch, keys[0])
    loss, metrics = link / count, {"link_loss": (link, count)}
    if cfg.n3:
        loss = loss + cfg.n3 * model.nuclear_3_norms(tables, batch).sum() / count
    if cfg.dura:
        loss = loss + cfg.dura * model.duality_norms(tables, batch).sum() / count
    if cfg.relation_weight:
        relation = model.relation_losses(tables, batch, keys[1]).sum()
        loss, metrics = loss + cfg.relation_weight * relation / count, metrics | {"relation_loss": (relation, count)}
    return loss, metrics


def structure_optimizer(cfg: Config, steps: int) -> optax.GradientTransformation:
    """The optimiser of the structure training."""
    chain = make_optimizer(cfg.optim, steps)
    return optax.chain(optax.scale(GRADIENT_SCALE), chain) if cfg.optim.name == "adagrad" else chain


def structure_scorer(model: GraphEmbedding, tables: dict) -> ScoreBlock:
    """The structural scores of every tail, for `evaluate_link_prediction`."""
    score = jax.jit(model.scores)
    return lambda heads, relations: score(tables, heads, relations)


def evaluate(model: GraphEmbedding, tables: dict, data: LinkData, part: int) -> dict[str, float]:
    """Filtered metrics of the structural scorer on the triples of a part; empty where it has none."""
    triples = data.triples(part)
    if not len(triples):
        return {}
    return evaluate_link_prediction(structure_scorer(model, tables), triples, known=data.known,
                                    num_entities=model.num_entities)


def train_structure(cfg: Config, model: GraphEmbedding, data: LinkData, run: Any, seed: int) -> tuple[dict, dict]:
    """(tables, results) of the structure training."""
    plan = make_plan(cfg, len(data.rows), model.num_entities)
    against = f"{plan.candidates:,} drawn" if plan.candidates else f"all {model.num_entities:,}"
    counts = {name: int((data.part == k).sum()) for k, name in enumerate(("train", "valid", "test"))}
    run.tracker.say(f"graph: {counts['train']:,} triples as {len(data.rows):,} queries, "
                    f"{counts['valid'] + counts['test']:,} held out; {plan.steps:,} steps of {cfg.batch} "
                    f"against {against} entities, about {plan.seconds:.0f} s")
    source = LinkSource(data.rows, batch=cfg.batch, steps=plan.steps, seed=seed, num_entities=model.num_entities,
                        candidates=plan.candidates, shared=cfg.rivals != "per-query")
    fitted = train.fit(
        workdir=run.stage("graph") / "structure", init_fn=model.init, source=source, constants={}, seed=seed,
        mesh=run.mesh, loss_fn=lambda tables, constants, batch, key: structure_loss(cfg, model, tables, batch, key),
        rules=GRAPH_RULES, tx=structure_optimizer(cfg, plan.steps), log_every=cfg.log_every,
        checkpoint_every=cfg.checkpoint_every, label="graph structure", tracker=run.tracker)
    results = {"entities": model.num_entities, "relations": model.num_relations, "triples": counts,
               "split": data.split, "scorer": cfg.scorer, "dim": cfg.dim,
               "structure": {"steps": fitted.steps, "seconds": fitted.seconds, "queries": len(data.rows),
                             "rivals": plan.candidates or model.num_entities, **finite(fitted.metrics)}}
    return fitted.params, results


def finite(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics that are numbers."""
    return {name: float(value) for name, value in metrics.items() if np.isfinite(value)}
