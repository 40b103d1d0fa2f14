"""The graph stage: L_KG = L_link + λ L_MLM over triples, with V and U inside the encoder.

Two trainings, one after the other. *structure*: a scorer learns the tables from merged queries, one row for each
distinct (head, relation) with all of its tails, inverse relations included. *text*: [V_h ⊕ U_r] enters the encoder as a
soft token beside the words of the triple, its output at the hidden entity is scored against V; tables, bridge and (by
LoRA or whole) the encoder learn from both scores. An entity without a name enters by its vector alone.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kgrec_jax import checkpoint, train
from kgrec_jax.data.dataset import Graph
from kgrec_jax.data.graph import merge_inverse_relations
from kgrec_jax.data.link_batches import (LinkBatch, LinkRows, LinkSource, TextLinkBatch, TextLinkSource, TripleWords,
                                         encode_queries, hold_out, merge_queries, some_triples)
from kgrec_jax.data.text import Tokenizer, coverage, load_tokenizer
from kgrec_jax.evaluation.link_prediction import KnownTails, evaluate_link_prediction
from kgrec_jax.models import bert
from kgrec_jax.models.encoder_config import layer_weights
from kgrec_jax.models.graph_embedding import GRAPH_RULES, GraphEmbedding
from kgrec_jax.models.triple_encoder import TRIPLE_ENCODER_RULES, TripleEncoder
from kgrec_jax.optim import OptimConfig, by_part, make_optimizer
from kgrec_jax.sharding import padded_rows
from kgrec_jax.stages import pretrain
from kgrec_jax.stages.bounds import check_bounds, check_optimizers
from kgrec_jax.tracking import write_json

# Floating-point operations of the structure training that take about half a minute on two cores: measured, they come to
# less a second than the encoder's, because gathered rows and passes over the tables wait for memory.
FLOP_BUDGET = 2e12
STRUCTURE_FLOPS, ENCODER_FLOPS = 7e10, 1.5e11  # a second
MIN_STEPS, MAX_TEXT_STEPS = 600, 200
# Adagrad's accumulators begin at 0.1, which is meant for gradients of a batch's sum rather than of its mean.
GRADIENT_SCALE = 2000.0


@dataclasses.dataclass(frozen=True)
class Config:
    """What the graph stage trains and for how long; 0 steps: from the size of the data."""

    scorer: Literal["complex", "distmult", "transe", "rotate"] = "complex"  # structural score of a triple
    dim: int = 128  # width D of entity and relation vectors
    steps: int = 0  # structure steps; 0: up to `epochs`, within about half a minute on two cores
    epochs: int = 30  # passes over the distinct queries where `steps` is 0 and time allows
    batch: int = 512  # queries of a structure step
    tails: int = 16  # answers of one row; a query with more takes several rows
    rivals: Literal["auto", "all", "sampled"] = "auto"  # of an answer; auto: all of up to 8192 entities
    candidates: int = 2048  # entities drawn a step where rivals are sampled
    n3: float = 0.02  # weight of the nuclear 3-norm of the rows in use
    optim: OptimConfig = OptimConfig(name="adagrad", peak_lr=0.1, schedule="constant", warmup_share=0.0, clip_norm=0.0)
    valid_share: float = 0.03  # of the triples, held out by pairs where the folder gives no split
    test_share: float = 0.03  # of the triples, held out by pairs where the folder gives no split
    heldout_limit: int = 2000  # triples of each held-out part at most
    encoder_mode: Literal["off", "frozen", "lora", "full"] = "lora"  # what of the encoder the text training changes
    text_steps: int = 0  # text steps; 0: two passes over the queries, at most 200
    text_batch: int = 32  # queries of a text step
    text_length: int = 32  # tokens of a triple at most; shorter where the names are
    entity_words: Literal["name", "name-and-text"] = "name"  # what of an entity is read
    withhold: float = 0.25  # share of named heads whose vectors are left out, so that words alone can answer
    lora_rank: int = 8  # rank of the adapters of encoder_mode=lora
    lora_alpha: float = 16.0  # the adapters' product counts alpha / rank
    mlm_weight: float = 0.1  # λ of L_MLM; needs an encoder with a masked-LM head
    mask_share: float = 0.15  # of a triple's words
    table_optim: OptimConfig = OptimConfig(name="sgd", peak_lr=0.05, schedule="linear")  # V, U in text steps
    bridge_optim: OptimConfig = OptimConfig(peak_lr=5e-3)  # projections between tables and encoder
    encoder_optim: OptimConfig = OptimConfig(peak_lr=3e-4)  # adapters, or the whole encoder
    text_eval: int = 250  # held-out triples that are ranked through the encoder
    log_every: int = 20  # steps between two rows of metrics.jsonl
    checkpoint_every: int = 200  # steps between two checkpoints


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


@dataclasses.dataclass(frozen=True)
class Plan:
    """The steps that follow from the size of the data, and about how long they take on two cores."""

    steps: int
    candidates: int  # 0: all entities are rivals
    seconds: float


def training_graph(graph: Graph) -> tuple[Graph, list[str]]:
    """The graph that the tables of this stage belong to (inverse relations merged), and what was merged, in lines."""
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


def make_plan(cfg: Config, num_rows: int, num_entities: int) -> Plan:
    """Steps and rivals of the structure training for so many query rows and entities."""
    sampled = cfg.rivals == "sampled" or (cfg.rivals == "auto" and num_entities > 8192)
    rivals = cfg.candidates if sampled else num_entities
    # Forward, backward and the second forward of the block-wise loss; then a few passes over the tables.
    flops = 8.0 * cfg.batch * rivals * cfg.dim + 100.0 * num_entities * cfg.dim
    passes = -(-cfg.epochs * num_rows // cfg.batch)
    steps = cfg.steps or int(min(max(passes, MIN_STEPS), max(FLOP_BUDGET // flops, 50)))
    return Plan(steps, cfg.candidates if sampled else 0, 4.0 + steps * max(flops / STRUCTURE_FLOPS, 0.004))


def make_model(cfg: Config, graph: Graph, devices: int) -> GraphEmbedding:
    """Tables for the entities and relations of `graph` on so many devices."""
    return GraphEmbedding(cfg.scorer, cfg.dim, graph.num_entities, graph.num_relations,
                          padded_rows(graph.num_entities, devices))


def structure_loss(cfg: Config, model: GraphEmbedding, tables: dict, batch: LinkBatch) -> tuple[jax.Array, dict]:
    """Mean loss of an answer plus N3, and metrics as (sum, count)."""
    count = jnp.maximum(batch.weight.sum(), 1.0)
    link = model.structure_losses(tables, batch).sum()
    loss = link / count
    if cfg.n3:
        loss = loss + cfg.n3 * model.nuclear_3_norms(tables, batch).sum() / count
    return loss, {"link_loss": (link, count)}


def text_loss(cfg: Config, model: TripleEncoder, has_head: bool, params: dict, constants: dict,
              batch: TextLinkBatch) -> tuple[jax.Array, dict]:
    """L_link of the structural and of the text score + λ L_MLM, and metrics as (sum, count)."""
    encoder = model.merged_encoder(params, constants["encoder"])
    hidden = model.hidden(params, encoder, batch)
    loss, metrics = structure_loss(cfg, model.graph, params["tables"], batch.links)
    text, count = model.link_losses(params, hidden, batch).sum(), jnp.maximum(batch.links.weight.sum(), 1.0)
    loss, metrics = loss + text / count, metrics | {"text_link_loss": (text, count)}
    if has_head and cfg.mlm_weight:
        words, masked = model.word_loss(encoder, hidden, batch)
        loss = loss + cfg.mlm_weight * words / jnp.maximum(masked, 1.0)
        metrics = metrics | {"mlm_loss": (words, masked)}
    return loss, metrics


def text_optimizer(cfg: Config, steps: int) -> optax.GradientTransformation:
    """Each part at its own rate; plain descent for the tables, since Adam would move rows that nothing asks to move."""
    parts = {"tables": cfg.table_optim, "bridge": cfg.bridge_optim, "encoder": cfg.encoder_optim}
    return by_part({name: make_optimizer(optim, steps) for name, optim in parts.items()})


def structure_optimizer(cfg: Config, steps: int) -> optax.GradientTransformation:
    """The optimiser of the structure training."""
    chain = make_optimizer(cfg.optim, steps)
    return optax.chain(optax.scale(GRADIENT_SCALE), chain) if cfg.optim.name == "adagrad" else chain


def evaluate(model: GraphEmbedding, tables: dict, data: LinkData, part: int) -> dict[str, float]:
    """Filtered metrics of the structural scorer on the triples of a part; empty where it has none."""
    triples = data.triples(part)
    if not len(triples):
        return {}
    score = jax.jit(model.scores)
    return evaluate_link_prediction(lambda h, r: score(tables, h, r), triples, known=data.known,
                                    num_entities=model.num_entities)


def evaluate_text(cfg: Config, model: TripleEncoder, params: dict, encoder: dict, words: TripleWords, data: LinkData,
                  length: int, *, use_vectors: bool, seed: int) -> dict[str, float]:
    """Filtered metrics of the queries in words on at most `text_eval` test triples; `use_vectors`: of their heads."""
    triples = some_triples(data.triples(2), cfg.text_eval, seed)
    if not len(triples):
        return {}
    merged, score = jax.jit(model.merged_encoder)(params, encoder), jax.jit(model.scores)

    def score_block(heads: np.ndarray, relations: np.ndarray) -> jax.Array:
        nothing = np.zeros((len(heads), 1), np.int32)
        links = LinkBatch(heads, relations, nothing, nothing.astype(np.float32), np.zeros(0, np.int32))
        return score(params, merged, encode_queries(links, words, length, withhold=0.0 if use_vectors else 1.0))

    return evaluate_link_prediction(score_block, triples, known=data.known, num_entities=model.graph.num_entities,
                                    block=64)


def entity_words(graph: Graph, with_text: bool) -> list[str]:
    """What of each entity is read, "" where it has no name: an opaque id never enters the encoder."""
    if not with_text:
        return list(graph.entity_names)
    return [f"{name}: {text}" if name and text else name for name, text in
            zip(graph.entity_names, graph.entity_texts, strict=True)]


def triple_words(cfg: Config, graph: Graph, tokenizer: Tokenizer) -> TripleWords:
    """The words of a graph's entities and relations as token ids."""

    def encode(texts: list[str]) -> list[list[int]]:
        present = [row for row, text in enumerate(texts) if text.strip()]
        ids = tokenizer.encode([texts[row] for row in present], cfg.text_length, special=False)
        out: list[list[int]] = [[] for _ in texts]
        for row, tokens in zip(present, ids, strict=True):
            out[row] = tokens
        return out

    entities = encode(entity_words(graph, cfg.entity_words == "name-and-text"))
    return TripleWords(entities, encode(list(graph.relation_names)), cls=tokenizer.cls_id, sep=tokenizer.sep_id,
                       mask=tokenizer.mask_id, pad=tokenizer.pad_id, vocab_size=tokenizer.vocab_size)


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
    tables, results = _train_structure(cfg, model, data, run, experiment.seed)
    bridge, text_results = {}, {"skipped": "graph.encoder_mode is off"}
    if cfg.encoder_mode != "off":
        tables, bridge, text_results = _train_text(experiment, run, model, data, tables)
    results["text"] = text_results
    results["link_prediction"] = evaluate(model, tables, data, 2)
    results["link_prediction_valid"] = evaluate(model, tables, data, 1)
    if not results["link_prediction"]:
        results["link_prediction"] = {"skipped": "no pair could be held out: every entity has too few triples"}
    _save_tables(folder, cfg, graph, tables, bridge)
    return results


