"""Batches of images or of log-mel spectrograms with what is to be told of them, lightly augmented."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from kgrec_jax.data.history_batches import places_of_step
from kgrec_jax.data.media_read import Arrays

_SHARE = 8  # an eighth: of the side that a crop may move by, of the frames and of the bands that are masked


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MediaBatch:
    """Some items as the tower reads them, and what it is to say."""

    values: np.ndarray  # [B, H, W, C] float32 standardised
    targets: np.ndarray  # [B, F] float32
    weights: np.ndarray  # [B] float32: 1, of padding 0


@dataclasses.dataclass(frozen=True)
class MediaBatches:
    """Step -> batch, a pure function of (seed, step): each epoch visits the items in an order of its own."""

    arrays: Arrays
    places: np.ndarray  # [n] of the items in `arrays`
    targets: np.ndarray  # [n, F]
    kind: str
    mean: float
    deviation: float
    num_steps: int
    batch: int
    seed: int

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> MediaBatch:
        size, rng = min(self.batch, len(self.places)), np.random.default_rng((self.seed, step))
        chosen = places_of_step(step, size, len(self.places), self.seed)
        values = standardised(self.arrays.take(self.places[chosen]), self.mean, self.deviation)
        out = np.zeros((self.batch, *values.shape[1:]), np.float32)
        targets = np.zeros((self.batch, self.targets.shape[1]), np.float32)
        out[:size], targets[:size] = augmented(values, self.kind, rng), self.targets[chosen]
        return MediaBatch(out, targets, (np.arange(self.batch) < size).astype(np.float32))


def standardised(values: np.ndarray, mean: float, deviation: float) -> np.ndarray:
    """Arrays of any type as float32, less the mean and over the deviation."""
    return ((values.astype(np.float32) - np.float32(mean)) / np.float32(deviation)).astype(np.float32)


def augmented(values: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Images [B, S, S, 3] moved by up to an eighth, half of them mirrored; of sounds [B, T, M, 1] up to an eighth of
    the frames and of the bands at their mean, 0 (SpecAugment; Park et al. 2019)."""
    count, height, width, _ = values.shape
    out = values.copy()
    if kind == "image":
        edge = height // _SHARE
        wide = np.pad(values, ((0, 0), (edge, edge), (edge, edge), (0, 0)), mode="reflect")
        moves, mirrored = rng.integers(0, 2 * edge + 1, (count, 2)), rng.random(count) < 0.5
        for n, (down, right) in enumerate(moves.tolist()):
            cut = wide[n, down:down + height, right:right + width]
            out[n] = cut[:, ::-1] if mirrored[n] else cut
        return out
    for axis, size in ((0, height), (1, width)):
        length = rng.integers(0, size // _SHARE + 1, count)
        start = rng.integers(0, size - length + 1)
        for n, (first, run) in enumerate(zip(start.tolist(), length.tolist(), strict=True)):
            out[n][(slice(None),) * axis + (slice(first, first + run),)] = 0.0
    return out
