"""What is in a dataset folder, in seconds and before any training: counts, gaps, languages, minutes."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping

import numpy as np

from kgrec_jax.data.dataset import Dataset, Split
from kgrec_jax.data.folder import DataConfig
from kgrec_jax.data.importers.auto import read_dataset, split_config
from kgrec_jax.data.interactions import make_split
from kgrec_jax.data.text import Coverage, coverage, load_tokenizer, present_texts


@dataclasses.dataclass(frozen=True)
class FolderReport:
    """The findings of `check_folder`; `render` says them in lines."""

    name: str
    users: int
    items: int
    interactions: int
    users_without_history: int
    items_without_history: int
    rows_per_user: tuple[int, int, int]  # fewest, median, most, of the users with history
    has_ratings: bool
    has_timestamps: bool
    entities: int  # items included
    relations: int
    triples: tuple[int, int, int]  # train, valid, test of a given link-prediction split; all train without one
    items_without_graph: int
    unnamed_entities: int  # items not counted
    items_without_text: int
    coverage: Coverage | None  # of the tokenizer on the texts; None without a tokenizer or texts
    media: Mapping[str, int]  # name -> items with a vector
    raw_media: Mapping[str, tuple[str, int, int]]  # name -> (kind, items with a file, of these without history)
    split: str  # kind, "" without interactions
    parts: tuple[int, int, int]  # interactions to train, validate and test on
    unseen_items: int  # candidates that the fit part never shows
    minutes: Mapping[str, float]  # stage -> estimate, 0 for a stage that has nothing to work on
    notes: tuple[str, ...]

    @property
    def density(self) -> float:
        """Share of the user-item matrix that is filled."""
        return self.interactions / max(self.users * self.items, 1)

    @property
    def cold_share(self) -> float:
        """Share of the items without any interaction."""
        return self.items_without_history / max(self.items, 1)

    def render(self) -> list[str]:
        """The report as lines for the terminal, warnings last."""
        lines = [f"data set      {self.name}"]
        if self.items:
            lines += self._log_lines()
        lines += [f"graph         {line}" for line in self._graph_lines()]
        if self.items:
            lines.append(f"texts         {self._of_items(self.items_without_text)} without text")
        if self.coverage:
            lines.append(f"tokenizer     {self.coverage.unk_share:.1%} [UNK], {self.coverage.tokens_per_word:.2f} "
                         "tokens a word")
        lines += [f"media         {name}: vectors of {self._of_items(count)}" for name, count in self.media.items()]
        lines += [f"media         {name}: {kind} files of {self._of_items(count)}, of {cold:,} of the "
                  f"{self.items_without_history:,} without history"
                  for name, (kind, count, cold) in self.raw_media.items()]
        if self.minutes:
            stages = ", ".join(f"{stage} {t:.1f}" if t else f"{stage} skipped" for stage, t in self.minutes.items())
            lines.append(f"minutes       {stages}; {sum(self.minutes.values()):.1f} in all (estimate)")
        if self.coverage and self.coverage.reason:
            lines.append(f"warning       {self.coverage.reason}: the text part falls back to character n-grams")
        return lines + [f"note          {note}" for note in self.notes]

    def _log_lines(self) -> list[str]:
        extra = (("ratings", self.has_ratings), ("timestamps", self.has_timestamps))
        columns = " and ".join(name for name, has in extra if has)
        lines = [f"interactions  {self.interactions:,} ({self.density:.2%} of users x items), "
                 f"{'with ' + columns if columns else 'pairs alone'}",
                 f"users         {self.users:,}, {self.users_without_history:,} without history",
                 f"items         {self.items:,}, {self.items_without_history:,} without history ({self.cold_share:.1%} "
                 "cold)"]
        if self.interactions:
            low, middle, high = self.rows_per_user
            train, valid, test = self.parts
            lines[1] += f"; {low:,} to {high:,} items a user, median {middle:,}"
            lines.append(f"split         {self.split}: {train:,} train, {valid:,} valid, {test:,} test; "
                         f"{self._of_items(self.unseen_items)} never seen in training")
        return lines

    def _graph_lines(self) -> list[str]:
        if not sum(self.triples):
            return ["none"]
        parts = " / ".join(f"{count:,}" for count in self.triples) if any(self.triples[1:]) else f"{self.triples[0]:,}"
        others = self.entities - self.items
        beside = " beside the items" if self.items else ""
        lines = [f"{parts} triples, {self.entities:,} entities, {self.relations:,} relations; "
                 f"{self.unnamed_entities:,} of {others:,} entities{beside} without a name"]
        return lines + [f"{self._of_items(self.items_without_graph)} in no triple"] * bool(self.items)

    def _of_items(self, count: int) -> str:
        return f"{count:,} of {self.items:,} items"


def check_folder(path: pathlib.Path | str, cfg: DataConfig = DataConfig(), tokenizer: pathlib.Path | str | None = None,
                 budgets: Callable[[Dataset], Mapping[str, float]] | None = None,
                 say: Callable[[str], None] = print) -> FolderReport:
    """Read a dataset folder or a source as a run would, and report; every error is the one that the run would end with.

    `tokenizer` is an encoder's folder, `budgets` tells the seconds that each stage is expected to take on a data set,
    `say` gets what fetching and importing have to say.
    """
    cfg = dataclasses.replace(cfg, path=str(path))
    dataset = read_dataset(cfg, say)
    split = make_split(dataset, split_config(cfg)) if len(dataset.interactions) else None
    found = _coverage(dataset, tokenizer) if tokenizer else None
    minutes = estimate_minutes(dataset, budgets(dataset)) if budgets else {}
    return _report(dataset, split, found, minutes)


def estimate_minutes(dataset: Dataset, budgets: Mapping[str, float]) -> dict[str, float]:
    """Stage -> minutes, from stage -> seconds; 0 for a stage that the data give nothing to do."""
    graph = dataset.graph
    has_text = any(dataset.item_texts) or any(graph.entity_names) or any(graph.entity_texts)
    needs = {"pretrain": has_text, "graph": len(graph.triples) > 0}
    needs |= dict.fromkeys(("fuse", "evaluate", "recommend"), len(dataset.interactions) > 0)
    return {stage: seconds / 60 if needs.get(stage, True) else 0.0 for stage, seconds in budgets.items()}


def _coverage(dataset: Dataset, tokenizer: pathlib.Path | str) -> Coverage | None:
    """Over the texts of the items, or of the entities where there are no items' texts."""
    graph = dataset.graph
    texts = [text for text in dataset.item_texts if text.strip()]
    texts = texts or [f"{n} {t}".strip() for n, t in zip(graph.entity_names, graph.entity_texts, strict=True)]
    return coverage(load_tokenizer(tokenizer), texts) if any(texts) else None


