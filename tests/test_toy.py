"""The toy world: repeatable, twins in two languages, with the gaps that real data have and an answer that is known."""

import dataclasses

import numpy as np
import pytest

from kgrec_jax.data.toy import known_answer, toy_world


def test_same_seed_same_world():
    assert toy_world(seed=4).content_hash() == toy_world(seed=4).content_hash() != toy_world(seed=5).content_hash()


def test_languages_are_twins():
    english, chinese = toy_world(seed=2), toy_world(seed=2, language="zh")
    assert english.item_ids == chinese.item_ids and english.user_ids == chinese.user_ids
    for field in dataclasses.fields(english.interactions):
        np.testing.assert_array_equal(getattr(english.interactions, field.name), getattr(chinese.interactions, field.name))
    np.testing.assert_array_equal(english.graph.triples, chinese.graph.triples)
    assert english.graph.entity_ids == chinese.graph.entity_ids
    assert not set(english.item_texts) & set(chinese.item_texts)
    assert all("\u4e00" <= text[0] <= "\u9fff" for text in chinese.item_texts)


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("num_users, num_items", [(200, 120), (15, 20), (10, 400)])
def test_shape_of_the_world(language, num_users, num_items):
    world = toy_world(num_users=num_users, num_items=num_items, language=language)
    log, graph = world.interactions, world.graph
    assert (world.num_users, world.num_items) == (num_users, num_items) and len(set(world.item_names)) == num_items
    assert len(set(zip(log.user.tolist(), log.item.tolist()))) == len(log)
    per_user, per_item = np.bincount(log.user, minlength=num_users), np.bincount(log.item, minlength=num_items)
    assert (per_user == 0).any() and (per_item == 0).any()  # some of each without any history
    assert per_user[per_user > 0].min() >= 8
    assert all(graph.entity_names) and graph.entity_names[:num_items] == world.item_names
    # A film's text names what the graph says of it.
    relations = dict(zip(graph.relation_ids, range(graph.num_relations)))
    for head, relation, tail in graph.triples[graph.triples[:, 1] != relations["country"]]:
        assert graph.entity_names[tail] in world.item_texts[head]


def test_known_answer_is_what_users_do():
    answer, world = known_answer(seed=0), toy_world(seed=0)
    assert answer.shape == (world.num_users, world.num_items)
    np.testing.assert_allclose(answer.sum(1), 1, rtol=1e-12)
    log = world.interactions
    first = log.timestamp == np.array([log.timestamp[log.user == u].min() if (log.user == u).any() else -1
                                       for u in range(world.num_users)])[log.user]
    chosen = answer[log.user[first], log.item[first]]
    assert chosen.mean() > 5 / world.num_items  # far above chance
    # Ranking by the answer finds the films that were touched far better than their popularity does.
    seen = log.matrix(world.num_users, world.num_items).toarray()
    active = seen.sum(1) > 0

    def precision(scores):
        top = np.argsort(-scores, 1)[active, :10]
        return np.take_along_axis(seen[active], top, 1).mean()

    popularity = np.broadcast_to(seen.sum(0), seen.shape)
    assert precision(answer) > precision(popularity) + 0.15


def test_ratings_tell_the_favourites():
    answer, log = known_answer(seed=0), toy_world(seed=0).interactions
    liked = answer[log.user, log.item]
    assert np.median(liked[log.rating >= 4]) > 2 * np.median(liked[log.rating <= 3])
    assert set(np.unique(log.rating)) <= {1, 2, 3, 4, 5}
