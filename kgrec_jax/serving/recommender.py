"""Recommendations of a finished run: for a user, for a history, for a free text, each with its reasons."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import pathlib
import re
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp

from kgrec_jax.data.categories import Categories, read_categories
from kgrec_jax.data.dataset import Graph, Interactions
from kgrec_jax.data.graph import Neighbours, neighbours, short_title
from kgrec_jax.data.importers.auto import dataset_folder
from kgrec_jax.data.media_read import ImageForm, SoundForm
from kgrec_jax.data.text import TfidfSvd, TfidfWords
from kgrec_jax.errors import KgrecError
from kgrec_jax.evaluation.beyond_accuracy import ItemVectors, ListMeasures
from kgrec_jax.evaluation.ranking import top_k
from kgrec_jax.linear.parts import Factors, Part
from kgrec_jax.models.domain_towers import DomainPart, HeadsConfig
from kgrec_jax.models.media_towers import MediaTowerConfig, TrainedMedia
from kgrec_jax.models.propagation import PropagationPart
from kgrec_jax.models.recommender import FusedModel, Histories, Scale, TowerPart, histories_of
from kgrec_jax.models.towers import TowerConfig
from kgrec_jax.serving import store
from kgrec_jax.serving.explain import LEVEL, explain
from kgrec_jax.serving.intake import Added, Block, Intake
from kgrec_jax.serving.query import QueryEncoder, QueryIndex
from kgrec_jax.serving.rerank import CANDIDATES, Material, Rerank
from kgrec_jax.stages.graph import training_graph
from kgrec_jax.workdir import DOMAINS

Say = Callable[[str], None]
_NEAREST = 5  # titles that an error suggests


@dataclasses.dataclass(frozen=True)
class Recommender:
    """What serving needs, and nothing else: model, names, histories, graph, and the texts as a query meets them."""

    model: FusedModel
    user_ids: tuple[str, ...]
    item_ids: tuple[str, ...]
    item_names: tuple[str, ...]
    histories: Histories  # of the known users, [Nu]
    known: sp.csr_matrix  # [Nu, I]: left out of each user's list
    graph: Graph
    held_out: int  # interactions that the run measured on: such items may appear in the lists
    query_index: QueryIndex | None = None  # None where no item has a text or a name
    categories: Categories | None = None  # kinds of the items; None where nothing says any
    intake: Intake | None = None  # what new items need to join; None in a recommender of an older version
    added: tuple[Added, ...] = ()  # the items that joined, in the order of their rows

    @staticmethod
    def from_run(run: Any, model: FusedModel) -> Recommender:
        """The recommender of a run whose fusion stage is finished."""
        data, split = run.dataset, run.split
        known = split.fit.matrix(data.num_users, data.num_items)
        if split.valid_given:
            known = (known + split.valid.matrix(data.num_users, data.num_items)).tocsr()
        return Recommender.build(run, model, log=split.fit, known=known, held_out=len(split.test))

    @staticmethod
    def build(run: Any, model: FusedModel, *, log: Interactions, known: sp.csr_matrix, held_out: int) -> Recommender:
        """The recommender of a model that was fitted on `log`, with the texts as the run's fusion stage read them.

        known: [Nu, I], left out of each user's list. held_out: interactions that `log` lacks on purpose.
        """
        data = run.dataset
        histories = histories_of(log, data.num_users, data.num_items, run.experiment.fuse.tower.max_history)
        graph = training_graph(data.graph)[0]
        graph = dataclasses.replace(graph, entity_texts=())  # only encoders read them
        tuned = None if model.tower is None else model.tower.tuned
        if tuned is not None:  # the query index keeps it
            model = dataclasses.replace(model, tower=dataclasses.replace(model.tower, tuned=None))
        return Recommender(model, data.user_ids, data.item_ids, data.item_names, histories, known, graph, held_out,
                           QueryIndex.of(run, tuned), intake=Intake.of(run, tuned and tuned.vectors))

    def with_categories_of(self, run: Any) -> Recommender:
        """The same, knowing which kinds of items the run's data set tells apart."""
        folder = dataset_folder(run.experiment.data.path, lambda line: None)
        return dataclasses.replace(self, categories=read_categories(run.dataset, self.graph, folder))

    def save(self, folder: pathlib.Path) -> None:
        """Writes the folder in place of an older one, which stays until the new one is complete."""
        about = {"users": len(self.user_ids), "items": len(self.item_ids), "held_out": self.held_out,
                 "interactions": int(self.histories.matrix.nnz), "parts": list(self.model.names)}
        store.save(pathlib.Path(folder), self, CLASSES, about)

    @staticmethod
    def load(path: pathlib.Path | str) -> Recommender:
        """The recommender of a run folder or of a folder that `kgrec refit` wrote.

        Raises KgrecError where there is none, or where a file of it is missing, damaged or of another version.
        """
        if (pathlib.Path(path) / DOMAINS).is_file():
            raise KgrecError(f"{path}: found a run of several domains, expected one of them; give "
                             f"{pathlib.Path(path) / 'joined' / 'NAME'} with the name of a domain")
        folder = Recommender.folder(path)
        held = store.load(folder, CLASSES)
        if not isinstance(held, Recommender):
            raise KgrecError(f"{folder / store.MANIFEST}: found a {type(held).__name__}, expected a Recommender; "
                             "give the folder of a run")
        return held

    @staticmethod
    def folder(path: pathlib.Path | str) -> pathlib.Path:
        """Where the recommender of a run is; a recommender's own folder will do for a run."""
        path = pathlib.Path(path)
        return path if (path / store.MANIFEST).is_file() else path / "recommender"

    @property
    def can_refit(self) -> bool:
        """Whether `kgrec refit` makes one of its run; it does not train towers of several domains."""
        return not any(isinstance(part, DomainPart) for part in self.model.parts.values())

    @functools.cached_property
    def _user_rows(self) -> dict[str, int]:
        return {user: row for row, user in enumerate(self.user_ids)}

    @functools.cached_property
    def _item_rows(self) -> dict[str, int]:
        return {item: row for row, item in enumerate(self.item_ids)}

    @functools.cached_property
    def _titles(self) -> tuple[dict[str, list[int]], ...]:
        """Rows by the exact title, by the title without case and year, and with its article in front as well."""
        out: tuple[dict[str, list[int]], ...] = ({}, {}, {})
        for row, name in enumerate(self.item_names):
            for rows, form in zip(out, _FORMS):
                rows.setdefault(form(name), []).append(row)
        return out

    @functools.cached_property
    def _links(self) -> Neighbours | None:
        return neighbours(self.graph, self.graph.num_entities) if len(self.graph.triples) else None

    @functools.cached_property
    def material(self) -> Material:
        """What another order of a list goes by: the vectors of graph and text, and the kinds of items."""
        parts = {name: self.model.parts[name] for name in ("graph", "text") if name in self.model.parts}
        blocks = {name: part.encode for name, part in parts.items() if isinstance(part, Factors)}
        return Material(ItemVectors(blocks) if blocks else None,
                        None if self.categories is None else self.categories.shares)

    def measures(self, candidates: np.ndarray | None) -> tuple[ListMeasures, str]:
        """(what lists out of candidates [I] bool are measured with, None: all items; what it goes by, in a line)."""
        material, kinds = self.material, self.categories
        everything = np.ones(len(self.item_ids), bool) if candidates is None else candidates
        vectors = f"diversity by {material.vectors.names}" if material.vectors else "no diversity: no text and no graph"
        calibration = f"kinds of items by {kinds.source}" if kinds else (
            "no miscalibration: no column such as genres and no relation that says it")
        return (ListMeasures(everything, np.asarray(self.model.popularity), self.histories.matrix, material.vectors,
                             material.shares), f"lists: {vectors}; {calibration}")

    def item_row(self, title: str, say: Say | None = None) -> int:
        """The item of a title: exact, else without case and trailing year; of several, the most touched one.

        `say` is told in one line where there were several. Raises KgrecError with the nearest titles where none is.
        """
        found = self._titled(title)
        if not found:
            raise KgrecError(f"--history: found no item {title!r}, expected a title; "
                             f"the nearest are {'; '.join(self.nearest_titles(title))}")
        best = max(found, key=lambda row: self.model.popularity[row])
        if len(found) > 1 and say:
            say(f"--history: {title!r} is the title of {len(found)} items: taken {self.item_names[best]} "
                f"({self.item_ids[best]}), which most users have")
        return best

    def _titled(self, title: str) -> list[int]:
        """The items of a title, by the first form under which there are any."""
        return next((rows[form(title)] for rows, form in zip(self._titles, _FORMS) if form(title) in rows), [])

    def nearest_titles(self, title: str, count: int = _NEAREST) -> list[str]:
        """The titles that look most like `title`, whatever their case, year and article; of equals the most touched."""
        wanted = _bare(title)
        pairs = _pairs(wanted)
        bare = {name: _bare(name) for name in self.item_names}
        touched = dict(zip(self.item_names, np.asarray(self.model.popularity).tolist()))

        def shared(name: str) -> float:
            own = _pairs(bare[name])
            return 2 * len(own & pairs) / max(len(own) + len(pairs), 1)

        def alike(name: str) -> float:
            # The beginning counts by itself, for few people type a subtitle.
            start = difflib.SequenceMatcher(None, wanted, bare[name][:len(wanted)]).ratio()
            return 0.7 * difflib.SequenceMatcher(None, wanted, bare[name]).ratio() + 0.3 * start

        # Pairs of letters first: comparing letter by letter would take seconds on a large catalogue.
        likely = sorted(bare, key=lambda name: (-shared(name), -touched[name]))[:max(50, count)]
        return sorted(likely, key=lambda name: (-alike(name), -touched[name]))[:count]

    def recommend(self, user: str | None = None, history: Sequence[str] | None = None, k: int = 10,
                  candidates: Iterable[str] | None = None, *, query: str | None = None, rerank: Rerank | None = None,
                  say: Say | None = None) -> list[dict[str, Any]]:
        """The k best items for a known user, for a history of titles (the latest last), or for a free text.

        Args:
          k: at least 1; all that is left where the catalogue has fewer.
          candidates: item ids; only these are ranked.
          rerank: orders the 100 best anew; each item keeps its score and its reason.
          say: told in one line of what the caller should know (an ambiguous title, a user without a history).

        Returns:
          A dict for each item: item_id, title, score, reason, and parts {name: addend}, which add up to the score.

        Raises:
          KgrecError: not exactly one of user, history and query; an unknown user, title or candidate; k below 1; a
            rerank that has nothing to go by.
        """
        given = [name for name, value in (("user", user), ("history", history), ("query", query)) if value is not None]
        if len(given) != 1:
            raise KgrecError(f"recommend: found {' and '.join(given) or 'nothing to go by'}, "
                             "expected exactly one of user, history and query")
        _check_k(k)
        mask = self.candidate_mask(candidates)
        if rerank is not None:
            self.material.check(rerank)
        if query is not None:
            return self._for_query(query, k, mask, rerank, say)
        own, known = self._of_user(user, say) if user is not None else self._of_titles(history, say)
        width = k if rerank is None else max(k, CANDIDATES)
        items, scores = top_k(lambda _: self.model.scores(own), users=np.zeros(1, np.int64), known=known,
                              num_items=len(self.item_ids), k=min(width, len(self.item_ids)), candidates=mask)
        if rerank is not None:
            items, _ = self.material.reorder(rerank, items, scores, k, own.matrix)
        return self._with_reasons(own, items[0][items[0] >= 0])

    def _of_user(self, user: str, say: Say | None) -> tuple[Histories, sp.csr_matrix]:
        if user not in self._user_rows:
            raise KgrecError(f"--user: found no user {user!r}, expected one of the {len(self.user_ids):,} of the log; "
                             "give --history instead")
        row = np.array([self._user_rows[user]])
        own = self.histories.take(row)
        if not own.matrix.nnz and say:
            say(f"--user: {user} has no history: what needs none decides")
        return own, self.known[row]

    def _of_titles(self, titles: Sequence[str], say: Say | None) -> tuple[Histories, sp.csr_matrix]:
        if isinstance(titles, str):
            raise KgrecError(f"history: found the string {titles!r}, expected a list of titles")
        rows = [self.item_row(title, say) for title in titles]
        rows = list(dict.fromkeys(rows[::-1]))[::-1]  # of a title given twice the later place counts
        width = self.histories.sequence.shape[1]
        sequence = np.full((1, width), -1, np.int32)
        sequence[0, width - len(rows[-width:]):] = rows[-width:]
        columns = np.sort(np.array(rows, np.int64))
        matrix = sp.csr_matrix((np.ones(len(rows), np.float32), (np.zeros(len(rows), np.int64), columns)),
                               shape=(1, len(self.item_ids)))
        return Histories(matrix, sequence), matrix

    def _for_query(self, query: str, k: int, mask: np.ndarray | None, rerank: Rerank | None,
                   say: Say | None) -> list[dict[str, Any]]:
        if rerank is not None and rerank.kind == "calibrated":
            raise KgrecError("--calibrate: found with --query, expected a user or a history, whose kinds of items the "
                             "list is to have")
        if self.query_index is None:
            raise KgrecError("--query: found a recommender without any text of its items, expected names or text "
                             "columns in the data set that it was made from; use --user or --history")
        matches = self.query_index.matches(query, np.asarray(self.model.popularity), say, self._titled(query))
        rows = np.flatnonzero(matches.found if mask is None else matches.found & mask)
        if not len(rows) and say:
            say("--query: no item has any of these words")
        total = sum(values[rows] for values in matches.parts.values())
        order = np.argsort(-total, kind="stable")
        if rerank is not None and len(rows):
            order = order[:max(k, CANDIDATES)]
            nobody = sp.csr_matrix((1, len(self.item_ids)), dtype=np.float32)
            found, _ = self.material.reorder(rerank, rows[order][None], total[order][None], k, nobody)
            chosen = found[0][found[0] >= 0]
        else:
            chosen = rows[order][:k]
        out = []
        for row in chosen.tolist():
            parts = {name: float(values[row]) for name, values in matches.parts.items()}
            out.append(self._entry(row, parts, self.query_index.reason(query, row, parts.get("text", 0.0))))
        return out

    def candidate_mask(self, candidates: Iterable[str] | None) -> np.ndarray | None:
        """[I] bool of a list of item ids."""
        if candidates is None:
            return None
        listed = list(candidates)
        unknown = [c for c in listed if c not in self._item_rows]
        if unknown:
            raise KgrecError(f"--candidates: found the unknown item {unknown[0]!r}, expected ids of the data set")
        mask = np.zeros(len(self.item_ids), bool)
        mask[[self._item_rows[c] for c in listed]] = True
        return mask

    def all_users(self, k: int, candidates: Iterable[str] | None = None,
                  rerank: Rerank | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(items [Nu, k] int32, scores [Nu, k] float32) for every user, known items left out; -1 where there are fewer.

        `rerank` orders each user's 100 best anew.
        Works in blocks of users: about 2 million scores of each part, and 16 million similarities of users, at a time.
        """
        _check_k(k)
        block = int(np.clip(min(2_000_000 // len(self.item_ids), 16_000_000 // len(self.user_ids)), 8, 256))
        if rerank is not None:
            self.material.check(rerank)
        width = k if rerank is None else max(k, CANDIDATES)
        items, scores = top_k(
            lambda users: self.model.scores(self.histories.take(users)), users=np.arange(len(self.user_ids)),
            known=self.known, num_items=len(self.item_ids), k=width, candidates=self.candidate_mask(candidates),
            block=block)
        return (items, scores) if rerank is None else self.material.reorder(rerank, items, scores, k,
                                                                            self.histories.matrix)

    def _with_reasons(self, own: Histories, items: np.ndarray) -> list[dict[str, Any]]:
        contributions, present = self.model.contributions(own, items[None])
        contributions = contributions[0]
        present = np.pad(present[0], ((0, 0), (0, 1)), constant_values=True)
        names = (*self.model.names, LEVEL)
        history = own.sequence[0][own.sequence[0] >= 0]
        out = []
        for at, item in enumerate(items.tolist()):
            addends = {name: part.contributions(history, item) for name, part in self.model.parts.items()
                       if hasattr(part, "contributions")}
            why = explain(item=item, score=float(contributions[at].sum()), part_names=names, present=present[at],
                          contributions=contributions[at], history=history, item_names=self.item_names,
                          addends=addends, graph=self.graph, links=self._links)
            parts = {name: float(value) for name, value, there in zip(names, contributions[at], present[at])
                     if there and (name != LEVEL or value)}
            out.append(self._entry(item, parts, why.text))
        return out

    def _entry(self, row: int, parts: dict[str, float], reason: str) -> dict[str, Any]:
        return {"item_id": self.item_ids[row], "title": self.item_names[row], "score": sum(parts.values()),
                "reason": reason, "parts": parts}

    def example(self, row: int, k: int = 5) -> dict[str, Any]:
        """One user's list for the report."""
        history = self.histories.sequence[row]
        return {"user": self.user_ids[row], "history": [self.item_names[i] for i in history[history >= 0][-5:]],
                "recommendations": self.recommend(user=self.user_ids[row], k=k)}


# What a recommender's folder may hold: every kind of part, and what is around them.
CLASSES = (*typing.get_args(Part), DomainPart, PropagationPart, Added, Block, Categories, FusedModel, Graph,
           HeadsConfig, Histories, ImageForm, Intake, MediaTowerConfig, QueryEncoder, QueryIndex, Recommender, Scale,
           SoundForm, TfidfSvd, TfidfWords, TowerConfig, TowerPart, TrainedMedia)


def _check_k(k: int) -> None:
    if k < 1:
        raise KgrecError(f"-k: found {k}, expected at least 1")


def _plain(title: str) -> str:
    return re.sub(r"\s*\(\d{4}\)\s*$", "", title).strip().casefold()


def _turned(title: str) -> str:
    return short_title(title.strip()).casefold()


_FORMS = (str, _plain, _turned)


def _bare(title: str) -> str:
    """A title without case, year, article and punctuation."""
    words = re.findall(r"\w+", _turned(title))
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("the", "a", "an") else words)


def _pairs(text: str) -> set[str]:
    padded = f" {text} "
    return {padded[i:i + 2] for i in range(len(padded) - 1)}
