"""Batches of texts for a language model, a function of (texts, seed, step).

A text a row, the same with texts of like length together, or rows filled with one text after another. Texts are token
ids without special tokens; ~id where a token goes on with the word before it (see `token_store`). None is empty.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np

from kgrec_jax.data.text import Tokenizer

Masking = Literal["token", "word", "next"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MaskedBatch:
    """Texts with some tokens hidden, or with each one asked for at the place before it."""

    input_ids: np.ndarray  # [B, L] int32
    attention_mask: np.ndarray  # [B, L] int32
    positions: np.ndarray  # [B, M] int32, where a token is asked for; 0 where unused
    targets: np.ndarray  # [B, M] int32, which one it is
    weights: np.ndarray  # [B, M] float32, 0 where unused


@dataclasses.dataclass(frozen=True)
class Mask:
    """How tokens are hidden.

    `share` of a row's tokens, at least one: four fifths of them as [MASK], a tenth as a random token and a tenth as
    they are (Devlin et al. 2019). By "word" all tokens of a word are hidden together, in the order of a draw, as many
    words as fit into the share. By "next" nothing is hidden: what is asked for at each position is the token after it.
    """

    tokenizer: Tokenizer
    share: float
    by: Masking = "token"

    def empty(self, rows: int, length: int, room: int) -> MaskedBatch:
        """A batch [rows, length] of padding, with positions for the hidden ones of `room` tokens a row."""
        input_ids = np.full((rows, length), self.tokenizer.pad_id, np.int32)
        asked = length - 1 if self.by == "next" else max(1, round(self.share * room))
        positions = np.zeros((rows, asked), np.int32)
        return MaskedBatch(input_ids, np.zeros_like(input_ids), positions, np.zeros_like(positions),
                           np.zeros(positions.shape, np.float32))

    def write(self, batch: MaskedBatch, row: int, tokens: np.ndarray, places: np.ndarray,
              rng: np.random.Generator) -> None:
        """Writes `tokens` (special ones among them) as a row, some of those at `places` hidden."""
        input_ids = batch.input_ids
        input_ids[row, : len(tokens)] = np.where(tokens < 0, ~tokens, tokens)
        batch.attention_mask[row, : len(tokens)] = 1
        if self.by == "next":
            count = len(tokens) - 1
            batch.positions[row, :count], batch.targets[row, :count] = np.arange(count), input_ids[row, 1 : count + 1]
            batch.weights[row, :count] = 1
            return
        if not len(places):
            return
        count = min(max(1, round(self.share * len(places))), batch.positions.shape[1])
        if self.by == "word":
            hidden = _whole_words(places, tokens[places] < 0, count, rng)
            count = len(hidden)
        else:
            hidden = places[np.sort(rng.choice(len(places), count, replace=False))]
        batch.positions[row, :count], batch.targets[row, :count] = hidden, input_ids[row, hidden]
        batch.weights[row, :count] = 1
        kind = rng.random(count)
        other = np.where(kind < 0.9, rng.integers(self.tokenizer.vocab_size, size=count), input_ids[row, hidden])
        input_ids[row, hidden] = np.where(kind < 0.8, self.tokenizer.mask_id, other)

    def write_text(self, batch: MaskedBatch, row: int, tokens: Sequence[int], rng: np.random.Generator) -> None:
        """Writes [CLS] text [SEP]; of a text that is longer than the row a window, drawn anew each time."""
        room = batch.input_ids.shape[1] - 2
        start = int(rng.integers(len(tokens) - room + 1)) if len(tokens) > room else 0
        window = np.asarray(tokens[start : start + room], np.int32)
        line = np.concatenate([[self.tokenizer.cls_id], window, [self.tokenizer.sep_id]]).astype(np.int32)
        self.write(batch, row, line, np.arange(1, len(window) + 1), rng)


def _whole_words(places: np.ndarray, joins: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """At most `count` of `places`, ascending, whole words of them; a part of one word where none is short enough."""
    starts = ~joins | (np.diff(places, prepend=places[0] - 2) > 1)
    starts[0] = True
    word = np.cumsum(starts) - 1  # [n] the word of each place
    sizes = np.bincount(word)
    order, left, chosen = rng.permutation(len(sizes)), count, []
    for one in order:
        if sizes[one] <= left:
            chosen.append(one)
            left -= int(sizes[one])
            if not left:
                break
    if not chosen:
        return places[word == order[0]][:count]
    return places[np.isin(word, chosen)]


class _Orders(dict):
    """What each of the last epochs is like: worth keeping, because it takes a pass over all texts."""

    def of(self, epoch: int, make):
        """The epoch's; made once. Two threads may both make it, and make the same."""
        found = self.get(epoch)
        if found is None:
            found = self[epoch] = make()
            self.pop(epoch - 2, None)
        return found