def _train_structure(cfg: Config, model: GraphEmbedding, data: LinkData, run: Any, seed: int) -> tuple[dict, dict]:
    """(tables, results) of the structure training."""
    plan = make_plan(cfg, len(data.rows), model.num_entities)
    against = f"{plan.candidates:,} drawn" if plan.candidates else f"all {model.num_entities:,}"
    counts = {name: int((data.part == k).sum()) for k, name in enumerate(("train", "valid", "test"))}
    run.tracker.say(f"graph: {counts['train']:,} triples as {len(data.rows):,} queries, "
                    f"{counts['valid'] + counts['test']:,} held out; {plan.steps:,} steps of {cfg.batch} "
                    f"against {against} entities, about {plan.seconds:.0f} s")
    source = LinkSource(data.rows, batch=cfg.batch, steps=plan.steps, seed=seed, num_entities=model.num_entities,
                        candidates=plan.candidates)
    fitted = train.fit(
        workdir=run.stage("graph") / "structure", init_fn=model.init, source=source, constants={}, seed=seed,
        mesh=run.mesh, loss_fn=lambda tables, constants, batch, key: structure_loss(cfg, model, tables, batch),
        rules=GRAPH_RULES, tx=structure_optimizer(cfg, plan.steps), log_every=cfg.log_every,
        checkpoint_every=cfg.checkpoint_every, label="graph structure", tracker=run.tracker)
    results = {"entities": model.num_entities, "relations": model.num_relations, "triples": counts,
               "split": "given" if data.given_split else "held out by pairs", "scorer": cfg.scorer, "dim": cfg.dim,
               "structure": {"steps": fitted.steps, "seconds": fitted.seconds, "queries": len(data.rows),
                             "rivals": plan.candidates or model.num_entities, **_finite(fitted.metrics)}}
    return fitted.params, results


