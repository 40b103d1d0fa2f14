"""Items that join a finished run: what they get is what cold items had that were there; bad input; undoing it."""

import dataclasses
import json
import shutil
import typing

import numpy as np
import pytest
import scipy.sparse as sp
from tiny_encoder import make_tiny_encoder

from kgrec_jax import cli, pipeline
from kgrec_jax.config import Experiment
from kgrec_jax.data.dataset import Graph
from kgrec_jax.data.folder import DataConfig, write_folder
from kgrec_jax.data.new_items import read_new_items
from kgrec_jax.data.toy import known_answer, toy_world
from kgrec_jax.errors import KgrecError
from kgrec_jax.linear import ridge
from kgrec_jax.linear.ease import ease
from kgrec_jax.linear.parts import ItemWeights, Part
from kgrec_jax.models.recommender import TOWER
from kgrec_jax.models.towers import TowerConfig
from kgrec_jax.serving import additions, resize
from kgrec_jax.serving.additions import add_items, drop_items, remove_items
from kgrec_jax.serving.intake import Added
from kgrec_jax.serving.new_graph import join, reordered
from kgrec_jax.serving.recommender import Recommender
from kgrec_jax.stages import fuse, graph, pretrain
from kgrec_jax.stages.fuse_gate import GateConfig


def world_with_media():
    """The toy world with a vector for three of four films, which tells genres apart."""
    world = toy_world()
    rng = np.random.default_rng(3)
    genre = world.graph.triples[:world.num_items, 2] - world.num_items
    vectors = (np.eye(6)[genre % 6] + rng.normal(0, 0.1, (world.num_items, 6))).astype(np.float32)
    present = np.arange(world.num_items) % 4 > 0
    vectors = np.where(present[:, None], vectors, 0).astype(np.float32)
    return dataclasses.replace(world, media={"image": (vectors, present)})