def _report(dataset: Dataset, split: Split | None, found: Coverage | None,
            minutes: Mapping[str, float]) -> FolderReport:
    log, graph, num_items = dataset.interactions, dataset.graph, dataset.num_items
    per_user = np.bincount(log.user, minlength=dataset.num_users)
    per_item = np.bincount(log.item, minlength=num_items)
    active = per_user[per_user > 0]
    in_graph = np.bincount(graph.triples[:, [0, 2]].ravel(), minlength=graph.num_entities)[:num_items] > 0
    seen = np.bincount(split.fit.item, minlength=num_items) > 0 if split else np.zeros(num_items, bool)
    return FolderReport(
        name=dataset.name, users=dataset.num_users, items=num_items, interactions=len(log),
        users_without_history=int((per_user == 0).sum()), items_without_history=int((per_item == 0).sum()),
        rows_per_user=(int(active.min()), int(np.median(active)), int(active.max())) if len(active) else (0, 0, 0),
        has_ratings=dataset.has_ratings, has_timestamps=dataset.has_timestamps,
        entities=graph.num_entities, relations=graph.num_relations,
        triples=tuple(np.bincount(graph.part, minlength=3).tolist()), items_without_graph=int((~in_graph).sum()),
        unnamed_entities=sum(not name for name in graph.entity_names[num_items:]),
        items_without_text=int((~present_texts(dataset.item_texts)).sum()), coverage=found,
        media={name: int(present.sum()) for name, (_, present) in dataset.media.items()},
        raw_media={name: (files.kind, len(files.rows), int((per_item[files.rows] == 0).sum()))
                   for name, files in dataset.raw_media.items()},
        split=split.kind if split else "",
        parts=(len(split.train), len(split.valid), len(split.test)) if split else (0, 0, 0),
        unseen_items=int((~seen).sum()), minutes=minutes, notes=dataset.notes)
