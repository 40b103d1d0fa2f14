"""Variants of a data set lack one source and nothing else; a rewired graph keeps every degree and no triple twice."""

import dataclasses

import numpy as np
import pytest

from kgrec_jax.data.ablation import rewire, text_order, with_random_graph, with_texts_of, without_graph, without_text
from kgrec_jax.data.interactions import SplitConfig, make_split
from kgrec_jax.data.toy import toy_world
from kgrec_jax.stages.item_features import item_texts


def degrees(triples, column):
    pairs, counts = np.unique(triples[:, [1, column]], axis=0, return_counts=True)
    return {tuple(p): int(c) for p, c in zip(pairs.tolist(), counts)}


def random_triples(seed, entities=40, relations=3, count=400):
    rng = np.random.default_rng(seed)
    rows = np.stack([rng.integers(entities, size=count), rng.integers(relations, size=count),
                     rng.integers(entities, size=count) ** 2 // entities], 1)
    return np.unique(rows[rows[:, 0] != rows[:, 2]], axis=0).astype(np.int32)


@pytest.mark.parametrize("seed", range(4))
def test_rewiring_keeps_degrees_and_makes_no_triple_twice(seed):
    before = random_triples(seed)
    part = (np.arange(len(before)) % 5 == 0).astype(np.int8) * 2
    after = rewire(before, part, 40, np.random.default_rng(seed))
    np.testing.assert_array_equal(after[:, :2], before[:, :2])
    for rows in (slice(None), part == 2):
        assert degrees(after[rows], 0) == degrees(before[rows], 0) and degrees(after[rows], 2) == degrees(before[rows], 2)
    assert len(np.unique(after, axis=0)) == len(after) and (after[:, 0] != after[:, 2]).all()
    kept = len({tuple(t) for t in before.tolist()} & {tuple(t) for t in after.tolist()}) / len(before)
    assert kept < 0.4  # by chance: tails of these relations are few


def test_every_arrangement_of_a_small_relation_comes_up_alike():
    before = np.array([[0, 0, 3], [1, 0, 4], [2, 0, 5]], np.int32)
    tails = [tuple(rewire(before, np.zeros(3, np.int8), 6, np.random.default_rng(k))[:, 2]) for k in range(1200)]
    seen, counts = np.unique(tails, axis=0, return_counts=True)
    assert len(seen) == 6 and counts.min() > 140 and counts.max() < 260
    pair = [tuple(rewire(before[:2], np.zeros(2, np.int8), 6, np.random.default_rng(k))[:, 2]) for k in range(200)]
    assert 60 < sum(p == (3, 4) for p in pair) < 140


def test_what_cannot_be_rewired_stays():
    star = np.array([[k, 0, 9] for k in range(5)], np.int32)
    np.testing.assert_array_equal(rewire(star, np.zeros(5, np.int8), 10, np.random.default_rng(0)), star)
    assert rewire(star[:0], np.zeros(0, np.int8), 10, np.random.default_rng(0)).shape == (0, 3)


def test_a_random_graph_says_nothing_of_the_items():
    world = toy_world()
    found = with_random_graph(world, 0)
    genre = {h: t for h, r, t in world.graph.triples.tolist() if r == 0}
    same = np.mean([genre[h] == t for h, r, t in found.graph.triples.tolist() if r == 0])
    assert same < 0.35  # one of six by chance
    assert found.content_hash() != world.content_hash() != with_random_graph(world, 1).content_hash()
    assert found.content_hash() == with_random_graph(world, 0).content_hash()
    assert found.item_texts == world.item_texts and found.interactions is world.interactions


def test_an_inverse_pair_of_relations_is_rewired_as_the_one_that_it_is():
    world = toy_world()
    graph = world.graph
    turned = graph.triples[graph.triples[:, 1] == 0][:, [2, 1, 0]] + np.array([0, 4, 0], np.int32)
    both = dataclasses.replace(graph, triples=np.concatenate([graph.triples, turned]),
                               relation_ids=(*graph.relation_ids, "films"), relation_names=(*graph.relation_names, "films"),
                               part=np.zeros(len(graph.triples) + len(turned), np.int8))
    found = with_random_graph(dataclasses.replace(world, graph=both), 0).graph
    assert len(found.triples) == len(graph.triples) and found.num_relations == graph.num_relations


def test_without_graph_and_without_text():
    world = toy_world()
    bare = without_graph(world)
    assert bare.graph.num_entities == bare.num_items and not len(bare.graph.triples) and bare.item_texts == world.item_texts
    mute = without_text(world)
    assert not any(item_texts(mute)) and not any(mute.graph.entity_names) and not any(mute.graph.entity_texts)
    np.testing.assert_array_equal(mute.graph.triples, world.graph.triples)


def test_texts_change_places_among_warm_and_among_cold_items_alone():
    world = toy_world()
    split = make_split(world, SplitConfig(kind="random", cold_share=0.1))
    warm = np.isin(np.arange(world.num_items), split.fit.item)
    order = text_order(warm, 0)
    assert sorted(order) == list(range(world.num_items)) and (warm[order] == warm).all() and (order == np.arange(len(order))).mean() < 0.1
    nameless = dataclasses.replace(world, item_names=("film0", *world.item_names[1:]))
    found = with_texts_of(nameless, order)
    assert list(found.item_texts) == [world.item_texts[k] for k in order]
    assert found.item_names[int(np.flatnonzero(order == 0)[0])] == f"film{int(np.flatnonzero(order == 0)[0])}"
    assert found.graph.entity_names[:len(order)] == tuple(world.graph.entity_names[k] for k in order)
    assert found.graph.entity_names[len(order):] == world.graph.entity_names[len(order):]
