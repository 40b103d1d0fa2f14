"""Intervals that hold what they promise."""

import math

import numpy as np
import pytest

from kgrec_jax.evaluation import significance
from kgrec_jax.evaluation.significance import bootstrap_ci, bootstrap_cis, paired_difference


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = 0
    for trial in range(200):
        low, high = bootstrap_ci(rng.exponential(size=100), seed=trial, n=200)
        inside += low <= 1.0 <= high
    assert 0.88 <= inside / 200 <= 0.98


def test_the_seed_decides_and_metrics_share_the_resamples():
    values = np.random.default_rng(1).random(50)
    both = bootstrap_cis({"a": values, "b": values + 1}, seed=3)
    np.testing.assert_allclose(both["a"], bootstrap_ci(values, seed=3), atol=1e-12)
    np.testing.assert_allclose(np.array(both["b"]) - 1, both["a"], atol=1e-12)
    assert bootstrap_ci(values, seed=4) != bootstrap_ci(values, seed=3) == bootstrap_ci(values, seed=3)
    assert bootstrap_ci(np.ones(5), seed=0) == (1.0, 1.0)


def test_many_users_take_the_normal_limit(monkeypatch):
    values = np.random.default_rng(2).random(2000)
    resampled = bootstrap_ci(values, seed=0)
    monkeypatch.setattr(significance, "MANY_USERS", 1000)
    np.testing.assert_allclose(bootstrap_ci(values, seed=0), resampled, atol=0.002)


def test_paired_difference():
    a, b = np.array([0.5, 0.25, 1.0]), np.array([0.25, 0.25, 0.5])
    mean, error = paired_difference(a, b)
    assert mean == pytest.approx(0.25) and error == pytest.approx(np.std([0.25, 0, 0.5], ddof=1) / math.sqrt(3))
    assert paired_difference(a, a) == (0.0, 0.0)
    assert math.isnan(paired_difference(a[:1], b[:1])[1])
    with pytest.raises(ValueError, match="the same users"):
        paired_difference(a, b[:2])
