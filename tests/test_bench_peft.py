"""The table of tuning methods: its two forms, its door, and one small run of it in processes of its own."""

import json

import jax
import numpy as np
import pytest

from kgrec_jax.bench import peft as bench
from kgrec_jax.bench_commands import BENCHES
from kgrec_jax.cli import main
from kgrec_jax.data.toy import toy_world
from kgrec_jax.models import peft
from tiny_encoder import make_tiny_encoder


def test_the_door(capsys):
    assert main(["bench"]) == 0
    shown = capsys.readouterr().out
    assert "peft" in BENCHES and all(name in shown for name in BENCHES)
    assert main(["bench", "nothing"]) == 2 and "bench: found 'nothing', expected one of" in capsys.readouterr().err
    assert set(bench.METHODS) == set(peft.METHODS) == bench.RATES.keys()


@pytest.mark.parametrize("words, said", [
    (["--data.path", "nowhere"], "--data.path: found no folder nowhere"), (["--steps", "0"], "--steps: found '0'"),
    (["--length", "3"], "--length: found 3"), (["--methods", "lora", "lora"], "--methods: found lora lora"),
    (["--methods", "magic"], "--methods: found 'magic', expected one of")])
def test_bad_arguments(words, said, capsys, tmp_path):
    assert main(["bench", "peft", "--out", str(tmp_path), *words]) == 2
    assert f"kgrec: {said}" in capsys.readouterr().err


def test_the_table():
    row = {"method": "lora", "trainable_share": 0.0033, "peak_mb": 1234.5, "tokens_per_s": 2000.4, "step_ms": 200.2,
           "mrr": 0.25, "hits@1": 0.1, "hits@10": 0.5, "mergeable": "yes"}
    task = {"data": "umls", "entities": 135, "length": 20, "test": 661, "device": "1 x cpu", "untuned_mrr": 0.09}
    lines = bench.markdown({"task": task, "settings": {"encoder": "E", "steps": 5, "batch": 4, "seed": 0},
                            "rows": [row]}).splitlines()
    assert lines[2] == "| lora | 0.33% | 1,234 | 2,000 | 200 | 0.250 | 0.100 | 0.500 | yes |"
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|") and "MRR 0.090" in lines[4]


def test_queries_in_words_and_their_answers(tmp_path):
    from kgrec_jax.bench import peft_worker as worker
    from kgrec_jax.data.link_batches import merge_queries

    triples = np.array([[0, 0, 1], [0, 0, 2]], np.int32)
    task = worker.Task(triples, np.zeros(2, np.int8), 1, np.array([[7, 8, 9], [5, -1, -1], [6, -1, -1]]),
                       np.array([[3, -1], [4, 3]]), np.eye(3, dtype=np.float32), np.array([101, 102, 0]), 7)
    ids, mask = task.words(np.array([0, 1]), np.array([1, 0]))
    np.testing.assert_array_equal(ids, [[101, 7, 8, 102, 4, 3, 102], [101, 5, 102, 3, 102, 0, 0]])
    np.testing.assert_array_equal(mask, [[1] * 7, [1] * 5 + [0] * 2])
    source = worker.QuerySource(task, merge_queries(triples, 1, 4), 3, 2, 0)
    np.testing.assert_allclose(source[1].weight.sum(1), 1)
    jax.tree.map(np.testing.assert_array_equal, source[1], source[1])


@pytest.mark.slow
def test_a_small_run(tmp_path, capsys):
    """Without --data.path: here, beside no shared data, the toy world."""
    graph = toy_world(num_users=8, num_items=120).graph
    encoder = make_tiny_encoder(tmp_path / "encoder", [*graph.entity_names, *graph.relation_names])
    out = tmp_path / "out"
    words = ["--encoder", str(encoder), "--steps", "4", "--batch", "8", "--eval-limit", "10", "--methods", "frozen",
             "houlsby", "--out", str(out), "--json"]
    before = bench.DEFAULT_DATA
    try:
        bench.DEFAULT_DATA = str(tmp_path / "absent")
        assert main(["bench", "peft", *words]) == 0
    finally:
        bench.DEFAULT_DATA = before
    held = json.loads((out / "table.json").read_text())
    assert json.loads(capsys.readouterr().out) == held and (out / "table.md").read_text().startswith("| method |")
    assert [row["method"] for row in held["rows"]] == ["frozen", "houlsby"] and held["task"]["data"] == "toy world"
    frozen, houlsby = held["rows"]
    assert frozen["trainable_share"] == 0 < houlsby["trainable_share"] and houlsby["mergeable"] == "no"
    assert frozen["mrr"] == pytest.approx(held["task"]["untuned_mrr"])  # a temperature alone changes no order
    assert all(row["peak_mb"] > 50 and row["tokens_per_s"] > 0 and row["loss"] > 0 for row in held["rows"])
    assert sorted(p.name for p in out.iterdir()) == ["table.json", "table.md"]
