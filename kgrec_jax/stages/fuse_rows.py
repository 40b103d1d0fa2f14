"""Further ways to score from behaviour and words: rows of the report that are fitted where they are asked for.

`fuse.rows` says which are fitted and measured, `fuse.joined` which of them are parts of the fused score as well.
"""

from __future__ import annotations

import dataclasses
import pathlib
import typing
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp

from kgrec_jax.data.dataset import Interactions
from kgrec_jax.linear.choose import LinearChoice
from kgrec_jax.linear.ials import ials
from kgrec_jax.linear.parts import Factors, FoldIn, Part
from kgrec_jax.linear.slim import slim, skip_reason
from kgrec_jax.stages.fuse_bpr import BprConfig, fit_bpr
from kgrec_jax.stages.item_features import ItemContent, unit_rows

Row = Literal["ials", "slim", "bpr", "tfidf"]
FURTHER: tuple[str, ...] = typing.get_args(Row)


@dataclasses.dataclass(frozen=True)
class FurtherRows:
    """Which of them are fitted, and how."""

    names: tuple[str, ...] = ()
    joined: tuple[str, ...] = ()  # those that are parts of the fused score too
    bpr: BprConfig = BprConfig()
    log_every: int = 20
    checkpoint_every: int = 100

    @staticmethod
    def of(cfg: Any) -> FurtherRows:
        """By the fields of fuse.Config; what joins the score is fitted whether or not it is a row."""
        names = tuple(name for name in FURTHER if name in cfg.rows or name in cfg.joined)
        return FurtherRows(names, tuple(n for n in names if n in cfg.joined), cfg.bpr, cfg.log_every,
                           cfg.checkpoint_every)

    @property
    def with_ials(self) -> bool:
        """Whether iALS is one of them."""
        return "ials" in self.names

    def with_slim(self, num_items: int) -> bool:
        """Whether SLIM is one of them and can be fitted to so many items."""
        return "slim" in self.names and not skip_reason(num_items)

    def skipped(self, num_items: int) -> dict[str, str]:
        """Row -> why it cannot be fitted to so many items."""
        if "slim" not in self.names or self.with_slim(num_items):
            return {}
        return {"slim": skip_reason(num_items)}

    def fit(self, log: Interactions, matrix: sp.csr_matrix, choice: LinearChoice, content: ItemContent,
            folder: pathlib.Path, run: Any, seed: int) -> dict[str, Part]:
        """The parts by name; what training leaves goes to `folder`."""
        out: dict[str, Part] = {}
        if self.with_ials:
            out["ials"] = fit_ials(matrix, choice, folder, run, seed)
        if self.with_slim(matrix.shape[1]):
            with run.tracker.progress("fuse slim", matrix.shape[1]) as bar:
                out["slim"] = slim(matrix, choice.slim_l1, choice.slim_l2, advance=bar.advance)
        if "bpr" in self.names:
            out["bpr"] = fit_bpr(self.bpr, log, folder / "bpr", run, seed, self.log_every, self.checkpoint_every)
        if "tfidf" in self.names and content.words is not None:
            out["tfidf"] = profile(unit_rows(content.words))
        return out


def fit_ials(matrix: sp.csr_matrix, choice: LinearChoice, folder: pathlib.Path, run: Any, seed: int) -> FoldIn:
    """iALS with the chosen settings; a run that is broken off goes on after its last iteration."""
    with run.tracker.progress(f"fuse {folder.name} ials", choice.ials.iterations) as bar:
        return ials(matrix, choice.ials, seed=seed, keep=folder / "ials.npz", advance=bar.advance)


def profile(unit: np.ndarray | sp.csr_matrix) -> Factors:
    """Cosine of each item with the sum of the history's unit vectors [I, d]."""
    length = np.asarray(abs(unit).sum(axis=1)).ravel()
    return Factors(unit, sp.csr_matrix(unit.T) if sp.issparse(unit) else np.ascontiguousarray(unit.T), length > 0)
