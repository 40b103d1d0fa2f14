"""Controls find what is true of a known world: its graph carries new films, and neither a random one nor titles do."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from tiny_encoder import make_tiny_encoder

from kgrec_jax import cli, pipeline
from kgrec_jax.config import Experiment
from kgrec_jax.data.ablation import without_graph
from kgrec_jax.data.folder import DataConfig, write_folder
from kgrec_jax.data.interactions import SplitConfig
from kgrec_jax.data.toy import toy_world
from kgrec_jax.errors import Interrupted, KgrecError
from kgrec_jax.evaluation import control_run, controls
from kgrec_jax.evaluation.control_words import control_lines, sentences
from kgrec_jax.evaluation.control_run import NAMES
from kgrec_jax.evaluation.plots import plot_controls
from kgrec_jax.evaluation.report import read_report
from kgrec_jax.models.towers import TowerConfig
from kgrec_jax.stages import fuse, graph, pretrain
from kgrec_jax.stages.fuse_gate import GateConfig
from kgrec_jax.workdir import Run


def experiment_of(root, world, encoder_mode="off"):
    write_folder(world, root / "data")
    encoder = make_tiny_encoder(root / "bert", [*toy_world().item_texts, *toy_world().graph.entity_names])
    return Experiment(
        encoder=str(encoder), pretrain=pretrain.Config(mode="off"),
        data=DataConfig(path=str(root / "data"), split=SplitConfig(kind="random", cold_share=0.2, valid_share=0.1)),
        graph=graph.Config(dim=16, steps=30, batch=64, encoder_mode=encoder_mode, text_steps=2, text_batch=8),
        fuse=fuse.Config(tower=TowerConfig(width=16, max_history=16), steps=40, batch=32, text_length=16,
                         gate=GateConfig(steps=60, batch=32)))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(run folder, its report with controls of one seed): films have titles that say nothing, and no other text."""
    root = tmp_path_factory.mktemp("controls")
    world = toy_world(num_users=300)
    world = dataclasses.replace(world, item_texts=("",) * world.num_items)
    plain = pipeline.run(experiment_of(root, world), root / "run", quiet=True)
    assert plain.controls == "not run" and "--controls" in (root / "run" / "report.md").read_text()
    return root / "run", pipeline.evaluate_run(root / "run", quiet=True, seeds=1)


@pytest.mark.slow
def test_the_graph_is_worth_something_and_a_random_one_and_titles_are_not(measured):
    _, report = measured
    found = report.controls
    assert set(found) == {"run", *NAMES} and not any("skipped" in entry for entry in found.values())
    cold = found["no-graph"]["cold"]["paired"]["ndcg@10"]
    assert cold["difference"] > 4 * cold["standard_error"] > 0 and cold["ci95"][0] > 0
    assert found["no-graph"]["paired"]["ndcg@10"]["difference"] > 0
    for side in (found["random-graph"], found["random-graph"]["cold"], found["shuffled-text"]["cold"]):
        assert abs(side["worth"]["ndcg@10"]["difference"]) <= 3 * side["worth"]["ndcg@10"]["standard_error"]
    right = found["random-graph"]["cold"]["paired"]["ndcg@10"]
    assert right["difference"] > 4 * right["standard_error"]
    assert found["no-behaviour"]["warm"]["paired"]["ndcg@10"]["difference"] > 0
    assert found["popularity-from-features"]["ndcg@10"] < found["run"]["ndcg@10"]


@pytest.mark.slow
def test_the_run_is_judged_as_in_its_own_report(measured):
    _, report = measured
    fusion, run = report.models["fusion"], report.controls["run"]
    for metric in ("ndcg@10", "recall@20", "mrr@10"):
        if metric in fusion:
            assert run[metric] == pytest.approx(fusion[metric]) and run["cold"][metric] == pytest.approx(fusion["cold"][metric])
    difference = report.controls["no-text"]["paired"]["ndcg@10"]["difference"]
    assert difference == pytest.approx(run["ndcg@10"] - report.controls["no-text"]["ndcg@10"])
    assert report.controls["no-text"]["users"] == report.users


