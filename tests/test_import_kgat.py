"""KGAT's files become a dataset folder that reads back to what they said."""

import pytest

from kgrec_jax import cli
from kgrec_jax.data.folder import DataConfig, read_folder
from kgrec_jax.data.importers.kgat import import_kgat
from kgrec_jax.errors import KgrecError

FILES = {
    "train.txt": "0 0 1 1\n1 2\n2\n", "test.txt": "0 2\n",
    "kg_final.txt": "0 0 3\n1 1 4\n1 1 4\n2 0 9\n",
    "item_list.txt": "org_id remap_id freebase_id\nB00X1234Z 0 m.0a\nB00X1234Y 1 m.0b\nDune 2 m.0c\n",
    "entity_list.txt": "org_id remap_id\nm.0a 0\nm.0b 1\nm.0c 2\nm.0d 3\nBlue_Sky 4\n",
    "relation_list.txt": "org_id remap_id\nhttp://rdf.freebase.com/ns/film.film.directed_by 0\nhttp://x/ns/book.genre 1\n",
    "user_list.txt": "org_id remap_id\nann 0\nbob 1\n",
}


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "kgat"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


def test_folder_says_what_the_files_said(source, tmp_path):
    notes = import_kgat(source, tmp_path / "out")
    data = read_folder(tmp_path / "out", DataConfig())
    assert data.has_fixed_split and not data.has_fixed_valid and data.part.tolist() == [0, 0, 0, 2]
    assert data.user_ids == ("ann", "bob") and data.item_ids == ("B00X1234Z", "B00X1234Y", "Dune")
    assert data.item_names == ("B00X1234Z", "B00X1234Y", "Dune")
    graph = data.graph
    assert graph.entity_ids[:3] == ("m.0a", "m.0b", "m.0c") and set(graph.entity_ids[3:]) == {"m.0d", "Blue_Sky", "9"}
    assert dict(zip(graph.entity_ids, graph.entity_names))["Blue_Sky"] == "Blue Sky"
    assert graph.relation_names == ("director", "genre") and len(graph.triples) == 3
    for note in ("2 users, 3 items, 4 interactions, 3 triples", "train.txt: 1 users have no item",
                 "train.txt: 1 pairs repeat", "kg_final.txt: 1 lines repeat"):
        assert note in " ".join(notes)


def test_numbers_alone(source, tmp_path):
    for name in FILES:
        if name.endswith("_list.txt") or name == "kg_final.txt":
            (source / name).unlink()
    notes = import_kgat(source, tmp_path / "out")
    data = read_folder(tmp_path / "out", DataConfig())
    assert data.item_ids == ("0", "1", "2") and not len(data.graph.triples)
    assert "kg_final.txt: absent, so there is no graph" in notes


BAD = [
    ("train.txt", "0 1\n1 x\n", "train.txt:2: found 'x', expected whole numbers"),
    ("train.txt", None, "train.txt: found no such file"), ("test.txt", "3\n", "test.txt: found no user with an item"),
    ("kg_final.txt", "0 0 1\n0 1\n", "kg_final.txt:2: found 2 fields, expected 3"),
    ("kg_final.txt", "0 a 1\n", "kg_final.txt:1: found 'a'"),
    ("item_list.txt", "org_id remap_id\na 0\nb\n", "item_list.txt:3: found 'b', expected org_id remap_id"),
    ("entity_list.txt", "a 0\nb 0\n", "entity_list.txt:2: found the remap_id 0 a second time"),
    ("user_list.txt", "a 0\na 1\n", "user_list.txt: found the org_id 'a' for the remap_ids 0 and 1"),
    ("test.txt", b"0 1\n\xff\n", "test.txt:2: found bytes that are not UTF-8"),
]


@pytest.mark.parametrize("name, text, message", BAD, ids=[message[:28] for _, _, message in BAD])
def test_bad_input_is_one_line_and_writes_nothing(source, tmp_path, name, text, message):
    (source / name).unlink()
    if text is not None:
        (source / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(KgrecError) as error:
        import_kgat(source, tmp_path / "out")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kgat"]


def test_command(source, tmp_path, capsys):
    assert cli.main(["data", "import", "kgat", str(source), str(tmp_path / "out")]) == 0
    assert "3 items" in capsys.readouterr().out
    assert cli.main(["data", "import", "kgat", str(source), str(tmp_path / "out")]) == 2
    assert cli.main(["data", "import", "kgat", str(tmp_path / "absent"), str(tmp_path / "new")]) == 2
