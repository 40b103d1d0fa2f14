"""The towers with a text encoder that learns inside them: L_REC and L_CF reach the words, and L_MLM keeps them words.

A step reads the texts of a fixed number of items (see `data.encoded_batches`); all other items have the vector of the
step in which they were read last (see `models.text_towers`), so there is no pass over the catalogue on the way. After
the training every text is read once, by the merged weights, and these vectors take the place of the earlier ones
everywhere: in the towers, in the closed forms, in the recommender, beside the weights that its queries are read with.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kgrec_jax import train
from kgrec_jax.data.dataset import Interactions
from kgrec_jax.data.encoded_batches import EncodedBatch, EncodedBatches
from kgrec_jax.data.history_batches import CandidateBatches
from kgrec_jax.data.text import Tokenizer, load_tokenizer
from kgrec_jax.models import encoders
from kgrec_jax.models.peft import PeftConfig, check
from kgrec_jax.models.recommender import TowerPart, TunedTexts
from kgrec_jax.models.text_towers import TextReader, memory, remembered
from kgrec_jax.models.tower_config import TowerConfig
from kgrec_jax.models.towers import ItemFeatures, Towers
from kgrec_jax.optim import OptimConfig, by_part, make_optimizer
from kgrec_jax.pretrained.hf import Encoder
from kgrec_jax.stages import fuse_towers, item_features, pretrain, pretrain_model
from kgrec_jax.stages.fuse_towers import TOWER_RULES, TowerTraining

TEXT = "text"  # the block of the features that the encoder makes


@dataclasses.dataclass(frozen=True)
class EncoderTraining:
    """What of the encoder learns in fusion, from where on, and on which texts."""

    encoder: Encoder  # its shape and its tokenizer's folder
    reader: TextReader
    weights: dict  # of the backbone, at the beginning
    head: dict  # of the masked-LM, at the beginning; {} without L_MLM
    tokenizer: Tokenizer
    texts: Sequence[str]  # [I]
    length: int  # tokens of a text that are read
    items: int  # texts of a step
    mask_share: float  # 0 without L_MLM
    optim: OptimConfig  # of encoder and head

    @staticmethod
    def of(experiment: Any, run: Any, source: str) -> EncoderTraining | None:
        """That of a run whose texts were read by the weights `source`; None where nothing of an encoder learns.

        KgrecError for a decoder, or a rank that the encoder is too narrow for.
        """
        cfg = experiment.fuse
        if cfg.encoder == "frozen":
            return None
        if source in ("", item_features.NGRAMS):
            why = "no item has a text" if not source else f"{source} read the items, and nothing of them learns"
            run.tracker.say(f"fuse: the encoder stays as it is: {why}")
            return None
        encoder = pretrain.released_encoder(experiment, run)
        peft = PeftConfig(cfg.encoder, rank=cfg.encoder_rank, alpha=cfg.encoder_alpha)
        check(peft, encoder.config)
        tokenizer = load_tokenizer(encoder.tokenizer_folder, encoder.config.vocab_size)
        texts = item_features.item_texts(run.dataset)
        weights = item_features.text_candidates(experiment, run, encoder)[source]
        head = {}
        if cfg.mlm_weight:
            left = pretrain.stage_encoder(experiment, run).params.get("cls")
            ids = tokenizer.encode([text for text in texts if text.strip()], cfg.text_length, special=False)
            head = left or pretrain.fresh_head(encoder.config, ids, jax.random.key(experiment.seed))
        return EncoderTraining(
            encoder, TextReader(encoder.config, peft, encoder.dtype), encoders.backbone(encoder.config, weights), head,
            tokenizer, texts, min(cfg.text_length, encoder.config.max_position_embeddings), cfg.encoder_items,
            experiment.pretrain.mask_share if cfg.mlm_weight else 0.0, cfg.encoder_optim)

    @functools.cached_property
    def ids(self) -> list[list[int]]:
        """[I] tokens of each item's text with the special ones; empty where it has none."""
        rows = [row for row, text in enumerate(self.texts) if text.strip()]
        out: list[list[int]] = [[] for _ in self.texts]
        for row, tokens in zip(rows, self.tokenizer.encode([self.texts[r] for r in rows], self.length), strict=True):
            out[row] = tokens
        return out

    @property
    def padded(self) -> int:
        """L: tokens to which the texts of a step are padded, those of the longest text."""
        return max(map(len, self.ids))

    def encode(self, weights: Mapping, folder: pathlib.Path, run: Any) -> np.ndarray:
        """[I, d] vectors of all items, kept in `folder` so that a run that goes on reads nothing twice."""
        held = folder / "text.npz"
        if held.is_file():
            return item_features.load_texts(held, len(self.texts))[0]
        vectors = item_features.encode(self.encoder, weights, self.tokenizer, list(self.texts), self.length, run,
                                       f"item texts by {folder.name}")
        item_features.save_texts(held, vectors, "fuse", {})
        return vectors


