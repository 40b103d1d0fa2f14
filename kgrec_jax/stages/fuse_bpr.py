"""BPR-MF: matrix factorisation by pairwise ranking (Rendle et al. 2009), trained on one log.

A row for every user and every item, and a loss −log σ(x_u·(h_i − h_j)) + λ (|x_u|² + |h_i|² + |h_j|²) over drawn
interactions (u, i), each with an item j drawn among those that u has not touched. `linear.parts.UserFactors` says how a
history becomes a user.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp

from kgrec_jax import train
from kgrec_jax.data.dataset import Interactions
from kgrec_jax.linear.parts import UserFactors, history_marks, scaled_rows
from kgrec_jax.optim import OptimConfig, make_optimizer
from kgrec_jax.sharding import REPLICATED

_DRAWS = 8  # items that are drawn for a pair before it is given up: only who touched nearly all comes to that
BOUNDS = {"dim": (1, 1 << 20), "steps": (0, 1 << 30), "batch": (1, 1 << 30), "l2": (0.0, 1e6), "ridge": (1e-9, 1e9)}


@dataclasses.dataclass(frozen=True)
class BprConfig:
    """How the row `bpr` is trained."""

    dim: int = 64  # D of the factors
    steps: int = 0  # 0: sixty passes over the interactions, 300 to 20000
    batch: int = 2048  # interactions of a step
    l2: float = 0.01  # λ: pulls the rows of a step to zero
    ridge: float = 1.0  # of the matrix that makes a row of the history of a user who has none
    optim: OptimConfig = OptimConfig(peak_lr=0.01)  # of the rows

    def num_steps(self, interactions: int) -> int:
        """Steps for so many interactions."""
        return self.steps or int(np.clip(60 * interactions // self.batch, 300, 20_000))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairBatch:
    """Interactions, each beside an item that its user has not touched."""

    user: np.ndarray  # [B] int32
    item: np.ndarray  # [B] int32
    other: np.ndarray  # [B] int32
    weight: np.ndarray  # [B] float32: 0 where no such item was found


@dataclasses.dataclass(frozen=True)
class PairBatches:
    """Step -> interactions drawn with replacement by (seed, step), as in the paper's LearnBPR."""

    user: np.ndarray  # [n] int32
    item: np.ndarray  # [n] int32
    keys: np.ndarray  # [n] int64, sorted: user * I + item
    warm: np.ndarray  # [w] int32 items that anybody touched: what is drawn from
    num_items: int
    num_steps: int
    batch: int
    seed: int

    @staticmethod
    def of(matrix: sp.csr_matrix, *, num_steps: int, batch: int, seed: int = 0) -> PairBatches:
        """Batches over the entries of a binary matrix [Nu, I] with sorted columns."""
        user = np.repeat(np.arange(matrix.shape[0], dtype=np.int32), np.diff(matrix.indptr))
        keys = user.astype(np.int64) * matrix.shape[1] + matrix.indices
        warm = np.unique(matrix.indices).astype(np.int32)
        return PairBatches(user, matrix.indices.astype(np.int32), keys, warm, matrix.shape[1], num_steps, batch, seed)

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> PairBatch:
        rng = np.random.default_rng((self.seed, step))
        drawn = rng.integers(len(self.user), size=self.batch)
        user, item = self.user[drawn], self.item[drawn]
        other = self.warm[rng.integers(len(self.warm), size=self.batch)]
        touched = self._touched(user, other)
        for _ in range(_DRAWS):
            again = np.flatnonzero(touched)
            other[again] = self.warm[rng.integers(len(self.warm), size=len(again))]
            touched[again] = self._touched(user[again], other[again])
        return PairBatch(user, item, other, (~touched).astype(np.float32))

    def _touched(self, user: np.ndarray, item: np.ndarray) -> np.ndarray:
        wanted = user.astype(np.int64) * self.num_items + item
        place = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return self.keys[place] == wanted


def loss(l2: float, params: Any, constants: Any, batch: PairBatch, key: jax.Array) -> tuple[jax.Array, dict]:
    """Mean over the pairs of the loss, and the share of pairs that are in the right order."""
    del constants, key
    user = jnp.take(params["users"], batch.user, axis=0)  # [B, D]
    item, other = (jnp.take(params["items"], rows, axis=0) for rows in (batch.item, batch.other))
    ahead = (user * (item - other)).sum(-1)  # [B]
    size = jnp.square(user).sum(-1) + jnp.square(item).sum(-1) + jnp.square(other).sum(-1)
    count = batch.weight.sum()
    right = ((ahead > 0).astype(jnp.float32) * batch.weight).sum()
    each = (jax.nn.softplus(-ahead) + l2 * size) * batch.weight
    return each.sum() / jnp.maximum(count, 1.0), {"in_order": (right, count)}


def fit_bpr(cfg: BprConfig, log: Interactions, folder: pathlib.Path, run: Any, seed: int, log_every: int,
            checkpoint_every: int) -> UserFactors:
    """The part that is trained on one log; checkpoints and metrics go to `folder`."""
    shape = run.dataset.num_users, run.dataset.num_items
    matrix = log.matrix(*shape)
    steps = cfg.num_steps(matrix.nnz)
    devices = run.mesh.shape["data"]
    batch = -(-cfg.batch // devices) * devices
    source = PairBatches.of(matrix, num_steps=steps, batch=batch, seed=seed)

    def init(key: jax.Array) -> dict[str, jax.Array]:
        return {name: 0.1 * jax.random.normal(k, (rows, cfg.dim))
                for name, rows, k in zip(("users", "items"), shape, jax.random.split(key))}

    fitted = train.fit(
        workdir=folder, init_fn=init, loss_fn=functools.partial(loss, cfg.l2), constants={}, source=source,
        tx=make_optimizer(cfg.optim, steps), seed=seed, mesh=run.mesh, rules=REPLICATED, log_every=log_every,
        checkpoint_every=max(checkpoint_every, steps // 10), label=f"fuse {folder.parent.name} bpr",
        tracker=run.tracker)
    params = jax.device_get(fitted.params)
    return user_factors(np.asarray(params["users"]), np.asarray(params["items"]), matrix, cfg.ridge)


def user_factors(users: np.ndarray, items: np.ndarray, matrix: sp.csr_matrix, ridge: float) -> UserFactors:
    """The part of trained rows: those of the users with a history, and M = argmin |X̂ H M − P|² + ridge |M|² for others.

    users: P [Nu, D]. items: H [I, D]. matrix: [Nu, I], the training histories; X̂ is `scaled_rows` of it.
    """
    known = matrix.getnnz(axis=0) > 0
    items = np.where(known[:, None], items, np.float32(0.0))
    some = np.flatnonzero(np.diff(matrix.indptr))
    sums = scaled_rows(matrix[some]) @ items  # [Nu', D]
    system = sums.T @ sums + np.float32(ridge) * np.eye(items.shape[1], dtype=np.float32)
    turn = np.linalg.solve(system, sums.T @ users[some])
    marks = history_marks(matrix[some])
    order = np.argsort(marks, kind="stable")
    return UserFactors(users[some][order], marks[order], items, (items @ turn).astype(np.float32), known)
