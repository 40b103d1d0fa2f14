"""What may be wrong with a graph, at each door it comes in by: a clear line, counted, and nothing silently lost."""

import socket

import pytest

from kgrec_jax import cli
from kgrec_jax.data import graph_endpoint
from kgrec_jax.data.folder import read_folder
from kgrec_jax.data.graph_build import BuildConfig, build_graph
from kgrec_jax.data.graph_report import inspect_graph
from kgrec_jax.data.provenance import read_provenance
from kgrec_jax.errors import KgrecError
from kgrec_jax.tracking import Tracker

PREFIXES = """@prefix e: <http://e/> . @prefix owl: <http://www.w3.org/2002/07/owl#> .
@prefix rdfs: <http://www.w3.org/2000/01/rdf-schema#> .
"""
BODY = PREFIXES + """e:a e:by e:b . e:c e:by e:d . e:by rdfs:label "made by" . e:b e:knows e:d .
"""


def read(path):
    """The two doors of RDF: read into memory with a folder, and built into tables."""
    folder = path.parent / "folder"
    folder.mkdir()
    (folder / f"graph{path.suffix}").write_bytes(path.read_bytes())
    return read_folder(folder)


def build(path, **fields):
    out = path.parent / "out"
    return build_graph(BuildConfig(rdf=(path,), **fields), out, Tracker(out, quiet=True)), out


def both(tmp_path, text, suffix=".ttl"):
    """(notes, {triple}) through either door."""
    path = tmp_path / f"dump{suffix}"
    path.write_text(text, encoding="utf-8")
    notes, out = build(path)
    data, built = read(path), read_folder(out)
    return [(list(data.notes), _facts(data.graph)), (notes, _facts(built.graph))]


def _facts(graph):
    short = [e.removeprefix("http://e/") for e in graph.entity_ids]
    return {(short[h], graph.relation_ids[r].removeprefix("http://e/"), short[t]) for h, r, t in graph.triples.tolist()}


MALFORMED = {
    "Turtle": (".ttl", BODY + "e:a e:by e:b c .", ":4:14: found malformed RDF"),
    "N-Triples": (".nt", "<http://e/a> <http://e/b> <http://e/c> .\n<http://e/a> <http://e/b>\n", ":2:26: found malf"),
    "N-Quads": (".nq", "<http://e/a> <http://e/b> <http://e/c> <http://e/g> .\n<http://e/a> x .\n", ":2:14: found mal"),
    "TriG": (".trig", BODY + "e:g { e:a e:by }\n", ":4:16: found malformed RDF"),
    "RDF/XML": (".rdf", '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">\n<a></b></rdf:RDF>', ":2:"),
    "prefix": (".ttl", BODY + "e:a x:by e:b .", "The prefix x: has not been declared), expected Turtle; declare it"),
    "a literal as subject": (".ttl", BODY + '"a" e:by e:b .', ":4:1: found malformed RDF"),
    "a bad language": (".nt", '<http://e/a> <http://e/b> "x"@ .\n', ":1:"),
    "an open literal": (".nt", '<http://e/a> <http://e/b> "x .\n', ":1:"),
}


@pytest.mark.parametrize("suffix, text, message", MALFORMED.values(), ids=MALFORMED)
def test_malformed_rdf(tmp_path, suffix, text, message, capsys):
    path = tmp_path / f"dump{suffix}"
    path.write_text(text, encoding="utf-8")
    for door in (read, build):
        with pytest.raises(KgrecError) as error:
            door(path)
        assert message in str(error.value) and suffix in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    assert cli.main(["data", "inspect", str(tmp_path / "folder")]) == 2
    assert message in (err := capsys.readouterr().err) and err.startswith("kgrec: ") and err.count("\n") == 1


def test_cyclic_same_as(tmp_path):
    text = BODY + "e:b owl:sameAs e:x . e:x owl:sameAs e:y . e:y owl:sameAs e:b . e:d owl:sameAs e:d . e:y e:by e:a ."
    for notes, facts in both(tmp_path, text):
        assert facts == {("a", "by", "b"), ("c", "by", "d"), ("b", "knows", "d"), ("b", "by", "a")}
        assert any("owl:sameAs merges 2 entities" in note for note in notes)


def test_a_relation_without_a_label(tmp_path):
    for notes, _ in both(tmp_path, BODY):
        assert any("1 of 2 relations have no label (first: http://e/knows)" in note for note in notes)
    for folder in (tmp_path / "folder", tmp_path / "out"):
        names = set(read_folder(folder).graph.relation_names)
        assert names == {"made by", "knows"}
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "triples.tsv").write_text("head_id\trelation\ttail_id\na\tbornIn\tb\na\tby\tc\n")
    (tmp_path / "t" / "relations.tsv").write_text("relation\tname\nby\tmade by\n")
    data = read_folder(tmp_path / "t")
    assert any("1 relations of the triples are not listed (first: bornIn)" in note for note in data.notes)
    assert inspect_graph(tmp_path / "t")[0].quality["relations_without_label"] == ["bornIn"]


