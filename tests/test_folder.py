"""The dataset folder: what its rules say is what is read, bad rows are named, and what is written reads back."""

import dataclasses
import pathlib

import numpy as np
import pytest

from kgrec_jax.data.folder import DataConfig, read_folder, write_folder
from kgrec_jax.data.names import name_from_id, relation_name
from kgrec_jax.data.texts import join_columns, split_title
from kgrec_jax.data.toy import toy_world
from kgrec_jax.errors import KgrecError

FILES = {
    "interactions.tsv": "user_id\titem_id\trating\ttimestamp\nu1\t007\t4\t10\nu1\t2\t1\t20\nu2\t2\t5\t30\nu1\t007\t2\t5\n",
    "items.tsv": "item_id\tentity_id\tyear\ttitle\toverview\n007\tQ1\t1995\tHeat\tCops and "
    "robbers\n2\t\t\tAlien\t\n\"3\tQ3\t2000\t\t\n",
    "entities.tsv": "entity_id\tname\tdescription\nd1\tMichael Mann\tA director.\nQ77\tQ77\t\nQ1\tignored\t\n",
    "relations.tsv": "relation\tname\ndirectedBy\tdirector\n",
    "triples.tsv": "head_id\trelation\ttail_id\nQ1\tdirectedBy\td1\n2\trecordLabel\tm.02822\nQ1\tdirectedBy\td1\nQ1\tx\tBlue_Sky\n",
}


def write(folder: pathlib.Path, files: dict[str, str | bytes | None]) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        if text is not None:
            (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "data", FILES)


def test_a_whole_folder(folder):
    data = read_folder(folder, DataConfig())
    assert data.name == "data" and data.user_ids == ("u1", "u2") and data.item_ids == ("007", "2", '"3')
    assert data.item_names == ("Heat", "Alien", '"3')
    assert data.item_texts == ("Heat. year: 1995. Cops and robbers", "Alien", "year: 2000")
    log = data.interactions  # the pair (u1, 007) counts once, with its latest timestamp
    assert sorted(zip(log.user.tolist(), log.item.tolist(), log.rating.tolist(), log.timestamp.tolist())) == [
        (0, 0, 4, 10), (0, 1, 1, 20), (1, 1, 5, 30)]
    assert (data.has_ratings, data.has_timestamps, data.has_fixed_split) == (True, True, False)
    graph = data.graph
    assert graph.entity_ids == ("Q1", "2", "Q3", "d1", "Q77", "m.02822", "Blue_Sky")
    # An id that says nothing to a reader is no name, whether it is listed as one or not.
    assert graph.entity_names == ("Heat", "Alien", "", "Michael Mann", "", "", "Blue Sky")
    assert graph.entity_texts[3] == "A director." and graph.entity_texts[0] == data.item_texts[0]
    assert graph.relation_names == ("director", "record label", "x") and len(graph.triples) == 3
    notes = "\n".join(data.notes)
    for words in ("1 rows repeat a pair", "1 rows repeat a "
                  "triple", "2 entities of the triples are not in the entity table",
                  "2 of 4 have no name", "2 relations of the triples are not listed", "1 rows are items"):
        assert words in notes


def test_text_columns_and_ratings_are_the_config_s(folder):
    data = read_folder(folder, DataConfig(name="mine", text_columns=("overview", "title"), min_rating=3))
    assert data.name == "mine" and data.item_texts == ("Cops and robbers. Heat", "Alien", "")
    # The latest rating of a pair counts, and it decides whether the pair stays.
    assert data.interactions.rating.tolist() == [4, 5]
    assert any("rated under 3" in n for n in data.notes) and any("1 of 3 items have no text" in n for n in data.notes)


def test_without_timestamps_the_last_row_counts(tmp_path):
    write(tmp_path, {"interactions.tsv": "user_id\titem_id\trating\nu\ti\t4\nu\tj\t3\nu\ti\t2\n"})
    data = read_folder(tmp_path, DataConfig())
    assert data.interactions.rating.tolist() == [3, 2] and not data.has_timestamps
    assert data.item_names == ("i", "j") and data.item_texts == ("", "") and data.graph.entity_names == ("", "")


