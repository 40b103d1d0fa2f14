"""The search: its split and its space by what they promise, its bookkeeping with a quick trial, and one real search."""

import dataclasses
import json
import pathlib
import sys

import numpy as np
import pytest
from tiny_encoder import make_tiny_encoder

from kgrec_jax import cli, tuning
from kgrec_jax.config import Experiment, load_config
from kgrec_jax.config_expression import config_file
from kgrec_jax.data.folder import DataConfig, write_folder
from kgrec_jax.data.interactions import SplitConfig, make_split
from kgrec_jax.data.toy import toy_world
from kgrec_jax.data.tuning_split import tuning_split
from kgrec_jax.errors import Interrupted, KgrecError
from kgrec_jax.models.towers import TowerConfig
from kgrec_jax.optim import OptimConfig
from kgrec_jax.stages import fuse, graph, pretrain
from kgrec_jax.stages.fuse_gate import GateConfig
from kgrec_jax.tuning_space import (
    SPACE, Choices, Range, parse_space, prunes, shared_stages, shares_choices, value_at, with_values)


def pairs(*parts):
    return {(u, i) for part in parts for u, i in zip(part.user.tolist(), part.item.tolist())}


# --- split --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [
    SplitConfig(kind="random"), SplitConfig(kind="random", cold_share=0.1), SplitConfig(kind="leave-last-out"),
    SplitConfig(kind="time"), SplitConfig(kind="cold-items"), SplitConfig(kind="fixed"),
    SplitConfig(kind="fixed", valid_share=0.0)], ids=lambda c: f"{c.kind}-{c.cold_share:g}-{c.valid_share:g}")
def test_the_validation_part_is_the_test_and_the_test_is_away(cfg):
    world = toy_world()
    if cfg.kind == "fixed":
        part = np.random.default_rng(0).choice(3, len(world.interactions), p=[0.7, 0.15, 0.15]).astype(np.int8)
        world = dataclasses.replace(world, part=part, has_fixed_split=True, has_fixed_valid=True)
    outer = make_split(world, cfg)
    inner = tuning_split(world, outer, cfg)
    assert pairs(inner.test) == pairs(outer.valid) and len(inner.valid)
    assert pairs(inner.fit) == pairs(outer.train) and inner.fit_on == "train+valid"
    assert len(inner.train) + len(inner.valid) == len(outer.train)
    assert not pairs(inner.train, inner.valid, inner.test) & pairs(outer.test)
    assert set(inner.cold_items) == set(outer.valid_cold_items)
    if cfg.cold_share or cfg.kind == "cold-items":
        assert len(inner.valid_cold_items) and not np.isin(inner.train.item, inner.valid_cold_items).any()
        assert len(inner.valid_cold_items) == pytest.approx(len(outer.valid_cold_items), abs=3)
    if cfg.kind == "time":
        assert inner.train.timestamp.max() <= inner.valid.timestamp.min() <= inner.test.timestamp.min()
    if cfg.kind == "leave-last-out":
        last = {int(u): int(t) for u, t in zip(inner.valid.user, inner.valid.timestamp)}
        assert all(t <= last[int(u)] for u, t in zip(inner.train.user, inner.train.timestamp) if int(u) in last)


def test_without_a_validation_part_there_is_nothing_to_search_on():
    world = toy_world()
    cfg = SplitConfig(kind="random", valid_share=0.0)
    with pytest.raises(KgrecError, match="data.split.valid_share: found no validation part"):
        tuning_split(world, make_split(world, cfg), cfg)


# --- space --------------------------------------------------------------------------------------------------------


def test_the_space_in_words():
    found = parse_space(["fuse.tower.width=32..128:32", "--fuse.optim.peak-lr=1e-3..1e-1:log", "fuse.cf_weight=0..1",
                         "fuse.tower.history=mean,attention"])
    assert found == {"fuse.tower.width": Range(32, 128, step=32.0), "fuse.optim.peak_lr": Range(1e-3, 0.1, log=True),
                     "fuse.cf_weight": Range(0.0, 1.0), "fuse.tower.history": Choices(("mean", "attention"))}
    assert parse_space([f"{path}={domain}" for path, domain in SPACE.items()]) == SPACE
    config = with_values(Experiment(), {"fuse.tower.width": 48, "fuse.optim.peak_lr": 0.5, "fuse.steps": 7})
    assert value_at(config, "fuse.tower.width") == 48 and config.fuse.optim.peak_lr == 0.5 and config.fuse.steps == 7
    assert config.fuse.optim.weight_decay == Experiment().fuse.optim.weight_decay