def test_an_entity_in_two_types(tmp_path):
    text = BODY + "e:a a e:Film . e:a a e:Work . e:a a e:Film . e:c a e:Film . e:b a e:Person ."
    for notes, facts in both(tmp_path, text):
        assert any("1 entities have more than one type" in note for note in notes)
        assert len(facts) == 7  # each type is a triple, a repeated one counts once
    for folder in (tmp_path / "folder", tmp_path / "out"):
        types = inspect_graph(folder)[0].types
        assert types["in_several"] == 1 and types["first_in_several"] == [{"entity": "a", "types": ["Film", "Work"]}]


def test_types_of_merged_entities_are_counted_together(tmp_path):
    text = BODY + "e:a a e:Film . e:z a e:Work . e:z owl:sameAs e:a ."
    for notes, _ in both(tmp_path, text):
        assert any("1 entities have more than one type" in note for note in notes)


def test_ends_that_no_table_knows(tmp_path):
    (tmp_path / "triples.tsv").write_text("head_id\trelation\ttail_id\na\tby\tb\nc\tby\tQ7\n")
    (tmp_path / "entities.tsv").write_text("entity_id\tname\na\tAlien\n")
    data = read_folder(tmp_path)
    assert any("3 entities of the triples are not in the entity table (first: c)" in note for note in data.notes)
    assert any("1 of 4 have no name" in note for note in data.notes) and len(data.graph.triples) == 2
    (tmp_path / "items.tsv").write_text("item_id\ttitle\n1\tHeat\n")
    with pytest.raises(KgrecError, match="found 2 triples and no item in any of them .such as head 'a'.*entity_id"):
        read_folder(tmp_path)


def test_an_end_that_a_given_split_never_trains(tmp_path):
    for part, rows in (("train", "a\tr\tb\nb\tr\tc\n"), ("test", "a\tr\tz\nc\tr\tb\n")):
        (tmp_path / f"triples.{part}.tsv").write_text(f"head_id\trelation\ttail_id\n{rows}")
    report, _ = inspect_graph(tmp_path)
    assert report.splits["test"] == {"triples": 2, "unseen": 1, "linked": 1, "reversed": 1}
    assert any("test: 1 of 2 triples join entities" in line and "1 have an unseen entity" in line
               for line in report.render())


def test_items_and_relations_that_are_nowhere(tmp_path):
    (tmp_path / "items.txt").write_text("http://e/a\nHeat\n\nhttp://e/nowhere\n<http://e/c>\n")
    (tmp_path / "dump.ttl").write_text(BODY)
    notes, out = build(tmp_path / "dump.ttl", items=tmp_path / "items.txt", hops=1,
                       relations=("http://e/by", "http://e/byy"))
    assert any("1 of 4 items have no IRI (first: Heat): not looked for" in note for note in notes)
    assert any("1 of 3 items are in no triple" in note for note in notes)
    assert any("1 of 2 relations of --relations are in no triple kept (first: http://e/byy)" in note for note in notes)
    assert _facts(read_folder(out).graph) == {("a", "by", "b"), ("c", "by", "d")}


def test_an_endpoint_that_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(graph_endpoint.time, "sleep", lambda seconds: None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "items.txt").write_text("http://e/a\n")
    command = ["data", "graph", "build", "--endpoint", f"http://127.0.0.1:{port}/sparql", "--items",
               str(tmp_path / "items.txt"), "--out", str(tmp_path / "out")]
    assert cli.main(command) == 2
    err = capsys.readouterr().err
    assert "Connection refused" in err and "at each of 4 tries" in err and "Traceback" not in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["items.txt"]


def test_each_triple_has_its_source(tmp_path):
    (tmp_path / "one.nt").write_text("".join(f"<http://e/a> <http://e/r> <http://e/{end}> .\n" for end in "bc"))
    (tmp_path / "two.ttl").write_text(PREFIXES + "e:a e:r e:b . e:B e:r e:c . e:B owl:sameAs e:b .")
    out = tmp_path / "out"
    build_graph(BuildConfig(rdf=(tmp_path / "one.nt", tmp_path / "two.ttl")), out, Tracker(out, quiet=True))
    said = read_provenance(out)
    assert said.sources == {"one.nt": 2, "two.ttl": 2} and said.several == 1 and said.repeated == 1
    rows = {tuple(line.split("\t")) for line in (out / "triples.tsv").read_text().splitlines()[1:]}
    assert ("http://e/B", "http://e/r", "http://e/c", "two.ttl") in rows  # what sameAs renames keeps its source
    assert not any("not used" in note for note in read_folder(out).notes)
