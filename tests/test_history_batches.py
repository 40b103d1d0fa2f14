"""The towers' batches: what is shown and told at which place, and that each is a function of (seed, step)."""

import jax
import numpy as np
import pytest

from kgrec_jax.data.dataset import Interactions
from kgrec_jax.data.history_batches import MASKED, CandidateBatches, HistoryBatches, PlaceBatches, Sequences

ITEMS = 60


def make_log(lengths, seed=0, timestamps=True):
    """Users with so many items, their rows in any order."""
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(len(lengths)), lengths).astype(np.int32)
    item = np.concatenate([rng.permutation(ITEMS)[:n] for n in lengths]).astype(np.int32)
    time = np.concatenate([np.arange(n) for n in lengths]).astype(np.int64)
    log = Interactions(user, item, rng.integers(1, 6, len(user)).astype(np.float32), time)
    log = log.take(rng.permutation(len(log)))
    return log if timestamps else Interactions(log.user, log.item, log.rating, np.zeros(len(log), np.int64))


def ordered(log, user):
    rows = np.flatnonzero(log.user == user)
    return log.item[rows[np.argsort(log.timestamp[rows], kind="stable")]].tolist()


def next_item(log, **changes):
    return PlaceBatches.of(log, "next-item", **{"num_steps": 50, "batch": 8, "max_history": 10, **changes})


def cloze(log, **changes):
    return PlaceBatches.of(log, "cloze", **{"num_steps": 50, "batch": 8, "max_history": 10, **changes})


def hidden(log, **changes):
    return HistoryBatches.of(log, **{"num_steps": 50, "batch": 8, "max_history": 10, **changes})


@pytest.mark.parametrize("timestamps", [True, False])
def test_next_item_tells_what_follows_at_every_place(timestamps):
    log = make_log([5, 1, 9, 30, 2], timestamps=timestamps)
    users = {tuple(ordered(log, u)) for u in range(5)}
    source, seen = next_item(log), set()
    for step in range(50):
        batch = source[step]
        assert batch.history.shape == batch.targets.shape == (8, 10)
        for history, place, targets, weights in zip(batch.history, batch.place, batch.targets, batch.weights):
            there = history >= 0
            assert (np.diff(there.astype(int)) >= 0).all() and there[-1]  # right in its row
            window = [*history[there].tolist(), int(targets[-1])]
            assert any(window == list(u[n:n + len(window)]) for u in users for n in range(len(u)))
            np.testing.assert_array_equal(targets[there], window[1:])
            np.testing.assert_array_equal(weights, there.astype(np.float32))
            np.testing.assert_array_equal(place[there], np.flatnonzero(there))
            seen |= set(zip(window[:-1], window[1:]))
    assert seen == {pair for u in users for pair in zip(u[:-1], u[1:])}  # long histories are read from end to end


def test_cloze_tells_what_is_masked_and_nothing_else():
    log = make_log([5, 1, 9, 30, 2])
    users = [ordered(log, u) for u in range(5)]
    source, alone = cloze(log, mask_share=0.4, num_steps=200), 0
    assert source.max_targets == 4
    for step in range(200):
        batch = source[step]
        for history, place, targets, weights in zip(batch.history, batch.place, batch.targets, batch.weights):
            told, filled = targets >= 0, history.copy()
            assert (history == MASKED).sum() == told.sum() > 0 and (history[place[told]] == MASKED).all()
            filled[place[told]] = targets[told]
            window = filled[filled >= 0].tolist()
            assert any(window == u[n:n + len(window)] for u in users for n in range(len(u)))
            np.testing.assert_array_equal(weights, told.astype(np.float32))
            alone += len(window) == 10 and told.sum() == 1 and place[-1] == 9
    assert alone > 10


@pytest.mark.parametrize("make", [next_item, cloze, hidden])
def test_a_batch_is_a_function_of_seed_and_step(make):
    log = make_log([5, 4, 9, 30, 2, 7, 8, 3, 3, 11])
    popularity = np.bincount(log.item, minlength=ITEMS)
    sources = [CandidateBatches.of(make(log, seed=seed), popularity, 6, 0.75) for seed in (1, 1, 2)]
    same, again, other = ([source[step] for step in (7, 3, 7)] for source in sources)
    jax.tree.map(np.testing.assert_array_equal, same, again)
    jax.tree.map(np.testing.assert_array_equal, same[0], same[2])
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(same[0]), jax.tree.leaves(other[0])))


def test_users_with_one_item_have_no_next_one():
    source = next_item(make_log([1, 1, 3]), batch=2)
    assert len(source.users) == 1 and (source[0].weights.sum(1) == 2).all()
    nobody = next_item(make_log([1, 1]), batch=2)
    assert not nobody[0].weights.any() and (nobody[0].history == -1).all() and nobody.max_history == 1


