"""RDF in a dataset folder: facts, names, texts and blank nodes are what the file says, and bad RDF is named by place."""

import bz2
import gzip

import numpy as np
import pytest

from kgrec_jax.data import rdf
from kgrec_jax.data.folder import DataConfig, read_folder, write_folder
from kgrec_jax.data.rdf import read_rdf
from kgrec_jax.data.rdf_terms import pieces
from kgrec_jax.data.rdf_words import merge_same, split_literal
from kgrec_jax.errors import KgrecError

PREFIXES = """@prefix ex: <http://ex.org/> . @prefix rdfs: <http://www.w3.org/2000/01/rdf-schema#> .
@prefix owl: <http://www.w3.org/2002/07/owl#> . @prefix schema: <http://schema.org/> .
"""
TURTLE = PREFIXES + r"""
ex:Heat a ex:Film ; ex:directedBy ex:Mann ; ex:year 1995, 1996 ; ex:poster "AA=="^^<http://www.w3.org/2001/XMLSchema#base64Binary> ;
  rdfs:label "Heat"@en-GB, "盗火线"@zh, "Hitze"@de ; rdfs:comment "Cops\n and \"robbers\"."@en .
ex:Alien a ex:Film, ex:Work ; ex:directedBy [ ex:born ex:UK ] ; schema:name "Alien" .
ex:Mann owl:sameAs ex:MM . ex:MM owl:sameAs ex:Mann ; rdfs:label "Michael Mann"@en .
ex:directedBy rdfs:label "director"@en . ex:year rdfs:label "released in"@en .
"""
ITEMS = "item_id\tentity_id\ttitle\n1\thttp://ex.org/Heat\t\n2\thttp://ex.org/Alien\tAlien (1979)\n3\thttp://ex.org/No\tNo\n"


def facts(graph):
    return {(graph.entity_ids[h], graph.relation_ids[r].split("/")[-1].split("#")[-1], graph.entity_ids[t])
            for h, r, t in graph.triples.tolist()}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "graph.ttl").write_text(TURTLE, encoding="utf-8")
    (tmp_path / "data" / "items.tsv").write_text(ITEMS, encoding="utf-8")
    return tmp_path / "data"


def test_folder_with_turtle(folder):
    data = read_folder(folder, DataConfig())
    graph, e = data.graph, "http://ex.org/"
    assert data.item_names == ("Heat", "Alien (1979)", "No")  # the table's title stands, the graph fills the gap
    assert data.item_texts[0] == 'Heat. Cops and "robbers". released in: 1995, 1996'
    assert graph.entity_ids[:3] == (e + "Heat", e + "Alien", e + "No")
    assert facts(graph) == {(e + "Heat", "type", e + "Film"), (e + "Heat", "directedBy", e + "Mann"),
                            (e + "Alien", "type", e + "Film"), (e + "Alien", "type", e + "Work"),
                            (e + "Alien", "directedBy", "_:f0b0"), ("_:f0b0", "born", e + "UK")}
    names = dict(zip(graph.entity_ids, graph.entity_names))
    assert names[e + "Mann"] == "Michael Mann" and names[e + "UK"] == "UK" and names["_:f0b0"] == ""
    assert dict(zip(graph.relation_ids, graph.relation_names))[e + "directedBy"] == "director"
    for note in ("owl:sameAs merges 1", "1 entities have more than one type", "2 of 3 relations have no label",
                 "2 literals in other languages", "1 literals that are empty or no text", "1 of 3 items are nowhere"):
        assert any(note in line for line in data.notes), note


def test_languages_in_order(folder):
    assert read_folder(folder, DataConfig(languages=("zh", "en"))).item_names[0] == "盗火线"
    assert read_folder(folder, DataConfig(languages=("fr", "de"))).item_names[0] == "Hitze"
    assert read_folder(folder, DataConfig(languages=("fr",))).item_names[0] == "1"  # no name in it: the item's id


def test_reading_twice_is_the_same_and_writes_back(folder, tmp_path):
    first, second = read_folder(folder, DataConfig()), read_folder(folder, DataConfig())
    assert first.graph.entity_ids == second.graph.entity_ids
    np.testing.assert_array_equal(first.graph.triples, second.graph.triples)
    write_folder(first, tmp_path / "out")
    assert facts(read_folder(tmp_path / "out", DataConfig()).graph) == facts(first.graph)


NT = "<http://e/a> <http://e/r> <http://e/b> .\n_:x <http://e/r> <http://e/a> .\n"
FORMATS = {
    "graph.nt": NT, "graph.nq": NT.replace(" .", " <http://e/g> ."), "graph.ttl": NT,
    "graph.trig": "<http://e/g> { " + NT + " }",
    "graph.rdf": '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:e="http://e/"><rdf:Description '
    'rdf:about="http://e/a"><e:r rdf:resource="http://e/b"/></rdf:Description><rdf:Description rdf:nodeID="x"><e:r '
    'rdf:resource="http://e/a"/></rdf:Description></rdf:RDF>',
}


