"""The propagation models against loops over the edges, their training, and the part of the score that they become."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp
from tiny_encoder import make_tiny_encoder

from kgrec_jax import pipeline
from kgrec_jax.config import Experiment
from kgrec_jax.data.dataset import Graph, Interactions
from kgrec_jax.data.folder import DataConfig, write_folder
from kgrec_jax.data.toy import toy_world
from kgrec_jax.errors import KgrecError
from kgrec_jax.models.collaborative_graph import kept_entities, learned_nodes
from kgrec_jax.models.propagation import Propagation, PropagationConfig, PropagationPart
from kgrec_jax.models.towers import TowerConfig
from kgrec_jax.optim import OptimConfig
from kgrec_jax.serving.recommender import Recommender
from kgrec_jax.sharding import make_mesh
from kgrec_jax.stages import fuse, fuse_propagation, graph, pretrain
from kgrec_jax.stages.fuse_gate import GateConfig
from kgrec_jax.stages.fuse_propagation import KINDS, Propagator, PropagationTraining, UserBatches, build, dependence
from kgrec_jax.tracking import Tracker

USERS, ITEMS = 4, 6


def make_graph(num_items, num_entities, triples, relations=2):
    ids = tuple(f"e{i}" for i in range(num_entities))
    names = tuple(f"r{r}" for r in range(relations))
    return Graph(ids, ids, ("",) * num_entities, names, names, np.array(triples, np.int32).reshape(-1, 3), num_items,
                 np.zeros(len(triples), np.int8))


def make_log(user, item):
    return Interactions(np.array(user, np.int32), np.array(item, np.int32), np.ones(len(user), np.float32),
                        np.zeros(len(user), np.int64))


# Entity 9 hangs on one item alone and has no node; item 5 is cold, item 4 has no link.
TRIPLES = [(0, 0, 6), (1, 0, 6), (1, 1, 7), (2, 1, 7), (3, 0, 8), (5, 0, 8), (8, 1, 7), (0, 1, 9), (2, 0, 6)]
GRAPH = make_graph(ITEMS, 10, TRIPLES)
LOG = make_log([0, 0, 1, 1, 2, 2, 2, 3], [0, 1, 1, 2, 0, 3, 4, 4])


def shape(kind, **changes):
    small = {"dim": 5, "layers": 2, "bases": 3, "attention_dim": 4, "intents": 3, "dropout": 0.0, "free_dropout": 0.0,
             "temperature": 0.2}
    return PropagationConfig(kind, **{**small, **changes})


def made(kind, **changes):
    """(model, constants, known, parameters that are drawn and not as they are initialised)."""
    model, constants, known = build(shape(kind, **changes), GRAPH, LOG, USERS, ITEMS)
    constants = jax.tree.map(jnp.asarray, constants)
    shapes = jax.eval_shape(model.init, jax.random.key(0), constants.graph, constants.learned,
                            np.full(1, USERS, np.int32), np.full((1, 1), -1, np.int32))["params"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda s: jnp.asarray(0.5 * rng.standard_normal(s.shape), jnp.float32), shapes)
    return model, constants, known, params


# --- the oracle: one edge after another ---------------------------------------------------------------------------


def unit(x):
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6)


def typed_edges(kind, without):
    """(target, relation, source) of the graph; users from node 9 on, those in `without` say nothing to anybody."""
    out = [edge for h, r, t in TRIPLES if t != 9 for edge in ((h, r, t), (t, r + 2, h))]
    if kind in ("rgcn", "kgat"):
        for u, i in zip(LOG.user.tolist(), LOG.item.tolist()):
            out += [(9 + u, 4, i)] + ([(i, 5, 9 + u)] if u not in without else [])
    return out


def rows_of(kind, params, learned):
    rows = np.asarray(params["embeddings"]) * learned[:, None]
    if kind in ("rgcn", "kgat"):
        users = [rows[[i for v, i in zip(LOG.user, LOG.item) if v == u]].mean(0) for u in range(USERS)]
        rows = np.concatenate([rows, np.stack(users)])
    return rows


def dense(params, name, x):
    return x @ np.asarray(params[name]["kernel"]) + np.asarray(params[name]["bias"])


def expected(kind, params, learned, without=()):
    """(encode [L', I, D'], decode [I, D']) of the model as its paper has it."""
    edges, x = typed_edges(kind, without), rows_of(kind, params, learned)
    p = jax.tree.map(np.asarray, params.get("layers", {}))
    layers = [x]
    if kind == "kgat":
        score = [(p["relation_kernel"][r].T @ x[s]) @ np.tanh(p["relation_kernel"][r].T @ x[t] + p[
            "relation_embeddings"][r]) for t, r, s in edges]
    for n in range(2):
        new = np.zeros((len(x), 5))
        if kind == "lightgcn":
            degree = np.array([sum(i == j and u not in without for u, j in zip(LOG.user, LOG.item)) for i in range(6)])
            for u in set(range(USERS)) - set(without):
                own = [i for v, i in zip(LOG.user, LOG.item) if v == u]
                user = sum(x[i] / np.sqrt(degree[i] * len(own)) for i in own)
                for i in own:
                    new[i] += user / np.sqrt(degree[i] * len(own))
        for node in range(len(x)) if kind != "lightgcn" else ():
            mine = [k for k, e in enumerate(edges) if e[0] == node]
            if kind == "kgin" and mine:
                new[node] = unit(np.mean([p["relation_embeddings"][edges[k][1]] * x[edges[k][2]] for k in mine], 0))
            if kind == "rgcn":
                new[node] = dense(p, f"own_{n}", x[node])
                for r in {edges[k][1] for k in mine}:
                    matrix = np.einsum("b,bde->de", p[f"share_{n}"][r], p[f"basis_{n}"])
                    new[node] += np.mean([x[edges[k][2]] for k in mine if edges[k][1] == r], 0) @ matrix
                new[node] = np.maximum(new[node], 0.0) if n == 0 else new[node]
            if kind == "kgat":
                share = np.exp([score[k] for k in mine]) / np.exp([score[k] for k in mine]).sum()
                around = sum((a * x[edges[k][2]] for a, k in zip(share, mine)), np.zeros(5))
                both = dense(p, f"sum_{n}", x[node] + around), dense(p, f"product_{n}", x[node] * around)
                new[node] = sum(np.where(v > 0, v, 0.01 * v) for v in both)
        x = new
        layers.append(unit(x) if kind == "kgat" else x)
    layers = [layer[:ITEMS] for layer in layers]
    if kind == "kgin":
        return np.stack(layers[:-1]), unit(sum(layers))
    if kind == "lightgcn":
        mean = sum(layers) / 3
        return (mean / np.sqrt(np.maximum(degree, 1))[:, None] * (degree > 0)[:, None])[None], unit(mean)
    final = layers[-1] if kind == "rgcn" else np.concatenate(layers, 1)
    return final[None], unit(final)


def expected_user(kind, params, encode, items):
    mean = encode[:, items].mean(1) if len(items) else np.zeros_like(encode[:, 0])
    if kind != "kgin":
        return mean[0]
    p = jax.tree.map(np.asarray, params["layers"])
    mixed = np.exp(p["intent_logits"]) / np.exp(p["intent_logits"]).sum(1, keepdims=True) @ p["relation_embeddings"]
    user = total = mean[0]
    for m in mean:
        beta = np.exp(mixed @ user) / np.exp(mixed @ user).sum()
        user = unit((1.0 + beta @ mixed) * m)
        total = total + user
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_tables_and_users_are_those_of_the_papers(kind):
    model, constants, known, params = made(kind)
    learned = np.asarray(constants.learned)
    assert learned[:5].all() and not learned[5] and known.tolist() == [True] * 5 + [kind != "lightgcn"]
    tables = jax.jit(lambda p, c: model.apply({"params": p}, c.graph, c.learned, jnp.ones(USERS, bool),
                                              method=Propagation.tables))(params, constants)
    encode, decode = expected(kind, params, learned)
    np.testing.assert_allclose(tables.encode, encode, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(tables.decode, decode, rtol=2e-4, atol=2e-5)
    # In a step, its users are out of the graph and their hidden items out of their histories; row 2 is padding.
    user, targets = np.array([0, 2, USERS], np.int32), np.array([[1, -1], [0, 4], [-1, -1]], np.int32)
    vectors, step = jax.jit(model.apply)({"params": params}, constants.graph, constants.learned, user, targets)
    encode, decode = expected(kind, params, learned, without=(0, 2))
    np.testing.assert_allclose(step.decode, decode, rtol=2e-4, atol=2e-5)
    wanted = np.stack([expected_user(kind, params, encode, items) for items in ([0], [3], [])])
    scale = np.exp(np.asarray(params["log_scale"]))
    np.testing.assert_allclose(vectors, unit(wanted) * scale, rtol=5e-4, atol=5e-5)
    # Serving: the same from the tables alone, and as a sum over the history.
    part = PropagationPart(*(np.asarray(a) for a in (tables.encode, tables.decode, tables.intents)), known)
    history = sp.csr_matrix(np.array([[1, 0, 1, 0, 1, 0], [0] * 6], np.float32))
    scores = part.scores(history)
    encode, decode = expected(kind, params, learned)
    np.testing.assert_allclose(scores[0], decode @ expected_user(kind, params, encode, [0, 2, 4]), rtol=5e-4, atol=5e-5)
    assert not scores[1].any()  # no history: nothing is said, and no NaN
    for candidate in (1, 5):
        addends = part.contributions(np.array([0, 2, 4]), candidate)
        np.testing.assert_allclose(addends.sum(), scores[0, candidate], rtol=1e-4, atol=1e-5)
    assert part.contributions(np.zeros(0, np.int64), 1).shape == (0,)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_and_reach_every_row_that_can_be_learned(kind):
    model, constants, _, params = made(kind)
    cfg = PropagationTraining(1, 2, OptimConfig(), "bpr" if kind == "kgat" else "softmax", 0.1, 1, 1)
    batch = UserBatches.of(LOG, USERS, num_steps=9, batch=2)[0]
    step = jax.value_and_grad(
        lambda p, c: fuse_propagation.loss(cfg, model, p, c, batch, jax.random.key(3)), has_aux=True)
    (value, told), grads = jax.jit(step)(params, constants)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    moved = np.abs(np.asarray(grads["embeddings"])).sum(1) > 0
    assert not moved[5] and "rec_loss" in told and ("independence" in told) == (kind == "kgin")


def test_without_a_graph_and_without_triples_on_the_items():
    for kind in KINDS:
        model, constants, known = build(shape(kind), make_graph(ITEMS, ITEMS, [], 0), LOG, USERS, ITEMS)
        batch = np.array([0, 1], np.int32), np.array([[0], [-1]], np.int32)
        (users, tables), _ = jax.jit(model.init_with_output)(
            jax.random.key(0), constants.graph, constants.learned, *batch)
        assert known.tolist() == [True] * 5 + [False] and np.isfinite(users).all() and np.isfinite(tables.decode).all()


def test_leaves_have_no_node_and_what_hangs_on_no_warm_item_is_unknown():
    # 0 and 1 hang on 4, and from there leads a tail of two: 5, 6.
    head, tail = np.array([0, 4, 1, 4, 4, 5, 5, 6]), np.array([4, 0, 4, 1, 5, 4, 6, 5])
    assert kept_entities(head, tail, 4, 7).tolist() == [0, 1, 2, 3, 4, -1, -1]
    edges = np.array([0, 6, 1, 6, 2, 7, 3, 7, 6, 8]), np.zeros(10, int), np.array([6, 0, 6, 1, 7, 2, 7, 3, 8, 6])
    warm = np.array([True, False, False, False, False, False])
    learned, known = learned_nodes(edges, np.arange(9), warm, 1)
    assert learned.tolist() == [True] + [False] * 5 + [True, False, False]
    assert known.tolist() == [True, True, False, False, False, False]  # 2 and 3 share what no warm item has
    assert learned_nodes(edges, np.arange(9), warm, 2)[0][8]


def test_dependence_is_one_for_equal_rows_and_small_for_independent_ones():
    rng = np.random.default_rng(0)
    row = rng.standard_normal(200).astype(np.float32)
    assert float(dependence(jnp.stack([row, -2.0 * row]))) == pytest.approx(1.0, abs=1e-3)
    assert float(dependence(jnp.asarray(rng.standard_normal((2, 200)), jnp.float32))) < 0.3


def test_batches_are_a_function_of_the_step_and_hide_no_more_than_there_is():
    source = UserBatches.of(LOG, USERS, num_steps=8, batch=3)
    seen = []
    for step in range(4):
        batch = source[step]
        jax.tree.map(np.testing.assert_array_equal, batch, source[step])
        assert (batch.user[1:] == USERS).all() and (batch.weights.sum(1) == [1, 0, 0]).all()  # a quarter of four users
        own = set(LOG.item[LOG.user == batch.user[0]].tolist())
        assert set(batch.targets[0][batch.targets[0] >= 0].tolist()) <= own
        seen.append(int(batch.user[0]))
    assert sorted(seen) == [0, 1, 2, 3]  # an epoch


# --- training ------------------------------------------------------------------------------------------------------


def planted(num_users=120, num_items=60, kinds=4, seed=0):
    """(graph, log, kind of each item, kind of each user): users touch one kind, a third of the items is cold."""
    rng = np.random.default_rng(seed)
    kind, fond = rng.permutation(np.arange(num_items) % kinds), rng.integers(0, kinds, num_users)
    triples = [(i, 0, num_items + k) for i, k in enumerate(kind)]
    triples += [(i, 1, num_items + kinds + int(rng.integers(5))) for i in range(num_items)]  # says nothing
    warm = np.arange(num_items) % 3 > 0
    pairs = [(u, i) for u in range(num_users) for i in rng.permutation(np.flatnonzero(warm & (kind == fond[u])))[:6]]
    return make_graph(num_items, num_items + kinds + 5, triples), make_log(*zip(*pairs)), kind, fond


def propagator(kind, steps, **changes):
    cfg = PropagationTraining(steps, 32, OptimConfig(peak_lr=0.02), "softmax", 1e-4, 10, 1000)
    return Propagator(shape(kind, dim=16, **changes), cfg)


def fake_run(folder, num_users, num_items, devices=1):
    return types.SimpleNamespace(dataset=types.SimpleNamespace(num_users=num_users, num_items=num_items),
                                 mesh=make_mesh(devices=jax.devices()[:devices]), tracker=Tracker(folder, True))


@pytest.mark.parametrize("kind", ["rgcn", "kgat", "kgin"])
def test_finds_what_the_graph_decides_among_items_that_nobody_touched(kind, tmp_path):
    world, log, of_item, of_user = planted()
    make = propagator(kind, 60, free_dropout=0.3)  # cold items have to be met in training
    part = make.fit(world, log, tmp_path / "p", fake_run(tmp_path, 120, 60), 0)
    cold = np.setdiff1d(np.arange(60), log.item)
    assert part.known.all() and len(cold) == 20
    scores = part.scores(log.matrix(120, 60))[:, cold]
    fits = of_item[cold][None] == of_user[:, None]
    best = np.take_along_axis(fits, np.argsort(-scores, axis=1)[:, :3], axis=1).mean()
    assert best > 0.9, best  # by chance a quarter


def test_light_gcn_finds_what_others_touched_and_knows_no_cold_item(tmp_path):
    world, log, of_item, of_user = planted()
    part = propagator("lightgcn", 60).fit(world, log, tmp_path / "p", fake_run(tmp_path, 120, 60), 0)
    warm = np.unique(log.item)
    np.testing.assert_array_equal(np.flatnonzero(part.known), warm)
    matrix = log.matrix(120, 60)
    scores = np.where(matrix.toarray() > 0, -np.inf, part.scores(matrix))[:, warm]
    fits = of_item[warm][None] == of_user[:, None]
    left = (fits & np.isfinite(scores)).sum(1)  # of the user's kind and not touched yet: one at least
    assert left.min() >= 1 and fits[np.arange(120), scores.argmax(axis=1)].mean() > 0.9  # by chance under a fifth


@pytest.mark.slow
def test_goes_on_bit_for_bit_and_is_the_same_on_a_mesh(tmp_path, monkeypatch):
    world, log, _, _ = planted()
    make = dataclasses.replace(propagator("kgat", 8, dropout=0.1), training=dataclasses.replace(
        propagator("kgat", 8).training, checkpoint_every=3))
    whole = make.fit(world, log, tmp_path / "whole", fake_run(tmp_path, 120, 60), 0)
    drawn = UserBatches.__getitem__

    def breaks(self, step):
        if step == 5:
            raise KeyboardInterrupt
        return drawn(self, step)

    monkeypatch.setattr(UserBatches, "__getitem__", breaks)
    with pytest.raises(KeyboardInterrupt):
        make.fit(world, log, tmp_path / "broken", fake_run(tmp_path, 120, 60), 0)
    monkeypatch.setattr(UserBatches, "__getitem__", drawn)
    again = make.fit(world, log, tmp_path / "broken", fake_run(tmp_path, 120, 60), 0)
    np.testing.assert_array_equal(again.encode, whole.encode)
    np.testing.assert_array_equal(again.decode, whole.decode)
    many = make.fit(world, log, tmp_path / "mesh", fake_run(tmp_path, 120, 60, devices=8), 0)
    np.testing.assert_allclose(many.decode, whole.decode, atol=2e-4)


# --- in the fused model -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_is_a_row_and_a_part_of_the_fused_model(tmp_path):
    world = toy_world(num_users=80, num_items=60)
    write_folder(world, tmp_path / "toy")
    encoder = make_tiny_encoder(tmp_path / "bert", [*world.item_texts, *world.graph.entity_names])
    cfg = fuse.Config(tower=TowerConfig(width=8, max_history=8), steps=4, batch=16, text_length=16,
                      text_encoder="released", gate=GateConfig(steps=8, batch=16), propagation="kgin",
                      propagation_steps=12, propagation_dim=8, propagation_batch=16)
    experiment = Experiment(encoder=str(encoder), data=DataConfig(path=str(tmp_path / "toy")), fuse=cfg,
                            pretrain=pretrain.Config(mode="off"),
                            graph=graph.Config(dim=8, steps=4, batch=32, encoder_mode="off"))
    report = pipeline.run(experiment, tmp_path / "run", quiet=True)
    assert 0 < report.models["kgin"]["ndcg@10"] <= 1
    held = Recommender.load(tmp_path / "run")
    assert "kgin" in held.model.names and isinstance(held.model.parts["kgin"], PropagationPart)
    own = held.histories.take(np.arange(5))
    parts, _ = held.model.contributions(own, np.tile(np.arange(60), (5, 1)))
    np.testing.assert_allclose(parts.sum(-1), held.model.scores(own), atol=1e-4)
    cold = np.flatnonzero(held.model.popularity == 0)
    assert len(cold) and held.model.parts["kgin"].known[cold].all()  # every film of the toy world has a genre
    assert "kgin" in held.recommend(history=[held.item_names[3]], k=2)[0]["parts"]
    refitted = pipeline.refit(tmp_path / "run", tmp_path / "again", quiet=True)
    assert refitted.model.parts["kgin"].known.all()


@pytest.mark.parametrize("changes, words", [
    ({"propagation_layers": 0}, "fuse.propagation_layers: found 0"), ({"propagation_dim": 0}, "propagation_dim"),
    ({"propagation_dropout": 1.0}, "propagation_dropout"), ({"propagation_steps": -1}, "propagation_steps"),
    ({"propagation_optim": OptimConfig(peak_lr=-1.0)}, "fuse.propagation_optim.peak_lr")])
def test_bad_fields_are_named(changes, words):
    with pytest.raises(KgrecError, match=words):
        fuse.check(fuse.Config(**changes))
