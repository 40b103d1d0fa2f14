"""kgrec data import tuples: forms, linking, thresholds, and that nothing enters the graph but what was accepted."""

import json

import pytest

from kgrec_jax import cli
from kgrec_jax.data.folder import read_folder
from kgrec_jax.data.importers.linking import Linker
from kgrec_jax.data.importers.review import TuplesConfig, import_tuples
from kgrec_jax.data.importers.surface import entity_key, relation_key, shown
from kgrec_jax.data.importers.tuples import gather, read_tuples
from kgrec_jax.data.provenance import read_provenance
from kgrec_jax.errors import KgrecError


@pytest.mark.parametrize("forms", [
    ("The Matrix", "the matrix", "  Matrix,", "“The Matrix”", "Ｔｈｅ Ｍａｔｒｉｘ"), ("Schindler's List", "schindlers list"),
    ("Spider-Man", "spider man"), ("故宫", "「故宫」", "故宫。"), ("서울", "서울"), ("!!!", "!!!")])
def test_forms_of_one_entity(forms):
    assert len({entity_key(form) for form in forms}) == 1 and entity_key(forms[0])


def test_forms_of_different_entities():
    keys = [entity_key(f) for f in ("C", "C++", "C#", "故宫", "故宫博物院", "The The", "A Man", "Man of Steel", "серп", "サン")]
    assert len(set(keys)) == len(keys)
    assert [entity_key(f) for f in ("he", "The", "", " ", "他们", "그것", "It")] == [""] * 7
    assert entity_key("It (1990)") and entity_key("故宫") == "故宫" and shown(" 「故宫」。") == "「故宫」"


@pytest.mark.parametrize("forms", [
    ("was directed by", "is directed by", "Directed By", "directed_by", "has been directed by", "was also directed by"),
    ("wrote", "writes", "has written", "written", "writing"), ("produces", "produced", "produce"),
    ("is the capital of", "was capital of", "capital of"), ("stopped", "stops", "stopping"), ("plays in", "played in"),
    ("didn't win", "did not win"), ("marries", "married"), ("位于", "位于。"), ("감독했다", "감독했다")])
def test_forms_of_one_relation(forms):
    assert len({relation_key(form) for form in forms}) == 1 and relation_key(forms[0])


def test_forms_of_different_relations():
    keys = [relation_key(f) for f in ("directed", "directed by", "did not direct", "will direct", "is in", "has", "is",
                                      "born in", "born on", "位于", "位", "child of", "has child of", "won",
                                      "did not win")]
    assert len(set(keys)) == len(keys)


FOLDER = {
    "items.tsv": "item_id\tentity_id\ttitle\n1\tm1\tHeat (1995)\n2\tm2\tAliens\n3\tm3\tMatrix, The (1999)\n",
    "entities.tsv": "entity_id\tname\tdescription\taliases\nmann\tMichael Mann\tdirector\tM. Mann|迈克尔·曼\n"
                    "smith1\tJohn Smith\ta writer\t\nsmith2\tJohn Smith\tan actor\t\nla\tLos Angeles\t\tL.A.\n",
    "relations.tsv": "relation\tname\nfilm.directed_by\tdirected by\nset_in\tset in\n",
    "triples.tsv": "head_id\trelation\ttail_id\nm1\tfilm.directed_by\tmann\nm3\tset_in\tla\nsmith1\tset_in\tla\n"
                   "smith2\tset_in\tla\n",
}
TUPLES = """subject	relation	object	confidence	source
Heat	was directed by	M. Mann	0.9	s0
the Heat	is set in	L.A.	0.6	s1
HEAT	was set in	Los Angeles	0.7	s2
Heat	set in	los angeles	0.5	s2
Aliens	was directed by	James Cameron	0.8	s3
"aliens"	is directed by	The James Cameron	0.5	s4
John Smith	wrote	Aliens	0.9	s5
He	directed	Heat	0.9	s6
Fox	is located in	Texas	0.9	s7
Heat	is set in	Heat	0.9	s8
The Matrix	was filmed in	Sydney	0.3	s9
迈克尔·曼	出生于	芝加哥	0.95	s10
"""


