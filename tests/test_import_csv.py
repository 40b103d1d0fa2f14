"""Logs and item tables as they are published become a dataset folder that reads back to what they said."""

import datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from kgrec_jax.data.folder import DataConfig, read_folder
from kgrec_jax.data.importers.csv import CsvColumns, import_csv
from kgrec_jax.errors import KgrecError

MOVIELENS = {
    "ratings.csv": "userId,movieId,rating,timestamp\n1,007,4.0,964982703\n1,2,3.5,964981247\n2,2,1.0,964982224\n",
    "movies.csv": 'movieId,title,genres\n007,"Heat, The (1995)",Action|Crime\n2,"A ""B"" C",(no genres listed)\n3,卧虎藏龙 '
    '(2000),Action\n',
    "tags.csv": "userId,movieId,tag,timestamp\n1,2,funny,1139045764\n",
    "links.csv": "movieId,imdbId,tmdbId\n007,0113277,949\n",
    "users.csv": "userId,age\n1,30\n2,40\n3,50\n",
}


def write(folder, files):
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "ml", MOVIELENS)


def test_movielens_folder(source, tmp_path):
    notes = import_csv(source, tmp_path / "out")
    data = read_folder(tmp_path / "out", DataConfig())
    assert data.item_ids == ("007", "2", "3") and data.user_ids == ("1", "2", "3")
    assert data.item_names == ("Heat, The (1995)", 'A "B" C', "卧虎藏龙 (2000)")
    assert data.item_texts[0] == "Heat, The (1995). genres: Action, Crime" and data.item_texts[1] == 'A "B" C'
    assert data.interactions.rating.tolist() == [4, 3.5, 1]
    assert data.interactions.timestamp.tolist() == [964982703, 964981247, 964982224]
    graph = data.graph
    facts = {(graph.entity_ids[h], graph.relation_ids[r], graph.entity_ids[t]) for h, r, t in graph.triples}
    assert facts == {("007", "genre", "genre/Action"), ("007", "genre", "genre/Crime"), ("3", "genre", "genre/Action"),
                     ("007", "release_year", "release_year/1995"), ("3", "release_year", "release_year/2000")}
    assert set(graph.entity_names[3:]) == {"Action", "Crime", "1995", "2000"}
    assert {"tags.csv: not read", "links.csv: not read"} <= set(notes) and any("userId as user_id" in n for n in notes)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ml", "out"]


def test_log_alone_and_item_table_beside_it(source, tmp_path):
    import_csv(source / "ratings.csv", tmp_path / "log")
    assert [p.name for p in (tmp_path / "log").iterdir()] == ["interactions.tsv"]
    assert read_folder(tmp_path / "log", DataConfig()).item_ids == ("007", "2")
    import_csv(source / "ratings.csv", tmp_path / "both", items=source / "movies.csv")
    assert read_folder(tmp_path / "both", DataConfig()).num_items == 3


def test_dates_parquet_and_other_names(tmp_path):
    source = tmp_path / "shop"
    source.mkdir()
    days = [datetime.datetime(2020, 1, 1), datetime.datetime(1970, 1, 2)]
    pa.parquet.write_table(pa.table({"reviewer_id": [1, 2], "parent_asin": ["B1", "B2"], "overall": [5, 1], "date": days,
                                     "verified": [True, False]}), source / "reviews.parquet")
    pa.parquet.write_table(pa.table({"parent_asin": ["B1", "B2"], "name": ["Pen", "Ink"], "categories": [["Office", "Art"], None],
                                     "price": [1.5, None]}), source / "meta.parquet")
    notes = import_csv(source, tmp_path / "out")
    data = read_folder(tmp_path / "out", DataConfig())
    assert data.interactions.timestamp.tolist() == [1577836800, 86400] and data.interactions.rating.tolist() == [5, 1]
    assert data.item_names == ("Pen", "Ink") and "price: 1.5" in data.item_texts[0] and "Office" in data.item_texts[0]
    assert any("columns not used: verified" in n for n in notes) and len(data.graph.triples) == 2

    for name, dates in (("plain", ("2020-01-01", "1970-01-02 00:00:00.75")),
                        ("zoned", ("2020-01-01T00:00:00Z", "1970-01-02T01:00:00+01:00")),
                        ("kaggle", ("2020-01-01 00:00:00 UTC", "1970-01-02 00:00:00 UTC"))):
        path = tmp_path / f"{name}.tsv"
        path.write_text("who\twhat\twhen\n" + "".join(f"u\ti{n}\t{d}\n" for n, d in enumerate(dates)))
        import_csv(path, tmp_path / name, columns=CsvColumns(user="who", item="what", timestamp="when"))
        assert read_folder(tmp_path / name, DataConfig()).interactions.timestamp.tolist() == [1577836800, 86400]


