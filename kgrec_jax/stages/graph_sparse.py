"""A structure step that touches only the rows in use: for margin losses, whose gradient is zero everywhere else.

A batch names the entities that occur in it once each; their rows are gathered into a small table, the loss and the
row-wise Adagrad update are computed there, and the rows go back into tables that the step was given (donated). The
result is that of the dense step with `OptimConfig(table_name="rowwise-adagrad")`, at a cost that does not depend on
the number of entities.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kgrec_jax.data.link_batches import LinkBatch
from kgrec_jax.errors import KgrecError
from kgrec_jax.models.graph_embedding import GraphEmbedding
from kgrec_jax.optim import RowwiseAdagradState, learning_rate, rowwise_adagrad
from kgrec_jax.stages.graph_config import Config
from kgrec_jax.stages.graph_structure import structure_loss
from kgrec_jax.train import TrainState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseBatch:
    """A LinkBatch whose entities are places in `rows`."""

    rows: np.ndarray  # [M] int32 entities, each once, then padding: a row beyond the table
    links: LinkBatch


def sparse_batch(links: LinkBatch, entity_rows: int) -> SparseBatch:
    """The batch with its entities named once; M = B (1 + T + k) is the same for every batch of one shape."""
    parts = (links.head, links.tails, links.candidates)
    used, place = np.unique(np.concatenate([part.ravel() for part in parts]), return_inverse=True)
    place = place.reshape(-1).astype(np.int32)
    rows = np.full(len(place), entity_rows, np.int32)
    rows[:len(used)] = used
    ends = np.cumsum([part.size for part in parts])[:-1]
    head, tails, candidates = (new.reshape(old.shape) for new, old in zip(np.split(place, ends), parts, strict=True))
    return SparseBatch(rows, LinkBatch(head, links.relation, tails, links.weight, candidates))


def init_sparse(tables: dict) -> TrainState:
    """The state before the first step: the tables, and one accumulator a row."""
    return TrainState(jnp.zeros((), jnp.int32), tables, rowwise_adagrad().init(tables))


def make_sparse_step(cfg: Config, model: GraphEmbedding, steps: int) -> Callable:
    """(state, constants, SparseBatch) -> (state, {name: (sum, count)}): what `train.make_step` makes, of rows in use.

    The learning rate is that of `optim.table_peak_lr`. Raises KgrecError for a softmax, whose gradient reaches every
    row, and for scorers with weights beside the two tables.
    """
    if cfg.loss != "margin":
        raise KgrecError(f"graph.loss: found {cfg.loss!r} for a step on rows in use, expected margin")
    scorer = model.scorer
    if scorer.module is not None or scorer.entity_bias:
        raise KgrecError(f"graph.scorer: found {model.scorer_name!r}, which has weights of its own, for a step on rows "
                         "in use, expected a scorer of two tables such as rotate")
    tx, rate = rowwise_adagrad(), learning_rate(cfg.optim, steps, cfg.optim.table_peak_lr)

    def step(state: TrainState, constants: dict, batch: SparseBatch) -> tuple[TrainState, dict]:
        del constants
        squares = state.opt_state.sum_of_squares

        def compact(tables):
            rows = jnp.take(tables["entity"]["embedding"], batch.rows, axis=0, mode="clip")
            return {"entity": {"embedding": rows}, "relation": tables["relation"]}

        def back(tables, new):
            rows = tables["entity"]["embedding"].at[batch.rows].set(
                new["entity"]["embedding"], mode="drop", unique_indices=False, indices_are_sorted=True)
            return {"entity": {"embedding": rows}, "relation": new["relation"]}

        small = compact(state.params)
        (loss, metrics), grads = jax.value_and_grad(
            lambda tables: structure_loss(cfg, model, tables, batch.links), has_aux=True)(small)
        lr = jnp.asarray(rate(state.step), jnp.float32)
        moves, held = tx.update(grads, RowwiseAdagradState(compact(squares)))
        moved = jax.tree.map(lambda p, u: p - lr * u, small, moves)
        metrics = {"loss": (loss, jnp.ones(())), **metrics, "learning_rate": (lr, jnp.ones(()))}
        return TrainState(state.step + 1, back(state.params, moved),
                          RowwiseAdagradState(back(squares, held.sum_of_squares))), metrics

    return step