def loss(cfg: TowerTraining, model: Towers, reader: TextReader, params: Any, constants: Mapping[str, Any],
         batch: EncodedBatch, key: jax.Array) -> tuple[jax.Array, dict]:
    """`fuse_towers.loss` with the vectors of the step's texts in it and, where tokens are hidden, with L_MLM.

    params: {"towers", "encoder": what of it learns, "head": of the masked-LM, "bank" [I, d]}. constants: {"features"
    without text vectors, "encoder": the weights that do not learn}.
    """
    tower_key, word_key = jax.random.split(key)
    weights = reader.merged(constants["encoder"], params["encoder"])
    vectors = reader.vectors(weights, batch.input_ids, batch.attention_mask)  # [E, d]
    features = constants["features"]
    features = dataclasses.replace(
        features, vectors={**features.vectors, TEXT: jax.lax.stop_gradient(params["bank"])})
    words = None
    if batch.masked is not None:
        words = pretrain_model.loss(reader.config, {**weights, "cls": params["head"]}, batch.masked, word_key,
                                    reader.dtype)[1]["loss"]
    total, told = fuse_towers.loss(cfg, model, params["towers"], features, batch.told, tower_key,
                                   fresh={TEXT: (batch.place, vectors)}, words=words)
    return total + remembered(params["bank"], batch.item, vectors), told


def fit_text_towers(shape: TowerConfig, cfg: TowerTraining, training: EncoderTraining, features: ItemFeatures,
                    log: Interactions, folder: pathlib.Path, run: Any, seed: int) -> TowerPart:
    """The towers and the encoder trained on one log; `tuned` of the part has the vectors and weights that came of it.

    The features' text vectors are those of the encoder's first weights. Checkpoints and metrics go to `folder`.
    """
    num_items, steps = run.dataset.num_items, cfg.num_steps(len(np.unique(log.user)))
    devices, reader = run.mesh.shape["data"], training.reader
    told = fuse_towers.batches(shape, cfg.batch, steps, log, num_items, seed, devices)
    source = EncodedBatches.of(told, training.ids, training.tokenizer, items=training.items, length=training.padded,
                               mask_share=training.mask_share, seed=seed, multiple=devices)
    edges = fuse_towers.row_edges(features, told.num_rows) if isinstance(told, CandidateBatches) else None
    model = Towers(shape, num_items, edges)
    run.tracker.say(f"fuse {folder.name}: the encoder learns along ({reader.peft.method}): {steps:,} steps of "
                    f"{source.num_rows} texts × {source.length} tokens")

    def init(key: jax.Array) -> dict:
        tower_key, encoder_key = jax.random.split(key)
        tree = {"towers": fuse_towers.init(cfg, model, features, tower_key, bool(training.head)),
                "encoder": reader.init(training.weights, encoder_key), "bank": jnp.asarray(features.vectors[TEXT])}
        return {**tree, "head": training.head} if training.head else tree

    slow = make_optimizer(training.optim, steps)
    parts = {"towers": make_optimizer(cfg.optim, steps), "encoder": slow, "bank": memory()}
    others = dataclasses.replace(features, vectors={n: v for n, v in features.vectors.items() if n != TEXT})
    base = reader.base(training.weights)
    fitted = train.fit(
        workdir=folder, init_fn=init, loss_fn=functools.partial(loss, cfg, model, reader), source=source,
        constants={"features": others, "encoder": base}, seed=seed, mesh=run.mesh, rules=TOWER_RULES,
        tx=by_part({**parts, "head": slow} if training.head else parts), log_every=cfg.log_every,
        checkpoint_every=cfg.checkpoint_every, label=f"fuse {folder.name}", tracker=run.tracker)
    params = jax.device_get(fitted.params)
    weights = jax.device_get(jax.jit(reader.merged)(base, params["encoder"]))
    vectors = training.encode(weights, folder, run)
    features = dataclasses.replace(features, vectors={**features.vectors, TEXT: jnp.asarray(vectors)})
    part = fuse_towers.tower_part(model, params["towers"], features)
    return dataclasses.replace(part, tuned=TunedTexts(vectors, weights))
