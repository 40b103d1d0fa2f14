"""Bad input from the command line: one clear line, exit code 2, no traceback, not a byte of what was there changed."""

import functools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_encoder import make_tiny_encoder

from kgrec_jax import cli
from kgrec_jax.data import sources
from kgrec_jax.data.folder import write_folder
from kgrec_jax.data.text import train_wordpiece
from kgrec_jax.data.toy import toy_world

CONFIG = """
from kgrec_jax.config import Experiment
from kgrec_jax.data.folder import DataConfig
from kgrec_jax.models.towers import TowerConfig
from kgrec_jax.stages import fuse, graph, pretrain
from kgrec_jax.stages.fuse_gate import GateConfig


def get_config():
    return Experiment(
        encoder={encoder!r}, data=DataConfig(path={data!r}), pretrain=pretrain.Config(mode="off"),
        graph=graph.Config(dim=8, steps=2, batch=32, encoder_mode="off"),
        fuse=fuse.Config(tower=TowerConfig(width=16, max_history=8), steps=2, batch=16, text_length=16,
                         gate=GateConfig(steps=2, batch=16)))
"""
USERS, ITEMS = 30, 24


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No package index."""
    offline = [("pip", [sys.executable, "-c", "raise SystemExit('offline')"])]
    monkeypatch.setattr(sources, "_fetchers", lambda *args: offline)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with data, an encoder, a config for them and a finished run of it."""
    root = tmp_path_factory.mktemp("bad")
    world = toy_world(num_users=USERS, num_items=ITEMS)
    write_folder(world, root / "data")
    make_tiny_encoder(root / "bert", [*world.item_texts, *world.graph.entity_names])
    (root / "mine.py").write_text(CONFIG.format(encoder=str(root / "bert"), data=str(root / "data")))
    assert cli.main(["run", str(root / "mine.py"), "--workdir", str(root / "run")]) == 0
    return root


