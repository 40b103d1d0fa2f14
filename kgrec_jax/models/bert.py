"""BERT (Devlin et al. 2019) with Hugging Face's parameter names, soft tokens and a tied masked-LM head.

One tree holds everything: `embeddings`, `encoder` and, where there is a head, `cls`; a checkpoint's leading `bert`
is stripped when it is read. Position k of the sequence has position embedding k; padding is on the right. RoBERTa (Liu
et al. 2019) and DistilBERT (Sanh et al. 2019) are the same function with another first position or without types.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from kgrec_jax.errors import KgrecError
from kgrec_jax.models.encoder_config import ACTIVATIONS, BertConfig
from kgrec_jax.models.layers import Dense, Dropout, attend, heads_first, heads_last

# Tensor parallelism over "model"; the vocabulary stays whole because 30522 rows divide by no useful axis.
BERT_RULES = (
    (r"attention/self/(query|key|value)/kernel$", PartitionSpec(None, "model")),
    (r"attention/self/(query|key|value)/bias$", PartitionSpec("model")),
    (r"intermediate/dense/kernel$", PartitionSpec(None, "model")),
    (r"intermediate/dense/bias$", PartitionSpec("model")),
    (r"layer/\d+/(attention/output|output)/dense/kernel$", PartitionSpec("model", None)),
    (r".*", PartitionSpec()),
)


def _dense(config: BertConfig, features: int, dtype: jnp.dtype, name: str) -> Dense:
    init = nn.initializers.normal(config.initializer_range)
    return Dense(features, dtype=dtype, kernel_init=init, name=name)


class LayerNorm(nn.Module):
    """LayerNorm in float32 whatever the compute type: bfloat16 statistics lose too much."""

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dim = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (dim,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (dim,), jnp.float32)
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        # Two passes: mean(x²) − mean(x)² cancels badly at eps 1e-12.
        normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + jnp.float32(self.epsilon))
        shape = (1,) * (x.ndim - 1) + (dim,)
        return (normed * scale.reshape(shape) + bias.reshape(shape)).astype(x.dtype)


def check_call(config, input_ids: jax.Array, soft_vectors, soft_positions) -> None:
    """KgrecError for ids [B, L] of more tokens than there are positions, or one of the soft arguments alone."""
    length, limit = input_ids.shape[1], config.max_position_embeddings
    if length > limit:
        raise KgrecError(f"texts of {length} tokens: this encoder has {limit} positions; shorten max_length")
    if (soft_vectors is None) != (soft_positions is None):
        raise KgrecError("soft_vectors and soft_positions: found one of the two, expected both or none")


def replace_words(words: jax.Array, soft_vectors: jax.Array, soft_positions: jax.Array) -> jax.Array:
    """Word embeddings [B, L, D] with soft_vectors [B, S, D] at soft_positions [B, S] (-1: unused; the first wins)."""
    places = jnp.arange(words.shape[1], dtype=soft_positions.dtype)
    hit = soft_positions[:, :, None] == places[None, None]  # [B, S, L]
    slot = jnp.argmax(hit, axis=1)[:, :, None]  # [B, L, 1]
    soft = jnp.take_along_axis(soft_vectors.astype(words.dtype), slot, axis=1)  # [B, L, D]
    return jnp.where(hit.any(axis=1)[:, :, None], soft, words)


class Embeddings(nn.Module):
    """Sum of word, position and token-type embeddings, with soft vectors in place of some words."""

    config: BertConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, input_ids, attention_mask, token_type_ids, soft_vectors, soft_positions, deterministic):
        cfg = self.config
        init = nn.initializers.normal(cfg.initializer_range)
        words = nn.Embed(cfg.vocab_size, cfg.hidden_size, embedding_init=init, dtype=self.dtype,
                         name="word_embeddings")(input_ids)  # [B, L, D]
        if soft_vectors is not None:
            words = replace_words(words, soft_vectors, soft_positions)
        rows = cfg.max_position_embeddings + cfg.position_offset
        hidden = words + nn.Embed(rows, cfg.hidden_size, embedding_init=init, dtype=self.dtype,
                                  name="position_embeddings")(self._positions(attention_mask))
        if cfg.type_vocab_size:
            hidden = hidden + nn.Embed(cfg.type_vocab_size, cfg.hidden_size, embedding_init=init, dtype=self.dtype,
                                       name="token_type_embeddings")(token_type_ids)
        hidden = LayerNorm(cfg.layer_norm_eps, name="LayerNorm")(hidden)
        return Dropout(cfg.hidden_dropout_prob)(hidden, deterministic=deterministic)

    def _positions(self, attention_mask):
        """Rows of the position table [1 or B, L]; with an offset only what is read counts, padding shares one row."""
        offset = self.config.position_offset
        if not offset:
            return jnp.arange(attention_mask.shape[1])[None]
        read = (attention_mask > 0).astype(jnp.int32)
        return jnp.cumsum(read, axis=1) * read + (offset - 1)


class SelfAttention(nn.Module):
    """Multi-head attention over the positions of the mask."""

    config: BertConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, hidden, bias, deterministic):
        cfg = self.config
        heads, dim = cfg.num_attention_heads, cfg.hidden_size // cfg.num_attention_heads

        def project(name):
            return heads_first(_dense(cfg, cfg.hidden_size, self.dtype, name)(hidden), heads)

        query, key, value = project("query"), project("key"), project("value")  # [B, heads, L, dim]
        scale = 1.0 / jnp.sqrt(jnp.float32(dim))
        drop = functools.partial(Dropout(cfg.attention_probs_dropout_prob), deterministic=deterministic)
        return heads_last(attend(query, key, value, scale, bias, drop))  # [B, L, D]


class Output(nn.Module):
    """Dense, dropout, residual, LayerNorm: the end of both halves of a layer."""

    config: BertConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, hidden, residual, deterministic):
        out = _dense(self.config, self.config.hidden_size, self.dtype, "dense")(hidden)
        out = Dropout(self.config.hidden_dropout_prob)(out, deterministic=deterministic)
        return LayerNorm(self.config.layer_norm_eps, name="LayerNorm")(out + residual)


class Attention(nn.Module):
    """Self-attention and its output, under the names that the checkpoints use."""

    config: BertConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, hidden, bias, deterministic):
        context = SelfAttention(self.config, self.dtype, name="self")(hidden, bias, deterministic)
        return Output(self.config, self.dtype, name="output")(context, hidden, deterministic)


class Intermediate(nn.Module):
    """The widening half of the feed-forward part."""

    config: BertConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, hidden):
        wide = _dense(self.config, self.config.intermediate_size, self.dtype, "dense")(hidden)
        return ACTIVATIONS[self.config.hidden_act](wide)


class Layer(nn.Module):
    """One Transformer layer, LayerNorm after each half."""

    config: BertConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, hidden, bias, deterministic):
        hidden = Attention(self.config, self.dtype, name="attention")(hidden, bias, deterministic)
        wide = Intermediate(self.config, self.dtype, name="intermediate")(hidden)
        return Output(self.config, self.dtype, name="output")(wide, hidden, deterministic)


class Layers(nn.Module):
    """All layers, under the names "0", "1", …"""

    config: BertConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, hidden, bias, deterministic):
        states = [hidden]
        for i in range(self.config.num_hidden_layers):
            states.append(Layer(self.config, self.dtype, name=str(i))(states[-1], bias, deterministic))
        return states


class Stack(nn.Module):
    """The level `encoder` of the checkpoint's names."""

    config: BertConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, hidden, bias, deterministic):
        return Layers(self.config, self.dtype, name="layer")(hidden, bias, deterministic)


