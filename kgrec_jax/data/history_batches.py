"""Batches for the towers, each a pure function of (seed, step).

Hidden share: a part of a user's history is hidden, the rest is shown. By order: at places of the history, the item that
comes next or that is masked there (Cloze). The order is that of the timestamps, then of the log's rows.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal, Protocol

import jax
import numpy as np

from kgrec_jax.data.dataset import Interactions

MASKED = -2  # in a history: an item is here and is not shown
_LAST_ALONE = 0.2  # cloze: share of the rows whose last item alone is masked, which is what serving asks for


@dataclasses.dataclass(frozen=True)
class Sequences:
    """What the users with a history touched, in order, and how much each item of it counts as a target."""

    item: np.ndarray  # [n] item rows, those of a user together
    weight: np.ndarray  # [n] float32
    start: np.ndarray  # [users] where each user's begin
    stop: np.ndarray  # [users] where they end

    @staticmethod
    def of(log: Interactions, weight: np.ndarray | None = None) -> Sequences:
        """The users of a log, their items by timestamp; `weight` [n] is of its rows, 1 where there is none."""
        order = np.lexsort((log.timestamp, log.user))  # stable: equal times by row
        weight = np.ones(len(log), np.float32) if weight is None else weight.astype(np.float32)[order]
        start = np.flatnonzero(np.diff(log.user[order], prepend=-1))
        return Sequences(log.item[order], weight, start, np.append(start[1:], len(log)))

    def __len__(self) -> int:
        return len(self.start)

    @property
    def lengths(self) -> np.ndarray:
        """[users] how many items each has."""
        return self.stop - self.start

    def of_user(self, user: int) -> tuple[np.ndarray, np.ndarray]:
        """(items, weights) of a user, each [len], in order."""
        part = slice(self.start[user], self.stop[user])
        return self.item[part], self.weight[part]

    def at_least(self, length: int) -> Sequences:
        """The users with so many items; all of them where nobody has."""
        kept = self.lengths >= length
        return dataclasses.replace(self, start=self.start[kept], stop=self.stop[kept]) if kept.any() else self

    def items_of_step(self, batch: int, longest: int) -> int:
        """The most different items that so many users can bring into a step, of each at most `longest` at a time.

        Where a step begins an epoch anew it may visit a user once more, and read another part of a long history.
        """
        visits = np.arange(-(-batch // max(len(self), 1)) + 2)[:, None] * longest
        brought = np.diff(np.minimum(self.lengths, visits), axis=0)  # by each further visit of each user, never growing
        return int(np.sort(brought.ravel())[::-1][:batch].sum())


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

    users: Sequences
    num_steps: int
    batch: int
    max_history: int
    max_targets: int
    hidden_share: float
    seed: int

    @staticmethod
    def of(log: Interactions, *, num_steps: int, batch: int, max_history: int, max_targets: int = 24,
           hidden_share: float = 0.3, seed: int = 0, weight: np.ndarray | None = None) -> HistoryBatches:
        """Batches over the users of a log, their items by timestamp; `weight` [n]: what a row counts as a target."""
        return HistoryBatches(Sequences.of(log, weight), num_steps, batch, max_history, max_targets, hidden_share, seed)

    @property
    def max_items(self) -> int:
        """The most different items of a step."""
        return self.users.items_of_step(self.batch, self.max_history + self.max_targets)

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> HistoryBatch:
        history = np.full((self.batch, self.max_history), -1, np.int32)
        targets = np.full((self.batch, self.max_targets), -1, np.int32)
        weights = np.zeros((self.batch, self.max_targets), np.float32)
        rng = np.random.default_rng((self.seed, step))
        for row, user in enumerate(places_of_step(step, self.batch, len(self.users), self.seed)):
            items, weight = self.users.of_user(user)
            hidden = rng.permutation(len(items))[: min(max(1, round(self.hidden_share * len(items))), self.max_targets)]
            shown = np.delete(items, hidden)[-self.max_history:]
            history[row, self.max_history - len(shown):] = shown
            targets[row, : len(hidden)] = items[hidden]
            weights[row, : len(hidden)] = weight[hidden] / np.maximum(weight[hidden].sum(), np.float32(1e-9))
        return HistoryBatch(history, targets, weights)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PlaceBatch:
    """Some users' histories and, at places of them, the items that are to be found there."""

    history: np.ndarray  # [B, H] int32, the latest last, -1 = none, MASKED = an item that is not shown
    place: np.ndarray  # [B, T] int32 places in the history
    targets: np.ndarray  # [B, T] int32, -1 = none; the last column is of the last place
    weights: np.ndarray  # [B, T] float32, 1 a target on average; 0 where there is none