def test_splits(source, tmp_path):
    split = write(tmp_path / "split", {"train.tsv": "user_id\titem_id\n1\t007\n", "test.tsv": "user_id\titem_id\n9\t3\n"})
    import_csv(source, tmp_path / "out", split)
    data = read_folder(tmp_path / "out", DataConfig())
    assert data.has_fixed_split and data.part.tolist() == [0, 2] and data.num_items == 3
    own = write(tmp_path / "own", {"train.csv": "user,item\na,1\n", "valid.csv": "user,item\na,2\n", "test.csv": "user,item\na,3\n"})
    import_csv(own, tmp_path / "out2")
    data = read_folder(tmp_path / "out2", DataConfig())
    assert data.part.tolist() == [0, 1, 2] and data.has_fixed_valid
    with pytest.raises(KgrecError, match="expected train.tsv, test.tsv"):
        import_csv(source, tmp_path / "out3", source)


def test_many_rows_read_back(tmp_path):
    rng = np.random.default_rng(0)
    pairs = np.unique(rng.integers(0, 500, (20_000, 2)), axis=0)
    times = rng.integers(10**9, 2 * 10**9, len(pairs))
    rows = "".join(f"{u},{i},{t}\n" for (u, i), t in zip(pairs, times))
    (tmp_path / "log.csv").write_text("user,item,timestamp\n" + rows)
    import_csv(tmp_path / "log.csv", tmp_path / "out")
    data = read_folder(tmp_path / "out", DataConfig())
    log = data.interactions
    read = zip((int(data.user_ids[u]) for u in log.user), (int(data.item_ids[i]) for i in log.item), log.timestamp.tolist())
    assert list(read) == [(*pair, t) for pair, t in zip(pairs.tolist(), times.tolist())]


BAD = {
    "empty file": ({"ratings.csv": ""}, "ratings.csv: found an empty file"),
    "no header": ({"ratings.csv": "1,2,3.0,99\n2,2,1.0,99\n", "tags.csv": "a,b\n1,2\n"}, "no table with a user and an "
                  "item column"),
    "NaN rating": ({"ratings.csv": "userId,movieId,rating\n1,2,3\n1,3,nan\n"}, "ratings.csv:3: found an empty cell or "
                   "NaN in the column rating"),
    "word for a time": ({"ratings.csv": "userId,movieId,timestamp\n1,2,3\n1,3,noon\n"}, "ratings.csv:3: found 'noon' "
                        "in the column timestamp"),
    "wrong width": ({"ratings.csv": "userId,movieId,timestamp\n1,2,3\n1,3\n"}, "ratings.csv:3: found 2 fields, "
                    "expected 3"),
    "wrong encoding": ({"movies.csv": b"movieId,title\n007,Am\xe9lie\n"}, "movies.csv:2: found bytes that are not "
                       "UTF-8"),
    "unknown item": ({"ratings.csv": "userId,movieId\n1,2\n1,99\n"}, "ratings.csv:3: found the item '99'"),
    "item twice": ({"movies.csv": "movieId,title\n007,a\n2,b\n007,c\n"}, "movies.csv:4: found the movieId '007' a "
                   "second time"),
    "user twice": ({"users.csv": "userId\n1\n1\n"}, "users.csv:3: found the userId '1' a second time"),
    "two logs": ({"ratings.csv": "x,y\n1,2\n", "more.csv": MOVIELENS["tags.csv"]}, "found more.csv, tags.csv, expected "
                 "one log"),
}


@pytest.mark.parametrize("files, message", BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_writes_nothing(source, tmp_path, files, message):
    write(source, files)
    with pytest.raises(KgrecError) as error:
        import_csv(source, tmp_path / "out")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["ml"]


def test_bad_arguments(source, tmp_path):
    def message(*args, **kwargs):
        with pytest.raises(KgrecError) as error:
            import_csv(*args, **kwargs)
        return str(error.value)

    out = tmp_path / "out"
    assert "found no such file or folder" in message(tmp_path / "absent", out)
    (tmp_path / "ratings.dat").write_text("1::2::3\n")
    assert "expected .csv, .tsv or .parquet" in message(tmp_path / "ratings.dat", out)
    (tmp_path / "headless.tsv").write_text("196\t242\t3\t881250949\n")
    assert "headless.tsv:1: found the columns 196, 242" in message(tmp_path / "headless.tsv", out)
    assert "no .csv, .tsv or .parquet file" in message(write(tmp_path / "empty", {}), out)
    assert "columns.user: found 'viewer'" in message(source / "ratings.csv", out, columns=CsvColumns(user="viewer"))
    assert "expected one for the item" in message(source / "ratings.csv", out, items=source / "users.csv")
    assert not out.exists()
    (source / "notes.txt").write_text("keep")
    assert "choose another OUT" in message(source, source) and (source / "notes.txt").read_text() == "keep"
