"""kgrec data inspect: the figures are those of a brute force, and what is wrong with a graph is found and named."""

import json
import subprocess
import sys

import numpy as np
import pytest

from kgrec_jax import cli
from kgrec_jax.data import graph_statistics as stats
from kgrec_jax.data.dataset import Graph
from kgrec_jax.data.folder import read_folder
from kgrec_jax.data.graph_report import InspectConfig, inspect_graph
from kgrec_jax.data.graph_types import end_types, read_types
from kgrec_jax.data.provenance import read_provenance
from kgrec_jax.errors import KgrecError


def random_graph(seed=0, n=30, r=5, t=400):
    rng = np.random.default_rng(seed)
    triples = np.stack([rng.integers(0, n - 3, t), rng.integers(0, r, t), rng.integers(0, n - 3, t)], 1)
    triples[triples[:, 1] == 1] = triples[triples[:, 1] == 0][:1]  # relation 1 has nothing but repeats of one triple
    mirrored = triples[triples[:, 1] == 2][:, [2, 1, 0]] + [0, 1, 0]  # relation 3 holds all of 2 reversed, and more
    triples = np.concatenate([triples, mirrored]).astype(np.int32)
    ids = tuple(f"e{k}" for k in range(n))
    part = rng.integers(0, 3, len(triples)).astype(np.int8)
    names = tuple(f"r{k}" for k in range(r))
    return Graph(ids, ids, ("",) * n, names, names, triples, 4, part)


def test_relations_against_brute_force():
    graph = random_graph()
    found, facts = stats.relation_statistics(graph), {tuple(row) for row in graph.triples.tolist()}
    for r in range(graph.num_relations):
        pairs = {(h, t) for h, k, t in facts if k == r}
        heads, tails = {h for h, _ in pairs}, {t for _, t in pairs}
        proper = {(h, t) for h, t in pairs if h != t}
        assert (found.triples[r], found.heads[r], found.tails[r]) == (len(pairs), len(heads), len(tails))
        assert found.loops[r] == len(pairs) - len(proper)
        assert found.symmetric[r] == pytest.approx(sum((t, h) in pairs for h, t in proper) / max(len(proper), 1))
        if pairs:
            assert found.functionality[r] == pytest.approx(len(heads) / len(pairs))
            assert found.inverse_functionality[r] == pytest.approx(len(tails) / len(pairs))
    degree = stats.degrees(graph)
    assert degree[0].tolist() == [sum(h == e for h, _, _ in facts) for e in range(graph.num_entities)]
    assert degree[1].tolist() == [sum(t == e for _, _, t in facts) for e in range(graph.num_entities)]


def test_similar_relations_against_brute_force():
    graph = random_graph()
    facts = {tuple(row) for row in graph.triples.tolist()}
    held = [{(h, t) for h, k, t in facts if k == r} for r in range(graph.num_relations)]
    expected = {}
    for a in range(graph.num_relations):
        for b in range(a + 1, graph.num_relations):
            small, large = sorted((a, b), key=lambda k: (len(held[k]), k))
            for reverse in (False, True):
                shared = sum(((t, h) if reverse else (h, t)) in held[large] for h, t in held[small])
                if shared >= 2 and shared >= 0.6 * len(held[small]):
                    expected[small, large, reverse] = (shared, shared / len(held[large]))
    found = stats.similar_relations(graph, 0.6)
    assert {(p.first, p.second, p.reverse): (p.shared, pytest.approx(p.share_second)) for p in found} == expected
    assert (2, 3, True) in expected


@pytest.mark.parametrize("triples, kind", [
    ([(0, 1), (2, 3)], "1-1"), ([(0, 1), (0, 2), (0, 3)], "1-n"), ([(0, 3), (1, 3), (2, 3)], "n-1"),
    ([(a, b) for a in range(3) for b in range(3)], "n-n")])