@dataclasses.dataclass(frozen=True)
class PlaceBatches:
    """Step -> batch, a pure function of (seed, step), with targets at places of the histories.

    next-item: at each place the item that follows. cloze: at masked places the item that was there. Of a history that
    is longer than `max_history` a step reads a window that ends anywhere, so that all of it is learned from.
    """

    users: Sequences
    kind: Literal["next-item", "cloze"]
    num_steps: int
    batch: int
    max_history: int
    mask_share: float
    seed: int

    @staticmethod
    def of(log: Interactions, kind: Literal["next-item", "cloze"], *, num_steps: int, batch: int, max_history: int,
           mask_share: float = 0.2, seed: int = 0, weight: np.ndarray | None = None) -> PlaceBatches:
        """Batches over the users of a log; next-item passes over users with a single item, after which nothing comes.

        The arrays are no wider than the longest history needs.
        """
        users = Sequences.of(log, weight).at_least(2 if kind == "next-item" else 1)
        longest = int(users.lengths.max(initial=1)) - (kind == "next-item")
        return PlaceBatches(users, kind, num_steps, batch, max(1, min(max_history, longest)), mask_share, seed)

    @property
    def max_targets(self) -> int:
        """T."""
        return self.max_history if self.kind == "next-item" else _masks(self.mask_share, self.max_history)

    @property
    def max_items(self) -> int:
        """The most different items of a step."""
        return self.users.items_of_step(self.batch, self.max_history + (self.kind == "next-item"))

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> PlaceBatch:
        history = np.full((self.batch, self.max_history), -1, np.int32)
        place = np.zeros((self.batch, self.max_targets), np.int32)
        targets = np.full((self.batch, self.max_targets), -1, np.int32)
        weights = np.zeros((self.batch, self.max_targets), np.float32)
        rng = np.random.default_rng((self.seed, step))
        wide = self.max_history + (self.kind == "next-item")  # items of a window
        for row, user in enumerate(places_of_step(step, self.batch, len(self.users), self.seed)):
            items, weight = self.users.of_user(user)
            stop = int(rng.integers(min(wide, len(items)), len(items) + 1))
            items, weight = items[max(0, stop - wide):stop], weight[max(0, stop - wide):stop]
            if self.kind == "next-item":
                shown, where = items[:-1], np.arange(len(items) - 1)
                told = where + 1
            else:
                told = where = self._masked(rng, len(items))
                shown = items.copy()
                shown[where] = MASKED
            start, used = self.max_history - len(shown), self.max_targets - len(told)
            history[row, start:] = shown
            place[row, used:] = start + where
            targets[row, used:] = items[told]
            weights[row, used:] = weight[told]
        return PlaceBatch(history, place, targets, weights)

    def _masked(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """The places of a window that are masked, in order."""
        last, drawn = rng.random() < _LAST_ALONE, rng.permutation(length)[:_masks(self.mask_share, length)]
        return np.array([length - 1]) if last else np.sort(drawn)


def _masks(share: float, length: int) -> int:
    return max(1, round(share * length))


class _Batches(Protocol):
    """Batches whose histories and targets name items by their rows."""

    seed: int
    max_items: int

    def __len__(self) -> int: ...

    def __getitem__(self, step: int) -> HistoryBatch | PlaceBatch: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CandidateBatch:
    """A batch whose items are places in `rows`, and the items that its targets are told from."""

    told: HistoryBatch | PlaceBatch  # history and targets: places in `rows`
    rows: np.ndarray  # [R] int32 item rows, each once, in order; -1 = none
    candidates: np.ndarray  # [C] int32 places in `rows`, drawn with replacement
    log_q: np.ndarray  # [R] float32: log of the probability that one draw gives the row


@dataclasses.dataclass(frozen=True)
class CandidateBatches:
    """Step -> batch of another source with drawn candidates, a pure function of (seed, step) as well."""

    source: _Batches
    log_q: np.ndarray  # [I] float32; -inf: never drawn
    cumulated: np.ndarray  # [I] float64 probabilities, added up
    candidates: int
    num_rows: int  # R

    @staticmethod
    def of(source: _Batches, popularity: np.ndarray, candidates: int, power: float,
           multiple: int = 1) -> CandidateBatches:
        """Candidates drawn in proportion to popularity^power among the items that anybody touched.

        Their number and that of the rows are rounded up to a multiple, of devices.
        """
        share = np.where(popularity > 0, np.maximum(popularity, 1).astype(np.float64) ** power, 0.0)
        share = share / share.sum()
        with np.errstate(divide="ignore"):
            log_q = np.log(share).astype(np.float32)
        candidates = -(-candidates // multiple) * multiple
        rows = min(source.max_items + candidates, int((popularity > 0).sum()))
        return CandidateBatches(source, log_q, np.cumsum(share), candidates, -(-rows // multiple) * multiple)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, step: int) -> CandidateBatch:
        told, rng = self.source[step], np.random.default_rng((self.source.seed, 1 << 41, step))
        draws = rng.random(self.candidates)
        # A draw at the very end could fall behind the last sum, which is 1 up to rounding alone.
        last = int(np.searchsorted(self.cumulated, self.cumulated[-1]))
        drawn = np.minimum(np.searchsorted(self.cumulated, draws, side="right"), last)
        used = np.unique(np.concatenate([told.history.ravel(), told.targets.ravel(), drawn]))
        used = used[used >= 0].astype(np.int32)
        rows = np.full(self.num_rows, -1, np.int32)
        rows[: len(used)] = used

        def local(items: np.ndarray) -> np.ndarray:
            return np.where(items >= 0, np.searchsorted(used, items), items).astype(np.int32)

        told = dataclasses.replace(told, history=local(told.history), targets=local(told.targets))
        return CandidateBatch(told, rows, local(drawn), np.where(rows >= 0, self.log_q[np.maximum(rows, 0)], -np.inf))


def places_of_step(step: int, size: int, count: int, seed: int) -> np.ndarray:
    """[size] rows of `count` that a step visits: consecutive ones of the epochs' permutations, laid end to end."""
    epochs, places = np.divmod(np.arange(step * size, (step + 1) * size), count)
    orders = {epoch: _order(seed, int(epoch), count) for epoch in np.unique(epochs)}
    return np.array([orders[epoch][place] for epoch, place in zip(epochs, places)])


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    """[count] the places in the order of an epoch, kept since the steps of an epoch all ask for it."""
    return np.random.default_rng((seed, 1 << 40, epoch)).permutation(count)
