"""Heads: pooling that padding cannot touch, losses against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kgrec_jax import KgrecError
from kgrec_jax.evaluation.finetune_metrics import classification_metrics, mean_ranks, regression_metrics
from kgrec_jax.models import heads

RNG = np.random.default_rng(0)
FIRST, SECOND = (jnp.asarray(RNG.normal(size=(4, 6)), jnp.float32) for _ in range(2))
WEIGHT = jnp.asarray([1.0, 1.0, 1.0, 0.0])


def test_pooling():
    hidden = jnp.asarray(RNG.normal(size=(3, 5, 6)), jnp.float32)
    mask = jnp.asarray([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0] * 5])
    np.testing.assert_allclose(heads.pool(hidden, mask, "mean")[1], hidden[1, :2].mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(heads.pool(hidden, mask, "cls")[:2], hidden[:2, 0])
    for kind in ("mean", "cls"):
        assert not np.any(heads.pool(hidden, mask, kind)[2])
    with pytest.raises(KgrecError, match="pooling: found 'max'"):
        heads.pool(hidden, mask, "max")


def test_a_zero_vector_has_a_finite_gradient():
    assert np.isfinite(jax.grad(lambda x: heads.unit(x).sum())(jnp.zeros((2, 3)))).all()


def test_classification_and_regression_losses():
    head = heads.init_classification(6, 3, jax.random.key(0))
    targets = jnp.asarray([0, 2, 1, 0])
    found = heads.class_losses(head, FIRST, targets, WEIGHT)
    wanted = -jnp.take_along_axis(jax.nn.log_softmax(heads.class_logits(head, FIRST)), targets[:, None], 1)[:, 0]
    np.testing.assert_allclose(found, wanted * WEIGHT, rtol=1e-5, atol=1e-6)
    line = {"kernel": jnp.ones((6,)), "bias": jnp.asarray(0.5)}
    np.testing.assert_allclose(heads.regression_losses(line, FIRST, jnp.ones(4), WEIGHT)[:3],
                               ((np.asarray(FIRST).sum(1) - 0.5) ** 2)[:3], rtol=1e-4)
    assert heads.regression_losses(line, FIRST, jnp.ones(4), WEIGHT)[3] == 0


def test_info_nce_leaves_out_padding_and_copies():
    same = jnp.zeros((4, 4), bool).at[0, 1].set(True).at[1, 0].set(True)
    scores = heads.pair_scores(FIRST, SECOND, 10.0, WEIGHT, same)
    a, b = (np.asarray(x) / np.linalg.norm(x, axis=1, keepdims=True) for x in (FIRST, SECOND))
    plain = 10 * a @ b.T
    np.testing.assert_allclose(heads.info_nce(scores, WEIGHT)[0],
                               np.log(np.exp(plain[0, [0, 2]]).sum()) - plain[0, 0], rtol=1e-5)
    np.testing.assert_allclose(heads.info_nce(scores, WEIGHT)[2], np.log(np.exp(plain[2, :3]).sum()) - plain[2, 2],
                               rtol=1e-5)
    assert heads.info_nce(scores, WEIGHT)[3] == 0
    grad = jax.grad(lambda x: heads.info_nce(heads.pair_scores(x, SECOND, 10.0, WEIGHT, same), WEIGHT).sum())(FIRST)
    assert np.isfinite(grad).all() and not np.any(grad[3])
    own = heads.pair_scores(FIRST, FIRST, 1.0, WEIGHT)
    np.testing.assert_array_equal(heads.in_batch_right(own, WEIGHT), WEIGHT)
    assert float(heads.learned_scale(heads.init_matching(0.05))) == pytest.approx(20, rel=1e-5)
    assert float(heads.learned_scale({"log_scale": jnp.asarray(9.0)})) == 100


def test_same_rows():
    ids = jnp.asarray([[1, 2], [3, 4], [1, 2]])
    np.testing.assert_array_equal(heads.same_rows(ids), [[1, 0, 1], [0, 1, 0], [1, 0, 1]])


def test_alignment_and_uniformity():
    x, y = heads.unit(FIRST), heads.unit(SECOND)
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    assert float(heads.alignment(x, y)) == pytest.approx(np.mean(((a - b) ** 2).sum(1)), rel=1e-5)
    apart = [np.exp(-2 * ((a[i] - a[j]) ** 2).sum()) for i in range(4) for j in range(4) if i != j]
    assert float(heads.uniformity(x)) == pytest.approx(np.log(np.mean(apart)), rel=1e-4)
    assert float(heads.uniformity(jnp.ones((3, 1)))) == pytest.approx(0, abs=1e-6)


def test_metrics():
    found = classification_metrics(np.array([0, 1, 1, 2]), np.array([0, 1, 2, 2]), 4)
    assert found["accuracy"] == 0.75 and found["macro_f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    np.testing.assert_array_equal(mean_ranks(np.array([3.0, 1.0, 3.0, 2.0])), [3.5, 1, 3.5, 2])
    values = np.array([1.0, 2.0, 3.0, 4.0])
    found = regression_metrics(np.exp(values), values)
    assert found["spearman"] == pytest.approx(1) and found["pearson"] < 0.99
    assert np.isnan(regression_metrics(np.ones(4), values)["spearman"])
