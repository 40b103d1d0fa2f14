"""The mixture of scorers: chosen on validation, on one scale, never behind its best part there."""

import jax.numpy as jnp
import numpy as np
import pytest

from kgrec_jax.evaluation.link_prediction import KnownTails, add_inverses, evaluate_link_prediction
from kgrec_jax.evaluation.mixture import Mixture, choose_mixture, standardised

N, R = 60, 3


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(0)
    triples = np.unique(np.stack([rng.integers(N, size=240), rng.integers(R, size=240), rng.integers(N, size=240)], 1),
                        axis=0)
    known = KnownTails.of(triples, R)
    truth = np.zeros((N, 2 * R, N), np.float32)
    h, r, t = add_inverses(triples, R).T
    truth[h, r, t] = 1.0

    def scorer(noise, seed, scale):
        cube = scale * (truth + noise * np.random.default_rng(seed).standard_normal(truth.shape)).astype(np.float32)
        # Two columns of padding, which must not count.
        cube = np.concatenate([cube, np.full((*cube.shape[:2], 2), 1e3, np.float32)], axis=2)
        return lambda heads, relations: jnp.asarray(cube[heads, relations])

    return triples, known, scorer


def mrr(block, triples, known):
    return evaluate_link_prediction(block, triples, known=known, num_entities=N)["mrr"]


def test_two_views_are_better_than_either_whatever_their_scale(world):
    triples, known, scorer = world
    scorers = {"structure": scorer(0.5, 1, 1.0), "text": scorer(0.5, 2, 100.0)}
    mixture = choose_mixture(scorers, triples[::2], known=known, num_entities=N)
    assert sum(mixture.weights.values()) == pytest.approx(1.0)
    mixed = mrr(mixture.score_block(scorers, N), triples[1::2], known)
    alone = [mrr(block, triples[1::2], known) for block in scorers.values()]
    assert mixed > max(alone) + 0.03
    assert 0.2 < mixture.weights["text"] < 0.8  # equally good views weigh about the same


def test_a_scorer_that_knows_nothing_is_left_out(world):
    triples, known, scorer = world
    scorers = {"structure": scorer(0.1, 1, 1.0), "text": scorer(30.0, 2, 1.0)}
    mixture = choose_mixture(scorers, triples[::2], known=known, num_entities=N)
    assert mixture.weights == {"structure": 1.0, "text": 0.0}
    assert mixture.score_block(scorers, N) is scorers["structure"]


def test_the_choice_is_the_best_of_the_grid(world):
    triples, known, scorer = world
    scorers = {"a": scorer(0.6, 1, 1.0), "b": scorer(0.9, 2, 3.0), "c": scorer(1.2, 3, 0.1)}
    said = []
    mixture = choose_mixture(scorers, triples, known=known, num_entities=N, parts=4, say=said.append)
    grid = [(a, b, 4 - a - b) for a in range(5) for b in range(5 - a)]
    best = max(mrr(Mixture(dict(zip("abc", np.array(w) / 4.0))).score_block(scorers, N), triples, known)
               for w in grid)
    assert mrr(mixture.score_block(scorers, N), triples, known) == pytest.approx(best, abs=2e-3)
    assert float(said[0].rpartition(" ")[2]) == pytest.approx(best, abs=2e-3)


def test_standard_scores_ignore_the_padding(world):
    scores = jnp.asarray(np.random.default_rng(3).standard_normal((5, 12)).astype(np.float32))
    got = np.asarray(standardised(scores, 9))
    kept = np.asarray(scores)[:, :9]
    np.testing.assert_allclose(got, (kept - kept.mean(1, keepdims=True)) / kept.std(1, keepdims=True), atol=1e-5)
    assert np.isfinite(np.asarray(standardised(jnp.zeros((2, 4), jnp.float32), 4))).all()


def test_without_anything_to_choose_on_all_count_the_same(world):
    triples, known, scorer = world
    scorers = {"structure": scorer(0.5, 1, 1.0), "text": scorer(0.5, 2, 1.0)}
    mixture = choose_mixture(scorers, triples[:0], known=known, num_entities=N)
    assert mixture.weights == {"structure": 0.5, "text": 0.5}
