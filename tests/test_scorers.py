"""Each scorer against NumPy, as a query against a table, and under gradients; a new entry of SCORERS inherits all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kgrec_jax.errors import KgrecError
from kgrec_jax.models.scorers import SCORERS, get_scorer


def _complex(x):
    re, im = np.split(x.astype(np.float64), 2, axis=-1)
    return re + 1j * im


def _unit(x):
    return x / np.abs(x)


# The papers' formulas, in complex and float64 arithmetic.
ORACLES = {
    "complex": lambda h, r, t: np.real(_complex(h) * _complex(r) * np.conj(_complex(t))).sum(-1),
    "distmult": lambda h, r, t: (h.astype(np.float64) * r * t).sum(-1),
    "transe": lambda h, r, t: -((h.astype(np.float64) + r - t) ** 2).sum(-1),
    "rotate": lambda h, r, t: -(np.abs(_complex(h) * _unit(_complex(r)) - _complex(t)) ** 2).sum(-1),
}
CUBES = {
    "complex": lambda x: (np.abs(_complex(x)) ** 3).sum(-1),
    "distmult": lambda x: (np.abs(x.astype(np.float64)) ** 3).sum(-1),
    "transe": lambda x: (np.abs(x.astype(np.float64)) ** 3).sum(-1),
    "rotate": lambda x: (np.abs(_complex(x)) ** 3).sum(-1),
}


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in ((7, 12), (7, 12), (7, 12), (30, 12)))


@pytest.mark.parametrize("name", SCORERS)
def test_score_equals_the_papers_formula(name, rows):
    h, r, t, _ = rows
    np.testing.assert_allclose(SCORERS[name].score(h, r, t), ORACLES[name](h, r, t), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", SCORERS)
def test_all_tails_at_once_equal_one_triple_at_a_time(name, rows):
    h, r, _, table = rows
    scorer = SCORERS[name]
    whole = scorer.score_all(h, r, table)
    for row in range(len(table)):
        tails = np.broadcast_to(table[row], h.shape)
        np.testing.assert_allclose(whole[:, row], scorer.score(h, r, tails), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", SCORERS)
def test_n3_equals_numpy_and_gradients_are_finite_at_zero(name, rows):
    scorer = SCORERS[name]
    np.testing.assert_allclose(scorer.nuclear_3_norm(rows[0]), CUBES[name](rows[0]), rtol=1e-4)
    zero = jnp.zeros((1, 12))
    loss = lambda x: (scorer.score(x, x, x) + scorer.nuclear_3_norm(x)).sum()  # noqa: E731
    assert np.isfinite(jax.grad(loss)(zero)).all()


def test_rotation_keeps_length_and_complex_conjugate_inverts(rows):
    h, r, _, _ = rows
    rotated = SCORERS["rotate"].query(h, r) / 2
    np.testing.assert_allclose(np.linalg.norm(rotated, axis=1), np.linalg.norm(h, axis=1), rtol=1e-5)
    re, im = np.split(r, 2, axis=1)
    back = SCORERS["rotate"].query(rotated, np.concatenate([re, -im], axis=1)) / 2
    np.testing.assert_allclose(back, h, atol=1e-5)


def test_unknown_scorer_and_odd_width_say_what_to_change():
    with pytest.raises(KgrecError, match="graph.scorer.*'ermlp'.*complex"):
        get_scorer("ermlp", 8)
    with pytest.raises(KgrecError, match="graph.dim: found 7"):
        get_scorer("complex", 7)
    assert get_scorer("transe", 7) is SCORERS["transe"]
