"""What the test of a run is ranked by: the same users, candidates and histories for every model and every control."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import scipy.sparse as sp

from kgrec_jax.evaluation.ranking import RankingResult, ScoreBlock, evaluate_ranking
from kgrec_jax.linear.parts import Part
from kgrec_jax.models.recommender import TOWER, FusedModel, Histories


@dataclasses.dataclass(frozen=True)
class Judge:
    """The test of a run, held in memory."""

    fit: sp.csr_matrix  # [Nu, I] what the models were fitted on
    test: sp.csr_matrix  # [Nu, I] to be found, of the users on whom it is measured
    known: sp.csr_matrix  # [Nu, I] left out of each user's list
    histories: Histories
    candidates: np.ndarray | None  # [I] bool; None: all items
    notes: tuple[str, ...]  # what a reader has to know of users and candidates, in lines

    @staticmethod
    def of(run: Any, histories: Histories, known: sp.csr_matrix) -> Judge:
        """The judge of a run with a test part; users are drawn by its seed where there are too many."""
        data, split, limit = run.dataset, run.split, run.experiment.fuse.eval_users
        shape, notes, candidates = (data.num_users, data.num_items), [], None
        test = split.test.matrix(*shape)
        users = np.flatnonzero(test.getnnz(axis=1))
        if limit and len(users) > limit:
            drawn = np.zeros(shape[0], np.float32)
            drawn[np.random.default_rng((run.experiment.seed, 29)).choice(users, limit, replace=False)] = 1.0
            notes.append(f"measured on {limit:,} of {len(users):,} users, drawn by the seed (fuse.eval_users)")
            test = (sp.diags(drawn) @ test).tocsr()
            test.eliminate_zeros()
        if split.kind == "cold-items":  # the protocol of that split: what nobody has touched, among itself
            candidates = np.isin(np.arange(data.num_items), split.cold_items)
            notes.append(f"the split is cold-items: the {len(split.cold_items):,} hidden items are ranked among "
                         "themselves")
        return Judge(split.fit.matrix(*shape), test, known, histories, candidates, tuple(notes))

    @property
    def first_user(self) -> int:
        """Row of the first user on whom the test is measured."""
        return int(np.flatnonzero(self.test.getnnz(axis=1))[0])

    def rank(self, score_block: ScoreBlock) -> RankingResult:
        """The metrics of scores [b, I] of users [b]."""
        num_items = self.test.shape[1]
        return evaluate_ranking(score_block, known=self.known, relevant=self.test, num_items=num_items, fit=self.fit,
                                block=max(8, min(256, 2_000_000 // num_items)), candidates=self.candidates)

    def of_part(self, part: Part) -> RankingResult:
        """The metrics of a part by itself; items that it does not know come last."""

        def score(users: np.ndarray) -> np.ndarray:
            scores = np.array(part.scores(self.histories.matrix[users]))
            scores[:, ~part.known] = np.finfo(np.float32).min
            return scores

        return self.rank(score)

    def of_towers(self, model: FusedModel) -> RankingResult:
        """The metrics of the towers by themselves."""
        return self.rank(lambda users: model.part_scores(self.histories.take(users), TOWER))

    def of_model(self, model: FusedModel) -> RankingResult:
        """The metrics of the fused score."""
        return self.rank(lambda users: model.scores(self.histories.take(users)))
