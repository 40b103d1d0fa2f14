"""The functions of the pretraining stage on weights: a head to begin with, adapters, the loss, its evaluation.

A BERT's tokens are hidden and a GPT's are the next ones; the batch says where which token is asked for.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from kgrec_jax import losses
from kgrec_jax.data.mlm_batches import MaskedBatch
from kgrec_jax.models import bert, encoders, gpt, peft
from kgrec_jax.models.encoder_config import BertConfig, EncoderConfig
from kgrec_jax.models.text_encoder import encode_batch
from kgrec_jax.sharding import put_batch
from kgrec_jax.stages.pretrain_config import Config

_SCORED = 1024  # tokens whose logits [n, vocab] an evaluation holds at once
GPT_ATTENTION = (r"attn/c_attn/kernel$",)


def word_counts(ids: Sequence[Sequence[int]], vocab_size: int) -> np.ndarray:
    """[vocab] how often each token stands in the texts (~id counts as id), a thousand texts at a time."""
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, len(ids), 1000):
        some = np.concatenate([np.asarray(ids[i], np.int64) for i in range(start, min(start + 1000, len(ids)))])
        counts += np.bincount(np.where(some < 0, ~some, some), minlength=vocab_size)
    return counts


def fresh_head(config: BertConfig, ids: Sequence[Sequence[int]], key: jax.Array) -> dict:
    """A masked-LM head that begins as a good guess: the word's frequency in `ids`, plus its likeness to the output.

    Against a random dense layer and a zero bias this saves most of the steps that a fresh head needs.
    """
    return head_of(config, word_counts(ids, config.vocab_size), key)


def head_of(config: BertConfig, counts: np.ndarray, key: jax.Array) -> dict:
    """`fresh_head` of counted words [vocab]."""
    head, counts = bert.init_head(config, key)["predictions"], counts + 0.05
    dense = {**head["transform"]["dense"], "kernel": jnp.eye(config.hidden_size, dtype=jnp.float32)}
    return {"predictions": {"transform": {**head["transform"], "dense": dense},
                            "bias": jnp.asarray(np.log(counts / counts.sum()), jnp.float32)}}


def fresh_encoder(config: EncoderConfig, counts: np.ndarray, key: jax.Array) -> dict:
    """Weights to train from scratch: of a BERT with a head that knows how often each word is, or of a GPT."""
    encoder_key, head_key = jax.random.split(key)
    body = encoders.init(config, encoder_key)
    return body if encoders.is_causal(config) else {**body, "cls": head_of(config, counts, head_key)}


def init(cfg: Config, encoder: dict, head: dict, key: jax.Array) -> dict:
    """What the training with adapters changes: {"lora": adapters of the encoder, "cls": head}; a GPT ({}) has none."""
    adapters = peft.lora_init(encoder, key, cfg.lora_rank, GPT_ATTENTION if "wte" in encoder else peft.ATTENTION)
    return {"lora": adapters, "cls": head} if head else {"lora": adapters}


def merge(cfg: Config, params: dict, encoder: dict) -> dict:
    """Encoder and head as one tree with the adapters merged."""
    merged = peft.lora_merge(encoder, params["lora"], cfg.lora_alpha)
    return {**merged, "cls": params["cls"]} if "cls" in params else merged


def loss(config: EncoderConfig, weights: dict, batch: MaskedBatch, key: jax.Array, dtype: str = "float32",
         remat: bool = False) -> tuple[jax.Array, dict]:
    """Mean cross-entropy of the tokens that are asked for (with dropout), and its (sum, count).

    `dtype`: of the computation. `remat`: the backward pass computes the inside of each layer again, so that the step
    holds one layer's at a time; dropout then draws other bits than without.
    """
    with nn.intercept_methods(_recompute) if remat else contextlib.nullcontext():
        queries, bias = _queries(config, weights, batch, key, dtype)
    table = encoders.word_table(config, weights).astype(queries.dtype)
    each = losses.table_cross_entropy(queries, table, batch.targets.reshape(-1), weights=batch.weights.reshape(-1),
                                      bias=bias)
    count = batch.weights.sum()
    return each.sum() / jnp.maximum(count, 1.0), {"loss": (each.sum(), count)}


def evaluate(config: EncoderConfig, weights: dict, batches, mesh: jax.sharding.Mesh) -> dict[str, float]:
    """Accuracy and perplexity of the tokens that `batches` ask for; nothing where there are none."""
    sums = np.zeros(3)
    for step in range(len(batches)):
        sums += np.asarray(_score(config, weights, put_batch(batches[step], mesh)), np.float64)
    if not sums[2]:
        return {}
    name = "next_token_accuracy" if encoders.is_causal(config) else "masked_accuracy"
    return {name: sums[0] / sums[2], "perplexity": float(np.exp(sums[1] / sums[2]))}


def _recompute(next_fun, args, kwargs, context):
    """A Linen interceptor that keeps of a layer only its input."""
    layer = context.module
    inside = isinstance(layer, (bert.Layer, gpt.Block)) and context.method_name == "__call__" and layer.scope.path
    if not inside:  # a layer without a path is the one that is run below
        return next_fun(*args, **kwargs)
    alone = layer.clone(parent=None)  # as a pure function of its weights, which is what jax.checkpoint takes
    hidden, bias, deterministic = args
    key = None if deterministic else layer.make_rng("dropout")

    @jax.checkpoint
    def run(params, hidden, bias, key):
        return alone.apply({"params": params}, hidden, bias, deterministic,
                           rngs=None if key is None else {"dropout": key})

    return run(layer.variables["params"], hidden, bias, key)


def _queries(config, weights, batch, key=None, dtype="float32"):
    """(queries [B M, D], bias [vocab] or None) where a token is asked for; with dropout where there is a key."""
    hidden = encoders.hidden_states(config, weights, batch.input_ids, batch.attention_mask, dtype=dtype,
                                    deterministic=key is None, rngs=None if key is None else {"dropout": key})[-1]
    asked = bert.gather_positions(hidden, batch.positions)  # [B, M, D]
    return encoders.queries(config, weights, asked.reshape(-1, asked.shape[-1]), jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnums=0)
def _score(config, weights, batch):
    """(right answers, summed loss, number) of the tokens that are asked for, [3]."""
    queries, bias = _queries(config, weights, batch)
    targets, counts = batch.targets.reshape(-1), batch.weights.reshape(-1)
    table = encoders.word_table(config, weights)

    def of(part):
        queries, targets, counts = part
        logits = queries @ table.T  # [n, vocab]
        logits = logits if bias is None else logits + bias[None]
        right = jnp.where(jnp.argmax(logits, axis=-1) == targets, counts, 0.0)
        each = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return jnp.stack([right.sum(), (each * counts).sum(), counts.sum()])

    if len(targets) <= _SCORED:
        return of((queries, targets, counts))
    parts = -(-len(targets) // _SCORED)
    fill = parts * _SCORED - len(targets)
    return jax.lax.map(of, tuple(jnp.pad(x, ((0, fill), *((0, 0),) * (x.ndim - 1))).reshape(parts, -1, *x.shape[1:])
                                 for x in (queries, targets, counts))).sum(0)


@functools.partial(jax.jit, static_argnums=0)
def mean_cosine(config, weights, input_ids, attention_mask):
    """Mean cosine between two texts of a batch (rows without a token are padding); near 1, nothing is told apart."""
    vectors = encode_batch(config, "float32", weights, input_ids, attention_mask)  # [B, D]
    number = (attention_mask.sum(1) > 0).sum().astype(jnp.float32)
    return (jnp.square(vectors.sum(0)).sum() - number) / jnp.maximum(number * (number - 1), 1.0)