@pytest.mark.slow
def test_the_report_says_it_in_words_figures_and_a_picture(measured):
    folder, report = measured
    text = (folder / "report.md").read_text()
    assert "The graph is worth +0." in text and "a random graph of the same degrees" in text and "plots/controls.png" in text
    assert (folder / "plots" / "controls.png").is_file() and report.timing["controls"] > 0
    assert read_report(folder).controls == report.controls == json.loads((folder / "report.json").read_text())["controls"]
    again = pipeline.evaluate_run(folder, quiet=True)  # without controls what they found stays
    assert again.controls == report.controls
    old = json.loads((folder / "report.json").read_text())
    del old["controls"]
    (folder / "report.json").write_text(json.dumps(old))
    with pytest.raises(KgrecError, match="differs in controls.*kgrec evaluate"):
        read_report(folder)
    pipeline.evaluate_run(folder, quiet=True)


@pytest.mark.slow
def test_what_is_done_is_read_and_what_is_lost_is_trained_to_the_same(measured, monkeypatch, capsys):
    folder, report = measured
    before = {name: np.load(folder / "controls" / name / "seed-0" / "metrics.npz")["all/ndcg@10"] for name in NAMES[:5]}
    trained = []

    def train(control, real):
        trained.append(control.name)
        return control_run.train_control(control, real)

    monkeypatch.setattr(controls, "train_control", train)
    pipeline.evaluate_run(folder, seeds=1)
    assert not trained and "finished" in capsys.readouterr().err
    shutil.rmtree(folder / "controls" / "random-graph")
    assert pipeline.evaluate_run(folder, quiet=True, seeds=1).controls == report.controls
    assert trained == ["random-graph"]
    after = np.load(folder / "controls" / "random-graph" / "seed-0" / "metrics.npz")["all/ndcg@10"]
    np.testing.assert_array_equal(after, before["random-graph"])


@pytest.mark.slow
def test_a_control_that_was_stopped_goes_on(measured, monkeypatch):
    folder, report = measured
    shutil.rmtree(folder / "controls" / "no-text")
    real_run = fuse.run

    def stopped(experiment, run, linear=None):
        if isinstance(run, control_run.ControlRun):
            raise Interrupted("stopped")
        return real_run(experiment, run, linear)

    monkeypatch.setattr(control_run.fuse, "run", stopped)
    with pytest.raises(Interrupted):
        pipeline.evaluate_run(folder, quiet=True, seeds=1)
    monkeypatch.setattr(control_run.fuse, "run", real_run)
    assert not (folder / "controls" / "no-text" / "seed-0" / "metrics.npz").exists()
    assert pipeline.evaluate_run(folder, quiet=True, seeds=1).controls == report.controls


@pytest.mark.slow
def test_damage_and_other_states_are_errors_of_one_line(measured, tmp_path, capsys):
    folder, _ = measured
    shutil.copytree(folder, tmp_path / "run")
    file = tmp_path / "run" / "controls" / "no-graph" / "seed-0" / "metrics.npz"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(KgrecError, match="metrics.npz: found a damaged file"):
        pipeline.evaluate_run(tmp_path / "run", quiet=True, seeds=1)
    gate = tmp_path / "run" / "fuse" / "gate.json"
    held = json.loads(gate.read_text())
    held["gate"]["level"] = 0.5
    gate.write_text(json.dumps(held))
    assert pipeline.evaluate_run(tmp_path / "run", quiet=True).controls == "not run"  # of the run as it was
    assert not (tmp_path / "run" / "plots" / "controls.png").exists()
    with pytest.raises(KgrecError, match="another state of the run.*remove"):
        pipeline.evaluate_run(tmp_path / "run", quiet=True, seeds=1)
    for argv, words in (
        (["evaluate", str(folder), "--controls", "--seeds", "0"], "--seeds: found '0', expected a whole number"),
        (["evaluate", str(folder), "--seeds", "2"], "--seeds: found without --controls"),
        (["evaluate", str(folder / "controls" / "no-graph" / "seed-0")], "found the control no-graph of a run"),
    ):
        assert cli.main(argv) == 2
        assert words in capsys.readouterr().err