class Bert(nn.Module):
    """BERT encoder.

    Returns the hidden states, layers + 1 arrays [B, L, D]: the embeddings' output first, the last layer's last.
    `input_ids`, `attention_mask` (1 = read, 0 = padding) and `token_type_ids` are [B, L] integers, L at most
    `max_position_embeddings`. At position `soft_positions[b, s]` (-1 = unused) `soft_vectors[b, s]` [B, S, D] takes
    the place of the word embedding, before position and type are added; the first of two equal positions wins.
    `deterministic=False` needs an rng named "dropout".
    """

    config: BertConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, input_ids, attention_mask, token_type_ids, soft_vectors=None, soft_positions=None,
                 deterministic=True):
        check_call(self.config, input_ids, soft_vectors, soft_positions)
        hidden = Embeddings(self.config, self.dtype, name="embeddings")(
            input_ids, attention_mask, token_type_ids, soft_vectors, soft_positions, deterministic)
        bias = jnp.where(attention_mask[:, None, None, :] > 0, jnp.float32(0), jnp.finfo(jnp.float32).min)
        return Stack(self.config, self.dtype, name="encoder")(hidden, bias, deterministic)


class Transform(nn.Module):
    """Dense, activation, LayerNorm before the tied decoder."""

    config: BertConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, hidden):
        out = _dense(self.config, self.config.hidden_size, self.dtype, "dense")(hidden)
        return LayerNorm(self.config.layer_norm_eps, name="LayerNorm")(ACTIVATIONS[self.config.head_act](out))


