"""Rows that are fitted where they are asked for: BPR-MF's training, their choice, their place in a run's report."""

import dataclasses
import types

import jax
import numpy as np
import pytest
import scipy.sparse as sp
from tiny_encoder import make_tiny_encoder

from kgrec_jax import pipeline
from kgrec_jax.config import Experiment, fields_of
from kgrec_jax.data.dataset import Interactions
from kgrec_jax.data.folder import DataConfig, write_folder
from kgrec_jax.data.toy import toy_world
from kgrec_jax.errors import KgrecError
from kgrec_jax.linear import choose
from kgrec_jax.linear.parts import Factors, FoldIn, UserFactors
from kgrec_jax.models.tower_config import TowerConfig
from kgrec_jax.optim import OptimConfig
from kgrec_jax.serving.recommender import Recommender
from kgrec_jax.sharding import make_mesh
from kgrec_jax.stages import fuse, fuse_rows, graph, pretrain
from kgrec_jax.stages.fuse_bpr import BprConfig, PairBatches, fit_bpr, user_factors
from kgrec_jax.stages.fuse_gate import GateConfig
from kgrec_jax.stages.fuse_rows import FurtherRows
from kgrec_jax.tracking import Tracker


def grouped(num_users=120, num_items=40, seed=0):
    """(log, group of each item, group that each user likes)."""
    rng = np.random.default_rng(seed)
    group, liked = np.arange(num_items) % 4, rng.integers(4, size=num_users)
    user, item = np.nonzero(rng.random((num_users, num_items)) < np.where(liked[:, None] == group[None], 0.5, 0.02))
    return make_log(user, item), group, liked


def make_log(user, item):
    return Interactions(np.asarray(user, np.int32), np.asarray(item, np.int32), np.ones(len(user), np.float32),
                        np.zeros(len(user), np.int64))


def fake_run(folder, num_users, num_items, devices=1):
    return types.SimpleNamespace(dataset=types.SimpleNamespace(num_users=num_users, num_items=num_items),
                                 mesh=make_mesh(devices=jax.devices()[:devices]), tracker=Tracker(folder, True))


def test_pairs_are_a_function_of_the_step_and_in_the_log_on_one_side_alone():
    log, _, _ = grouped()
    matrix = log.matrix(121, 41)  # the last user has nothing, nobody has the last item
    dense = matrix.toarray() > 0
    dense[3] = True
    dense[3, 40] = False
    matrix = sp.csr_matrix(dense.astype(np.float32))  # one has touched all that anybody has: nothing is left to draw
    source = PairBatches.of(matrix, num_steps=9, batch=500)
    batch, again = source[4], source[4]
    jax.tree.map(np.testing.assert_array_equal, batch, again)
    assert (batch.item != source[5].item).any() and len(source) == 9
    assert dense[batch.user, batch.item].all() and batch.other.max() < 40
    np.testing.assert_array_equal(batch.weight, (batch.user != 3).astype(np.float32))
    assert not dense[batch.user, batch.other][batch.user != 3].any()


def test_bpr_learns_what_users_like_and_serves_new_ones(tmp_path):
    log, group, liked = grouped()
    cfg = BprConfig(dim=8, steps=250, batch=256, l2=0.005, optim=OptimConfig(peak_lr=0.03))
    part = fit_bpr(cfg, log, tmp_path / "bpr", fake_run(tmp_path, 120, 40), 0, 50, 1000)
    matrix = log.matrix(120, 40)

    def share(histories):
        scores = np.where(histories.toarray() > 0, -np.inf, part.scores(histories))
        some = ((liked[:, None] == group[None]) & (histories.toarray() == 0)).any(1)
        return (group[scores.argmax(1)] == liked)[some].mean()

    assert share(matrix) > 0.9  # rows; by chance a quarter
    shorter = matrix.tolil()
    for u in range(120):
        shorter[u, matrix[u].indices[-1:]] = 0
    shorter = shorter.tocsr()
    shorter.eliminate_zeros()
    assert share(shorter) > 0.9  # nobody's whole history: encoded
    assert not part.scores(sp.csr_matrix((1, 40), dtype=np.float32)).any()


def test_bpr_goes_on_bit_for_bit_and_is_the_same_on_a_mesh(tmp_path, monkeypatch):
    log, _, _ = grouped()
    cfg = BprConfig(dim=4, steps=8, batch=64)

    def fitted(name, devices=1):
        return fit_bpr(cfg, log, tmp_path / name, fake_run(tmp_path, 120, 40, devices), 0, 3, 3)

    whole, drawn = fitted("whole"), PairBatches.__getitem__

    def breaks(self, step):
        if step == 5:
            raise KeyboardInterrupt
        return drawn(self, step)

    monkeypatch.setattr(PairBatches, "__getitem__", breaks)
    with pytest.raises(KeyboardInterrupt):
        fitted("broken")
    monkeypatch.setattr(PairBatches, "__getitem__", drawn)
    np.testing.assert_array_equal(fitted("broken").items, whole.items)
    np.testing.assert_allclose(fitted("mesh", 8).items, whole.items, atol=1e-5)


def test_the_row_of_a_history_is_the_ridge_onto_the_rows():
    log, _, _ = grouped(30, 12)
    matrix, rng = log.matrix(30, 12), np.random.default_rng(1)
    users, items = rng.normal(size=(30, 3)).astype(np.float32), rng.normal(size=(12, 3)).astype(np.float32)
    part = user_factors(users, items, matrix, 2.0)
    dense = matrix.toarray()
    some = dense.sum(1) > 0
    sums = (dense / np.sqrt(np.maximum(dense.sum(1, keepdims=True), 1)))[some] @ items
    turn = np.linalg.solve(sums.T @ sums + 2 * np.eye(3), sums.T @ users[some])
    np.testing.assert_allclose(part.encode, items @ turn, atol=1e-4)


