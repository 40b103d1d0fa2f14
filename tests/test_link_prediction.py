"""Link prediction against a brute-force ranking: filter, ties, both directions, blocks, NaN."""

import jax.numpy as jnp
import numpy as np
import pytest

from kgrec_jax.errors import KgrecError
from kgrec_jax.evaluation.link_prediction import (KnownTails, add_inverses, evaluate_link_prediction, rank_metrics,
                                                  rank_tails)

N, R = 23, 3


@pytest.fixture
def world():
    """Triples with duplicates, and a score cube [N, 2R, N] with many ties."""
    rng = np.random.default_rng(1)
    triples = np.stack([rng.integers(0, N, 150), rng.integers(0, R, 150), rng.integers(0, N, 150)], 1).astype(np.int32)
    return triples, rng.integers(0, 6, size=(N, 2 * R, N)).astype(np.float32)


def _brute_force_rank(cube, triple, true):
    """The mean place of the target over all orders of equal scores, among what is not known to be true."""
    head, relation, tail = triple
    rivals = [e for e in range(N) if e != tail and (head, relation, e) not in true]
    own = cube[head, relation, tail]
    better = sum(cube[head, relation, e] > own for e in rivals)
    return 1 + better + sum(cube[head, relation, e] == own for e in rivals) / 2


def _score_block(cube, padding=5):
    """Scores from the cube; padded columns would beat everything if they were looked at."""
    wide = np.pad(cube, ((0, 0), (0, 0), (0, padding)), constant_values=99.0)
    return lambda heads, relations: jnp.asarray(wide[heads, relations])


def test_ranks_equal_brute_force_whatever_the_block(world):
    triples, cube = world
    both = add_inverses(triples, R)
    true = set(map(tuple, both.tolist()))
    expected = [_brute_force_rank(cube, t, true) for t in both.tolist()]
    known = KnownTails.of(triples, R)
    for block in (0, 1, 7, 64, 1000):
        ranks = rank_tails(_score_block(cube), *both.T, known=known, num_entities=N, block=block)
        np.testing.assert_array_equal(ranks, expected)


def test_metrics_of_both_directions_and_apart(world):
    triples, cube = world
    true = set(map(tuple, add_inverses(triples, R).tolist()))
    test = triples[:40]
    ranks = np.array([_brute_force_rank(cube, t, true) for t in add_inverses(test, R).tolist()])
    got = evaluate_link_prediction(_score_block(cube), test, known=KnownTails.of(triples, R), num_entities=N, block=16)
    assert got["queries"] == 80
    for prefix, part in (("", ranks), ("tail/", ranks[:40]), ("head/", ranks[40:])):
        assert got[prefix + "mrr"] == pytest.approx((1 / part).mean())
        assert got[prefix + "mr"] == pytest.approx(part.mean())
        for k in (1, 3, 10):
            assert got[f"{prefix}hits@{k}"] == pytest.approx((part <= k).mean())


def test_a_constant_scorer_gains_nothing_and_nan_loses():
    triples = np.array([[0, 0, 1]], np.int32)
    known = KnownTails.of(triples, 1)
    constant = rank_tails(lambda h, r: jnp.zeros((len(h), 101)), *triples.T, known=known, num_entities=101)
    assert constant == [51.0]
    scores = np.zeros((1, 101), np.float32)
    scores[0, 1] = np.nan
    worst = rank_tails(lambda h, r: jnp.asarray(scores), *triples.T, known=known, num_entities=101, block=1)
    assert worst[0] >= 101
    other = np.zeros((1, 101), np.float32)
    other[0, 50] = np.nan
    other[0, 1] = 1.0
    assert rank_tails(lambda h, r: jnp.asarray(other), *triples.T, known=known, num_entities=101, block=1) == [2.0]


def test_known_tails_lists_each_answer_once():
    triples = np.array([[0, 0, 1], [0, 0, 1], [0, 0, 2], [3, 1, 0]], np.int32)
    rows, tails = KnownTails.of(triples, 2).pairs(np.array([0, 1, 2, 0]), np.array([0, 2, 1, 3]))
    assert rows.tolist() == [0, 0, 1, 3]
    assert tails.tolist() == [1, 2, 0, 3]


def test_rank_metrics_of_half_ranks():
    metrics = rank_metrics(np.array([1.0, 1.5, 3.0, 10.5]))
    assert (metrics["hits@1"], metrics["hits@3"], metrics["hits@10"]) == (0.25, 0.75, 0.75)
    assert metrics["mrr"] == pytest.approx(np.mean([1, 1 / 1.5, 1 / 3, 1 / 10.5]))


def test_nothing_to_rank_and_ids_outside_the_tables_are_errors():
    known = KnownTails.of(np.array([[0, 0, 1]], np.int32), 1)
    block = lambda h, r: jnp.zeros((len(h), 2))  # noqa: E731
    with pytest.raises(KgrecError, match="no triple to rank"):
        evaluate_link_prediction(block, np.zeros((0, 3), np.int32), known=known, num_entities=2)
    with pytest.raises(KgrecError, match="entities below 2"):
        evaluate_link_prediction(block, np.array([[0, 0, 2]], np.int32), known=known, num_entities=2)