def test_kinds(triples, kind):
    graph = Graph(tuple("abcd"), tuple("abcd"), ("",) * 4, ("r",), ("r",),
                  np.array([(a, 0, b) for a, b in triples], np.int32), 0, np.zeros(len(triples), np.int8))
    assert stats.relation_statistics(graph).kind(0) == kind


def test_degree_table_and_components():
    degree = np.array([0, 0, 1, 2, 3, 4, 5, 9])
    assert stats.degree_table(degree) == [(0, 0, 2), (1, 1, 1), (2, 2, 1), (3, 4, 2), (5, 8, 1), (9, 16, 1)]
    assert stats.degree_table(np.zeros(0, int)) == [] and stats.degree_table(np.zeros(3, int)) == [(0, 0, 3)]
    graph = random_graph()
    sizes, root = stats.components(graph), list(range(graph.num_entities))
    for _ in range(graph.num_entities):
        for h, _, t in graph.triples.tolist():
            root[h] = root[t] = min(root[h], root[t])
    assert sizes.tolist() == sorted(np.unique(root, return_counts=True)[1].tolist(), reverse=True)


def test_leaks_against_brute_force():
    graph = random_graph(1)
    train = {(h, t) for (h, _, t), p in zip(graph.triples.tolist(), graph.part) if p == 0}
    seen = {e for pair in train for e in pair}
    for part, name in ((1, "valid"), (2, "test")):
        rows = [(h, t) for (h, _, t), p in zip(graph.triples.tolist(), graph.part) if p == part]
        assert stats.leaks(graph)[name] == stats.Leak(
            len(rows), sum(h not in seen or t not in seen for h, t in rows),
            sum((h, t) in train or (t, h) in train for h, t in rows), sum((t, h) in train for h, t in rows))


FILES = {
    "items.tsv": "item_id\ttitle\nm1\tHeat\nm2\tAlien\nm3\tStalker\n",
    "entities.tsv": "entity_id\tname\ttype\nmann\tMichael Mann\tPerson|Director\nscott\tRidley Scott\tPerson\n"
                    "rome\tRome\tPlace\nfilm\tFilm\t\nwork\tWork\t\nQ1\t\t\nlost\tLost\t\n",
    "relations.tsv": "relation\tname\ndirector\tdirected by\n",
    "triples.tsv": "head_id\trelation\ttail_id\tsource\tconfidence\n"
                   "m1\tdirector\tmann\timdb\t1\nm1\tdirector\tmann\twiki\t0.5\nm1\tdirector\tscott\twiki\t1\n"
                   + "".join(f"m2\tdirector\t{t}\timdb\t1\n" for t in ("scott", "mann", "rome", "Q1"))
                   + "m1\ttype\tfilm\timdb\t1\nm1\ttype\twork\timdb\t1\nm2\ttype\tfilm\timdb\t1\n"
                   "scott\tknows\tscott\timdb\t1\n",
}


