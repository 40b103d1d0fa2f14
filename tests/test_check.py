"""kgrec data check: counts that are true, gaps, languages and minutes, in lines that a person reads."""

import dataclasses
import subprocess
import sys
import time

import numpy as np
import pytest

from kgrec_jax.data.check import check_folder, estimate_minutes
from kgrec_jax.data.folder import DataConfig, read_folder, write_folder
from kgrec_jax.data.interactions import SplitConfig, make_split
from kgrec_jax.data.text import train_wordpiece
from kgrec_jax.data.toy import toy_world
from kgrec_jax.errors import KgrecError

BUDGETS = {"pretrain": 60.0, "graph": 90.0, "fuse": 30.0, "evaluate": 6.0}


@pytest.fixture(scope="module")
def world():
    return toy_world(seed=0, num_users=40, num_items=60)


@pytest.fixture
def folder(world, tmp_path):
    write_folder(world, tmp_path / "toy")
    return tmp_path / "toy"


def test_counts_are_true(folder, world):
    report = check_folder(folder, DataConfig(), budgets=lambda dataset: BUDGETS)
    log = world.interactions
    assert (report.users, report.items, report.interactions) == (40, 60, len(log))
    assert report.users_without_history == 40 - len(np.unique(log.user)) == 2
    assert report.items_without_history == 60 - len(np.unique(log.item)) >= 5
    assert report.density == len(log) / 2400 and report.cold_share == report.items_without_history / 60
    counts = np.unique(log.user, return_counts=True)[1]
    assert report.rows_per_user == (counts.min(), int(np.median(counts)), counts.max())
    assert report.triples == (192, 0, 0) and (report.entities, report.relations) == (86, 4)
    assert (report.items_without_graph, report.items_without_text, report.unnamed_entities) == (0, 0, 0)
    split = make_split(world, SplitConfig())
    assert report.split == "random" and report.parts == (len(split.train), len(split.valid), len(split.test))
    assert report.unseen_items == 60 - len(np.unique(split.fit.item))
    assert report.minutes == {"pretrain": 1.0, "graph": 1.5, "fuse": 0.5, "evaluate": 0.1} and report.coverage is None
    lines = report.render()
    assert all("\n" not in line for line in lines)
    text = "\n".join(lines)
    for words in (f"{len(log):,} (", "2 without history", "192 triples, 86 entities, 4 "
                  "relations", "0 of 60 items without text",
                  "pretrain 1.0, graph 1.5, fuse 0.5, evaluate 0.1; 3.1 in "
                  "all", "with ratings and timestamps", "split         random"):
        assert words in text, words


def test_gaps_are_counted(folder):
    rows = [f"film{i}\t{'A film' if i % 2 else ''}\n" for i in range(60)]
    (folder / "items.tsv").write_text("".join(["item_id\ttitle\n", *rows, "new\tNew\n"]))
    (folder / "triples.tsv").write_text("head_id\trelation\ttail_id\nfilm0\tr\tm.0abc\nfilm1\tr\tm.0abc\n")
    (folder / "entities.tsv").unlink()
    (folder / "users.tsv").unlink()
    report = check_folder(folder)
    assert (report.items, report.items_without_text, report.items_without_graph) == (61, 30, 59)
    assert report.unnamed_entities == 1
    assert report.users_without_history == 0 and report.unseen_items > 0
    assert any("30 of 61 items without text" in line for line in report.render())
    assert any("have no text" in line for line in report.render() if line.startswith("note"))


def test_language_is_measured(folder, tmp_path):
    tokenizer = train_wordpiece(toy_world().item_texts, tmp_path / "tokenizer", vocab_size=400)
    report = check_folder(folder, tokenizer=tokenizer)
    assert report.coverage.unk_share == 0 and 1 <= report.coverage.tokens_per_word < 3
    assert any("[UNK]" in line for line in report.render())
    assert not any(line.startswith("warning") for line in report.render())
    write_folder(toy_world(num_users=40, num_items=60, language="zh"), tmp_path / "zh")
    report = check_folder(tmp_path / "zh", tokenizer=tokenizer)
    assert report.coverage.unk_share > 0.2
    assert any(line.startswith("warning") and "falls back" in line for line in report.render())


def test_stages_without_work_take_no_time(world, tmp_path):
    nothing = dataclasses.replace(world.graph, triples=world.graph.triples[:0], part=world.graph.part[:0])
    assert estimate_minutes(dataclasses.replace(world, graph=nothing), BUDGETS)["graph"] == 0
    (tmp_path / "triples.tsv").write_text("head_id\trelation\ttail_id\nsun\tnear\tmoon\n")
    report = check_folder(tmp_path, budgets=lambda dataset: BUDGETS)
    assert report.minutes == {"pretrain": 1.0, "graph": 1.5, "fuse": 0.0, "evaluate": 0.0} and report.split == ""
    assert "fuse skipped" in "\n".join(report.render()) and "items" not in "\n".join(report.render())
    (tmp_path / "triples.tsv").unlink()
    (tmp_path / "interactions.tsv").write_text("user_id\titem_id\n" + "".join(f"u\t{i}\n" for i in range(9)))
    report = check_folder(tmp_path, budgets=lambda dataset: BUDGETS)
    assert report.minutes == {"pretrain": 0.0, "graph": 0.0, "fuse": 0.5, "evaluate": 0.1}
    assert "graph         none" in report.render() and report.items_without_text == 9


def test_errors_are_those_of_a_run(folder):
    with pytest.raises(KgrecError, match="cold.txt: found no such file"):
        check_folder(folder, DataConfig(split=SplitConfig("cold-items", items="cold.txt")))
    with (folder / "triples.tsv").open("a") as file:
        file.write("film0\tgenre\n")
    with pytest.raises(KgrecError, match="triples.tsv:194: found 2 fields, expected 3"):
        check_folder(folder)


def test_seconds_on_real_data(shared):
    start = time.monotonic()
    report = check_folder(shared / "data" / "ml1m-dbpedia")
    assert time.monotonic() - start < 30  # under two alone
    fitted = read_folder(shared / "data" / "ml1m-dbpedia", DataConfig())
    assert report.interactions == len(fitted.interactions) == 998_539 and report.split == "fixed"
    assert check_folder(shared / "data" / "fb15k-237").triples == (272115, 17535, 20466)


def test_check_needs_no_jax():
    code = ("import sys, kgrec_jax.data.check, kgrec_jax.data.importers.csv, kgrec_jax.data.toy; "
            "assert 'jax' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)
