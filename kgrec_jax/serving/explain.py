"""Why an item is recommended: its score's exact parts, what its graph shares with the history, the nearest history.

A score is a sum of named parts, so the shares are its exact decomposition and no approximation after the fact. Shared
neighbours and near items are facts about the item and the history; they stand beside the shares and claim no part of
them, except where a part is itself a sum over the history (EASE, item-kNN) and hands its addends over. All functions
take plain arrays of one user and one item.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kgrec_jax.data.dataset import Graph
from kgrec_jax.data.graph import Neighbours, phrase, short_title

# What a part with addends over the history says of the nearest items, and what one without says at all.
NEAR_WORDS = {"text": "reads like {}", "tfidf": "reads like {}", "graph": "linked like {}", "media": "looks like {}",
              "features": "made like {}",
              **dict.fromkeys(("rgcn", "kgat", "kgin"), "close in the graph to {}")}
NEAR_OTHERWISE = "liked by those who liked {}"
PART_WORDS = {
    "popularity": "popular with many users",
    "query": "fits your words",
    "expected-popularity": "of a kind that many choose",
    "text": "its text fits your history",
    "graph": "its place in the graph fits your history",
    "features": "its text and graph fit your history",
    "sequence": "follows from what you chose last",
    "user-knn": "chosen by users with a history like yours",
    "collaborative": "chosen by users with a history like yours",
    "domains": "fits your history, by what several catalogues have taught",
    **dict.fromkeys(("ials", "slim", "bpr"), "chosen by users with a history like yours"),
    "tfidf": "its words fit your history",
}
LEVEL = "level"  # the name of what the gate adds to the score of every item without history
NEW = "new: nobody has chosen it yet"
UNKNOWN = "a guess: nothing is known yet of this user and this item"
BEST_LEFT = "the best of what is left"  # every part speaks against the item, the others' parts more so
_WORTH_A_CLAUSE = 0.2  # share of the score from which a part is named in the sentence
_WORTH_A_NUMBER = 0.045  # share from which a part is listed behind the sentence: 5 %, rounded


@dataclasses.dataclass(frozen=True)
class PartShare:
    """One addend of the score."""

    part: str
    contribution: float  # all contributions add up to the score
    share: float  # contribution over the sum of their absolute values; negative where the part speaks against the item


@dataclasses.dataclass(frozen=True)
class SharedNeighbour:
    """An entity that the item and some of the history are linked to by one relation, or a direct link between them."""

    text: str  # "same director as Alien and Aliens", "genre: Comedy, as in Clueless", "sequel of Alien"
    relation: int  # row of the relation, r + R for a triple walked backwards
    entity: int
    items: tuple[int, ...]  # the history items that share it
    weight: float  # rarer entities and more shared items weigh more


@dataclasses.dataclass(frozen=True)
class NearItem:
    """A history item that speaks for the recommendation."""

    item: int
    part: str  # the part through which it speaks most
    weight: float  # its portion of the contributions of the parts that are sums over the history


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Reasons for one recommended item, strongest first."""

    item: int
    text: str  # one sentence
    parts: tuple[PartShare, ...]
    shared: tuple[SharedNeighbour, ...]
    near: tuple[NearItem, ...]

    def to_dict(self, item_names: Sequence[str]) -> dict[str, Any]:
        """The same for JSON: titles in place of rows."""
        return {
            "text": self.text,
            "parts": [dataclasses.asdict(p) for p in self.parts],
            "shared": [
                {"text": s.text, "items": [item_names[i] for i in s.items], "weight": s.weight} for s in self.shared
            ],
            "near": [{"item": item_names[n.item], "part": n.part, "weight": n.weight} for n in self.near],
        }


def part_shares(part_names: Sequence[str], contributions: np.ndarray, present: np.ndarray) -> tuple[PartShare, ...]:
    """The parts that know the user and the item, the largest absolute contribution first; `present` [P] bool."""
    total = float(np.abs(contributions[present]).sum())
    shares = [
        PartShare(part_names[p], float(contributions[p]), float(contributions[p]) / total if total else 0.0)
        for p in np.flatnonzero(present)
    ]
    return tuple(sorted(shares, key=lambda s: -abs(s.contribution)))


def shared_neighbours(
    item: int, history: np.ndarray, graph: Graph, links: Neighbours, item_names: Sequence[str], limit: int
) -> tuple[SharedNeighbour, ...]:
    """What the item has in common with the history [H] in the graph, at most `limit`, the most telling first.

    An entity weighs log(items / items that share it) · log2(1 + history items that share it): a director of four films
    says more than a genre of seven hundred. An entity without a name is described by two of its items, the history's
    first, the item itself never. `links` are the neighbours of all entities.
    """
    history = np.unique(history[history != item])
    relation, entity = links.of(item)
    if not len(history) or not len(relation):
        return ()
    rows = np.concatenate([np.arange(links.indptr[h], links.indptr[h + 1]) for h in history])
    owner = np.repeat(history, links.indptr[history + 1] - links.indptr[history])
    key = links.relation[rows].astype(np.int64) * graph.num_entities + links.entity[rows]
    found: dict[str, SharedNeighbour] = {}  # by text: writer and director of the same films are one reason, said once
    for r, e in zip(relation.tolist(), entity.tolist()):
        if e in history:
            items, holders = (e,), 1
            role = graph.relation_names[r % graph.num_relations]
            text = f"{role}{':' if r < graph.num_relations else ' of'} {_title(item_names, e)}"
        else:
            items, holders = tuple(owner[key == r * graph.num_entities + e].tolist()), _holders(graph, links, r, e)
            if not items:
                continue
            text = phrase(graph, links, r, e, without=item, prefer=items)
            if graph.entity_names[e]:
                text += f", as in {' and '.join(_title(item_names, i) for i in items[:2])}"
        weight = float(np.log(graph.num_items / holders) * np.log2(1 + len(items)))
        if text not in found or weight > found[text].weight:
            found[text] = SharedNeighbour(text, r, e, items, weight)
    return tuple(sorted(found.values(), key=lambda s: -s.weight)[:limit])


