"""The graph stage: L_KG = L_link + λ L_MLM over triples, with V and U inside the encoder.

Two trainings, one after the other: `graph_structure` shapes the tables from the triples alone, `graph_text` puts them
into the encoder beside the words of a triple.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kgrec_jax import checkpoint
from kgrec_jax.data.dataset import Graph
from kgrec_jax.data.link_batches import some_triples
from kgrec_jax.evaluation.link_prediction import ScoreBlock, evaluate_link_prediction
from kgrec_jax.evaluation.mixture import choose_mixture
from kgrec_jax.linear.rule_scorer import RuleScorer
from kgrec_jax.linear.rules import mine_rules
from kgrec_jax.models.graph_embedding import GraphEmbedding
from kgrec_jax.stages.graph_bi_encoder import train_bi_encoder
from kgrec_jax.stages.graph_config import Config, check
from kgrec_jax.stages.graph_data import LinkData, link_data, training_graph
from kgrec_jax.stages.graph_structure import evaluate, make_model, make_plan, structure_scorer, train_structure
from kgrec_jax.stages.graph_text import ENCODER_FLOPS, TextTraining, num_text_steps, train_text
from kgrec_jax.tracking import write_json

__all__ = ["ENCODER_FLOPS", "Config", "LinkData", "check", "evaluate", "link_data", "make_model", "make_plan",
           "num_text_steps", "run", "training_graph"]


def run(experiment: Any, run: Any) -> dict:
    """Trains tables and encoder on the data set's graph; leaves `tables`, `tables.json` and, with text, `encoder`.

    `tables` holds entity [N, D] and relation [2R, D] (row r + R: the inverse of r) of `training_graph(dataset.graph)`,
    and the bridge of the text training. Returns the stage's results, {"skipped": reason} where there is no graph.
    """
    cfg, folder = experiment.graph, run.stage("graph")
    check(cfg)
    graph, lines = training_graph(run.dataset.graph)
    if not len(graph.triples):
        return {"skipped": "the data set has no triples"}
    for line in lines:
        run.tracker.say(line)
    data = link_data(cfg, graph, experiment.seed)
    model = make_model(cfg, graph, run.mesh.size)
    tables, results = train_structure(cfg, model, data, run, experiment.seed)
    text = TextTraining(tables, {}, None, {"skipped": "graph.encoder_mode is off"})
    if cfg.encoder_mode != "off":
        text = train_text(experiment, run, model, data, tables)
    results["text"] = text.results
    scorers = {"structure": structure_scorer(model, text.tables)}
    vectors, results["bi_encoder"] = train_bi_encoder(experiment, run, data)
    judged = {}
    if vectors is not None:
        scorers["text"] = vectors.scores
        found = results["bi_encoder"]
        judged["text"] = {"valid": found["link_prediction_valid"], "test": found["link_prediction"]}
    if text.scorer is not None and not cfg.text_eval:
        scorers["text" if vectors is None else "soft-tokens"] = text.scorer
    if cfg.rules == "on":
        scorers["rules"], results["rules"] = _rule_scorer(cfg, data, run.tracker.say)
    results["mixture"], results["link_prediction"] = _judge(cfg, data, scorers, judged, experiment.seed,
                                                            run.tracker.say)
    _save_tables(folder, model, graph, text.tables, text.bridge)
    return results


def _rule_scorer(cfg: Config, data: LinkData, say: Callable[[str], None]) -> tuple[ScoreBlock, dict]:
    """Rules mined from the training triples as a scorer, and how many there are."""
    began = time.monotonic()
    training = dataclasses.replace(data.graph, part=data.part)
    rules = mine_rules(training, cfg.rule_mining)
    scorer, seconds = RuleScorer(rules, training, cfg.rule_score), time.monotonic() - began
    say(f"graph: {len(rules):,} rules of the training triples in {seconds:.0f} s")
    return lambda heads, relations: jnp.asarray(scorer.scores(heads, relations)), {"rules": len(rules),
                                                                                   "seconds": seconds}


def _judge(cfg: Config, data: LinkData, scorers: dict[str, ScoreBlock], judged: dict[str, dict], seed: int,
           say: Callable[[str], None]) -> tuple[dict, dict]:
    """(weights of the mixture, {"test", "valid", and each scorer apart: {"test", "valid"}}) in filtered metrics.

    `judged` holds what is known already of some scorers by themselves; an empty part stands for no triple.
    """
    names = {"valid": data.triples(1), "test": data.triples(2)}
    if not len(names["test"]):
        return {}, {"skipped": "no pair could be held out: every entity has too few triples"}
    entities = data.graph.num_entities
    chosen_on = some_triples(names["valid"], cfg.mixture_triples, seed)
    mixture = choose_mixture(scorers, chosen_on, known=data.known, num_entities=entities, say=say)

    def both(block: ScoreBlock) -> dict[str, dict[str, float]]:
        return {name: evaluate_link_prediction(block, triples, known=data.known, num_entities=entities)
                for name, triples in names.items() if len(triples)}

    if len(scorers) == 1:
        return mixture.weights, both(next(iter(scorers.values())))
    alone = {name: {part: found for part, found in judged[name].items() if found} if name in judged else both(block)
             for name, block in scorers.items()}
    only = next((name for name, weight in mixture.weights.items() if weight == 1.0), "")
    return mixture.weights, (alone[only] if only else both(mixture.score_block(scorers, entities))) | alone


def _save_tables(folder: pathlib.Path, model: GraphEmbedding, graph: Graph, tables: dict, bridge: dict) -> None:
    held = jax.device_get({**model.to_saved(tables), "bridge": bridge})
    checkpoint.save_tree(folder / "tables", held)
    write_json(folder / "tables.json", {**model.describe(), "has_bridge": bool(bridge),
                                        "relation_ids": graph.relation_ids, "relation_names": graph.relation_names})
