"""The graph as arrays, against brute force, and the words for what has no name."""

import dataclasses

import numpy as np
import pytest

from kgrec_jax.data.dataset import Graph
from kgrec_jax.data.graph import (describe_unnamed, edges, graph_features, link_agreement, merge_inverse_relations,
                                  name_by_items, neighbours, phrase, short_title)

NAMES = ("Alien (1979)", "Aliens", "Birdcage, The (1996)", "Heat")


def make_graph(triples, relations, num_entities=8, num_items=4, part=None):
    names = [*NAMES[:num_items], *[""] * (num_entities - num_items)]
    rows = [(h, relations.index(r), t) for h, r, t in triples]
    return Graph(tuple(f"m.{k}" for k in range(num_entities)), tuple(names), ("",) * num_entities, tuple(relations),
                 tuple(relations), np.array(rows, np.int32).reshape(-1, 3), num_items,
                 np.zeros(len(rows), np.int8) if part is None else np.array(part, np.int8))


def facts(graph):
    return {(int(h), graph.relation_ids[r], int(t)) for h, r, t in graph.triples}


def test_inverse_relations_become_one_seen_from_the_item():
    pairs = [(0, 4), (1, 4), (2, 5), (3, 6)]
    both = [(t, "directed", h) for h, t in pairs] + [(h, "director", t) for h, t in pairs] + [(0, "writer", 4)]
    merged, report = merge_inverse_relations(make_graph(both, ["directed", "director", "writer"]))
    assert facts(merged) == {(h, "director", t) for h, t in pairs} | {(0, "writer", 4)}
    assert report.merged == (("director", "directed", 1.0),)
    assert (report.triples_before, report.triples_after) == (9, 5)
    assert any("director = directed reversed (100%" in line for line in report.lines())
    assert merged.triples.dtype == np.int32 and len(merged.part) == 5


def test_facts_stated_in_one_direction_only_survive_the_merge():
    pairs = [(h, t) for h in range(4) for t in range(4, 8)]
    triples = [(h, "director", t) for h, t in pairs[:15]] + [(t, "directed", h) for h, t in pairs[1:]]
    merged, _ = merge_inverse_relations(make_graph(triples, ["director", "directed"]))
    assert facts(merged) == {(h, "director", t) for h, t in pairs}


def test_best_match_decides_where_two_overlap():
    pairs = [(h, t) for h in range(4) for t in range(4, 8)]
    triples = ([(t, "directed", h) for h, t in pairs] + [(h, "writer", t) for h, t in pairs[:14]]
               + [(h, "director", t) for h, t in pairs])
    merged, report = merge_inverse_relations(make_graph(triples, ["directed", "writer", "director"]))
    assert [m[:2] for m in report.merged] == [("director", "directed")]
    assert {r for _, r, _ in facts(merged)} == {"writer", "director"}


def test_symmetric_relation_keeps_each_pair_once():
    triples = [(0, "like", 1), (1, "like", 0), (2, "like", 3), (3, "like", 2), (0, "by", 4)]
    merged, report = merge_inverse_relations(make_graph(triples, ["like", "by"]))
    assert facts(merged) == {(0, "like", 1), (2, "like", 3), (0, "by", 4)}
    assert report.symmetric == (("like", 1.0),)


def test_small_contained_relation_keeps_its_meaning():
    """`mother` lies within `parent of` reversed: their triples must not become parents, nor stand twice."""
    parents = [(0, "parent of", 4), (1, "parent of", 4), (2, "parent of", 5), (3, "parent of", 5)]
    triples = [*parents, (4, "mother", 0), (5, "mother", 2), (6, "mother", 3)]
    merged, report = merge_inverse_relations(make_graph(triples, ["parent of", "mother"]), min_overlap=0.6)
    assert facts(merged) == {*parents, (6, "mother", 3)}
    assert [c[:2] for c in report.contained] == [("mother", "parent of")] and not report.merged


def test_no_random_split_leaks_after_the_merge():
    rng = np.random.default_rng(0)
    pairs = {(int(h), int(t)) for h, t in zip(rng.integers(0, 40, 300), rng.integers(40, 90, 300))}
    triples = [(h, "a", t) for h, t in pairs] + [(t, "b", h) for h, t in pairs]
    triples += [x for h, t in pairs if t % 3 == 0 and h != t for x in ((h, "s", t - 40), (t - 40, "s", h)) if h != t - 40]
    graph = make_graph(triples, ["a", "b", "s"], num_entities=90)
    merged, _ = merge_inverse_relations(dataclasses.replace(graph, num_items=40, entity_names=("x",) * 90))
    ends = {(int(h), int(t), int(r)) for h, r, t in merged.triples}
    assert len({(h, t) for h, t, r in ends if merged.relation_ids[r] == "a"}) == len(pairs)
    assert not [e for e in ends if (e[1], e[0], e[2]) in ends]


def test_given_split_is_left_alone():
    graph = make_graph([(0, "a", 4), (4, "b", 0)], ["a", "b"], part=[0, 2])
    merged, report = merge_inverse_relations(graph)
    assert merged is graph and "given" in report.lines()[0]


