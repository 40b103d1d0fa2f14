"""Other ways to fuse: item vectors and gates against NumPy, what they can learn, exact parts, learned loss weights."""

import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import erf
from test_recommender import make_model, named_world

from kgrec_jax.config import Experiment
from kgrec_jax.data.dataset import Interactions
from kgrec_jax.errors import KgrecError
from kgrec_jax.models.fusion import (ALONE, UNKNOWN, GateInputs, alone, gate_contributions, gate_init, gate_penalty,
                                     gate_scores, gate_weights)
from kgrec_jax.models.part_fusion import PartFusion
from kgrec_jax.models.tower_config import TowerConfig
from kgrec_jax.models.towers import FREE, ItemFeatures, RowEdges, Towers
from kgrec_jax.optim import OptimConfig
from kgrec_jax.serving import store
from kgrec_jax.serving.query import NGRAMS
from kgrec_jax.serving.recommender import Recommender
from kgrec_jax.sharding import make_mesh
from kgrec_jax.stages import fuse
from kgrec_jax.stages.fuse_gate import GateBatch, GateConfig, gate_loss
from kgrec_jax.stages.fuse_towers import (UNCERTAINTY, TowerTraining, batches, fit_towers, init, loss, term_weights,
                                           towers_of)
from kgrec_jax.tracking import Tracker

ITEMS, USERS, WIDTH = 9, 5, 6
FUSIONS, HEADS = ("attention", "concat-mlp"), ("additive", "attention", "mlp")


