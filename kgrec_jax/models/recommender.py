"""The fused model: histories in, one score for every item out, as a sum of named parts.

It is a function of histories and not of user ids, so a user who came after training is served like any other.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp

from kgrec_jax.data.dataset import Interactions
from kgrec_jax.linear.parts import Part
from kgrec_jax.models.fusion import GateInputs, gate_contributions
from kgrec_jax.models.towers import TowerConfig, Towers

WITHOUT_HISTORY = ("popularity", "expected-popularity")  # parts that know something of a user without a history
TOWER = "sequence"  # the name of the learned towers' part


@dataclasses.dataclass(frozen=True)
class Histories:
    """What some users touched: as a matrix for the closed forms, in order for the towers."""

    matrix: sp.csr_matrix  # [b, I] binary
    sequence: np.ndarray  # [b, H] int32, the latest last, -1 in front where a history is shorter

    def take(self, rows: np.ndarray) -> Histories:
        """The histories of some rows."""
        return Histories(self.matrix[rows], self.sequence[rows])

    def __len__(self) -> int:
        return self.matrix.shape[0]


def histories_of(log: Interactions, num_users: int, num_items: int, max_history: int) -> Histories:
    """The histories of all users in a log, by timestamp, then by row; the latest `max_history` in order."""
    order = np.lexsort((log.timestamp, log.user))  # stable: equal times by row
    user, item = log.user[order], log.item[order]
    count = np.bincount(user, minlength=num_users)
    from_end = np.repeat(np.cumsum(count), count) - 1 - np.arange(len(user))  # 0 for a user's latest
    kept = from_end < max_history
    width = max(1, min(max_history, int(count.max(initial=1))))
    sequence = np.full((num_users, width), -1, np.int32)
    sequence[user[kept], width - 1 - from_end[kept]] = item[kept]
    return Histories(log.matrix(num_users, num_items), sequence)


@dataclasses.dataclass(frozen=True)
class TunedTexts:
    """What an encoder that learned inside the towers leaves; a recommender keeps both in its query index."""

    vectors: np.ndarray  # [I, d] unit vectors of the items' texts, 0 where there is none
    weights: Mapping  # {embeddings, encoder} that made them


@dataclasses.dataclass(frozen=True)
class TowerPart:
    """The learned towers after training: item vectors are computed once, users by their histories."""

    cfg: TowerConfig
    params: Mapping
    item_vectors: np.ndarray  # [I, D] unit length
    item_parts: Mapping[str, np.ndarray]  # {part: [I, D]}, adding up to the item's vector
    known: np.ndarray  # [I] bool
    tuned: TunedTexts | None = None  # None where the encoder did not learn along
    others: tuple[TowerPart, ...] = ()  # further members of an ensemble, whose scores are added

    @property
    def members(self) -> tuple[TowerPart, ...]:
        """All towers that count together, these first."""
        return (self, *self.others)

    def user_vectors(self, sequence: np.ndarray) -> np.ndarray:
        """[b, D] of these towers for histories [b, H]."""
        return np.asarray(_user_vectors(self.cfg, len(self.known), self.params, self.item_vectors, sequence))

    def scores(self, sequence: np.ndarray) -> np.ndarray:
        """[b, I] for histories [b, H], the sum over the members (a deep ensemble; Lakshminarayanan et al. 2017)."""
        return sum(one.user_vectors(sequence) @ one.item_vectors.T for one in self.members)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _user_vectors(cfg: TowerConfig, num_items: int, params, item_vectors, sequence) -> jax.Array:
    return Towers(cfg, num_items).apply({"params": params}, item_vectors, sequence, method=Towers.user_vectors)


@dataclasses.dataclass(frozen=True)
class Scale:
    """How features of users and items enter the gate: logarithms, standardised on the training data."""

    user_mean: float
    user_std: float
    item_mean: float
    item_std: float


@dataclasses.dataclass(frozen=True)
class FusedModel:
    """All parts and the gate over them."""

    parts: Mapping[str, Part]  # the closed forms, by name
    tower: TowerPart | None
    gate: Mapping[str, np.ndarray]  # see models/fusion.py; its parts are `names`
    names: tuple[str, ...]  # P names, in the gate's order
    popularity: np.ndarray  # [I] training users of each item
    scale: Scale

    @property
    def num_items(self) -> int:
        """I."""
        return len(self.popularity)

    @property
    def cold(self) -> np.ndarray:
        """[I] bool: nobody touched it in training."""
        return self.popularity == 0

    def known(self) -> np.ndarray:
        """[P, I] bool: the items that each part can say something about."""
        return np.stack([self.tower.known if name == TOWER else self.parts[name].known for name in self.names])

    def raw(self, histories: Histories, name: str) -> np.ndarray:
        """[b, I]: one part's scores as they are."""
        return self.tower.scores(histories.sequence) if name == TOWER else self.parts[name].scores(histories.matrix)

    def standardised(self, histories: Histories) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(scores [P, b, I] standardised per user, present [P, b], user features [b, Fu])."""
        raw = np.stack([self.raw(histories, name) for name in self.names])  # [P, b, I]
        seen = np.zeros(histories.matrix.shape, bool)
        seen[np.repeat(np.arange(len(histories)), np.diff(histories.matrix.indptr)), histories.matrix.indices] = True
        basis = self.known() & ~self.cold[None]  # a part's scale is that of its warm items
        scores = np.asarray(_standardise(raw, basis, seen))
        length = histories.matrix.getnnz(axis=1)
        present = np.stack([(length > 0) | (name in WITHOUT_HISTORY) for name in self.names])
        user = ((np.log1p(length) - self.scale.user_mean) / self.scale.user_std).astype(np.float32)
        return scores, present, user[:, None]

    def item_features(self) -> np.ndarray:
        """[I, Fi]: log popularity, standardised over warm items, 0 for cold ones."""
        value = (np.log1p(self.popularity) - self.scale.item_mean) / self.scale.item_std
        return np.where(self.cold, 0.0, value).astype(np.float32)[:, None]

    def scores(self, histories: Histories) -> np.ndarray:
        """[b, I] fused scores."""
        scores, present, user = self.standardised(histories)
        return np.asarray(_fused(dict(self.gate), scores, present, self.known(), self.cold, user, self.item_features()))

    def contributions(self, histories: Histories, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(what each part adds [b, K, P + 1], present [b, K, P]) for items [b, K]; the last column is the level."""
        scores, present, user = self.standardised(histories)
        rows = np.arange(len(histories))[:, None]
        inputs = GateInputs(
            scores=jnp.asarray(scores.transpose(1, 2, 0)[rows, items]),
            present=jnp.asarray(self.known()[:, items].transpose(1, 2, 0) & present.T[:, None, :]),
            cold=jnp.asarray(self.cold[items]), user=jnp.asarray(user), item=jnp.asarray(self.item_features()[items]))
        return np.asarray(jax.jit(gate_contributions)(dict(self.gate), inputs)), np.asarray(inputs.present)

    def part_scores(self, histories: Histories, name: str) -> np.ndarray:
        """[b, I]: one part on its own; items that it does not know come last, all equal."""
        raw = np.array(self.raw(histories, name))
        known = self.tower.known if name == TOWER else self.parts[name].known
        raw[:, ~known] = np.finfo(np.float32).min
        return raw


@jax.jit
def _standardise(raw: jax.Array, basis: jax.Array, seen: jax.Array) -> jax.Array:
    """[P, b, I] less the mean and over the deviation of each user's unseen items in `basis` [P, I]."""
    weight = (basis[:, None, :] & ~seen[None]).astype(jnp.float32)
    count = jnp.maximum(weight.sum(-1, keepdims=True), 1.0)
    mean = (raw * weight).sum(-1, keepdims=True) / count
    variance = (jnp.square(raw - mean) * weight).sum(-1, keepdims=True) / count
    return jnp.where(variance > 1e-12, (raw - mean) * jax.lax.rsqrt(jnp.maximum(variance, 1e-12)), 0.0)


@jax.jit
def _fused(gate, scores, present, known, cold, user, item) -> jax.Array:
    inputs = GateInputs(
        scores=scores.transpose(1, 2, 0), present=known.T[None] & present.T[:, None, :],
        cold=jnp.broadcast_to(cold[None], scores.shape[1:]), user=user,
        item=jnp.broadcast_to(item[None], (scores.shape[1], *item.shape)))
    return gate_contributions(gate, inputs).sum(-1)
