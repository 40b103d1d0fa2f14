"""Rows, lines and bars."""

import io
import json
import sys
import types

import numpy as np
import pytest
from rich.console import Console

from kgrec_jax import tracking
from kgrec_jax.tracking import Tracker, write_json


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rows_reach_jsonl_and_tensorboard(tmp_path):
    tracker = Tracker(tmp_path / "run").at(tmp_path / "stage")
    tracker.metrics(10, {"loss": np.float32(0.5), "recall@20": 0.25})
    tracker.metrics(20, {"loss": float("nan")})
    tracker.close()
    assert rows(tmp_path / "stage") == [{"step": 10, "loss": 0.5, "recall@20": 0.25}, {"step": 20, "loss": None}]
    assert list((tmp_path / "stage" / "tensorboard").iterdir()) and not (tmp_path / "run").exists()


def test_rows_ahead_of_the_checkpoint_are_cut(tmp_path):
    tracker = Tracker(tmp_path)
    for step in (10, 20, 30):
        tracker.metrics(step, {"loss": 1.0 / step})
    tracker.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "lo')  # a kill in the middle of a line
    tracker.resume_from(20)
    tracker.metrics(30, {"loss": 7.0})
    tracker.close()
    assert [(r["step"], r["loss"]) for r in rows(tmp_path)] == [(10, 0.1), (20, 0.05), (30, 7.0)]


def test_write_json_is_whole_or_old(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"x": np.arange(2), "y": np.float32(0.5), "z": [float("inf"), None], "p": tmp_path, "名": "电影"})
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "x": [0, 1], "y": 0.5, "z": [None, None], "p": str(tmp_path), "名": "电影"}
    assert "电影" in path.read_text(encoding="utf-8")
    with pytest.raises(TypeError):
        write_json(path, {"bad": object()})
    assert json.loads(path.read_text(encoding="utf-8"))["y"] == 0.5
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tracking, "_SECONDS_BETWEEN_LINES", 0.0)
    tracker = Tracker(tmp_path)
    with tracker.progress("graph", 50, start=10) as bar:
        for _ in range(40):
            bar.advance(1, loss=0.123456)
    tracker.say("[red] done: 3/4 at 0:00 " + "x" * 200)
    err = capsys.readouterr()
    lines = err.err.splitlines()
    assert err.out == "" and len(lines) == 9
    assert lines[0].startswith("graph: 15 of 50, 0:00 gone, ") and lines[0].endswith(", loss 0.1235")
    assert lines[-2].startswith("graph: 50 of 50") and lines[-1] == "[red] done: 3/4 at 0:00 " + "x" * 200


def test_a_quick_thing_needs_one_line(tmp_path, capsys):
    with Tracker(tmp_path).progress("index", 1000) as bar:
        for _ in range(1000):
            bar.advance()
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_bar_on_a_terminal(tmp_path):
    tracker = Tracker(tmp_path)
    out = io.StringIO()
    tracker._console = Console(file=out, force_terminal=True, width=120)
    with tracker.progress("fuse [1/2]", 4) as bar:
        for _ in range(4):
            bar.advance(1, loss=0.25)
    assert "fuse [1/2]" in out.getvalue() and "4/4" in out.getvalue() and "loss 0.25" in out.getvalue()


def test_quiet_says_nothing_and_still_logs(tmp_path, capsys):
    tracker = Tracker(tmp_path, quiet=True)
    tracker.say("x")
    with tracker.progress("x", 2) as bar:
        bar.advance(2)
    tracker.metrics(1, {"loss": 1.0})
    tracker.close()
    assert capsys.readouterr().err == "" and rows(tmp_path)


def test_wandb_only_where_it_is_asked_for(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(log=lambda values, step: calls.append((step, values)),
                                finish=lambda: calls.append("finish"))
    fake = types.ModuleType("wandb")
    fake.__spec__ = types.SimpleNamespace(name="wandb")
    fake.init = lambda **kwargs: calls.append(kwargs) or run
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    tracker = Tracker(tmp_path / "run" / "graph")
    tracker.metrics(1, {"loss": 1.0})
    tracker.close()
    assert not calls
    monkeypatch.setenv("WANDB_PROJECT", "films")
    for step in (2, 3):
        tracker.metrics(step, {"loss": 1.0})
        tracker.close()
    inits = [c for c in calls if isinstance(c, dict)]
    assert inits[0]["project"] == "films" and inits[0]["name"] == "run-graph" and inits[0]["id"] == inits[1]["id"]
    assert calls[1] == (2, {"loss": 1.0}) and calls.count("finish") == 2


def test_only_the_first_process_speaks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "is_main_process", lambda: False)
    tracker = Tracker(tmp_path / "x")
    tracker.say("x")
    tracker.metrics(1, {"loss": 1.0})
    with tracker.progress("x", 1) as bar:
        bar.advance()
    tracker.close()
    assert not (tmp_path / "x").exists() and capsys.readouterr().err == ""
