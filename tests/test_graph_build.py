"""kgrec data graph build: whole dumps and neighbourhoods, on disk, in processes and from an endpoint."""

import http.server
import json
import threading
import urllib.parse

import numpy as np
import pytest

from kgrec_jax import cli
from kgrec_jax.data import graph_build, graph_endpoint, graph_spill, graph_workers
from kgrec_jax.data.folder import DataConfig, read_folder
from kgrec_jax.data.graph_build import BuildConfig, build_graph
from kgrec_jax.errors import KgrecError
from kgrec_jax.tracking import Tracker

LABEL = "<http://www.w3.org/2000/01/rdf-schema#label>"
SAME = "<http://www.w3.org/2002/07/owl#sameAs>"
E = "http://e/"
NT = f"""<{E}a> <{E}r> <{E}b> .
<{E}b> <{E}s> <{E}c> .
<{E}c> <{E}r> <{E}d> .
<{E}b> <{E}r> _:x .
<{E}z> <{E}r> <{E}y> .
<{E}A> {SAME} <{E}a> .
<{E}A> <{E}s> <{E}k> .
<{E}A> {LABEL} "Ay"@en .
<{E}b> {LABEL} "Bee\\t1"@en .
<{E}c> {LABEL} "Zeh"@de .
<{E}b> <{E}year> "1995" .
<{E}r> {LABEL} "reads"@en .
<{E}year> {LABEL} "born in"@en .
"""


def build(tmp_path, text=NT, **fields):
    path, out = tmp_path / "dump.nt", tmp_path / "out"
    path.write_text(text, encoding="utf-8")
    notes = build_graph(BuildConfig(**{"rdf": (path,), **fields}), out, Tracker(out, quiet=True))
    return notes, out


def facts(out):
    rows = [line.split("\t") for line in (out / "triples.tsv").read_text(encoding="utf-8").splitlines()[1:]]
    return {"".join(part.removeprefix(E) for part in row[:3]) for row in rows}


def items(tmp_path, text=f"{E}a\n"):
    path = tmp_path / "items.txt"
    path.write_text(text)
    return path


def test_everything(tmp_path):
    notes, out = build(tmp_path)
    assert facts(out) == {"Arb", "bsc", "crd", "br_:f0.x", "zry", "Ask"}
    graph = read_folder(out, DataConfig()).graph
    names, texts = (dict(zip(graph.entity_ids, column)) for column in (graph.entity_names, graph.entity_texts))
    assert names[E + "A"] == "Ay" and names[E + "b"] == "Bee 1" and names[E + "c"] == "c" and names["_:f0.x"] == ""
    assert texts[E + "b"] == "born in: 1995" and dict(zip(graph.relation_ids, graph.relation_names))[E + "r"] == "reads"
    for note in ("6 triples, 8 entities, 2 relations; 1 entities", "owl:sameAs merges 1",
                 "1 of 2 relations have no label",
                 "1 literals in other languages"):
        assert any(note in line for line in notes), (note, notes)


@pytest.mark.parametrize("hops, expected", [(1, {"arb", "ask"}), (2, {"arb", "ask", "bsc", "br_:f0.x"})])
def test_neighbourhood(tmp_path, hops, expected):
    notes, out = build(tmp_path, items=items(tmp_path), hops=hops)
    assert facts(out) == expected
    text = (out / "entities.tsv").read_text()
    assert f"{E}b\tBee 1\tborn in: 1995" in text and f"{E}a\tAy\t" in text and "http://e/z" not in text


def test_relations_and_items_of_a_folder(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "items.tsv").write_text(f"item_id\tentity_id\n1\t{E}a\n2\t{E}none\n3\t\n")
    notes, out = build(tmp_path, items=folder, relations=(E + "r",))
    assert facts(out) == {"arb", "br_:f0.x"} and any("1 of 2 items are in no triple" in note for note in notes)


def test_several_processes_write_the_same(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    text = "".join(f'<{E}{h}> <{E}r> <{E}{t}> .\n<{E}{h}> {LABEL} "n{h}"@en .\n'
                   for h, t in rng.integers(0, 500, (3_000, 2)).tolist())
    (tmp_path / "x").mkdir()
    _, alone = build(tmp_path / "x", text)
    monkeypatch.setattr(graph_workers, "_SMALL", 1)
    cut = graph_build.pieces
    monkeypatch.setattr(graph_build, "pieces", lambda paths, parts: cut(paths, parts, 1 << 15))
    _, both = build(tmp_path, text, processes=2)
    for name in ("triples.tsv", "entities.tsv", "relations.tsv"):
        assert (alone / name).read_bytes() == (both / name).read_bytes()


def test_store_beside(tmp_path):
    import pyoxigraph

    notes, out = build(tmp_path, store="oxigraph")
    store = pyoxigraph.Store.read_only(str(out / "store"))
    assert len(list(store.query(f"SELECT ?x {{ <{E}b> ?p ?x }}"))) == 4 and "13 statements" in notes[-1]
    assert read_folder(out, DataConfig()).graph.num_relations == 2


BAD = {
    "malformed": (NT + "x", {}, "dump.nt:14:1: found malformed RDF"),
    "nothing": (f'<{E}a> {LABEL} "A" .\n', {}, "found no triple between entities"),
    "items elsewhere": (NT, {"items": "http://f/a\n"}, "found no triple that touches an item"),
    "no IRI": (NT, {"items": "Heat\n"}, "items.txt: found no IRI"),
    "items that are one": (NT, {"items": f"{E}a\n{E}A\n"}, "owl:sameAs: found the items"),
}


@pytest.mark.parametrize("text, fields, message", BAD.values(), ids=BAD)
def test_bad_input_writes_nothing(tmp_path, text, fields, message):
    if "items" in fields:
        fields = {"items": items(tmp_path, fields["items"])}
    with pytest.raises(KgrecError) as error:
        build(tmp_path, text, **fields)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "items.txt") == ["dump.nt"]


