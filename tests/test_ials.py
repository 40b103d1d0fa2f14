"""iALS against solves in plain NumPy, SLIM against its optimality conditions, and rows found by histories."""

import numpy as np
import pytest
import scipy.sparse as sp

from kgrec_jax.linear import least_squares
from kgrec_jax.linear.ials import Settings, ials
from kgrec_jax.linear.least_squares import outer_sum, padded, solve_rows
from kgrec_jax.linear.parts import UserFactors, history_marks
from kgrec_jax.linear.slim import skip_reason, slim


def random_log(users, items, share=0.2, seed=0):
    rng = np.random.default_rng(seed)
    dense = (rng.random((users, items)) < share).astype(np.float32)
    dense[:, -1] = 0  # a cold item
    dense[0] = 0  # a user without history
    return sp.csr_matrix(dense)


def solved(dense, table, shared, ridge):
    """The same row by row in float64."""
    out = np.zeros((len(dense), table.shape[1]))
    for u, row in enumerate(dense):
        own = table[row > 0].astype(np.float64)
        if len(own):
            out[u] = np.linalg.solve(own.T @ own + shared + ridge[u] * np.eye(table.shape[1]), own.sum(0))
    return out


@pytest.mark.parametrize("long, group", [(1024, 1 << 22), (32, 128)])
def test_rows_of_every_length_are_solved(monkeypatch, long, group):
    """Also where a row is cut into pieces and rows are cut into groups."""
    monkeypatch.setattr(least_squares, "LONG", long)
    monkeypatch.setattr(least_squares, "_GROUP", group)
    rng = np.random.default_rng(1)
    dense = (rng.random((37, 150)) < rng.random((37, 1))).astype(np.float32)
    dense[3], dense[5] = 0, 1
    table = rng.normal(size=(150, 4)).astype(np.float32)
    shared, ridge = np.asarray(0.1 * outer_sum(table)), rng.uniform(1, 3, 37)
    found = np.asarray(solve_rows(sp.csr_matrix(dense), padded(table), shared, ridge))
    np.testing.assert_allclose(found[:-1], solved(dense, table, shared, ridge), atol=2e-5)
    assert not found[-1].any() and not found[3].any()


@pytest.mark.parametrize("exponent", [1.0, 0.5])
def test_ials_is_the_alternation_of_the_formula(exponent):
    log = random_log(40, 23)
    cfg = Settings(dim=5, l2=0.05, unobserved=0.2, exponent=exponent, iterations=3)
    part = ials(log, cfg, seed=4)
    dense = log.toarray()
    items = np.random.default_rng(4).normal(0, 0.1 / np.sqrt(5), (23, 5)).astype(np.float32)
    items[-1] = 0
    user_ridge = 0.05 * (dense.sum(1) + 0.2 * 22) ** exponent
    item_ridge = 0.05 * (dense.sum(0) + 0.2 * 39) ** exponent
    for _ in range(3):
        users = solved(dense, items, 0.2 * items.T @ items, user_ridge)
        items = solved(dense.T, users, 0.2 * users.T @ users, item_ridge)
    users = solved(dense, items, 0.2 * items.T @ items, user_ridge)
    np.testing.assert_allclose(part.scores(log), users @ items.T, atol=1e-4)
    assert part.known.sum() == 22 and not part.known[-1] and not part.items[-1].any()


def test_a_step_of_ials_lowers_its_objective():
    log = random_log(50, 30, seed=2)
    dense = log.toarray()

    def objective(iterations):
        part = ials(log, Settings(8, 0.02, 0.3, 1.0, iterations))
        users, items = part.user_vectors(log), part.items
        fitted = users @ items.T
        return (dense * (fitted - 1) ** 2).sum() + 0.3 * np.square(fitted).sum() + 0.02 * (
            ((dense.sum(1) + 0.3 * 29) * np.square(users).sum(1)).sum()
            + ((dense.sum(0) + 0.3 * 49) * np.square(items).sum(1)).sum())

    values = [objective(n) for n in (1, 2, 4, 8)]
    assert all(later < before for before, later in zip(values, values[1:]))


def test_new_users_are_folded_in_and_addends_add_up():
    log = random_log(60, 20, seed=3)
    part = ials(log, Settings(dim=6, iterations=4))
    scores = part.scores(log)
    np.testing.assert_allclose(part.scores(log[7:9]), scores[7:9], atol=1e-5)  # a block of any size
    items = log[7].indices
    for candidate in (0, 11):
        addends = part.contributions(items, candidate)
        assert addends.shape == items.shape
        assert addends.sum() == pytest.approx(scores[7, candidate], abs=1e-4)
    assert not part.scores(log[:1]).any() and part.scores(log[:0]).shape == (0, 20)


