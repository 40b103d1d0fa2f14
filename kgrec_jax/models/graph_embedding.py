"""Entity and relation tables, and the bridge that takes their rows into a text encoder and back out.

V [N, D] and U [2R, D] meet the encoder twice: [V_h ⊕ U_r] is projected to the encoder's width and stands among the word
embeddings as a soft token, and the encoder's output at the hidden entity is projected to a query against V. So both
tables get gradients from the structural score and through the text, and words alone can point at an entity.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from kgrec_jax import losses
from kgrec_jax.data.link_batches import LinkBatch
from kgrec_jax.errors import KgrecError
from kgrec_jax.models import link_losses
from kgrec_jax.models.scorers import SCORERS, Scorer, ScorerOptions, get_scorer
from kgrec_jax.sharding import TABLE, P, padded_rows
from kgrec_jax.summed_loss import table_cross_entropy_sum

# Rows over every device, whatever the mesh; relation table, a scorer's weights and the bridge are small.
GRAPH_RULES = (
    (r"(^|/)entity/embedding$", TABLE),
    (r"(^|/)scorer/entity_bias$", P(TABLE[0])),
    (r"(^|/)scorer/", P()),
    (r".*", P()),
)


@dataclasses.dataclass(frozen=True)
class GraphEmbedding:
    """The shape of the tables and the scorer between their rows.

    The tables are {"entity": {"embedding": [rows, D]}, "relation": {"embedding": [2R, D]}} and, where the scorer has
    weights of its own, {"scorer": {"query": its module's, "entity_bias": [rows]}} with what it has of the two.
    """

    scorer_name: str
    dim: int  # D
    num_entities: int  # N
    num_relations: int  # R, without inverses
    entity_rows: int  # N padded to a multiple that the mesh divides; rows from N on take part in nothing
    options: ScorerOptions = ScorerOptions()

    @property
    def scorer(self) -> Scorer:
        """The scoring function."""
        return get_scorer(self.scorer_name, self.dim, self.options)

    def init(self, key: jax.Array) -> dict:
        """Fresh tables."""
        entity_key, relation_key = jax.random.split(key)
        scorer = self.scorer
        scale = scorer.init_scale(self.dim)
        entity = scale * jax.random.normal(entity_key, (self.num_entities, self.dim))
        # Zeros below the drawn rows: padding, and so the mesh, must not change what is drawn.
        entity = jnp.pad(entity, ((0, self.entity_rows - self.num_entities), (0, 0)))
        relation = scale * jax.random.normal(relation_key, (2 * self.num_relations, self.dim))
        own: dict[str, Any] = {}
        if scorer.module is not None:
            own["query"] = scorer.init(self.dim, jax.random.fold_in(key, 2))
        if scorer.entity_bias:
            own["entity_bias"] = jnp.zeros(self.entity_rows, jnp.float32)
        tables = {"entity": {"embedding": entity}, "relation": {"embedding": relation}}
        return tables | {"scorer": own} if own else tables

    def rows(self, tables: dict, head: jax.Array, relation: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(V_h, U_r), each [B, D]."""
        h = jnp.take(tables["entity"]["embedding"], head, axis=0)
        return h, jnp.take(tables["relation"]["embedding"], relation, axis=0)

    def queries(self, tables: dict, head: jax.Array, relation: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Structural queries [B, D] against V; dropout only with a key."""
        return self.scorer.query(*self.rows(tables, head, relation), tables.get("scorer", {}).get("query"), key)

    def row_bias(self, tables: dict) -> jax.Array | None:
        """What each entity adds to its score against any query, [rows]; None where it adds nothing."""
        return self.scorer.row_bias(tables["entity"]["embedding"], tables.get("scorer", {}).get("entity_bias"))

    def query_losses(self, tables: dict, queries: jax.Array, tails: jax.Array, weight: jax.Array,
                     candidates: jax.Array) -> jax.Array:
        """Σ_t w_t (log Σ_e exp s_e − s_t) of queries [B, D] with tails and weights [B, T] -> [B].

        With candidates [C > 0] the sum over e is estimated from these uniform draws instead of all entities.
        """
        entity = tables["entity"]["embedding"]
        bias = self.row_bias(tables)
        if not candidates.shape[-1]:
            return losses.table_cross_entropy(queries, entity, tails, weights=weight, bias=bias,
                                              num_rows=self.num_entities)
        if candidates.ndim != 1:
            raise ValueError(f"candidates: found shape {candidates.shape}, expected [C]: the softmax shares them")
        log_q = jnp.full(self.entity_rows, -jnp.log(jnp.float32(self.num_entities)))
        return losses.sampled_cross_entropy(queries, entity, tails, candidates, log_q, weights=weight, bias=bias)

    def structure_losses(self, tables: dict, links: LinkBatch, key: jax.Array | None = None) -> jax.Array:
        """Softmax losses [B] of a LinkBatch by the structural scorer alone; dropout only with a key."""
        query = self._softmax_queries(tables, links, key)
        return self.query_losses(tables, query, links.tails, links.weight, links.candidates)

    def structure_loss(self, tables: dict, links: LinkBatch, key: jax.Array | None = None) -> jax.Array:
        """The sum of `structure_losses`, [], in less time: what a training step needs."""
        query = self._softmax_queries(tables, links, key)
        if links.candidates.shape[-1]:
            return self.query_losses(tables, query, links.tails, links.weight, links.candidates).sum()
        return table_cross_entropy_sum(query, tables["entity"]["embedding"], links.tails, weights=links.weight,
                                       bias=self.row_bias(tables), num_rows=self.num_entities)

    def _softmax_queries(self, tables: dict, links: LinkBatch, key: jax.Array | None) -> jax.Array:
        """Queries [B, D] of a LinkBatch; KgrecError for a scorer that no softmax over entities can teach."""
        if self.scorer.l1:
            raise KgrecError(f"graph.scorer: found {self.scorer_name!r} with a softmax over entities, expected the "
                             f"margin loss of sampled rivals, or {self.scorer_name.removesuffix('-l1')!r}")
        return self.queries(tables, links.head, links.relation, key)

    def margin_losses(self, tables: dict, links: LinkBatch, *, margin: float, temperature: float,
                      key: jax.Array | None = None) -> jax.Array:
        """Margin losses [B] of a LinkBatch against its candidates (`link_losses.self_adversarial`).

        Candidates [C] are shared by the batch and cost one product, [B, k] belong to each row and are gathered; either
        way only rows in use are read. Those that are answers of their own row do not count.
        """
        if not links.candidates.shape[-1]:
            raise ValueError("candidates: found none, expected at least one sampled rival for the margin loss")
        query = self.queries(tables, links.head, links.relation, key)
        positive = self._scores_of(tables, query, links.tails)
        negative = self._scores_of(tables, query, links.candidates)
        wrong = link_losses.wrong_rivals(links.tails, links.weight, links.candidates)
        return link_losses.self_adversarial(positive, links.weight, negative, wrong, margin=margin,
                                            temperature=temperature)

    def relation_losses(self, tables: dict, links: LinkBatch, key: jax.Array | None = None) -> jax.Array:
        """Σ_t w_t (log Σ_r' exp s(h, r', t) − s(h, r, t)) over all 2R relations -> [B].

        Relation prediction as an auxiliary objective (Chen et al. 2021, arXiv 2110.02834). With a key one answer of
        each row, drawn by weight, stands for all of them: the same in the mean, at 1/T of the cost.
        """
        scorer, tails, weight = self._bilinear("relation prediction"), links.tails, links.weight
        if key is not None:
            drawn = jax.random.categorical(key, jnp.log(weight), axis=1)[:, None]  # [B, 1]
            tails, weight = jnp.take_along_axis(tails, drawn, axis=1), weight.sum(axis=1, keepdims=True)
        entity, relation = tables["entity"]["embedding"], tables["relation"]["embedding"]
        h, t = jnp.take(entity, links.head, axis=0), jnp.take(entity, tails, axis=0)  # [B, D], [B, T, D]
        query = scorer.relation_transform(jnp.broadcast_to(h[:, None, :], t.shape), t)
        targets = jnp.broadcast_to(links.relation[:, None], tails.shape)
        flat = losses.table_cross_entropy(query.reshape(-1, self.dim), relation, targets.reshape(-1),
                                          weights=weight.reshape(-1))
        return flat.reshape(tails.shape).sum(axis=1)

    def nuclear_3_norms(self, tables: dict, links: LinkBatch) -> jax.Array:
        """N3 of the rows that each query touches, weighted like its losses -> [B]."""
        norm = self.scorer.nuclear_3_norm
        h, r = self.rows(tables, links.head, links.relation)
        t = jnp.take(tables["entity"]["embedding"], links.tails, axis=0)  # [B, T, D]
        return links.weight.sum(axis=1) * (norm(h) + norm(r)) + (links.weight * norm(t)).sum(axis=1)

    def duality_norms(self, tables: dict, links: LinkBatch) -> jax.Array:
        """Σ_t w_t (|query(h, r)|² + |t|²) -> [B]: DURA (Zhang et al. 2020), the squared distance behind a product.

        Its other half, of (t, r, ?), comes with the rows of the inverse relation.
        """
        scorer, weight = self._bilinear("DURA"), links.weight
        query = scorer.query(*self.rows(tables, links.head, links.relation))
        t = jnp.take(tables["entity"]["embedding"], links.tails, axis=0)  # [B, T, D]
        return weight.sum(axis=1) * (query**2).sum(axis=-1) + (weight * (t**2).sum(axis=-1)).sum(axis=1)

    def scores(self, tables: dict, head: jax.Array, relation: jax.Array) -> jax.Array:
        """Structural scores of every tail, [B, rows]; columns from N on mean nothing."""
        own = tables.get("scorer", {}).get("entity_bias")
        return self.scorer.compare(self.queries(tables, head, relation), tables["entity"]["embedding"], own)

    def triple_scores(self, tables: dict, head: jax.Array, relation: jax.Array, tail: jax.Array) -> jax.Array:
        """Structural score of each triple, [B]: what `scores` holds at the tail."""
        return self._scores_of(tables, self.queries(tables, head, relation), tail[:, None])[:, 0]

    def to_saved(self, tables: dict) -> dict:
        """The tables without padding: {"entity": [N, D], "relation": [2R, D]} and "scorer" where there is one."""
        saved = {"entity": tables["entity"]["embedding"][:self.num_entities],
                 "relation": tables["relation"]["embedding"]}
        own = dict(tables.get("scorer", {}))
        if "entity_bias" in own:
            own["entity_bias"] = own["entity_bias"][:self.num_entities]
        return saved | {"scorer": own} if own else saved

    def describe(self) -> dict[str, Any]:
        """What `load_graph_embedding` must be told beside the saved tables, for a JSON file."""
        return {"scorer": self.scorer_name, "dim": self.dim, "entities": self.num_entities,
                "scorer_options": dataclasses.asdict(self.options)}

    def _scores_of(self, tables: dict, query: jax.Array, ids: jax.Array) -> jax.Array:
        """Scores [B, C] of queries [B, D] and the entities `ids`, [C] or [B, C]."""
        own = tables.get("scorer", {}).get("entity_bias")
        rows = jnp.take(tables["entity"]["embedding"], ids, axis=0)
        return self.scorer.compare(query, rows, None if own is None else jnp.take(own, ids))

    def _bilinear(self, purpose: str) -> Scorer:
        """The scorer, or KgrecError where it is not a plain product of three rows."""
        scorer = self.scorer
        if scorer.relation_transform is None:
            able = ", ".join(name for name, each in SCORERS.items() if each.relation_transform is not None)
            raise KgrecError(f"graph.scorer: found {self.scorer_name!r} with {purpose}, expected one of {able}; change "
                             f"graph.scorer or leave {purpose} out")
        return scorer


def load_graph_embedding(told: Mapping[str, Any], saved: Mapping[str, Any],
                         devices: int = 1) -> tuple[GraphEmbedding, dict]:
    """(model, tables) of what `describe` told and `to_saved` left, padded for so many devices; NumPy arrays.

    Tables from before scorers had options, whose description holds none, are read like any other.
    """
    options = ScorerOptions(**told.get("scorer_options", {}))
    entity, relation = np.asarray(saved["entity"]), np.asarray(saved["relation"])
    model = GraphEmbedding(told["scorer"], told["dim"], told["entities"], len(relation) // 2,
                           padded_rows(told["entities"], devices), options)
    if entity.shape != (model.num_entities, model.dim):
        raise KgrecError(f"graph tables: found entity vectors {entity.shape}, expected {model.num_entities} × "
                         f"{model.dim} as tables.json says; run the graph stage again in a new folder")
    more = model.entity_rows - model.num_entities
    tables = {"entity": {"embedding": np.pad(entity, ((0, more), (0, 0)))}, "relation": {"embedding": relation}}
    own = dict(saved.get("scorer", {}))
    if "entity_bias" in own:
        own["entity_bias"] = np.pad(np.asarray(own["entity_bias"]), (0, more))
    return model, tables | {"scorer": own} if own else tables


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
