"""Towers: item vectors from text, graph, media and a free row, and user vectors from histories of them.

An item's vector is a sum of its parts (weighed or bent by `PartFusion` where the config says so), so the score of a
user's vector against it is a sum over the same parts and a recommendation decomposes into them exactly. Parts that an
item lacks are masked out; in training whole parts are dropped at random, the free row above all, which is what makes
the others carry a cold item (DropoutNet; Volkovs et al. 2017).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from kgrec_jax.data.history_batches import MASKED
from kgrec_jax.models.history_towers import HistoryTower, SequenceTower
from kgrec_jax.models.part_fusion import PartFusion
from kgrec_jax.models.tower_config import BIDIRECTIONAL, POOLED, TowerConfig

FREE = "id"  # the name of the part that is a free row of its own, known for warm items alone

# name -> (places [E] int32 among the rows that are computed, vectors [E, d]): they stand for those of the table, with
# their gradients; a place beyond the rows is none.
Fresh = Mapping[str, tuple[jax.Array, jax.Array]]


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


@dataclasses.dataclass(frozen=True)
class RowEdges:
    """How many edges some item rows may have among them; static, so that a step's shapes are fixed."""

    capacity: int  # at least the edges of any rows that are asked for together

    def of(self, features: ItemFeatures, rows: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """(place in `rows`, sorted; relation; tail; whether it is an edge), each [capacity], of the rows' edges.

        rows [R] int32 of the item table; -1: no row.
        """
        first = jnp.searchsorted(features.head, rows)  # [R]
        count = jnp.where(rows >= 0, jnp.searchsorted(features.head, rows, side="right") - first, 0)
        place = jnp.repeat(jnp.arange(rows.shape[0]), count, total_repeat_length=self.capacity)  # [C]
        within = jnp.arange(self.capacity) - jnp.take(jnp.cumsum(count) - count, place)
        real = jnp.arange(self.capacity) < count.sum()
        edge = jnp.where(real, jnp.take(first, place) + within, 0)
        return place, jnp.take(features.edge_relation, edge), jnp.take(features.tail, edge), real


class GraphTower(nn.Module):
    """Neighbour attention: A (V_i + Σ α_irj W [V_j ⊕ U_r]), [I, D] (after KGAT's attention; Wang et al. 2019).

    Of some rows alone, [R, D], where they are given: their edges are gathered, every one of them, so the vectors are
    those of the whole table. It costs what the rows' edges cost, and no longer anything for the other items.
    """

    width: int

    @nn.compact
    def __call__(self, features: ItemFeatures, num_items: int, rows: jax.Array | None = None,
                 edges: RowEdges | None = None) -> jax.Array:
        relation = _unit(features.relation)
        # W [V_j ⊕ U_r] as W_V V_j + W_U U_r: each table is multiplied once and not once an edge.
        tails_in = nn.Dense(self.width, use_bias=False, name="tail")
        if rows is None:
            entity = _unit(features.entity)
            own_in, num_rows, head, edge_relation = entity[:num_items], num_items, features.head, features.edge_relation
            tails, real = jnp.take(tails_in(entity), features.tail, axis=0), None  # [E, D]
        else:
            own_in, num_rows = _unit(jnp.take(features.entity, jnp.maximum(rows, 0), axis=0)), rows.shape[0]
            head, edge_relation, tail, real = edges.of(features, rows)
            if edges.capacity < features.entity.shape[0]:  # fewer edges than entities: gathered, then multiplied
                tails = tails_in(_unit(jnp.take(features.entity, tail, axis=0)))
            else:
                tails = jnp.take(tails_in(_unit(features.entity)), tail, axis=0)
        own = nn.Dense(self.width, name="own")(own_in)  # [I, D]
        relations = nn.Dense(self.width, name="relation")(relation)  # [2R, D]
        message = nn.tanh(tails + jnp.take(relations, edge_relation, axis=0))  # [E, D]
        logits = nn.Dense(1, use_bias=False, name="attention")(message)[:, 0] + (
            jnp.take(own, head, axis=0) * message).sum(-1) / jnp.sqrt(jnp.float32(self.width))  # [E]
        if real is not None:
            logits = jnp.where(real, logits, -jnp.inf)
        highest = jax.ops.segment_max(logits, head, num_rows, indices_are_sorted=True)
        highest = jax.lax.stop_gradient(jnp.where(jnp.isfinite(highest), highest, 0.0))
        raised = jnp.exp(logits - jnp.take(highest, head))
        total = jax.ops.segment_sum(raised, head, num_rows, indices_are_sorted=True)
        pooled = jax.ops.segment_sum(raised[:, None] * message, head, num_rows, indices_are_sorted=True)
        pooled = pooled / jnp.maximum(total, 1e-9)[:, None]  # [I, D]
        return nn.Dense(self.width, use_bias=False, name="out")(nn.tanh(own) + pooled)


def _unit(rows: jax.Array) -> jax.Array:
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=-1, keepdims=True), 1e-6)


