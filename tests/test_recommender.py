"""The recommender of a small fitted model: its folder, its lists, what it says of bad input. No stage is run here."""

import dataclasses
import shutil
import types

import jax
import numpy as np
import pytest
import scipy.sparse as sp

from kgrec_jax.data.dataset import Interactions
from kgrec_jax.data.text import tfidf_svd
from kgrec_jax.data.toy import toy_world
from kgrec_jax.errors import KgrecError
from kgrec_jax.linear.ease import ease
from kgrec_jax.linear.neighbours import item_knn, user_knn
from kgrec_jax.linear.parts import Factors
from kgrec_jax.linear.popularity import popularity
from kgrec_jax.models.fusion import gate_init
from kgrec_jax.models.recommender import TOWER, FusedModel, Scale, TowerPart
from kgrec_jax.models.towers import TowerConfig, Towers
from kgrec_jax.serving.query import NGRAMS
from kgrec_jax.serving.recommender import Recommender

NAMES = {3: "Toy Story (1995)", 4: "Toy Story 2 (1999)", 5: "Birdcage, The (1996)", 6: "Heat (1995)", 7: "Heat (1986)"}


def named_world():
    """The toy world with some titles of its own, two of them alike."""
    world = toy_world()
    names = tuple(NAMES.get(i, name) for i, name in enumerate(world.item_names))
    return dataclasses.replace(world, item_names=names)


