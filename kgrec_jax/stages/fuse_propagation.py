"""Training a propagation model over the collaborative graph of one log, and what it leaves as a part of the score."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import typing
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from kgrec_jax import losses, train
from kgrec_jax.data.dataset import Graph, Interactions
from kgrec_jax.data.graph import edges
from kgrec_jax.data.history_batches import places_of_step
from kgrec_jax.models.collaborative_graph import CollaborativeGraph, kept_entities, learned_nodes, make_graph
from kgrec_jax.models.propagation import WITH_USERS, Kind, Propagation, PropagationConfig, PropagationPart
from kgrec_jax.optim import OptimConfig, make_optimizer
from kgrec_jax.sharding import REPLICATED, Rules

PROPAGATION_RULES: Rules = REPLICATED  # every device has the whole graph: its sums go over all of it
KINDS: tuple[str, ...] = typing.get_args(Kind)  # names of the parts that can be fitted here
# What the fields of fuse.Config that are about propagation may be.
PROPAGATION_BOUNDS = {
    "dim": (1, 1 << 20), "layers": (1, 16), "bases": (1, 1000), "attention": (1, 1 << 20), "intents": (1, 1000),
    "independence": (0.0, 1e6), "dropout": (0.0, 0.99), "free_dropout": (0.0, 0.99), "steps": (0, 1 << 30),
    "batch": (1, 1 << 30)}


@dataclasses.dataclass(frozen=True)
class PropagationTraining:
    """How a propagation model is trained."""

    steps: int  # 0: forty passes over the users, 300 to 1200
    batch: int  # rows of a step; at most a quarter of the users fill them
    optim: OptimConfig
    loss: Literal["softmax", "bpr"]
    independence: float  # weight of kgin's independence term
    log_every: int
    checkpoint_every: int

    def num_steps(self, num_users: int) -> int:
        """Steps for so many users with a history."""
        return self.steps or int(np.clip(40 * num_users // users_of_step(self.batch, num_users), 300, 1200))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Constants:
    """What a step reads beside its batch."""

    graph: CollaborativeGraph
    learned: jax.Array  # [nodes] bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UserBatch:
    """Some users and the items of theirs that are hidden and to be found."""

    user: np.ndarray  # [B] int32 rows of the user table, Nu = padding
    targets: np.ndarray  # [B, T] int32, -1 = none
    weights: np.ndarray  # [B, T] float32: 1 / number of targets; a padding user's are 0


@dataclasses.dataclass(frozen=True)
class UserBatches:
    """Step -> batch, a pure function of (seed, step): each epoch visits the users in an order of its own."""

    indptr: np.ndarray  # [Nu + 1]
    item: np.ndarray  # [n] items by user
    users: np.ndarray  # users with a history
    num_steps: int
    batch: int
    max_targets: int
    hidden_share: float
    seed: int

    @staticmethod
    def of(log: Interactions, num_users: int, *, num_steps: int, batch: int, max_targets: int = 32,
           hidden_share: float = 0.3, seed: int = 0) -> UserBatches:
        """Batches over the users of a log."""
        order = np.lexsort((log.item, log.user))
        indptr = np.searchsorted(log.user[order], np.arange(num_users + 1))
        longest = int(np.diff(indptr).max(initial=1))
        return UserBatches(indptr, log.item[order], np.flatnonzero(np.diff(indptr)), num_steps, batch,
                           min(max_targets, longest), hidden_share, seed)

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> UserBatch:
        rng = np.random.default_rng((self.seed, step))
        user = np.full(self.batch, len(self.indptr) - 1, np.int32)
        targets = np.full((self.batch, self.max_targets), -1, np.int32)
        weights = np.zeros((self.batch, self.max_targets), np.float32)
        size, count = users_of_step(self.batch, len(self.users)), len(self.users)
        for row, who in enumerate(self.users[places_of_step(step, size, count, self.seed)]):
            items = rng.permutation(self.item[self.indptr[who]:self.indptr[who + 1]])
            hidden = min(max(1, round(self.hidden_share * len(items))), self.max_targets)
            user[row] = who
            targets[row, :hidden] = items[:hidden]
            weights[row, :hidden] = 1.0 / hidden
        return UserBatch(user, targets, weights)


def users_of_step(batch: int, num_users: int) -> int:
    """How many users a step takes out of the graph to learn from: no more than a quarter of them."""
    return min(batch, max(num_users // 4, 1))


def loss(cfg: PropagationTraining, model: Propagation, params: Any, constants: Constants, batch: UserBatch,
         key: jax.Array) -> tuple[jax.Array, dict]:
    """Mean over the batch's users of what it costs to find their hidden items, and kgin's independence term."""
    drop_key, draw_key = jax.random.split(key)
    users, tables = model.apply({"params": params}, constants.graph, constants.learned, batch.user, batch.targets,
                                False, rngs={"dropout": drop_key})
    if cfg.loss == "softmax":
        each = losses.table_cross_entropy(users, tables.decode, batch.targets, weights=batch.weights)  # [B]
    else:
        # BPR: each hidden item against one drawn among all (Rendle et al. 2009).
        other = jax.random.randint(draw_key, batch.targets.shape, 0, tables.decode.shape[0])
        rows = jnp.take(tables.decode, jnp.maximum(batch.targets, 0), axis=0) - jnp.take(tables.decode, other, axis=0)
        each = (jax.nn.softplus(-jnp.einsum("bd,btd->bt", users, rows)) * batch.weights).sum(1)
    count = (batch.weights.sum(1) > 0).sum().astype(jnp.float32)
    total, told = each.sum() / jnp.maximum(count, 1.0), {"rec_loss": (each.sum(), count)}
    if tables.intents.shape[0] > 1 and cfg.independence:
        told["independence"] = dependence(tables.intents)
        total = total + cfg.independence * told["independence"]
    return total, told


def dependence(rows: jax.Array) -> jax.Array:
    """Sum over pairs of rows [Q, D] of their distance correlation, which is 0 where they are independent.

    (Székely et al. 2007; the independence term of KGIN.)
    """
    distance = jnp.abs(rows[:, :, None] - rows[:, None, :])  # [Q, D, D]
    centred = (distance - distance.mean(1, keepdims=True) - distance.mean(2, keepdims=True)
               + distance.mean((1, 2), keepdims=True))
    covariance = jnp.einsum("pij,qij->pq", centred, centred) / rows.shape[1] ** 2  # squared, [Q, Q]
    root = jnp.sqrt(jnp.maximum(covariance, 1e-12))
    own = jnp.sqrt(jnp.maximum(jnp.diagonal(root), 1e-6))
    correlation = root / (own[:, None] * own[None, :])
    return (correlation.sum() - jnp.trace(correlation)) / 2.0


def build(shape: PropagationConfig, graph: Graph, log: Interactions, num_users: int,
          num_items: int) -> tuple[Propagation, Constants, np.ndarray]:
    """(the model, its graph as NumPy arrays, the items [I] that it can say something about) of one log."""
    links = edges(graph) if shape.kind != "lightgcn" else (np.zeros(0, np.int32),) * 3
    node = kept_entities(links[0], links[2], num_items, graph.num_entities)
    if shape.kind == "lightgcn":
        node = np.arange(num_items)
    matrix = log.matrix(num_users, num_items)
    learned, known = learned_nodes(links, node, matrix.getnnz(axis=0) > 0, shape.layers)
    relations = 2 * graph.num_relations if len(links[0]) else 0
    arrays = make_graph(links, node, relations, matrix, with_edges=True, with_users=shape.kind in WITH_USERS)
    return Propagation(shape, len(learned), relations), Constants(arrays, learned), known


def init_params(model: Propagation, key: jax.Array, constants: Constants) -> Any:
    """The parameters before the first step."""
    nobody, nothing = np.full(1, constants.graph.history.num_targets, np.int32), np.full((1, 1), -1, np.int32)
    return model.init(key, constants.graph, constants.learned, nobody, nothing)["params"]


def part_maker(model: Propagation, constants: Constants, num_users: int,
               known: np.ndarray) -> Callable[[Any], PropagationPart]:
    """Parameters -> the part of the score that they make, with everybody in the graph; compiled at its first call."""
    tables = jax.jit(functools.partial(model.apply, method=Propagation.tables))

    def make(params: Any) -> PropagationPart:
        found = jax.device_get(tables({"params": params}, constants.graph, constants.learned,
                                      jnp.ones(num_users, bool)))
        return PropagationPart(found.encode, found.decode, found.intents, known)

    return make


@dataclasses.dataclass(frozen=True)
class Propagator:
    """A propagation model that is still to be trained."""

    shape: PropagationConfig
    training: PropagationTraining

    @staticmethod
    def of(cfg: Any, temperature: float) -> Propagator:
        """By the fields `propagation_…`, `log_every` and `checkpoint_every` of fuse.Config."""
        shape = PropagationConfig(
            cfg.propagation, cfg.propagation_dim, cfg.propagation_layers, cfg.propagation_bases,
            cfg.propagation_attention, cfg.propagation_intents, cfg.propagation_dropout, cfg.propagation_free_dropout,
            temperature)
        return Propagator(shape, PropagationTraining(
            cfg.propagation_steps, cfg.propagation_batch, cfg.propagation_optim, cfg.propagation_loss,
            cfg.propagation_independence, cfg.log_every, cfg.checkpoint_every))

    def fit(self, graph: Graph, log: Interactions, folder: pathlib.Path, run: Any, seed: int) -> PropagationPart:
        """The part of the score that is trained on one log; checkpoints and metrics go to `folder`."""
        shape, cfg = self.shape, self.training
        num_users, num_items = run.dataset.num_users, run.dataset.num_items
        model, arrays, known = build(shape, graph, log, num_users, num_items)
        constants = jax.tree.map(jnp.asarray, arrays)
        if shape.kind != "lightgcn" and not model.num_relations:
            run.tracker.say(f"fuse: {shape.kind}: the data set has no triples, so it knows who touched what alone")
        steps = cfg.num_steps(len(np.unique(log.user)))
        source = UserBatches.of(log, num_users, num_steps=steps, batch=cfg.batch, seed=seed)

        fitted = train.fit(
            workdir=folder, init_fn=lambda key: init_params(model, key, constants),
            loss_fn=functools.partial(loss, cfg, model), constants=constants, source=source,
            tx=make_optimizer(cfg.optim, steps), seed=seed, mesh=run.mesh, rules=PROPAGATION_RULES,
            log_every=cfg.log_every, checkpoint_every=cfg.checkpoint_every,
            label=f"fuse {folder.parent.name} {shape.kind}", tracker=run.tracker)
        return part_maker(model, constants, num_users, known)(jax.device_get(fitted.params))
