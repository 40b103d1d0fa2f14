"""A text encoder around the tables of a graph: queries in words, with soft tokens, answered from V."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from kgrec_jax import losses
from kgrec_jax.data.link_batches import TextLinkBatch
from kgrec_jax.models import bert, graph_embedding, peft
from kgrec_jax.models.graph_embedding import GRAPH_RULES, GraphEmbedding

TRIPLE_ENCODER_RULES = GRAPH_RULES[:-1] + bert.BERT_RULES


@dataclasses.dataclass(frozen=True)
class TripleEncoder:
    """Pure functions of what is trained, `params`, and of the encoder's given weights.

    `params` is {"tables", "bridge"} and, where the encoder learns, {"encoder"}: its adapters or all of its weights.
    """

    graph: GraphEmbedding
    encoder: bert.BertConfig
    mode: Literal["frozen", "lora", "full"]
    word_scale: float  # standard deviation of the encoder's word embeddings
    lora_rank: int = 8
    lora_alpha: float = 16.0

    def init(self, tables: dict, encoder: dict, key: jax.Array) -> dict:
        """Fresh bridge and adapters around given tables and weights."""
        bridge_key, lora_key = jax.random.split(key)
        bridge = graph_embedding.init_bridge(self.graph.dim, self.encoder.hidden_size, self.word_scale, bridge_key)
        params = {"tables": tables, "bridge": bridge}
        if self.mode == "lora":
            params["encoder"] = peft.lora_init(encoder, lora_key, self.lora_rank)
        elif self.mode == "full":
            params["encoder"] = encoder
        return params

    def merged_encoder(self, params: dict, encoder: dict) -> dict:
        """The encoder's weights with what was learned in them."""
        if self.mode == "lora":
            return peft.lora_merge(encoder, params["encoder"], self.lora_alpha)
        return params["encoder"] if self.mode == "full" else encoder

    def hidden(self, params: dict, encoder: dict, batch: TextLinkBatch) -> jax.Array:
        """Last hidden states [B, L, width] of the queries in words; `encoder` are the merged weights."""
        h, r = self.graph.rows(params["tables"], batch.links.head, batch.links.relation)
        soft = graph_embedding.soft_tokens(params["bridge"], h, r)  # [B, 1, width]
        ids = jnp.asarray(batch.input_ids)
        mask, soft_position = jnp.asarray(batch.attention_mask), jnp.asarray(batch.soft_position)
        return bert.Bert(self.encoder).apply({"params": encoder}, ids, mask, jnp.zeros_like(ids), soft,
                                             soft_position)[-1]

    def queries(self, params: dict, hidden: jax.Array, batch: TextLinkBatch) -> jax.Array:
        """Queries [B, D] against V of the outputs at the hidden entity."""
        at_hidden = bert.gather_positions(hidden, jnp.asarray(batch.hidden_position))[:, 0]  # [B, width]
        return graph_embedding.link_queries(params["bridge"], at_hidden)

    def scores(self, params: dict, encoder: dict, batch: TextLinkBatch) -> jax.Array:
        """Scores of every entity as the hidden one, [B, rows]; columns from N on mean nothing."""
        entity = params["tables"]["entity"]["embedding"]
        scores = self.queries(params, self.hidden(params, encoder, batch), batch) @ entity.T
        bias = self.graph.row_bias(params["tables"])
        return scores if bias is None else scores + bias[None, :]

    def link_losses(self, params: dict, hidden: jax.Array, batch: TextLinkBatch) -> jax.Array:
        """L_link [B] of the queries in words, summed over each one's answers."""
        links = batch.links
        return self.graph.query_losses(params["tables"], self.queries(params, hidden, batch), links.tails, links.weight,
                                       links.candidates)

    def word_loss(self, encoder: dict, hidden: jax.Array, batch: TextLinkBatch) -> tuple[jax.Array, jax.Array]:
        """L_MLM as (sum, number of masked words); needs an encoder with a masked-LM head."""
        masked = bert.gather_positions(hidden, jnp.asarray(batch.word_positions))  # [B, M, width]
        queries, bias = bert.mlm_queries(self.encoder, encoder, masked)
        flat = losses.table_cross_entropy(queries.reshape(-1, queries.shape[-1]), bert.word_table(encoder),
                                          batch.word_targets.reshape(-1), bias=bias)  # [B * M]
        return losses.masked_mean(flat, jnp.asarray(batch.word_weight).reshape(-1))