def _lengths(ids: Sequence) -> np.ndarray:
    lengths = getattr(ids, "lengths", None)
    return np.array([len(row) for row in ids], np.int64) if lengths is None else lengths


@dataclasses.dataclass(frozen=True)
class _Texts:
    """What all three kinds of batches are made of."""

    ids: Sequence[Sequence[int]]
    tokenizer: Tokenizer
    num_steps: int
    batch: int  # rows of a batch
    length: int  # L, tokens of a row with the special ones
    mask_share: float
    seed: tuple[int, ...]
    cover: bool = False  # go over the texts once, in their order
    masking: Masking = "token"
    _orders: _Orders = dataclasses.field(default_factory=_Orders, repr=False, compare=False)

    def __len__(self) -> int:
        return self.num_steps

    def _drawing(self, step: int) -> tuple[np.random.Generator, Mask]:
        return np.random.default_rng([*self.seed, 0, step]), Mask(self.tokenizer, self.mask_share, self.masking)


@dataclasses.dataclass(frozen=True)
class MaskedTexts(_Texts):
    """`num_steps` batches over `ids`, a text a row, all of one length.

    Every text is seen once before any is seen again. A text longer than the batch's rows gives a window of itself,
    another one each time. `cover=True` is for evaluation: the batches go over the texts in order, and rows past the end
    have weight 0.
    """

    @property
    def per_epoch(self) -> int:
        """Batches that show every text once."""
        return -(-len(self.ids) // self.batch)

    def __getitem__(self, step: int) -> MaskedBatch:
        rng, mask = self._drawing(step)
        out = mask.empty(self.batch, self.length, self.length - 2)
        for row, text in enumerate(self._texts(step)):
            mask.write_text(out, row, self.ids[text], rng)
        return out

    def _texts(self, step: int) -> np.ndarray:
        """Rows of `ids` in batch `step`."""
        at = np.arange(step * self.batch, (step + 1) * self.batch)
        if self.cover:
            return at[at < len(self.ids)]
        epochs, places = at // len(self.ids), at % len(self.ids)
        return np.array([self._order(int(epoch))[place] for epoch, place in zip(epochs, places, strict=True)])

    def _order(self, epoch: int) -> np.ndarray:
        return self._orders.of(
            epoch, lambda: np.random.default_rng([*self.seed, 1, epoch]).permutation(len(self.ids)))


@dataclasses.dataclass(frozen=True)
class BucketedTexts(_Texts):
    """`num_steps` batches over `ids`, a text a row, texts of like length together.

    A batch is of length L, L/2 or L/4 (16 at least) and has as many rows as make batch · L tokens: a few fixed shapes,
    little padding. Every text is seen once in an epoch; the last batch of a length is filled up with rows of weight 0.
    Texts longer than L give windows. `cover=True`: as in `MaskedTexts`.
    """

    @property
    def bounds(self) -> list[int]:
        """The lengths of the batches, ascending."""
        return sorted({min(max(16, self.length >> k), self.length) for k in range(3)})

    @functools.cached_property
    def per_epoch(self) -> int:
        """Batches that show every text once."""
        return len(self._make(0))

    def __getitem__(self, step: int) -> MaskedBatch:
        batches = self._epoch(step // self.per_epoch)
        length, texts = batches[step % self.per_epoch]
        rng, mask = self._drawing(step)
        out = mask.empty(self._rows(length), length, length - 2)
        for row, text in enumerate(texts):
            mask.write_text(out, row, self.ids[int(text)], rng)
        return out

    def _rows(self, length: int) -> int:
        return self.batch * max(1, self.length // length)

    def _epoch(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        """(length, texts) of each batch of an epoch."""
        return self._orders.of(epoch, lambda: self._make(epoch))

    def _make(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        lengths = np.minimum(_lengths(self.ids) + 2, self.length)
        bucket = np.searchsorted(self.bounds, lengths)
        rng = np.random.default_rng([*self.seed, 1, epoch])
        order = np.arange(len(lengths)) if self.cover else rng.permutation(len(lengths))
        out = []
        for k, length in enumerate(self.bounds):
            members, rows = order[bucket[order] == k], self._rows(length)
            out += [(length, members[start : start + rows]) for start in range(0, len(members), rows)]
        return out if self.cover else [out[i] for i in rng.permutation(len(out))]


@dataclasses.dataclass(frozen=True)
class PackedTexts(_Texts):
    """`num_steps` batches over `ids`, the texts one after another, each ended by [SEP], in rows without padding.

    A row is [CLS] and the next L − 1 tokens, whatever texts they are of (Liu et al. 2019, RoBERTa); a text goes on in
    the next row. An epoch has every token of every text once, in an order of the texts of its own; its last row is
    filled up. `cover=True`: the texts in their order, rows past the end have weight 0.
    """

    @functools.cached_property
    def rows(self) -> int:
        """Rows of an epoch."""
        return -(-int(_lengths(self.ids).sum() + len(self.ids)) // (self.length - 1))

    @property
    def per_epoch(self) -> int:
        """Batches that show every token once; the next epoch may begin in the last of them."""
        return -(-self.rows // self.batch)

    def __getitem__(self, step: int) -> MaskedBatch:
        rng, mask = self._drawing(step)
        out = mask.empty(self.batch, self.length, self.length - 1)
        rows = self.rows
        for row, at in enumerate(range(step * self.batch, (step + 1) * self.batch)):
            if self.cover and at >= rows:
                break
            tokens = self.row(at // rows, at % rows)
            mask.write(out, row, tokens, np.flatnonzero(tokens[1:] != self.tokenizer.sep_id) + 1, rng)
        return out

    def row(self, epoch: int, at: int) -> np.ndarray:
        """[at most L] int32: [CLS] and the tokens of row `at` of an epoch, nothing hidden."""
        order, ends = self._epoch(epoch)
        start, stop = at * (self.length - 1), min((at + 1) * (self.length - 1), int(ends[-1]))
        parts = [np.array([self.tokenizer.cls_id], np.int32)]
        place = int(np.searchsorted(ends, start, side="right"))
        while start < stop:
            text = np.asarray(self.ids[int(order[place])], np.int32)
            within = start - (int(ends[place]) - len(text) - 1)  # of the text and its [SEP]
            part = np.append(text[within : within + stop - start], np.int32(self.tokenizer.sep_id))[: stop - start]
            parts.append(part)
            start, place = start + len(part), place + 1
        return np.concatenate(parts)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(order of the texts [n], where each ends in the stream [n])."""
        return self._orders.of(epoch, lambda: self._make(epoch))

    def _make(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        lengths = _lengths(self.ids)
        rng = np.random.default_rng([*self.seed, 1, epoch])
        order = np.arange(len(lengths)) if self.cover else rng.permutation(len(lengths))
        return order, np.cumsum(lengths[order] + 1)


SOURCES = {"texts": MaskedTexts, "buckets": BucketedTexts, "packed": PackedTexts}
