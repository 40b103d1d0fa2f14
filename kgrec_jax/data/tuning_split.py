"""The split on which hyper-parameters are searched: what chooses in a run is measured on here, and the test is away."""

from __future__ import annotations

import dataclasses

import numpy as np

from kgrec_jax.data.dataset import Dataset, Interactions, Split
from kgrec_jax.data.interactions import SplitConfig, make_split
from kgrec_jax.errors import KgrecError


def tuning_split(dataset: Dataset, split: Split, cfg: SplitConfig) -> Split:
    """A split whose test is the validation part of `split`, and whose own validation part is an inner cut of its train.

    A run on it chooses by the inner cut, is fitted on the whole of the old train (the inner cut is given back), and is
    measured on the old validation part, whether that was given or drawn. The old test enters nothing: its items are not
    even left out of the lists, as they would not be when the validation part came to pass. The inner cut is made like
    the outer one, for what is chosen there must hold here: the last interaction of each user, the last by time, a list
    of items as large as the hidden one, or a share of each user's. Raises KgrecError where there is no validation part.
    """
    if not len(split.valid):
        raise KgrecError(f"data.split.valid_share: found no validation part in {dataset.name} "
                         f"(valid_share {cfg.valid_share:g}), expected one: hyper-parameters are searched on it")
    train = split.train
    rest = dataclasses.replace(dataset, interactions=train, part=np.zeros(len(train), np.int8), has_fixed_split=False,
                               has_fixed_valid=False)
    inner = make_split(rest, _inner(split, cfg))
    # What a kind must hide for a test of its own goes back to train: one part is cut out, not two.
    kept = Interactions.concatenate([inner.train, inner.test])
    return Split(split.kind, kept, inner.valid, split.valid, False, split.valid_cold_items, inner.valid_cold_items)


def _inner(split: Split, cfg: SplitConfig) -> SplitConfig:
    share = cfg.valid_share or 0.1  # a given validation file needs no share
    if split.kind in ("leave-last-out", "time"):
        return dataclasses.replace(cfg, kind=split.kind, valid_share=share, test_share=0.0)
    if split.kind == "cold-items":
        touched = len(np.unique(split.train.item))
        cold = min(len(split.valid_cold_items) / max(touched, 1), 0.25)
        return dataclasses.replace(cfg, kind="cold-items", items="", cold_share=cold, cold_pool=1.0, valid_share=share)
    cold = cfg.cold_share if split.kind == "random" else 0.0
    return dataclasses.replace(cfg, kind="random", items="", cold_share=cold, valid_share=share, test_share=0.0)
