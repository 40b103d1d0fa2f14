"""Batches of masked texts, a function of (texts, seed, step)."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from kgrec_jax.data.text import Tokenizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MaskedBatch:
    """Texts with some tokens hidden."""

    input_ids: np.ndarray  # [B, L] int32
    attention_mask: np.ndarray  # [B, L] int32
    positions: np.ndarray  # [B, M] int32, the hidden tokens; 0 where unused
    targets: np.ndarray  # [B, M] int32, what stood there
    weights: np.ndarray  # [B, M] float32, 0 where unused


@dataclasses.dataclass(frozen=True)
class MaskedTexts:
    """`num_steps` batches over `ids` (token lists without special tokens, none of them empty).

    Every text is seen once before any is seen again. A text longer than the batch's rows gives a window of itself,
    another one each time. `mask_share` of the tokens are hidden, at least one: four fifths of them as [MASK], a tenth
    as a random token and a tenth as they are (Devlin et al. 2019). `cover=True` is for evaluation: the batches go over
    the texts in order, and rows past the end have weight 0.
    """

    ids: tuple[tuple[int, ...], ...]
    tokenizer: Tokenizer
    num_steps: int
    batch: int
    length: int
    mask_share: float
    seed: tuple[int, ...]
    cover: bool = False

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> MaskedBatch:
        rng = np.random.default_rng([*self.seed, 0, step])
        room = self.length - 2
        input_ids = np.full((self.batch, self.length), self.tokenizer.pad_id, np.int32)
        mask = np.zeros_like(input_ids)
        positions = np.zeros((self.batch, max(1, round(self.mask_share * room))), np.int32)
        targets, weights = np.zeros_like(positions), np.zeros(positions.shape, np.float32)
        for row, text in enumerate(self._texts(step)):
            tokens = self.ids[text]
            start = int(rng.integers(len(tokens) - room + 1)) if len(tokens) > room else 0
            window = tokens[start : start + room]
            end = len(window) + 2
            input_ids[row, :end] = (self.tokenizer.cls_id, *window, self.tokenizer.sep_id)
            mask[row, :end] = 1
            count = min(max(1, round(self.mask_share * len(window))), positions.shape[1])
            hidden = np.sort(rng.choice(len(window), count, replace=False)) + 1
            positions[row, :count], targets[row, :count], weights[row, :count] = hidden, input_ids[row, hidden], 1
            kind = rng.random(count)
            other = np.where(kind < 0.9, rng.integers(self.tokenizer.vocab_size, size=count), input_ids[row, hidden])
            input_ids[row, hidden] = np.where(kind < 0.8, self.tokenizer.mask_id, other)
        return MaskedBatch(input_ids, mask, positions, targets, weights)

    def _texts(self, step: int) -> np.ndarray:
        """Rows of `ids` in batch `step`."""
        at = np.arange(step * self.batch, (step + 1) * self.batch)
        if self.cover:
            return at[at < len(self.ids)]
        epochs, places = at // len(self.ids), at % len(self.ids)
        orders = {int(epoch): np.random.default_rng([*self.seed, 1, int(epoch)]).permutation(len(self.ids))
                  for epoch in np.unique(epochs)}
        return np.array([orders[int(epoch)][place] for epoch, place in zip(epochs, places, strict=True)])
