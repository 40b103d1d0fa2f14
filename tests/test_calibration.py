"""Features, false triples, calibrators and their figures against brute force and planted probabilities."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, special

from kgrec_jax.errors import KgrecError
from kgrec_jax.evaluation import calibration
from kgrec_jax.evaluation.calibration import Calibrator, fit_calibrator
from kgrec_jax.evaluation.link_prediction import KnownTails
from kgrec_jax.evaluation.reliability import calibration_metrics, plot_reliability, precision_at, reliability
from kgrec_jax.evaluation.triple_features import FEATURES, corrupt, triple_features

N, R = 30, 3


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(0)
    triples = np.unique(np.stack([rng.integers(N, size=200), rng.integers(R, size=200), rng.integers(N, size=200)], 1),
                        axis=0).astype(np.int32)
    # Few distinct values, so that there are ties; two columns of padding, which must not count.
    cube = rng.integers(0, 12, (N, 2 * R, N + 2)).astype(np.float32)
    cube[:, :, N:] = 1e6
    return triples, cube


def brute_features(cube, known, triple):
    out = []
    h, r, t = triple
    for head, relation, tail in ((h, r, t), (t, r + R, h)):
        scores = cube[head, relation, :N].astype(np.float64)
        answers = {b for a, k, b in known if (a, k) == (head, relation)} if relation < R else {
            a for a, k, b in known if (b, k + R) == (head, relation)}
        rivals = [e for e in range(N) if e != tail and e not in answers]
        rank = 1 + sum(scores[e] > scores[tail] for e in rivals) + 0.5 * sum(scores[e] == scores[tail] for e in rivals)
        out += [scores[tail], (scores[tail] - scores.mean()) / scores.std(), np.log(rank),
                np.log1p(len(answers - {tail}))]
    return out


@pytest.mark.parametrize("block", [0, 8, 7])
def test_features_are_those_of_a_loop(world, block):
    triples, cube = world
    asked = np.concatenate([triples[::4], np.random.default_rng(1).integers(0, R, (15, 3))]).astype(np.int32)
    done = []
    got = triple_features(lambda h, r: jnp.asarray(cube[h, r]), asked, known=KnownTails.of(triples, R), num_entities=N,
                          block=block, advance=done.append)
    want = [brute_features(cube, [tuple(t) for t in triples.tolist()], t) for t in asked.tolist()]
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    assert got.shape[1] == len(FEATURES) and sum(done) == 2 * len(asked)
    empty = triple_features(lambda h, r: jnp.asarray(cube[h, r]), asked[:0], known=KnownTails.of(triples, R),
                            num_entities=N)
    assert empty.shape == (0, len(FEATURES))


def test_false_triples_have_right_types_and_are_not_known():
    rng = np.random.default_rng(0)
    # Relation 0 goes from the first ten to the last ten entities; relation 1 is full: every pair is a fact.
    sparse = np.stack([rng.integers(10, size=40), np.zeros(40, int), 20 + rng.integers(10, size=40)], 1)
    sparse = np.unique(sparse, axis=0)
    full = np.array([[a, 1, b] for a in (0, 1, 2) for b in (5, 6)])
    one_end = np.array([[a, 2, 7] for a in (0, 1, 2)] + [[3, 2, 8]])  # 3 has a free tail, the slot's heads have one too
    facts = np.concatenate([sparse, full, one_end]).astype(np.int32)
    known = KnownTails.of(facts, 3)
    place, false = corrupt(facts, facts, known=known, seed=1)
    stated = {tuple(t) for t in facts.tolist()}
    assert not {tuple(t) for t in false.tolist()} & stated
    assert ((false != facts[place]).sum(1) == 1).all() and (false[:, 1] == facts[place, 1]).all()
    for relation in (0, 2):
        own = false[false[:, 1] == relation]
        assert set(own[:, 0]) <= set(facts[facts[:, 1] == relation][:, 0])
        assert set(own[:, 2]) <= set(facts[facts[:, 1] == relation][:, 2])
    assert sorted(np.setdiff1d(np.arange(len(facts)), place)) == sorted(np.flatnonzero(facts[:, 1] == 1))
    again = corrupt(facts, facts, known=known, seed=1)
    assert np.array_equal(again[1], false) and not np.array_equal(corrupt(facts, facts, known=known, seed=2)[1], false)
    # Uniform over what is free: 0 -0-> ? has the slot's tails less its own answers.
    draws = np.concatenate([corrupt(facts[:1], facts, known=known, seed=s)[1] for s in range(600)])
    tails = draws[draws[:, 0] == facts[0, 0], 2]
    free = set(sparse[:, 2]) - set(sparse[sparse[:, 0] == facts[0, 0], 2])
    counts = np.array([np.sum(tails == e) for e in free])
    assert 230 < len(tails) < 370 and counts.sum() == len(tails)
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 30  # χ² of at most nine degrees of freedom


def planted(n, seed, relations=6):
    rng = np.random.default_rng(seed)
    truth = np.random.default_rng(99)
    weight, bias = np.array([1.5, -1.0, 0.5]), truth.normal(-0.5, 1.2, relations)
    features, relation = rng.standard_normal((n, 3)) * [1, 5, 0.2] + [0, 3, 1], rng.integers(relations, size=n)
    p = special.expit(((features - [0, 3, 1]) / [1, 5, 0.2]) @ weight + bias[relation])
    return features, relation, rng.random(n) < p, p


def test_planted_probabilities_are_found():
    features, relation, label, _ = planted(8000, 0)
    fitted = fit_calibrator(features, relation, label, num_relations=7)
    features, relation, label, p = planted(8000, 1)
    got = fitted.probabilities(features, relation)
    assert np.abs(got - p).mean() < 0.02
    metrics, ideal = calibration_metrics(got, label), calibration_metrics(p, label)
    assert metrics["ece"] < 0.02 and metrics["brier"] < ideal["brier"] + 0.002 and metrics["auc"] > ideal["auc"] - 0.003
    # A relation without an example has the weights of all, so its probability lies between the others'.
    alone = fitted.probabilities(features[:50], np.full(50, 6))
    others = np.stack([fitted.probabilities(features[:50], np.full(50, r)) for r in range(6)])
    assert (alone > others.min(0)).all() and (alone < others.max(0)).all()


def test_three_examples_of_a_relation_say_little_and_thousands_all():
    features, relation, label, _ = planted(6000, 2, relations=2)
    strange = np.array([2, 2, 2])  # whatever the features, false
    fitted = fit_calibrator(np.concatenate([features, features[:3]]), np.concatenate([relation, strange]),
                            np.concatenate([label, [False] * 3]), num_relations=3)
    p = fitted.probabilities(features, np.full(len(features), 2))
    assert 0.15 < p.mean() and calibration_metrics(p, label)["auc"] > 0.8


def test_the_fit_is_the_minimum():
    features, relation, label, _ = planted(400, 3, relations=3)
    x = np.concatenate([features, np.ones((400, 1))], 1)
    found = calibration._fit(x, relation, label, 3, 2.0)

    def loss(flat):
        shared, own = flat[:4], flat[4:].reshape(3, 4)
        z = (x * (shared + own[relation])).sum(1)
        penalty = 0.5 * (np.array([1, 1, 1, 1e-3]) * shared**2).sum() + (own**2).sum()
        return (np.logaddexp(0, z) - label * z).sum() + penalty

    best = optimize.minimize(loss, np.zeros(16), method="BFGS", options={"gtol": 1e-6, "maxiter": 2000}).x
    np.testing.assert_allclose(found, best[:4] + best[4:].reshape(3, 4), atol=2e-3)


def test_isotonic_mends_a_link_that_is_not_logistic():
    rng = np.random.default_rng(4)
    x = rng.uniform(-3, 3, (12000, 1))
    p = np.where(x[:, 0] < 0, 0.05, np.where(x[:, 0] < 2, 0.4, 0.9))  # two steps
    label, none = rng.random(12000) < p, np.zeros(12000, int)
    half = slice(0, 6000)
    fits = {m: fit_calibrator(x[half], none[half], label[half], num_relations=1, method=m)
            for m in ("logistic", "isotonic")}
    got = {m: f.probabilities(x[6000:], none[6000:]) for m, f in fits.items()}
    error = {m: np.abs(v - p[6000:]).mean() for m, v in got.items()}
    assert error["isotonic"] < 0.4 * error["logistic"] and error["isotonic"] < 0.04
    order = np.argsort(x[6000:, 0])
    rising = np.diff(got["isotonic"][order])
    assert (rising >= -1e-12).all() or (rising <= 1e-12).all()
    assert 0 < got["isotonic"].min() and got["isotonic"].max() < 1


def test_another_share_of_true_ones_is_bayes_rule():
    features, relation, label, _ = planted(6000, 5)
    fitted = fit_calibrator(features, relation, label, num_relations=6)
    rng, (features, relation, label, _) = np.random.default_rng(6), planted(40000, 7)
    kept = ~label | (rng.random(len(label)) < 0.1)  # true ones ten times rarer
    p = fitted.probabilities(features[kept], relation[kept], shift=np.log(0.1))
    assert calibration_metrics(p, label[kept])["ece"] < 0.01
    assert calibration_metrics(fitted.probabilities(features[kept], relation[kept]), label[kept])["ece"] > 0.1


def test_json_keeps_a_calibrator(tmp_path):
    features, relation, label, _ = planted(500, 8)
    for method in ("logistic", "isotonic"):
        fitted = fit_calibrator(features, relation, label, num_relations=6, method=method)
        again = Calibrator.from_json(json.loads(json.dumps(fitted.to_json())))
        np.testing.assert_array_equal(again.probabilities(features, relation), fitted.probabilities(features, relation))
    with pytest.raises(KeyError):
        Calibrator.from_json({"mean": []})


@pytest.mark.parametrize("labels, kind", [([True] * 5, "true"), ([False] * 5, "false"), ([], "no")])
def test_one_kind_of_examples_is_refused(labels, kind):
    with pytest.raises(KgrecError, match=rf"found {len(labels)} examples, {kind} ones alone.*graph.valid_share"):
        fit_calibrator(np.zeros((len(labels), 2)), np.zeros(len(labels), int), np.array(labels, bool), num_relations=1)


def test_figures_are_those_of_loops(tmp_path):
    rng = np.random.default_rng(9)
    p, label = np.round(rng.random(300), 2), rng.random(300) < 0.3
    p[:2] = 0.0, 1.0
    got = calibration_metrics(p, label, bins=15)
    ece = 0.0
    for k in range(15):
        inside = (p * 15 >= k) & ((p * 15 < k + 1) | (k == 14))
        if inside.any():
            ece += inside.mean() * abs(p[inside].mean() - label[inside].mean())
    wins = [(a > b) + 0.5 * (a == b) for a in p[label] for b in p[~label]]
    assert got == pytest.approx({"brier": np.mean((p - label) ** 2), "ece": ece, "auc": np.mean(wins),
                                 "examples": 300.0, "positives": float(label.sum())})
    above = precision_at(p, label, (0.5, 1.5))
    assert above["count@0.5"] == (p >= 0.5).sum() and above["precision@0.5"] == pytest.approx(label[p >= 0.5].mean())
    assert above["count@1.5"] == 0 and np.isnan(above["precision@1.5"])
    assert np.isnan(calibration_metrics(p[:0], label[:0])["brier"])
    assert np.isnan(calibration_metrics(p[:3], np.zeros(3, bool))["auc"])
    file = plot_reliability({"facts": reliability(p, label), "proposals": reliability(p[:1], label[:1])},
                            tmp_path / "plots" / "reliability.png")
    assert file.read_bytes().startswith(b"\x89PNG") and [f.name for f in file.parent.iterdir()] == ["reliability.png"]
