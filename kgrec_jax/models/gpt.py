"""GPT-2 (Radford et al. 2019) with Hugging Face's parameter names: causal attention, pre-norm, a tied decoder.

The tree is {wte, wpe, h, ln_f}; a checkpoint's leading `transformer` is stripped when it is read. Kernels are
[in, out] as in GPT-2's own Conv1D, so `c_attn` is [D, 3 D]: queries, keys and values side by side. Position k of the
sequence has position embedding k; padding is on the right.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from kgrec_jax.models.bert import LayerNorm, check_call, replace_words
from kgrec_jax.models.encoder_config import ACTIVATIONS, GptConfig
from kgrec_jax.models.layers import Dense, Dropout, attend, heads_first, heads_last

# Tensor parallelism over "model" in the feed-forward halves; c_attn stays whole, because equal shares of its columns
# would not be equal shares of the heads' queries, keys and values.
GPT_RULES = (
    (r"mlp/c_fc/kernel$", PartitionSpec(None, "model")),
    (r"mlp/c_fc/bias$", PartitionSpec("model")),
    (r"mlp/c_proj/kernel$", PartitionSpec("model", None)),
    (r".*", PartitionSpec()),
)


def _dense(config: GptConfig, features: int, dtype: jnp.dtype, name: str, share: float = 1.0) -> Dense:
    init = nn.initializers.normal(config.initializer_range * share)
    return Dense(features, dtype=dtype, kernel_init=init, name=name)


def _residual_share(config: GptConfig) -> float:
    """Projections into the residual stream start smaller by √(their number), as the paper has them."""
    return (2 * config.num_hidden_layers) ** -0.5


class Attention(nn.Module):
    """Multi-head attention of each position to those before it and itself."""

    config: GptConfig
    dtype: jnp.dtype
    layer: int  # from 0

    @nn.compact
    def __call__(self, hidden, bias, deterministic):
        cfg = self.config
        heads, dim = cfg.num_attention_heads, cfg.hidden_size // cfg.num_attention_heads
        joined = _dense(cfg, 3 * cfg.hidden_size, self.dtype, "c_attn")(hidden)
        query, key, value = (heads_first(part, heads) for part in jnp.split(joined, 3, axis=-1))
        scale = jnp.float32(1.0)
        if cfg.scale_attn_weights:
            scale = scale / jnp.sqrt(jnp.float32(dim))
        if cfg.scale_attn_by_inverse_layer_idx:
            scale = scale / jnp.float32(self.layer + 1)
        drop = functools.partial(Dropout(cfg.attention_probs_dropout_prob), deterministic=deterministic)
        context = heads_last(attend(query, key, value, scale, bias, drop))  # [B, L, D]
        out = _dense(cfg, cfg.hidden_size, self.dtype, "c_proj", _residual_share(cfg))(context)
        return Dropout(cfg.hidden_dropout_prob)(out, deterministic=deterministic)


class Mlp(nn.Module):
    """Wide, activation, narrow."""

    config: GptConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, hidden, deterministic):
        cfg = self.config
        wide = ACTIVATIONS[cfg.hidden_act](_dense(cfg, cfg.intermediate_size, self.dtype, "c_fc")(hidden))
        out = _dense(cfg, cfg.hidden_size, self.dtype, "c_proj", _residual_share(cfg))(wide)
        return Dropout(cfg.hidden_dropout_prob)(out, deterministic=deterministic)


class Block(nn.Module):
    """One layer, LayerNorm before each half."""

    config: GptConfig
    dtype: jnp.dtype
    layer: int

    @nn.compact
    def __call__(self, hidden, bias, deterministic):
        eps = self.config.layer_norm_eps
        attention = Attention(self.config, self.dtype, self.layer, name="attn")
        hidden = hidden + attention(LayerNorm(eps, name="ln_1")(hidden), bias, deterministic)
        return hidden + Mlp(self.config, self.dtype, name="mlp")(LayerNorm(eps, name="ln_2")(hidden), deterministic)


class Blocks(nn.Module):
    """All layers, under the names "0", "1", …"""

    config: GptConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, hidden, bias, deterministic):
        states = [hidden]
        for i in range(self.config.num_hidden_layers):
            states.append(Block(self.config, self.dtype, i, name=str(i))(states[-1], bias, deterministic))
        return states


class Gpt(nn.Module):
    """GPT-2 decoder.

    Returns the hidden states, layers + 1 arrays [B, L, D]: the embeddings' output first, and in place of the last
    layer's output what the final LayerNorm makes of it. `input_ids` and `attention_mask` (1 = read, 0 = padding on the
    right) are [B, L] integers, L at most `max_position_embeddings`. At position `soft_positions[b, s]` (-1 = unused)
    `soft_vectors[b, s]` [B, S, D] takes the place of the word embedding; the first of two equal positions wins.
    `deterministic=False` needs an rng named "dropout".
    """

    config: GptConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, input_ids, attention_mask, soft_vectors=None, soft_positions=None, deterministic=True):
        cfg, length = self.config, input_ids.shape[1]
        check_call(cfg, input_ids, soft_vectors, soft_positions)
        init = nn.initializers.normal(cfg.initializer_range)
        words = nn.Embed(cfg.vocab_size, cfg.hidden_size, embedding_init=init, dtype=self.dtype, name="wte")(input_ids)
        if soft_vectors is not None:
            words = replace_words(words, soft_vectors, soft_positions)
        positions = nn.Embed(cfg.max_position_embeddings, cfg.hidden_size, embedding_init=init, dtype=self.dtype,
                             name="wpe")(jnp.arange(length))  # [L, D]
        hidden = Dropout(cfg.embedding_dropout_prob)(words + positions[None], deterministic=deterministic)
        seen = jnp.tril(jnp.ones((length, length), bool))[None, None] & (attention_mask[:, None, None, :] > 0)
        bias = jnp.where(seen, jnp.float32(0), jnp.finfo(jnp.float32).min)  # [B, 1, L, L]
        *states, last = Blocks(cfg, self.dtype, name="h")(hidden, bias, deterministic)
        return [*states, LayerNorm(cfg.layer_norm_eps, name="ln_f")(last)]


def init_decoder(config: GptConfig, key: jax.Array) -> dict:
    """Fresh weights, the tree {wte, wpe, h, ln_f}."""
    ids = jnp.zeros((1, 1), jnp.int32)
    return Gpt(config).init(key, ids, ids)["params"]


def word_table(params: dict) -> jax.Array:
    """The word embeddings [vocab, D], which are the decoder of the language model too."""
    return params["wte"]["embedding"]


def queries(config: GptConfig, params: dict, hidden: jax.Array, dtype=jnp.float32) -> tuple[jax.Array, None]:
    """(queries [..., D], no bias) of the tied decoder: the last hidden states themselves, against `word_table`."""
    del config, params
    return hidden.astype(dtype), None


def lm_logits(config: GptConfig, params: dict, hidden: jax.Array, dtype=jnp.float32) -> jax.Array:
    """Logits [..., vocab] of the next token, of last hidden states [..., D]."""
    asked, _ = queries(config, params, hidden, dtype)
    table = word_table(params).astype(dtype)
    return jnp.einsum("...d,vd->...v", asked, table, preferred_element_type=jnp.float32)