@pytest.mark.slow
def test_an_unfinished_run_has_no_controls(measured, tmp_path):
    folder, _ = measured
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "fuse" / "done.json").unlink()
    with pytest.raises(KgrecError, match="stage fuse is not finished"):
        pipeline.evaluate_run(tmp_path / "run", quiet=True, seeds=1)


@pytest.mark.slow
def test_seeds_and_a_run_without_a_graph(tmp_path, capsys):
    world = without_graph(toy_world(num_users=80, num_items=60))
    pipeline.run(experiment_of(tmp_path, world), tmp_path / "run", quiet=True)
    report = pipeline.evaluate_run(tmp_path / "run", seeds=2)
    said = capsys.readouterr().err
    assert "controls: 2 seeds, at most about" in said and "skipped: the data set has no triples" in said
    found = report.controls
    for name in ("no-graph", "random-graph"):
        assert found[name] == {"skipped": "the data set has no triples"}
    pair, run = found["no-text"]["paired"]["ndcg@10"], found["run"]
    assert [row["seed"] for row in run["seeds"]] == [0, 1] and pair["seed_deviation"] is not None
    each = [a["ndcg@10"] - b["ndcg@10"] for a, b in zip(run["seeds"], found["no-text"]["seeds"])]
    assert pair["difference"] == pytest.approx(np.mean(each)) and pair["seed_deviation"] == pytest.approx(np.std(each, ddof=1))
    text = (tmp_path / "run" / "report.md").read_text()
    assert "2 trainings" in text and "no-graph: left out, the data set has no triples" in text


@pytest.mark.slow
def test_no_control_without_the_graph_reads_what_the_graph_has_tuned(tmp_path):
    world = toy_world(num_users=60, num_items=48)
    experiment = experiment_of(tmp_path, world, encoder_mode="lora")
    pipeline.run(experiment, tmp_path / "run", quiet=True)
    base = Run.open(tmp_path / "run", experiment, quiet=True)
    assert control_run.reads_text(base)
    choices = base.stage("fuse") / "choices.json"
    held = json.loads(choices.read_text())
    choices.write_text(json.dumps(held | {"text_source": "graph"}))
    text = control_run.open_control(base, base, "no-text", 0)
    assert text.experiment.graph.encoder_mode == "off" and "graph" not in text.shared
    for name in ("no-graph", "random-graph", "no-text"):
        control = control_run.open_control(base, base, name, 0)
        control_run.train_control(control, base)
        assert control.stage("graph") != base.stage("graph")
        own = fuse.Choices.load(control.stage("fuse") / "choices.json")
        assert own.linear == fuse.Choices.load(choices).linear
        assert own.text_source in ({"released encoder", "graph"} if name == "random-graph" else {"released encoder", ""})
        assert (control.stage("graph") / "encoder").is_dir() == (name == "random-graph")
        assert (control.stage("graph") / "tables").is_dir() == (name != "no-graph")


def figures_of(rng, shift=0.0, users=30):
    values = {side: {m: rng.random(n) + shift for m in ("ndcg@10", "recall@20")} for side, n in (("all", users), ("cold", 9))}
    return controls.Figures({"all": np.arange(users), "cold": np.arange(9)}, values, 1.5)


