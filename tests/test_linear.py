"""Closed forms against their formulas in plain NumPy, and the feature ridge against refits without the item."""

import numpy as np
import pytest
import scipy.sparse as sp

from kgrec_jax.linear import ridge
from kgrec_jax.linear.choose import choose_linear, judge
from kgrec_jax.linear.ease import ease, gram, invert_spd
from kgrec_jax.linear.neighbours import item_knn, user_knn
from kgrec_jax.linear.parts import ItemWeights
from kgrec_jax.linear.popularity import popularity
from kgrec_jax.linear.spectral import spectral


@pytest.fixture(scope="module")
def matrix():
    rng = np.random.default_rng(0)
    dense = (rng.random((60, 25)) < 0.2).astype(np.float32)
    dense[:, 24] = 0  # a cold item
    return sp.csr_matrix(dense)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_ease_is_the_formula(matrix, dropout):
    part = ease(matrix, 10.0, dropout)
    dense = matrix.toarray().astype(np.float64)
    g = dense.T @ dense
    inverse = np.linalg.inv(g + np.diag(10.0 + dropout / (1 - dropout) * np.diag(g)))
    expected = np.eye(25) - inverse / np.diag(inverse)[None, :]
    np.testing.assert_allclose(part.weights, expected, atol=1e-6)
    assert not part.known[24] and part.known[:24].all()
    assert part.scores(matrix).shape == (60, 25)


def test_gram_is_not_changed_by_a_fit(matrix):
    held = gram(matrix)
    before = held.copy()
    ease(matrix, 5.0, gram_matrix=held)
    np.testing.assert_array_equal(held, before)


def test_inverse_in_place_spans_several_blocks():
    rng = np.random.default_rng(1)
    half = rng.normal(size=(1500, 1500))
    spd = np.asfortranarray(half @ half.T + 1500 * np.eye(1500))
    np.testing.assert_allclose(invert_spd(spd.copy(order="F"), "x"), np.linalg.inv(spd), atol=1e-10)
    assert invert_spd(np.zeros((0, 0), order="F"), "x").shape == (0, 0)


def test_neighbours_are_shrunken_cosines(matrix):
    dense = matrix.toarray()
    norm = np.sqrt(dense.sum(0))
    cosine = dense.T @ dense / (np.outer(norm, norm) + 10.0)
    np.fill_diagonal(cosine, 0)
    np.testing.assert_allclose(item_knn(matrix, 25).weights.toarray(), cosine, atol=1e-6)
    assert (item_knn(matrix, 3).weights.toarray() > 0).sum(0).max() <= 3
    norm = np.sqrt(dense.sum(1))
    between = dense @ dense.T / (np.outer(norm, norm) + 10.0)
    np.testing.assert_allclose(user_knn(matrix, 60).scores(matrix), between @ dense, atol=1e-5)


def test_popularity_and_spectral(matrix):
    part = popularity(matrix)
    np.testing.assert_allclose(part.values, np.log1p(matrix.toarray().sum(0)), rtol=1e-6)
    again = spectral(matrix, 8), spectral(matrix, 8)
    np.testing.assert_array_equal(again[0].encode, again[1].encode)
    assert np.isfinite(again[0].scores(matrix)).all()


def test_leave_one_out_equals_refits_without_the_item(matrix):
    rng = np.random.default_rng(2)
    features = rng.normal(size=(25, 6)).astype(np.float32)
    k = ridge.kernel(features)
    weights = ease(matrix, 10.0).weights
    found = ridge.leave_one_out(weights, ridge.inverse(k, 0.5))
    for item in (0, 7):
        rest = np.arange(25) != item
        alpha = np.linalg.solve(k[np.ix_(rest, rest)] + 0.5 * np.eye(24), k[rest, item])
        expected = weights[:, rest] @ alpha
        expected[item] = 0.0
        np.testing.assert_allclose(found[:, item], expected, atol=1e-4)


def test_content_carries_scores_to_an_item_that_nobody_touched(matrix):
    """A cold item with the very features of a warm one is scored like what the others say of that one."""
    rng = np.random.default_rng(3)
    features = rng.normal(size=(25, 30)).astype(np.float32)
    features[24] = features[3]
    base = ease(matrix, 10.0)
    kernels = {"features": ridge.kernel(features)}
    part = ridge.content(base, ridge.combine(kernels, ridge.Choice({"features": 1.0}, 1e-3)), 1e-3)
    assert part.known.all()
    np.testing.assert_allclose(part.scores(matrix)[:, 24], base.scores(matrix)[:, 3], atol=0.02)


def test_choices_prefer_the_block_that_knows(matrix):
    rng = np.random.default_rng(4)
    group = np.repeat(np.arange(4), 6)
    liked = rng.integers(4, size=80)
    dense = (rng.random((80, 24)) < np.where(liked[:, None] == group[None], 0.6, 0.05)).astype(np.float32)
    log = sp.csr_matrix(dense)
    kernels = {"noise": ridge.kernel(rng.normal(size=(24, 8)).astype(np.float32)), "group": ridge.kernel(np.eye(4, dtype=np.float32)[group])}
    choice = ridge.choose(log, ease(log, 10.0), kernels, fold_items=12, k=5)
    assert choice.weights.get("group", 0) >= choice.weights.get("noise", 0)
    heldout = sp.csr_matrix((rng.random((80, 24)) < 0.1) & (dense == 0), dtype=np.float32)
    found = choose_linear(log, heldout, with_ease=True, say=lambda text: None)
    assert found.scores["collaborative"] >= found.scores["ease"]
    assert 0 <= judge(ItemWeights(np.zeros((24, 24), np.float32), np.ones(24, bool)), log, heldout) <= 1


def test_the_comparison_ranks_by_the_leave_one_out_weights(matrix):
    """The shortcut through the histories gives the recall of the weights themselves."""
    rng = np.random.default_rng(5)
    k = ridge.kernel(rng.normal(size=(25, 6)).astype(np.float32))
    part = ease(matrix, 10.0)
    warm = np.flatnonzero(part.known)
    log = matrix[:, warm]
    choice = ridge.choose(matrix, part, {"noise": k}, fold_items=100, k=5)
    weights = part.weights[np.ix_(warm, warm)]
    scores = log @ ridge.leave_one_out(weights, ridge.inverse(k[np.ix_(warm, warm)], choice.l2))
    top = np.argsort(-scores, axis=1)[:, :5]
    found = np.take_along_axis(log.toarray(), top, axis=1).sum(1) / np.maximum(log.getnnz(axis=1), 1)
    assert choice.score == pytest.approx(found[log.getnnz(axis=1) > 0].mean(), abs=1e-6)