def test_fixed_split_users_and_other_formats(tmp_path):
    write(tmp_path, {"train.csv": 'user_id,item_id\n"u,1",a\nu2,b\n', "test.tsv": "user_id\titem_id\nu2\tc\nu9\ta\n",
                     "users.tsv": "user_id\tage\nu2\t30\nu8\t9\n"})
    data = read_folder(tmp_path, DataConfig())
    assert data.has_fixed_split and not data.has_fixed_valid and data.part.tolist() == [0, 0, 2, 2]
    assert data.user_ids == ("u2", "u8", "u,1", "u9") and data.item_ids == ("a", "b", "c")
    assert any("2 users of the log are not in the user table" in n for n in data.notes)


def test_pure_graph(tmp_path):
    write(tmp_path, {"triples.train.tsv": "head_id\trelation\ttail_id\na\tr\tb\n", "triples.test.tsv": "head_id\trelation\ttail_id\nb\tr\ta\n"})
    data = read_folder(tmp_path, DataConfig())
    assert data.num_items == data.num_users == len(data.interactions) == 0
    assert data.graph.part.tolist() == [0, 2] and data.graph.entity_names == ("a", "b")


def test_media(folder):
    write(folder / "media", {"cover.ids.txt": '"3\n007\n'})
    np.save(folder / "media" / "cover.npy", np.float16([[1, 2], [3, 4]]))
    vectors, present = read_folder(folder, DataConfig()).media["cover"]
    np.testing.assert_array_equal(vectors, np.float32([[3, 4], [0, 0], [1, 2]]))
    assert present.tolist() == [True, False, True]
    np.save(folder / "media" / "cover.npy", np.float16([[1, np.nan], [3, 4]]))
    with pytest.raises(KgrecError, match="NaN or infinity in vector 0"):
        read_folder(folder, DataConfig())
    np.save(folder / "media" / "cover.npy", np.float16([[1, 2]]))
    with pytest.raises(KgrecError, match="1 vectors and 2 ids"):
        read_folder(folder, DataConfig())
    write(folder / "media", {"cover.ids.txt": "007\n9\n"})
    np.save(folder / "media" / "cover.npy", np.float16([[1, 2], [3, 4]]))
    with pytest.raises(KgrecError, match="cover.ids.txt:2: found the item '9'"):
        read_folder(folder, DataConfig())


def test_rdf_under_another_name_is_announced(folder):
    write(folder, {"dump.ttl.gz": "x", "item.tsv": "item_id\n1\n"})
    notes = read_folder(folder, DataConfig()).notes
    assert any(n.startswith("dump.ttl.gz: not read; the folder's graph is called graph.ttl") for n in notes)
    assert any(n.startswith("item.tsv: not read") for n in notes)