class ItemTower(nn.Module):
    """Features -> {part: [I, D]}; the item's vector is the sum of the parts that are present.

    Of some rows alone, {part: [R, D]}, where they are given; -1 is no row and has no part. `fresh`: vectors that were
    made in the step itself.
    """

    cfg: TowerConfig
    num_items: int
    edges: RowEdges | None = None  # needed where rows are given and the features have edges

    @nn.compact
    def __call__(self, features: ItemFeatures, deterministic: bool = True, rows: jax.Array | None = None,
                 fresh: Fresh | None = None) -> dict[str, jax.Array]:
        def of_rows(table: jax.Array) -> jax.Array:
            return table if rows is None else jnp.take(table, jnp.maximum(rows, 0), axis=0)

        parts = {}
        for name in sorted(features.vectors):
            given = of_rows(features.vectors[name])  # [I, d]
            if fresh and name in fresh:
                place, made = fresh[name]
                given = given.at[place].set(made, mode="drop")
            hidden = nn.Dense(self.cfg.width, name=f"{name}_in")(given)  # [I, D]
            bent = nn.gelu(hidden, approximate=True)
            parts[name] = nn.Dense(self.cfg.width, use_bias=False, name=f"{name}_out")(bent) + hidden
        if features.head.shape[0]:
            parts["graph"] = GraphTower(self.cfg.width, name="graph")(features, self.num_items, rows, self.edges)
        free = self.param("item_embeddings", nn.initializers.normal(0.1), (self.num_items, self.cfg.width))
        parts[FREE] = of_rows(free)
        present = {}
        for name, vectors in parts.items():
            keep = of_rows(features.present[name])  # [I]
            if rows is not None:
                keep &= rows >= 0
            if not deterministic:
                rate = self.cfg.free_dropout if name == FREE else self.cfg.part_dropout
                keep &= jax.random.bernoulli(self.make_rng("dropout"), 1.0 - rate, keep.shape)
            parts[name], present[name] = jnp.where(keep[:, None], vectors, 0.0), keep
        if self.cfg.fusion == "sum":
            return parts
        return PartFusion(self.cfg.fusion, self.cfg.width, name="fusion")(parts, present)


class Towers(nn.Module):
    """Item and history towers over one space of vectors; scores are cosines over a learned temperature."""

    cfg: TowerConfig
    num_items: int
    edges: RowEdges | None = None  # of the rows that a step asks for, where it does not ask for all

    def setup(self):
        self.items = ItemTower(self.cfg, self.num_items, self.edges)
        self.history = (HistoryTower if self.cfg.history in POOLED else SequenceTower)(self.cfg)
        self.log_scale = self.param("log_scale", nn.initializers.constant(-jnp.log(self.cfg.temperature)), ())

    def __call__(self, features: ItemFeatures, history: jax.Array, deterministic: bool = True,
                 rows: jax.Array | None = None, fresh: Fresh | None = None) -> tuple[jax.Array, jax.Array]:
        """(user vectors [B, D] scaled for the softmax, item vectors [I, D] of unit length); history [B, H], -1: none.

        With rows [R] of the item table, those alone are computed: item vectors [R, D], and histories of places in them.
        """
        vectors = self.item_vectors(features, deterministic, rows, fresh)
        return self.user_vectors(vectors, history, deterministic), vectors

    def at_places(self, features: ItemFeatures, history: jax.Array, place: jax.Array, deterministic: bool = True,
                  rows: jax.Array | None = None, fresh: Fresh | None = None) -> tuple[jax.Array, jax.Array]:
        """The same with a vector for each of the places [B, T] of a history: (user vectors [B, T, D], item vectors).

        For encoders with a state at each position. MASKED in a history is an item that is not shown.
        """
        vectors = self.item_vectors(features, deterministic, rows, fresh)
        states = self._states(vectors, history, deterministic)
        return self._scaled(jnp.take_along_axis(states, place[..., None], axis=1)), vectors

    def item_parts(self, features: ItemFeatures) -> dict[str, jax.Array]:
        """{part: [I, D]}, scaled so that they add up to the item's vector of unit length (0 without any part)."""
        parts = self.items(features)
        length = jnp.linalg.norm(sum(parts.values()), axis=-1, keepdims=True)
        return {name: part / jnp.maximum(length, 1e-6) for name, part in parts.items()}

    def item_vectors(self, features: ItemFeatures, deterministic: bool = True, rows: jax.Array | None = None,
                     fresh: Fresh | None = None) -> jax.Array:
        """[I, D] of unit length, or [R, D] of some rows; 0 for an item without any part."""
        total = sum(self.items(features, deterministic, rows, fresh).values())
        return total / jnp.sqrt(jnp.maximum(jnp.square(total).sum(-1, keepdims=True), 1e-12))

    def user_vectors(self, item_vectors: jax.Array, history: jax.Array, deterministic: bool = True) -> jax.Array:
        """[B, D] for histories [B, H] int32, the latest last, -1 where there is none; 0 for an empty history."""
        mask = history >= 0
        if self.cfg.history in POOLED:
            items = jnp.take(item_vectors, jnp.maximum(history, 0), axis=0)  # [B, H, D]
            return self._scaled(self.history(items, mask, deterministic))
        if self.cfg.history in BIDIRECTIONAL:  # what comes next is what is masked behind the history
            history = jnp.concatenate([history, jnp.full_like(history[:, :1], MASKED)], axis=1)  # [B, H + 1]
        last = self._states(item_vectors, history, deterministic)[:, -1]
        return self._scaled(jnp.where(mask.any(-1, keepdims=True), last, 0.0))

    def _states(self, item_vectors: jax.Array, history: jax.Array, deterministic: bool) -> jax.Array:
        items = jnp.take(item_vectors, jnp.maximum(history, 0), axis=0)  # [B, H, D]
        return self.history(items, history != -1, history == MASKED, deterministic)

    def _scaled(self, vector: jax.Array) -> jax.Array:
        unit = vector / jnp.sqrt(jnp.maximum(jnp.square(vector).sum(-1, keepdims=True), 1e-12))
        return unit * jnp.exp(self.log_scale)
