"""One interface to every encoder: what a stage needs to know of a BERT or a GPT, by the type of its config.

    hidden_states  words (and soft tokens) to layers + 1 arrays [B, L, D]
    pool           the last of them to one unit vector a text
    queries        hidden states to queries against the word table, for losses.table_cross_entropy
    init, backbone, rules, is_causal
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from kgrec_jax.errors import KgrecError
from kgrec_jax.models import bert, gpt
from kgrec_jax.models.encoder_config import EncoderConfig, GptConfig, from_hf

__all__ = ["EncoderConfig", "Pooling", "backbone", "from_hf", "has_head", "hidden_states", "init", "is_causal",
           "logits", "pool", "queries", "rules", "shapes", "word_table"]

Pooling = Literal["auto", "mean", "cls", "last"]


def is_causal(config: EncoderConfig) -> bool:
    """Whether a position sees only those before it, so that the objective is the next token and not a hidden one."""
    return isinstance(config, GptConfig)


def hidden_states(config: EncoderConfig, params: dict, input_ids: jax.Array, attention_mask: jax.Array,
                  token_type_ids: jax.Array | None = None, soft_vectors: jax.Array | None = None,
                  soft_positions: jax.Array | None = None, *, dtype="float32", deterministic: bool = True,
                  rngs: dict | None = None) -> list[jax.Array]:
    """Hidden states, layers + 1 arrays [B, L, D] of ids and mask [B, L]; the embeddings' output first.

    Token types are zeros by default, and nothing where the encoder has none. `soft_vectors` [B, S, D] stand for the
    words at `soft_positions` [B, S] (-1: unused). `deterministic=False` needs rngs={"dropout": key}.
    """
    input_ids, attention_mask = jnp.asarray(input_ids), jnp.asarray(attention_mask)
    soft = {"soft_vectors": soft_vectors, "soft_positions": soft_positions, "deterministic": deterministic}
    if is_causal(config):
        return gpt.Gpt(config, jnp.dtype(dtype)).apply({"params": params}, input_ids, attention_mask, **soft, rngs=rngs)
    types = jnp.zeros_like(input_ids) if token_type_ids is None else jnp.asarray(token_type_ids)
    return bert.Bert(config, jnp.dtype(dtype)).apply({"params": params}, input_ids, attention_mask, types, **soft,
                                                     rngs=rngs)


def pool(config: EncoderConfig, hidden: jax.Array, mask: jax.Array, kind: Pooling = "auto") -> jax.Array:
    """Unit vectors [B, D] float32 of last hidden states [B, L, D]; zero for a row whose mask [B, L] is empty.

    mean: over the read positions (Reimers & Gurevych 2019); cls: the first position; last: the last read position, the
    only one that a causal model lets see the whole text. auto: last for a causal encoder, else mean.
    """
    kind = kind if kind != "auto" else "last" if is_causal(config) else "mean"
    read = mask > 0
    if kind == "mean":
        weight = read.astype(jnp.float32)[:, :, None]
        vectors = (hidden.astype(jnp.float32) * weight).sum(1) / jnp.maximum(weight.sum(1), 1.0)
    elif kind in ("cls", "last"):
        last = hidden.shape[1] - 1 - jnp.argmax(read[:, ::-1], axis=1)
        at = jnp.argmax(read, axis=1) if kind == "cls" else last
        vectors = jnp.take_along_axis(hidden.astype(jnp.float32), at[:, None, None], axis=1)[:, 0]
        vectors = jnp.where(read.any(axis=1)[:, None], vectors, 0.0)
    else:
        raise KgrecError(f"pooling: found {kind!r}, expected one of auto, mean, cls, last")
    # Normalised as the released sentence encoders do.
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def word_table(config: EncoderConfig, params: dict) -> jax.Array:
    """The word embeddings [vocab, D], which are the tied decoder too."""
    return gpt.word_table(params) if is_causal(config) else bert.word_table(params)


def has_head(config: EncoderConfig, params: dict) -> bool:
    """Whether `queries` can be asked: always of a causal encoder, of others where there is a masked-LM head."""
    return is_causal(config) or "cls" in params


def queries(config: EncoderConfig, params: dict, hidden: jax.Array,
            dtype=jnp.float32) -> tuple[jax.Array, jax.Array | None]:
    """(queries [..., D], bias [vocab] or None): logits of the hidden or the next token are queries · word_table + bias.

    `hidden` [..., D] are last hidden states; gather the positions that are asked for first.
    """
    return (gpt.queries if is_causal(config) else bert.mlm_queries)(config, params, hidden, dtype)


def logits(config: EncoderConfig, params: dict, hidden: jax.Array, dtype=jnp.float32) -> jax.Array:
    """Vocabulary logits [..., vocab] of last hidden states [..., D]."""
    return (gpt.lm_logits if is_causal(config) else bert.mlm_logits)(config, params, hidden, dtype)


def init(config: EncoderConfig, key: jax.Array, head: bool = False) -> dict:
    """Fresh weights; `head`: with the tree `cls` of a masked-LM head where the decoder needs one."""
    if is_causal(config):
        return gpt.init_decoder(config, key)
    body_key, head_key = jax.random.split(key)
    params = bert.init_encoder(config, body_key)
    return {**params, "cls": bert.init_head(config, head_key)} if head else params


def backbone(config: EncoderConfig, params: dict) -> dict:
    """The weights without a masked-LM head, the same arrays."""
    del config
    return {name: tree for name, tree in params.items() if name != "cls"}


def shapes(config: EncoderConfig, head: bool = False) -> dict:
    """The tree of ShapeDtypeStructs that `init` would give; nothing is computed."""
    return jax.eval_shape(functools.partial(init, config, head=head), jax.random.key(0))


def rules(config: EncoderConfig) -> tuple:
    """Path patterns -> PartitionSpec of the weights, for sharding.shardings."""
    return gpt.GPT_RULES if is_causal(config) else bert.BERT_RULES