@pytest.fixture
def root(whole, tmp_path):
    """A copy of all of it to spoil, with paths of its own."""
    copy = tmp_path / "root"
    shutil.copytree(whole, copy)
    (copy / "mine.py").write_text(CONFIG.format(encoder=str(copy / "bert"), data=str(copy / "data")))
    experiment = json.loads((copy / "run" / "experiment.json").read_text().replace(str(whole), str(copy)))
    (copy / "run" / "experiment.json").write_text(json.dumps(experiment))
    return copy


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    """{path: bytes} of everything below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def refused(root, capsys):
    """refused(argv, words, new=()): the command ends in one line that matches `words`; nothing but `new` changes."""
    return functools.partial(refuse, root, capsys)


def refuse(root, capsys, argv, words, new=()):
    """Runs a command that has to be refused; `new`: what may appear or change, as beginnings of paths below `root`."""
    before = contents(root)
    code = cli.main([str(word) for word in argv])
    out, err = capsys.readouterr()
    assert code == 2, (code, err)
    assert "Traceback" not in out + err
    last = err.splitlines()[-1]
    assert last.startswith("kgrec: ") and re.search(words, last), last
    assert err.count("kgrec: ") == 1
    after = contents(root)
    changed = [name for name in before.keys() | after.keys()
               if before.get(name) != after.get(name) and not name.startswith(tuple(new))]
    assert not changed, changed
    return last


# --- the data -----------------------------------------------------------------------------------------------------


def add(name, text):
    """A line at the end of a file."""
    def edit(folder):
        with open(folder / name, "ab") as file:
            file.write(text if isinstance(text, bytes) else text.encode())
    return edit


def put(name, text):
    """A file of other content."""
    def edit(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return edit


def edits(*several):
    """One after the other."""
    def edit(folder):
        for one in several:
            one(folder)
    return edit


def remove(name):
    """A file less."""
    return lambda folder: (folder / name).unlink()


def cut(name, columns):
    """A table with some of its columns."""
    def edit(folder):
        rows = [line.split("\t") for line in (folder / name).read_text().splitlines()]
        (folder / name).write_text("".join("\t".join(row[i] for i in columns) + "\n" for row in rows))
    return edit


def vectors(values, ids):
    """Media with these vectors and ids."""
    def edit(folder):
        (folder / "media").mkdir()
        np.save(folder / "media" / "cover.npy", values)
        (folder / "media" / "cover.ids.txt").write_text(ids)
    return edit


PAIRS = "user_id\titem_id\n"
SPLIT = edits(remove("interactions.tsv"), put("train.tsv", PAIRS + "user1\tfilm1\nuser1\tfilm2\n"))
DATA = {
    "missing column": (cut("interactions.tsv", (0, 2)),
                       r"interactions\.tsv:1: found the columns user_id, rating, expected "
                       r"user_id, item_id \(missing: item_id\)"),
    "missing column of a triple": (cut("triples.tsv", (0, 2)),
                                   r"triples\.tsv:1: found the columns .*missing: relation"),
    "no item_id": (put("items.tsv", "id\ttitle\n1\tx\n"),
                   r"items\.tsv:1: found the columns id, title, expected item_id"),
    "relation columns": (put("relations.tsv", "relation\tlabel\nr\tx\n"),
                         r"relations\.tsv:1: found the columns relation, "
                         r"label, expected relation, name"),
    "entity columns": (put("entities.tsv", "id\tname\nr\tx\n"),
                       r"entities\.tsv:1: found the columns id, name, expected "
                       "entity_id, name"),
    "a column twice": (put("items.tsv", "item_id\ttitle\ttitle\n1\tx\ty\n"),
                       r"items\.tsv:1: found the column title twice"),
    "triple of two fields": (add("triples.tsv", "film1\tgenre\n"), r"triples\.tsv:\d+: found 2 fields, expected 3"),
    "triple of four fields": (add("triples.tsv", "film1\tgenre\tx\ty\n"),
                              r"triples\.tsv:\d+: found 4 fields, expected 3"),
    "triple with an empty field": (add("triples.tsv", "film1\t\tx\n"),
                                   r"triples\.tsv:\d+: found an empty cell in the column "
                                   "relation"),
    "unknown item": (add("interactions.tsv", "user1\tno-film\t3\t5\n"),
                     r"interactions\.tsv:\d+: found the item 'no-film'"),
    "NaN rating": (add("interactions.tsv", "user1\tfilm1\tnan\t5\n"),
                   r"interactions\.tsv:\d+: found an empty cell or NaN "
                   "in the column rating, expected a finite number"),
    "infinite rating": (add("interactions.tsv", "user1\tfilm1\tinf\t5\n"), r"interactions\.tsv:\d+: found an infinite"),
    "garbled rating": (add("interactions.tsv", "user1\tfilm1\tgood\t5\n"),
                       r"interactions\.tsv:\d+: found 'good' in the "
                       "column rating"),
    "decimal comma": (add("interactions.tsv", "user1\tfilm1\t3,5\t5\n"), r"interactions\.tsv:\d+: found '3,5' in"),
    "timestamp in words": (add("interactions.tsv", "user1\tfilm1\t3\t2020-01-01\n"), r"interactions\.tsv:\d+: found "
                           "'2020-01-01' in the column timestamp, expected a whole number"),
    "empty timestamp": (add("interactions.tsv", "user1\tfilm1\t3\t\n"), r"interactions\.tsv:\d+: found an empty cell"),
    "timestamp too large": (add("interactions.tsv", "user1\tfilm1\t3\t1e300\n"),
                            r"interactions\.tsv:\d+: found .*timestamp"),
    "underscored number": (add("interactions.tsv", "user1\tfilm1\t1_0\t5\n"), r"interactions\.tsv:\d+: found '1_0'"),
    "other digits": (add("interactions.tsv", "user1\tfilm1\t٣\t5\n"), r"interactions\.tsv:\d+: found '٣'"),
    "no user": (add("interactions.tsv", "\tfilm1\t3\t5\n"),
                r"interactions\.tsv:\d+: found an empty cell in the column user_id"),
    "too many fields": (add("interactions.tsv", "user1\tfilm1\t3\t5\t6\n"),
                        r"interactions\.tsv:\d+: found 5 fields, expected 4"),
    "items twice": (add("items.tsv", "film1\tother\tx\ty\n"), r"items\.tsv:26: found the item_id 'film1' a second time "
                    r"\(first: items\.tsv:3\)"),
    "users twice": (add("users.tsv", "user1\n"), r"users\.tsv:\d+: found the user_id 'user1' a second time"),
    "entities twice": (add("entities.tsv", "genre1\tx\t\n"),
                       r"entities\.tsv:\d+: found the entity_id 'genre1' a second"),
    "relations twice": (add("relations.tsv", "genre\tx\n"), r"relations\.tsv:\d+: found the relation 'genre' a second"),
    "two items of one entity": (add("items.tsv", "film99\tfilm1\tx\ty\n"),
                                r"items\.tsv:26: found the items 'film1' and "
                                "'film99' with the one entity_id 'film1'"),
    "empty log": (put("interactions.tsv", ""), r"interactions\.tsv: found an empty file, expected a header and rows"),
    "a header alone": (put("interactions.tsv", PAIRS), r"interactions\.tsv: found a header and no rows"),
    "empty items": (put("items.tsv", ""), r"items\.tsv: found an empty file"),
    "empty triples": (put("triples.tsv", ""), r"triples\.tsv: found an empty file"),
    "empty first line": (put("items.tsv", "\n1\n"), r"items\.tsv:1: found an empty line, expected the names"),
    "latin-1": (add("items.tsv", b"film98\t\tAm\xe9lie\tx\n"), r"items\.tsv:26: found bytes that are not UTF-8"),
    "latin-1 header": (put("items.tsv", b"item_id\ttitr\xe9\n1\tx\n"), r"items\.tsv:1: found bytes that are not UTF-8"),
    "UTF-16": (put("items.tsv", "item_id\ttitle\n1\tx\n".encode("utf-16")),
               r"items\.tsv:1: found UTF-16, expected UTF-8"),
    "binary": (put("interactions.tsv", bytes(range(256)) * 20), r"interactions\.tsv:\d*:? ?found"),
    "open quote": (edits(remove("items.tsv"), put("items.csv", 'item_id,title\nfilm1,"x\n')),
                   r"items\.csv:2: found a value "
                   "that does not end"),
    "no parquet": (edits(remove("items.tsv"), put("items.parquet", "x")),
                   r"items\.parquet: found something that is not Parq"),
    "no item in the graph": (put("triples.tsv", "head_id\trelation\ttail_id\nx\tr\ty\n"),
                             r"triples\.tsv: found 1 triples and "
                             "no item"),
    "two logs": (put("train.tsv", PAIRS + "user1\tfilm1\n"), "found both interactions.tsv and train.tsv"),
    "two tables": (put("items.csv", "item_id\nfilm1\n"), r"found both items\.tsv and items\.csv"),
    "test alone": (edits(remove("interactions.tsv"), put("test.tsv", PAIRS + "user1\tfilm1\n")),
                   "found test.tsv alone, expected"),
    "train and test": (edits(SPLIT, put("test.tsv", PAIRS + "user2\tfilm1\nuser1\tfilm2\n")),
                       r"test\.tsv:3: found user "
                       r"'user1' with item 'film2', which train\.tsv has too"),
    "vectors and ids": (vectors(np.zeros((2, 3), np.float32), "film1\n"), r"cover\.npy: found 2 vectors and 1 ids"),
    "vector of nobody": (vectors(np.ones((1, 3), np.float32), "x\n"), r"cover\.ids\.txt:1: found the item 'x'"),
    "vector of NaN": (vectors(np.full((1, 3), np.nan, np.float32), "film1\n"), r"cover\.npy: found NaN"),
    "no vectors": (edits(vectors(np.ones((1, 3), np.float32), "film1\n"), put("media/cover.npy", b"x")),
                   r"cover\.npy: found "
                   "something that is not a NumPy array"),
}


@pytest.mark.parametrize("name", DATA)
def test_data(root, refused, name):
    edit, words = DATA[name]
    edit(root / "data")
    refused(["run", root / "mine.py", "--workdir", root / "new"], words, new=("new/",))
    refused(["data", "check", root / "data", "--no-encoder"], words)


def test_data_path(root, refused):
    (root / "empty").mkdir()
    (root / "other").mkdir()
    (root / "other" / "readme.txt").write_text("x")
    command = ["run", root / "mine.py", "--workdir", root / "new", "--data.path"]
    for path, words in ((root / "nowhere", "data.path: found no such folder at .*nowhere, expected a dataset folder"),
                        (root / "mine.py", "data.path: found a file at .*mine.py, expected a dataset folder"),
                        (root / "empty", "empty: found nothing, expected interactions.tsv"),
                        (root / "other", r"other: found readme\.txt, expected interactions.tsv"),
                        ("pypi:nonsense", "found 'pypi:nonsense', expected pypi:NAME==VERSION"),
                        ("hub:", "found 'hub:', expected hub:ORG/NAME"),
                        ("pypi:no-such-thing==1.0#x",
                         "could not be fetched .*offline.* put .*run the same command again")):
        refused([*command, path], words, new=("new/",))


# --- the config ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words, said", [
    (["--fuse.stepz", "3"], "--fuse.stepz: unknown field, expected .*did you mean --fuse.steps"),
    (["--fuse.steps", "many"], "--fuse.steps: found 'many', expected int"),
    (["--fuse.optim.peak-lr", "fast"], "--fuse.optim.peak-lr: found 'fast', expected float"),
    (["--data.split.kind", "fair"], "--data.split.kind: found 'fair', expected one of"),
    (["--seed"], "--seed: found no value, expected int"),
    (["--data.split.items", "nowhere.txt"], "data.split.items: found nowhere.txt for the split random, expected"),
    (["--data.split.kind", "cold-items", "--data.split.items", "nowhere.txt"],
     "nowhere.txt: found no such file, expected"),
    (["--data.split.kind", "fixed"], "data.split.kind: found fixed for data, which has no train.tsv"),
    (["--data.split.test-share", "1.5"], "data.split.test_share: found 1.5, expected a share"),
    (["--data.min-rating", "9"], "data.min_rating: found no interaction rated 9 or more"),
    (["--data.text-columns", "plot"], "data.text_columns: found 'plot', expected columns of .*items.tsv"),
    (["--graph.dim", "0"], "graph.dim: found 0, expected 2 to"),
    (["--pretrain.mode", "lora", "--pretrain.length", "1"], "pretrain.length: found 1, expected 3 to"),
    (["--pretrain.mode", "lora", "--pretrain.length", "100000"], "pretrain.length: found 100000, expected 3 to"),
    (["--mesh.data", "7"], "found"), (["--data.split.seed", "-1"], "data.split.seed: found -1, expected"),
    (["--fuse.batch", "0"], "fuse.batch: found 0, expected"), (["--fuse.steps", "-5"],
                                                               "fuse.steps: found -5, expected"),
    (["--fuse.tower.width", "0"], "fuse.tower.width: found 0, expected"),
    (["--fuse.tower.history", "transformer", "--fuse.tower.heads", "3"], "fuse.tower.heads: found 3, expected"),
    (["--fuse.text-length", "0"], "fuse.text_length: found 0, expected"),
    (["--fuse.batch", "0", "--fuse.steps", "0"], "fuse.batch: found 0, expected"), (["--graph.tails", "-1"],
                                                                                    "graph.tails: found -1"),
    (["--pretrain.mode", "lora", "--pretrain.batch", "0"], "pretrain.batch: found 0, expected 1 to"),
    (["--fuse.eval-users", "-1"], "fuse.eval_users: found -1, expected"),
    (["--fuse.gate.steps", "-1"], "fuse.gate.steps: found -1, expected"),
    (["--fuse.gate.inner-share", "2"], "fuse.gate.inner_share: found 2.0, expected"),
    (["--fuse.optim.peak-lr", "-1"], "fuse.optim.peak_lr: found -1.0, expected"),
    (["--fuse.gate.optim.b1", "2"], "fuse.gate.optim.b1: found 2.0, expected"),
    (["--graph.table-optim.eps", "-1"], "graph.table_optim.eps: found -1.0, expected"),
])
def test_fields(root, refused, words, said):
    refused(["run", root / "mine.py", "--workdir", root / "new", *words], said, new=("new/",))


@pytest.mark.parametrize("body, said", [
    ("def get_config(:\n    return 1\n", r"bad\.py:1: found a syntax error .*expected Python"),
    ("x = 1\n", r"bad\.py: found no get_config\(\), expected"),
    ("def get_config():\n    return {}\n", r"bad\.py: found a get_config\(\) that returns dict, expected Experiment"),
    ("def get_config():\n    return 1 / 0\n", r"bad\.py:2: found ZeroDivisionError"),
    ("from kgrec_jax.config import Experiment\n\n\ndef get_config():\n    return Experiment(sead=1)\n",
     r"bad\.py:5: found TypeE"),
    ("from kgrec_jax.config import Experiment\n\n\ndef get_config():\n    return Experiment(seed='x')\n",
     r"bad\.py: seed: found 'x', expected int"),
    ("caf\xe9 = 1\n".encode("latin-1"), r"bad\.py:\d+: found"), (b"\x00\x01", r"bad\.py:\d+: found"),
])
def test_config_files(root, refused, body, said):
    (root / "bad.py").write_bytes(body if isinstance(body, bytes) else body.encode())
    refused(["run", root / "bad.py", "--workdir", root / "new"], said)


def test_config_names(root, refused):
    for name in ("nowhere", "nowhere.py", "configs/nowhere.py", root):
        refused(["run", name, "--workdir", root / "new"], "CONFIG: found no file .*expected a path or a shipped")
    refused(["run", root / "mine.py"], "--workdir: found none, expected the folder of the run")
    refused(["run", "default", "--workdir", root / "new"], "--data.path: found none, expected a dataset folder")


# --- the encoder --------------------------------------------------------------------------------------------------


def larger_vocabulary(folder):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    rng = np.random.default_rng(0)
    texts = ["".join(chr(97 + letter) for letter in rng.integers(0, 26, 6)) for _ in range(300)]
    made = train_wordpiece(texts, folder / "made", 400)
    for file in made.iterdir():
        file.replace(folder / file.name)
    made.rmdir()


def halve(name):
    """A file that was cut short."""
    def edit(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:len(data) // 2])
    return edit


def less(folder):
    weights = load_file(folder / "model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, folder / "model.safetensors")


ENCODERS = {
    "tokenizer of another model": (larger_vocabulary,
                                   r"bert: found a tokenizer of \d+ tokens, expected at most the \d+ rows"),
    "weights cut short": (halve("model.safetensors"), r"model\.safetensors: found no readable safetensors file"),
    "a weight less": (less, r"model\.safetensors: the weights do not fit config\.json; missing: \w+"),
    "no weights": (remove("model.safetensors"), "bert: found no weights, expected model.safetensors"),
    "no config": (remove("config.json"), "bert: found no config.json, expected"),
    "config cut short": (halve("config.json"), r"config\.json: found no readable JSON"),
    "config of something else": (put("config.json", "[]"), r"config\.json: found a JSON list, expected an object"),
    "empty config": (put("config.json", "{}"), r"config\.json"),
    "no tokenizer": (remove("tokenizer.json"), "bert: found neither tokenizer.json nor vocab.txt, expected"),
    "tokenizer cut short": (halve("tokenizer.json"), "bert: found no readable tokenizer"),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(root, refused, name):
    edit, words = ENCODERS[name]
    edit(root / "bert")
    refused(["run", root / "mine.py", "--workdir", root / "new", "--pretrain.mode", "lora"], words, new=("new/",))


def test_encoder_that_is_nowhere(root, refused):
    for source in (root / "nowhere", "hub:", "pypi:nonsense"):
        command = ["run", root / "mine.py", "--workdir", root / "new", "--pretrain.mode", "lora", "--encoder", source]
        refused(command, "found", new=("new/",))


# --- the run folder -----------------------------------------------------------------------------------------------


def test_run_of_another_config(root, refused):
    command = ["run", root / "mine.py", "--workdir", root / "run"]
    refused([*command, "--fuse.steps", "7"], r"experiment\.json: found a run with another fuse\.steps, expected")
    refused([*command, "--seed", "1", "--graph.dim", "16"], "another seed, graph.dim")
    refused(["run", "default", "--data.path", root / "data", "--workdir", root / "run"], "found a run with another")
    add("items.tsv", "film99\t\tNew\tx\n")(root / "data")
    refused(["evaluate", root / "run"], "data.path: found other data than the run")


def test_foreign_folders(root, refused):
    (root / "thesis").mkdir()
    (root / "thesis" / "chapter1.txt").write_text("It was a dark night.")
    run = ["run", root / "mine.py", "--workdir"]
    refused([*run, root / "thesis"], "thesis: found files but no experiment.json, expected a run folder or an")
    refused([*run, root / "data"], "data: found files but no experiment.json")
    refused([*run, root / "mine.py"], r"mine\.py: found a file, expected a run folder")
    refused([*run, root / "mine.py" / "below"], "found no way to make the folder .*expected a place that can")
    refused(["refit", root / "run", root / "thesis"], "OUT: found something in .*thesis already, expected")
    refused(["refit", root / "run", root / "run"], "OUT: found .*expected another folder")
    refused(["refit", root / "run", root / "mine.py"], "mine.py")
    for command in (["evaluate", root / "thesis"], ["refit", root / "thesis", root / "out"], ["evaluate",
                                                                                              root / "nowhere"]):
        refused(command, "(thesis|nowhere): found no experiment.json, expected a run folder")


def test_unfinished_runs(root, refused):
    shutil.rmtree(root / "run" / "recommender")
    for name in ("fuse/done.json", "report.json"):
        (root / "run" / name).unlink()
    for command in (["evaluate", root / "run"], ["refit", root / "run", root / "out"]):
        refused(command, "run: found a run whose stage fuse is not finished, expected a finished one")
    refused(["recommend", root / "run", "--user", "user1"], "found no recommender.json, expected .*finished run")


SPOILT = {
    "split row": (add("split/train.tsv", "user1\tfilm1\t1\t1\n"),
                  "split: found a split that was changed after it was frozen"),
    "split item": (add("split/train.tsv", "user1\tnothing\t1\t1\n"),
                   r"train\.tsv: found the item_id 'nothing', expected"),
    "split fields": (add("split/train.tsv", "user1\n"), r"train\.tsv:\d+: found 1 field, expected 4"),
    "no split part": (remove("split/test.tsv"), r"test\.tsv: found no such file, expected"),
    "split.json": (put("split/split.json", "{"), r"split\.json: found no readable split"),
    "split.json without a part": (put("split/split.json",
                                      '{"data_sha256": "", "split_sha256": "", "interactions": {}}'),
                                  r"split\.json: found"),
    "split.json list": (put("split/split.json", "[]"), r"split\.json: found no readable split"),
    "choices": (halve("fuse/choices.json"), r"choices\.json"),
    "choices of nothing": (put("fuse/choices.json", "{}"), r"choices\.json"),
    "choices of another version": (put("fuse/choices.json", '{"linear": {"x": 1}, "content": null, "text_source": "", '
                                       '"text_compared": {}, "skipped": {}}'), r"choices\.json"),
    "gate": (halve("fuse/gate.json"), r"gate\.json"),
    "gate of nothing": (put("fuse/gate.json", "{}"), r"gate\.json"),
    "texts": (halve("fuse/text.npz"), r"text\.npz"),
    "stage": (put("graph/done.json", "x"), r"done\.json: found a damaged file"),
    "experiment": (halve("experiment.json"), r"experiment\.json: found a damaged file"),
    "dataset": (put("dataset.json", "x"), r"dataset\.json: found a damaged file"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_spoilt_runs(root, refused, name):
    edit, words = SPOILT[name]
    edit(root / "run")
    refused(["evaluate", root / "run"], words)
    refused(["refit", root / "run", root / "out"], words)


@pytest.mark.parametrize("text, words", [("{", ":1: found"), ("[]", "found format version None"), (b"\xff\xfe",
                                                                                                   "found invalid"),
                                         ('{"format_version": 1}', "found a report that differs in candidates")])
def test_spoilt_reports(root, refused, text, words):
    put("report.json", text)(root / "run")
    refused(["run", root / "mine.py", "--workdir", root / "run"], rf"report\.json:? ?.*{words}.*kgrec evaluate")


# --- recommending -------------------------------------------------------------------------------------------------


def test_recommend(root, refused):
    command = ["recommend", root / "run"]
    (root / "list.txt").write_text("film1\nno-film\n")
    (root / "latin.txt").write_bytes(b"film1\ncaf\xe9\n")
    (root / "blank.txt").write_text("\n")
    user = [*command, "--user", "user1"]
    for words, said in (
            ([*command, "--user", "nobody"], "--user: found no user 'nobody', expected one of the 30"),
            ([*command, "--history", "No Such Film"],
             "--history: found no item 'No Such Film', expected a title; the nearest"),
            ([*command, "--query", " "], "--query: found an empty text, expected words"),
            (command, "arguments: found none, expected exactly one of"),
            ([*user, "--query", "x"], "found --user and --query, expected exactly one"),
            ([*user, "-k", "0"], "-k: found '0', expected a whole number"), ([*user, "-k", "x"],
                                                                             "-k: found 'x', expected"),
            ([*user, "--candidates", root / "list.txt"], r"list\.txt:2: found the unknown item 'no-film', expected"),
            ([*user, "--candidates", root / "latin.txt"], r"latin\.txt:2: found bytes that are not UTF-8"),
            ([*user, "--candidates", root / "blank.txt"], r"blank\.txt: found no item id, expected"),
            ([*user, "--candidates", root / "nowhere.txt"],
             "--candidates: found no such file at .*nowhere.txt, expected"),
            ([*user, "--candidates", root], "--candidates: found a folder at"),
            ([*command, "--all-users"], "--out: found none, expected"), ([*user, "--out", root / "x"], "--out: found"),
            ([*command, "--all-users", "--out", root / "data"], "--out: found a folder"),
            ([*command, "--all-users", "--out", root / "mine.py" / "x.tsv"], "mine.py"),
            (["recommend", root / "nowhere", "--user", "user1"], "found no recommender.json, expected"),
            (["recommend", root / "mine.py", "--user", "user1"], "found no recommender.json, expected")):
        refused(words, said)


def test_spoilt_recommenders(root, capsys):
    folder = root / "run" / "recommender"
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        data = file.read_bytes()
        file.write_bytes(data[:len(data) // 2])
        code = cli.main(["recommend", str(root / "run"), "--query", "A comedy film"])
        out, err = capsys.readouterr()
        assert "Traceback" not in err and (code == 0 or file.name in err.splitlines()[-1]), (file, err)
        assert code == 0 or err.splitlines()[-1].startswith("kgrec: ")
        file.write_bytes(data)


# --- in a process of its own --------------------------------------------------------------------------------------


def test_no_traceback_in_a_process(root):
    add("interactions.tsv", "user1\tfilm1\tnan\t5\n")(root / "data")
    env = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(pathlib.Path(__file__).resolve().parents[1])}
    words = [sys.executable, "-m", "kgrec_jax", "run", str(root / "mine.py"), "--workdir", str(root / "new")]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stdout + done.stderr
    last = done.stderr.splitlines()[-1]
    assert re.search(r"^kgrec: .*interactions\.tsv:\d+: found an empty cell or NaN in the column rating, expected",
                     last)