def test_figures_are_compared_user_by_user_over_seeds(tmp_path):
    rng = np.random.default_rng(0)
    found = {name: [figures_of(rng, shift) for _ in range(3)]
             for name, shift in (("run", 0.3), ("no-graph", 0.0), ("random-graph", 0.1))}
    out = controls.summarise(found, [0, 1, 2], {"no-text": "no item has a text or a name"})
    a, b, c = (np.stack([one.values["cold"]["ndcg@10"] for one in found[name]]) for name in found)
    pair, worth = (out["random-graph"]["cold"][kind]["ndcg@10"] for kind in ("paired", "worth"))
    assert pair["difference"] == pytest.approx((a - c).mean()) and worth["difference"] == pytest.approx((c - b).mean())
    each = (a - c).mean(0)
    assert pair["standard_error"] == pytest.approx(each.std(ddof=1) / 3)
    assert pair["seed_deviation"] == pytest.approx((a - c).mean(1).std(ddof=1))
    assert pair["ci95"][0] < pair["difference"] < pair["ci95"][1]
    assert "paired" not in out["run"] and "worth" not in out["no-graph"] and out["run"]["users"] == 30
    assert out["no-text"] == {"skipped": "no item has a text or a name"} and [s["seed"] for s in out["run"]["seeds"]] == [0, 1, 2]
    one = controls.summarise({name: figures[:1] for name, figures in found.items()}, [0], {})
    assert one["no-graph"]["paired"]["ndcg@10"]["seed_deviation"] is None
    assert plot_controls(out, tmp_path / "controls.png").is_file()
    assert plot_controls("not run", tmp_path / "controls.png") is None and not list(tmp_path.iterdir())
    found["run"][0].save(tmp_path / "metrics.npz")
    again = controls.Figures.load(tmp_path / "metrics.npz")
    np.testing.assert_array_equal(again.values["cold"]["recall@20"], found["run"][0].values["cold"]["recall@20"])
    assert again.seconds == 1.5 and list(again.users["cold"]) == list(range(9))
    (tmp_path / "metrics.npz").write_bytes(b"nothing")
    with pytest.raises(KgrecError, match="metrics.npz: found a damaged file"):
        controls.Figures.load(tmp_path / "metrics.npz")


def test_bad_arguments_are_errors_of_one_line(tmp_path, capsys):
    for argv, words in (
        (["evaluate", str(tmp_path), "--controls", "--seeds", "0"], "--seeds: found '0', expected a whole number"),
        (["evaluate", str(tmp_path), "--seeds", "2"], "--seeds: found without --controls"),
        (["evaluate", str(tmp_path), "--controls"], "found no experiment.json"),
    ):
        assert cli.main(argv) == 2
        assert words in capsys.readouterr().err


def test_sentences_call_chance_by_its_name():
    def entry(difference, **more):
        pair = {"ndcg@10": {"difference": difference, "standard_error": 0.01, "ci95": [0, 0], "seed_deviation": None},
                "recall@20": {"difference": 0.0, "standard_error": None, "ci95": [0, 0], "seed_deviation": None}}
        return {"ndcg@10": 0.2, "recall@20": 0.3, "users": 5, "paired": pair, "worth": pair, "seeds": [{"seed": 0}], **more}

    found = {"run": {"ndcg@10": 0.25, "recall@20": 0.4, "users": 5, "seeds": [{"seed": 0}]},
             **{name: entry(0.05, warm=entry(0.06), cold=entry(0.001)) for name in NAMES}}
    lines = sentences(found)
    assert lines[0].startswith("The graph is worth +0.0500 ± 0.0100 NDCG@10 on all items, "
                               "+0.0010 ± 0.0100 (no more than chance) among cold ones; a random graph")
    assert any("| no-graph | 0.2000 | +0.0500 ± 0.0100 |" in line for line in control_lines(found, "RUN"))
    found["random-graph"] = found["no-graph"] = {"skipped": "the data set has no triples"}
    assert not any("graph is worth" in line for line in sentences(found))
    assert "kgrec evaluate RUN --controls" in "\n".join(control_lines("not run", "RUN"))