@pytest.fixture
def folder(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for name, text in FOLDER.items():
        (base / name).write_text(text, encoding="utf-8")
    (tmp_path / "found.tsv").write_text(TUPLES, encoding="utf-8")
    return tmp_path


def config(folder, **fields):
    return TuplesConfig(folder / "found.tsv", folder / "base", **fields)


def decide(path, decisions, **cells):
    """Edit the review file as a person would: {subject: decision}, and cells of the accepted rows."""
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    for row in lines[1:]:
        row[0] = decisions.get(row[1], "")
        for column, value in cells.items() if row[0].lower() == "accept" else ():
            row[lines[0].index(column)] = value
    path.write_text("\n".join("\t".join(row) for row in lines) + "\n", encoding="utf-8")


def test_candidates(folder):
    found = gather(read_tuples(folder / "found.tsv"), Linker(read_folder(folder / "base").graph, folder / "base"))
    by = {(c.subject, c.status): c for c in found.candidates}
    heat = by["Heat", "new"]
    assert (heat.subjects, heat.relations, heat.objects) == (("m1",), ("set_in",), ("la",))
    assert heat.support == 2 and heat.confidence == pytest.approx(1 - 0.4 * 0.3)  # s2 counts once, with its 0.7
    cameron = by["Aliens", "new"]
    assert cameron.object == "James Cameron" and cameron.objects == () and cameron.relations == ("film.directed_by",)
    assert cameron.confidence == pytest.approx(1 - 0.2 * 0.5) and cameron.source == "s3"
    smith = by["John Smith", "ambiguous"]
    assert smith.subjects == ("smith1", "smith2") and smith.objects == ("m2",)
    assert by["迈克尔·曼", "new"].subjects == ("mann",) and by["迈克尔·曼", "new"].relation == "出生于"
    assert {key for key in by if key[1] in ("unlinked", "loop")} == {("Fox", "unlinked"), ("Heat", "loop")}
    assert (found.mentions, found.statements, found.known, found.weak, found.empty) == (12, 8, 1, 1, 1)
    assert found.statements == len(found.candidates) + found.known + found.weak
    text = "\n".join(found.lines())
    assert "1 statements are in the graph already" in text and "(first: The Matrix, was filmed in, Sydney" in text
    linker = Linker(read_folder(folder / "base").graph, folder / "base")
    strict = gather(read_tuples(folder / "found.tsv"), linker, 2, 0.5)
    assert {c.subject for c in strict.candidates} == {"Heat", "Aliens"} and strict.weak == 5


def test_first_the_review_file_then_what_was_accepted(folder):
    out, review = folder / "out", folder / "out.review.tsv"
    notes = import_tuples(config(folder), out)
    assert not out.exists() and "6 rows to review" in notes[-1] and f"--review {review}" in notes[-1]
    lines = review.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("decision\tsubject\trelation\tobject\tconfidence\tsupport\tstatus") and len(lines) == 7
    [smith] = [line for line in lines if "John Smith" in line]
    assert "smith1 | smith2" in smith and "smith1: John Smith a writer; smith2: John Smith an actor" in smith
    with pytest.raises(KgrecError, match="found a review file already"):
        import_tuples(config(folder), out)
    decide(review, {"Aliens": "Accept", "Fox": "reject"})
    notes = import_tuples(config(folder, review=review), out)
    assert "1 accepted, 1 rejected, 4 without a decision" in notes[-2]
    assert (out / "triples.tsv").read_text().splitlines()[-1] == (
        "m2\tfilm.directed_by\tentity/James_Cameron\tfound.tsv: s3 (and 1 more)\t0.9")
    data = read_folder(out)
    assert dict(zip(data.graph.entity_ids, data.graph.entity_names))["entity/James_Cameron"] == "James Cameron"
    assert len(data.graph.triples) == 5 and data.num_items == 3
    said = read_provenance(out)
    assert said.sources == {"triples.tsv": 4, "found.tsv: s3 (and 1 more)": 1} and said.confidence.min() == 0.9


def test_choices_in_the_review_file(folder):
    out, review = folder / "out", folder / "out.review.tsv"
    import_tuples(config(folder), out)
    decide(review, {"John Smith": "accept"})
    with pytest.raises(KgrecError, match=r"out.review.tsv:\d+: found the choice 'smith1 \| smith2'"):
        import_tuples(config(folder, review=review), out)
    decide(review, {"John Smith": "accept"}, subject_entity="smith3")
    with pytest.raises(KgrecError, match="found 'smith3' in the column subject_entity, expected an id of the graph"):
        import_tuples(config(folder, review=review), out)
    assert not out.exists()
    decide(review, {"John Smith": "accept"}, subject_entity="smith2")
    import_tuples(config(folder, review=review), out)
    assert "smith2\twrote\tm2\tfound.tsv: s5\t0.9\n" in (out / "triples.tsv").read_text()
    assert "wrote\twrote\n" in (out / "relations.tsv").read_text()
    decide(review, {"John Smith": "accept", "Fox": "accept"}, subject_entity="new")
    import_tuples(config(folder, review=review), folder / "second")
    assert "entity/John_Smith\twrote\tm2\t" in (folder / "second" / "triples.tsv").read_text()
    assert "entity/Fox\tis_located_in\tentity/Texas\t" in (folder / "second" / "triples.tsv").read_text()


def test_auto_accept_takes_what_is_sure_and_plain(folder):
    out, review = folder / "out", folder / "out.review.tsv"
    notes = import_tuples(config(folder, auto_accept=0.9), out)
    rows = (out / "triples.tsv").read_text(encoding="utf-8").splitlines()[5:]
    assert {row.split("\t")[0] for row in rows} == {"m2", "mann"}  # 0.9 and 0.95; not Smith, Fox, or Heat in Heat
    assert "4 rows to review" in notes[-1]
    decide(review, {"Heat": "reject"})
    with pytest.raises(KgrecError, match="found no accepted row"):
        import_tuples(config(folder, review=review), folder / "second")
    notes = import_tuples(config(folder, review=review, auto_accept=0.8), folder / "second")
    assert any("2 more are accepted by --auto-accept 0.8" in note for note in notes)  # a rejected row stays out
    assert "set_in\tla\tfound" not in (folder / "second" / "triples.tsv").read_text()


def test_tuples_that_came_after_the_review_are_said(folder):
    import_tuples(config(folder), folder / "out")
    decide(folder / "out.review.tsv", {"Aliens": "accept"})
    with open(folder / "found.tsv", "a", encoding="utf-8") as file:
        file.write("Aliens\tset in\tSpace\t0.9\ts11\n")
    notes = import_tuples(config(folder, review=folder / "out.review.tsv", min_confidence=0.95), folder / "out")
    assert any("1 accepted" in note for note in notes)  # a decision counts whatever the thresholds are now
    notes = import_tuples(config(folder, review=folder / "out.review.tsv"), folder / "second")
    assert any("1 statements are not in the review file (first: Aliens, set in, Space): not used" in n for n in notes)


@pytest.mark.parametrize("edit, message", [
    ({"Heat": "maybe"}, "found the decision 'maybe', expected accept, reject or nothing"),
    ({"Heat": "accept "}, ""), ({}, "found no accepted row")])
def test_decisions(folder, edit, message):
    import_tuples(config(folder), folder / "out")
    decide(folder / "out.review.tsv", edit)
    if not message:
        assert import_tuples(config(folder, review=folder / "out.review.tsv"), folder / "out")
        return
    with pytest.raises(KgrecError) as error:
        import_tuples(config(folder, review=folder / "out.review.tsv"), folder / "out")
    assert message in str(error.value) and "\n" not in str(error.value) and not (folder / "out").exists()
    if edit:
        assert "out.review.tsv:" in str(error.value)


def test_a_row_of_another_file(folder):
    review = folder / "out.review.tsv"
    import_tuples(config(folder), folder / "out")
    lines = review.read_text(encoding="utf-8").splitlines()
    review.write_text("\n".join([*lines, lines[1][:-10] + "0123456789"]) + "\n", encoding="utf-8")
    with pytest.raises(KgrecError, match="out.review.tsv:8: found the row '0123456789', which is no statement of"):
        import_tuples(config(folder, review=review), folder / "out")


BAD = {
    "width": ("t.tsv", "a\tb\tc\t0.5\na\tb\tc\n", "t.tsv:2: found 3 fields, expected 4 as in the first line"),
    "two": ("t.tsv", "a\tb\n", "t.tsv:1: found 2 fields, expected subject, relation, object"),
    "confidence": ("t.tsv", "a\tb\tc\t0.5\n\na\tb\tc\t7\n", "t.tsv:3: found the confidence '7', expected a number"),
    "word": ("t.tsv", "subject\trelation\tobject\tscore\na\tb\tc\thigh\n", "t.tsv:2: found the confidence 'high'"),
    "empty": ("t.tsv", "\n", "t.tsv: found no tuple"),
    "header": ("t.tsv", "subject\trelation\tobject\n", "found no tuple"),
    "json": ("t.jsonl", '{"subject": "a", "relation": "b", "object": "c"}\n{"subject"\n', "t.jsonl:2: found malformed"),
    "list": ("t.jsonl", "[1]\n", "t.jsonl:1: found no object"),
    "field": ("t.jsonl", '{"subject": "a", "relation": "b"}\n', "t.jsonl:1: found None for the object"),
    "absent": ("u.tsv", "", "t.tsv: found no such file"),
    "bytes": ("t.tsv", b"a\tb\tc\n\xff\n", "t.tsv:2: found bytes")}


@pytest.mark.parametrize("name, content, message", BAD.values(), ids=BAD)
def test_bad_tuples(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(KgrecError) as error:
        read_tuples(tmp_path / name.replace("u.tsv", "t.tsv"))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_json_lines_say_the_same(folder):
    names = ("arg1", "rel", "arg2", "score", "sentence")
    rows = [dict(zip(names, line.split("\t"), strict=True)) for line in TUPLES.splitlines()[1:]]
    for row in rows:
        row["score"] = float(row["score"])
    (folder / "found.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert read_tuples(folder / "found.jsonl") == read_tuples(folder / "found.tsv")
    (folder / "bare.tsv").write_text("Heat\tset in\tL.A.\n")
    [bare] = read_tuples(folder / "bare.tsv")
    assert bare.confidence == 1 and bare.source == "bare.tsv:1"


def test_command(folder, capsys):
    command = ["data", "import", "tuples", str(folder / "found.tsv"), "--graph", str(folder / "base"), "--out",
               str(folder / "out")]
    assert cli.main(command) == 0 and "6 rows to review" in capsys.readouterr().out
    review = ["--review", str(folder / "out.review.tsv")]
    assert cli.main([*command, *review]) == 2 and "found no accepted row" in capsys.readouterr().err
    assert cli.main([*command, *review, "--auto-accept", "0.85"]) == 0
    assert cli.main(["data", "import", "tuples", "x"]) == 2 and "--graph" in capsys.readouterr().err
    assert cli.main([*command, "--review", "absent"]) == 2