LOG, ITEMS, TRIPLES = FILES["interactions.tsv"], FILES["items.tsv"], FILES["triples.tsv"]
PAIR = "user_id\titem_id\n"
BAD = {
    "triple with two fields": ({"triples.tsv": TRIPLES + "Q1\tx\n"}, "triples.tsv:6: found 2 fields, expected 3"),
    "unknown item": ({"interactions.tsv": LOG + "u3\t99\t1\t1\n"}, "interactions.tsv:6: found the item '99'"),
    "NaN rating": ({"interactions.tsv": LOG + "u3\t2\tnan\t1\n"}, "interactions.tsv:6: found an empty cell or NaN"),
    "item twice": ({"items.tsv": ITEMS + "2\t\t\tAliens\t\n"}, "items.tsv:5: found the item_id '2' a second time "
                   "(first: items.tsv:3)"),
    "entity twice": ({"entities.tsv": FILES["entities.tsv"] + "d1\tx\t\n"}, "entities.tsv:5: found the entity_id 'd1' "
                     "a second time"),
    "relation twice": ({"relations.tsv": "relation\tname\nx\ta\nx\tb\n"}, "relations.tsv:3: found the relation 'x' a "
                       "second time"),
    "user twice": ({"users.tsv": "user_id\nu1\nu1\n"}, "users.tsv:3: found the user_id 'u1' a second time"),
    "two items of one entity": ({"items.tsv": ITEMS + "4\tQ1\t\tRonin\t\n"}, "items.tsv:5: found the items '007' and "
                                "'4' with the one entity_id 'Q1'"),
    "empty file": ({"items.tsv": ""}, "items.tsv: found an empty file"),
    "wrong encoding": ({"items.tsv": ITEMS.encode() + b"5\t\t\tAm\xe9lie\t\n"}, "items.tsv:5: found bytes that are not "
                       "UTF-8"),
    "missing column": ({"interactions.tsv": "user\titem_id\nu\t2\n"}, "interactions.tsv:1: found the columns user, "
                       "item_id"),
    "graph without items": ({"triples.tsv": "head_id\trelation\ttail_id\na\tr\tb\n"}, "no item in any of them"),
    "two logs": ({"train.tsv": PAIR + "u\t2\n"}, "found both interactions.tsv and train.tsv"),
    "train without test": ({"interactions.tsv": None, "train.tsv": PAIR + "u\t2\n"}, "found train.tsv alone"),
    "pair in train and test": ({"interactions.tsv": None, "train.tsv": PAIR + "u\t2\nu\t007\n", "test.tsv": PAIR + "v\t2\nu\t007\n"},
                               "test.tsv:3: found user 'u' with item '007', which train.tsv has too"),
    "triple in two parts": ({"triples.tsv": None, "triples.train.tsv": TRIPLES, "triples.test.tsv": TRIPLES},
                            "in triples.train.tsv and triples.test.tsv"),
    "test triples alone": ({"triples.tsv": None, "triples.test.tsv": TRIPLES}, "expected triples.train too"),
    "two formats": ({"items.csv": "item_id\n2\n"}, "both items.tsv and items.csv"),
}


@pytest.mark.parametrize("files, message", BAD.values(), ids=BAD)
def test_bad_folder_is_one_line_with_its_place(folder, files, message):
    for name in files:
        (folder / name).unlink(missing_ok=True)
    write(folder, files)
    with pytest.raises(KgrecError) as error:
        read_folder(folder, DataConfig())
    assert message in str(error.value) and "\n" not in str(error.value)


def test_bad_config(folder, tmp_path):
    def message(path, cfg=DataConfig()):
        with pytest.raises(KgrecError) as error:
            read_folder(path, cfg)
        return str(error.value)

    assert "found no such folder" in message(tmp_path / "absent")
    assert "found a file" in message(folder / "items.tsv")
    assert "expected interactions.tsv" in message(write(tmp_path / "empty", {"a.txt": "x"}))
    assert "graph.ttl:1:" in message(write(tmp_path / "rdf", {"graph.ttl": "x"}))
    assert "expected columns of" in message(folder, DataConfig(text_columns=("summary",)))
    assert "lower --data.min-rating" in message(folder, DataConfig(min_rating=9))
    plain = write(tmp_path / "plain", {"interactions.tsv": PAIR + "u\t2\n"})
    assert "no column rating" in message(plain, DataConfig(min_rating=1))
    assert "has no items.tsv" in message(plain, DataConfig(text_columns=("title",)))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_written_world_reads_back(tmp_path, language):
    world = toy_world(seed=3, num_users=30, num_items=40, language=language)
    vectors, present = np.zeros((40, 3), np.float32), np.arange(40) % 2 == 0
    vectors[present] = np.random.default_rng(0).normal(size=(20, 3))
    world = dataclasses.replace(world, media={"image": (vectors, present)})
    write_folder(world, tmp_path / "toy")
    assert read_folder(tmp_path / "toy", DataConfig()).content_hash() == world.content_hash()
    with pytest.raises(KgrecError, match="found something there already"):
        write_folder(world, tmp_path / "toy")
    assert [p.name for p in tmp_path.iterdir()] == ["toy"]


