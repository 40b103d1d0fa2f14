"""Towers: item vectors from text, graph, media and a free row, and user vectors from histories of them.

An item's vector is a sum of its parts, so the score of a user's vector against it is a sum over the same parts and a
recommendation decomposes into them exactly. Parts that an item lacks are masked out; in training whole parts are
dropped at random, the free row above all, which is what makes the others carry a cold item (DropoutNet; Volkovs et al.
2017).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

FREE = "id"  # the name of the part that is a free row of its own, known for warm items alone


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """Shape of the towers."""

    width: int = 64  # D of item and user vectors
    history: Literal["mean", "attention", "transformer"] = "attention"  # how a history becomes a user's vector
    layers: int = 1  # of the transformer
    heads: int = 2  # of the transformer
    max_history: int = 128  # the most recent items of a user that are read
    part_dropout: float = 0.2  # share of the items whose part is dropped in a step, each part by itself
    free_dropout: float = 0.3  # the same for the free rows
    history_dropout: float = 0.3  # share of a history's items that are not shown in a step
    temperature: float = 0.1  # of the softmax over cosines at the start


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ItemFeatures:
    """What the item tower reads; arrays on the device, arguments of the step and never constants of the program.

    Edges leave the items: `head` is an item row, sorted; an item without edges has no graph part.
    """

    vectors: Mapping[str, jax.Array]  # name -> [I, d] float32 (text, image, …)
    present: Mapping[str, jax.Array]  # name -> [I] bool; "graph" and FREE beside the names of `vectors`
    entity: jax.Array  # [N, De] entity table V of the graph stage
    relation: jax.Array  # [2R, De] relation table U, inverses in the second half
    head: jax.Array  # [E] int32
    edge_relation: jax.Array  # [E] int32
    tail: jax.Array  # [E] int32


class GraphTower(nn.Module):
    """Neighbour attention: A (V_i + Σ α_irj W [V_j ⊕ U_r]), [I, D] (after KGAT's attention; Wang et al. 2019)."""

    width: int

    @nn.compact
    def __call__(self, features: ItemFeatures, num_items: int) -> jax.Array:
        entity = features.entity / jnp.maximum(jnp.linalg.norm(features.entity, axis=-1, keepdims=True), 1e-6)
        relation = features.relation / jnp.maximum(jnp.linalg.norm(features.relation, axis=-1, keepdims=True), 1e-6)
        own = nn.Dense(self.width, name="own")(entity[:num_items])  # [I, D]
        # W [V_j ⊕ U_r] as W_V V_j + W_U U_r: each table is multiplied once and not once an edge.
        tails = nn.Dense(self.width, use_bias=False, name="tail")(entity)  # [N, D]
        relations = nn.Dense(self.width, name="relation")(relation)  # [2R, D]
        edges = jnp.take(tails, features.tail, axis=0) + jnp.take(relations, features.edge_relation, axis=0)
        message = nn.tanh(edges)  # [E, D]
        logits = nn.Dense(1, use_bias=False, name="attention")(message)[:, 0] + (
            jnp.take(own, features.head, axis=0) * message).sum(-1) / jnp.sqrt(jnp.float32(self.width))  # [E]
        highest = jax.ops.segment_max(logits, features.head, num_items, indices_are_sorted=True)
        highest = jax.lax.stop_gradient(jnp.where(jnp.isfinite(highest), highest, 0.0))
        raised = jnp.exp(logits - jnp.take(highest, features.head))
        total = jax.ops.segment_sum(raised, features.head, num_items, indices_are_sorted=True)
        pooled = jax.ops.segment_sum(raised[:, None] * message, features.head, num_items, indices_are_sorted=True)
        pooled = pooled / jnp.maximum(total, 1e-9)[:, None]  # [I, D]
        return nn.Dense(self.width, use_bias=False, name="out")(nn.tanh(own) + pooled)


class ItemTower(nn.Module):
    """Features -> {part: [I, D]}; the item's vector is the sum of the parts that are present."""

    cfg: TowerConfig
    num_items: int

    @nn.compact
    def __call__(self, features: ItemFeatures, deterministic: bool = True) -> dict[str, jax.Array]:
        parts = {}
        for name in sorted(features.vectors):
            hidden = nn.Dense(self.cfg.width, name=f"{name}_in")(features.vectors[name])  # [I, D]
            bent = nn.gelu(hidden, approximate=True)
            parts[name] = nn.Dense(self.cfg.width, use_bias=False, name=f"{name}_out")(bent) + hidden
        if features.head.shape[0]:
            parts["graph"] = GraphTower(self.cfg.width, name="graph")(features, self.num_items)
        free = self.param("item_embeddings", nn.initializers.normal(0.1), (self.num_items, self.cfg.width))
        parts[FREE] = free
        for name, vectors in parts.items():
            keep = features.present[name]  # [I]
            if not deterministic:
                rate = self.cfg.free_dropout if name == FREE else self.cfg.part_dropout
                keep &= jax.random.bernoulli(self.make_rng("dropout"), 1.0 - rate, keep.shape)
            parts[name] = jnp.where(keep[:, None], vectors, 0.0)
        return parts


def _safe_softmax(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax over the last axis where mask is True; all zeros, and not NaN, where nothing is."""
    logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
    raised = jnp.where(mask, jnp.exp(logits - logits.max(-1, keepdims=True)), 0.0)
    return raised / jnp.maximum(raised.sum(-1, keepdims=True), 1e-9)


class HistoryTower(nn.Module):
    """Histories of item vectors [B, H, D], the latest last, with a mask [B, H] -> user vectors [B, D].

    An empty history gives the zero vector.
    """

    cfg: TowerConfig

    @nn.compact
    def __call__(self, items: jax.Array, mask: jax.Array, deterministic: bool = True) -> jax.Array:
        cfg = self.cfg
        if not deterministic:
            shown = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - cfg.history_dropout, mask.shape)
            mask = mask & jnp.where((mask & shown).any(-1, keepdims=True), shown, True)
        hidden = items  # [B, H, D]
        if cfg.history == "transformer":
            position = self.param("position_embeddings", nn.initializers.normal(0.02), (cfg.max_history, cfg.width))
            hidden = hidden + position[None, -hidden.shape[1]:]
            for layer in range(cfg.layers):
                hidden = self._block(hidden, mask, layer)
        if cfg.history == "mean":
            weights = mask.astype(hidden.dtype)  # [B, H]
            pooled = (weights[..., None] * hidden).sum(1) / jnp.maximum(weights.sum(1, keepdims=True), 1.0)
        else:
            bent = nn.tanh(nn.Dense(cfg.width, name="pool_in")(hidden))
            logits = nn.Dense(1, use_bias=False, name="pool")(bent)[..., 0]  # [B, H]
            pooled = (_safe_softmax(logits, mask)[..., None] * hidden).sum(1)  # [B, D]
        turn = nn.Dense(cfg.width, use_bias=False, kernel_init=nn.initializers.zeros, name="out")
        out = pooled + turn(nn.tanh(pooled))
        return jnp.where(mask.any(-1, keepdims=True), out, 0.0)

    def _block(self, x: jax.Array, mask: jax.Array, layer: int) -> jax.Array:
        """A pre-norm transformer block over the history."""
        batch, length, width = x.shape
        heads = self.cfg.heads
        normed = nn.LayerNorm(name=f"norm_{layer}")(x)
        query, key, value = (nn.Dense(width, name=f"{name}_{layer}")(normed).reshape(batch, length, heads, -1)
                             for name in ("query", "key", "value"))
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) / jnp.sqrt(jnp.float32(width // heads))
        weights = _safe_softmax(logits, mask[:, None, None, :])
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(batch, length, width)
        x = x + nn.Dense(width, name=f"mix_{layer}")(mixed)
        normed = nn.LayerNorm(name=f"norm_feed_{layer}")(x)
        wide = nn.gelu(nn.Dense(2 * width, name=f"feed_{layer}")(normed), approximate=True)
        return x + nn.Dense(width, name=f"feed_out_{layer}")(wide)


class Towers(nn.Module):
    """Item and history towers over one space of vectors; scores are cosines over a learned temperature."""

    cfg: TowerConfig
    num_items: int

    def setup(self):
        self.items = ItemTower(self.cfg, self.num_items)
        self.history = HistoryTower(self.cfg)
        self.log_scale = self.param("log_scale", nn.initializers.constant(-jnp.log(self.cfg.temperature)), ())

    def __call__(self, features: ItemFeatures, history: jax.Array,
                 deterministic: bool = True) -> tuple[jax.Array, jax.Array]:
        """(user vectors [B, D] scaled for the softmax, item vectors [I, D] of unit length); history [B, H], -1: none."""
        vectors = self.item_vectors(features, deterministic)
        return self.user_vectors(vectors, history, deterministic), vectors

    def item_parts(self, features: ItemFeatures) -> dict[str, jax.Array]:
        """{part: [I, D]}, scaled so that they add up to the item's vector of unit length (0 without any part)."""
        parts = self.items(features)
        length = jnp.linalg.norm(sum(parts.values()), axis=-1, keepdims=True)
        return {name: part / jnp.maximum(length, 1e-6) for name, part in parts.items()}

    def item_vectors(self, features: ItemFeatures, deterministic: bool = True) -> jax.Array:
        """[I, D] of unit length; 0 for an item without any part."""
        total = sum(self.items(features, deterministic).values())
        return total / jnp.sqrt(jnp.maximum(jnp.square(total).sum(-1, keepdims=True), 1e-12))

    def user_vectors(self, item_vectors: jax.Array, history: jax.Array, deterministic: bool = True) -> jax.Array:
        """[B, D] for histories [B, H] int32, the latest last, -1 where there is none; 0 for an empty history."""
        mask = history >= 0
        items = jnp.take(item_vectors, jnp.maximum(history, 0), axis=0)  # [B, H, D]
        vector = self.history(items, mask, deterministic)
        unit = vector / jnp.sqrt(jnp.maximum(jnp.square(vector).sum(-1, keepdims=True), 1e-12))
        return unit * jnp.exp(self.log_scale)
