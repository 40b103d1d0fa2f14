"""The towers' config: their shape, and what they learn from; fields that follow from one another are derived here."""

from __future__ import annotations

import dataclasses
from typing import Literal

from kgrec_jax.errors import KgrecError

POOLED = ("mean", "attention", "transformer")  # a history as a whole becomes one vector
CAUSAL = ("gru", "sasrec")  # a state at each position, of what came up to it
BIDIRECTIONAL = ("bilstm", "bert4rec")  # a state at each position, of what is around it


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """Shape of the towers, and what they learn from.

    mean, attention and transformer read a history as a set (the transformer with positions) and learn a hidden share of
    it. gru (GRU4Rec; Hidasi et al. 2016) and sasrec (Kang & McAuley 2018) read it in order and learn the next item at
    every position against all items at once, as Klenitskiy & Vasilev (2023) found best. bilstm and bert4rec (Sun et al.
    2019) see both sides of masked positions (Cloze) and answer with a mask token behind the history.
    """

    width: int = 64  # D of item and user vectors
    # how a history becomes a user's vector
    history: Literal["mean", "attention", "transformer", "gru", "bilstm", "sasrec", "bert4rec"] = "attention"
    # how an item's parts become its vector: added, by attention over them, or by an MLP over their concatenation
    fusion: Literal["sum", "attention", "concat-mlp"] = "sum"
    # what is learned; auto: next-item for gru and sasrec, cloze for bilstm and bert4rec, hidden-share for the others
    objective: Literal["auto", "hidden-share", "next-item", "cloze"] = "auto"
    layers: int = 1  # of transformer, gru, bilstm, sasrec and bert4rec
    heads: int = 2  # of transformer, sasrec and bert4rec
    max_history: int = 128  # the most recent items of a user that are read
    part_dropout: float = 0.2  # share of the items whose part is dropped in a step, each part by itself
    free_dropout: float = 0.3  # the same for the free rows
    history_dropout: float = 0.3  # hidden-share: share of a history's items that are not shown in a step
    hidden_dropout: float = 0.2  # share of hidden units that are dropped in gru, bilstm, sasrec and bert4rec
    mask_share: float = 0.2  # cloze: share of a history's items that are masked in a step
    temperature: float = 0.1  # of the softmax over cosines at the start
    candidates: int = 0  # items drawn in a step that targets are told from, with log-Q correction; 0: all items
    candidate_power: float = 0.75  # α: items are drawn in proportion to popularity^α; 0: all alike
    rating_weight: Literal["none", "linear"] = "none"  # linear: a target weighs its rating over the mean rating

    @property
    def trained_on(self) -> str:
        """The objective: hidden-share, next-item or cloze."""
        if self.objective != "auto":
            return self.objective
        return "next-item" if self.history in CAUSAL else "cloze" if self.history in BIDIRECTIONAL else "hidden-share"


def check_towers(cfg: TowerConfig) -> None:
    """KgrecError for fields that are each within their bounds and do not go together."""
    if cfg.history in ("transformer", "sasrec", "bert4rec") and cfg.width % cfg.heads:
        raise KgrecError(f"fuse.tower.heads: found {cfg.heads}, expected a divisor of fuse.tower.width {cfg.width}; "
                         "change one of them")
    able = {"hidden-share": (*POOLED, *CAUSAL, *BIDIRECTIONAL), "next-item": CAUSAL, "cloze": BIDIRECTIONAL}
    if cfg.history not in able[cfg.trained_on]:
        why = {"next-item": "reads an item before it is to say it", "cloze": "sees one side of a masked item alone"}
        said = "gives no vector for each position" if cfg.history in POOLED else why[cfg.trained_on]
        raise KgrecError(f"fuse.tower.objective: found {cfg.objective} with fuse.tower.history {cfg.history}, which "
                         f"{said}, expected auto or hidden-share, or fuse.tower.history "
                         f"{' or '.join(able[cfg.trained_on])}")
