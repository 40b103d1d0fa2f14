"""The inner cut of a split: what the parts are fitted on while their gate is learned, and what it is learned on."""

from __future__ import annotations

import dataclasses

import numpy as np

from kgrec_jax.data.dataset import Interactions, Split
from kgrec_jax.models.recommender import histories_of
from kgrec_jax.stages.fuse_gate import HeldOut


@dataclasses.dataclass(frozen=True)
class Inner:
    """The cut on which the gate is learned."""

    fit: Interactions
    heldout: Interactions
    cold: np.ndarray  # [c] items hidden from `fit`
    joint: bool  # warm and cold items are held out as the split's own, so their levels can be compared


def inner_cut(split: Split, share: float, seed: int) -> Inner:
    """What the gate's parts are fitted on and what it is learned on.

    A split with cold items of its own shows how they compare with warm ones, where its validation part has both;
    otherwise a share of the items is hidden from `fit`, and tells about the order of cold items alone.
    """
    rng = np.random.default_rng((seed, 17))
    log, valid = split.train, split.valid
    drawn = rng.random(len(log)) < share
    if not split.valid_given and len(split.valid_cold_items):
        if np.isin(valid.item, split.valid_cold_items, invert=True).any():
            return Inner(log, valid, split.valid_cold_items, True)
        heldout = Interactions.concatenate([valid, log.take(drawn)])
        return Inner(log.take(~drawn), heldout, split.valid_cold_items, False)
    warm = np.unique(log.item)
    cold = np.zeros(0, np.int64)
    if len(warm) > 20:
        cold = np.sort(rng.choice(warm, max(1, int(share * len(warm))), replace=False))
    hidden = np.isin(log.item, cold)
    if split.valid_given or not len(valid):
        return Inner(log.take(~(hidden | drawn)), log.take(hidden | drawn), cold, False)
    return Inner(log.take(~hidden), Interactions.concatenate([valid, log.take(hidden)]), cold, False)


def held_out(inner: Inner, split: Split, shape: tuple[int, int], max_history: int) -> HeldOut:
    """What a gate is learned on by an inner cut; a given validation part is left out of the lists."""
    histories = histories_of(inner.fit, *shape, max_history)
    seen = (histories.matrix + split.valid.matrix(*shape)).tocsr() if split.valid_given else histories.matrix
    return HeldOut(histories, seen, inner.heldout.matrix(*shape), inner.joint)
