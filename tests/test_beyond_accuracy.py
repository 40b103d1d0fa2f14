"""Measures of lists against brute force over pairs of items and of users; kinds of items from columns and relations."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import scipy.sparse as sp

from kgrec_jax.data.categories import read_categories
from kgrec_jax.data.folder import DataConfig, read_folder, write_folder
from kgrec_jax.data.toy import toy_world
from kgrec_jax.evaluation.beyond_accuracy import (
    ItemVectors, ListMeasures, diversity, divergence, exposure, gini, miscalibration, novelty, personalisation)
from kgrec_jax.evaluation.ranking import evaluate_ranking, top_k

NUM_USERS, NUM_ITEMS = 9, 14


@pytest.fixture
def rng():
    return np.random.default_rng(3)


@pytest.fixture
def lists(rng):
    """Lists of five, one of three, one of one and an empty one."""
    made = np.stack([rng.permutation(NUM_ITEMS)[:5] for _ in range(NUM_USERS)]).astype(np.int32)
    made[1, 3:] = made[2, 1:] = made[3] = -1
    return made


def blocks(rng):
    """A dense and a sparse block; an item without either, one without text, one without links."""
    text = rng.standard_normal((NUM_ITEMS, 6)).astype(np.float32) * 3
    links = sp.random(NUM_ITEMS, 20, 0.4, format="csr", dtype=np.float32, rng=rng).tolil()
    text[0] = text[1] = 0
    links[0] = links[2] = 0
    return {"text": text, "graph": sp.csr_matrix(links)}


def cosine(made, i, j):
    """By the definition: unit blocks joined, each item's vector over its length."""
    parts = []
    for item in (i, j):
        rows = [np.asarray(b[item].todense()).ravel() if sp.issparse(b) else b[item] for b in made.values()]
        joined = np.concatenate([r / np.linalg.norm(r) if np.linalg.norm(r) else r for r in rows]).astype(np.float64)
        parts.append(joined / np.linalg.norm(joined) if np.linalg.norm(joined) else joined)
    return float(parts[0] @ parts[1])


def test_diversity_is_the_mean_over_pairs_that_have_content(rng, lists):
    made = blocks(rng)
    vectors = ItemVectors(made)
    found = diversity(lists, vectors)
    for user, row in enumerate(lists):
        items = [i for i in row if i > 0]  # item 0 has no content
        pairs = [1 - cosine(made, i, j) for i, j in itertools.combinations(items, 2)]
        assert found[user] == pytest.approx(np.mean(pairs), abs=1e-5) if pairs else np.isnan(found[user])
    cube = vectors.similarities(lists[:1])
    for a, b in itertools.product(range(5), range(5)):
        assert cube[0, a, b] == pytest.approx(cosine(made, lists[0, a], lists[0, b]), abs=1e-5)
    assert vectors.names == "text and graph"


def test_diversity_does_not_depend_on_blocks_of_users(rng):
    many = np.stack([rng.permutation(NUM_ITEMS)[:4] for _ in range(2100)])
    vectors = ItemVectors(blocks(rng))
    np.testing.assert_allclose(diversity(many, vectors)[1500:1600], diversity(many[1500:1600], vectors), atol=1e-6)


def test_personalisation_is_the_mean_over_pairs_of_users(rng, lists):
    full = lists[4:]
    common = [len(set(a) & set(b)) / 5 for a, b in itertools.combinations(full.tolist(), 2)]
    assert personalisation(full, NUM_ITEMS) == pytest.approx(1 - np.mean(common), abs=1e-12)
    assert personalisation(np.tile(full[:1], (3, 1)), NUM_ITEMS) == 0
    assert personalisation(np.arange(10).reshape(2, 5), NUM_ITEMS) == 1
    assert math.isnan(personalisation(full[:1], NUM_ITEMS))


def test_gini_is_the_mean_difference_over_twice_the_mean(rng, lists):
    counts = exposure(lists, NUM_ITEMS)
    assert counts.sum() == (lists >= 0).sum()
    differences = np.abs(counts[:, None] - counts[None]).mean()
    assert gini(counts) == pytest.approx(differences / (2 * counts.mean()), abs=1e-12)
    assert gini(np.full(8, 3)) == pytest.approx(0) and gini(np.eye(10)[0]) == pytest.approx(0.9)
    assert math.isnan(gini(np.zeros(4)))


def test_novelty_is_the_mean_self_information(rng, lists):
    popularity = rng.integers(0, 6, NUM_ITEMS)
    found = novelty(lists, popularity, 50)
    for user, row in enumerate(lists):
        bits = [-math.log2(max(popularity[i], 1) / 50) for i in row if i >= 0]
        assert found[user] == pytest.approx(np.mean(bits), abs=1e-12) if bits else np.isnan(found[user])


