"""Ranking against brute force over the orders of equal scores, and against the standard-library judge."""

import itertools
import math
import subprocess
import sys

import jax
import numpy as np
import pytest
import scipy.sparse as sp

from kgrec_jax.errors import KgrecError
from kgrec_jax.evaluation.ranking import evaluate_ranking, levels, top_k


def textbook(ranked, relevant, k):
    """The metrics of one list without ties, written out slowly."""
    places = [n for n, item in enumerate(ranked[:k], 1) if item in relevant]
    ideal = sum(1 / math.log2(n + 1) for n in range(1, min(len(relevant), k) + 1))
    precisions = [sum(p <= n for p in places) / n for n in places]
    return {
        f"recall@{k}": len(places) / len(relevant),
        f"precision@{k}": len(places) / k,
        f"hit@{k}": float(bool(places)),
        f"mrr@{k}": 1 / places[0] if places else 0.0,
        f"ndcg@{k}": sum(1 / math.log2(n + 1) for n in places) / ideal,
        f"map@{k}": sum(precisions) / min(len(relevant), k),
    }


def all_orders(scores, allowed):
    """Every list that sorts `allowed` by falling score."""
    groups = [[i for i in allowed if scores[i] == s] for s in sorted({scores[i] for i in allowed}, reverse=True)]
    for parts in itertools.product(*(itertools.permutations(g) for g in groups)):
        yield list(itertools.chain(*parts))


def world(seed, num_users=12, num_items=7, num_levels=3):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, num_levels, (num_users, num_items)).astype(np.float32)
    role = rng.choice(3, (num_users, num_items), p=[0.55, 0.2, 0.25])  # nothing, known, relevant
    return scores, sp.csr_matrix(role == 1), sp.csr_matrix(role == 2)


@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_the_mean_over_all_orders_of_equal_scores(seed):
    scores, known, relevant = world(seed)
    candidates = np.array([1, 1, 0, 1, 1, 1, 1], bool)
    ks = (1, 2, 3, 10)
    result = evaluate_ranking(
        lambda users: scores[users], known=known, relevant=relevant, num_items=7, candidates=candidates, ks=ks, block=5
    )
    for n, user in enumerate(result.users):
        allowed = [i for i in range(7) if candidates[i] and not known[user, i]]
        wanted = {i for i in allowed if relevant[user, i]}
        for k in ks:
            lists = [textbook(order, wanted, k) for order in all_orders(scores[user], allowed)]
            for metric in lists[0]:
                expected = np.mean([values[metric] for values in lists])
                assert result.per_user[metric][n] == pytest.approx(expected, abs=1e-12), (user, metric)
    assert set(result.users) == {u for u in range(12) if (relevant.toarray()[u] & candidates).any()}


def test_a_constant_scorer_earns_chance():
    num_items, k = 50, 10
    relevant = sp.csr_matrix(np.eye(20, num_items, dtype=bool))
    result = evaluate_ranking(
        lambda users: np.zeros((len(users), num_items), np.float32),
        known=sp.csr_matrix((20, num_items)), relevant=relevant, num_items=num_items, ks=(k,),
    )
    np.testing.assert_allclose(result.per_user[f"recall@{k}"], k / num_items, atol=1e-12)
    np.testing.assert_allclose(result.per_user[f"mrr@{k}"], sum(1 / p for p in range(1, k + 1)) / num_items, atol=1e-12)
    assert result.means()[f"coverage@{k}"] == k / num_items  # by item row: everybody gets the same ten


def test_negative_zero_is_zero_and_infinite_scores_are_scores():
    scores = np.array([[0.0, -0.0, -np.inf, np.inf]], np.float32)
    none = sp.csr_matrix((1, 4))
    items, _ = top_k(lambda users: scores[users], users=np.array([0]), known=none, num_items=4, k=4)
    assert items.tolist() == [[3, 0, 1, 2]]
    relevant = sp.csr_matrix(np.array([[0, 1, 0, 0]], bool))
    result = evaluate_ranking(lambda users: scores[users], known=none, relevant=relevant, num_items=4, ks=(2,))
    assert result.per_user["recall@2"][0] == 0.5  # places 2 and 3 are one tied group


