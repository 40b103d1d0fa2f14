"""Other orders of a list, against the definitions step by step."""

import math

import numpy as np
import pytest
import scipy.sparse as sp

from kgrec_jax.errors import KgrecError
from kgrec_jax.evaluation.beyond_accuracy import ItemVectors, divergence
from kgrec_jax.serving.rerank import Material, Rerank, calibrated, mmr, unit_scores

USERS, WIDTH, ITEMS = 4, 12, 30


@pytest.fixture
def world():
    """(candidates [n, C] by falling score, scores, material, history); the last user has five candidates."""
    rng = np.random.default_rng(5)
    items = np.stack([rng.permutation(ITEMS)[:WIDTH] for _ in range(USERS)])
    scores = -np.sort(-rng.standard_normal((USERS, WIDTH)), axis=1)
    items[-1, 5:], scores[-1, 5:] = -1, -np.inf
    kinds = (rng.random((ITEMS, 5)) < 0.4).astype(np.float32)
    shares = sp.csr_matrix(kinds / np.maximum(kinds.sum(1, keepdims=True), 1))
    history = sp.csr_matrix((rng.random((USERS, ITEMS)) < 0.3).astype(np.float32))
    material = Material(ItemVectors({"text": rng.standard_normal((ITEMS, 4)).astype(np.float32)}), shares)
    return items, scores, material, history


def test_unit_scores():
    exists = np.array([[1, 1, 1], [1, 1, 0], [0, 0, 0]], bool)
    found = unit_scores(np.array([[5, 3, 1], [2, 2, 9], [0, 0, 0]], np.float32), exists)
    np.testing.assert_array_equal(found, [[1, 0.5, 0], [0, 0, -np.inf], [-np.inf] * 3])


@pytest.mark.parametrize("tradeoff", [0.0, 0.3, 1.0])
def test_mmr_takes_what_the_definition_takes(world, tradeoff):
    items, scores, material, _ = world
    value, similarity = unit_scores(scores, items >= 0), material.vectors.similarities(items)
    found = mmr(value, similarity, 7, tradeoff)
    for n in range(USERS):
        chosen, left = [], [c for c in range(WIDTH) if items[n, c] >= 0]
        while left and len(chosen) < 7:
            def gain(c):
                near = max((float(similarity[n, c, j]) for j in chosen), default=None)
                return value[n, c] if near is None else (1 - tradeoff) * value[n, c] - tradeoff * near
            best = max(left, key=gain)
            chosen.append(best)
            left.remove(best)
        assert found[n].tolist() == chosen + [-1] * (7 - len(chosen))


@pytest.mark.parametrize("tradeoff", [0.0, 0.5, 1.0])
def test_calibrated_takes_what_the_definition_takes(world, tradeoff):
    items, scores, material, history = world
    found, values = material.reorder(Rerank("calibrated", tradeoff), items, scores, 6, history)
    table, value = material.shares.toarray(), unit_scores(scores, items >= 0)
    for n in range(USERS):
        own = table[history[n].indices]
        p = own.sum(0) / own.sum()
        chosen, left = [], [c for c in range(WIDTH) if items[n, c] >= 0]
        while left and len(chosen) < 6:
            def gain(c):
                rows = table[items[n, [*chosen, c]]]
                q = rows.sum(0) / max((rows.sum(1) > 0).sum(), 1)
                total = sum(value[n, [*chosen, c]])
                return (1 - tradeoff) * total - tradeoff * float(divergence(p, q))
            gains = [gain(c) for c in left]
            best = left[int(np.argmax(np.round(gains, 12)))]
            chosen.append(best)
            left.remove(best)
        wanted = items[n, chosen].tolist()
        assert found[n].tolist() == wanted + [-1] * (6 - len(wanted))
        place = {int(i): float(s) for i, s in zip(items[n], scores[n])}
        assert all(math.isclose(values[n, k], place[i], rel_tol=1e-6) for k, i in enumerate(wanted))


def test_without_a_history_the_scores_decide():
    scores = np.array([1.0, 0.5, 0.0])
    assert calibrated(scores, np.eye(3), np.ones(3, bool), np.zeros(3), 2, 0.9).tolist() == [0, 1]


def test_a_tradeoff_buys_variety_and_calibration(world):
    items, scores, material, history = world
    for kind in ("mmr", "calibrated"):
        plain, _ = material.reorder(Rerank(kind, 0.0), items, scores, 5, history)
        np.testing.assert_array_equal(plain, items[:, :5])


def test_what_there_is_nothing_for_is_said(world):
    items, scores, material, history = world
    for how, words in ((Rerank("mmr", 0.5), "--diversity: found a recommender without text"),
                       (Rerank("calibrated", 0.5), "--calibrate: found a recommender without kinds")):
        with pytest.raises(KgrecError, match=words):
            Material(None, None).reorder(how, items, scores, 3, history)
    with pytest.raises(KgrecError, match="--diversity: found 1.5, expected a number from 0 to 1"):
        material.check(Rerank("mmr", 1.5))