def test_written_fixed_splits_read_back(folder, tmp_path):
    world = toy_world(num_users=20, num_items=30)
    rng = np.random.default_rng(0)
    order = np.argsort(rng.integers(0, 3, len(world.interactions)), kind="stable")
    part = np.sort(rng.integers(0, 3, len(world.interactions))).astype(np.int8)
    triples = np.sort(rng.integers(0, 3, len(world.graph.triples))).astype(np.int8)
    world = dataclasses.replace(world, interactions=world.interactions.take(order), part=part, has_fixed_split=True,
                                has_fixed_valid=True, graph=dataclasses.replace(world.graph, part=triples))
    write_folder(world, tmp_path / "toy")
    again = read_folder(tmp_path / "toy", DataConfig())
    assert again.content_hash() == world.content_hash() and again.has_fixed_valid
    read = read_folder(folder, DataConfig())  # columns of its own become one text
    write_folder(read, tmp_path / "again")
    assert read_folder(tmp_path / "again", DataConfig()).content_hash() == read.content_hash()


def test_content_hash_depends_on_content_alone(folder, tmp_path):
    first = read_folder(folder, DataConfig()).content_hash()
    assert read_folder(write(tmp_path / "other", FILES), DataConfig(name="x")).content_hash() == first
    write(folder, {"items.tsv": ITEMS.replace("Heat", "Heats")})
    assert read_folder(folder, DataConfig()).content_hash() != first


def test_names_and_texts():
    assert [name_from_id(i) for i in ("m.02822", "/m/02822", "Q42", "00260881", "http://dbpedia.org/resource/Am%C3%A9lie", "Blue_Sky")] == [
        "", "", "", "", "Amélie", "Blue Sky"]
    assert [relation_name(r) for r in ("recordLabel", "_hypernym", "film.film.genre", "http://schema.org/productionCompany", "周边景点")] == [
        "record label", "hypernym", "film genre", "production company", "周边景点"]
    assert join_columns({"title": ["A?", ""], "genres": ["x", "y"], "text": ["t", " "]}, 2) == ["A? genres: x. "
                                                                                                "t", "genres: y"]
    assert split_title("A?", "A? t") == "t" and split_title("A", "A") == "" and split_title("A", "B. A") is None


EXPECTED = {  # users, items, interactions by part, entities, relations, triples by part: the README beside the data
    "fb15k-237": (0, 0, [0, 0, 0], 14541, 237, [272115, 17535, 20466]),
    "kdconv-travel-zh": (0, 0, [0, 0, 0], 1063, 6, [1701, 0, 0]),
    "lastfm-dbpedia": (1859, 2813, [57786, 0, 13508], 16188, 10, [35237, 0, 0]),
    "ml100k-dbpedia": (943, 1682, [100000, 0, 0], 12313, 8, [39244, 0, 0]),
    "ml100k-recbole-split": (943, 1598, [78836, 9359, 9359], 1598, 0, [0, 0, 0]),
    "ml1m-dbpedia": (6040, 3260, [801218, 0, 197321], 15453, 9, [38334, 0, 0]),
    "movietweetings-10core": (1942, 939, [40655, 0, 0], 2735, 5, [11006, 0, 0]),
    "movietweetings-tiny": (500, 300, [8977, 0, 0], 1051, 5, [3295, 0, 0]),
    "umls": (0, 0, [0, 0, 0], 135, 46, [5216, 652, 661]),
    "wn18rr": (0, 0, [0, 0, 0], 40943, 11, [86835, 3034, 3134]),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_real_folders(shared, name):
    data = read_folder(shared / "data" / name, DataConfig())
    graph = data.graph
    counts = [np.bincount(part, minlength=3).tolist() for part in (data.part, graph.part)]
    assert (data.num_users, data.num_items, counts[0], graph.num_entities, graph.num_relations, counts[1]) == EXPECTED[name]
    assert all(graph.entity_names[data.num_items:]) and all(graph.relation_names)