@pytest.mark.parametrize("word, said", [
    ("fuse.tower.width", "found 'fuse.tower.width', expected PATH=LOW"),
    ("fuse.tower.widht=1..2", "found the field 'fuse.tower.widht'"), ("seed=0..9", "found seed, expected a field that"),
    ("data.min_rating=0..3", "found data.min_rating"), ("fuse.cf_weight=2..1", "a low end below the high one"),
    ("fuse.cf_weight=0..1:log", "above 0, for its logarithm"), ("fuse.tower.width=1.5..3", "numbers of type int"),
    ("fuse.tower.history=1..3", "found the range"), ("fuse.tower.history=mean,none", "found 'none'"),
    ("fuse.tower.width=8", "two or more values"), ("fuse.cf_weight=0..1:x", "expected PATH=LOW")])
def test_a_space_that_is_none(word, said):
    with pytest.raises(KgrecError, match="--space: ") as caught:
        parse_space([word])
    assert said in str(caught.value)


def test_what_is_shared_follows_from_the_space():
    wide = Range(1, 2)
    assert shared_stages(SPACE) == ("pretrain", "graph") and shares_choices(SPACE) and prunes(SPACE)
    assert shared_stages({"graph.dim": wide}) == ("pretrain",) and shared_stages({"pretrain.steps": wide}) == ()
    assert not shares_choices({"fuse.text_length": wide}) and not prunes({"fuse.gate.guard_share": wide})


def test_a_config_comes_back_from_its_file(tmp_path):
    config = Experiment(
        encoder="hub:a/b", data=DataConfig(path="x/y", languages=("zh", "en"), split=SplitConfig(kind="time")),
        graph=graph.Config(dim=16), fuse=fuse.Config(tower=TowerConfig(width=48), optim=OptimConfig(peak_lr=1 / 3),
                                                     steps=77, gate=GateConfig(penalty=1e-5)))
    for n, one in enumerate((config, Experiment())):
        file = tmp_path / f"c{n}.py"
        file.write_text(config_file(one, "About it."), encoding="utf-8")
        assert load_config(str(file)) == one and file.read_text().startswith('"""About it."""\n')


# --- search -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    root = tmp_path_factory.mktemp("tuning")
    world = toy_world(num_users=80, num_items=60)
    write_folder(world, root / "toy")
    encoder = make_tiny_encoder(root / "bert", [*world.item_texts, *world.graph.entity_names])
    return Experiment(
        encoder=str(encoder), data=DataConfig(path=str(root / "toy")), pretrain=pretrain.Config(mode="off"),
        graph=graph.Config(dim=16, steps=30, batch=64, encoder_mode="off"),
        fuse=fuse.Config(tower=TowerConfig(width=16, max_history=16), steps=30, batch=32, text_length=32,
                         gate=GateConfig(steps=40, batch=32)))


QUICK = {"fuse.tower.width": Range(8, 32), "fuse.cf_weight": Range(0.01, 1.0, log=True),
         "fuse.tower.history": Choices(("mean", "attention"))}


@pytest.fixture
def quick(monkeypatch):
    """Trials whose value is known: the narrower, and attention rather than the mean; those of width 9 fail."""
    seen = []

    def run_trial(search, base, folder, values, watch):
        seen.append(dict(values))
        folder.mkdir(parents=True, exist_ok=True)
        if values["fuse.tower.width"] == 9:
            raise KgrecError("scores of user row 0: found NaN, expected numbers")
        value = 0.5 - values["fuse.tower.width"] / 100 + 0.1 * (values["fuse.tower.history"] == "attention")
        inner = value if values["fuse.cf_weight"] < 0.5 else -1.0  # far behind half-way
        watch({"guard": {"warm": {"fused": inner, "value": inner, "kept": "the gate"}}})
        return value

    monkeypatch.setattr(tuning, "run_trial", run_trial)
    monkeypatch.setattr(tuning, "_prepare", lambda search, out, tracker: Base(search.experiment))
    return seen


class Base:
    """The little that the bookkeeping asks of the base."""

    def __init__(self, experiment):
        world = toy_world(num_users=80, num_items=60)
        self.experiment, self.split = experiment, make_split(world, SplitConfig())


def table(out):
    header, *rows = (out / "trials.tsv").read_text(encoding="utf-8").splitlines()
    return [dict(zip(header.split("\t"), row.split("\t"))) for row in rows]


