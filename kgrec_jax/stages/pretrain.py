"""The pretraining stage: hidden tokens (a GPT: next ones) of texts, so that the encoder has read what it recommends.

A checkpoint without a masked-LM head gets a fresh one, which is trained alone first: its first gradients are noise that
would spoil the encoder. Then head and encoder learn together, the encoder through LoRA (merged before the weights are
handed on) or whole. From scratch, a vocabulary and an encoder of a given shape are learned from the texts alone.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kgrec_jax import checkpoint, train
from kgrec_jax.data.mlm_batches import SOURCES
from kgrec_jax.data.text import Tokenizer, coverage, load_tokenizer
from kgrec_jax.errors import KgrecError
from kgrec_jax.models import encoders
from kgrec_jax.models.encoder_config import MINILM_WEIGHTS, layer_weights
from kgrec_jax.optim import OptimConfig, make_optimizer
from kgrec_jax.pretrained.hf import Encoder, load_encoder
from kgrec_jax.sharding import put, put_batch, shardings
from kgrec_jax.stages.pretrain_config import MAX_HEAD_STEPS, MAX_STEPS, Config, Plan, Shape, check, make_plan
from kgrec_jax.stages.pretrain_corpus import Corpus, learn_vocabulary, make_corpus, open_corpus, source_of, texts_of
from kgrec_jax.stages.pretrain_model import (evaluate, fresh_encoder, fresh_head, head_of, init, loss, mean_cosine,
                                             merge, word_counts)
from kgrec_jax.tracking import write_json

__all__ = ["MAX_HEAD_STEPS", "MAX_STEPS", "Config", "Corpus", "Plan", "Shape", "check", "evaluate", "fresh_head",
           "init", "loss", "make_corpus", "make_plan", "merge", "run", "stage_encoder", "texts_of"]

FIGURES = ("masked_accuracy", "next_token_accuracy", "perplexity")


def run(experiment: Any, run: Any) -> dict:
    """Trains the encoder on the texts; leaves `encoder` (weights with head) and `encoder.json`, from scratch also
    `tokenizer`; a corpus of files is kept as `tokens`.

    Returns what done.json holds: steps, accuracy and perplexity on held-out texts after the head alone and at the end
    (of a longer training also the way there), the mean cosine between texts before and after; or {"skipped": reason},
    and then the released encoder is what the next stages use, or none where the tokenizer does not know the language
    (`text_fallback` is true).
    """
    cfg: Config = experiment.pretrain
    if cfg.mode == "off":
        return {"skipped": "pretrain.mode is off"}
    check(cfg)
    source = source_of(cfg, run)
    if source is None:
        return {"skipped": "neither items nor entities have texts"}
    folder, say = run.stage("pretrain"), run.tracker.say
    if cfg.mode == "scratch":
        tokens = learn_vocabulary(cfg, source, folder / "tokenizer", experiment.seed, say)
        tokenizer = load_tokenizer(tokens)
        causal = cfg.objective == "causal"
        encoder = Encoder(cfg.shape.encoder(tokenizer.vocab_size, causal), {}, not causal, tokens)
    else:
        encoder = load_encoder(experiment.encoder, say=say)
        tokenizer = load_tokenizer(encoder.tokenizer_folder, encoder.config.vocab_size)
    check(cfg, encoder.config)
    texts = source.sample() if source.files else [text for text, _ in source.read()]
    known = coverage(tokenizer, texts)
    figures = {"texts": len(texts), "coverage": dataclasses.asdict(known)}
    if known.reason:
        if source.files:
            raise KgrecError(f"pretrain.corpus: found that {known.reason}, expected texts in the encoder's language; "
                             "take another encoder or pretrain.mode scratch")
        reason = f"{known.reason}: the text part uses character n-grams instead"
        return {"skipped": reason, "text_fallback": True, **figures}
    corpus = open_corpus(cfg, source, tokenizer, run, experiment.seed)
    figures |= {"texts": corpus.documents, "tokens": corpus.tokens} if source.files else {}
    training = _Training(cfg, encoder, tokenizer, corpus, experiment.seed, run)
    training.announce()
    trained = training.run_all()
    checkpoint.save_tree(folder / "encoder", trained.pop("weights"))
    own = cfg.mode == "scratch"
    about = {"format_version": 1, "source": "scratch" if own else experiment.encoder,
             "tokenizer": "tokenizer" if own else "", "config": encoder.config.to_hf()}
    write_json(folder / "encoder.json", about)
    plan = training.plan
    return {**figures, "head_steps": plan.head_steps, "steps": plan.steps, **trained}


def released_encoder(experiment: Any, run: Any) -> Encoder:
    """The encoder with which all stages share tokenizer and shape: as released, or the one trained from scratch."""
    own = experiment.pretrain.mode == "scratch" and (run.stage("pretrain") / "encoder").is_dir()
    return stage_encoder(experiment, run) if own else load_encoder(experiment.encoder, say=run.tracker.say)


def stage_encoder(experiment: Any, run: Any) -> Encoder:
    """The encoder as this stage left it, or as released where the stage was skipped."""
    folder = run.stage("pretrain")
    file = folder / "encoder.json"
    about = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if about.get("tokenizer"):
        encoder = Encoder(encoders.from_hf(about["config"]), {}, False, folder / about["tokenizer"])
    else:
        encoder = load_encoder(experiment.encoder, say=run.tracker.say)
        if not (folder / "encoder").is_dir():
            return encoder
    has_head = not encoder.is_causal
    weights = checkpoint.load_tree(folder / "encoder", encoders.shapes(encoder.config, has_head))
    # Read onto one device and bound to it: by way of the host they go wherever a mesh of several needs them.
    weights = jax.tree.map(jnp.asarray, jax.device_get(weights))
    return dataclasses.replace(encoder, params=weights, has_mlm_head=has_head)


@dataclasses.dataclass(frozen=True)
class _Training:
    """The trainings of the stage over one corpus."""

    cfg: Config
    encoder: Encoder
    tokenizer: Tokenizer
    corpus: Corpus
    seed: int
    run: Any

    @functools.cached_property
    def plan(self) -> Plan:
        """Steps; packed rows count as texts."""
        source = self.batches(self.corpus.train, 0, 2)
        rows = source.rows if self.cfg.rows == "packed" else len(self.corpus.train)
        return make_plan(self.cfg, rows, encoders.has_head(self.encoder.config, self.encoder.params))

    def announce(self) -> None:
        """Says what is going to happen where the budget of the run cannot foresee it."""
        if not self.cfg.told:
            return
        cfg, shape, plan = self.cfg, self.encoder.config, self.plan
        weights = layer_weights(shape) + cfg.mask_share * shape.vocab_size * shape.hidden_size
        self.run.tracker.say(
            f"pretrain: {cfg.mode}, {shape.num_hidden_layers} layers × {shape.hidden_size}, {shape.vocab_size:,} word "
            f"pieces; {plan.steps:,} steps of {cfg.batch * cfg.accumulate} × {cfg.length} tokens, "
            f"about {plan.seconds * weights / MINILM_WEIGHTS / 60:.1f} minutes on two idle cores")

    def run_all(self) -> dict:
        """The weights as one tree and the figures of done.json."""
        cfg, config, given, mesh = self.cfg, self.encoder.config, self.encoder.params, self.run.mesh
        out: dict[str, Any] = {"seconds": 0.0}
        probe = self.probe()
        if cfg.mode == "scratch":
            counts = word_counts(self.corpus.train, config.vocab_size)
            fitted = self.fit("scratch", self.plan.steps, cfg.optim, {}, join=lambda params, base: params,
                              init_fn=functools.partial(fresh_encoder, config, counts))
            out["weights"] = fitted.params
        else:
            backbone = encoders.backbone(config, given)
            placed = put(backbone, shardings(backbone, mesh, encoders.rules(config)))
            out["cosine_before"] = float(mean_cosine(config, placed, *probe))
            head = given.get("cls", {}) if encoders.has_head(config, given) else self.head(placed, out)
            if cfg.mode == "lora":
                fitted = self.fit("lora", self.plan.steps, cfg.optim, placed,
                                  init_fn=lambda key: init(cfg, backbone, head, key),
                                  join=lambda params, base: merge(cfg, params, base))
                out["weights"] = jax.jit(functools.partial(merge, cfg))(fitted.params, placed)
            else:
                fitted = self.fit("full", self.plan.steps, cfg.optim, {}, join=lambda params, base: params,
                                  init_fn=lambda key: {**backbone, **({"cls": head} if head else {})})
                out["weights"] = fitted.params
        out["heldout"] = self.figures(fitted)
        out["seconds"] += fitted.seconds
        if cfg.told:
            out["way"] = self.way(cfg.mode)
        out["cosine_after"] = float(mean_cosine(config, out["weights"], *probe))
        return out

    def head(self, placed: dict, out: dict) -> dict:
        """A fresh head, trained alone."""
        counts = word_counts(self.corpus.train, self.encoder.config.vocab_size)
        fitted = self.fit("head", self.plan.head_steps, self.cfg.head_optim, placed,
                          init_fn=functools.partial(head_of, self.encoder.config, counts),
                          join=lambda head, base: {**base, "cls": head})
        out["head_only"] = self.figures(fitted)
        out["seconds"] += fitted.seconds
        return fitted.params

    def probe(self) -> tuple[jax.Array, jax.Array]:
        """Ids and mask [B, L] of evenly spaced texts with nothing hidden; rows without text are padding."""
        ids, rows = self.corpus.train, self.cfg.batch
        chosen = [np.asarray(ids[i]) for i in np.unique(np.linspace(0, len(ids) - 1, min(rows, len(ids))).astype(int))]
        special = [(self.tokenizer.cls_id, *np.where(row < 0, ~row, row)[: self.cfg.length - 2].tolist(),
                    self.tokenizer.sep_id) for row in chosen]
        return put_batch(self.tokenizer.pad([*special, *[()] * (rows - len(special))], self.cfg.length), self.run.mesh)

    def batches(self, ids: Any, num_steps: int, stream: int, cover: bool = False) -> Any:
        """Batches over `ids`; `stream` keeps the trainings from seeing the same ones."""
        cfg = self.cfg
        batch = cfg.batch if cover else cfg.batch * cfg.accumulate
        by = "next" if self.encoder.is_causal else "token" if cfg.masking == "token" else "word"
        return SOURCES[cfg.rows](ids, self.tokenizer, num_steps, batch, cfg.length, cfg.mask_share,
                                 (self.seed, stream), cover, by)

    def heldout(self) -> Any:
        """Batches that cover the held-out texts; of packed ones at most `valid_limit` rows."""
        cfg, ids = self.cfg, self.corpus.valid
        steps = self.batches(ids, 0, 0, cover=True).per_epoch if len(ids) else 0
        return self.batches(ids, min(steps, -(-cfg.valid_limit // cfg.batch)), 0, cover=True)

    def fit(self, name: str, num_steps: int, optim: OptimConfig, backbone: dict, *, init_fn: Callable,
            join: Callable[[dict, dict], dict]) -> train.FitResult:
        """One training; `join(params, backbone)` gives the whole tree of weights."""
        cfg, config, run = self.cfg, self.encoder.config, self.run
        heldout, joined, told = self.heldout(), jax.jit(join), cfg.told and name != "head"
        every = cfg.eval_every or max(1, num_steps // 10)

        def loss_fn(params, constants, batch, key):
            return loss(config, join(params, constants), batch, key, cfg.dtype, cfg.remat == "on")

        return train.fit(
            workdir=run.stage("pretrain") / name, init_fn=init_fn, loss_fn=loss_fn, constants=backbone,
            source=self.batches(self.corpus.train, num_steps, 1 if name == "head" else 2),
            tx=make_optimizer(optim, num_steps), seed=self.seed, mesh=run.mesh, rules=encoders.rules(config),
            log_every=cfg.log_every, checkpoint_every=cfg.checkpoint_every, eval_every=every if told else 0,
            evaluate=lambda params: evaluate(config, joined(params, backbone), heldout, run.mesh),
            accumulate=cfg.accumulate, ema=cfg.ema if name != "head" else 0.0, tell=told,
            label=f"pretrain ({name})", tracker=run.tracker)

    def way(self, name: str) -> list[dict[str, float]]:
        """The evaluations of a training, from its metrics.jsonl."""
        file = self.run.stage("pretrain") / name / "metrics.jsonl"
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
        return [{"step": row["step"], **{n: row[n] for n in FIGURES if n in row}} for row in rows
                if "perplexity" in row]

    @staticmethod
    def figures(fitted: train.FitResult) -> dict[str, float]:
        """The last evaluation of a training."""
        return {name: fitted.metrics[name] for name in FIGURES if name in fitted.metrics}