def _holders(graph: Graph, links: Neighbours, relation: int, entity: int) -> int:
    """How many items the relation links to the entity; at least the item that asks."""
    back, other = links.of(entity)
    turned = (relation + graph.num_relations) % (2 * graph.num_relations)
    return max(int(((back == turned) & (other < graph.num_items)).sum()), 1)


def nearest_history(
    item: int, history: np.ndarray, addends: Mapping[str, np.ndarray], parts: Sequence[PartShare], limit: int
) -> tuple[NearItem, ...]:
    """The history items that speak most for the item, at most `limit`.

    `addends`: for each part that is a sum (or a similarity) over the history, a number [H] for each history item. Each
    part's positive contribution is dealt out in proportion to them; parts that speak against the item deal out nothing.
    """
    contribution = {p.part: max(p.contribution, 0.0) for p in parts}
    names = [name for name in addends if contribution.get(name, 0.0) > 0]
    if not names or not len(history):
        return ()
    dealt = np.zeros((len(names), len(history)))
    for n, name in enumerate(names):
        size = float(np.abs(addends[name]).sum())
        dealt[n] = contribution[name] * addends[name] / size if size else 0.0
    total = sum(contribution[name] for name in names)
    weight = dealt.sum(axis=0) / total
    weight[history == item] = -np.inf
    order = [h for h in np.argsort(-weight, kind="stable") if weight[h] > 0][:limit]
    return tuple(NearItem(int(history[h]), names[int(dealt[:, h].argmax())], float(weight[h])) for h in order)


def explain(
    *,
    item: int,
    score: float,
    part_names: Sequence[str],
    contributions: np.ndarray,
    present: np.ndarray,
    history: np.ndarray,
    item_names: Sequence[str],
    addends: Mapping[str, np.ndarray],
    graph: Graph | None = None,
    links: Neighbours | None = None,
    limit: int = 3,
) -> Explanation:
    """All reasons for one item and one sentence of them.

    contributions [P] add up to `score` (a ValueError where they do not: the shares would lie); present [P] bool.
    history [H] item rows. addends: see `nearest_history`. graph, and links, the neighbours of all its entities: None
    without a graph.
    """
    contributions = np.where(present, contributions, 0.0).astype(np.float64)
    slack = 1e-4 * max(1.0, float(np.abs(contributions).sum()))
    if abs(contributions.sum() - score) > slack:
        raise ValueError(f"explain: the parts add up to {contributions.sum()}, expected the score {score}")
    history = np.asarray(history, np.int64)
    parts = part_shares(part_names, contributions, np.asarray(present, bool))
    shared = () if graph is None or links is None else shared_neighbours(
        item, history, graph, links, item_names, limit
    )
    near = nearest_history(item, history, addends, parts, limit)
    return Explanation(item, sentence(parts, shared, near, item_names), parts, shared, near)


def sentence(
    parts: Sequence[PartShare], shared: Sequence[SharedNeighbour], near: Sequence[NearItem], item_names: Sequence[str]
) -> str:
    """One line: the strongest part's reason first, what the graph shares, then the shares of the larger parts.

    What is added to every new item alike is no reason for this one: it is said in words and has no share.
    """
    new = any(p.part == LEVEL and p.contribution for p in parts)
    parts = [p for p in parts if p.part != LEVEL]
    total = sum(abs(p.share) for p in parts)
    parts = [dataclasses.replace(p, share=p.share / total if total else 0.0) for p in parts]
    clauses = []
    for part in parts:
        titles = [_title(item_names, n.item) for n in near if n.part == part.part][:2]
        if titles:
            clauses.append(NEAR_WORDS.get(part.part, NEAR_OTHERWISE).format(" and ".join(titles)))
        elif part.share >= _WORTH_A_CLAUSE and not (part.part == "graph" and shared):
            clauses.append(_part_words(part.part))
    # What the graph shares comes first where the graph is the strongest reason, else second.
    at = 0 if parts and parts[0].part == "graph" and parts[0].share > 0 else 1
    clauses[at:at] = [s.text for s in shared[:2]]
    if not clauses:
        speaking = [p.part for p in parts if p.share > 0]
        clauses = [_part_words(speaking[0]) if speaking else BEST_LEFT if parts else UNKNOWN]
    if new:
        clauses.append(NEW)
    text = "; ".join(clauses)
    percent = ", ".join(f"{p.part} {p.share:.0%}" for p in parts if abs(p.share) >= _WORTH_A_NUMBER)
    return text[0].upper() + text[1:] + (f" ({percent})" if percent else "")


def _part_words(part: str) -> str:
    return PART_WORDS.get(part, f"its {part} score is high")


def _title(item_names: Sequence[str], item: int) -> str:
    return short_title(item_names[item])
