"""The pretraining stage: L_MLM over the texts of the data set, so that the encoder has read what it will recommend.

A checkpoint without a masked-LM head gets a fresh one, which is trained alone first: its first gradients are noise that
would spoil the encoder. Then head and encoder learn together, the encoder through LoRA; the adapters are merged before
the weights are handed on.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from kgrec_jax import checkpoint, losses, train
from kgrec_jax.data.dataset import Dataset
from kgrec_jax.data.mlm_batches import MaskedBatch, MaskedTexts
from kgrec_jax.data.text import Tokenizer, coverage, load_tokenizer
from kgrec_jax.errors import KgrecError
from kgrec_jax.models import bert, peft
from kgrec_jax.models.text_encoder import encode_batch
from kgrec_jax.optim import OptimConfig, make_optimizer
from kgrec_jax.pretrained.hf import Encoder, load_encoder
from kgrec_jax.sharding import put, put_batch, shardings
from kgrec_jax.tracking import write_json

MAX_HEAD_STEPS, MAX_STEPS = 24, 36
TOKENS_PER_TEXT = 512  # of a long text no more is read
TOKENS_PER_SECOND = 1000.0  # of a small encoder's training on two cores


@dataclasses.dataclass(frozen=True)
class Config:
    """What the pretraining stage trains and for how long; 0 steps: from the number of texts."""

    mode: Literal["lora", "off"] = "lora"  # off: the encoder stays as it was released, without a masked-LM head
    head_steps: int = 0  # steps of a fresh head alone; 0: four passes over the texts, at most 24
    steps: int = 0  # steps of head and adapters; 0: four passes over the texts, at most 36
    batch: int = 32  # texts of a step
    length: int = 32  # tokens of a text in a step; a longer text gives a window
    mask_share: float = 0.15  # of the tokens
    valid_share: float = 0.1  # of the texts, held out for the figures of done.json
    valid_limit: int = 256  # texts held out at most
    lora_rank: int = 8  # rank of the adapters
    lora_alpha: float = 16.0  # the adapters' product counts alpha / rank
    head_optim: OptimConfig = OptimConfig(peak_lr=3e-3)  # of the head alone
    optim: OptimConfig = OptimConfig(peak_lr=3e-4)  # of head and adapters
    log_every: int = 10  # steps between two rows of metrics.jsonl
    checkpoint_every: int = 20  # steps between two checkpoints


@dataclasses.dataclass(frozen=True)
class Plan:
    """The steps that follow from the number of texts, and about how long they take on two cores."""

    head_steps: int
    steps: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The texts of a data set as token ids, some of them held out."""

    train: tuple[tuple[int, ...], ...]
    valid: tuple[tuple[int, ...], ...]


def texts_of(dataset: Dataset) -> list[str]:
    """Every distinct non-empty text of items and entities, in order. Interactions have no part in it."""
    graph = dataset.graph
    others = zip(graph.entity_names[graph.num_items:], graph.entity_texts[graph.num_items:], strict=True)
    entities = [f"{name}. {text}" if name else text for name, text in others if text.strip()]
    return list(dict.fromkeys(text for text in [*dataset.item_texts, *entities] if text.strip()))


def make_corpus(cfg: Config, texts: list[str], tokenizer: Tokenizer, seed: int) -> Corpus:
    """Token ids of `texts`, `valid_share` of them held out by the seed."""
    ids = [tuple(row) for row in tokenizer.encode(texts, TOKENS_PER_TEXT, special=False) if row]
    order = np.random.default_rng(seed).permutation(len(ids))
    held_out = min(int(cfg.valid_share * len(ids)), cfg.valid_limit)
    return Corpus(tuple(ids[i] for i in np.sort(order[held_out:])), tuple(ids[i] for i in np.sort(order[:held_out])))


