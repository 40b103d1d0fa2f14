"""Neighbour attention and propagation over the collaborative knowledge graph: item vectors from what items hang on.

R-GCN (Schlichtkrull et al. 2018), KGAT (Wang et al. 2019), KGIN (Wang et al. 2021) and LightGCN (He et al. 2020), with
one change to all of them: a user has no free row but is what its history makes it, so that a user who came after
training is served like any other. Users are nodes of the graph all the same and carry what one item knows to another;
the users of a training step are taken out of it, as a new user would not be there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp

from kgrec_jax.models.collaborative_graph import BLOCK, CollaborativeGraph, by_relation, scaled_by_relation
from kgrec_jax.models.message_passing import attend, edge_dot, propagate

Kind = Literal["rgcn", "kgat", "kgin", "lightgcn"]
WITH_USERS = ("rgcn", "kgat")  # kinds in whose graph users are nodes beside the entities
Drop = Callable[[jax.Array], jax.Array]  # dropout of a layer's rows
Layers = tuple[list[jax.Array], jax.Array]  # rows [nodes, D] of each layer, intents [Q, D] (none but in kgin)


@dataclasses.dataclass(frozen=True)
class PropagationConfig:
    """Shape of a propagation model."""

    kind: Kind  # which model
    dim: int  # D of the vectors
    layers: int  # L hops
    bases: int  # rgcn: basis matrices that all relations share
    attention_dim: int  # kgat: K of the space in which heads and tails are compared
    intents: int  # kgin: Q reasons that users may have
    dropout: float  # share of a layer's messages that are dropped in a step
    free_dropout: float  # share of the items that are in a step as if nobody had touched them: no row, no users, the
    # graph alone; where there is none, it is 0
    temperature: float  # of the softmax over cosines at the start


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tables:
    """What a propagation leaves: all that scores need, and all that serving keeps."""

    encode: jax.Array  # [L', I, D']: histories are encoded by their mean over these; L' = 1 but for kgin
    decode: jax.Array  # [I, D'] of unit length, 0 for an item of which nothing is known
    intents: jax.Array  # [Q, D] of kgin; [0, D] else


def unit(x: jax.Array) -> jax.Array:
    """Rows of unit length; a row of zeros stays one, also in the gradient."""
    return x / jnp.sqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-12))


@dataclasses.dataclass(frozen=True)
class Who:
    """Who is in the graph of a step, and who hears whom."""

    present: jax.Array  # [Nu] bool: users that are there
    hears: jax.Array  # [I] bool: items that their users reach; the others are as if nobody had touched them


class RGCN(nn.Module):
    """h_i' = σ(W_0 h_i + Σ_r mean over N_r(i) of W_r h_j) with W_r = Σ_b a_rb V_b; the last layer's rows."""

    cfg: PropagationConfig
    num_relations: int

    @nn.compact
    def __call__(self, x: jax.Array, graph: CollaborativeGraph, who: Who, drop: Drop) -> Layers:
        typed, cfg = graph.typed, self.cfg
        users, items = graph.history.num_targets, graph.history.num_sources
        there = jnp.concatenate([jnp.ones(x.shape[0] - users), who.present.astype(x.dtype)])[:, None]
        count = propagate(typed.members, there)  # [P, 1]
        hears = jnp.concatenate([who.hears.astype(x.dtype), jnp.ones(x.shape[0] - items)])[:, None]
        by_users = jnp.repeat(typed.relation == self.num_relations - 1, BLOCK)[:, None]  # [P, 1]
        heard = jnp.where(by_users, propagate(typed.heads, hears), 1.0)
        for layer in range(cfg.layers):
            mean = propagate(typed.members, x * there) / jnp.maximum(count, 1.0)  # [P, D]
            share = self.param(f"share_{layer}", nn.initializers.normal(1.0 / np.sqrt(cfg.bases)),
                               (self.num_relations, cfg.bases))
            basis = self.param(f"basis_{layer}", nn.initializers.lecun_normal(batch_axis=0),
                               (cfg.bases, x.shape[1], cfg.dim))
            turned = by_relation(mean, jnp.einsum("rb,bde->rde", share, basis), typed.relation)  # [P, D]
            hidden = nn.Dense(cfg.dim, name=f"own_{layer}")(x) + propagate(typed.owners, turned * heard)
            x = drop(hidden if layer == cfg.layers - 1 else nn.relu(hidden))
        return [x], jnp.zeros((0, cfg.dim), x.dtype)


class KGAT(nn.Module):
    """Attention π(h, r, t) = (W_r e_t)ᵀ tanh(W_r e_h + e_r) and the bi-interaction aggregator; all layers' rows.

    The attention is learned with the scores and not, as in the paper, apart by a translation loss.
    """

    cfg: PropagationConfig
    num_relations: int

    @nn.compact
    def __call__(self, x: jax.Array, graph: CollaborativeGraph, who: Who, drop: Drop) -> Layers:
        typed, cfg = graph.typed, self.cfg
        kernel = self.param("relation_kernel", nn.initializers.lecun_normal(batch_axis=0),
                            (self.num_relations, x.shape[1], cfg.attention_dim))
        shift = self.param("relation_embeddings", nn.initializers.normal(0.1), (self.num_relations, cfg.attention_dim))
        heads = by_relation(propagate(typed.heads, x), kernel, typed.relation)  # [P, K]
        heads = heads + jnp.repeat(jnp.take(shift, typed.relation, axis=0), BLOCK, axis=0)
        tails = by_relation(propagate(typed.tails, x), kernel, typed.tail_relation)
        logits = edge_dot(typed.ends, nn.tanh(heads), tails)  # [E] by pair
        logits = jnp.take(logits, typed.place)  # by target
        kept, out = _kept_edges(graph, who, x.shape[0]), [x]
        for layer in range(cfg.layers):
            around = attend(typed.edges, logits, x, kept)  # [nodes, D]
            added = nn.leaky_relu(nn.Dense(cfg.dim, name=f"sum_{layer}")(x + around), 0.01)
            multiplied = nn.leaky_relu(nn.Dense(cfg.dim, name=f"product_{layer}")(x * around), 0.01)
            x = drop(added + multiplied)
            out.append(unit(x))
        return out, jnp.zeros((0, cfg.dim), x.dtype)


class KGIN(nn.Module):
    """e_i' = mean over the edges (r, j) of e_r ⊙ e_j: a path's relations multiply into what comes over it; all layers.

    Items gather from the graph alone; users come in through intents, mixtures of relations (`encode_users`).
    """

    cfg: PropagationConfig
    num_relations: int

    @nn.compact
    def __call__(self, x: jax.Array, graph: CollaborativeGraph, who: Who, drop: Drop) -> Layers:
        del who  # no user is a node here
        typed, out, width = graph.typed, [x], x.shape[1]
        relations = self.param("relation_embeddings", _around_one, (self.num_relations, width))
        degree = jnp.diff(typed.edges.indptr).astype(x.dtype)[:, None]
        for _ in range(self.cfg.layers):
            pairs = scaled_by_relation(propagate(typed.members, x), relations, typed.relation)  # [P, D]
            sums = propagate(typed.owners, pairs)
            x = drop(unit(sums / jnp.maximum(degree, 1.0)))
            out.append(x)
        if not self.num_relations:
            return out, jnp.zeros((0, width), x.dtype)
        logits = self.param("intent_logits", nn.initializers.normal(1.0), (self.cfg.intents, self.num_relations))
        return out, nn.softmax(logits, axis=-1) @ relations  # [Q, D]


class LightGCN(nn.Module):
    """e' = D^-½ A D^-½ e over users and items, no graph; a layer is a step to the users and back; all layers."""

    cfg: PropagationConfig
    num_relations: int

    @nn.compact
    def __call__(self, x: jax.Array, graph: CollaborativeGraph, who: Who, drop: Drop) -> Layers:
        items, out = graph.history.num_sources, [x]
        there = who.present.astype(x.dtype)[:, None]  # [Nu, 1]
        item_scale = _rsqrt(propagate(graph.touched, there))  # [I, 1]
        user_scale = _rsqrt(jnp.diff(graph.history.indptr).astype(x.dtype))[:, None]  # [Nu, 1]
        for _ in range(self.cfg.layers):
            users = propagate(graph.history, x[:items] * item_scale) * jnp.square(user_scale) * there
            x = drop(propagate(graph.touched, users) * item_scale)
            out.append(x)
        return out, jnp.zeros((0, x.shape[1]), x.dtype)


