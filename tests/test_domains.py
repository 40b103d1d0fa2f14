"""Several domains in one run: a poor domain beside a rich one, bad input, and a whole run that stops and goes on."""

import dataclasses
import json
import types

import numpy as np
import pytest
from domain_world import ITEMS, SHAPE, USERS, content_of, some_run, training, two_domains
from tiny_encoder import make_tiny_encoder

from kgrec_jax import cli
from kgrec_jax.commands import overridden
from kgrec_jax.config import Experiment, from_json
from kgrec_jax.data.dataset import Interactions
from kgrec_jax.data.folder import DataConfig, write_folder
from kgrec_jax.data.history_batches import HistoryBatches
from kgrec_jax.data.toy import known_answer
from kgrec_jax.errors import KgrecError
from kgrec_jax.evaluation.significance import paired_difference
from kgrec_jax.models.domain_towers import HeadsConfig
from kgrec_jax.models.recommender import histories_of
from kgrec_jax.models.tower_config import TowerConfig
from kgrec_jax.serving.recommender import Recommender
from kgrec_jax.stages import domains, fuse, graph, pretrain
from kgrec_jax.stages.domains_towers import fit_shared
from kgrec_jax.stages.fuse_gate import GateConfig
from kgrec_jax.stages.fuse_towers import fit_towers
from kgrec_jax.workdir import Run


@pytest.fixture(scope="module")
def world_of_two():
    """(rich, poor, fresh)."""
    return two_domains()


@pytest.fixture(scope="module")
def pair(world_of_two):
    """(rich, poor)."""
    return world_of_two[:2]


def captured(scores, answer, seen):
    """[users] of what a user would touch among films that he has not, the share that his ten best films have, over the
    best that ten films could have."""
    wanted = np.where(seen, 0.0, answer)
    best = np.sort(wanted, 1)[:, -10:].sum(1)
    top = np.argsort(-np.where(seen, -np.inf, scores), 1)[:, :10]
    return np.take_along_axis(wanted, top, 1).sum(1) / best


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mmoe", "ple"])
def test_a_poor_domain_learns_from_a_rich_one(world_of_two, tmp_path, kind):
    # Floors set before any figure was seen: the shared towers' ten films have at least a twentieth more of what the
    # users of the poor domain want than those of its own towers, at the same steps, and twice the paired error.
    rich, poor, fresh = world_of_two
    both, steps = {"rich": rich, "poor": poor}, 200
    logs = {name: data.interactions for name, data in both.items()}
    content = content_of(both)
    parts = fit_shared(SHAPE, HeadsConfig(kind, experts=2, own_experts=1, width=16), training(steps), steps, content,
                       logs, tmp_path / "shared", some_run(tmp_path), 0)
    ids = {i: row for row, i in enumerate(content.union.graph.entity_ids)}
    alone = content_of({"poor": poor})
    alone = dataclasses.replace(  # its own towers read the same vectors
        alone, text=content.text[content.union.starts[1]:], relation=content.relation,
        entity=content.entity[[ids[i] for i in alone.union.graph.entity_ids]])
    own = fit_towers(SHAPE, training(steps), alone.features({"poor": poor.interactions}), poor.interactions,
                     tmp_path / "own", some_run(tmp_path, dataset=types.SimpleNamespace(num_items=poor.num_items)), 0)
    rows = [int(i[len("pfilm"):]) for i in poor.item_ids]
    answer = known_answer(num_users=USERS, num_items=ITEMS)[300:][:, rows]
    histories = histories_of(fresh.interactions, fresh.num_users, fresh.num_items, SHAPE.max_history)
    matrix = histories.matrix
    some = matrix.getnnz(axis=1) > 0
    seen = matrix.toarray() > 0
    shared = captured(parts["poor"].scores(matrix), answer, seen)[some]
    control = captured(own.scores(histories.sequence), answer, seen)[some]
    mean, error = paired_difference(shared, control)
    assert mean > 0.05 and mean > 2 * error, (shared.mean(), control.mean(), error)


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(pair, tmp_path_factory):
    """Folders rich and poor, another poor, and one without a log."""
    root = tmp_path_factory.mktemp("domains")
    for data in pair:
        write_folder(data, root / data.name)
    write_folder(pair[1], root / "elsewhere" / "poor")
    write_folder(dataclasses.replace(pair[1], interactions=Interactions.empty(), part=np.zeros(0, np.int8)),
                 root / "silent")
    return root


def command(folders, words, names=("rich", "poor")):
    return ["domains", "default", "--folders", *(str(folders / n) for n in names), "--workdir", str(folders / "out"),
            *words]


