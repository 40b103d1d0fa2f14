"""Recommendations of a finished run: for a user, for a history, each with its reasons."""

from __future__ import annotations

import dataclasses
import difflib
import os
import pathlib
import pickle
import re
import shutil
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp

from kgrec_jax.data.dataset import Graph
from kgrec_jax.data.graph import neighbours
from kgrec_jax.errors import KgrecError
from kgrec_jax.evaluation.ranking import top_k
from kgrec_jax.models.recommender import FusedModel, Histories, histories_of
from kgrec_jax.serving.explain import explain
from kgrec_jax.stages.graph import training_graph

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Recommender:
    """What serving needs, and nothing else: model, names, histories, graph."""

    model: FusedModel
    user_ids: tuple[str, ...]
    item_ids: tuple[str, ...]
    item_names: tuple[str, ...]
    histories: Histories  # of the known users, [Nu]
    known: sp.csr_matrix  # [Nu, I]: left out of each user's list
    graph: Graph
    held_out: int  # interactions that the run measured on: such items may appear in the lists

    @staticmethod
    def from_run(run: Any, model: FusedModel) -> Recommender:
        """The recommender of a run whose fusion stage is finished."""
        data, split = run.dataset, run.split
        shape = data.num_users, data.num_items
        histories = histories_of(split.fit, *shape, run.experiment.fuse.tower.max_history)
        known = (histories.matrix + split.valid.matrix(*shape)).tocsr() if split.valid_given else histories.matrix
        return Recommender(model, data.user_ids, data.item_ids, data.item_names, histories, known,
                           training_graph(data.graph)[0], len(split.test))

    def save(self, folder: pathlib.Path) -> None:
        """Writes the folder under a temporary name and renames it."""
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        with open(temporary / "recommender.pkl", "wb") as file:
            pickle.dump((FORMAT_VERSION, self), file, protocol=5)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)

    @staticmethod
    def load(run: pathlib.Path | str) -> Recommender:
        """The recommender that a run folder holds. It is a pickle: load only folders that you trust."""
        file = pathlib.Path(run) / "recommender" / "recommender.pkl"
        if not file.is_file():
            raise KgrecError(f"{run}: found no recommender, expected a finished run; finish it with kgrec run")
        with open(file, "rb") as held:
            version, out = pickle.load(held)
        if version != FORMAT_VERSION:
            raise KgrecError(f"{file}: found format version {version}, expected {FORMAT_VERSION}; run it again in a new folder")
        return out

    def item_row(self, title: str) -> int:
        """The item of a title: exact, else without case and trailing year; of several, the most touched one."""
        exact = [i for i, name in enumerate(self.item_names) if name == title]
        plain = _plain(title)
        found = exact or [i for i, name in enumerate(self.item_names) if _plain(name) == plain]
        if not found:
            near = difflib.get_close_matches(title, self.item_names, n=5, cutoff=0.0)
            raise KgrecError(f"--history: found no item {title!r}, expected a title; the nearest are {'; '.join(near)}")
        return max(found, key=lambda i: self.model.popularity[i])

    def recommend(self, user: str | None = None, history: Sequence[str] | None = None, k: int = 10,
                  candidates: Iterable[str] | None = None) -> list[dict[str, Any]]:
        """The k best items for a known user or for a history of titles: item_id, title, score, reason, parts."""
        if (user is None) == (history is None):
            raise KgrecError("recommend: found neither or both of user and history, expected one of them")
        if user is not None:
            if user not in self.user_ids:
                raise KgrecError(f"--user: found no user {user!r}, expected one of the {len(self.user_ids):,} of the log; give --history instead")
            row = np.array([self.user_ids.index(user)])
            own, known = self.histories.take(row), self.known[row]
        else:
            rows = [self.item_row(title) for title in history]
            width = self.histories.sequence.shape[1]
            sequence = np.full((1, width), -1, np.int32)
            sequence[0, width - len(rows[-width:]):] = rows[-width:]
            matrix = sp.csr_matrix((np.ones(len(set(rows)), np.float32), ([0] * len(set(rows)), sorted(set(rows)))), shape=(1, len(self.item_ids)))
            own, known = Histories(matrix, sequence), matrix
        items, scores = top_k(lambda _: self.model.scores(own), users=np.zeros(1, np.int64), known=known, num_items=len(self.item_ids),
                              k=k, candidates=self.candidate_mask(candidates))
        kept = items[0] >= 0
        return self._with_reasons(own, items[0][kept], scores[0][kept])

    def candidate_mask(self, candidates: Iterable[str] | None) -> np.ndarray | None:
        """[I] bool of a list of item ids."""
        if candidates is None:
            return None
        rows = {item: row for row, item in enumerate(self.item_ids)}
        listed = list(candidates)
        unknown = [c for c in listed if c not in rows]
        if unknown:
            raise KgrecError(f"--candidates: found the unknown item {unknown[0]!r}, expected ids of the data set")
        mask = np.zeros(len(self.item_ids), bool)
        mask[[rows[c] for c in listed]] = True
        return mask

    def all_users(self, k: int, candidates: Iterable[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(items [Nu, k], scores [Nu, k]) for every user, known items left out; -1 where there are fewer."""
        return top_k(lambda users: self.model.scores(self.histories.take(users)), users=np.arange(len(self.user_ids)), known=self.known,
                     num_items=len(self.item_ids), k=k, candidates=self.candidate_mask(candidates),
                     block=max(8, min(256, 2_000_000 // len(self.item_ids))))

    def _with_reasons(self, own: Histories, items: np.ndarray, scores: np.ndarray) -> list[dict[str, Any]]:
        contributions, present = self.model.contributions(own, items[None])
        history = own.sequence[0][own.sequence[0] >= 0]
        links = neighbours(self.graph, self.graph.num_entities) if len(self.graph.triples) else None
        out = []
        for at, item in enumerate(items):
            addends = {name: part.contributions(history, int(item)) for name, part in self.model.parts.items() if hasattr(part, "contributions")}
            why = explain(item=int(item), score=float(contributions[0, at].sum()), part_names=(*self.model.names, "level"),
                          contributions=contributions[0, at], present=np.append(present[0, at], True), history=history,
                          item_names=self.item_names, addends=addends, graph=self.graph if links is not None else None, links=links)
            out.append({"item_id": self.item_ids[item], "title": self.item_names[item], "score": float(scores[at]), "reason": why.text})
        return out

    def example(self, row: int, k: int = 5) -> dict[str, Any]:
        """One user's list for the report."""
        history = self.histories.sequence[row]
        return {"user": self.user_ids[row], "history": [self.item_names[i] for i in history[history >= 0][-5:]],
                "recommendations": self.recommend(user=self.user_ids[row], k=k)}


def _plain(title: str) -> str:
    return re.sub(r"\s*\(\d{4}\)\s*$", "", title).strip().casefold()