MODELS: dict[str, type[nn.Module]] = {"rgcn": RGCN, "kgat": KGAT, "kgin": KGIN, "lightgcn": LightGCN}


class Propagation(nn.Module):
    """A propagation model over rows of its own for every entity; scores are cosines over a learned temperature."""

    cfg: PropagationConfig
    num_nodes: int  # entities, the items first
    num_relations: int  # both directions; touching and being touched come on top where users are nodes

    def setup(self):
        more = 2 if self.cfg.kind in WITH_USERS else 0
        self.layers = MODELS[self.cfg.kind](self.cfg, self.num_relations + more)
        self.embeddings = self.param("embeddings", nn.initializers.normal(0.1), (self.num_nodes, self.cfg.dim))
        self.log_scale = self.param("log_scale", nn.initializers.constant(-jnp.log(self.cfg.temperature)), ())
        self.dropout = nn.Dropout(self.cfg.dropout)

    def __call__(self, graph: CollaborativeGraph, learned: jax.Array, user: jax.Array, targets: jax.Array,
                 deterministic: bool = True) -> tuple[jax.Array, Tables]:
        """(vectors [B, D'] of some users, scaled for the softmax, tables) where these users' targets are hidden.

        learned: [nodes] bool, rows that training can say something about (`learned_nodes`). user: [B] rows of the user
        table, Nu where there is none; they are taken out of the graph. targets: [B, T] items of theirs, -1: none.
        """
        num_users = graph.history.num_targets
        shown = jnp.ones(num_users, bool).at[user].set(False, mode="drop")
        tables = self.tables(graph, learned, shown, deterministic)
        mask = (targets >= 0).astype(jnp.float32)  # [B, T]
        size = jnp.take(jnp.diff(graph.history.indptr), user, mode="fill", fill_value=0).astype(jnp.float32)
        count = jnp.maximum(size - mask.sum(1), 1.0)[None, :, None]
        # The whole history less what is hidden: two short sums in place of a long one for each user.
        sums = jnp.stack([jnp.take(propagate(graph.history, rows), user, axis=0, mode="fill", fill_value=0.0)
                          - jnp.einsum("bt,btd->bd", mask, jnp.take(rows, jnp.maximum(targets, 0), axis=0))
                          for rows in tables.encode])  # [L', B, D']
        return unit(encode_users(sums / count, tables.intents)) * jnp.exp(self.log_scale), tables

    def tables(self, graph: CollaborativeGraph, learned: jax.Array, shown: jax.Array,
               deterministic: bool = True) -> Tables:
        """The tables of all items."""
        items = graph.history.num_sources
        hears = jnp.ones(items, bool)
        if not deterministic and self.num_relations:  # without a graph such an item would be nothing at all
            hears = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - self.cfg.free_dropout, (items,))
            learned = learned & jnp.concatenate([hears, jnp.ones(self.num_nodes - items, bool)])
        there = learned.astype(self.embeddings.dtype)[:, None]
        rows = self.embeddings * there  # [nodes, D]
        if self.cfg.kind in WITH_USERS:
            sums = propagate(graph.history, jnp.concatenate([rows, there], axis=1)[:items])  # [Nu, D + 1]
            rows = jnp.concatenate([rows, sums[:, :-1] / jnp.maximum(sums[:, -1:], 1.0)])
        layers, intents = self.layers(rows, graph, Who(shown, hears),
                                      lambda x: self.dropout(x, deterministic=deterministic))
        layers = [layer[:items] for layer in layers]
        if self.cfg.kind == "kgin":
            return Tables(jnp.stack(layers[:-1]), unit(sum(layers)), intents)
        if self.cfg.kind == "lightgcn":
            mean = sum(layers) / len(layers)
            degree = propagate(graph.touched, shown.astype(mean.dtype)[:, None])
            return Tables((mean * _rsqrt(degree))[None], unit(mean), intents)
        joined = jnp.concatenate(layers, axis=1)  # [I, D']
        return Tables(joined[None], unit(joined), intents)