@pytest.mark.parametrize("names, words, said", [
    (("rich",), (), "--folders: found 1, expected at least two"),
    (("poor", "elsewhere/poor"), (), "with the one name poor"),
    (("rich", "silent"), (), "found no interactions in"),
    (("rich", "nowhere"), (), "found no folder at"),
    (("rich", "poor"), ("--domains.heads.experts", "0"), "domains.heads.experts: found 0, expected 1 to 256"),
    (("rich", "poor"), ("--domains.heads.levels", "2"), "domains.heads.levels: found 2 with domains.heads.kind mmoe"),
    (("rich", "poor"), ("--domains.heads.kind", "moe"), "expected one of shared, mmoe, ple"),
    (("rich", "poor"), ("--fuse.tower.history", "gru"), "fuse.tower.history: found gru"),
    (("rich", "poor"), ("--fuse.tower.candidates", "9"), "fuse.tower.candidates: found 9, expected 0"),
    (("rich", "poor"), ("--pretrain.mode", "scratch"), "pretrain.mode: found scratch"),
    (("rich", "poor"), ("--fuse.encoder", "lora"), "fuse.encoder: found lora, expected frozen"),
    (("rich", "poor"), ("--domains.control", "off"), "--domains.control: found 'off', expected True or False"),
    (("rich", "poor"), ("--data.path", "x"), "data.path: found x, expected none")])
def test_bad_input_is_one_line(folders, capsys, names, words, said):
    assert cli.main(command(folders, words, names)) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1 and said in told[0] and not (folders / "out").exists(), told


def test_what_the_command_line_lacks(folders, capsys):
    assert cli.main(["domains", "--folders", str(folders / "rich")]) == 2
    assert "CONFIG: found none" in capsys.readouterr().err
    assert cli.main(["domains", "default", "--folders", str(folders / "rich"), str(folders / "poor")]) == 2
    assert "--workdir: found none" in capsys.readouterr().err
    assert cli.main(["domains", "--help"]) == 0 and "--folders" in capsys.readouterr().out


def test_the_control_is_switched_off_by_its_field():
    default = domains.DomainsExperiment()
    assert default.domains.control
    for words, control in ((["--domains.control", "False"], False), (["--domains.control", "True"], True), ([], True)):
        assert overridden(default, words, "kgrec domains", "").domains == domains.Config(control=control)


def test_another_config_or_other_domains_are_refused(tmp_path):
    one = domains.DomainsExperiment()
    domains.open_folder(tmp_path / "run", one, ["a", "b"], True)
    domains.open_folder(tmp_path / "run", dataclasses.replace(one, fuse=fuse.Config(log_every=7)), ["a", "b"], True)
    with pytest.raises(KgrecError, match="found a run with another domains.heads.experts"):
        other = domains.Config(HeadsConfig(experts=9))
        domains.open_folder(tmp_path / "run", dataclasses.replace(one, domains=other), ["a", "b"], True)
    later = domains.Config(control=False)  # a control can be run later, or never
    domains.open_folder(tmp_path / "run", dataclasses.replace(one, domains=later), ["a", "b"], True)
    with pytest.raises(KgrecError, match="found a run of a, b, expected one of a, c"):
        domains.open_folder(tmp_path / "run", one, ["a", "c"], True)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    with pytest.raises(KgrecError, match="found files but no domains.json"):
        domains.open_folder(tmp_path / "used", one, ["a", "b"], True)


# --- a whole run --------------------------------------------------------------------------------------------------


def small(encoder, **fields):
    return domains.DomainsExperiment.of(Experiment(
        encoder=str(encoder), data=DataConfig(), pretrain=pretrain.Config(mode="off"),
        graph=graph.Config(dim=8, steps=6, batch=32, encoder_mode="off"),
        fuse=fuse.Config(tower=TowerConfig(width=8, max_history=8), steps=6, batch=16, text_length=16,
                         gate=GateConfig(steps=8, batch=16))), domains.Config(HeadsConfig("ple", width=8), **fields))


