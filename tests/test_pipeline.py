"""The whole way on the toy world: every stage, the report, the recommender, the command line; a finished run is only read."""

import dataclasses
import json

import numpy as np
import pytest
from tiny_encoder import make_tiny_encoder

from kgrec_jax import cli, pipeline
from kgrec_jax.config import Experiment, from_json, to_json
from kgrec_jax.data.folder import DataConfig, write_folder
from kgrec_jax.data.toy import toy_world
from kgrec_jax.errors import KgrecError
from kgrec_jax.models.towers import TowerConfig
from kgrec_jax.serving.recommender import Recommender
from kgrec_jax.stages import fuse, graph, pretrain
from kgrec_jax.stages.fuse_gate import GateConfig
from kgrec_jax.workdir import Run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(experiment, run folder, report) of a small run."""
    root = tmp_path_factory.mktemp("pipeline")
    world = toy_world()
    write_folder(world, root / "toy")
    encoder = make_tiny_encoder(root / "bert", [*world.item_texts, *world.graph.entity_names])
    experiment = Experiment(
        encoder=str(encoder), data=DataConfig(path=str(root / "toy")), pretrain=pretrain.Config(mode="off"),
        graph=graph.Config(dim=16, steps=30, batch=64, encoder_mode="off"),
        fuse=fuse.Config(tower=TowerConfig(width=16, max_history=16), steps=30, batch=32, text_length=32,
                         gate=GateConfig(steps=40, batch=32)))
    return experiment, root / "run", pipeline.run(experiment, root / "run", quiet=True)


def test_report_has_every_row_and_an_exact_score(finished):
    _, folder, report = finished
    held = json.loads((folder / "report.json").read_text())
    for name in ("popularity", "item-knn", "user-knn", "ease", "fusion"):
        assert 0 <= held["models"][name]["ndcg@10"] <= 1 and 0 <= held["models"][name]["recall@20"] <= 1
    assert held["fit_on"] == "train+valid" and (folder / "report.md").is_file()
    assert len(list((folder / "plots").glob("*.png"))) >= 2
    recommender = Recommender.load(folder)
    own = recommender.histories.take(np.array([0, 1, 2]))
    items = np.tile(np.arange(recommender.model.num_items), (3, 1))
    parts, _ = recommender.model.contributions(own, items)
    np.testing.assert_allclose(parts.sum(-1), recommender.model.scores(own), atol=1e-4)


def test_recommends_by_user_and_by_title_and_never_what_is_known(finished):
    _, folder, _ = finished
    recommender = Recommender.load(folder)
    user = recommender.user_ids[0]
    known = {recommender.item_ids[i] for i in recommender.known[0].indices}
    found = recommender.recommend(user=user, k=5)
    assert len(found) == 5 and not known & {row["item_id"] for row in found} and all(row["reason"] for row in found)
    title = recommender.item_names[3]
    assert title not in {row["title"] for row in recommender.recommend(history=[title.upper()], k=5)}
    with pytest.raises(KgrecError, match="nearest"):
        recommender.recommend(history=["no such title at all"])
    empty = np.flatnonzero(recommender.histories.matrix.getnnz(axis=1) == 0)
    assert len(empty) and all(np.isfinite(row["score"]) for row in recommender.recommend(user=recommender.user_ids[empty[0]], k=3))


def test_a_finished_run_is_read_and_another_config_is_refused(finished):
    experiment, folder, report = finished
    before = (folder / "report.json").stat().st_mtime_ns
    again = pipeline.run(experiment, folder, quiet=True)
    assert again.models["fusion"]["ndcg@10"] == pytest.approx(report.models["fusion"]["ndcg@10"])
    assert (folder / "report.json").stat().st_mtime_ns == before
    with pytest.raises(KgrecError, match="fuse.eval_users"):
        Run.open(folder, dataclasses.replace(experiment, fuse=dataclasses.replace(experiment.fuse, eval_users=7)))


def test_config_survives_json(finished):
    experiment = finished[0]
    assert from_json(Experiment, json.loads(json.dumps(to_json(experiment)))) == experiment
    with pytest.raises(KgrecError, match="no_such"):
        from_json(Experiment, {"no_such": 1})


def test_command_line(finished, tmp_path, capsys):
    _, folder, _ = finished
    recommender = Recommender.load(folder)
    assert cli.main(["recommend", str(folder), "--user", recommender.user_ids[0], "-k", "3", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 3
    out = tmp_path / "ranked.tsv"
    assert cli.main(["recommend", str(folder), "--all-users", "-k", "4", "--out", str(out)]) == 0
    assert out.read_text().startswith("user_id\titem_id\trank\tscore\n")
    for argv, word in (
        (["nonsense"], "COMMAND"), (["run", "nowhere.py", "--workdir", "x"], "CONFIG"),
        (["run", "configs/default.py", "--workdir", "x"], "--data.path"), (["run", "configs/default.py", "--no-such-field", "1"], "--no-such-field"),
        (["recommend", str(folder), "--user", "nobody"], "--user"), (["recommend", str(tmp_path), "--user", "x"], "recommender"),
    ):
        assert cli.main(argv) == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("kgrec: ") and word in last


def test_without_a_test_part_there_is_a_recommender_and_no_report(finished, tmp_path, capsys):
    experiment = finished[0]
    split = dataclasses.replace(experiment.data.split, test_share=0.0)
    experiment = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, split=split))
    assert pipeline.run(experiment, tmp_path / "run") is None
    assert "no report" in capsys.readouterr().err
    held = Recommender.load(tmp_path / "run")
    assert len(held.recommend(history=[held.item_names[3]], k=3)) == 3
    with pytest.raises(KgrecError, match="seed: found -1"):
        pipeline.run(dataclasses.replace(experiment, seed=-1), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_run_that_ends_with_the_graph_reports_its_links(finished, tmp_path, capsys):
    experiment, folder, report = finished
    alone = pipeline.run(experiment, tmp_path / "run", until="graph")
    shown = capsys.readouterr().out
    held = json.loads((tmp_path / "run" / "report.json").read_text())
    assert {"mrr", "hits@1", "hits@3", "hits@10"} <= held["link_prediction"]["test"].keys()
    assert held["link_prediction"] == report.link_prediction and held["models"] == {}
    assert f"link prediction, structure: MRR {held['link_prediction']['test']['mrr']:.4f}" in shown
    assert "## Link prediction" in (tmp_path / "run" / "report.md").read_text()
    assert pipeline.run(experiment, tmp_path / "run", quiet=True, until="graph") == alone  # nothing is trained again
    before = (folder / "report.json").read_bytes()
    pipeline.run(experiment, folder, quiet=True, until="graph")
    assert (folder / "report.json").read_bytes() == before  # a finished run keeps its report


def test_the_report_says_what_lists_are_like_and_a_tradeoff_is_measured(finished, capsys):
    _, folder, report = finished
    kept = {name: (folder / name).read_bytes() for name in ("report.json", "report.md")}
    for k in (10, 20):
        for name in ("coverage", "gini", "novelty", "diversity", "personalisation", "miscalibration"):
            assert all(np.isfinite(entry[f"{name}@{k}"]) for entry in report.models.values()), name
    assert report.models["popularity"]["personalisation@10"] < report.models["fusion"]["personalisation@10"]
    assert report.models["popularity"]["gini@10"] > report.models["fusion"]["gini@10"]
    assert "lists: diversity by graph and text; kinds of items by relation genre" in report.notes
    assert "## Beyond accuracy" in kept["report.md"].decode()
    assert cli.main(["evaluate", str(folder), "--tradeoff"]) == 0
    assert "calibrated" in capsys.readouterr().out
    assert (folder / "plots" / "tradeoff.png").is_file()
    assert "plots/tradeoff.png" in (folder / "report.md").read_text()
    header, *rows = (folder / "tradeoff.tsv").read_text().splitlines()
    rows = [dict(zip(header.split("\t"), row.split("\t"))) for row in rows]
    assert len(rows) == 14 and float(rows[0]["ndcg@10"]) == pytest.approx(
        report.models["fusion"]["ndcg@10"], abs=2e-3)  # equal scores by row here, by the mean over orders there
    for way, metric, sign in (("mmr", "diversity@10", 1), ("calibrated", "miscalibration@10", -1)):
        own = [float(row[metric]) for row in rows if row["way"] == way]
        assert sign * (own[3] - own[0]) > 0, way
    assert json.loads((folder / "report.json").read_text())["models"] == json.loads(kept["report.json"])["models"]


def test_lists_are_ordered_anew_with_scores_and_reasons(finished, tmp_path, capsys):
    _, folder, _ = finished
    user = Recommender.load(folder).user_ids[0]
    assert cli.main(["recommend", str(folder), "--user", user, "-k", "20", "--json"]) == 0
    plain = {row["item_id"]: row for row in json.loads(capsys.readouterr().out)}
    for flag in ("--diversity", "--calibrate"):
        assert cli.main(["recommend", str(folder), "--user", user, "-k", "5", flag, "0.6", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert len(found) == 5 and all(row["reason"] for row in found)
        assert [row["item_id"] for row in found] != list(plain)[:5]
        for row in found:
            if row["item_id"] in plain:
                assert row["score"] == pytest.approx(plain[row["item_id"]]["score"], abs=1e-5)
        out = tmp_path / f"{flag[2:]}.tsv"
        assert cli.main(["recommend", str(folder), "--all-users", "-k", "5", flag, "0.6", "--out", str(out)]) == 0
        own = [line.split("\t")[1] for line in out.read_text().splitlines() if line.startswith(f"{user}\t")]
        assert own == [row["item_id"] for row in found]
    query = Recommender.load(folder).item_names[3]
    assert cli.main(["recommend", str(folder), "--query", query, "--diversity", "0.5", "-k", "3"]) == 0
    capsys.readouterr()
    for argv, words in (
        (["--query", "x", "--calibrate", "0.5"], "--calibrate: found with --query"),
        (["--user", user, "--calibrate", "0.5", "--diversity", "0.1"], "--diversity: found with --calibrate"),
        (["--user", user, "--diversity", "2"], "--diversity: found '2', expected a share from 0 to 1"),
    ):
        assert cli.main(["recommend", str(folder), *argv]) == 2
        assert words in capsys.readouterr().err