def make_plan(cfg: Config, num_texts: int, has_head: bool) -> Plan:
    """Steps of both trainings for so many texts."""
    four_passes = max(-(-4 * num_texts // cfg.batch), 4)
    head_steps = 0 if has_head else cfg.head_steps or min(four_passes, MAX_HEAD_STEPS)
    steps = cfg.steps or min(four_passes, MAX_STEPS)
    tokens = cfg.batch * cfg.length
    return Plan(head_steps, steps, 10 + tokens * (steps + head_steps / 2) / TOKENS_PER_SECOND)


def fresh_head(config: bert.BertConfig, ids: tuple[tuple[int, ...], ...], key: jax.Array) -> dict:
    """A masked-LM head that begins as a good guess: the word's frequency in `ids`, plus its likeness to the output.

    Against a random dense layer and a zero bias this saves most of the steps that a fresh head needs.
    """
    head = bert.init_head(config, key)["predictions"]
    counts = np.bincount(np.concatenate([np.asarray(row) for row in ids]), minlength=config.vocab_size) + 0.05
    dense = {**head["transform"]["dense"], "kernel": jnp.eye(config.hidden_size, dtype=jnp.float32)}
    return {"predictions": {"transform": {**head["transform"], "dense": dense},
                            "bias": jnp.asarray(np.log(counts / counts.sum()), jnp.float32)}}


def init(cfg: Config, encoder: dict, head: dict, key: jax.Array) -> dict:
    """What the second training changes: {"lora": adapters of the encoder, "cls": head}."""
    return {"lora": peft.lora_init(encoder, key, cfg.lora_rank), "cls": head}


def merge(cfg: Config, params: dict, encoder: dict) -> dict:
    """Encoder and head as one tree with the adapters merged."""
    return {**peft.lora_merge(encoder, params["lora"], cfg.lora_alpha), "cls": params["cls"]}


def loss(config: bert.BertConfig, weights: dict, batch: MaskedBatch, key: jax.Array) -> tuple[jax.Array, dict]:
    """Mean cross-entropy of the hidden tokens (with dropout), and its (sum, count)."""
    queries, bias = _queries(config, weights, batch, key)
    each = losses.table_cross_entropy(queries, bert.word_table(weights), batch.targets.reshape(-1),
                                      weights=batch.weights.reshape(-1), bias=bias)
    count = batch.weights.sum()
    return each.sum() / jnp.maximum(count, 1.0), {"mlm_loss": (each.sum(), count)}


def evaluate(config: bert.BertConfig, weights: dict, batches: MaskedTexts, mesh: jax.sharding.Mesh) -> dict[str, float]:
    """Accuracy and perplexity of the hidden tokens of `batches`; nothing where there are none."""
    sums = np.zeros(3)
    for step in range(len(batches)):
        sums += np.asarray(_score(config, weights, put_batch(batches[step], mesh)), np.float64)
    if not sums[2]:
        return {}
    return {"masked_accuracy": sums[0] / sums[2], "perplexity": float(np.exp(sums[1] / sums[2]))}


def _queries(config, weights, batch, key=None):
    """(queries [B M, D], bias [vocab]) of the hidden tokens; with dropout where there is a key."""
    rngs = None if key is None else {"dropout": key}
    hidden = bert.Bert(config).apply({"params": weights}, batch.input_ids, batch.attention_mask,
                                     jnp.zeros_like(batch.input_ids), deterministic=key is None, rngs=rngs)[-1]
    masked = bert.gather_positions(hidden, batch.positions)  # [B, M, D]
    return bert.mlm_queries(config, weights, masked.reshape(-1, masked.shape[-1]))


@functools.partial(jax.jit, static_argnums=0)
def _score(config, weights, batch):
    """(right answers, summed loss, number) of the hidden tokens, [3]."""
    queries, bias = _queries(config, weights, batch)
    logits = queries @ bert.word_table(weights).T + bias[None]  # [B M, vocab]
    targets, counts = batch.targets.reshape(-1), batch.weights.reshape(-1)
    right = jnp.where(jnp.argmax(logits, axis=-1) == targets, counts, 0.0)
    each = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return jnp.stack([right.sum(), (each * counts).sum(), counts.sum()])


@functools.partial(jax.jit, static_argnums=0)
def _mean_cosine(config, weights, input_ids, attention_mask):
    """Mean cosine between two texts of a batch (rows without a token are padding); near 1, nothing is told apart."""
    vectors = encode_batch(config, "float32", weights, input_ids, attention_mask)  # [B, D]
    number = (attention_mask.sum(1) > 0).sum().astype(jnp.float32)
    return (jnp.square(vectors.sum(0)).sum() - number) / jnp.maximum(number * (number - 1), 1.0)


def run(experiment: Any, run: Any) -> dict:
    """Adapts the encoder to the texts of the data set; leaves `encoder` (weights with head) and `encoder.json`.

    Returns what done.json holds: steps, accuracy and perplexity on held-out texts after the head alone and at the end,
    the mean cosine between texts before and after; or {"skipped": reason}, and then the released encoder is what the
    next stages use, or none where the tokenizer does not know the language (`text_fallback` is true).
    """
    cfg: Config = experiment.pretrain
    if cfg.mode == "off":
        return {"skipped": "pretrain.mode is off"}
    texts = texts_of(run.dataset)
    if not texts:
        return {"skipped": "neither items nor entities have texts"}
    encoder = load_encoder(experiment.encoder, say=run.tracker.say)
    tokenizer = load_tokenizer(encoder.tokenizer_folder, encoder.config.vocab_size)
    known = coverage(tokenizer, texts)
    figures = {"texts": len(texts), "coverage": dataclasses.asdict(known)}
    if known.reason:
        reason = f"{known.reason}: the text part uses character n-grams instead"
        return {"skipped": reason, "text_fallback": True, **figures}
    _check(cfg, encoder.config)
    corpus = make_corpus(cfg, texts, tokenizer, experiment.seed)
    plan = make_plan(cfg, len(corpus.train), encoder.has_mlm_head)
    trained = _Training(cfg, encoder, tokenizer, corpus, plan, experiment.seed, run).both()
    folder = run.stage("pretrain")
    checkpoint.save_tree(folder / "encoder", trained.pop("weights"))
    about = {"format_version": 1, "source": experiment.encoder, "config": encoder.config.to_hf()}
    write_json(folder / "encoder.json", about)
    return {**figures, "head_steps": plan.head_steps, "steps": plan.steps, **trained}


def stage_encoder(experiment: Any, run: Any) -> Encoder:
    """The encoder as this stage left it, or as released where the stage was skipped."""
    encoder = load_encoder(experiment.encoder, say=run.tracker.say)
    folder = run.stage("pretrain") / "encoder"
    if not folder.is_dir():
        return encoder
    head = jax.eval_shape(functools.partial(bert.init_head, encoder.config), jax.random.key(0))
    backbone = {name: encoder.params[name] for name in ("embeddings", "encoder")}
    weights = checkpoint.load_tree(folder, {**backbone, "cls": head})
    # Read onto one device and bound to it: by way of the host they go wherever a mesh of several needs them.
    weights = jax.tree.map(jnp.asarray, jax.device_get(weights))
    return dataclasses.replace(encoder, params=weights, has_mlm_head=True)


def _check(cfg: Config, config: bert.BertConfig) -> None:
    bounds = {"length": (3, config.max_position_embeddings), "lora_rank": (1, config.hidden_size),
              "batch": (1, 1 << 20), "mask_share": (1e-6, 0.99), "valid_share": (0.0, 0.9)}
    for name, (low, high) in bounds.items():
        value = getattr(cfg, name)
        if not low <= value <= high:
            raise KgrecError(f"pretrain.{name}: found {value}, expected {low} to {high}")


@dataclasses.dataclass(frozen=True)
class _Training:
    """The two trainings of the stage over one corpus."""

    cfg: Config
    encoder: Encoder
    tokenizer: Tokenizer
    corpus: Corpus
    plan: Plan
    seed: int
    run: Any

    def both(self) -> dict:
        """The merged weights and the figures of done.json."""
        config, given, mesh = self.encoder.config, self.encoder.params, self.run.mesh
        backbone = {name: given[name] for name in ("embeddings", "encoder")}
        placed = put(backbone, shardings(backbone, mesh, bert.BERT_RULES))
        probe = self.probe()
        out: dict[str, Any] = {"seconds": 0.0, "cosine_before": float(_mean_cosine(config, placed, *probe))}
        if self.encoder.has_mlm_head:
            head = given["cls"]
        else:
            fitted = self.fit("head", self.plan.head_steps, self.cfg.head_optim, placed,
                              init_fn=functools.partial(fresh_head, config, self.corpus.train),
                              join=lambda head, base: {**base, "cls": head})
            head, out["head_only"] = fitted.params, self.figures(fitted)
            out["seconds"] += fitted.seconds
        fitted = self.fit("lora", self.plan.steps, self.cfg.optim, placed,
                          init_fn=lambda key: init(self.cfg, backbone, head, key),
                          join=lambda params, base: merge(self.cfg, params, base))
        out["heldout"] = self.figures(fitted)
        out["seconds"] += fitted.seconds
        out["weights"] = jax.jit(functools.partial(merge, self.cfg))(fitted.params, placed)
        out["cosine_after"] = float(_mean_cosine(config, out["weights"], *probe))
        return out

    def probe(self) -> tuple[jax.Array, jax.Array]:
        """Ids and mask [B, L] of evenly spaced texts with nothing hidden; rows without text are padding."""
        ids, rows = self.corpus.train, self.cfg.batch
        chosen = [ids[i] for i in np.unique(np.linspace(0, len(ids) - 1, min(rows, len(ids))).astype(int))]
        special = [(self.tokenizer.cls_id, *row[: self.cfg.length - 2], self.tokenizer.sep_id) for row in chosen]
        return put_batch(self.tokenizer.pad([*special, *[()] * (rows - len(special))], self.cfg.length), self.run.mesh)

    def batches(self, ids: tuple, num_steps: int, stream: int, cover: bool = False) -> MaskedTexts:
        """Batches over `ids`; `stream` keeps the trainings from seeing the same ones."""
        cfg = self.cfg
        return MaskedTexts(ids, self.tokenizer, num_steps, cfg.batch, cfg.length, cfg.mask_share, (self.seed, stream),
                           cover)

    def fit(self, name: str, num_steps: int, optim: OptimConfig, backbone: dict, *, init_fn: Callable,
            join: Callable[[dict, dict], dict]) -> train.FitResult:
        """One training; `join(params, backbone)` gives the whole tree of weights."""
        config, run = self.encoder.config, self.run
        stream = 1 if name == "head" else 2
        heldout = self.batches(self.corpus.valid, -(-len(self.corpus.valid) // self.cfg.batch), 0, cover=True)
        joined = jax.jit(join)

        def loss_fn(params, constants, batch, key):
            return loss(config, join(params, constants), batch, key)

        return train.fit(
            workdir=run.stage("pretrain") / name, init_fn=init_fn, loss_fn=loss_fn, constants=backbone,
            source=self.batches(self.corpus.train, num_steps, stream), tx=make_optimizer(optim, num_steps),
            seed=self.seed, mesh=run.mesh, rules=bert.BERT_RULES, log_every=self.cfg.log_every,
            checkpoint_every=self.cfg.checkpoint_every,
            evaluate=lambda params: evaluate(config, joined(params, backbone), heldout, run.mesh),
            label=f"pretrain ({name})", tracker=run.tracker)

    @staticmethod
    def figures(fitted: train.FitResult) -> dict[str, float]:
        """The last evaluation of a training."""
        return {name: fitted.metrics[name] for name in ("masked_accuracy", "perplexity") if name in fitted.metrics}