def _kept_edges(graph: CollaborativeGraph, who: Who, num_nodes: int) -> jax.Array:
    """[E] bool: the edges by target but those from users who are not there and those to items that hear none."""
    edges, first = graph.typed.edges, num_nodes - graph.history.num_targets
    by_user = edges.source >= first
    present = jnp.take(jnp.concatenate([jnp.ones(first, bool), who.present]), edges.source)
    hears = jnp.concatenate([who.hears, jnp.ones(num_nodes - who.hears.shape[0], bool)])
    return present & (~by_user | jnp.take(hears, edges.target))


def user_gates(means: jax.Array, intents: jax.Array) -> jax.Array:
    """What each layer's mean of a history is multiplied with in the user's vector, like means [L', B, D'].

    Without intents it is one. With them (KGIN): u^0 = m^0, u^l = unit((1 + Σ_q β_q e_q) ⊙ m^(l-1)) with β = softmax
    over the intents of e_q · u^(l-1), and the sum of all, as in the authors' code.
    """
    if not intents.shape[0]:
        return jnp.ones_like(means)
    user, gates = means[0], []
    for mean in means:
        gate = 1.0 + nn.softmax(user @ intents.T, axis=-1) @ intents  # [B, D]
        length = jnp.sqrt(jnp.maximum(jnp.square(gate * mean).sum(-1, keepdims=True), 1e-12))
        gates.append(gate / length)
        user = gates[-1] * mean
    return jnp.stack([1.0 + gates[0], *gates[1:]])


