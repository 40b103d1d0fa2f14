"""Tables are read as written: no quoting in .tsv, RFC 4180 in .csv, types from the caller, errors with file and line."""

import datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from kgrec_jax.data.tables import Coded, find_table, read_header, read_table, write_tsv
from kgrec_jax.errors import KgrecError

LOG = {"user_id": "id", "item_id": "id"}
OPTIONAL = {"rating": "float", "timestamp": "int"}


def test_tsv_has_no_quotes_and_ids_stay_strings(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text('user_id\titem_id\trating\textra\n"007\t1\t4.5\tx\nNA\t"\t1\ty\n"007\t影片\t3\t"z\n', encoding="utf-8")
    table = read_table(path, LOG, OPTIONAL)
    assert table["user_id"].strings() == ['"007', "NA", '"007'] and table["user_id"].values == ['"007', "NA"]
    assert table["item_id"].strings() == ["1", '"', "影片"]
    assert table["rating"].tolist() == [4.5, 1, 3] and table.ignored == ("extra",) and "timestamp" not in table
    everything = read_table(path, LOG, rest_as_text=True)
    assert everything["extra"] == ["x", "y", '"z'] and everything["rating"] == ["4.5", "1", "3"]


def test_csv_follows_rfc_4180(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbfitem_id,title\r\n007,"A ""quoted"", title"\r\n8,"two\nlines"\r\n')
    table = read_table(path, {"item_id": "id", "title": "text"})
    assert table["item_id"].strings() == ["007", "8"] and table["title"] == ['A "quoted", title', "two\nlines"]


def test_parquet_says_the_same(tmp_path):
    day = datetime.datetime(2001, 9, 9, 1, 46, 40)
    pa.parquet.write_table(pa.table({
        "user_id": pa.array([7, 8], pa.int32()), "item_id": pa.array(["a", "b"]).dictionary_encode(),
        "rating": pa.array([4, 3], pa.int8()), "timestamp": pa.array([day, day], pa.timestamp("us")),
        "genres": pa.array([["x", "y"], None])}), tmp_path / "a.parquet")
    table = read_table(tmp_path / "a.parquet", LOG, OPTIONAL, rest_as_text=True)
    assert table["user_id"].strings() == ["7", "8"] and table["item_id"].values == ["a", "b"]
    assert table["timestamp"].tolist() == [1_000_000_000] * 2 and table["rating"].tolist() == [4.0, 3.0]
    assert table["genres"] == ["x, y", ""]


def test_whole_numbers_written_as_fractions(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("user_id\titem_id\ttimestamp\nu\ti\t881250949.0\nu\tj\t8.8e8\n")
    assert read_table(path, LOG, OPTIONAL)["timestamp"].tolist() == [881250949, 880000000]


def test_written_tables_read_back(tmp_path):
    codes = np.array([1, 0, 1], np.int32)
    write_tsv(tmp_path / "a.tsv", {"id": Coded(codes, ['"q', "007"]), "text": ["a\tb", "c\r\nd", "é 影"],
                                   "n": np.array([1, 2, 2**40]), "x": np.float32([0.5, 3, 1e-7])})
    assert len((tmp_path / "a.tsv").read_text(encoding="utf-8").splitlines()) == 4
    table = read_table(tmp_path / "a.tsv", {"id": "id", "text": "text", "n": "int", "x": "float"})
    assert table["id"].strings() == ["007", '"q', "007"] and table["text"] == ["a b", "c d", "é 影"]
    assert table["n"].tolist() == [1, 2, 2**40]
    np.testing.assert_array_equal(table["x"].astype(np.float32), np.float32([0.5, 3, 1e-7]))
    assert [p.name for p in tmp_path.iterdir()] == ["a.tsv"]


def test_blocks_share_one_code_book(tmp_path):
    """A file longer than one of pyarrow's blocks has a dictionary for each; the codes must be one column's all the same."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 1000, 400_000).astype(np.int32)
    values = [f"{'long' * 10}{v}" for v in range(1000)]
    write_tsv(tmp_path / "a.tsv", {"id": Coded(codes, values)})
    assert (tmp_path / "a.tsv").stat().st_size > 1 << 24
    column = read_table(tmp_path / "a.tsv", {"id": "id"})["id"]
    np.testing.assert_array_equal(np.array([int(v[40:]) for v in column.values])[column.codes], codes)


HEADER = "user_id\titem_id\trating\ttimestamp\n"
BAD = {
    "empty file": ("", "a.tsv: found an empty file"),
    "header alone": (HEADER, "a.tsv: found a header and no rows"),
    "missing column": ("user_id\trating\nu\t3\n", "a.tsv:1: found the columns user_id, rating, expected user_id, "
                       "item_id"),
    "recbole's header": ("user_id:token\titem_id:token\n", "kgrec data import recbole"),
    "column twice": ("user_id\titem_id\titem_id\nu\ti\ti\n", "a.tsv:1: found the column item_id twice"),
    "too few fields": (HEADER + "u\ti\t1\t2\n\nu\ti\n", "a.tsv:4: found 2 fields, expected 4"),
    "too many fields": (HEADER + "u\ti\t1\t2\t9\n", "a.tsv:2: found 5 fields, expected 4"),
    "NaN rating": (HEADER + "u\ti\t1\t2\nu\tj\tNaN\t2\n", "a.tsv:3: found an empty cell or NaN in the column rating"),
    "empty rating": (HEADER + "u\ti\t\t2\n", "a.tsv:2: found an empty cell or NaN in the column rating"),
    "infinite rating": (HEADER + "u\ti\tinf\t2\n", "a.tsv:2: found an infinite number in the column rating"),
    "word for a rating": (HEADER + "u\ti\t1\t2\nu\tj\tgood\t2\n", "a.tsv:3: found 'good' in the column rating"),
    "word for a time": (HEADER + "u\ti\t1\tnoon\n", "a.tsv:2: found 'noon' in the column timestamp"),
    "empty id": (HEADER + "u\ti\t1\t2\n\ti\t1\t2\n", "a.tsv:3: found an empty cell in the column user_id"),
    "latin-1": (HEADER.encode() + b"u\tcaf\xe9\t1\t2\n", "a.tsv:2: found bytes that are not UTF-8"),
    "latin-1 header": (b"user_id\titem_id\t\xe9\nu\ti\tx\n", "a.tsv:1: found bytes that are not UTF-8"),
    "utf-16": (HEADER.encode("utf-16"), "a.tsv:1: found UTF-16"),
    "blank first line": ("\n" + HEADER, "a.tsv:1: found an empty line"),
}


@pytest.mark.parametrize("content, message", BAD.values(), ids=BAD)
def test_bad_table_is_one_line_with_its_place(tmp_path, content, message):
    (tmp_path / "a.tsv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(KgrecError) as error:
        read_table(tmp_path / "a.tsv", LOG, OPTIONAL)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_bad_csv_and_parquet(tmp_path):
    def message(name, required=LOG):
        with pytest.raises(KgrecError) as error:
            read_table(tmp_path / name, required, OPTIONAL)
        assert "\n" not in str(error.value)
        return str(error.value)

    (tmp_path / "a.csv").write_text('user_id,item_id\n"two\nlines",1\nu,1,2\n')
    assert "a.csv:4: found 3 fields, expected 2" in message("a.csv")
    (tmp_path / "open.csv").write_text('user_id,item_id\nu,1\nu,"' + "x,\n" * 100_000)
    assert "open.csv:3: found" in message("open.csv")
    (tmp_path / "a.parquet").write_text("not parquet")
    assert "is not Parquet" in message("a.parquet")
    pa.parquet.write_table(pa.table({"user_id": [1.5], "item_id": ["a"]}), tmp_path / "b.parquet")
    assert "the column user_id as double" in message("b.parquet")
    pa.parquet.write_table(pa.table({"user_id": ["a", None], "item_id": ["a", "b"]}), tmp_path / "c.parquet")
    assert "c.parquet: row 2: found an empty cell in the column user_id" in message("c.parquet")
    assert "found no such file" in message("absent.tsv")


def test_one_format_a_table(tmp_path):
    assert find_table(tmp_path, "items") is None
    (tmp_path / "items.csv").write_text("item_id\n1\n")
    assert find_table(tmp_path, "items").name == "items.csv" and read_header(tmp_path / "items.csv") == ["item_id"]
    (tmp_path / "items.tsv").write_text("item_id\n1\n")
    with pytest.raises(KgrecError, match="both items.tsv and items.csv"):
        find_table(tmp_path, "items")
