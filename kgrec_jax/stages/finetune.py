"""Fine-tuning an encoder for a task of its own: classification, matching, regression, or contrast without labels.

The encoder learns by any method of `models.peft`, a head of `models.heads` beside it. SimCSE (Gao et al. 2021) has no
head: two passes of the same text with different dropout shall be alike and other texts unlike.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kgrec_jax import checkpoint, compilation_cache, train
from kgrec_jax.config import ENCODER
from kgrec_jax.data.finetune import ExampleBatch, ExampleSource, Task, TextBatch
from kgrec_jax.errors import KgrecError
from kgrec_jax.evaluation.finetune_metrics import classification_metrics, regression_metrics
from kgrec_jax.models import bert, encoders, heads, peft
from kgrec_jax.optim import OptimConfig, by_part, make_optimizer
from kgrec_jax.sharding import MeshConfig, make_mesh, put, put_batch, shardings
from kgrec_jax.stages.bounds import check_bounds, check_optimizers
from kgrec_jax.stages.finetune_data import FinetuneData, Prepared, ScratchConfig, open_run, prepare
from kgrec_jax.tracking import Tracker, write_json

FORMAT_VERSION = 1
PROBE = 512  # texts at most by which alignment and uniformity are measured


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """Everything that a fine-tuning depends on, beside the content of its data."""

    name: str = "finetune"  # what to call the run
    seed: int = 0  # of everything that is drawn
    task: Literal["classification", "matching", "regression", "simcse"] = "classification"
    encoder: str = ENCODER  # a source, or "scratch": a fresh one
    scratch: ScratchConfig = ScratchConfig()  # the shape of encoder=scratch
    data: FinetuneData = FinetuneData()  # the examples
    mesh: MeshConfig = MeshConfig()  # how the devices are arranged
    peft: peft.PeftConfig = peft.PeftConfig()  # what of the encoder learns
    pooling: Literal["mean", "cls"] = "mean"  # the vector of a text
    temperature: float = 0.05  # simcse; matching: the first one, which learns
    epochs: float = 3.0  # passes over the examples where `steps` is 0
    steps: int = 0  # of the training; 0: from `epochs`
    batch: int = 32  # examples of a step
    length: int = 64  # tokens of an example at most; shorter where the examples are
    optim: OptimConfig = OptimConfig(peak_lr=5e-4)  # of what learns in the encoder
    head_optim: OptimConfig = OptimConfig(peak_lr=5e-3)  # of the head
    log_every: int = 20  # steps between two rows of metrics.jsonl
    checkpoint_every: int = 100  # steps between two checkpoints


@dataclasses.dataclass(frozen=True)
class Model:
    """Pure functions of what learns, {"encoder", "head"}, and of the encoder's given weights, `base`."""

    task: Task
    encoder: bert.BertConfig
    peft: peft.PeftConfig
    pooling: Literal["mean", "cls"]
    temperature: float
    classes: int

    def init(self, weights: dict, key: jax.Array) -> dict:
        """A fresh tree around given weights; the head alone where the encoder is frozen."""
        encoder_key, head_key = jax.random.split(key)
        width = self.encoder.hidden_size
        head = {"classification": lambda: heads.init_classification(width, self.classes, head_key),
                "regression": lambda: heads.init_regression(width),
                "matching": lambda: heads.init_matching(self.temperature), "simcse": dict}[self.task]()
        return {"encoder": peft.init(self.peft, self.encoder, weights, encoder_key), "head": head}

    def vectors(self, params: dict, base: dict, texts: TextBatch, key: jax.Array | None = None) -> jax.Array:
        """Pooled vectors [B, D] of texts; with dropout where there is a key."""
        ids, mask, types = (jnp.asarray(x) for x in (texts.input_ids, texts.attention_mask, texts.token_type_ids))
        states = peft.hidden_states(self.peft, self.encoder, base, params["encoder"], ids, mask, types, key=key)
        return heads.pool(states[-1], mask, self.pooling)

    def both(self, params: dict, base: dict, batch: ExampleBatch, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """The vectors of both sides of matching, or of two passes over the same texts (simcse), [B, D] each."""
        other = batch.second if self.task == "matching" else batch.first
        # One run over 2B rows, each with dropout of its own, costs less to compile and to run than two.
        joined = jax.tree.map(lambda a, b: jnp.concatenate([jnp.asarray(a), jnp.asarray(b)]), batch.first, other)
        first, second = jnp.split(self.vectors(params, base, joined, key), 2)
        return first, second

    def pair_scores(self, params: dict, base: dict, batch: ExampleBatch, key: jax.Array | None) -> jax.Array:
        """Scaled cosines [B, B] of a batch's pairs."""
        first, second = self.both(params, base, batch, key)
        scale = heads.learned_scale(params["head"]) if self.task == "matching" else 1.0 / self.temperature
        ids = batch.second.input_ids if self.task == "matching" else batch.first.input_ids
        return heads.pair_scores(first, second, scale, jnp.asarray(batch.weight), heads.same_rows(jnp.asarray(ids)))

    def predict(self, params: dict, base: dict, batch: ExampleBatch) -> jax.Array:
        """What the head says of each example, [B]: a class's row, a standardised value, whether its pair is found."""
        if self.task in ("matching", "simcse"):
            return heads.in_batch_right(self.pair_scores(params, base, batch, None), jnp.asarray(batch.weight))
        vectors = self.vectors(params, base, batch.first)
        if self.task == "regression":
            return heads.regress(params["head"], vectors)
        return jnp.argmax(heads.class_logits(params["head"], vectors), axis=-1).astype(jnp.float32)


def loss(model: Model, params: dict, base: dict, batch: ExampleBatch, key: jax.Array) -> tuple[jax.Array, dict]:
    """Mean loss of an example with dropout, plus the method's penalty; metrics as (sum, count)."""
    weight, target = jnp.asarray(batch.weight), jnp.asarray(batch.target)
    count, metrics = weight.sum(), {}
    if model.task in ("matching", "simcse"):
        scores = model.pair_scores(params, base, batch, key)
        each = heads.info_nce(scores, weight)
        if model.task == "matching":  # both ways, as in Radford et al. 2021; SimCSE's equation 4 has one
            each = 0.5 * (each + heads.info_nce(scores.T, weight))
        metrics["train_in_batch_accuracy"] = heads.in_batch_right(scores, weight).sum(), count
    else:
        vectors = model.vectors(params, base, batch.first, key)
        if model.task == "classification":
            each = heads.class_losses(params["head"], vectors, target.astype(jnp.int32), weight)
        else:
            each = heads.regression_losses(params["head"], vectors, target, weight)
    total = each.sum() / jnp.maximum(count, 1.0) + peft.penalty(model.peft, params["encoder"])
    return total, {"task_loss": (each.sum(), count), **metrics}


@functools.partial(jax.jit, static_argnums=0)
def _predict(model: Model, params: dict, base: dict, batch: ExampleBatch) -> jax.Array:
    return model.predict(params, base, batch)


@functools.partial(jax.jit, static_argnums=0)
def _passes(model: Model, params: dict, base: dict, batch: ExampleBatch, key: jax.Array) -> tuple[jax.Array, ...]:
    """Unit vectors [B, D] of texts: without dropout, and of two passes with."""
    plain = model.vectors(params, base, batch.first)
    return tuple(heads.unit(x) for x in (plain, *model.both(params, base, batch, key)))


def evaluate(model: Model, params: dict, base: dict, prepared: Prepared, batch: int, mesh: Any) -> dict[str, float]:
    """The task's metrics on the held-out examples; they do not depend on `batch`, but for in-batch accuracy."""
    source = prepared.source("dev", -(-len(prepared.dev) // batch), batch, (0,), cover=True)
    if model.task == "simcse":
        return _contrast_metrics(model, params, base, source, mesh)
    found = [np.asarray(_predict(model, params, base, put_batch(source[i], mesh))) for i in range(len(source))]
    values = np.concatenate(found)[:len(prepared.dev)]
    if model.task == "classification":
        return classification_metrics(values.astype(int), prepared.dev.target.astype(int), model.classes)
    if model.task == "regression":
        scale = prepared.scale
        return regression_metrics(values * scale + prepared.mean, prepared.dev.target * scale + prepared.mean)
    return {"in_batch_accuracy": float(values.mean()), "in_batch_size": float(min(batch, len(values)))}


def _contrast_metrics(model: Model, params: dict, base: dict, source: ExampleSource, mesh: Any) -> dict[str, float]:
    """Alignment of two dropout passes, and uniformity of the texts, of at most PROBE texts."""
    parts: list[tuple[np.ndarray, ...]] = []
    for step in range(min(len(source), -(-PROBE // source.batch))):
        batch = source[step]
        rows = int(batch.weight.sum())
        key = jax.random.fold_in(jax.random.key(17), step)
        parts.append(tuple(np.asarray(x)[:rows] for x in _passes(model, params, base, put_batch(batch, mesh), key)))
    plain, first, second = (jnp.asarray(np.concatenate(x)) for x in zip(*parts, strict=True))
    return {"alignment": float(heads.alignment(first, second)), "uniformity": float(heads.uniformity(plain))}


def optimizer(cfg: FinetuneConfig, steps: int) -> optax.GradientTransformation:
    """Encoder and head at their own rates; with the rank allocation of AdaLoRA where that is the method."""
    return by_part({"encoder": peft.optimizer(cfg.peft, make_optimizer(cfg.optim, steps), steps),
                    "head": make_optimizer(cfg.head_optim, steps)})


def check(cfg: FinetuneConfig) -> None:
    """KgrecError naming the first field that no training can do anything with."""
    many = 1 << 20
    check_bounds("finetune", cfg, {
        "temperature": (1e-3, 1e3), "epochs": (0.0, 1e6), "steps": (0, many), "batch": (2, many), "length": (4, many),
        "scratch.vocab_size": (16, many), "data.valid_share": (0.0, 0.9)})
    check_optimizers("finetune", cfg, ("optim", "head_optim"))
    if cfg.task == "simcse" and cfg.peft.method == "frozen":
        raise KgrecError("peft.method: found frozen for simcse, which has no head, expected another method; nothing "
                         "would learn")


def run(cfg: FinetuneConfig, workdir: pathlib.Path | str, quiet: bool = False) -> dict:
    """Tunes and measures; the report, which report.json holds too. The same call goes on where it stopped.

    RUN is left with finetune.json, training/ (checkpoints, metrics.jsonl), model/ (head and what was tuned),
    encoder/ and encoder.json (plain weights, where the method can be merged) and report.json. Raises KgrecError for bad
    input or a folder of another run, Interrupted after Ctrl-C once the state is saved.
    """
    check(cfg)
    workdir = pathlib.Path(workdir)
    tracker = Tracker(workdir, quiet)
    before = open_run(cfg, workdir, FORMAT_VERSION)
    if before is not None:
        return before
    compilation_cache.enable()
    prepared = prepare(cfg, workdir, tracker.say)
    config, mesh = prepared.config, make_mesh(cfg.mesh)
    model = Model(cfg.task, config, cfg.peft, cfg.pooling, cfg.temperature, len(prepared.classes))
    peft.check(cfg.peft, config)
    steps = cfg.steps or max(1, math.ceil(cfg.epochs * len(prepared.train) / cfg.batch))
    backbone = encoders.backbone(config, prepared.weights)
    base = peft.base(cfg.peft, config, backbone)
    abstract = jax.eval_shape(lambda key: model.init(backbone, key), jax.random.key(0))
    share = peft.share(backbone, abstract["encoder"])
    tracker.say(f"finetune: {cfg.task}, {len(prepared.train):,} examples of at most {prepared.length} tokens, "
                f"{len(prepared.dev):,} held out; {cfg.peft.method} trains {share:.2%} of the encoder; {steps:,} steps "
                f"of {cfg.batch}")
    placed = put(base, shardings(base, mesh, encoders.rules(config)))

    def measure(params: dict) -> dict[str, float]:
        return evaluate(model, params, placed, prepared, cfg.batch, mesh)

    with jax.set_mesh(mesh):
        first = {}
        if cfg.task == "simcse":
            first = {f"{k}_before": v for k, v in measure(model.init(backbone, jax.random.key(cfg.seed))).items()}
    fitted = train.fit(
        workdir=workdir / "training", init_fn=lambda key: model.init(backbone, key), constants=base,
        loss_fn=lambda params, constants, batch, key: loss(model, params, constants, batch, key),
        source=prepared.source("train", steps, cfg.batch, (cfg.seed, 7)), tx=optimizer(cfg, steps), seed=cfg.seed,
        mesh=mesh, rules=encoders.rules(config), log_every=cfg.log_every, checkpoint_every=cfg.checkpoint_every,
        evaluate=measure, label="finetune", tracker=tracker)
    report = {"format_version": FORMAT_VERSION, "task": cfg.task, "method": cfg.peft.method, "trainable_share": share,
              "examples": len(prepared.train), "held_out": len(prepared.dev), "classes": prepared.classes,
              "steps": fitted.steps, "seconds": fitted.seconds, "metrics": {**first, **fitted.metrics}}
    _save(cfg, workdir, prepared, base, fitted.params)
    write_json(workdir / "report.json", report)
    return report


def _save(cfg: FinetuneConfig, workdir: pathlib.Path, prepared: Prepared, base: dict, params: dict) -> None:
    held = jax.device_get(params)
    checkpoint.save_tree(workdir / "model", {name: tree for name, tree in held.items() if tree})
    if not peft.is_mergeable(cfg.peft):
        return  # what was tuned is in model/ alone
    checkpoint.save_tree(workdir / "encoder", jax.device_get(peft.merge(cfg.peft, base, params["encoder"])))
    write_json(workdir / "encoder.json", {"format_version": FORMAT_VERSION, "source": cfg.encoder,
                                          "config": prepared.config.to_hf()})