def test_empty_graph():
    graph = make_graph([], [])
    merged, report = merge_inverse_relations(graph)
    assert len(merged.triples) == 0 and report.lines() == []
    assert [len(x) for x in edges(merged)] == [0, 0, 0]
    assert neighbours(merged, 4).indptr.tolist() == [0] * 5
    assert graph_features(merged, 4).shape == (4, 0)
    assert np.isnan(link_agreement(merged, []))


def test_edges_and_neighbours_against_brute_force():
    rng = np.random.default_rng(1)
    triples = [(int(h), "abc"[r], int(t)) for h, r, t in zip(rng.integers(0, 8, 60), rng.integers(0, 3, 60), rng.integers(0, 8, 60))]
    graph = make_graph(triples, ["a", "b", "c"], part=rng.integers(0, 3, 60))
    train = {tuple(map(int, row)) for row in graph.triples[graph.part == 0]}
    expected = sorted(train | {(t, r + 3, h) for h, r, t in train})
    assert list(zip(*(x.tolist() for x in edges(graph)))) == expected
    assert list(zip(*(x.tolist() for x in edges(graph, inverse=False)))) == sorted(train)
    links = neighbours(graph, 4)
    for item in range(4):
        relation, entity = links.of(item)
        assert list(zip(relation.tolist(), entity.tolist())) == [(r, t) for h, r, t in expected if h == item]
    assert len(neighbours(graph, 8).entity) == len(expected) and links.entity.dtype == np.int32


def test_features_against_brute_force():
    triples = [(0, "by", 4), (1, "by", 4), (0, "wrote", 4), (2, "by", 5), (0, "genre", 6), (1, "genre", 6), (2, "genre", 6),
               (3, "genre", 6), (1, "genre", 7), (2, "genre", 7), (1, "sequel", 0), (2, "sequel", 0)]
    got = graph_features(make_graph(triples, ["by", "wrote", "genre", "sequel"]), 4)
    # Columns: item 0 (neighbour of 1 and 2), 4 (of 0 and 1), 7 (of 1 and 2); 5 has one item, 6 has all; 1 and 2 one each.
    weight = np.log(2.0)
    raw = np.array([[0, weight, 0], [weight, weight, weight], [weight, 0, weight], [0, 0, 0]])
    length = np.linalg.norm(raw, axis=1, keepdims=True)
    np.testing.assert_allclose(got.toarray(), raw / np.where(length > 0, length, 1), rtol=1e-6)
    assert got.dtype == np.float32
    plain = graph_features(make_graph(triples, ["by", "wrote", "genre", "sequel"]), 4, unit=False)
    np.testing.assert_allclose(plain.toarray(), raw, rtol=1e-6)
    assert plain.dtype == np.float32 and plain.nnz == got.nnz


@pytest.mark.parametrize("sound", [True, False])
def test_link_agreement(sound):
    rng = np.random.default_rng(2)
    genre = rng.integers(0, 4, 120)
    director = rng.integers(0, 6, 120) + 6 * genre
    items = np.arange(120)
    by = items if sound else rng.permutation(120)
    rows = np.concatenate([np.stack([items, 0 * items, 120 + genre], 1), np.stack([by, 0 * items + 1, 124 + director], 1)])
    names = ("x",) * 148
    graph = Graph(names, names, names, ("genre", "by"), ("genre", "by"), rows.astype(np.int32), 120, np.zeros(240, np.int8))
    score = link_agreement(graph, [0])
    assert score > 20 if sound else abs(score) < 5
    assert score == link_agreement(graph, [0])


def test_unnamed_entities_are_named_by_their_items():
    triples = [(0, "director", 4), (1, "director", 4), (2, "director", 4), (3, "director", 5), (0, "sequel", 1), (6, "made", 0),
               (6, "made", 2)]
    graph = make_graph(triples, ["director", "sequel", "made"])
    links = neighbours(graph, graph.num_entities)
    assert phrase(graph, links, 0, 4, without=2) == "same director as Alien and Aliens"
    assert phrase(graph, links, 0, 4, without=0) == "same director as Aliens and The Birdcage"
    assert phrase(graph, links, 0, 4, without=0, prefer=[2]) == "same director as The Birdcage and Aliens"
    assert phrase(graph, links, 0, 5, without=3) == ""  # nobody shares it: no reason
    assert phrase(graph, links, 1, 1, without=0) == "sequel: Aliens"
    assert phrase(graph, links, 1 + 3, 0, without=1) == "sequel of Alien"
    assert phrase(graph, links, 2 + 3, 6, without=0) == 'linked by "made" like The Birdcage'
    assert name_by_items(graph, links, 4) == "director of Alien and Aliens"
    assert name_by_items(graph, links, 0) == "Alien (1979)"
    assert name_by_items(graph, links, 7) == "m.7"
    assert describe_unnamed(graph).startswith("graph: 4 of 8 entities have no name")
    assert describe_unnamed(dataclasses.replace(graph, entity_names=("x",) * 8)) == ""


def test_short_titles():
    assert short_title("Usual Suspects, The (1995)") == "The Usual Suspects"
    assert short_title("2001: A Space Odyssey (1968)") == "2001: A Space Odyssey"
    assert short_title("(1984)") == "(1984)"
    assert short_title("卧虎藏龙 (2000)") == "卧虎藏龙"
