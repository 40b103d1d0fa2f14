"""Batches for the towers: a part of a user's history is hidden, the rest is shown."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from kgrec_jax.data.dataset import Interactions


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HistoryBatch:
    """Some users' histories and the items of theirs that are to be found."""

    history: np.ndarray  # [B, H] int32, the latest last, -1 = none
    targets: np.ndarray  # [B, T] int32, -1 = none
    weights: np.ndarray  # [B, T] float32: 1 / number of targets; a padding user's are 0


@dataclasses.dataclass(frozen=True)
class HistoryBatches:
    """Step -> batch, a pure function of (seed, step): each epoch visits the users in an order of its own."""

    items: tuple[np.ndarray, ...]  # of each user with a history: item rows in order
    num_steps: int
    batch: int
    max_history: int
    max_targets: int
    hidden_share: float
    seed: int

    @staticmethod
    def of(log: Interactions, *, num_steps: int, batch: int, max_history: int, max_targets: int = 24,
           hidden_share: float = 0.3, seed: int = 0) -> HistoryBatches:
        """Batches over the users of a log, their items by timestamp."""
        order = np.lexsort((np.arange(len(log)), log.timestamp, log.user))
        user, item = log.user[order], log.item[order]
        starts = np.flatnonzero(np.diff(user, prepend=-1))
        return HistoryBatches(tuple(np.split(item, starts[1:])), num_steps, batch, max_history, max_targets,
                              hidden_share, seed)

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> HistoryBatch:
        history = np.full((self.batch, self.max_history), -1, np.int32)
        targets = np.full((self.batch, self.max_targets), -1, np.int32)
        weights = np.zeros((self.batch, self.max_targets), np.float32)
        rng = np.random.default_rng((self.seed, step))
        for row, user in enumerate(places_of_step(step, self.batch, len(self.items), self.seed)):
            items = self.items[user]
            hidden = rng.permutation(len(items))[: min(max(1, round(self.hidden_share * len(items))), self.max_targets)]
            shown = np.delete(items, hidden)[-self.max_history:]
            history[row, self.max_history - len(shown):] = shown
            targets[row, : len(hidden)] = items[hidden]
            weights[row, : len(hidden)] = 1.0 / len(hidden)
        return HistoryBatch(history, targets, weights)


def places_of_step(step: int, size: int, count: int, seed: int) -> np.ndarray:
    """[size] rows of `count` that a step visits: consecutive ones of the epochs' permutations, laid end to end."""
    epochs, places = np.divmod(np.arange(step * size, (step + 1) * size), count)
    orders = {epoch: np.random.default_rng((seed, 1 << 40, int(epoch))).permutation(count)
              for epoch in np.unique(epochs)}
    return np.array([orders[epoch][place] for epoch, place in zip(epochs, places)])