class Predictions(nn.Module):
    """Queries against the word embeddings, and the bias of each word."""

    config: BertConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, hidden):
        bias = self.param("bias", nn.initializers.zeros, (self.config.vocab_size,), jnp.float32)
        return Transform(self.config, self.dtype, name="transform")(hidden), bias


class MaskedLmHead(nn.Module):
    """The level `cls` of the checkpoint's names: hidden [..., D] -> (queries [..., D], bias [vocab])."""

    config: BertConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, hidden):
        return Predictions(self.config, self.dtype, name="predictions")(hidden)


def init_encoder(config: BertConfig, key: jax.Array) -> dict:
    """Fresh encoder weights, the tree {embeddings, encoder}."""
    ids = jnp.zeros((1, 1), jnp.int32)
    return Bert(config).init(key, ids, ids, ids)["params"]


def init_head(config: BertConfig, key: jax.Array) -> dict:
    """A fresh masked-LM head, the tree under `cls`; the decoder is the word table of the encoder."""
    return MaskedLmHead(config).init(key, jnp.zeros((1, config.hidden_size), jnp.float32))["params"]


def word_table(params: dict) -> jax.Array:
    """The word embeddings [vocab, D], which are the masked-LM decoder too."""
    return params["embeddings"]["word_embeddings"]["embedding"]


def mlm_queries(config: BertConfig, params: dict, hidden: jax.Array, dtype=jnp.float32) -> tuple[jax.Array, jax.Array]:
    """(queries [..., D], bias [vocab]) of the tied decoder: logits are queries · word_table + bias."""
    return MaskedLmHead(config, dtype).apply({"params": params["cls"]}, hidden)


def mlm_logits(config: BertConfig, params: dict, hidden: jax.Array, dtype=jnp.float32) -> jax.Array:
    """Vocabulary logits [..., vocab] of hidden states [..., D]; gather the masked positions before calling it."""
    queries, bias = mlm_queries(config, params, hidden, dtype)
    logits = jnp.einsum("...d,vd->...v", queries, word_table(params).astype(dtype), preferred_element_type=jnp.float32)
    return logits + bias.reshape((1,) * (logits.ndim - 1) + bias.shape)


def gather_positions(hidden: jax.Array, positions: jax.Array) -> jax.Array:
    """Rows of hidden [B, L, D] at positions [B, M] -> [B, M, D]."""
    return jnp.take_along_axis(hidden, positions[:, :, None], axis=1)
