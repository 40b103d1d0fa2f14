"""Batches of histories with the texts of some of their items, for an encoder that learns from them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np

from kgrec_jax.data.history_batches import CandidateBatch, HistoryBatch, PlaceBatch
from kgrec_jax.data.loader import Source
from kgrec_jax.data.mlm_batches import Mask, MaskedBatch
from kgrec_jax.data.text import Tokenizer

_SWEPT = 4  # a quarter of a step's texts go over all items in turn, whether anybody touched them or not


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EncodedBatch:
    """A batch, and the texts of E items: no item twice."""

    told: HistoryBatch | PlaceBatch | CandidateBatch
    item: np.ndarray  # [E] int32 rows of the item table; I = none
    place: np.ndarray  # [E] int32 places among the rows that the step computes, I of them or R; beyond them: none
    input_ids: np.ndarray  # [E, L] int32
    attention_mask: np.ndarray  # [E, L] int32
    masked: MaskedBatch | None  # the same texts with some tokens hidden


@dataclasses.dataclass(frozen=True)
class EncodedBatches:
    """Step -> batch of another source with the texts of a fixed number of items, a pure function of (seed, step).

    A quarter of the texts are those of all items in turn, so that no vector gets older than so many steps. The others
    are drawn from the items of the step's histories and targets (and from the drawn candidates); where these are
    fewer, further ones are drawn from all.
    """

    source: Source
    ids: Sequence[Sequence[int]]  # [I] tokens of each item's text with the special ones; none: no text
    tokenizer: Tokenizer
    num_rows: int  # E
    length: int  # L
    mask_share: float  # of a text's tokens; 0: none is hidden
    seed: int

    @staticmethod
    def of(source: Source, ids: Sequence[Sequence[int]], tokenizer: Tokenizer, *, items: int, length: int,
           mask_share: float, seed: int, multiple: int = 1) -> EncodedBatches:
        """At most `items` texts a step, and no more than there are; their number is rounded up to a multiple."""
        there = sum(bool(len(tokens)) for tokens in ids)
        rows = -(-min(items, there) // multiple) * multiple
        return EncodedBatches(source, ids, tokenizer, rows, length, mask_share, seed)

    @functools.cached_property
    def texts(self) -> np.ndarray:
        """The items with a text, in an order of the seed's."""
        there = np.flatnonzero([len(tokens) > 0 for tokens in self.ids])
        return np.random.default_rng((self.seed, 1 << 42)).permutation(there)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, step: int) -> EncodedBatch:
        told, rng = self.source[step], np.random.default_rng((self.seed, 1 << 42, step))
        drawn = isinstance(told, CandidateBatch)
        named = told.rows if drawn else np.concatenate([told.history.ravel(), told.targets.ravel()])
        chosen = self._chosen(step, np.unique(named[named >= 0]), rng)
        item = np.full(self.num_rows, len(self.ids), np.int32)
        item[:len(chosen)] = chosen
        place = item
        if drawn:
            rows = told.rows[told.rows >= 0]  # in order
            at = np.minimum(np.searchsorted(rows, item), len(rows) - 1)
            place = np.where(rows[at] == item, at, len(told.rows)).astype(np.int32)
        # A row without an item reads the first text: an empty one would have a length of zero, and no gradient.
        tokens = [self.ids[i] for i in np.where(item < len(self.ids), item, self.texts[0])]
        input_ids, mask = self.tokenizer.pad(tokens, self.length)
        return EncodedBatch(told, item, place, input_ids, mask, self._masked(chosen, rng))

    def _chosen(self, step: int, named: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Different items with a text, at most E: those whose turn it is, then those of the step, then others."""
        texts, size = self.texts, min(self.num_rows, len(self.texts))
        turn = min(-(-self.num_rows // _SWEPT), size)
        chosen = texts[(step * turn + np.arange(turn)) % len(texts)]
        for pool in (np.intersect1d(named, texts), texts):
            left = np.setdiff1d(pool, chosen)
            chosen = np.concatenate([chosen, rng.permutation(left)[:size - len(chosen)]])
        return chosen

    def _masked(self, chosen: np.ndarray, rng: np.random.Generator) -> MaskedBatch | None:
        if not self.mask_share:
            return None
        mask = Mask(self.tokenizer, self.mask_share)
        out = mask.empty(self.num_rows, self.length, self.length - 2)
        for row, item in enumerate(chosen):
            tokens = np.asarray(self.ids[item][:self.length], np.int32)
            mask.write(out, row, tokens, np.arange(1, len(tokens) - 1), rng)
        return out