@pytest.fixture
def folder(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_findings(folder):
    report, degree = inspect_graph(folder)
    assert report.triples == {"all": 10} and report.items == {"all": 3, "attached": 2, "not_attached": 1}
    assert report.quality["repeated_rows"] == 1 and report.quality["self_loops"] == 1
    assert report.quality["isolated_entities"] == 2  # Stalker and Lost
    assert report.quality["relations_without_label"] == ["type", "knows"]
    assert report.quality["entities_without_name"] == 1 and report.quality["first_without_name"] == ["Q1"]
    assert report.provenance["sources"] == {"imdb": 9, "wiki": 2} and report.provenance["stated_by_several"] == 1
    assert report.provenance["confidence"] == {"rows": 11, "lowest": 0.5, "mean": pytest.approx(10.5 / 11),
                                               "below_1": 1}
    types = report.types
    assert types["said_by"] == ["type", "entities.tsv:type"] and types["in_several"] == 2
    assert {"entity": "Heat", "types": ["Film", "Work"]} in types["first_in_several"]
    [odd] = types["at_odds"]  # mann, scott (twice each) are persons, Rome is none; Q1 has no type
    assert odd == {"relation": "directed by", "end": "tail", "typed": 5, "type": "Person", "share": 0.8,
                   "looks_wrong": False, "such_as": "Rome"}
    assert degree.sum() == 20
    text = "\n".join(report.render())
    for line in ("1 rows repeat a triple", "9  imdb", "Michael Mann: Person, Director", "1 of them in no triple",
                 "no label and are called by their id (type, knows)", "are no Person, such as Rome (mixed types)"):
        assert line in text, line
    assert "m1" not in text and "scott" not in text  # names, not ids


def test_types_by_a_named_relation(folder):
    graph = read_folder(folder).graph
    types = read_types(graph, None, ("directed by",))
    assert set(types.names) == {"Michael Mann", "Ridley Scott", "Rome", "Q1"} and types.said_by == ("directed by",)
    assert all(e.relation not in types.relations for e in end_types(graph, types))
    with pytest.raises(KgrecError, match="--type-relation: found 'genre', expected one of the graph's relations"):
        inspect_graph(folder, InspectConfig(type_relations=("genre",)))


def test_rdf_graph(tmp_path):
    prefix = "@prefix e: <http://e/> . @prefix rdfs: <http://www.w3.org/2000/01/rdf-schema#> .\n"
    (tmp_path / "graph.ttl").write_text(prefix + "e:a a e:Film, e:Work ; e:by e:b . e:by rdfs:label 'made by' .")
    report, _ = inspect_graph(tmp_path)
    assert report.provenance["files"] == {"graph.ttl": -1} and report.types["in_several"] == 1
    assert report.quality["relations_without_label"] == ["http://www.w3.org/1999/02/22-rdf-syntax-ns#type"]


@pytest.mark.parametrize("row, message", [
    ("a\tr\tb\t\t1", "triples.tsv:3: found an empty cell in the column source"),
    ("a\tr\tb\tx\t1.5", "triples.tsv:3: found the confidence 1.5 (1 such rows), expected a number from 0 to 1"),
    ("a\tr\tb\tx\tsure", "triples.tsv:3: found 'sure' in the column confidence")])
def test_bad_provenance(tmp_path, row, message):
    (tmp_path / "triples.tsv").write_text(f"head_id\trelation\ttail_id\tsource\tconfidence\nx\tr\ty\ts\t1\n{row}\n")
    assert not any("not used" in note for note in read_folder(tmp_path).notes)  # a run does not need them
    with pytest.raises(KgrecError) as error:
        read_provenance(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_command(folder, tmp_path, capsys):
    out = tmp_path / "report"
    assert cli.main(["data", "inspect", str(folder), "--out", str(out)]) == 0
    assert f"written      {out}" in capsys.readouterr().out
    assert (out / "degrees.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert json.loads((out / "report.json").read_text())["entities"] == 10
    rows = [line.split("\t") for line in (out / "relations.tsv").read_text().splitlines()]
    assert dict(zip(rows[0], rows[1]))["tail_type"] == "Person" and len(rows) == 4
    assert cli.main(["data", "inspect", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["items"]["attached"] == 2
    (tmp_path / "triples.tsv").unlink()
    assert cli.main(["data", "inspect", str(folder)]) == 2 and "found no triples" in capsys.readouterr().err


def test_published_figures(shared):
    """FB15k-237 was made so that no test triple's entities are joined in training (Toutanova & Chen 2015)."""
    report, _ = inspect_graph(shared / "data" / "fb15k-237")
    assert report.splits["test"] == {"triples": 20_466, "unseen": 28, "linked": 0, "reversed": 0}


def test_inspect_needs_no_jax():
    code = ("import sys; import kgrec_jax.data.graph_report, kgrec_jax.data.graph_render; "
            "assert 'jax' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)
