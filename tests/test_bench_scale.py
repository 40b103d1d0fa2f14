"""The bench of scale: its log, the whole way through it, and the neighbours of a log that is too wide to be dense."""

import json

import numpy as np
import pytest
import scipy.sparse as sp

from kgrec_jax.bench.scale import lines
from kgrec_jax.bench.scale_log import LEAST, write_log
from kgrec_jax.cli import main
from kgrec_jax.data.folder import read_folder
from kgrec_jax.linear import neighbours
from kgrec_jax.linear.neighbours import item_knn, skip_reasons


def test_the_log_is_exact_skewed_and_the_same_again(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_log(tmp_path / name / "interactions.tsv", 2000, 400, 40_000, seed=3)
    file = (tmp_path / "a" / "interactions.tsv").read_bytes()
    assert file == (tmp_path / "b" / "interactions.tsv").read_bytes()
    data = read_folder(tmp_path / "a")
    assert (data.num_users, data.num_items, len(data.interactions)) == (2000, 400, 40_000)
    assert not data.notes and data.has_timestamps  # no pair twice
    log = data.interactions
    assert np.bincount(log.user).min() >= LEAST and np.bincount(log.user).max() <= 100
    touched = np.sort(np.bincount(log.item))[::-1]
    assert touched[:40].sum() > 3 * touched[-40:].sum()


def test_blocks_of_users_make_one_log(tmp_path, monkeypatch):
    monkeypatch.setattr("kgrec_jax.bench.scale_log._BLOCK", 3000)
    write_log(tmp_path / "interactions.tsv", 500, 200, 9_999)
    log = read_folder(tmp_path).interactions
    assert len(log) == 9_999 and len(np.unique(log.user)) == 500


@pytest.mark.parametrize("interactions", [9, 2_000])
def test_sizes_that_no_log_has(tmp_path, capsys, interactions):
    assert main(["bench", "scale", "--users", "100", "--items", "50", "--interactions", str(interactions), "--folder",
                 str(tmp_path)]) == 2
    assert "--interactions: found" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.tsv*"))


@pytest.mark.slow
def test_the_whole_way(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # one device, as on the command line
    words = ["--users", "2000", "--items", "400", "--interactions", "40000", "--dim", "16", "--iterations", "2",
             "--steps", "20", "--batch", "64", "--candidates", "64", "--eval-users", "100", "--folder", str(tmp_path)]
    assert main(["bench", "scale", *words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["users"], result["items"], result["interactions"], result["ranked"]) == (2000, 400, 40_000, 100)
    assert list(result["phases"]) == ["read", "split", "ials", "tower", "evaluate"]
    assert all(phase["seconds"] > 0 and phase["peak_mb"] > 50 for phase in result["phases"].values())
    assert result["peak_mb"] == max(phase["peak_mb"] for phase in result["phases"].values())
    scores = result["ndcg@10"]
    assert set(scores) == {"popularity", "collaborative", "sequence"} and min(scores.values()) > 0
    assert result["skipped"] == {}
    assert [p.name for p in tmp_path.iterdir()] == ["scale-2000-400-40000-0"]  # the log alone is kept
    shown = "\n".join(lines(result | {"skipped": {"ease": "so many items"}}))
    assert "evaluate" in shown and "ease: skipped: so many items" in shown


def wide(seed=0, users=90, items=70):
    rng = np.random.default_rng(seed)
    return sp.csr_matrix((rng.random((users, items)) < 0.15).astype(np.float32))


def test_sparse_blocks_find_the_same_neighbours(monkeypatch):
    train = wide()
    dense = item_knn(train, 8)
    monkeypatch.setattr(neighbours, "_DENSE", 10)
    monkeypatch.setattr(neighbours, "_PRODUCTS", 500.0)  # several blocks, some of one candidate
    found = item_knn(train, 8)
    np.testing.assert_array_equal(found.known, dense.known)
    assert np.diff(found.weights.tocsc().indptr).max() == 8
    # Which of several equal ones is the last may differ, its similarity does not.
    a, b = (np.sort(x.weights.toarray(), axis=0) for x in (found, dense))
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_neighbours_are_left_out_of_a_log_that_takes_them_too_long(monkeypatch):
    train = wide()
    assert skip_reasons(train) == {}
    monkeypatch.setattr(neighbours, "ITEM_WORK", 1e3)
    assert "pairs of items" in skip_reasons(train)["item-knn"]
    monkeypatch.setattr(neighbours, "USER_WORK", 100.0)
    assert "90 users" in skip_reasons(train)["user-knn"]