def part_of(world, rows, others=True):
    """The items of some rows; with what else the graph knows, or without."""
    rows = np.asarray(rows)
    inside = world.graph.triples[:, [0, 2]] < world.num_items
    about = np.where(inside, np.isin(world.graph.triples[:, [0, 2]], rows), True).all(1) & inside.any(1)
    about |= others & ~inside.any(1)
    order = np.concatenate([rows, np.arange(world.num_items, world.graph.num_entities)])
    cut = dataclasses.replace(world.graph, triples=world.graph.triples[about], part=world.graph.part[about])
    moved = np.full(world.num_items, -1, np.int64)
    moved[rows] = np.arange(len(rows))
    log = world.interactions.take(np.isin(world.interactions.item, rows))
    log = dataclasses.replace(log, item=moved[log.item].astype(np.int32))

    def pick(values):
        return tuple(values[r] for r in rows)

    return dataclasses.replace(
        world, item_ids=pick(world.item_ids), item_names=pick(world.item_names), item_texts=pick(world.item_texts),
        interactions=log, part=np.zeros(len(log), np.int8), graph=reordered(cut, order, len(rows)).graph,
        media={name: (vectors[rows], present[rows]) for name, (vectors, present) in world.media.items()})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(world, cold rows, recommender of a run with them, folder of one without them, folder of the new items)."""
    root, world = tmp_path_factory.mktemp("items"), world_with_media()
    cold = np.flatnonzero(np.bincount(world.interactions.item, minlength=world.num_items) == 0)
    warm = np.setdiff1d(np.arange(world.num_items), cold)
    write_folder(world, root / "whole")
    write_folder(part_of(world, warm), root / "without")
    write_folder(part_of(world, cold, others=False), root / "new")
    encoder = make_tiny_encoder(root / "bert", [*world.item_texts, *world.graph.entity_names])
    for name in ("whole", "without"):
        experiment = Experiment(
            encoder=str(encoder), data=DataConfig(path=str(root / name)), pretrain=pretrain.Config(mode="off"),
            graph=graph.Config(dim=16, steps=30, batch=64, encoder_mode="off"),
            fuse=fuse.Config(tower=TowerConfig(width=16, max_history=16), ensemble=2, steps=30, batch=32,
                             text_length=32, gate=GateConfig(steps=40, batch=32)))
        pipeline.run(experiment, root / f"run-{name}", quiet=True)
    return world, cold, Recommender.load(root / "run-whole"), root / "run-without", root / "new"


def test_the_towers_of_an_ensemble_differ_and_their_scores_add_up(made):
    whole, cold = made[2], made[1]
    tower, own = whole.model.tower, whole.histories.take(np.arange(5))
    first, second = tower.members
    assert np.abs(first.item_vectors - second.item_vectors).max() > 0.1
    alone = [dataclasses.replace(one, others=()).scores(own.sequence) for one in (first, second)]
    np.testing.assert_allclose(whole.model.raw(own, TOWER), alone[0] + alone[1], atol=1e-5)
    kept = np.setdiff1d(np.arange(whole.model.num_items), cold)
    fewer = resize.resized_tower(tower, kept, 2)
    for one, before in zip(fewer.members, tower.members, strict=True):
        np.testing.assert_array_equal(one.item_vectors[:len(kept)], before.item_vectors[kept])
        assert not one.item_vectors[len(kept):].any()


def taken_and_given_back(made, entity_known, say=lambda line: None):
    """The run with the cold items, and the same after they were taken out and added again, in one order."""
    _, cold, whole, _, folder = made
    known = tuple(Added(whole.item_ids[r], "", 0, (), "", True) for r in cold) if entity_known else ()
    without = drop_items(dataclasses.replace(whole, added=known), cold)
    assert len(without.item_ids) == len(whole.item_ids) - len(cold)
    assert without.graph.num_entities == whole.graph.num_entities - (0 if entity_known else len(cold))
    again = add_items(without, read_new_items(folder, DataConfig()), "new", say)
    return whole, again, np.array([again.item_ids.index(item) for item in whole.item_ids])


@pytest.mark.slow
@pytest.mark.parametrize("entity_known", [True, False])
def test_an_item_that_joins_gets_what_a_cold_item_has(made, entity_known):
    whole, again, order = taken_and_given_back(made, entity_known)
    cold = made[1]
    users = np.arange(0, len(whole.user_ids), 7)
    seen = 0
    for n, name in enumerate(whole.model.names):
        np.testing.assert_array_equal(again.model.known()[n][order], whole.model.known()[n], err_msg=name)
        seen += whole.model.known()[n][cold].any()
        if name == "sequence" and not entity_known:  # it reads an entity's trained row, which a new one has not
            continue
        np.testing.assert_allclose(again.model.raw(again.histories.take(users), name)[:, order],
                                   whole.model.raw(whole.histories.take(users), name), atol=2e-4, rtol=1e-3,
                                   err_msg=name)
    assert seen >= 5  # expected-popularity, features, graph, text and the towers
    parts, before = again.model.tower.item_parts, whole.model.tower.item_parts
    for name in ("text", "image"):
        a, b = parts[name][order][cold], np.asarray(before[name][cold])
        lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        np.testing.assert_allclose((a * b).sum(1)[lengths > 0], lengths[lengths > 0], rtol=1e-4)
        assert ((np.linalg.norm(a, axis=1) > 0) == (np.linalg.norm(b, axis=1) > 0)).all()
    assert (np.linalg.norm(again.model.tower.item_vectors[order][cold], axis=1) > 0.99).all()
    if entity_known:
        np.testing.assert_allclose(again.model.scores(again.histories.take(users))[:, order],
                                   whole.model.scores(whole.histories.take(users)), atol=2e-3)
        np.testing.assert_allclose(again.intake.entity[order], whole.intake.entity[:len(order)])


@pytest.mark.slow
def test_queries_and_reasons_are_those_of_a_cold_item(made):
    whole, again, order = taken_and_given_back(made, True)
    cold = made[1]
    np.testing.assert_allclose(again.query_index.documents.toarray()[order][:, :whole.query_index.documents.shape[1]],
                               whole.query_index.documents.toarray(), atol=1e-6)
    np.testing.assert_allclose(again.query_index.vectors[order], whole.query_index.vectors, atol=1e-5)
    title = whole.item_names[cold[0]]
    assert again.recommend(query=title, k=1)[0]["item_id"] == whole.item_ids[cold[0]]
    ask = {"user": whole.user_ids[3], "candidates": [whole.item_ids[r] for r in cold], "k": 4}
    for a, b in zip(again.recommend(**ask), whole.recommend(**ask), strict=True):
        assert a["item_id"] == b["item_id"] and a["reason"] == b["reason"] and "nobody has chosen it yet" in a["reason"]
    near, there = (held.recommend(history=[title], k=5) for held in (again, whole))  # a new item as a history
    np.testing.assert_allclose([r["score"] for r in near], [r["score"] for r in there], atol=1e-4)


@pytest.mark.slow
def test_a_run_that_never_saw_the_items_says_the_same_of_them(made):
    world, cold, whole, folder, new = made
    again = add_items(Recommender.load(folder), read_new_items(new, DataConfig()), "new", lambda line: None)
    assert again.user_ids == whole.user_ids
    order = np.array([again.item_ids.index(whole.item_ids[r]) for r in cold])
    users = np.flatnonzero(whole.histories.matrix.getnnz(axis=1) > 0)
    for name in ("features", "graph", "text"):
        a = again.model.raw(again.histories.take(users), name)[:, order]
        b = whole.model.raw(whole.histories.take(users), name)[:, cold]
        agree = [np.corrcoef(x, y)[0, 1] for x, y in zip(a, b, strict=True) if x.std() > 1e-6 and y.std() > 1e-6]
        assert len(agree) > 100 and np.mean(agree) > 0.9, (name, np.mean(agree))
    # The best new film for a user is of a kind that the user likes, as the known answer has it.
    scores = again.model.scores(again.histories.take(users))[:, order]
    chosen = known_answer()[users][:, cold]
    got = np.take_along_axis(chosen, scores.argmax(1)[:, None], 1).mean()
    assert got > 1.5 * chosen.mean()


def test_later_columns_are_those_of_a_fit_with_the_items():
    rng = np.random.default_rng(0)
    touched = rng.random((60, 30)) < 0.2
    touched[:, 25:] = False
    train = sp.csr_matrix(touched.astype(np.float32))
    features = rng.normal(size=(30, 8)).astype(np.float32)
    features[3] = 0
    full, part = ridge.kernel(features), ease(train, 10.0)
    wanted = ridge.content(part, full, 2.0)
    values = np.log1p(train.getnnz(axis=0)).astype(np.float32)
    known = values > 0
    expected = ridge.predicted(values, known, full, 2.0)
    some = np.arange(25)
    sub = ItemWeights(part.weights[:25, :25], part.known[:25])
    old = ridge.content(sub, full[:25, :25], 2.0)
    got = ridge.later_columns(sub, old, full[25:, :25])
    np.testing.assert_allclose(got, wanted.weights[:25, 25:], atol=1e-5)
    values_old = ridge.predicted(values[some], known[some], full[:25, :25], 2.0)
    np.testing.assert_allclose(ridge.later_values(values[some], values_old, old.inverse_diagonal, full[25:, :25]),
                               expected[25:], atol=1e-4)


def test_every_kind_of_part_can_be_resized():
    assert set(typing.get_args(Part)) <= set(resize.ITEM_AXES)
    for kind, axes in resize.ITEM_AXES.items():
        assert set(axes) <= {field.name for field in dataclasses.fields(kind)}
    with pytest.raises(KgrecError, match="the kind int"):
        resize.resized(3, np.arange(2), 1)
    held = sp.random(4, 5, 0.5, "csr", random_state=0)
    for axis in (0, 1):
        dense = resize.along(held.toarray(), axis, np.array([2, 0]), 2)
        np.testing.assert_array_equal(resize.along(held, axis, np.array([2, 0]), 2).toarray(), dense)
        assert dense.shape[axis] == 4


def small_graph(ids, relations, triples, num_items):
    names = tuple(f"the {i}" for i in ids)
    return Graph(tuple(ids), names, (), tuple(relations), tuple(relations), np.array(triples, np.int32).reshape(-1, 3),
                 num_items, np.zeros(len(triples), np.int8))


def test_a_graph_takes_items_in():
    old = small_graph(["i0", "i1", "x", "film", "y"], ["by", "of"], [(0, 0, 2), (1, 0, 4), (3, 1, 2), (2, 0, 4)], 2)
    new = small_graph(["n0", "film", "x", "i1", "strange"], ["by", "made", "odd"],
                      [(0, 0, 2), (2, 1, 0), (0, 0, 4), (0, 2, 2), (1, 0, 3), (1, 0, 0), (2, 0, 3)], 2)
    got = join(old, new, {"made": "of"})
    g = got.graph
    assert g.entity_ids == ("i0", "i1", "n0", "film", "x", "y") and g.num_items == 4
    said = {(g.entity_ids[h], g.relation_ids[r], g.entity_ids[t]) for h, r, t in g.triples.tolist()}
    assert said == {("i0", "by", "x"), ("i1", "by", "y"), ("x", "by", "y"), ("film", "of", "x"), ("n0", "by", "x"),
                    ("n0", "of", "x"), ("film", "by", "i1"), ("film", "by", "n0")}
    assert len(g.triples) == len(g.part) == len(said) and got.left_out == 2 and got.about_others == 1
    assert got.unknown_entities == ("strange",) and got.unknown_relations == ("odd",)
    assert got.order.tolist() == [0, 1, -1, 3, 2, 4]
    links = got.of_items(2)
    assert np.diff(links.indptr).tolist() == [3, 3] and set(links.of(1)[1].tolist()) == {1, 2, 4}
    with pytest.raises(KgrecError, match="entity_id: found 'i1'.*the i1"):
        join(old, small_graph(["i1"], [], [], 1), {})


@pytest.mark.slow
def test_bad_input(made, tmp_path):
    _, _, whole, folder, new = made
    said = []
    with pytest.raises(KgrecError, match="found the item 'film.*has already"):
        add_items(whole, read_new_items(new, DataConfig()), "new", said.append)
    (tmp_path / "items.tsv").write_text("item_id\ttitle\nfresh\tA Film\nblank\t\n", encoding="utf-8")
    grown = add_items(whole, read_new_items(tmp_path / "items.tsv", DataConfig()), "t", said.append)
    row = len(whole.item_ids)
    assert grown.item_names[row:] == ("A Film", "blank") and "text" in grown.added[0].parts and not grown.added[1].parts
    assert any("nothing is known of 1 of them (blank)" in line for line in said)
    scores = grown.model.scores(grown.histories.take(np.arange(4)))
    assert (scores.argmin(1) == row + 1).all() and np.isfinite(scores).all()
    said.clear()
    (tmp_path / "triples.tsv").write_text("head_id\trelation\ttail_id\nfresh\tgenre\tgenre0\nfresh\tgenre\tnowhere\n"
                                          "fresh\tlikes\tgenre0\n", encoding="utf-8")
    grown = add_items(whole, read_new_items(tmp_path, DataConfig()), "t", said.append)
    assert any("2 triples left out" in line and "nowhere" in line and "likes" in line for line in said), said
    assert grown.added[0].links == 1 and "graph" in grown.added[0].parts
    (tmp_path / "items.tsv").write_text("item_id\ttitle\nfresh\tA\tB\n", encoding="utf-8")
    with pytest.raises(KgrecError, match="items.tsv:2: found 3 fields"):
        read_new_items(tmp_path, DataConfig())
    (tmp_path / "items.tsv").unlink()
    with pytest.raises(KgrecError, match="no items.tsv"):
        read_new_items(tmp_path, DataConfig())
    with pytest.raises(KgrecError, match="found nothing at"):
        read_new_items(tmp_path / "absent", DataConfig())
    with pytest.raises(KgrecError, match="kgrec evaluate RUN"):
        add_items(dataclasses.replace(whole, intake=None), read_new_items(new, DataConfig()), "new", said.append)
    with pytest.raises(KgrecError, match="touched"):
        drop_items(whole, np.array([int(np.argmax(whole.model.popularity))]))
    wide = dataclasses.replace(read_new_items(new, DataConfig()), item_ids=tuple(f"n{i}" for i in range(len(made[1]))),
                               media={"image": (np.ones((len(made[1]), 4), np.float32), np.ones(len(made[1]), bool))})
    wide = dataclasses.replace(wide, graph=dataclasses.replace(
        wide.graph, entity_ids=(*wide.item_ids, *wide.graph.entity_ids[len(made[1]):])))
    with pytest.raises(KgrecError, match="media/image.npy: found vectors of width 4, expected 6"):
        add_items(whole, wide, "new", said.append)


@pytest.mark.slow
def test_on_the_command_line_and_back(made, tmp_path, capsys):
    _, cold, whole, folder, new = made
    before = Recommender.load(folder)
    out = tmp_path / "out"
    assert cli.main(["items", "add", str(folder), str(new), "--out", str(out)]) == 0
    assert f"{len(cold):,} items added, of these with text {len(cold):,}" in capsys.readouterr().err
    grown, journal = Recommender.load(out), (out / "added.tsv").read_text(encoding="utf-8").splitlines()
    assert len(journal) == len(cold) + 1 and journal[0].split("\t")[0] == "item_id" and str(new) in journal[1]
    assert Recommender.load(folder).item_ids == before.item_ids and not (folder / "added.tsv").exists()
    ask = {"user": whole.user_ids[5], "k": 6}
    assert len(grown.recommend(**ask)) == 6
    assert cli.main(["items", "add", str(folder), str(new), "--out", str(out)]) == 2  # in use
    assert cli.main(["items", "add", str(out), str(new)]) == 2  # there already
    ids = [whole.item_ids[r] for r in cold]
    assert cli.main(["items", "remove", str(out), *ids[1:]]) == 0
    assert Recommender.load(out).added[0].item_id == ids[0] and len((out / "added.tsv").read_text().splitlines()) == 2
    assert cli.main(["items", "remove", str(out), before.item_ids[0]]) == 2
    assert "an item of the run itself" in capsys.readouterr().err
    assert cli.main(["items", "remove", str(out), ids[0]]) == 0
    left = Recommender.load(out)
    assert not (out / "added.tsv").exists() and left.item_ids == before.item_ids
    assert left.graph.entity_ids == before.graph.entity_ids
    rows = np.arange(8)
    np.testing.assert_array_equal(left.model.scores(left.histories.take(rows)),
                                  before.model.scores(before.histories.take(rows)))
    assert cli.main(["items", "add", str(out), str(new)]) == 0  # in place, and once more
    assert Recommender.load(out).item_ids == (*before.item_ids, *ids)
    with pytest.raises(KgrecError, match="no such item"):
        remove_items(left, ["nothing"])


@pytest.mark.slow
def test_an_older_recommender_is_read_and_says_what_to_do(made, tmp_path):
    _, _, _, folder, new = made
    shutil.copytree(folder / "recommender", tmp_path / "recommender")
    manifest = tmp_path / "recommender" / "recommender.json"
    held = json.loads(manifest.read_text(encoding="utf-8"))
    for field in ("intake", "added", "categories"):
        del held["content"]["fields"][field]
    manifest.write_text(json.dumps(held), encoding="utf-8")
    old = Recommender.load(tmp_path)
    assert old.intake is None and old.recommend(user=old.user_ids[0], k=2)
    with pytest.raises(KgrecError, match="kgrec evaluate RUN"):
        additions.add_items(old, read_new_items(new, DataConfig()), "new", lambda line: None)