def shaken(tree, seed, size=0.5):
    """Parameters of which none is zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.asarray(size * rng.standard_normal(x.shape), jnp.float32), tree)


def parts_and_flags(seed=0):
    rng = np.random.default_rng(seed)
    flags = {name: rng.random(ITEMS) < 0.6 for name in ("text", "graph", FREE)}
    for flag in flags.values():
        flag[[0, 1]] = False, True  # the first item has no part, the second all
    parts = {name: np.where(flag[:, None], rng.standard_normal((ITEMS, WIDTH)), 0.0).astype(np.float32)
             for name, flag in flags.items()}
    return parts, flags


# --- an item's vector -------------------------------------------------------------------------------------------------


def numpy_attention(params, parts, flags):
    out = {name: np.zeros((ITEMS, WIDTH)) for name in parts}
    for item in range(ITEMS):
        there = [name for name in parts if flags[name][item]]
        logits = np.array([np.tanh(parts[name][item] @ params["key"]["kernel"] + params[f"{name}_key"])
                           @ params["query"] for name in there])
        weights = np.exp(logits) / np.exp(logits).sum()
        for name, weight in zip(there, weights):
            out[name][item] = weight * parts[name][item]
    return out


def numpy_mlp(params, parts, flags):
    """The vectors alone: x + W₂ gelu(W₁ [p ⊕ flags]) over the concatenation."""
    joined = np.concatenate([*parts.values(), *(flags[name][:, None] for name in parts)], axis=1)
    first = np.concatenate([*(params[f"{name}_in"]["kernel"] for name in parts),
                            *(params[f"{name}_in"]["bias"][None] for name in parts)])
    z = joined @ first
    return sum(parts.values()) + (0.5 * z * (1 + erf(z / np.sqrt(2)))) @ params["out"]["kernel"]


@pytest.mark.parametrize("kind", FUSIONS)
def test_parts_are_those_of_numpy_and_add_up(kind):
    parts, flags = parts_and_flags()
    module = PartFusion(kind, WIDTH)
    params = shaken(module.init(jax.random.key(0), parts, flags)["params"], 1)
    found = jax.device_get(module.apply({"params": params}, parts, flags))
    held = jax.device_get(params)
    if kind == "attention":
        for name, expected in numpy_attention(held, parts, flags).items():
            np.testing.assert_allclose(found[name], expected, atol=1e-5)
    else:
        np.testing.assert_allclose(sum(found.values()), numpy_mlp(held, parts, flags), atol=1e-5)
    for name, vectors in found.items():
        assert not vectors[~flags[name]].any() and np.abs(vectors[flags[name]]).sum(1).all()


@pytest.mark.parametrize("kind", FUSIONS)
def test_they_begin_as_the_sum_up_to_its_length(kind):
    parts, flags = parts_and_flags()
    module = PartFusion(kind, WIDTH)
    found = module.apply(module.init(jax.random.key(0), parts, flags), parts, flags)
    count = np.maximum(sum(flag.astype(int) for flag in flags.values()), 1)[:, None] if kind == "attention" else 1
    np.testing.assert_allclose(sum(found.values()), sum(parts.values()) / count, atol=1e-6)


def features(seed=0):
    """Items 0 to 2 have no edge, item 0 no part at all."""
    rng = np.random.default_rng(seed)
    head = np.sort(rng.integers(3, ITEMS, 14)).astype(np.int32)
    present = {"text": np.arange(ITEMS) % 3 == 1, "graph": np.isin(np.arange(ITEMS), head),
               FREE: np.isin(np.arange(ITEMS), [1, 2, 4, 6])}
    return jax.tree.map(jnp.asarray, ItemFeatures(
        {"text": rng.standard_normal((ITEMS, 5)).astype(np.float32)}, present,
        rng.standard_normal((20, 4)).astype(np.float32), rng.standard_normal((6, 4)).astype(np.float32), head,
        rng.integers(0, 6, 14).astype(np.int32), rng.integers(0, 20, 14).astype(np.int32)))


@pytest.mark.parametrize("kind", FUSIONS)
def test_the_towers_parts_add_up_to_the_items_vectors(kind):
    model, known = Towers(TowerConfig(width=WIDTH, fusion=kind), ITEMS, RowEdges(14)), features()
    history = np.array([[-1, 4, 6], [-1, -1, -1]], np.int32)
    params = shaken(model.init(jax.random.key(0), known, history)["params"], 2)
    apply = functools.partial(model.apply, {"params": params})
    vectors = np.asarray(apply(known, method=Towers.item_vectors))
    parts = jax.device_get(apply(known, method=Towers.item_parts))
    np.testing.assert_allclose(sum(parts.values()), vectors, atol=1e-6)
    there = np.any([np.asarray(flag) for flag in known.present.values()], axis=0)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), there, atol=1e-5)
    assert not vectors[0].any()
    rows = jnp.array([0, 3, 5, 8, -1], jnp.int32)
    np.testing.assert_allclose(apply(known, rows=rows, method=Towers.item_vectors)[:4], vectors[rows[:4]], atol=1e-5)
    users = np.asarray(apply(vectors, history, method=Towers.user_vectors))
    assert np.isfinite(users).all() and not users[1].any() and users[0].any()

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(params, deterministic):
        def total(params):
            users, items = model.apply({"params": params}, known, history, deterministic,
                                       rngs={"dropout": jax.random.key(1)})
            return (users @ items.T).sum()

        return jax.grad(total)(params)

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient(params, False)))
    gradients = gradient(params, True)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert all(np.abs(leaf).any() for leaf in jax.tree.leaves(gradients["items"]["fusion"]))


@pytest.mark.slow
def test_an_mlp_learns_what_a_sum_cannot(tmp_path):
    """An item is of the kind a XOR b, a said by one block of features and b by another, and users like a kind."""
    rng, items = np.random.default_rng(0), 80
    a, b = rng.integers(0, 2, (2, items))
    kind, warm = a ^ b, np.arange(items) < 60
    user = np.repeat(np.arange(200), 12)
    item = np.concatenate([rng.permutation(np.flatnonzero(warm & (kind == u % 2)))[:12] for u in range(200)])
    log = Interactions(user.astype(np.int32), item.astype(np.int32), np.ones(len(user), np.float32),
                       np.zeros(len(user), np.int64))
    blank, none = jnp.zeros((1, 1), jnp.float32), jnp.zeros(0, jnp.int32)
    yes = jnp.ones(items, bool)
    blocks = {"one": jnp.asarray(np.eye(2, dtype=np.float32)[a]), "other": jnp.asarray(np.eye(2, dtype=np.float32)[b])}
    known = ItemFeatures(blocks, {"one": yes, "other": yes, "graph": ~yes, FREE: jnp.asarray(warm)}, blank, blank,
                         none, none, none)

    def right(fusion):
        run = types.SimpleNamespace(dataset=types.SimpleNamespace(num_items=items), mesh=make_mesh(
            devices=jax.devices()[:1]), tracker=Tracker(tmp_path / fusion, quiet=True))
        cfg = TowerConfig(width=16, max_history=12, part_dropout=0.0, free_dropout=0.8, fusion=fusion)
        training = TowerTraining(200, 32, OptimConfig(peak_lr=1e-2), 0.0, 50, 0)
        tower = fit_towers(cfg, training, known, log, tmp_path / fusion / "tower", run, 0)
        histories = np.stack([rng.permutation(np.flatnonzero(warm & (kind == k)))[:8] for k in (0, 1) * 10])
        scores = tower.scores(histories.astype(np.int32))[:, ~warm]
        wanted = kind[~warm][None] == np.array((0, 1) * 10)[:, None]
        return np.mean([(s[w][:, None] > s[~w][None]).mean() for s, w in zip(scores, wanted)])  # AUC, by chance .5

    found = {fusion: right(fusion) for fusion in ("sum", "concat-mlp")}
    assert found["concat-mlp"] > 0.95, found
    assert found["concat-mlp"] > found["sum"] + 0.1, found


# --- the gate over the parts of the score -----------------------------------------------------------------------------


PARTS, CANDIDATES = 4, 7


def gate_inputs(seed=0):
    rng = np.random.default_rng(seed)
    present = rng.random((USERS, CANDIDATES, PARTS)) < 0.7
    present[0, 0], present[0, 1] = False, True
    return GateInputs(
        scores=jnp.asarray(2 * rng.standard_normal((USERS, CANDIDATES, PARTS)), jnp.float32),
        present=jnp.asarray(present), cold=jnp.asarray(rng.random((USERS, CANDIDATES)) < 0.5),
        user=jnp.asarray(rng.standard_normal((USERS, 1)), jnp.float32),
        item=jnp.asarray(rng.standard_normal((USERS, CANDIDATES, 1)), jnp.float32))


def numpy_weights(params, inputs, user, item):
    """[P] of one user and candidate, by the formulas at the head of models/fusion.py."""
    score, there = np.asarray(inputs.scores)[user, item], np.asarray(inputs.present)[user, item]
    cold = bool(inputs.cold[user, item])
    about = np.concatenate([[1.0, cold], np.asarray(inputs.user)[user], np.asarray(inputs.item)[user, item]])
    logits = np.array(params["cold" if cold else "warm"], np.float64)
    if "user" in params:
        logits += about[2:3] @ params["user"] + about[3:] @ params["item"]
    elif "query" in params:
        query = about @ params["query"]
        for m in range(PARTS):
            told = np.tanh(np.array([score[m], score[m] - score[there].mean() if there.any() else 0.0]) / 3)
            logits[m] += query @ (params["part_key"][m] + told @ params["score_key"]) / np.sqrt(len(query))
    else:
        seen = np.concatenate([np.tanh(score / 3) * there, there, about[1:]])
        logits += np.tanh(seen @ params["mlp_in"] + params["mlp_bias"]) @ params["mlp_out"]
    raised = np.where(there, np.exp(logits), 0.0)
    return raised / max(raised.sum(), 1e-9)


@pytest.mark.parametrize("head", HEADS)
def test_weights_are_those_of_numpy_and_the_score_is_a_sum(head):
    inputs = gate_inputs()
    params = shaken(gate_init(PARTS, 1, 1, head, jax.random.key(0)), 3)
    weights, contributions = gate_weights(params, inputs), np.asarray(gate_contributions(params, inputs))
    held = jax.device_get(params)
    expected = np.array([[numpy_weights(held, inputs, u, i) for i in range(CANDIDATES)] for u in range(USERS)])
    np.testing.assert_allclose(weights, expected, atol=2e-5)
    there = np.asarray(inputs.present)
    np.testing.assert_allclose(np.asarray(weights).sum(-1), there.any(-1), atol=1e-5)
    weighed = np.exp(held["log_scale"]) * expected * np.asarray(inputs.scores)
    np.testing.assert_allclose(contributions[..., :-1], weighed, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(contributions.sum(-1), gate_scores(params, inputs), atol=1e-5)
    assert contributions[0, 0, -1] == UNKNOWN and not contributions[0, 0, :-1].any()
    gradients = jax.grad(lambda p: gate_scores(p, inputs).sum() + gate_penalty(p))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("head", HEADS)
def test_a_fresh_gate_counts_all_parts_alike(head):
    inputs = gate_inputs()
    weights = np.asarray(gate_weights(gate_init(PARTS, 1, 1, head, jax.random.key(0)), inputs))
    there = np.asarray(inputs.present)
    np.testing.assert_allclose(weights, there / np.maximum(there.sum(-1, keepdims=True), 1), atol=1e-6)


@pytest.mark.parametrize("head", HEADS)
def test_a_part_decides_without_cfwhatever_the_head_says(head):
    inputs = gate_inputs()
    params = shaken(gate_init(PARTS, 1, 1, head, jax.random.key(0)), 4, 3.0 if head != "additive" else 0.1)
    cold, there = np.asarray(inputs.cold), np.asarray(inputs.present)
    lone = np.asarray(gate_weights(alone(jax.device_get(params), 2, True), inputs))
    np.testing.assert_allclose(lone[cold & there[..., 2]][:, 2], 1.0, atol=1e-5)
    np.testing.assert_array_equal(lone[~cold], np.asarray(gate_weights(params, inputs))[~cold])
    assert alone(params, 1, False)["warm"].tolist() == [0.0, ALONE, 0.0, 0.0]


@pytest.fixture(scope="module")
def higher_of_two():
    """(to learn on, to judge by): the item is wanted on which either of two parts is highest, a third knows nothing."""
    def batch(seed, users):
        rng = np.random.default_rng(seed)
        scores = rng.standard_normal((users, 20, 3)).astype(np.float32)
        best = scores[..., :2].max(-1).argmax(-1)
        all_there = np.ones(scores.shape, bool)
        inputs = GateInputs(scores, all_there, np.zeros(scores.shape[:2], bool), np.zeros((users, 1), np.float32),
                            np.zeros((users, 20, 1), np.float32))
        return GateBatch(inputs, np.eye(20, dtype=np.float32)[best], np.ones(scores.shape[:2], bool))

    return batch(0, 800), batch(1, 400)


@pytest.mark.parametrize("head", HEADS)
def test_a_head_that_sees_the_scores_learns_which_part_to_trust(higher_of_two, head):
    learn, judge = higher_of_two
    cfg, tx = GateConfig(head=head), optax.adam(0.03)
    params = gate_init(3, 1, 1, head, jax.random.key(0))

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: gate_loss(cfg, False, p, None, learn, None)[0])(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    with jax.numpy_dtype_promotion("standard"):
        state = tx.init(params)
    for _ in range(300):
        params, state = step(params, state)
    hits = float((np.asarray(gate_scores(params, judge.inputs)).argmax(1) == judge.relevant.argmax(1)).mean())
    assert hits < 0.75 if head == "additive" else hits > 0.8, hits  # a fixed sum cannot be the higher of two


# --- through serving --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS[1:])
def test_a_recommender_with_the_head_scores_as_before_and_explains_itself(tmp_path, head):
    world = named_world()
    matrix = world.interactions.matrix(world.num_users, world.num_items)
    model = make_model(world, matrix)
    gate = jax.device_get(shaken(gate_init(len(model.names), 1, 1, head, jax.random.key(0)), 5))
    tower = dataclasses.replace(model.tower, cfg=dataclasses.replace(model.tower.cfg, fusion="concat-mlp"))
    model = dataclasses.replace(model, gate=alone(gate, 1, True), tower=tower)
    (tmp_path / "fuse").mkdir()
    cfg = types.SimpleNamespace(tower=TowerConfig(width=8, max_history=16), text_length=32)
    np.savez(tmp_path / "fuse" / "text.npz", vectors=np.ones((world.num_items, 4), np.float32), source=NGRAMS)
    run = types.SimpleNamespace(path=tmp_path, dataset=world, split=None,
                                experiment=types.SimpleNamespace(encoder="", seed=0, fuse=cfg))
    made = Recommender.build(run, model, log=world.interactions, known=matrix, held_out=0)
    made.save(tmp_path / "run" / "recommender")
    held = Recommender.load(tmp_path / "run")
    some = np.array([0, 5, int(np.flatnonzero(matrix.getnnz(axis=1) == 0)[0])])  # one without a history
    before, after = (r.model.scores(r.histories.take(some)) for r in (made, held))
    np.testing.assert_array_equal(before, after)
    assert np.isfinite(after).all() and set(held.model.gate) == set(model.gate)
    items = np.argsort(-after, axis=1)[:, :6]
    parts, _ = held.model.contributions(held.histories.take(some), items)
    np.testing.assert_allclose(parts.sum(-1), np.take_along_axis(after, items, 1), atol=1e-4)
    for entry in held.recommend(user=world.user_ids[0], k=4):
        assert entry["reason"] and abs(sum(entry["parts"].values()) - entry["score"]) < 1e-6


def test_a_recommender_of_before_still_loads(tmp_path):
    world = named_world()
    model = make_model(world, world.interactions.matrix(world.num_users, world.num_items))
    store.save(tmp_path / "held", model, (*map(type, model.parts.values()), type(model), type(model.tower), TowerConfig,
                                          type(model.scale)), {})
    manifest = tmp_path / "held" / store.MANIFEST
    content = json.loads(manifest.read_text())
    tower = content["content"]["fields"]["tower"]["fields"]
    del tower["tuned"], tower["cfg"]["fields"]["fusion"]  # as an earlier version wrote it
    manifest.write_text(json.dumps(content))
    held = store.load(tmp_path / "held", (*map(type, model.parts.values()), type(model), type(model.tower), TowerConfig,
                                          type(model.scale)))
    assert held.tower.cfg == model.tower.cfg and held.tower.tuned is None and held.gate.keys() == model.gate.keys()


# --- the weights of the loss ------------------------------------------------------------------------------------------


def training(**changes):
    return TowerTraining(steps=1, batch=4, optim=OptimConfig(), cf_weight=0.2, log_every=1, checkpoint_every=0,
                         **changes)


def test_learned_weights_end_at_the_optimum():
    """At constant losses L the optimum of exp(−s) L + s/2 is s = log 2L, where the loss is (1 + log 2L) / 2."""
    constant = {"rec": 4.0, "cf": 0.5, "mlm": 9.0}
    cfg = training(loss_weights="uncertainty", mlm_weight=0.1)
    params = {UNCERTAINTY: {term: jnp.zeros(()) for term in constant}}

    def total(params):
        weights, more = term_weights(cfg, params)
        return sum(weights[term] * value for term, value in constant.items()) + more

    tx = optax.adam(0.05)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(total)(params), state)
        return (optax.apply_updates(params, updates), state), None

    with jax.numpy_dtype_promotion("standard"):
        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), None, length=800)
    for term, value in constant.items():
        assert float(params[UNCERTAINTY][term]) == pytest.approx(np.log(2 * value), abs=1e-3)
    assert float(total(params)) == pytest.approx(sum((1 + np.log(2 * v)) / 2 for v in constant.values()), abs=1e-4)


@pytest.mark.slow
def test_learned_weights_begin_at_the_fixed_ones_and_are_logged(tmp_path):
    known, model = features(), Towers(TowerConfig(width=WIDTH, max_history=4), ITEMS)
    rng = np.random.default_rng(0)
    log = Interactions(np.repeat(np.arange(8), 3).astype(np.int32), np.concatenate(
        [rng.permutation([1, 2, 4, 6])[:3] for _ in range(8)]).astype(np.int32), np.ones(24, np.float32),
        np.zeros(24, np.int64))
    fixed, learned = training(rec_weight=0.5), training(rec_weight=0.5, loss_weights="uncertainty")
    params = init(learned, model, known, jax.random.key(0))
    assert set(params[UNCERTAINTY]) == {"rec", "cf"} and UNCERTAINTY not in towers_of(params)
    batch = batches(model.cfg, 4, 1, log, ITEMS, 0)[0]
    with_s, told = loss(learned, model, params, known, batch, jax.random.key(1))
    without, _ = loss(fixed, model, towers_of(params), known, batch, jax.random.key(1))
    assert float(with_s) == pytest.approx(float(without) - (np.log(0.5) + np.log(0.2)) / 2, abs=1e-4)
    assert float(told["cf_weight"]) == pytest.approx(0.2) and float(told["rec_weight"]) == pytest.approx(0.5)
    without_cf = init(dataclasses.replace(learned, cf_weight=0.0), model, known, jax.random.key(0))
    assert set(without_cf[UNCERTAINTY]) == {"rec"}
    run = types.SimpleNamespace(dataset=types.SimpleNamespace(num_items=ITEMS), tracker=Tracker(tmp_path, quiet=True),
                                mesh=make_mesh(devices=jax.devices()[:1]))
    cfg = dataclasses.replace(learned, steps=30, optim=OptimConfig(peak_lr=1e-2))
    part = fit_towers(model.cfg, cfg, known, log, tmp_path / "tower", run, 0)
    assert UNCERTAINTY not in part.params
    rows = [json.loads(line) for line in (tmp_path / "tower" / "metrics.jsonl").read_text().splitlines()]
    assert {"rec_loss", "rec_weight", "cf_loss", "cf_weight"} <= set(rows[-1])
    assert rows[0]["cf_weight"] == pytest.approx(0.2) and rows[-1]["cf_weight"] > 0.201  # L_CF is below 1 / (2 · 0.2)


@pytest.mark.parametrize("field, value", [("rec_weight", -1.0), ("cf_weight", -0.1), ("mlm_weight", 1e9),
                                          ("encoder_items", 0), ("encoder_rank", 0), ("encoder_alpha", -1.0)])
def test_a_field_out_of_bounds_is_named(field, value):
    with pytest.raises(KgrecError, match=rf"fuse\.{field}: found .* expected .* change fuse\.{field}"):
        fuse.check(dataclasses.replace(fuse.Config(), **{field: value}))


def test_an_optimiser_that_moves_nothing_is_named():
    with pytest.raises(KgrecError, match=r"fuse\.encoder_optim\.peak_lr"):
        fuse.check(fuse.Config(encoder_optim=OptimConfig(peak_lr=-1.0)))


def test_the_defaults_are_those_of_before():
    cfg = Experiment().fuse
    assert (cfg.tower.fusion, cfg.gate.head, cfg.loss_weights, cfg.encoder) == ("sum", "additive", "fixed", "frozen")