def test_ials_goes_on_from_what_it_kept(tmp_path):
    log, cfg, told = random_log(40, 23), Settings(dim=4, iterations=4), []
    whole = ials(log, cfg)
    file = tmp_path / "ials.npz"

    def breaks(count):
        told.append(count)
        if len(told) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ials(log, cfg, keep=file, advance=breaks)
    again = []
    part = ials(log, cfg, keep=file, advance=again.append)
    assert again == [2, 1, 1]
    np.testing.assert_array_equal(part.items, whole.items)
    other = random_log(40, 23, seed=9)  # of another log: from the beginning
    np.testing.assert_array_equal(ials(other, cfg, keep=file).items, ials(other, cfg).items)
    file.write_bytes(b"PK cut short")
    np.testing.assert_array_equal(ials(log, cfg, keep=file).items, whole.items)


def test_ials_finds_planted_groups():
    rng = np.random.default_rng(5)
    group, liked = np.arange(40) % 4, rng.integers(4, size=120)
    dense = (rng.random((120, 40)) < np.where(liked[:, None] == group[None], 0.5, 0.02)).astype(np.float32)
    scores = ials(sp.csr_matrix(dense), Settings(dim=8)).scores(sp.csr_matrix(dense))
    scores[dense > 0] = -np.inf
    some = ((liked[:, None] == group[None]) & (dense == 0)).any(1)
    assert (group[scores.argmax(1)] == liked)[some].mean() > 0.95


# --- SLIM ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("l1, l2", [(0.0, 2.0), (0.5, 4.0), (2.0, 0.5)])
def test_slim_is_the_optimum(l1, l2):
    """The gradient of the smooth part is λ below zero where a weight is positive, and no lower where it is zero."""
    log = random_log(80, 70, seed=6)
    weights = slim(log, l1, l2, tolerance=1e-7, passes=2000).weights
    dense = weights.toarray().astype(np.float64)
    x = log.toarray().astype(np.float64)
    gradient = x.T @ (x @ dense - x) + l2 * dense + l1
    off = ~np.eye(70, dtype=bool)
    assert sp.issparse(weights) and (dense >= 0).all() and not np.diag(dense).any()
    assert np.abs(gradient[(dense > 0)]).max() < 1e-3
    assert gradient[(dense == 0) & off].min() > -1e-3
    assert not dense[:, -1].any() and not dense[-1].any()  # a cold item


def test_slim_in_chunks_of_columns_is_the_same(monkeypatch):
    from kgrec_jax.linear import slim as module

    log = random_log(80, 70, seed=6)
    whole = slim(log, 0.5, 4.0, tolerance=1e-6).weights.toarray()
    monkeypatch.setattr(module, "_COLUMNS", 32)
    told = []
    np.testing.assert_allclose(slim(log, 0.5, 4.0, tolerance=1e-6, advance=told.append).weights.toarray(), whole,
                               atol=1e-5)
    assert told == [32, 32, 6]
    assert not skip_reason(10_000) and "12,000 items" in skip_reason(12_000)


# --- rows of users ---------------------------------------------------------------------------------------------------


def test_a_training_history_finds_its_row_and_another_is_encoded():
    log = random_log(30, 20, 0.4, seed=7)
    marks = history_marks(log)
    np.testing.assert_array_equal(marks[3:5], history_marks(log[3:5]))
    assert len(np.unique(marks)) == 30 and marks[0] == 0  # nothing touched
    rng = np.random.default_rng(8)
    users, items, encode = (rng.normal(size=(n, 3)).astype(np.float32) for n in (30, 20, 20))
    order = np.argsort(marks[1:]) + 1
    part = UserFactors(users[order], marks[order], items, encode, np.ones(20, bool))
    np.testing.assert_allclose(part.scores(log)[1:], users[1:] @ items.T, atol=1e-5)
    new = sp.csr_matrix(np.eye(20, dtype=np.float32)[[3]] + np.eye(20, dtype=np.float32)[[5]])
    np.testing.assert_allclose(part.scores(new)[0], (encode[3] + encode[5]) / np.sqrt(2) @ items.T, atol=1e-5)
    assert not part.scores(log[:1]).any()
