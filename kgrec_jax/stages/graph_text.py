"""The text training of the graph stage: [V_h ⊕ U_r] as a soft token beside the words of a triple.

The encoder's output at the hidden entity is scored against V; tables, bridge and (by LoRA or whole) the encoder learn
from both scores. An entity without a name enters by its vector alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kgrec_jax import checkpoint, train
from kgrec_jax.data.dataset import Graph
from kgrec_jax.data.link_batches import (LinkBatch, LinkSource, TextLinkBatch, TextLinkSource, TripleWords,
                                         encode_queries, some_triples)
from kgrec_jax.data.text import Tokenizer, coverage, load_tokenizer
from kgrec_jax.evaluation.link_prediction import ScoreBlock, evaluate_link_prediction
from kgrec_jax.models import bert
from kgrec_jax.models.encoder_config import layer_weights
from kgrec_jax.models.graph_embedding import GraphEmbedding
from kgrec_jax.models.triple_encoder import TRIPLE_ENCODER_RULES, TripleEncoder
from kgrec_jax.optim import by_part, make_optimizer
from kgrec_jax.stages import pretrain
from kgrec_jax.stages.graph_config import Config
from kgrec_jax.stages.graph_data import LinkData
from kgrec_jax.stages.graph_structure import evaluate, finite, make_plan, structure_loss

ENCODER_FLOPS = 1.5e11  # a second, of the encoder's training on two cores
MAX_TEXT_STEPS = 200
MIN_RIVALS = 1024  # drawn for a step's queries in words, whose softmax a few rivals of a margin loss would not fill


@dataclasses.dataclass(frozen=True)
class TextTraining:
    """What the text training leaves: all of it in memory, the merged encoder also in the stage's folder."""

    tables: dict
    bridge: dict  # empty where nothing was trained
    scorer: ScoreBlock | None  # of the queries in words
    results: dict


def num_text_steps(cfg: Config, num_rows: int) -> int:
    """Steps of the text training on so many rows of queries."""
    return cfg.text_steps or min(MAX_TEXT_STEPS, -(-2 * num_rows // cfg.text_batch))


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


def text_scorer(model: TripleEncoder, params: dict, encoder: dict, words: TripleWords, length: int, *,
                use_vectors: bool = True) -> ScoreBlock:
    """The scores of every entity by the queries in words, at most 64 at a time; `use_vectors`: of their heads."""
    merged, score = jax.jit(model.merged_encoder)(params, encoder), jax.jit(model.scores)

    def score_block(heads: np.ndarray, relations: np.ndarray) -> jax.Array:
        nothing = np.zeros((len(heads), 1), np.int32)
        links = LinkBatch(heads, relations, nothing, nothing.astype(np.float32), np.zeros(0, np.int32))
        return score(params, merged, encode_queries(links, words, length, withhold=0.0 if use_vectors else 1.0))

    return score_block


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


def train_text(experiment: Any, run: Any, model: GraphEmbedding, data: LinkData,
               tables: dict) -> TextTraining:
    """Trains tables, bridge and encoder on triples in words; keeps the given tables where no tokenizer fits."""
    cfg, seed = experiment.graph, experiment.seed
    encoder = pretrain.stage_encoder(experiment, run)
    tokenizer = load_tokenizer(encoder.tokenizer_folder, encoder.config.vocab_size)
    reason = coverage(tokenizer, [*entity_words(data.graph, False), *data.graph.relation_names]).reason
    if reason:
        run.tracker.say(f"graph: structure alone, {reason}")
        return TextTraining(tables, {}, None, {"skipped": reason})
    words = triple_words(cfg, data.graph, tokenizer)
    length = words.fitting_length(data.rows, min(cfg.text_length, encoder.config.max_position_embeddings))
    steps = num_text_steps(cfg, len(data.rows))
    plan = make_plan(cfg, len(data.rows), model.num_entities)
    run.tracker.say(f"graph: {steps} text steps of {cfg.text_batch} × {length} tokens, encoder {cfg.encoder_mode}, "
                    f"about {_text_seconds(encoder, steps * cfg.text_batch * length):.0f} s")
    scale = float(np.asarray(bert.word_table(encoder.params)).std())
    text = TripleEncoder(model, encoder.config, cfg.encoder_mode, scale, cfg.lora_rank, cfg.lora_alpha)
    links = LinkSource(data.rows, batch=cfg.text_batch, steps=steps, seed=seed + 1, num_entities=model.num_entities,
                       candidates=plan.candidates and max(plan.candidates, MIN_RIVALS))
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
    scorers = {kind: text_scorer(text, fitted.params, encoder.params, words, length, use_vectors=kind == "vectors")
               for kind in ("vectors", "words")}
    sample = some_triples(data.triples(2), cfg.text_eval or len(data.triples(2)), seed)

    def judge(scorer: ScoreBlock) -> dict[str, float]:
        if not len(sample):
            return {}
        return evaluate_link_prediction(scorer, sample, known=data.known, num_entities=model.num_entities, block=64)

    results = {"steps": fitted.steps, "seconds": fitted.seconds, "length": length, "encoder_mode": cfg.encoder_mode,
               "mlm": "yes" if encoder.has_mlm_head and cfg.mlm_weight else "skipped: no masked-LM head",
               "named_entities": sum(bool(w) for w in words.entity), **finite(fitted.metrics),
               "link_prediction": judge(scorers["vectors"]), "link_prediction_words_alone": judge(scorers["words"]),
               "structure_before": evaluate(model, tables, data, 2)}
    return TextTraining(fitted.params["tables"], fitted.params["bridge"], scorers["vectors"], results)


def _text_seconds(encoder: Any, tokens: int) -> float:
    return 8.0 + 4.0 * layer_weights(encoder.config) * tokens / ENCODER_FLOPS