def test_settings_are_chosen_by_what_is_held_out(monkeypatch):
    log, _, _ = grouped()
    kept = np.random.default_rng(2).random(len(log)) < 0.8
    train, heldout = log.take(kept).matrix(120, 40), log.take(~kept).matrix(120, 40)
    monkeypatch.setattr(choose, "IALS_DIMS", (4, 8, 16))
    monkeypatch.setattr(choose, "IALS_COMPARED", 500)
    found = choose.choose_linear(train, heldout, with_ease=False, with_ials=True, with_slim=True, say=lambda text: None)
    assert found.ials_dim in (4, 8, 16) and found.ials.l2 == found.ials_l2 in choose.IALS_L2
    assert found.slim_l2 in choose.SLIM_L2 and {"ials", "slim"} <= set(found.scores) and "ease" not in found.scores


def small(tmp_path, **changes):
    world = toy_world(num_users=80, num_items=60)
    write_folder(world, tmp_path / "toy")
    encoder = make_tiny_encoder(tmp_path / "bert", [*world.item_texts, *world.graph.entity_names])
    cfg = fuse.Config(tower=TowerConfig(width=8, max_history=8), steps=4, batch=16, text_length=16,
                      text_encoder="released", gate=GateConfig(steps=8, batch=16),
                      bpr=BprConfig(dim=4, steps=12, batch=64), **changes)
    return Experiment(encoder=str(encoder), data=DataConfig(path=str(tmp_path / "toy")), fuse=cfg,
                      pretrain=pretrain.Config(mode="off"),
                      graph=graph.Config(dim=8, steps=4, batch=32, encoder_mode="off"))


@pytest.fixture
def few_dims(monkeypatch):
    monkeypatch.setattr(choose, "IALS_DIMS", (4, 8, 16))


@pytest.mark.slow
def test_rows_are_measured_and_join_the_score_where_asked(tmp_path, few_dims):
    experiment = small(tmp_path, rows=("ials", "slim", "bpr", "tfidf"), joined=("ials", "bpr", "tfidf"))
    report = pipeline.run(experiment, tmp_path / "run", quiet=True)
    for name in fuse_rows.FURTHER:
        assert 0 < report.models[name]["ndcg@10"] <= 1
    held = Recommender.load(tmp_path / "run")
    kinds = {"ials": FoldIn, "bpr": UserFactors, "tfidf": Factors}
    assert {n: type(held.model.parts[n]) for n in kinds} == kinds and "slim" not in held.model.names
    own = held.histories.take(np.arange(5))
    parts, _ = held.model.contributions(own, np.tile(np.arange(60), (5, 1)))
    np.testing.assert_allclose(parts.sum(-1), held.model.scores(own), atol=1e-4)
    listed = held.recommend(history=[held.item_names[3]], k=60)  # cold items have no part of behaviour
    assert {"ials", "bpr", "tfidf"} <= set().union(*(entry["parts"] for entry in listed))
    again = pipeline.evaluate_run(tmp_path / "run", quiet=True)
    assert again.models["ials"]["ndcg@10"] == report.models["ials"]["ndcg@10"]
    assert "bpr" in pipeline.refit(tmp_path / "run", tmp_path / "again", quiet=True).model.parts


@pytest.mark.slow
def test_ials_takes_the_place_of_ease_that_does_not_fit(tmp_path, few_dims, monkeypatch):
    monkeypatch.setattr(fuse, "skip_reason", lambda items: f"{items} items are too many")
    monkeypatch.setattr(fuse_rows, "skip_reason", lambda items: f"{items} items take hours")
    report = pipeline.run(small(tmp_path, rows=("slim",)), tmp_path / "run", quiet=True)
    assert report.skipped["ease"] == "60 items are too many" and report.skipped["slim"] == "60 items take hours"
    assert "no EASE" in report.skipped["features"]
    assert "collaborative" in report.models and not {"ease", "ials", "features", "slim"} & set(report.models)
    held = Recommender.load(tmp_path / "run")
    assert isinstance(held.model.parts["collaborative"], FoldIn)
    assert held.recommend(history=[held.item_names[3]], k=2)[0]["reason"]


def test_fields():
    field = fields_of(Experiment)["fuse.rows"]
    assert field.many and field.reads("slim") and not field.reads("ease") and "ials, slim" in field.expected()
    rows = FurtherRows.of(fuse.Config(rows=("slim",), joined=("ials",)))
    assert rows.names == ("ials", "slim") and rows.joined == ("ials",) and rows.with_ials and rows.with_slim(100)
    assert not FurtherRows.of(fuse.Config()).names
    for changes, words in (({"dim": 0}, "fuse.bpr.dim: found 0"), ({"l2": -1.0}, "fuse.bpr.l2"),
                           ({"optim": OptimConfig(peak_lr=-1.0)}, "fuse.bpr.optim.peak_lr")):
        with pytest.raises(KgrecError, match=words):
            fuse.check(dataclasses.replace(fuse.Config(), bpr=BprConfig(**changes)))
    assert BprConfig().num_steps(10) == 300 and BprConfig(steps=7).num_steps(10) == 7
