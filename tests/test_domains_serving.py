"""The recommender with the part of several domains: its lists, what it keeps, what it refuses; the control's words."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from domain_world import SHAPE, content_of, training, two_domains

from kgrec_jax import cli
from kgrec_jax.data.domains import union
from kgrec_jax.data.folder import write_folder
from kgrec_jax.data.text import tfidf_svd
from kgrec_jax.linear.neighbours import item_knn
from kgrec_jax.linear.popularity import popularity
from kgrec_jax.models.domain_towers import DomainPart, DomainTowers, HeadsConfig
from kgrec_jax.models.fusion import alone, gate_init
from kgrec_jax.models.recommender import FusedModel
from kgrec_jax.serving.query import NGRAMS
from kgrec_jax.serving.recommender import Recommender
from kgrec_jax.stages import domains, domains_judge, domains_report
from kgrec_jax.stages.domains_judge import PART, with_part
from kgrec_jax.stages.domains_parts import SharedRun, of_domain
from kgrec_jax.stages.domains_towers import batches, init
from kgrec_jax.stages.fuse_parts import scale_of
from kgrec_jax.tracking import Tracker
from kgrec_jax.workdir import DOMAINS, Run

HEADS = HeadsConfig("ple", experts=2, own_experts=1, width=8)


@pytest.fixture(scope="module")
def both():
    """{"rich", "poor"}."""
    return dict(zip(("rich", "poor"), two_domains()[:2]))


@pytest.fixture(scope="module")
def made(both, tmp_path_factory):
    """(the poor domain's recommender as it was read back, its folder, what the shared towers say [Nu, I] of all users).

    The towers have random weights, and the fused score the popularity, item-kNN and their part.
    """
    root, poor, content = tmp_path_factory.mktemp("served") / "RUN", both["poor"], content_of(both)
    features = content.features({name: data.interactions for name, data in both.items()})
    model = DomainTowers(SHAPE, HEADS, content.union.starts)
    shapes = jax.eval_shape(lambda key: init(model, features, key), jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) * 0.4, jnp.float32), shapes)
    log, shape = poor.interactions, (poor.num_users, poor.num_items)
    matrix = log.matrix(*shape)
    history = np.full((poor.num_users, 4), -1, np.int32)
    for user in range(poor.num_users):
        items = np.unique(log.item[log.user == user])
        history[user, :len(items)] = items
    users, items = jax.jit(lambda p: model.apply({"params": p}, features, [history[:1], history])[1])(params)
    vectors = jax.jit(lambda p: model.apply({"params": p}, features, method=DomainTowers.item_vectors))(params)
    part = DomainPart(SHAPE, HEADS, content.union.starts, 1, params, np.asarray(vectors)[content.union.starts[1]:],
                      np.asarray(items), np.ones(poor.num_items, bool))
    parts = {"popularity": popularity(matrix), "item-knn": item_knn(matrix, 20)}
    gate = jax.tree.map(lambda x: x + 0.1, gate_init(3, 1, 1))
    base = FusedModel(parts, None, {}, tuple(parts), matrix.getnnz(axis=0), scale_of(matrix))
    (root / "fuse").mkdir(parents=True)
    np.savez(root / "fuse" / "text.npz", vectors=tfidf_svd(list(poor.item_texts), 20, 0), source=NGRAMS)
    run = types.SimpleNamespace(path=root, dataset=poor, split=None, experiment=types.SimpleNamespace(
        encoder="", seed=0, fuse=types.SimpleNamespace(tower=SHAPE, text_length=32)))
    held = Recommender.build(run, with_part(base, part.for_serving(), gate), log=log, known=matrix, held_out=0)
    (root / DOMAINS).write_text("{}")
    (root / "alone" / "poor").mkdir(parents=True)
    held.save(root / "joined" / "poor" / "recommender")
    return Recommender.load(root / "joined" / "poor"), root, np.asarray(users @ items.T)


def test_the_part_of_a_loaded_recommender_is_that_of_the_towers(made):
    held, _, scores = made
    assert held.model.names[-1] == PART and isinstance(held.model.parts[PART], DomainPart)
    np.testing.assert_allclose(held.model.raw(held.histories, PART), scores, atol=1e-4)
    assert np.abs(scores).max() > 0.1


def test_lists_are_those_of_the_fused_score(made):
    held, _, scores = made
    touched = held.histories.matrix.toarray() > 0
    fused = np.where(touched, -np.inf, held.model.scores(held.histories))
    among = [held.item_ids[i] for i in range(0, len(held.item_ids), 2)]
    items, _ = held.all_users(5)
    np.testing.assert_array_equal(items, np.argsort(-fused, axis=1, kind="stable")[:, :5])
    for row in (0, 7, 31):
        for found, ids in ((held.recommend(user=held.user_ids[row], k=5), held.item_ids),
                           (held.recommend(user=held.user_ids[row], k=5, candidates=among), among)):
            rows = np.array([held.item_ids.index(i) for i in ids])
            best = rows[np.argsort(-fused[row, rows], kind="stable")[:5]]
            assert [entry["item_id"] for entry in found] == [held.item_ids[i] for i in best]
            for entry, item in zip(found, best, strict=True):
                assert entry["reason"] and entry["score"] == pytest.approx(fused[row, item], abs=1e-5)
                assert sum(entry["parts"].values()) == entry["score"] and entry["parts"][PART]
    titles = [held.item_names[i] for i in np.flatnonzero(touched[0])]
    assert [e["item_id"] for e in held.recommend(history=titles, k=5)] == [
        e["item_id"] for e in held.recommend(user=held.user_ids[0], k=5)]
    # A gate that trusts the part alone orders warm items as the towers do, and its addend is the whole score.
    trusts = alone(alone(dict(held.model.gate), 2, False), 2, True)
    own = dataclasses.replace(held, model=dataclasses.replace(held.model, gate=trusts))
    warm = [held.item_ids[i] for i in np.flatnonzero(~held.model.cold)]
    rows = np.flatnonzero(~held.model.cold)
    by_towers = np.where(touched, -np.inf, scores)[3, rows]
    found = own.recommend(user=held.user_ids[3], k=8, candidates=warm)
    assert [e["item_id"] for e in found] == [held.item_ids[i] for i in rows[np.argsort(-by_towers, kind="stable")[:8]]]
    assert all(e["parts"][PART] == pytest.approx(e["score"], abs=1e-5) for e in found)
    assert "several catalogues" in found[0]["reason"]


def test_of_the_shared_towers_only_what_serves_one_domain_is_kept(made):
    held, root, _ = made
    params = held.model.parts[PART].params
    assert set(params) == {"history", "user_heads", "log_scale"}
    assert set(params["user_heads"]) == {"shared_0_0", "shared_0_1", "own_0_1_0", "gate_0_1"}
    kept = {file.name for file in (root / "joined" / "poor" / "recommender").iterdir() if f".{PART}." in file.name}
    assert not [name for name in kept if "item_heads" in name or "params.items" in name or "own_0_0" in name]


@pytest.mark.parametrize("words, said", [
    (("items", "add", "{}/joined/poor", "{}/new", "--out", "{}/grown"), "use RUN/alone/NAME"),
    (("evaluate", "{}/joined/poor"), "alone/poor, the domain's ordinary run"),
    (("refit", "{}/joined/poor", "{}/refitted"), "alone/poor, the domain's ordinary run"),
    (("evaluate", "{}"), "alone/NAME, the domain's ordinary run"),
    (("recommend", "{}", "--user", "x"), "joined/NAME with the name of a domain")])
def test_what_it_cannot_do_is_said_in_one_line(made, both, capsys, words, said):
    _, root, _ = made
    if not (root / "new").exists():
        write_folder(both["rich"], root / "new")
    capsys.readouterr()
    assert cli.main([word.format(root) for word in words]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1 and "found" in told[0] and "expected" in told[0] and said in told[0], told
    assert not (root / "grown").exists() and not (root / "refitted").exists()


# --- the control --------------------------------------------------------------------------------------------------


def test_the_control_reads_the_same_items_and_users(both):
    logs, joined = {name: data.interactions for name, data in both.items()}, union(both)
    cfg = training(4, 8)
    everyone = batches(SHAPE, cfg, 4, joined, logs, 0)
    for at, (name, data) in enumerate(both.items()):
        one = union({name: data})
        assert one.starts == (0, data.num_items) and one.item_ids == of_domain(joined, name, joined.item_ids)
        assert set(one.graph.entity_ids) == set(data.graph.entity_ids)
        alone_ = batches(SHAPE, cfg, 4, one, {name: data.interactions}, 0)
        for step in range(4):
            jax.tree.map(np.testing.assert_array_equal, alone_[step][0], everyone[step][at])
    assert of_domain(joined, "poor", None) is None


def report_of(control):
    value = {"ndcg@10": 0.25, "recall@20": 0.5, "users": 3, "candidates": 9}
    names = domains_judge.pairs(control)
    return {"shared": {"heads": {"kind": "mmoe"}, "steps": 6, "users_a_step": 2, "notes": []}, "domains": {"films": {
        "users": 3, "items": 9, "interactions": 12, "split": "random", "notes": [],
        "models": {model: {"all": value} for model in dict.fromkeys(m for pair in names.values() for m in pair)},
        "paired": {name: {"all": {m: {"difference": 0.125, "standard_error": None} for m in domains_judge.METRICS}}
                   for name in names},
        "gate": {"weights": {"domains": 1.0}, "judged": {}, "guard": {}}}}}


def test_the_report_says_whether_the_control_was_run():
    with_it, without = (domains_report.markdown(report_of(control)) for control in (True, False))
    row = "| shared towers − the same towers on this domain alone | +0.1250 | +0.1250 |"
    assert row in with_it and row not in without
    assert "| fused with one domain | 0.2500 | 0.5000 |" in with_it and "was not run" not in with_it
    assert "was not run (domains.control)" in without and "| own towers | 0.2500 | 0.5000 |" in without
    assert len(domains_report.lines(report_of(True))) == 4 and len(domains_report.lines(report_of(False))) == 2


def test_figures_without_the_control_or_lists_are_not_all(tmp_path):
    done = {"paired": domains_judge.pairs(False)}
    run = types.SimpleNamespace(path=tmp_path, done=lambda stage: done)
    assert not domains_judge.finished(run, False)  # no recommender
    (tmp_path / "recommender").mkdir()
    (tmp_path / "recommender" / "recommender.json").write_text("{}")
    assert domains_judge.finished(run, False) and not domains_judge.finished(run, True)
    done["paired"] = domains_judge.pairs(True)
    assert domains_judge.finished(run, True)


def test_the_control_of_a_domain_is_one_training_on_it_alone(both, tmp_path, monkeypatch):
    tracker, text, calls, told = Tracker(tmp_path, quiet=True), np.arange(160)[:, None], [], {}
    experiment = domains.DomainsExperiment()
    shared = SharedRun(tmp_path / "shared", experiment.ordinary, tracker, union(both))
    alone_ = {name: Run(tmp_path / "alone" / name, experiment.ordinary, tracker) for name in both}
    runs = {name: domains_judge.joined_run(base, tmp_path / "joined" / name) for name, base in alone_.items()}

    def trained(_, run, bases, steps, texts):
        calls.append((run, bases, steps, texts))
        return {name: (run.path.name, name) for name in bases}

    def measure(base, joining, single):
        told[base.path.name] = joining, single
        return {}

    monkeypatch.setattr(domains, "union_texts", lambda *_: text)
    monkeypatch.setattr(domains, "trained_parts", trained)
    monkeypatch.setattr(domains_judge, "measure", measure)
    domains._judge_all(experiment, shared, both, alone_, runs, list(both), 7)
    (everyone, *_), *singles = calls
    assert everyone is shared and [run.path for run, *_ in singles] == [tmp_path / "single" / name for name in both]
    for (run, bases, steps, texts), (name, data) in zip(singles, both.items(), strict=True):
        assert run.union.names == (name,) and run.union.item_ids == data.item_ids and bases == {name: alone_[name]}
        first = 0 if name == "rich" else both["rich"].num_items
        np.testing.assert_array_equal(texts, text[first:first + data.num_items])
        joining, single = told[name]
        assert steps == 7 and joining.trained == ("shared", name) and single.trained == (name, name)
        assert joining.run is runs[name] and single.run.path == run.path
    without = dataclasses.replace(experiment, domains=domains.Config(control=False))
    domains._judge_all(without, shared, both, alone_, runs, ["poor"], 7)
    assert told["poor"][1] is None and len(calls) == 4