def test_ratings_weigh_the_targets():
    log = make_log([6, 9, 4])
    weight = log.rating / log.rating.mean()
    of = {(u, i): w for u, i, w in zip(log.user.tolist(), log.item.tolist(), weight.tolist())}
    users = [tuple(ordered(log, u)) for u in range(3)]
    batch = next_item(log, weight=weight, batch=3)[0]
    for history, targets, weights in zip(batch.history, batch.targets, batch.weights):
        user = next(n for n, u in enumerate(users) if set(targets[targets >= 0]) <= set(u))
        for target, w in zip(targets, weights):
            assert w == pytest.approx(of[user, int(target)] if target >= 0 else 0.0)
    share = hidden(log, weight=weight, batch=3)[0]
    np.testing.assert_allclose(share.weights.sum(1), 1.0, rtol=1e-6)
    assert len(np.unique(share.weights[share.weights > 0])) > 2
    flat = hidden(log, weight=np.full(len(log), 2.5, np.float32), batch=3)[0]
    jax.tree.map(np.testing.assert_array_equal, flat, hidden(log, batch=3)[0])
    nothing = hidden(log, weight=np.zeros(len(log), np.float32), batch=3)[0]
    assert not nothing.weights.any()


# --- drawn candidates ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [next_item, cloze, hidden])
@pytest.mark.parametrize("lengths", [[40, 30], [5, 4, 9, 30, 2, 7, 8, 3, 3, 11], [60, 60, 60]])
def test_rows_hold_every_item_of_a_step(make, lengths):
    log = make_log(lengths)
    source = make(log, batch=2 if len(lengths) < 5 else 8)
    drawn = CandidateBatches.of(source, np.bincount(log.item, minlength=ITEMS), 4, 0.75)
    assert drawn.num_rows <= len(np.unique(log.item))
    for step in range(50):
        batch, told = drawn[step], source[step]
        assert batch.rows.shape == (drawn.num_rows,) and batch.candidates.shape == (4,)
        used = batch.rows[batch.rows >= 0]
        assert (np.diff(used) > 0).all() and (batch.rows[len(used):] == -1).all()
        for name in ("history", "targets"):
            here, there = getattr(batch.told, name), getattr(told, name)
            np.testing.assert_array_equal(np.where(here >= 0, batch.rows[np.maximum(here, 0)], here), there)


def test_candidates_are_drawn_as_they_say():
    log = make_log([40] * 30, seed=4)
    log = log.take(np.flatnonzero((log.item % 7 != 3) | (log.user < 3)))
    popularity = np.bincount(log.item, minlength=ITEMS)
    popularity[[5, 59]] = 0  # as if nobody had touched them
    drawn = CandidateBatches.of(hidden(log.take(~np.isin(log.item, [5, 59])), num_steps=400), popularity, 50, 0.5)
    count = np.zeros(ITEMS)
    for step in range(400):
        batch = drawn[step]
        np.add.at(count, batch.rows[batch.candidates], 1)
        log_q = batch.log_q[batch.candidates]
        np.testing.assert_allclose(log_q, drawn.log_q[batch.rows[batch.candidates]])
    share = np.sqrt(popularity) / np.sqrt(popularity).sum()
    np.testing.assert_allclose(np.exp(drawn.log_q), share, rtol=1e-5)
    assert not count[[5, 59]].any()
    np.testing.assert_allclose(count / count.sum(), share, atol=5 * np.sqrt(share.max() / 20_000))


def test_sizes_are_rounded_up_to_the_devices():
    log = make_log([9, 8, 7])
    drawn = CandidateBatches.of(hidden(log, batch=8), np.bincount(log.item, minlength=ITEMS), 5, 0.75, multiple=8)
    assert drawn.candidates == 8 and drawn.num_rows % 8 == 0 and len(drawn[0].candidates) == 8


def test_sequences_follow_time_then_rows():
    log = Interactions(np.array([1, 0, 1, 1], np.int32), np.array([4, 2, 3, 5], np.int32), np.ones(4, np.float32),
                       np.array([7, 0, 2, 7]))
    held = Sequences.of(log, np.array([1.0, 2.0, 3.0, 4.0]))
    assert [held.of_user(n)[0].tolist() for n in range(2)] == [[2], [3, 4, 5]]
    assert [held.of_user(n)[1].tolist() for n in range(2)] == [[2.0], [3.0, 1.0, 4.0]]
    assert len(held.at_least(2)) == 1 and held.at_least(2).of_user(0)[0].tolist() == [3, 4, 5]
    assert len(held.at_least(9)) == 2