@pytest.mark.parametrize("ties", [False, True])
def test_results_do_not_depend_on_the_block_size(ties):
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(67, 40)).astype(np.float32)
    scores = np.round(scores) if ties else scores
    role = rng.choice(3, scores.shape, p=[0.7, 0.2, 0.1])
    arguments = dict(known=sp.csr_matrix(role == 1), relevant=sp.csr_matrix(role == 2), num_items=40)
    results = [evaluate_ranking(lambda users: scores[users], block=b, **arguments) for b in (1, 8, 67, 256)]
    for other in results[1:]:
        assert other.means() == results[0].means() and other.buckets == results[0].buckets
        for metric, values in results[0].per_user.items():
            np.testing.assert_array_equal(values, other.per_user[metric])
    shapes = []
    evaluate_ranking(lambda users: shapes.append(users.shape) or scores[users], block=8, **arguments)
    assert set(shapes) == {(8,)}


@pytest.mark.parametrize("num_items", [90, 700, 701])
def test_among_many_items_equal_scores_keep_their_order_and_are_counted(num_items):
    rng = np.random.default_rng(num_items)
    scores = rng.integers(0, 12, (9, num_items)).astype(np.float32)
    scores[:3] += rng.normal(size=(3, num_items)).astype(np.float32)  # no ties
    scores[3:5, 5:] = -50.0  # fewer candidates ahead of the rest than places
    scores[5, 2:] = -np.inf  # candidates all the same
    lowest = np.maximum(scores, np.finfo(np.float32).min)
    role = rng.choice(3, scores.shape, p=[0.6, 0.3, 0.1])
    candidates = rng.random(num_items) < 0.9
    allowed = (role != 1) & candidates
    arguments = dict(known=sp.csr_matrix(role == 1), num_items=num_items, candidates=candidates, block=4)
    items, values = top_k(lambda users: scores[users], users=np.arange(9), k=7, **arguments)
    order = np.argsort(-np.where(allowed, lowest, -np.inf), axis=1, kind="stable")[:, :7]
    np.testing.assert_array_equal(items, order)
    np.testing.assert_array_equal(values, np.take_along_axis(lowest, order, axis=1))
    found = evaluate_ranking(lambda users: scores[users], relevant=sp.csr_matrix(role == 2), ks=(7,), **arguments)
    for n, user in enumerate(found.users):
        mine = np.where(allowed[user], lowest[user], -np.inf)
        wanted = np.flatnonzero((role[user] == 2) & candidates)
        # An item with a better ones ahead of it and s equal ones, itself included, is listed with this probability.
        chance = [np.clip((7 - (mine > mine[i]).sum()) / (mine == mine[i]).sum(), 0, 1) for i in wanted]
        assert found.per_user["recall@7"][n] == pytest.approx(np.mean(chance), abs=1e-12)


def test_the_judge_agrees(shared, tmp_path):
    rng = np.random.default_rng(1)
    num_users, num_items = 40, 60
    scores = rng.normal(size=(num_users, num_items)).astype(np.float32)
    role = rng.choice(3, scores.shape, p=[0.6, 0.3, 0.1])
    known, relevant = sp.csr_matrix(role == 1), sp.csr_matrix(role == 2)
    candidates = rng.random(num_items) < 0.7
    arguments = dict(known=known, num_items=num_items, candidates=candidates, block=16)
    result = evaluate_ranking(lambda users: scores[users], relevant=relevant, **arguments)
    items, values = top_k(lambda users: scores[users], users=np.arange(num_users), k=20, **arguments)

    def write(name, header, rows):
        (tmp_path / name).write_text("\n".join(["\t".join(header), *("\t".join(map(str, r)) for r in rows)]) + "\n")

    write("known.tsv", ("user_id", "item_id"), zip(*known.nonzero()))
    write("test.tsv", ("user_id", "item_id"), zip(*relevant.nonzero()))
    (tmp_path / "candidates.txt").write_text("".join(f"{i}\n" for i in np.flatnonzero(candidates)))
    ranked = [(u, items[u, n], n + 1, values[u, n]) for u in range(num_users) for n in range(20) if items[u, n] >= 0]
    write("ranked.tsv", ("user_id", "item_id", "rank", "score"), ranked)
    judge = subprocess.run(
        [sys.executable, shared / "peers/eval_ranked.py", "ranked.tsv", "--known", "known.tsv", "--test", "test.tsv",
         "--candidates", "candidates.txt"], cwd=tmp_path, capture_output=True, text=True, check=True,
    )
    verdict = dict(line.split("\t") for line in judge.stdout.splitlines())
    assert int(verdict.pop("users")) == len(result.users)
    assert len(verdict) == 10
    for metric, value in verdict.items():
        assert f"{result.means()[metric]:.4f}" == value, metric