def _train_text(experiment: Any, run: Any, model: GraphEmbedding, data: LinkData,
                tables: dict) -> tuple[dict, dict, dict]:
    """(tables, bridge, results) of the text training; the given tables and a reason where no tokenizer fits."""
    cfg, seed = experiment.graph, experiment.seed
    encoder = pretrain.stage_encoder(experiment, run)
    tokenizer = load_tokenizer(encoder.tokenizer_folder, encoder.config.vocab_size)
    reason = coverage(tokenizer, [*entity_words(data.graph, False), *data.graph.relation_names]).reason
    if reason:
        run.tracker.say(f"graph: structure alone, {reason}")
        return tables, {}, {"skipped": reason}
    words = triple_words(cfg, data.graph, tokenizer)
    length = words.fitting_length(data.rows, min(cfg.text_length, encoder.config.max_position_embeddings))
    steps = cfg.text_steps or min(MAX_TEXT_STEPS, -(-2 * len(data.rows) // cfg.text_batch))
    plan = make_plan(cfg, len(data.rows), model.num_entities)
    run.tracker.say(f"graph: {steps} text steps of {cfg.text_batch} × {length} tokens, encoder {cfg.encoder_mode}, "
                    f"about {_text_seconds(encoder, steps * cfg.text_batch * length):.0f} s")
    scale = float(np.asarray(bert.word_table(encoder.params)).std())
    text = TripleEncoder(model, encoder.config, cfg.encoder_mode, scale, cfg.lora_rank, cfg.lora_alpha)
    links = LinkSource(data.rows, batch=cfg.text_batch, steps=steps, seed=seed + 1, num_entities=model.num_entities,
                       candidates=plan.candidates)
    source = TextLinkSource(links, words, length=length, withhold=cfg.withhold, mask_share=cfg.mask_share)
    fitted = train.fit(
        workdir=run.stage("graph") / "text", init_fn=lambda key: text.init(tables, encoder.params, key), source=source,
        constants={"encoder": {} if cfg.encoder_mode == "full" else encoder.params}, seed=seed + 1, mesh=run.mesh,
        loss_fn=lambda params, constants, batch, key: text_loss(cfg, text, encoder.has_mlm_head, params, constants,
                                                                batch),
        rules=TRIPLE_ENCODER_RULES, tx=text_optimizer(cfg, steps), log_every=cfg.log_every,
        checkpoint_every=cfg.checkpoint_every, label="graph text", tracker=run.tracker)
    if cfg.encoder_mode != "frozen":
        merged = jax.jit(text.merged_encoder)(fitted.params, encoder.params)
        checkpoint.save_tree(run.stage("graph") / "encoder", jax.device_get(merged))
    judge = functools.partial(evaluate_text, cfg, text, fitted.params, encoder.params, words, data, length, seed=seed)
    results = {"steps": fitted.steps, "seconds": fitted.seconds, "length": length, "encoder_mode": cfg.encoder_mode,
               "mlm": "yes" if encoder.has_mlm_head and cfg.mlm_weight else "skipped: no masked-LM head",
               "named_entities": sum(bool(w) for w in words.entity), **_finite(fitted.metrics),
               "link_prediction": judge(use_vectors=True), "link_prediction_words_alone": judge(use_vectors=False),
               "structure_before": evaluate(model, tables, data, 2)}
    return fitted.params["tables"], fitted.params["bridge"], results


def _save_tables(folder: pathlib.Path, cfg: Config, graph: Graph, tables: dict, bridge: dict) -> None:
    tables = jax.device_get(tables)
    entity = np.asarray(tables["entity"]["embedding"])[:graph.num_entities]  # padding stays behind
    relation = np.asarray(tables["relation"]["embedding"])
    checkpoint.save_tree(folder / "tables", {"entity": entity, "relation": relation, "bridge": jax.device_get(bridge)})
    write_json(folder / "tables.json", {
        "scorer": cfg.scorer, "dim": cfg.dim, "entities": graph.num_entities, "has_bridge": bool(bridge),
        "relation_ids": graph.relation_ids, "relation_names": graph.relation_names})


def check(cfg: Config) -> None:
    """KgrecError naming the first field that no training can do anything with."""
    many = 1 << 30
    bounds = {"dim": (2, many), "steps": (0, many), "epochs": (1, many), "batch": (1, many), "tails": (1, many),
              "candidates": (1, many), "n3": (0.0, 1e3), "valid_share": (0.0, 0.5), "test_share": (0.0, 0.5),
              "heldout_limit": (0, many), "text_steps": (0, many), "text_batch": (1, many), "text_length": (8, many),
              "withhold": (0.0, 1.0), "lora_rank": (1, many), "mlm_weight": (0.0, 1e3), "mask_share": (0.0, 0.9),
              "text_eval": (0, many)}
    check_bounds("graph", cfg, bounds)
    check_optimizers("graph", cfg, ("optim", "table_optim", "bridge_optim", "encoder_optim"))


def _text_seconds(encoder: Any, tokens: int) -> float:
    return 8.0 + 4.0 * layer_weights(encoder.config) * tokens / ENCODER_FLOPS


def _finite(metrics: dict[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if np.isfinite(value)}
