"""The bi-encoder of the graph stage (SimKGC, Wang et al. 2022): triples in words, entities by their texts alone.

An entity that occurs in no training triple is scored like any other. What the texts say can be corrected by the
neighbourhood of the head (SimKGC's re-ranking), as far as validation triples ask for it.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any, Literal

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from kgrec_jax import checkpoint, train
from kgrec_jax.data.bi_encoder_batches import BiEncoderSource, BiWords, readable_rows
from kgrec_jax.data.dataset import Graph
from kgrec_jax.data.link_batches import LinkRows, LinkSource, some_triples
from kgrec_jax.data.text import Tokenizer, coverage, load_tokenizer
from kgrec_jax.evaluation.link_prediction import KnownTails, add_inverses, evaluate_link_prediction
from kgrec_jax.models import bi_encoder, encoders
from kgrec_jax.models.bi_encoder import BiEncoder
from kgrec_jax.models.encoder_config import MINILM_WEIGHTS, layer_weights
from kgrec_jax.optim import OptimConfig, by_part, make_optimizer
from kgrec_jax.sharding import padded_rows
from kgrec_jax.stages import pretrain
from kgrec_jax.stages.bounds import check_bounds, check_optimizers
from kgrec_jax.stages.graph_bi_vectors import (BiEncoderVectors, Neighbourhood, TextEncoding, adjacency,
                                               choose_neighbourhood)
from kgrec_jax.tracking import write_json

TRAINED, ENCODED = 4000.0, 12000.0  # tokens a second of MiniLM on two idle cores


@dataclasses.dataclass(frozen=True)
class Config:
    """What the bi-encoder learns and for how long; 0 steps: from the size of the data."""

    mode: Literal["off", "lora", "full"] = "off"  # what of the encoder is trained
    towers: Literal["shared", "two"] = "shared"  # one set of weights for queries and entities, or one each
    batch: int = 128  # queries of a step, each with one of its tails in words
    steps: int = 0  # 0: `passes` over the queries
    passes: float = 2.0  # over the distinct queries where `steps` is 0
    length: int = 32  # tokens of a text at most, special ones included
    rungs: int = 4  # lengths to which the texts of a batch are padded, shortest first
    refresh: int = 64  # entities a step that are encoded anew for the bank, in turn
    rivals: int = 65536  # rows of the bank against which a step's queries stand; more are drawn from
    self_negatives: Literal["on", "off"] = "on"  # the head itself is a rival
    margin: float = 0.02  # taken off the cosine of an answer
    temperature: float = 0.05  # of the first step; it is learned
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the encoder's computation; weights and sums are float32
    lora_rank: int = 16  # rank of the adapters of mode=lora
    lora_alpha: float = 32.0  # the adapters' product counts alpha / rank
    optim: OptimConfig = OptimConfig(peak_lr=2e-4, schedule="linear", warmup_share=0.05)  # encoder, or its adapters
    scale_optim: OptimConfig = OptimConfig(peak_lr=3e-3, schedule="constant", warmup_share=0.05)  # temperature
    rerank: Literal["on", "off"] = "on"  # the head's neighbourhood counts, as validation triples ask for it
    eval_triples: int = 500  # validation triples that choose, and on which the training is judged on its way
    eval_every: int = 0  # steps between two evaluations against the bank; 0: only at the end
    encode_batch: int = 64  # texts that are encoded at once outside the training
    log_every: int = 20  # steps between two rows of metrics.jsonl
    checkpoint_every: int = 200  # steps between two checkpoints

    def num_steps(self, num_queries: int) -> int:
        """Steps of a training on so many distinct queries."""
        return self.steps or max(1, int(np.ceil(self.passes * num_queries / self.batch)))


def check(cfg: Config) -> None:
    """KgrecError naming the first field that no training can do anything with."""
    many = 1 << 30
    bounds = {"batch": (2, many), "steps": (0, many), "passes": (0.0, 1e6), "length": (8, many), "rungs": (1, 64),
              "refresh": (0, many), "rivals": (1, many), "margin": (0.0, 1.0), "temperature": (1e-3, 10.0),
              "lora_rank": (1, many), "eval_triples": (0, many), "eval_every": (0, many), "encode_batch": (1, many)}
    check_bounds("graph.bi_encoder", cfg, bounds)
    check_optimizers("graph.bi_encoder", cfg, ("optim", "scale_optim"))


# --- words --------------------------------------------------------------------------------------------------------


def entity_texts(graph: Graph) -> list[str]:
    """"name: text" of each entity, the name once; "" where there is neither."""

    def one(name: str, text: str) -> str:
        said = text[len(name):].lstrip(" ,:;") if name and text.startswith(name) else text
        return f"{name}: {said}" if name and said else name or said

    return [one(*pair) for pair in zip(graph.entity_names, graph.entity_texts, strict=True)]


def relation_texts(graph: Graph) -> list[str]:
    """[2R] words of the relations and of their inverses; the id stands where a name is missing."""
    names = [name or key for name, key in zip(graph.relation_names, graph.relation_ids, strict=True)]
    return [*names, *(f"inverse {name}" for name in names)]


def make_words(graph: Graph, tokenizer: Tokenizer, length: int) -> BiWords:
    """The words of a graph as token ids."""
    return BiWords(encode_words(tokenizer, entity_texts(graph), length),
                   encode_words(tokenizer, relation_texts(graph), max(length // 2, 4)),
                   tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id)


def encode_words(tokenizer: Tokenizer, texts: list[str], length: int) -> list[list[int]]:
    """Token ids without special ones of each text, at most `length`; empty where there is none."""
    present = [row for row, text in enumerate(texts) if text.strip()]
    out: list[list[int]] = [[] for _ in texts]
    for row, ids in zip(present, tokenizer.encode([texts[row] for row in present], length, special=False), strict=True):
        out[row] = ids
    return out


# --- training -----------------------------------------------------------------------------------------------------


def make_tx(cfg: Config, steps: int) -> optax.GradientTransformation:
    """Encoder and temperature each at its own rate; the bank takes what it is given."""
    return by_part({"encoder": make_optimizer(cfg.optim, steps), "scale": make_optimizer(cfg.scale_optim, steps),
                    "bank": optax.sgd(1.0)})


def train_bi_encoder(experiment: Any, run: Any, data: Any) -> tuple[BiEncoderVectors | None, dict]:
    """(vectors of the entities and of the validation and test queries, results); (None, {"skipped": reason}).

    Leaves `bi_encoder` in the stage's folder: entity vectors, the towers' weights and the temperature, as
    `load_bi_encoder` reads them.
    """
    cfg, seed = experiment.graph.bi_encoder, experiment.seed
    if cfg.mode == "off":
        return None, {"skipped": "graph.bi_encoder.mode is off"}
    check(cfg)
    encoder = pretrain.stage_encoder(experiment, run)
    tokenizer = load_tokenizer(encoder.tokenizer_folder, encoder.config.vocab_size)
    cfg = dataclasses.replace(cfg, length=min(cfg.length, encoder.config.max_position_embeddings))
    words = make_words(data.graph, tokenizer, cfg.length)
    rows = readable_rows(data.rows, words)
    reason = coverage(tokenizer, [*entity_texts(data.graph), *data.graph.relation_names]).reason
    if not len(rows):
        reason = "no entity of a training triple has a name or a text"
    if reason:
        run.tracker.say(f"graph: no bi-encoder, {reason}")
        return None, {"skipped": reason}
    given = encoders.backbone(encoder.config, encoder.params)
    model = BiEncoder(encoder.config, cfg.mode, cfg.towers, cfg.margin, cfg.lora_rank, cfg.lora_alpha, cfg.dtype)
    texts = TextEncoding(model, words, cfg.length, cfg.encode_batch, run.mesh)
    task = Task(cfg, texts, data, make_source(cfg, rows, words, data, seed, run.mesh), seed)
    run.tracker.say(task.announcement())
    fitted = fit(task, run, given)
    return leave(task, run, jax.jit(model.merged)(fitted.params, given), fitted)


def make_source(cfg: Config, rows: LinkRows, words: BiWords, data: Any, seed: int, mesh: Mesh) -> BiEncoderSource:
    """The batches of the training; only entities of training triples are rivals."""
    links = LinkSource(rows, batch=cfg.batch, steps=cfg.num_steps(len(rows)), seed=seed + 2, num_entities=data.graph.num_entities)
    seen = np.array([entity for entity in np.flatnonzero(data.seen) if len(words.entity[entity])], np.int64)
    known = KnownTails.of(data.triples(0), data.graph.num_relations)
    return BiEncoderSource(links, words, known, seen, length=cfg.length, rungs=cfg.rungs, refresh=cfg.refresh,
                           rivals=cfg.rivals, self_negatives=cfg.self_negatives == "on",
                           bank_rows=padded_rows(data.graph.num_entities, mesh), devices=mesh.shape["data"])


@dataclasses.dataclass(frozen=True)
class Task:
    """What the training on one graph needs."""

    cfg: Config
    texts: TextEncoding
    data: Any  # LinkData
    source: BiEncoderSource
    seed: int

    @property
    def sample(self) -> np.ndarray:
        """[n, 3] validation triples that choose and judge."""
        return some_triples(self.data.triples(1), self.cfg.eval_triples, self.seed)

    def announcement(self) -> str:
        """What is going to happen and about how long it takes."""
        (trained, encoded), steps, batch = self.source.tokens, len(self.source), self.cfg.batch
        words, width = self.texts.words, layer_weights(self.texts.model.encoder) / MINILM_WEIGHTS
        everything = words.entity_lengths(np.arange(len(words.entity)), self.texts.length).sum()
        seconds = width * (steps * (trained / TRAINED + encoded / ENCODED) + everything / ENCODED)
        return (f"graph: bi-encoder, {len(self.source.links.rows):,} queries, {len(self.source.seen):,} entities in "
                f"the bank; {steps:,} steps of {batch} queries, {trained / 2 / batch:.0f} tokens a text, "
                f"about {seconds / 60:.1f} minutes on two idle cores")

    def vectors(self, weights: dict, entities: np.ndarray, triples: np.ndarray, scale: float) -> BiEncoderVectors:
        """Entity vectors [N, D] and the encoded queries of `triples` in both directions; no neighbourhood yet."""
        relations = self.data.graph.num_relations
        both = add_inverses(triples, relations).astype(np.int64)
        keys = np.unique(both[:, 0] * (2 * relations) + both[:, 1])
        around = Neighbourhood(0, 0.0, adjacency(self.data.triples(0), len(entities)))
        return BiEncoderVectors(entities, scale, keys, self.texts.queries(weights, *np.divmod(keys, 2 * relations)),
                                relations, around)

    def judge(self, vectors: BiEncoderVectors, triples: np.ndarray) -> dict[str, float]:
        """Filtered metrics of `triples` [T, 3]; empty where there is none."""
        return evaluate_link_prediction(vectors.scores, triples, known=self.data.known,
                                        num_entities=len(vectors.entities)) if len(triples) else {}


def fit(task: Task, run: Any, given: dict) -> train.FitResult:
    """Trains the towers; on its way the training is judged by the bank, whose rows are some steps old."""
    cfg, model, source, sample = task.cfg, task.texts.model, task.source, task.sample
    merged, num_entities = jax.jit(model.merged), task.data.graph.num_entities

    def on_the_way(params: dict) -> dict[str, float]:
        bank = np.asarray(params["bank"]["rows"])[:num_entities]
        found = task.judge(task.vectors(merged(params, given), bank, sample, 1.0), sample)
        return {f"valid_{name}": found[name] for name in ("mrr", "hits@1", "hits@10")}

    return train.fit(
        workdir=run.stage("graph") / "bi", source=source, seed=task.seed + 2, mesh=run.mesh,
        init_fn=functools.partial(model.init, given, source.bank_rows, cfg.temperature),
        constants={} if cfg.mode == "full" else given,
        loss_fn=lambda params, constants, batch, key: model.loss(params, constants, batch),
        rules=bi_encoder.rules(model.encoder), tx=make_tx(cfg, len(source)), log_every=cfg.log_every,
        checkpoint_every=cfg.checkpoint_every, evaluate=on_the_way if cfg.eval_every and len(sample) else None,
        eval_every=cfg.eval_every, label="graph bi-encoder", tracker=run.tracker)


def leave(task: Task, run: Any, weights: dict, fitted: train.FitResult) -> tuple[BiEncoderVectors, dict]:
    """Encodes what is asked for, chooses the neighbourhood, saves; (vectors, results)."""
    cfg, data, words = task.cfg, task.data, task.texts.words
    entities, scale = task.texts.entities(weights), float(np.exp(jax.device_get(fitted.params["scale"]["log"])))
    vectors = task.vectors(weights, entities, np.concatenate([data.triples(1), data.triples(2)]), scale)
    results: dict[str, Any] = {
        "mode": cfg.mode, "towers": cfg.towers, "steps": fitted.steps, "seconds": fitted.seconds,
        "length": cfg.length, "temperature": 1.0 / scale, "texts": sum(bool(ids) for ids in words.entity),
        **{name: float(value) for name, value in fitted.metrics.items() if np.isfinite(value)}}
    if cfg.rerank == "on":
        results["link_prediction_words_alone"] = task.judge(vectors, data.triples(2))
        around = choose_neighbourhood(vectors, task.sample, data.known)
        vectors = dataclasses.replace(vectors, neighbourhood=around)
        results |= {"rerank_hops": around.hops, "rerank_weight": around.weight}
    results["link_prediction"] = task.judge(vectors, data.triples(2))
    results["link_prediction_valid"] = task.judge(vectors, data.triples(1))
    folder, around = run.stage("graph"), vectors.neighbourhood
    towers = weights if cfg.towers == "two" else {"query": weights["query"]}
    checkpoint.save_tree(folder / "bi_encoder", {"entities": entities, "inverse_temperature": np.float32(scale),
                                                 "encoder": jax.device_get(towers)})
    write_json(folder / "bi_encoder.json", {
        "length": cfg.length, "dtype": cfg.dtype, "entities": len(entities), "relations": relation_texts(data.graph),
        "rerank_hops": around.hops, "rerank_weight": around.weight})
    return vectors, results


def load_bi_encoder(folder: pathlib.Path) -> tuple[dict, np.ndarray, float]:
    """(weights {"query", "entity"}, entity vectors [N, D], inverse temperature) of a stage's folder, all NumPy."""
    tree = checkpoint.load_tree(folder / "bi_encoder")
    towers = tree["encoder"]
    weights = {"query": towers["query"], "entity": towers["entity" if "entity" in towers else "query"]}
    return weights, tree["entities"], float(tree["inverse_temperature"])