def test_miscalibration_is_steck_divergence(rng, lists):
    kinds = [set(rng.choice(4, rng.integers(0, 3), replace=False).tolist()) for _ in range(NUM_ITEMS)]
    shares = sp.csr_matrix(np.array([[(g in k) / len(k) if k else 0 for g in range(4)] for k in kinds], np.float32))
    history = sp.csr_matrix((rng.random((NUM_USERS, NUM_ITEMS)) < 0.3).astype(np.float32))
    found = miscalibration(lists, history, shares)

    def distribution(items):
        rows = [[(g in kinds[i]) / len(kinds[i]) for g in range(4)] for i in items if kinds[i]]
        return np.mean(rows, axis=0) if rows else None

    for user, row in enumerate(lists):
        p, q = distribution(history[user].indices), distribution([i for i in row if i >= 0])
        if p is None or q is None:
            assert np.isnan(found[user])
            continue
        expected = sum(a * math.log(a / (0.99 * b + 0.01 * a)) for a, b in zip(p, q) if a > 0)
        assert found[user] == pytest.approx(expected, abs=1e-6)
    same = np.array([0.2, 0.8])
    assert divergence(same, same) == 0 and divergence(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == pytest.approx(
        math.log(100))


def test_the_lists_of_a_ranking_are_those_of_top_k_and_their_figures_stand_beside_coverage(rng):
    scores = np.round(rng.standard_normal((30, NUM_ITEMS)), 1).astype(np.float32)
    role = rng.choice(3, scores.shape, p=[0.5, 0.3, 0.2])
    known, relevant = sp.csr_matrix(role == 1), sp.csr_matrix(role == 2)
    candidates = rng.random(NUM_ITEMS) < 0.8
    arguments = dict(known=known, num_items=NUM_ITEMS, candidates=candidates)
    result = evaluate_ranking(lambda users: scores[users], relevant=relevant, ks=(3, 5), block=7, **arguments)
    items, _ = top_k(lambda users: scores[users], users=result.users, k=5, **arguments)
    np.testing.assert_array_equal(result.lists, items)
    history = sp.csr_matrix((role == 1).astype(np.float32))
    measures = ListMeasures(candidates, np.asarray(history.sum(0)).ravel(), history, ItemVectors(blocks(rng)), None)
    means = measures.added_to(result).means()
    assert means["gini@5"] == gini(exposure(items, NUM_ITEMS)[candidates])
    assert means["personalisation@3"] == personalisation(items[:, :3], NUM_ITEMS)
    assert means["coverage@3"] == len(set(items[:, :3].ravel().tolist()) - {-1}) / candidates.sum()
    assert {f"{n}@{k}" for n in ("novelty", "diversity") for k in (3, 5)} < means.keys()
    assert not any(name.startswith("miscalibration") for name in means)
    bare = dataclasses.replace(measures, vectors=None).added_to(result).means()
    assert "diversity@3" not in bare and bare["novelty@3"] == means["novelty@3"]


# --- kinds of items -----------------------------------------------------------------------------------------------


def test_kinds_by_the_relation_that_is_called_so():
    world = toy_world()
    found = read_categories(world, world.graph, None)
    assert found.source == "relation genre" and set(found.values) == {
        "comedy", "horror", "western", "romance", "war", "animation"}
    genre = {int(h): world.graph.entity_names[t] for h, r, t in world.graph.triples if r == 0}
    for item in range(world.num_items):
        assert [found.values[c] for c in found.shares[item].indices] == [genre[item]]
    other = dataclasses.replace(world.graph, relation_names=("sort", "director", "decade", "country of origin"))
    assert read_categories(world, other, None).source == "relation sort"  # the first whose values are kinds
    assert read_categories(world, dataclasses.replace(world.graph, triples=world.graph.triples[:0]), None) is None


def test_kinds_by_a_column(tmp_path):
    world = toy_world()
    write_folder(world, tmp_path / "toy")
    path = next((tmp_path / "toy").glob("items.*"))
    header, *rows = path.read_text(encoding="utf-8").splitlines()
    cells = [("Drama|War", "War", "Comedy", "")[n % 4] for n in range(len(rows))]
    lines = [f"{header}\tgenres", *(f"{row}\t{cell}" for row, cell in zip(rows, cells))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    data = read_folder(tmp_path / "toy", DataConfig())
    found = read_categories(data, data.graph, tmp_path / "toy")
    assert found.source == "items.tsv:genres" and found.values == ("Comedy", "Drama", "War")
    np.testing.assert_allclose(found.shares[:4].todense(), [[0, 0.5, 0.5], [0, 0, 1], [1, 0, 0], [0, 0, 0]])
