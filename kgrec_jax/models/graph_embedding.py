"""Entity and relation tables, and the bridge that takes their rows into a text encoder and back out.

V [N, D] and U [2R, D] meet the encoder twice: [V_h ⊕ U_r] is projected to the encoder's width and stands among the word
embeddings as a soft token, and the encoder's output at the hidden entity is projected to a query against V. So both
tables get gradients from the structural score and through the text, and words alone can point at an entity.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from kgrec_jax import losses
from kgrec_jax.models.scorers import Scorer, get_scorer
from kgrec_jax.sharding import TABLE, P

# Rows over every device, whatever the mesh; relation table and bridge are small.
GRAPH_RULES = ((r"(^|/)entity/embedding$", TABLE), (r".*", P()))


@dataclasses.dataclass(frozen=True)
class GraphEmbedding:
    """The shape of the tables and the scorer between their rows."""

    scorer_name: str
    dim: int  # D
    num_entities: int  # N
    num_relations: int  # R, without inverses
    entity_rows: int  # N padded to a multiple that the mesh divides; rows from N on take part in nothing

    @property
    def scorer(self) -> Scorer:
        """The scoring function."""
        return get_scorer(self.scorer_name, self.dim)

    def init(self, key: jax.Array) -> dict:
        """Fresh tables {"entity": {"embedding": [rows, D]}, "relation": {"embedding": [2R, D]}}."""
        entity_key, relation_key = jax.random.split(key)
        scale = self.scorer.init_norm / self.dim**0.5
        entity = scale * jax.random.normal(entity_key, (self.num_entities, self.dim))
        # Zeros below the drawn rows: padding, and so the mesh, must not change what is drawn.
        entity = jnp.pad(entity, ((0, self.entity_rows - self.num_entities), (0, 0)))
        relation = scale * jax.random.normal(relation_key, (2 * self.num_relations, self.dim))
        return {"entity": {"embedding": entity}, "relation": {"embedding": relation}}

    def rows(self, tables: dict, head: jax.Array, relation: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(V_h, U_r), each [B, D]."""
        h = jnp.take(tables["entity"]["embedding"], head, axis=0)
        return h, jnp.take(tables["relation"]["embedding"], relation, axis=0)

    def query_losses(self, tables: dict, queries: jax.Array, tails: jax.Array, weight: jax.Array,
                     candidates: jax.Array) -> jax.Array:
        """Σ_t w_t (log Σ_e exp s_e − s_t) of queries [B, D] with tails and weights [B, T] -> [B].

        With candidates [C > 0] the sum over e is estimated from these uniform draws instead of all entities.
        """
        entity = tables["entity"]["embedding"]
        bias = self.scorer.row_bias(entity)
        if not candidates.shape[0]:
            return losses.table_cross_entropy(queries, entity, tails, weights=weight, bias=bias,
                                              num_rows=self.num_entities)
        log_q = jnp.full(self.entity_rows, -jnp.log(jnp.float32(self.num_entities)))
        return losses.sampled_cross_entropy(queries, entity, tails, candidates, log_q, weights=weight, bias=bias)

    def structure_losses(self, tables: dict, links) -> jax.Array:
        """Losses [B] of a LinkBatch by the structural scorer alone."""
        query = self.scorer.query(*self.rows(tables, links.head, links.relation))
        return self.query_losses(tables, query, links.tails, links.weight, links.candidates)

    def nuclear_3_norms(self, tables: dict, links) -> jax.Array:
        """N3 of the rows that each query touches, weighted like its losses -> [B]."""
        norm = self.scorer.nuclear_3_norm
        h, r = self.rows(tables, links.head, links.relation)
        t = jnp.take(tables["entity"]["embedding"], links.tails, axis=0)  # [B, T, D]
        return links.weight.sum(axis=1) * (norm(h) + norm(r)) + (links.weight * norm(t)).sum(axis=1)

    def scores(self, tables: dict, head: jax.Array, relation: jax.Array) -> jax.Array:
        """Structural scores of every tail, [B, rows]; columns from N on mean nothing."""
        return self.scorer.score_all(*self.rows(tables, head, relation), tables["entity"]["embedding"])


class SoftToken(nn.Module):
    """[V_h ⊕ U_r] [B, 2D] -> soft token [B, 1, width], about as long as a word embedding at the start."""

    width: int
    word_scale: float = 0.05  # standard deviation of the encoder's word embeddings

    @nn.compact
    def __call__(self, pair):
        # Rows of V grow in training and differ in length by degree; the encoder should see directions.
        pair = pair * jax.lax.rsqrt(jnp.mean(pair * pair, axis=-1, keepdims=True) + 1e-12)
        init = nn.initializers.normal(self.word_scale / pair.shape[-1] ** 0.5)
        return nn.Dense(self.width, kernel_init=init, name="dense")(pair)[:, None, :]  # [B, 1, width]


class LinkHead(nn.Module):
    """Encoder output at the hidden entity [B, width] -> query [B, D] against V."""

    dim: int

    @nn.compact
    def __call__(self, hidden):
        # A small start: the text query has to grow into a table that the structure has already shaped.
        return nn.Dense(self.dim, kernel_init=nn.initializers.normal(0.02), name="dense")(hidden)


def init_bridge(dim: int, width: int, word_scale: float, key: jax.Array) -> dict:
    """Fresh projections {"soft": …, "link": …} between tables of width `dim` and an encoder of width `width`."""
    soft_key, link_key = jax.random.split(key)
    soft = SoftToken(width, word_scale).init(soft_key, jnp.zeros((1, 2 * dim), jnp.float32))["params"]
    link = LinkHead(dim).init(link_key, jnp.zeros((1, width), jnp.float32))["params"]
    return {"soft": soft, "link": link}


def soft_tokens(bridge: dict, h: jax.Array, r: jax.Array) -> jax.Array:
    """Soft tokens [B, 1, width] of rows V_h, U_r [B, D]."""
    width = bridge["soft"]["dense"]["bias"].shape[0]
    return SoftToken(width).apply({"params": bridge["soft"]}, jnp.concatenate([h, r], axis=-1))


def link_queries(bridge: dict, hidden: jax.Array) -> jax.Array:
    """Queries [B, D] of the encoder's outputs [B, width] at the hidden entity."""
    return LinkHead(bridge["link"]["dense"]["bias"].shape[0]).apply({"params": bridge["link"]}, hidden)