def test_warm_and_cold_are_ranked_apart_and_popularity_cuts_items():
    rng = np.random.default_rng(2)
    num_users, num_items = 30, 24
    scores = rng.normal(size=(num_users, num_items)).astype(np.float32)
    fit = rng.random(scores.shape) < np.linspace(0.05, 0.6, num_items)
    fit[:, :6] = False  # nobody has touched these
    fit[:3] = False  # and these users touched nothing
    relevant = (rng.random(scores.shape) < 0.2) & ~fit
    arguments = dict(known=sp.csr_matrix(fit), num_items=num_items)
    whole = evaluate_ranking(lambda users: scores[users], relevant=sp.csr_matrix(relevant), **arguments)
    cold_only = fit.sum(0) == 0
    for side, mask in ((whole.cold, cold_only), (whole.warm, ~cold_only)):
        alone = evaluate_ranking(
            lambda users: scores[users], relevant=sp.csr_matrix(relevant & mask), candidates=mask, **arguments
        )
        assert side.num_candidates == mask.sum()
        np.testing.assert_array_equal(side.users, alone.users)
        assert side.means() == alone.means()

    level = levels(fit.sum(0))
    for name, n in (("low", 1), ("middle", 2), ("high", 3)):
        bucket = whole.buckets["item_popularity"][name]
        recalls = []
        for user in range(num_users):
            wanted = set(np.flatnonzero(relevant[user] & (level == n)))
            ranked = sorted(np.flatnonzero(~fit[user]), key=lambda i: -scores[user, i])
            if wanted:
                recalls.append(len(wanted & set(ranked[:10])) / len(wanted))
        assert bucket["recall@10"] == pytest.approx(np.mean(recalls), abs=1e-12)
        assert bucket["users"] == len(recalls) and bucket["items"] == (level == n).sum()
    activity = whole.buckets["user_activity"]
    assert activity["none"]["users"] == np.isin(whole.users, [0, 1, 2]).sum()
    assert sum(b["users"] for b in activity.values()) == len(whole.users)
    assert sum(b["users"] * b["ndcg@10"] for b in activity.values()) / len(whole.users) == pytest.approx(
        whole.means()["ndcg@10"]
    )


def test_scores_may_come_sharded_over_the_devices():
    scores, known, relevant = world(5, num_users=16, num_items=24, num_levels=9)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", "model"))
    arguments = dict(known=known, relevant=relevant, num_items=24, block=8)
    here = evaluate_ranking(lambda users: scores[users], **arguments)
    there = evaluate_ranking(lambda users: jax.device_put(scores[users], sharding), **arguments)
    assert here.means() == there.means()


def test_levels_share_equal_counts():
    assert levels(np.array([0, 1, 1, 1, 2, 5, 9])).tolist() == [0, 1, 1, 1, 2, 3, 3]
    assert levels(np.zeros(3, int)).tolist() == [0, 0, 0]


def test_top_k_orders_by_score_then_row_and_pads_short_lists():
    scores = np.array([[1, 3, 3, 0], [2, 2, 2, 2]], np.float32)
    known = sp.csr_matrix(np.array([[0, 0, 0, 1], [1, 0, 0, 0]]))
    items, values = top_k(
        lambda users: scores[users], users=np.array([1, 0]), known=known, num_items=4, k=6,
        candidates=np.array([1, 1, 1, 0], bool), block=1,
    )
    assert items.tolist() == [[1, 2, -1, -1, -1, -1], [1, 2, 0, -1, -1, -1]]
    assert np.isneginf(values[1, 3:]).all() and values[1, :3].tolist() == [3, 3, 1]


def test_bad_input_is_named():
    scores = np.ones((2, 3), np.float32)
    relevant = sp.csr_matrix(np.array([[1, 0, 0], [0, 0, 0]]))
    none = sp.csr_matrix((2, 3))
    with pytest.raises(KgrecError, match="1 held-out pairs that the users already know"):
        evaluate_ranking(lambda users: scores[users], known=relevant, relevant=relevant, num_items=3)
    with pytest.raises(KgrecError, match="no user with a held-out item"):
        evaluate_ranking(lambda users: scores[users], known=none, relevant=none, num_items=3)
    broken = scores.copy()
    broken[0, 2] = np.nan
    with pytest.raises(KgrecError, match="user row 0: found NaN"):
        evaluate_ranking(lambda users: broken[users], known=none, relevant=relevant, num_items=3)
    with pytest.raises(KgrecError, match="user row 0: found NaN"):
        top_k(lambda users: broken[users], users=np.arange(2), known=none, num_items=3, k=2)
    with pytest.raises(ValueError, match=r"gave \(3, 1\)"):
        evaluate_ranking(lambda users: scores[users].T, known=none, relevant=relevant, num_items=3)