@pytest.mark.parametrize("pack", ["", ".gz", ".bz2"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format(tmp_path, name, pack):
    content = FORMATS[name].encode()
    content = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress}[pack](content)
    (tmp_path / f"{name}{pack}").write_bytes(content)
    graph = read_folder(tmp_path, DataConfig()).graph
    blank = next(e for e in graph.entity_ids if e.startswith("_:"))
    assert facts(graph) == {("http://e/a", "r", "http://e/b"), (blank, "r", "http://e/a")}


def test_blank_nodes_are_unique_a_file(tmp_path):
    (tmp_path / "graph.nt").write_text(NT)
    (tmp_path / "graph.ttl").write_text(NT)
    assert sum(e.startswith("_:") for e in read_folder(tmp_path, DataConfig()).graph.entity_ids) == 2


BAD = {
    "no end": ("graph.nt", b"<http://a> <http://b> <http://c> .\n<http://a> <http://b> x .\n", "graph.nt:2:23: found malf"),
    "prefix": ("graph.ttl", b"<http://a> <http://b> <http://c> .\n<http://a> ex:b <http://c> .\n",
               "graph.ttl:2:12: found malformed RDF (The prefix ex: has not been declared), expected Turtle; declare it"),
    "xml prefix": ("graph.rdf", b'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">\n<x:y/></rdf:RDF>',
                   "graph.rdf:2:1: found malformed RDF (Unknown prefix x:)"),
    "no UTF-8": ("graph.nt", b'<http://a> <http://b> "\xff" .\n', "graph.nt:1:24: found malformed RDF (Invalid UTF-8"),
    "relative": ("graph.ttl", b"<a> <b> <c> .", "graph.ttl:1:1: found malformed RDF (No scheme"),
    "no archive": ("graph.nt.gz", b"<http://a>", "graph.nt.gz: found a file that cannot be read to its end"),
    "cut archive": ("graph.nt.gz", gzip.compress(NT.encode() * 999)[:-20], "graph.nt.gz: found a file that cannot be"),
    "cut bz2": ("graph.nt.bz2", bz2.compress(NT.encode() * 999)[:-20], "graph.nt.bz2: found a file that cannot be"),
}


@pytest.mark.parametrize("name, content, message", BAD.values(), ids=BAD)
def test_bad_rdf_is_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(KgrecError) as error:
        read_folder(tmp_path, DataConfig())
    assert message in str(error.value) and "\n" not in str(error.value)


def test_two_graphs_and_no_item(folder):
    (folder / "triples.tsv").write_text("head_id\trelation\ttail_id\na\tb\tc\n")
    with pytest.raises(KgrecError, match="found both triples.tsv and graph.ttl"):
        read_folder(folder, DataConfig())
    (folder / "triples.tsv").unlink()
    (folder / "graph.ttl").write_text(PREFIXES + "ex:x ex:y ex:z .")
    with pytest.raises(KgrecError, match="no item in any of them.*correct the column entity_id"):
        read_folder(folder, DataConfig())


def test_two_items_that_are_one(folder):
    (folder / "graph.ttl").write_text(TURTLE + "ex:Alien owl:sameAs ex:Q . ex:Q owl:sameAs ex:Heat .", encoding="utf-8")
    with pytest.raises(KgrecError, match="(?s)found the items.*Alien.*Heat|found the items.*Heat.*Alien"):
        read_folder(folder, DataConfig())


def test_same_as_goes_to_the_item_through_cycles():
    same = merge_same([("<a>", "<b>"), ("<b>", "<c>"), ("<c>", "<a>"), ("<d>", "<d>")], {"<c>": "item"})
    assert same == {"<a>": "<c>", "<b>": "<c>"}


def test_literals():
    assert split_literal(r'"a\"b\\n\u4F60\n"@en') == ('a"b\\n你\n', "@en")
    assert split_literal('"x"^^<http://d>') == ("x", "^^<http://d>") and split_literal('""') == ("", "")


def test_several_processes_read_the_same(tmp_path, monkeypatch):
    path = tmp_path / "graph.nt"
    rows = [f"<http://e/{i}> <http://e/r{i % 3}> <http://e/{i * 7 % 50}> .\n" for i in range(2_000)]
    path.write_text("".join(rows) + '<http://e/1> <http://www.w3.org/2000/01/rdf-schema#label> "one" .\n')
    alone = read_rdf([path])
    monkeypatch.setattr(rdf, "_WORTH_A_PROCESS", 1 << 14)
    assert len(pieces([path], 2, 1 << 13)) == 2
    both = read_rdf([path], processes=2)
    assert facts(both) == facts(alone) and both.names == alone.names and both.notes == alone.notes
    path.write_text("".join(rows) + "nonsense\n")
    with pytest.raises(KgrecError, match="graph.nt:2001:1: found malformed"):
        read_rdf([path], processes=2)