def test_a_search_goes_on_as_if_it_had_not_been_killed(experiment, quick, tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    search = tuning.Search(experiment, QUICK)
    found = tuning.search(search, tmp_path / "whole", 18, quiet=True)
    whole = list(quick)
    assert whole[0] == {"fuse.tower.width": 16, "fuse.cf_weight": 0.2, "fuse.tower.history": "attention"}
    rows = table(tmp_path / "whole")
    assert len(rows) == 18 and {row["state"] for row in rows} >= {"complete", "pruned"}
    best = max((row for row in rows if row["state"] == "complete"), key=lambda row: float(row["ndcg@10"]))
    assert found["trial"] == int(best["trial"]) and found["value"] == pytest.approx(float(best["ndcg@10"]), abs=1e-6)
    assert found["value"] >= 0.5 - 0.16 + 0.1 and found == json.loads((tmp_path / "whole" / "best.json").read_text())
    assert load_config(str(tmp_path / "whole" / "best.py")) == with_values(experiment, found["params"])

    quick.clear()
    real, calls = tuning.run_trial, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 7:
            raise Interrupted("saved")
        return real(*args)

    monkeypatch.setattr(tuning, "run_trial", killed)
    with pytest.raises(Interrupted):
        tuning.search(search, tmp_path / "parts", 18, quiet=True)
    assert len(table(tmp_path / "parts")) == 6
    tuning.search(search, tmp_path / "parts", 12, quiet=True)
    tuning.search(search, tmp_path / "parts", 18, quiet=True)
    assert quick == whole
    again = table(tmp_path / "parts")
    assert [{**row, "seconds": ""} for row in again] == [{**row, "seconds": ""} for row in rows]
    with pytest.raises(KgrecError, match="found a search with another metric"):
        tuning.search(dataclasses.replace(search, metric="recall@20"), tmp_path / "parts", 18, quiet=True)


def test_a_trial_that_fails_is_a_row_and_not_the_end(experiment, quick, tmp_path):
    pytest.importorskip("optuna")
    search = tuning.Search(experiment, {**QUICK, "fuse.tower.width": Range(9, 10)})
    tuning.search(search, tmp_path / "out", 8, quiet=True)
    rows = table(tmp_path / "out")
    failed = [row for row in rows if row["state"] == "fail"]
    assert len(rows) == 8 and failed and all("found NaN" in row["error"] and not row["ndcg@10"] for row in failed)


def test_bad_input_is_named_before_anything_is_made(experiment, tmp_path, monkeypatch, capsys):
    pytest.importorskip("optuna")
    with pytest.raises(KgrecError, match="--metric: found 'ndcg@7'"):
        tuning.search(tuning.Search(experiment, QUICK, "ndcg@7"), tmp_path / "x", 1)
    with pytest.raises(KgrecError, match=r"--space: fuse.tower.free_dropout=1.5: fuse.tower.free_dropout: found 1.5"):
        tuning.search(tuning.Search(experiment, {"fuse.tower.free_dropout": Range(0.0, 1.5)}), tmp_path / "x", 1)
    assert not (tmp_path / "x").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(KgrecError, match="but no tune.json"):
        tuning.search(tuning.Search(experiment, QUICK), tmp_path / "full", 1)
    for argv, words in (([], "CONFIG: found none"), (["default"], "--out: found none"),
                        (["default", "--out", "o"], "--data.path: found none"),
                        (["default", "--out", "o", "--trials", "0"], "--trials: found '0'"),
                        (["default", "--data.path", "d", "--out", "o", "--space", "x=1..2"], "found the field")):
        assert cli.main(["tune", *argv]) == 2
        assert words in capsys.readouterr().err
    assert cli.main(["tune", "--help"]) == 0
    assert "\n  kgrec tune default " in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(KgrecError, match=r"pip install 'kgrec-jax\[tune\]'"):
        tuning.search(tuning.Search(experiment, QUICK), tmp_path / "y", 1)


@pytest.mark.slow
def test_a_real_search_of_three_trials(experiment, tmp_path, capsys):
    """Every stage and every file; what is shared is computed once; the value is what the run of the trial measures."""
    pytest.importorskip("optuna")
    (tmp_path / "config.py").write_text(config_file(experiment, "Small."), encoding="utf-8")
    out = tmp_path / "out"
    argv = ["tune", str(tmp_path / "config.py"), "--out", str(out), "--trials", "3", "--space",
            "fuse.tower.width=8..16:8", "fuse.optim.peak_lr=1e-3..1e-2:log"]
    assert cli.main([*argv[:5], "2", *argv[6:]]) == 0
    first = table(out)
    assert cli.main(argv) == 0
    assert "ndcg@10" in capsys.readouterr().out
    rows = table(out)
    assert len(rows) == 3 and rows[:2] == first and all(row["state"] in ("complete", "pruned") for row in rows)
    assert sorted(p.name for p in (out / "base").iterdir() if p.is_dir()) == ["fuse", "graph", "pretrain", "split"]
    for folder in sorted((out / "trials").iterdir()):
        assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["fuse"]
        assert (folder / "fuse" / "choices.json").read_bytes() == (out / "base/fuse/choices.json").read_bytes()
        done = json.loads((folder / "fuse" / "done.json").read_text())
        assert done["ndcg@10"] == pytest.approx(float(rows[int(folder.name)]["ndcg@10"]), abs=1e-6)
    best = load_config(str(out / "best.py"))
    assert best.fuse.tower.width in (8, 16) and pathlib.Path(best.data.path) == pathlib.Path(experiment.data.path)
