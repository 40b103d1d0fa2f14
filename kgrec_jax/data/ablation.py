"""A data set with one of its sources taken away or made meaningless: what controls are trained on.

Interactions, items and their order stay as they are, so a split of the data set is one of every variant of it.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from kgrec_jax.data.dataset import Dataset, Graph
from kgrec_jax.data.graph import merge_inverse_relations

ROUNDS = 30  # of swaps between random pairs; in each about half of the tails move


def without_graph(data: Dataset) -> Dataset:
    """The data set without triples, and without the entities that only triples speak of."""
    graph, items = data.graph, data.num_items
    bare = Graph(graph.entity_ids[:items], graph.entity_names[:items], graph.entity_texts[:items], (), (),
                 np.zeros((0, 3), np.int32), items, np.zeros(0, np.int8))
    return dataclasses.replace(data, graph=bare)


def with_random_graph(data: Dataset, seed: int) -> Dataset:
    """The data set with a graph of the same degrees whose triples say nothing; see `rewire`.

    Relations that state the same facts in both directions are merged first, as the graph stage does: rewired apart from
    each other they would be two relations, and the random graph twice as large.
    """
    graph = merge_inverse_relations(data.graph)[0]
    triples = rewire(graph.triples, graph.part, graph.num_entities, np.random.default_rng((seed, 41)))
    return dataclasses.replace(data, graph=dataclasses.replace(graph, triples=triples))


def rewire(triples: np.ndarray, part: np.ndarray, num_entities: int, rng: np.random.Generator,
           rounds: int = ROUNDS) -> np.ndarray:
    """[T, 3] triples whose tails were swapped at random within each relation (and each part of a given split).

    Every entity keeps the number of triples of each relation that it is head of, and of those that it is tail of. No
    swap makes a triple twice, nor one of an entity with itself: the Markov chain of Maslov & Sneppen (2002), many
    swaps at a time.
    """
    out = triples.astype(np.int64)
    if len(out) < 2:
        return out.astype(np.int32)
    head, relation, tail = out.T  # views: swaps write into `out`
    group = relation * 3 + part.astype(np.int64)

    def key(heads: np.ndarray, relations: np.ndarray, tails: np.ndarray) -> np.ndarray:
        return (relations * num_entities + heads) * num_entities + tails

    for _ in range(rounds):
        first, second = _pairs(group, rng)
        ahead = key(head[first], relation[first], tail[second])
        behind = key(head[second], relation[second], tail[first])
        _, place, count = np.unique(np.concatenate([ahead, behind]), return_inverse=True, return_counts=True)
        once = (count[place.ravel()] == 1).reshape(2, -1).all(0)
        there = np.sort(key(head, relation, tail))
        new = ~(_among(ahead, there) | _among(behind, there))
        proper = (head[first] != tail[second]) & (head[second] != tail[first])
        swap = once & new & proper
        first, second = first[swap], second[swap]
        tail[first], tail[second] = tail[second], tail[first]
    return out.astype(np.int32)


def _pairs(group: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Rows [P] and [P]: disjoint random pairs within each group, each of them drawn with probability 1/2.

    Were all of them drawn, a group of two would be back where it began after every other round.
    """
    order = np.lexsort((rng.random(len(group)), group))
    ordered = group[order]
    start = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    place = np.arange(len(order)) - np.repeat(start, np.diff(np.r_[start, len(order)]))
    leads = np.flatnonzero((place[:-1] % 2 == 0) & (ordered[1:] == ordered[:-1]))
    leads = leads[rng.random(len(leads)) < 0.5]
    return order[leads], order[leads + 1]


def _among(keys: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """[n] bool: whether each key is one of the sorted ones."""
    at = np.minimum(np.searchsorted(ordered, keys), len(ordered) - 1)
    return ordered[at] == keys


def without_text(data: Dataset) -> Dataset:
    """The data set without texts and names of items and of entities; items are called by ids, which nobody reads."""
    nothing = ("",) * data.graph.num_entities
    graph = dataclasses.replace(data.graph, entity_names=nothing, entity_texts=nothing)
    return dataclasses.replace(data, item_names=data.item_ids, item_texts=("",) * data.num_items, graph=graph)


def text_order(warm: np.ndarray, seed: int) -> np.ndarray:
    """[I]: the item whose text each item gets; warm [I] bool and cold items keep to themselves.

    Across that border the texts of what is new (the latest films, say) would tell something about the others.
    """
    rng, order = np.random.default_rng((seed, 43)), np.arange(len(warm))
    for side in (np.flatnonzero(warm), np.flatnonzero(~warm)):
        order[side] = rng.permutation(side)
    return order


def with_texts_of(data: Dataset, order: np.ndarray) -> Dataset:
    """The data set in which item i has the texts and the name of item order[i]; other entities keep theirs."""

    def moved(rows: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(rows[k] for k in order) + tuple(rows[len(order):])

    # An item without a name is called by its id, which must not travel as if it were a name.
    names = tuple(data.item_ids[i] if data.item_names[k] == data.item_ids[k] else data.item_names[k]
                  for i, k in enumerate(order))
    graph = dataclasses.replace(data.graph, entity_names=moved(data.graph.entity_names),
                                entity_texts=moved(data.graph.entity_texts))
    return dataclasses.replace(data, item_names=names, item_texts=moved(data.item_texts), graph=graph)
