"""kgrec data graph tables: what columns become, by themselves and as told, and that no cell is lost in silence."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from kgrec_jax import cli
from kgrec_jax.data.buckets import number
from kgrec_jax.data.folder import read_folder
from kgrec_jax.data.importers import columns as col
from kgrec_jax.data.importers.item_tables import TablesConfig, tables_to_graph
from kgrec_jax.data.provenance import read_provenance
from kgrec_jax.errors import KgrecError

RNG = np.random.default_rng(0)
GENRES = ("Drama", "Comedy", "Horror", "War", "Sci-Fi")


def world(rows=40):
    """Columns of an item table whose right reading is plain to a person."""
    lists = [[GENRES[g] for g in RNG.choice(5, RNG.integers(1, 4), replace=False)] for _ in range(rows)]
    directors = [f"Director {k % 12}" for k in range(rows)]
    directors[0], directors[1] = "director 0", "unknown"  # another spelling; nothing known
    years = [str(1950 + k) for k in range(rows)]
    years[3] = "soon"
    return {
        "movie_id": [f"m{k}" for k in range(rows)], "title": [f"Film {k}" for k in range(rows)],
        "genres": ["|".join(row) for row in lists], "director": directors, "year": years,
        "price": [f"${k * 1.5 + 1:.2f}" for k in range(rows)], "season": [str(1 + k % 3) for k in range(rows)],
        "plot": [f"A long story of {k} people, who walk and talk and then go home again, in the end"
                 for k in range(rows)],
        "language": ["en"] * rows, "imdb_id": [f"tt{k:07}" for k in range(rows)],
        "tagline": [f"Word {k}" for k in range(rows)], "note": [""] * rows}, lists


def write_csv(path, columns):
    quoted = [",".join(f'"{value}"' for value in row) for row in zip(*columns.values(), strict=True)]
    path.write_text("\n".join([",".join(columns), *quoted]) + "\n", encoding="utf-8")
    return path


def facts(folder):
    rows = [line.split("\t") for line in (folder / "triples.tsv").read_text(encoding="utf-8").splitlines()[1:]]
    return {(h, r, t) for h, r, t, *_ in rows}


def test_a_table_as_it_is(tmp_path):
    table, lists = world()
    notes = tables_to_graph(TablesConfig(write_csv(tmp_path / "films.csv", table)), tmp_path / "out")
    found, data = facts(tmp_path / "out"), read_folder(tmp_path / "out")
    assert {f for f in found if f[1] == "genres"} == {(f"m{k}", "genres", f"genres/{g}") for k, row in enumerate(lists)
                                                      for g in row}
    assert {r for _, r, _ in found} == {"genres", "director", "year", "price", "season"}
    assert ("m0", "director", "director/Director 0") in found and not any(h == "m1" and r == "director"
                                                                         for h, r, _ in found)
    years = {int(h[1:]): t for h, r, t in found if r == "year"}
    assert len(set(years.values())) == 5 and 3 not in years and years[0] == "year/1950 to 1958"
    for k, name in years.items():  # every year is within the bucket's own words
        low, high = name.removeprefix("year/").split(" to ")
        assert int(low) <= 1950 + k <= int(high)
    sizes = np.unique(list(years.values()), return_counts=True)[1]
    assert sizes.max() - sizes.min() <= 1
    assert data.num_items == 40 and data.item_names[0] == "Film 0" and data.graph.relation_names[0] == "genres"
    names = dict(zip(data.graph.entity_ids, data.graph.entity_names))
    assert names["genres/Drama"] == "Drama" and names["m0"] == "Film 0"
    said = read_provenance(tmp_path / "out").sources
    assert said["films.csv:genres"] == sum(map(len, lists)) and said["films.csv:director"] == 39
    text = "\n".join(notes)
    for line in ("title: 'skip', for it names the item", "genres: 'list:|', for 5 distinct values",
                 "1 items without; 1 differ by case alone (merged)", "1 cells are no numbers (not used)",
                 "plot: 'skip', for it is free text", "language: 'skip', for all values are 'en'",
                 "imdb_id: 'skip', for its values are keys of single items",
                 "tagline: 'skip', for too many distinct values (40 in 40 cells", "note: 'skip', for it is empty",
                 "40 of 40 items have one", "season: 'category', for 3 distinct values"):
        assert line in text, line


def test_choices_are_overridden(tmp_path):
    table, _ = world()
    path = write_csv(tmp_path / "films.csv", table)
    cfg = TablesConfig(path, ("year=buckets:1960,1980", "tagline=category", "genres=skip"), only=True)
    tables_to_graph(cfg, tmp_path / "out")
    found = facts(tmp_path / "out")
    assert {r for _, r, _ in found} == {"year", "tagline"} and len({t for _, r, t in found if r == "tagline"}) == 40
    year = {h: t for h, r, t in found if r == "year"}
    assert (year["m9"], year["m10"], year["m29"], year["m30"]) == (
        "year/under 1960", "year/1960 to under 1980", "year/1960 to under 1980", "year/1980 and more")


def test_a_folder_is_extended(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "items.tsv").write_text("item_id\tentity_id\ttitle\tgenre\n1\te1\tHeat\tDrama\n2\t\tAlien\tHorror\n"
                                    "3\te3\tAliens\tHorror\n4\te4\tUp\tDrama\n")
    (base / "interactions.tsv").write_text("user_id\titem_id\nu\t1\nu\t2\n")
    (base / "triples.train.tsv").write_text("head_id\trelation\ttail_id\ne1\tby\tmann\ne1\tgenre\tgenre/Drama\n")
    (base / "triples.test.tsv").write_text("head_id\trelation\ttail_id\n2\tgenre\tgenre/Horror\n")
    (base / "entities.tsv").write_text("entity_id\tname\tborn\nmann\tMichael Mann\t1943\n")
    notes = tables_to_graph(TablesConfig(base), tmp_path / "out")
    out = tmp_path / "out"
    assert (out / "triples.train.tsv").read_text().splitlines() == [
        "head_id\trelation\ttail_id\tsource\tconfidence", "e1\tby\tmann\ttriples.train.tsv\t1",
        "e1\tgenre\tgenre/Drama\ttriples.train.tsv\t1", "e3\tgenre\tgenre/Horror\titems.tsv:genre\t1",
        "e4\tgenre\tgenre/Drama\titems.tsv:genre\t1"]  # what the test part has is not added
    assert (out / "entities.tsv").read_text() == (
        "entity_id\tname\tborn\nmann\tMichael Mann\t1943\ngenre/Drama\tDrama\t\ngenre/Horror\tHorror\t\n")
    assert (out / "interactions.tsv").read_bytes() == (base / "interactions.tsv").read_bytes()
    assert "2 triples stand in the graph" in notes[-1] and read_folder(out).num_items == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"]


def test_values_are_linked_to_entities_by_name(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "items.tsv").write_text("item_id\ttitle\tdirector\n1\tHeat\tmichael mann\n2\tThief\tMichael Mann\n"
                                    "3\tWar\tJohn Smith\n4\tUp\tJohn Smith\n5\tX\tWar\n6\tY\tWar\n")
    (base / "entities.tsv").write_text("entity_id\tname\nmann\tMichael Mann\ns1\tJohn Smith\ns2\tJohn Smith\n")
    (base / "triples.tsv").write_text("head_id\trelation\ttail_id\n1\tby\tmann\n3\tby\ts1\n4\tby\ts2\n")
    notes = tables_to_graph(TablesConfig(base, link=True), tmp_path / "out")
    # two are called John Smith, and War is an item: neither is linked
    assert facts(tmp_path / "out") >= {("1", "director", "mann"), ("2", "director", "mann"),
                                       ("3", "director", "director/John Smith"), ("6", "director", "director/War")}
    assert any("6 triples to 3 values, 0 items without; 1 of these are entities of the graph" in n for n in notes)
    assert (tmp_path / "out" / "entities.tsv").read_text().count("Michael Mann") == 1
    with pytest.raises(KgrecError, match="--link: found a table alone"):
        tables_to_graph(TablesConfig(base / "items.tsv", link=True), tmp_path / "second")


@pytest.mark.parametrize("values, words", [
    (["a|b", "b|c", "a|c", "a", "c|b"], "list:|"), (["剧情、喜剧", "喜剧", "战争、剧情", "战争、喜剧", "剧情"], "list:、"),
    (["['a', 'b']", "['b']", "['a', 'c']", "['c', 'b']"], "list:, "), (["드라마", "드라마", "코미디"], "category"),
    (["1", "2", "1", "2"], "category"), ([f"{k}.5" for k in range(20)], "buckets:5"),
    ([f"19{k}-07-01" for k in range(50, 80)], "buckets:5"), (["Smith, John"] * 3 + ["Lee, Ann"] * 3, "category"),
    ([f"{k},000" for k in range(1, 30)], "buckets:5"), (["x", "y", "z"], "skip")])
def test_columns_look_like_what_they_are(values, words):
    assert col.choose("c", [col.clean(v) for v in values]).words() == words


def test_numbers_and_cells():
    assert [number(v) for v in ("1,250", "$9.99", "12 %", "-3", "1e3", "1995-07-01", "2001/2")] == [
        1250, 9.99, 12, -3, 1000, 1995, 2001]
    assert np.isnan([number(v) for v in ("", "1,2", "x1", "1995-13-01", "nan")]).all()
    assert col.clean(" Ｆｕｌｌ\u3000 width ") == "Full width" and col.clean("N/A") == ""
    assert col.split("['It\\'s', \"b\", 'b', '']", ",")[1:] == ["b"] and col.split("a||b|a", "|") == ["a", "b"]


@pytest.mark.parametrize("buckets", [2, 3, 7])
def test_buckets_hold_equal_shares(buckets):
    values = np.r_[RNG.normal(size=700), np.nan]
    names = col.bucket_names(values, col.Choice("buckets", buckets=buckets))
    assert names[-1] == "" and np.ptp(np.unique(names[:-1], return_counts=True)[1]) <= 1
    assert len(set(col.bucket_names(np.array([1.0] * 90 + [2, 3.0]), col.Choice("buckets")))) == 2  # ties stay together


def test_parquet_and_a_named_column(tmp_path):
    table = pa.table({"key": ["a", "b", "c"], "tags": [["x", "y"], ["x"], None], "n": [1, 2, 1]})
    pa.parquet.write_table(table, tmp_path / "t.parquet")
    tables_to_graph(TablesConfig(tmp_path / "t.parquet", ("tags=list:,",), "key"), tmp_path / "out")
    assert {("a", "tags", "tags/x"), ("a", "tags", "tags/y"), ("b", "tags", "tags/x"), ("a", "n", "n/1")} <= \
        facts(tmp_path / "out")


@pytest.mark.parametrize("fields, message", [
    ({"columns": ("genre",)}, "--columns: found 'genre', expected COLUMN=category"),
    ({"columns": ("x=list",)}, "expected COLUMN=category"),
    ({"columns": ("x=category",)}, "found 'x', expected a column"),
    ({"columns": ("genre=buckets:3",)}, "found buckets for genre, whose values are no numbers (first: 'Drama')"),
    ({"columns": ("genre=buckets:5,3",)}, "found the buckets '5,3'"),
    ({"columns": ("genre=buckets:1",)}, "buckets '1'"),
    ({"columns": ("genre=skip",)}, "found no column that gives a relation"), ({"item": "no"}, "--item: found 'no'"),
    ({"items": "absent.tsv"}, "found no such file"), ({"items": "x.json"}, "found the suffix .json"),
    ({"items": "."}, "found no items.tsv")])
def test_bad_input(tmp_path, fields, message):
    (tmp_path / "t.tsv").write_text("item_id\tgenre\n1\tDrama\n2\tDrama\n3\tWar\n")
    fields["items"] = tmp_path / fields.get("items", "t.tsv")
    with pytest.raises(KgrecError) as error:
        tables_to_graph(TablesConfig(**fields), tmp_path / "out")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["t.tsv"]


def test_an_item_with_the_id_of_a_value(tmp_path):
    (tmp_path / "t.tsv").write_text("item_id\tgenre\ngenre/War\tDrama\n2\tDrama\n3\tWar\n4\tWar\n")
    with pytest.raises(KgrecError, match="found the item 'genre/War', which is also the entity of a value"):
        tables_to_graph(TablesConfig(tmp_path / "t.tsv"), tmp_path / "out")


def test_command(tmp_path, capsys):
    path = write_csv(tmp_path / "films.csv", world()[0])
    command = ["data", "graph", "tables", "--items", str(path), "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--columns", "genres=list:|", "--only"]) == 0
    assert "genres: 'list:|', for --columns says so" in capsys.readouterr().out
    assert cli.main(command) == 2 and "choose another --out" in capsys.readouterr().err