def encode_users(means: jax.Array, intents: jax.Array) -> jax.Array:
    """User vectors [B, D'] of the means [L', B, D'] of the history's rows in each layer; 0 for an empty history."""
    return (user_gates(means, intents) * means).sum(0)


@dataclasses.dataclass(frozen=True)
class PropagationPart:
    """A propagation model after training, as a part of the score: tables of the items, and no graph any more."""

    encode: np.ndarray  # [L', I, D'] float32
    decode: np.ndarray  # [I, D'] float32
    intents: np.ndarray  # [Q, D] float32
    known: np.ndarray  # [I] bool: touched, or linked to what is

    def _means(self, history: sp.csr_matrix) -> np.ndarray:
        """[L', b, D'] of histories [b, I]."""
        share = sp.diags((1.0 / np.maximum(history.getnnz(axis=1), 1)).astype(np.float32)) @ history
        return np.stack([np.asarray(share @ layer, np.float32) for layer in self.encode])

    def scores(self, history: sp.csr_matrix) -> np.ndarray:
        """[b, I] float32 for histories [b, I]."""
        return np.asarray(_encode_users(self._means(history), self.intents)) @ self.decode.T

    def contributions(self, items: np.ndarray, candidate: int) -> np.ndarray:
        """[H] float32: what each item of a history adds to the score of `candidate`."""
        rows = self.encode[:, items] / np.float32(max(len(items), 1))  # [L', H, D']
        gates = np.asarray(_user_gates(rows.sum(axis=1, keepdims=True), self.intents))  # [L', 1, D']
        return np.asarray((gates * rows).sum(0) @ self.decode[candidate], np.float32)


_encode_users, _user_gates = jax.jit(encode_users), jax.jit(user_gates)


def _around_one(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """At the start every relation lets through what comes over it."""
    return 1.0 + 0.1 * jax.random.normal(key, shape, dtype)


def _rsqrt(degree: jax.Array) -> jax.Array:
    """1/√degree, 0 where it is 0."""
    return jnp.where(degree > 0, jax.lax.rsqrt(jnp.maximum(degree, 1.0)), 0.0)