def test_command(tmp_path, capsys):
    (tmp_path / "dump.nt").write_text(NT)
    command = ["data", "graph", "build", "--out", str(tmp_path / "out"), "--processes", "1", "--rdf"]
    assert cli.main([*command, str(tmp_path / "dump.nt")]) == 0 and "6 triples" in capsys.readouterr().out
    assert cli.main([*command, str(tmp_path / "dump.nt")]) == 2  # OUT is there already
    assert cli.main([*command, str(tmp_path / "dump.csv")]) == 2
    assert cli.main(["data", "graph", "paint"]) == 2 and "expected build" in capsys.readouterr().err


@pytest.fixture
def endpoint(monkeypatch):
    """A server on NT; `fail` holds the status codes (or "slow", "html") of its next answers."""
    import pyoxigraph

    store, fail = pyoxigraph.Store(), []
    store.bulk_load(NT.encode(), format=pyoxigraph.RdfFormat.N_TRIPLES)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            kind = fail.pop(0) if fail else 200
            if kind == "slow":
                threading.Event().wait(1.0)
                return
            content = b"<html>welcome</html>" if kind == "html" else b"busy\nnow"
            if kind == 200:
                content = store.query(urllib.parse.parse_qs(body)["query"][0]).serialize(
                    format=pyoxigraph.QueryResultsFormat.JSON)
                json.loads(content)
            self.send_response(200 if kind == "html" else kind)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(graph_endpoint, "_PAGE", 2)
    monkeypatch.setattr(graph_endpoint.time, "sleep", lambda seconds: None)
    yield f"http://127.0.0.1:{server.server_port}/sparql", fail
    server.shutdown()
    server.server_close()


def test_endpoint_gives_the_same_neighbourhood(tmp_path, endpoint):
    url, fail = endpoint
    fail += [503, 429]  # in passing
    notes, out = build(tmp_path, rdf=(), endpoint=url, items=items(tmp_path))
    assert {f.split("_:")[0] for f in facts(out)} == {"arb", "ask", "bsc", "br"}
    assert f"{E}b\tBee 1\tborn in: 1995" in (out / "entities.tsv").read_text()
    assert "reads" in (out / "relations.tsv").read_text() and any("step 2" in note for note in notes)


@pytest.mark.parametrize("kinds, message", [
    ([500] * 4, "found HTTP 500 (busy now) at each of 4 tries"), ([404], "found HTTP 404 (busy now), expected SPARQL"),
    (["html"], "found '<html>welcome</html>'"), (["slow"] * 4, "found no answer within 0.2 s at each of 4 tries")])
def test_endpoint_that_fails(tmp_path, endpoint, kinds, message):
    url, fail = endpoint
    fail += kinds
    with pytest.raises(KgrecError) as error:
        graph_endpoint.fetch(url, [f"<{E}a>"], tmp_path / "x.nt", 1, (), ("en",), Tracker(tmp_path, quiet=True),
                             timeout=0.2)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_endpoint_that_is_none(tmp_path):
    with pytest.raises(KgrecError, match="expected the http"):
        build(tmp_path, rdf=(), endpoint="ftp://x", items=items(tmp_path))
    with pytest.raises(KgrecError, match="--items: found none with an endpoint"):
        build(tmp_path, rdf=(), endpoint="http://x")
    with pytest.raises(KgrecError, match="expected one of --rdf FILE… and --endpoint URL"):
        build(tmp_path, rdf=())


def test_a_term_and_many_terms_go_to_the_same_partition():
    terms = ["<http://a/1>", "_:b", "a", "", "<http://例え/物>", "<http://a/2>"]
    many = graph_spill.partitions_of(terms, 7)
    assert many.tolist() == [graph_spill.partition_of(t, 7) for t in terms]
    spread = np.bincount(graph_spill.partitions_of([f"<http://a/{k}>" for k in range(8000)], 8), minlength=8)
    assert spread.min() > 700 and spread.max() < 1300
