"""Logs with several behaviours: what each is worth, which row of a pair counts, and what is refused."""

import numpy as np
import pytest

from kgrec_jax.data.folder import DataConfig, read_folder
from kgrec_jax.errors import KgrecError

ROWS = [("u", "a", "view", 1), ("u", "a", "purchase", 2), ("u", "a", "view", 3), ("u", "b", "view", 4),
        ("v", "b", "purchase", 5), ("v", "c", "view", 6), ("v", "c", "view", 8)]


def write(folder, rows=ROWS, header="user_id\titem_id\tbehaviour\ttimestamp"):
    folder.mkdir(exist_ok=True)
    (folder / "interactions.tsv").write_text("\n".join([header, *("\t".join(map(str, row)) for row in rows)]) + "\n")
    return folder


def test_the_row_of_most_weight_counts_and_its_weight_is_the_rating(tmp_path):
    data = read_folder(write(tmp_path / "x"), DataConfig(behaviours=("view=0.2", "purchase=1")))
    log = data.interactions
    found = {(data.user_ids[u], data.item_ids[i]): (round(float(r), 3), int(t))
             for u, i, r, t in zip(log.user, log.item, log.rating, log.timestamp)}
    assert found == {("u", "a"): (1.0, 2), ("u", "b"): (0.2, 4), ("v", "b"): (1.0, 5), ("v", "c"): (0.2, 8)}
    assert data.has_ratings and any("3 rows repeat a pair" in n and "most weight" in n for n in data.notes)


def test_without_the_field_nothing_is_read_of_them(tmp_path):
    data = read_folder(write(tmp_path / "x"))
    log = data.interactions
    assert not data.has_ratings and (log.rating == 1).all() and 3 in log.timestamp
    assert any("columns not used: behaviour" in n for n in data.notes)


def test_weights_multiply_ratings_and_the_last_row_wins_without_timestamps(tmp_path):
    rows = [("u", "a", "view", 4), ("u", "a", "view", 2), ("u", "b", "purchase", 3)]
    folder = write(tmp_path / "x", rows, "user_id\titem_id\tbehaviour\trating")
    data = read_folder(folder, DataConfig(behaviours=("view=0.5", "purchase=1"), min_rating=1.5))
    np.testing.assert_allclose(sorted(data.interactions.rating), [1.0, 3.0])


@pytest.mark.parametrize("words, said", [
    (("view",), "data.behaviours: found 'view', expected NAME=WEIGHT"), (("view=x",), "found 'view=x'"),
    (("view=0",), "found 'view=0'"), (("view=1", "view=2"), "found 'view=2'"), (("=1",), "found '=1'"),
    (("view=nan",), "found 'view=nan'"),
    (("view=1",), r"interactions.tsv:3: found the behaviour 'purchase', expected one of view")])
def test_bad_weights_are_named(tmp_path, words, said):
    with pytest.raises(KgrecError, match=said):
        read_folder(write(tmp_path / "x"), DataConfig(behaviours=words))


def test_a_log_without_the_column_is_refused(tmp_path):
    folder = write(tmp_path / "x", [("u", "a")], "user_id\titem_id")
    with pytest.raises(KgrecError, match="data.behaviours: found view for .* has no column behaviour"):
        read_folder(folder, DataConfig(behaviours=("view=1",)))