def make_model(world, matrix):
    """All kinds of parts; the tower as it is initialised."""
    cfg, num_items = TowerConfig(width=8, max_history=16), world.num_items
    vectors = tfidf_svd(list(world.item_texts), 20, 0)
    known = matrix.getnnz(axis=0) > 0
    parts = {"popularity": popularity(matrix), "item-knn": item_knn(matrix, 20), "user-knn": user_knn(matrix, 20),
             "collaborative": ease(matrix, 20.0), "text": Factors(vectors, vectors.T, np.ones(num_items, bool))}
    rng = np.random.default_rng(0)
    items = rng.standard_normal((num_items, 8)).astype(np.float32)
    items /= np.linalg.norm(items, axis=1, keepdims=True)
    params = Towers(cfg, num_items).init(jax.random.key(0), items, np.full((1, 4), -1, np.int32),
                                         method=Towers.user_vectors)["params"]
    tower = TowerPart(cfg, params, items, {"id": items}, known)
    names = (*parts, TOWER)
    gate = jax.tree.map(lambda x: x + 0.1, gate_init(len(names), 1, 1))
    return FusedModel(parts, tower, gate, names, matrix.getnnz(axis=0), Scale(2.0, 0.5, 2.0, 0.7))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A recommender, and the folder that it was saved to."""
    root, world = tmp_path_factory.mktemp("recommender"), named_world()
    shape = world.num_users, world.num_items
    (root / "fuse").mkdir()
    np.savez(root / "fuse" / "text.npz", vectors=tfidf_svd(list(world.item_texts), 20, 0), source=NGRAMS)
    fuse = types.SimpleNamespace(tower=TowerConfig(width=8, max_history=16), text_length=32)
    run = types.SimpleNamespace(path=root, dataset=world, split=None,
                                experiment=types.SimpleNamespace(encoder="", seed=0, fuse=fuse))
    log = world.interactions
    matrix = log.matrix(*shape)
    made = Recommender.build(run, make_model(world, matrix), log=log, known=matrix, held_out=0)
    made.save(root / "run" / "recommender")
    return made, root / "run"


@pytest.fixture(scope="module")
def held(made):
    return Recommender.load(made[1])


def test_the_copy_scores_bit_for_bit_as_before(made, tmp_path):
    before, folder = made
    shutil.copytree(folder, tmp_path / "moved")
    after = Recommender.load(tmp_path / "moved")
    assert after.user_ids == before.user_ids and after.item_names == before.item_names
    rows = np.arange(24)
    for name in before.model.names:
        assert np.array_equal(after.model.raw(after.histories.take(rows), name),
                              before.model.raw(before.histories.take(rows), name)), name
    assert np.array_equal(*(r.model.scores(r.histories.take(rows)) for r in (after, before)))
    for ask in ({"user": before.user_ids[2]}, {"history": ["Toy Story (1995)"]}, {"query": "ghosts in an old house"}):
        assert after.recommend(**ask) == before.recommend(**ask)
    again = Recommender.load(tmp_path / "moved" / "recommender")  # the folder itself will do
    assert again.item_ids == before.item_ids


def test_the_parts_add_up_to_the_score(held):
    for ask in ({"user": held.user_ids[0]}, {"history": ["Heat (1995)", "Toy Story 2"]}, {"query": "cowboys, Norway"}):
        found = held.recommend(**ask, k=6)
        assert len(found) == 6
        for row in found:
            assert sum(row["parts"].values()) == row["score"] and row["reason"] and row["title"]
            assert held.item_names[held.item_ids.index(row["item_id"])] == row["title"]
        scores = [row["score"] for row in found]
        assert all(a >= b - 1e-5 for a, b in zip(scores, scores[1:]))
    row = held.user_ids.index(found_user := held.user_ids[0])
    scores = held.model.scores(held.histories.take(np.array([row])))[0]
    for entry in held.recommend(user=found_user, k=3):
        assert entry["score"] == pytest.approx(scores[held.item_ids.index(entry["item_id"])], abs=1e-5)


def test_a_user_without_history_gets_what_needs_none(held):
    row = int(np.flatnonzero(held.histories.matrix.getnnz(axis=1) == 0)[0])
    said = []
    found = held.recommend(user=held.user_ids[row], k=5, say=said.append)
    assert len(said) == 1 and "no history" in said[0]
    assert all(set(entry["parts"]) <= {"popularity", "level"} for entry in found)
    best = np.argsort(-held.model.popularity, kind="stable")[:5]
    assert [entry["item_id"] for entry in found] == [held.item_ids[i] for i in best]
    assert [e["item_id"] for e in held.recommend(history=[], k=5)] == [e["item_id"] for e in found]


def test_titles(held):
    assert held.item_row("Toy Story (1995)") == held.item_row(" toy story ") == 3
    assert held.item_row("the birdcage") == held.item_row("Birdcage, The") == 5
    said = []
    best = max((6, 7), key=lambda i: held.model.popularity[i])
    assert held.item_row("HEAT", said.append) == best
    assert len(said) == 1 and "2 items" in said[0] and held.item_ids[best] in said[0] and "\n" not in said[0]
    assert held.item_row("Heat (1986)", said.append) == 7 and len(said) == 1
    assert held.nearest_titles("Toy Stori")[0] == "Toy Story (1995)"
    assert held.nearest_titles("a birdcages")[0] == "Birdcage, The (1996)" and len(held.nearest_titles("Ж")) == 5
    with pytest.raises(KgrecError, match=r"no item 'Toy Stori'.*nearest are Toy Story \(1995\); Toy Story 2 \(1999\)"):
        held.recommend(history=["Toy Stori"])


def test_what_is_asked_twice_counts_once_and_is_never_offered(held):
    once, twice = held.recommend(history=["Heat (1986)", "Toy Story"]), held.recommend(
        history=["Toy Story", "Heat (1986)", "Toy Story (1995)"])
    assert once == twice and "Toy Story (1995)" not in {row["title"] for row in once}


def test_candidates_and_more_than_there_are(held):
    some = held.item_ids[:9]
    for ask in ({"user": held.user_ids[0]}, {"query": "a film of the 1990s"}):
        assert {row["item_id"] for row in held.recommend(**ask, candidates=some, k=500)} <= set(some)
    assert len(held.recommend(history=["Toy Story"], candidates=some, k=500)) == 8
    left = len(held.item_ids) - held.known[1].nnz
    assert len(held.recommend(user=held.user_ids[1], k=10_000)) == left
    assert held.recommend(query="film", candidates=[]) == []


@pytest.mark.parametrize("ask, words", [
    ({}, "exactly one"), ({"user": "user0", "query": "x"}, "user and query"),
    ({"user": "nobody"}, "--user: found no user"), ({"user": "user0", "k": 0}, "-k: found 0"),
    ({"query": " "}, "--query: found an empty"),
    ({"user": "user0", "candidates": ["nothing"]}, "--candidates"), ({"history": "Toy Story"}, "a list of titles"),
])
def test_bad_input_is_one_line(held, ask, words):
    with pytest.raises(KgrecError, match=words) as caught:
        held.recommend(**ask)
    assert "\n" not in str(caught.value)


def test_queries_find_by_words_and_say_why(held):
    first = held.recommend(query="toy story", k=1)[0]
    assert first["title"] == "Toy Story (1995)" and first["parts"]["title"] > 0 and "toy, story" in first["reason"]
    top = held.recommend(query="soldiers at the front", k=3)
    assert all("soldiers" in row["reason"] and row["reason"].startswith("Matches: ") for row in top)
    assert set(top[0]["parts"]) == {"text", "words", "popularity"}
    bare = dataclasses.replace(held, query_index=None)
    with pytest.raises(KgrecError, match="--query: found a recommender without any text"):
        bare.recommend(query="soldiers")


def test_all_users_agree_with_one_user(held):
    items, scores = held.all_users(6)
    assert items.shape == scores.shape == (len(held.user_ids), 6)
    for row in (0, 7, 150):
        one = held.recommend(user=held.user_ids[row], k=6)
        assert [held.item_ids[i] for i in items[row]] == [entry["item_id"] for entry in one]
    assert not held.known[np.repeat(np.arange(len(items)), 6), items.ravel()].any()
    few, _ = held.all_users(5, candidates=held.item_ids[:3])
    assert set(np.unique(few)) <= {-1, 0, 1, 2} and (few[:, 3:] == -1).all()
    with pytest.raises(KgrecError, match="-k: found -1"):
        held.all_users(-1)


def test_from_run_leaves_out_what_is_known_and_counts_what_is_held_out(made):
    before, _ = made
    world = named_world()
    log = world.interactions
    cut = [log.take(np.arange(len(log)) % 10 == n) for n in (8, 9)]
    fit = log.take(np.arange(len(log)) % 10 < 8)
    fuse = types.SimpleNamespace(tower=TowerConfig(max_history=16), text_length=32)
    for given in (True, False):
        split = types.SimpleNamespace(fit=fit if given else Interactions.concatenate([fit, cut[0]]), valid=cut[0],
                                      test=cut[1], valid_given=given)
        run = types.SimpleNamespace(path=made[1] / "no stage here", dataset=world, split=split,
                                    experiment=types.SimpleNamespace(encoder="", seed=0, fuse=fuse))
        found = Recommender.from_run(run, before.model)
        assert found.held_out == len(cut[1]) and found.known.nnz == len(fit) + len(cut[0])
        assert found.histories.matrix.nnz == (len(fit) if given else len(fit) + len(cut[0]))
        assert isinstance(found.known, sp.csr_matrix)


def test_there_is_no_recommender_in_an_unfinished_run(tmp_path):
    with pytest.raises(KgrecError, match="expected the recommender of a finished run"):
        Recommender.load(tmp_path)
