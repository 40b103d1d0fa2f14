"""Numbers among the literals of RDF as buckets of a graph, against NumPy, and in memory that is bounded."""

import numpy as np
import pytest

from kgrec_jax import cli
from kgrec_jax.data import graph_numbers
from kgrec_jax.data.buckets import bucket_of, cuts, number, said, span
from kgrec_jax.data.folder import read_folder
from kgrec_jax.data.graph_build import BuildConfig, build_graph
from kgrec_jax.data.provenance import read_provenance
from kgrec_jax.errors import KgrecError
from kgrec_jax.tracking import Tracker

X = "http://www.w3.org/2001/XMLSchema#"


def dump(tmp_path, rows=200):
    rng = np.random.default_rng(0)
    years = rng.integers(1900, 2000, rows).tolist()
    lines = ["<http://e/year> <http://www.w3.org/2000/01/rdf-schema#label> \"released in\" .",
             "<http://e/0> <http://www.w3.org/2002/07/owl#sameAs> <http://e/z> .",
             f'<http://e/z> <http://e/height> "1.5"^^<{X}decimal> .']
    for k, year in enumerate(years):
        lines += [f"<http://e/{k}> <http://e/next> <http://e/{(k + 1) % rows}> .",
                  f'<http://e/{k}> <http://e/year> "{year}-05-01"^^<{X}date> .',
                  f'<http://e/{k}> <http://e/rank> "{k % 4}"^^<{X}integer> .',
                  f'<http://e/{k}> <http://e/note> "note {k}" .',
                  f'<http://e/{k}> <http://e/height> "{1 + k / 7:.3f}"^^<{X}decimal> .']
    lines.append('<http://e/3> <http://e/height> "tall" .')
    (tmp_path / "dump.nt").write_text("\n".join(lines) + "\n")
    return tmp_path / "dump.nt", years


def build(path, **fields):
    out = path.parent / "out"
    return build_graph(BuildConfig(rdf=(path,), **fields), out, Tracker(out, quiet=True)), out


@pytest.mark.parametrize("sample", [1 << 14, 50])
def test_buckets_of_literals(tmp_path, monkeypatch, sample):
    monkeypatch.setattr(graph_numbers, "_SAMPLE", sample)
    path, years = dump(tmp_path)
    notes, out = build(path, numbers=4)
    graph = read_folder(out).graph
    ids, names = graph.entity_ids, dict(zip(graph.entity_ids, graph.entity_names))
    year = graph.relation_ids.index("http://e/year")
    assert graph.relation_names[year] == "released in"
    found = {ids[h]: names[ids[t]] for h, r, t in graph.triples.tolist() if r == year}
    assert len(found) == len(years)
    for k, value in enumerate(years):  # each year lies within the name of its bucket, and the names are tight
        low, high = map(int, found[f"http://e/{k}"].split(" to "))
        assert low <= value <= high and {low, high} <= set(years)
    sizes = np.unique(list(found.values()), return_counts=True)[1]
    assert len(sizes) == 4 and sizes.min() >= (45 if sample > len(years) else 20)
    assert set(graph.relation_ids) == {"http://e/next", "http://e/year", "http://e/height"}  # few ranks, notes
    assert any("2 relations of numbers and dates: 400 triples to 8 buckets" in note for note in notes)
    assert any("1 literals of these are no numbers" in note for note in notes) and "600 triples" in notes[0]
    text = dict(zip(graph.entity_ids, graph.entity_texts))["http://e/3"]
    assert "height: 1.429, tall" in text and f"released in: {years[3]}-05-01" in text  # text keeps what it had
    assert read_provenance(out).sources == {"dump.nt": 600}
    heights = {ids[h] for h, r, t in graph.triples.tolist() if graph.relation_ids[r] == "http://e/height"}
    assert heights == {f"http://e/{k}" for k in range(200)}  # what sameAs says is one has one name


def test_without_numbers_nothing_changes(tmp_path):
    path, _ = dump(tmp_path, 30)
    notes, out = build(path)
    assert set(read_folder(out).graph.relation_ids) == {"http://e/next"} and not any("buckets" in n for n in notes)
    with pytest.raises(KgrecError, match="--numbers: found 1, expected at least 2 buckets"):
        build_graph(BuildConfig(rdf=(path,), numbers=1), tmp_path / "new", Tracker(tmp_path, quiet=True))


def test_command(tmp_path, capsys):
    path, _ = dump(tmp_path, 60)
    command = ["data", "graph", "build", "--rdf", str(path), "--out", str(tmp_path / "out"), "--numbers", "3"]
    assert cli.main(command) == 0
    assert "2 relations of numbers and dates" in capsys.readouterr().out


@pytest.mark.parametrize("buckets", [2, 5, 9])
def test_cuts(buckets):
    rng = np.random.default_rng(buckets)
    for values in (rng.normal(size=500), rng.integers(0, 6, 500).astype(float), np.ones(7)):
        ends = cuts(values, buckets)
        rows = bucket_of(values, ends)
        assert len(ends) < buckets and set(rows) == set(range(len(ends) + 1))  # none is empty
        for k, end in enumerate(ends):
            assert values[rows == k].max() == end < values[rows == k + 1].min()
    assert np.ptp(np.bincount(bucket_of(np.arange(500.0), cuts(np.arange(500.0), buckets)))) <= 1


def test_words_for_numbers():
    assert (span(1, 1), span(1, 2.5), said(1e20), said(-3.0), said(0.1)) == ("1", "1 to 2.5", "1e+20", "-3", "0.1")
    assert number("-0044-03-15") == -44 and number("1995-07-01T10:00:00Z") == 1995 and number("2.5E-3") == 0.0025