@pytest.mark.slow
def test_a_whole_run_stops_and_goes_on(pair, folders, tmp_path, monkeypatch):
    encoder = make_tiny_encoder(tmp_path / "bert", [*pair[0].item_texts, *pair[0].graph.entity_names])
    experiment = small(encoder)
    both = [folders / "rich", folders / "poor"]
    whole = domains.run(experiment, both, tmp_path / "whole", quiet=True)
    learn, calls = domains.domains_judge.learn, []

    def breaks(*args):
        calls.append(args)
        if len(calls) == 3:  # the second domain's gate, once the first one's and its control's are learned
            raise KeyboardInterrupt
        return learn(*args)

    monkeypatch.setattr(domains.domains_judge, "learn", breaks)
    with pytest.raises(KeyboardInterrupt):
        domains.run(experiment, both, tmp_path / "broken", quiet=True)
    monkeypatch.setattr(domains.domains_judge, "learn", learn)
    with monkeypatch.context() as patched:  # all towers are trained: what goes on draws no users any more
        patched.setattr(HistoryBatches, "__getitem__", None)
        again = domains.run(experiment, both, tmp_path / "broken", quiet=True)
    held = json.loads((tmp_path / "broken" / "report.json").read_text())
    text = (tmp_path / "broken" / "report.md").read_text()
    assert set(held["domains"]) == {"rich", "poor"} and "## rich" in text and "## poor" in text
    for name, found in held["domains"].items():
        assert found["models"] == whole["domains"][name]["models"] == again["domains"][name]["models"]
        own = json.loads((tmp_path / "broken" / "alone" / name / "report.json").read_text())
        # The control is the domain's ordinary run, to the last digit.
        assert found["models"]["fused alone"]["all"]["ndcg@10"] == own["models"]["fusion"]["ndcg@10"]
        assert found["models"]["own towers"]["all"]["ndcg@10"] == own["models"]["sequence"]["ndcg@10"]
        for pair_name, (one, control) in domains.domains_judge.pairs(True).items():
            for view, by in found["paired"][pair_name].items():
                for metric, told in by.items():
                    difference = found["models"][one][view][metric] - found["models"][control][view][metric]
                    assert told["difference"] == pytest.approx(difference, abs=1e-9)
        assert sum(found["gate"]["weights"].values()) == pytest.approx(1.0, abs=1e-5)
        assert "domains" in found["gate"]["weights"]
        assert_served(tmp_path / "broken", name, found)
    # A finished run is read, and nothing of it is computed.
    monkeypatch.setattr(domains.domains_judge, "measure", None)
    monkeypatch.setattr(domains, "trained_parts", None)
    assert domains.run(experiment, both, tmp_path / "broken", quiet=True)["domains"] == held["domains"]


def measured(scores, test, tie):
    """The figures of scores [Nu, I] on a test [Nu, I], `tie` added to what is to be found."""
    ndcg, recall = [], []
    for user in np.flatnonzero(test.getnnz(axis=1)):
        wanted = np.isin(np.arange(scores.shape[1]), test[user].indices)
        hits = wanted[np.argsort(-(scores[user] + tie * wanted), kind="stable")[:20]]
        ideal = (1 / np.log2(np.arange(2, min(wanted.sum(), 10) + 2))).sum()
        ndcg.append((hits[:10] / np.log2(np.arange(2, 12))).sum() / ideal)
        recall.append(hits.sum() / wanted.sum())
    return {"users": len(recall), "ndcg@10": np.mean(ndcg), "recall@20": np.mean(recall)}


def assert_served(folder, name, found):
    """The recommender that a run leaves of a domain has the lists that the report measured, by a count of its own."""
    held = Recommender.load(folder / "joined" / name)
    assert held.model.names[-1] == "domains" and held.intake is None
    base = Run.open(folder / "alone" / name, from_json(Experiment, json.loads(
        (folder / "alone" / name / "experiment.json").read_text())["config"]), quiet=True)
    test = base.split.test.matrix(len(held.user_ids), len(held.item_ids))
    items, listed = held.all_users(20)
    scores = np.where(held.known.toarray() > 0, -np.inf, held.model.scores(held.histories))
    np.testing.assert_allclose(listed, -np.sort(-scores, axis=1)[:, :20], atol=1e-5)
    figures = found["models"]["fused with domains"]["all"]
    # Scores that rounding alone tells apart have another order with every block size: at worst for or against what is
    # to be found.
    worst, best = (measured(scores, test, tie) for tie in (-1e-5, 1e-5))
    assert worst["users"] == figures["users"] and held.held_out == test.nnz
    for metric in ("ndcg@10", "recall@20"):
        assert worst[metric] - 1e-9 <= figures[metric] <= best[metric] + 1e-9 and best[metric] - worst[metric] < 0.05
    for user in held.user_ids[:3]:
        entry = held.recommend(user=user, k=1)[0]
        assert entry["item_id"] == held.item_ids[items[held.user_ids.index(user), 0]] and "domains" in entry["parts"]


@pytest.mark.slow
def test_a_control_can_be_run_later(pair, folders, tmp_path):
    encoder = make_tiny_encoder(tmp_path / "bert", [*pair[0].item_texts, *pair[0].graph.entity_names])
    without, both = small(encoder, control=False), [folders / "rich", folders / "poor"]
    first = domains.run(without, both, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "single").exists()
    assert "was not run" in (tmp_path / "run" / "report.md").read_text()
    after = domains.run(small(encoder, control=True), both, tmp_path / "run", quiet=True)
    for name, found in after["domains"].items():
        assert set(found["paired"]) == {"towers", "fused", "own towers", "fused alone"}
        for model, figures in first["domains"][name]["models"].items():
            assert found["models"][model] == figures
        # The control is another training: of the same kind, on one domain.
        assert found["models"]["shared towers on one domain"] != found["models"]["shared towers"]
        assert found["control_gate"]["weights"] != found["gate"]["weights"]
        assert (tmp_path / "run" / "single" / name / "graph" / "tables").is_dir()
