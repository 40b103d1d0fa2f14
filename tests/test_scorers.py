"""Each scorer against NumPy, as a query against a table, and under gradients; a new entry of SCORERS inherits all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kgrec_jax.errors import KgrecError
from kgrec_jax.models.neural_scorers import image_shape
from kgrec_jax.models.scorers import SCORERS, ScorerOptions, get_scorer

D = 12
BILINEAR = [name for name, scorer in SCORERS.items() if scorer.relation_transform is not None]


def _complex(x):
    re, im = np.split(x.astype(np.float64), 2, axis=-1)
    return re + 1j * im


def _unit(x):
    return x / np.abs(x)


def _normed(x, weights):
    """Layer normalisation over everything but the first dimension, scale and shift along the last."""
    axes = tuple(range(1, x.ndim))
    scaled = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-6)
    return scaled * np.asarray(weights["scale"], np.float64) + np.asarray(weights["bias"], np.float64)


def _simple(h, r, t, _):
    (hs, ho), (forward, backward), (ts, to) = (np.split(x.astype(np.float64), 2, axis=1) for x in (h, r, t))
    return 0.5 * ((hs * forward * to).sum(1) + (ts * backward * ho).sum(1))


def _tucker(h, r, t, weights):
    core = np.asarray(weights["core"], np.float64)
    h = _normed(h.astype(np.float64), weights["input_norm"])
    query = np.stack([sum(r[b, k] * h[b, i] * core[k, i] for k in range(len(core)) for i in range(D))
                      for b in range(len(h))])
    return (_normed(query, weights["query_norm"]) * t).sum(1)


def _conve(h, r, t, weights):
    height, width = 3, 4
    image = np.concatenate([h.reshape(-1, height, width), r.reshape(-1, height, width)], axis=1).astype(np.float64)
    image = _normed(image[..., None], weights["image_norm"])[..., 0]
    kernel, shift = (np.asarray(weights["conv"][name], np.float64) for name in ("kernel", "bias"))  # [3, 3, 1, C], [C]
    maps = np.zeros((len(h), 2 * height - 2, width - 2, kernel.shape[-1]))
    for y in range(maps.shape[1]):
        for x in range(maps.shape[2]):
            maps[:, y, x] = np.einsum("bij,ijc->bc", image[:, y:y + 3, x:x + 3], kernel[:, :, 0]) + shift
    maps = np.maximum(_normed(maps, weights["map_norm"]), 0).reshape(len(h), -1)
    query = maps @ np.asarray(weights["project"]["kernel"], np.float64) + np.asarray(weights["project"]["bias"])
    return (np.maximum(_normed(query, weights["query_norm"]), 0) * t).sum(1)


# The papers' formulas, in complex and float64 arithmetic.
ORACLES = {
    "complex": lambda h, r, t, _: np.real(_complex(h) * _complex(r) * np.conj(_complex(t))).sum(-1),
    "distmult": lambda h, r, t, _: (h.astype(np.float64) * r * t).sum(-1),
    "simple": _simple,
    "transe": lambda h, r, t, _: -((h.astype(np.float64) + r - t) ** 2).sum(-1),
    "transe-l1": lambda h, r, t, _: -np.abs(h.astype(np.float64) + r - t).sum(-1),
    "rotate": lambda h, r, t, _: -(np.abs(_complex(h) * _unit(_complex(r)) - _complex(t)) ** 2).sum(-1),
    "rotate-l1": lambda h, r, t, _: -np.abs(_complex(h) * _unit(_complex(r)) - _complex(t)).sum(-1),
    "tucker": _tucker,
    "conve": _conve,
}


def _numbers(name, x):
    return _complex(x) if SCORERS[name].complex else x.astype(np.float64)


def weights_of(scorer):
    """Weights that differ from their start everywhere, so that an oracle which forgets one of them fails."""
    fresh, rng = scorer.init(D, jax.random.key(3)), np.random.default_rng(4)
    return jax.tree.map(lambda x: x + jnp.asarray(rng.normal(size=x.shape), jnp.float32) * 0.3, fresh)


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in ((7, D), (7, D), (7, D), (30, D)))


@pytest.mark.parametrize("name", SCORERS)
def test_score_equals_the_papers_formula(name, rows):
    h, r, t, _ = rows
    scorer = SCORERS[name]
    weights = weights_of(scorer)
    np.testing.assert_allclose(scorer.score(h, r, t, weights), ORACLES[name](h, r, t, weights), rtol=5e-5, atol=5e-5)


def test_a_core_of_lower_rank_reads_the_first_numbers_of_a_relation(rows):
    h, r, t, _ = rows
    scorer = get_scorer("tucker", D, ScorerOptions(core_rank=5))
    weights = weights_of(scorer)
    assert weights["core"].shape == (5, D, D)
    np.testing.assert_allclose(scorer.score(h, r, t, weights), _tucker(h, r, t, weights), rtol=5e-5, atol=5e-5)
    other = r.copy()
    other[:, 5:] = 0
    np.testing.assert_array_equal(scorer.score(h, r, t, weights), scorer.score(h, other, t, weights))


@pytest.mark.parametrize("name", SCORERS)
def test_all_tails_at_once_equal_one_triple_at_a_time(name, rows):
    h, r, _, table = rows
    scorer = SCORERS[name]
    weights = weights_of(scorer)
    own = np.random.default_rng(5).normal(size=len(table)).astype(np.float32) if scorer.entity_bias else None
    whole = scorer.score_all(h, r, table, weights, own)
    for row in range(len(table)):
        tails = np.broadcast_to(table[row], h.shape)
        bias = None if own is None else np.broadcast_to(own[row], h.shape[:1])
        np.testing.assert_allclose(whole[:, row], scorer.score(h, r, tails, weights, bias), rtol=5e-5, atol=5e-5)
    each = np.stack([table[b:b + 9] for b in range(len(h))])  # [B, 9, D]
    biases = None if own is None else np.stack([own[b:b + 9] for b in range(len(h))])
    got = scorer.compare(scorer.query(h, r, weights), each, biases)
    np.testing.assert_allclose(got, np.stack([whole[b, b:b + 9] for b in range(len(h))]), rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("name", SCORERS)
def test_n3_equals_numpy_and_gradients_are_finite_at_zero(name, rows):
    scorer = SCORERS[name]
    expected = (np.abs(_numbers(name, rows[0])) ** 3).sum(-1)
    np.testing.assert_allclose(scorer.nuclear_3_norm(rows[0]), expected, rtol=1e-4)
    zero, weights = jnp.zeros((1, D)), weights_of(scorer)
    loss = lambda x, weights: (scorer.score(x, x, x, weights) + scorer.nuclear_3_norm(x)).sum()  # noqa: E731
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(jax.grad(loss, argnums=(0, 1))(zero, weights)))


@pytest.mark.parametrize("name", BILINEAR)
def test_a_relation_is_a_row_that_head_and_tail_ask_for(name, rows):
    h, r, t, _ = rows
    scorer = SCORERS[name]
    asked = (scorer.relation_transform(h, t) * r).sum(-1)
    np.testing.assert_allclose(asked, scorer.score(h, r, t), rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("name", SCORERS)
def test_dropout_needs_a_key_and_keeps_the_mean(name, rows):
    h, r, _, _ = rows
    scorer = get_scorer(name, D, ScorerOptions(input_dropout=0.25, hidden_dropout=0.25, query_dropout=0.25))
    weights = weights_of(scorer)
    plain = SCORERS[name].query(h, r, weights)
    np.testing.assert_array_equal(scorer.query(h, r, weights), plain)
    one, again, other = (scorer.query(h, r, weights, jax.random.key(k)) for k in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert (np.asarray(one) != np.asarray(other)).any()
    # Of the query alone the mean over many draws is the query itself.
    scorer = get_scorer(name, D, ScorerOptions(query_dropout=0.25))
    many = np.asarray(jax.vmap(lambda key: scorer.query(h, r, weights, key))(jax.random.split(jax.random.key(0), 4000)))
    assert 0.23 < (many == 0)[:, np.asarray(plain) != 0].mean() < 0.27
    np.testing.assert_allclose(many.mean(0), plain, atol=0.05 * np.abs(plain).max())


def test_rotation_keeps_length_and_complex_conjugate_inverts(rows):
    h, r, _, _ = rows
    rotated = SCORERS["rotate"].query(h, r) / 2
    np.testing.assert_allclose(np.linalg.norm(rotated, axis=1), np.linalg.norm(h, axis=1), rtol=1e-5)
    re, im = np.split(r, 2, axis=1)
    back = SCORERS["rotate"].query(rotated, np.concatenate([re, -im], axis=1)) / 2
    np.testing.assert_allclose(back, h, atol=1e-5)


def test_a_row_becomes_an_image_as_square_as_it_can():
    assert [image_shape(d) for d in (8, 12, 128, 200, 7)] == [(2, 4), (3, 4), (8, 16), (10, 20), (1, 7)]


def test_unknown_scorer_and_odd_width_say_what_to_change():
    with pytest.raises(KgrecError, match="graph.scorer.*'ermlp'.*complex"):
        get_scorer("ermlp", 8)
    for name in ("complex", "simple", "rotate-l1"):
        with pytest.raises(KgrecError, match="graph.dim: found 7, expected an even"):
            get_scorer(name, 7)
    assert get_scorer("transe", 7) is SCORERS["transe"]


@pytest.mark.parametrize(("name", "options", "match"), [
    ("complex", ScorerOptions(query_dropout=1.0), "options.query_dropout: found 1.0"),
    ("tucker", ScorerOptions(core_rank=13), "options.core_rank: found 13, expected 1 to graph.dim .12."),
    ("conve", ScorerOptions(channels=0), "options: found channels 0"),
    ("conve", ScorerOptions(kernel=5), "graph.dim: found 12, a row as an image of 3 × 4.*change graph.dim"),
])
def test_options_that_do_not_fit_say_what_to_change(name, options, match):
    with pytest.raises(KgrecError, match=match):
        get_scorer(name, D, options)


def test_a_prime_width_is_no_image():
    with pytest.raises(KgrecError, match="graph.dim: found 13, a row as an image of 1 × 13"):
        get_scorer("conve", 13)
