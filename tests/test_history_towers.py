"""History encoders against NumPy and against what must not change them; rows of the item tower against the whole."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kgrec_jax.data.history_batches import MASKED
from kgrec_jax.errors import KgrecError
from kgrec_jax.models.recommender import TowerPart
from kgrec_jax.models.tower_config import BIDIRECTIONAL, CAUSAL, POOLED, TowerConfig
from kgrec_jax.models.towers import FREE, ItemFeatures, RowEdges, Towers
from kgrec_jax.serving import store
from kgrec_jax.stages import fuse
from kgrec_jax.stages.fuse_towers import row_edges

KINDS = (*POOLED, *CAUSAL, *BIDIRECTIONAL)
ITEMS, WIDTH = 9, 8
RNG = np.random.default_rng(0)
VECTORS = (lambda x: x / np.linalg.norm(x, axis=1, keepdims=True))(RNG.normal(size=(ITEMS, WIDTH))).astype(np.float32)
HISTORY = np.array([[-1, -1, 3, 1, 7], [0, 2, 4, 6, 8], [-1, -1, -1, -1, -1], [-1, -1, -1, -1, 5]], np.int32)


def made(kind, **changes):
    """(model, parameters that are drawn and not as they are initialised)."""
    cfg = TowerConfig(**{"width": WIDTH, "max_history": 7, "history": kind, **changes})
    model = Towers(cfg, ITEMS)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), VECTORS, HISTORY, method=Towers.user_vectors))
    rng = np.random.default_rng(1)
    return model, jax.tree.map(lambda s: jnp.asarray(0.4 * rng.standard_normal(s.shape), jnp.float32), shapes)


@functools.partial(jax.jit, static_argnums=0)
def _users(model, params, history):
    return model.apply(params, VECTORS, history, method=Towers.user_vectors)


@functools.partial(jax.jit, static_argnums=0)
def _states(model, params, history):
    return model.apply(params, VECTORS, history, True, method=Towers._states)


def users(model, params, history):
    return np.asarray(_users(model, params, history))


def states(model, params, history):
    return np.asarray(_states(model, params, history))


# --- what must and must not change an answer ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing_and_an_empty_history_is_zero(kind):
    model, params = made(kind)
    out = users(model, params, HISTORY)
    assert np.isfinite(out).all() and not out[2].any() and np.abs(out[[0, 1, 3]]).sum(1).all()
    more = np.concatenate([np.full((4, 2), -1, np.int32), HISTORY], 1)
    np.testing.assert_allclose(users(model, params, more), out, atol=1e-6)
    np.testing.assert_allclose(users(model, params, HISTORY[:1, 2:]), out[:1], atol=1e-6)  # nothing in front at all
    grad = jax.jit(jax.grad(lambda p: _users(model, p, HISTORY).sum()))(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grad))


@pytest.mark.parametrize("kind", KINDS)
def test_order_counts_for_all_but_mean_and_attention(kind):
    model, params = made(kind)
    turned = users(model, params, HISTORY[1:2, ::-1])
    apart = np.abs(turned - users(model, params, HISTORY[1:2])).max()
    assert apart < 1e-5 if kind in ("mean", "attention") else apart > 1e-3


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_later_item_changes_no_earlier_state(kind):
    model, params = made(kind, layers=2)
    before, other = states(model, params, HISTORY), HISTORY.copy()
    other[:, -1] = [2, 1, -1, 3]
    after = states(model, params, other)
    np.testing.assert_array_equal(after[:, :-1], before[:, :-1])
    assert np.abs(after[:2, -1] - before[:2, -1]).max() > 1e-3
    whole = users(model, params, HISTORY)
    scaled = before / np.linalg.norm(before, axis=-1, keepdims=True) * np.exp(params["params"]["log_scale"])
    np.testing.assert_allclose(scaled[[0, 1, 3], -1], whole[[0, 1, 3]], atol=1e-5)
    if kind == "gru":  # without positions the state is that of the prefix alone
        np.testing.assert_allclose(states(model, params, HISTORY[1:2, :3]), before[1:2, :3], atol=1e-6)


@pytest.mark.parametrize("kind", BIDIRECTIONAL)
def test_a_masked_item_is_not_seen_and_both_sides_are(kind):
    model, params = made(kind)
    masked = HISTORY[1:2].copy()
    masked[0, 2] = MASKED
    state = states(model, params, masked)[0, 2]
    for place in (1, 3):
        other = masked.copy()
        other[0, place] = 5
        assert np.abs(states(model, params, other)[0, 2] - state).max() > 1e-3
    assert np.abs(states(model, params, HISTORY[1:2])[0, 2] - state).max() > 1e-3
    behind = np.concatenate([HISTORY, np.full((4, 1), MASKED, np.int32)], 1)
    last = states(model, params, behind)[:, -1]
    last = last / np.linalg.norm(last, axis=-1, keepdims=True) * np.exp(params["params"]["log_scale"])
    np.testing.assert_allclose(users(model, params, HISTORY)[[0, 1, 3]], last[[0, 1, 3]], atol=1e-5)


@pytest.mark.parametrize("kind", (*CAUSAL, *BIDIRECTIONAL))
@pytest.mark.parametrize("objective", ["auto", "hidden-share"])
def test_training_drops_and_stays_finite(kind, objective):
    model, params = made(kind, objective=objective, hidden_dropout=0.5)
    once = jax.jit(lambda k: model.apply(params, VECTORS, HISTORY, False, rngs={"dropout": jax.random.key(k)},
                                         method=Towers.user_vectors))
    drawn = once(0), once(1)
    assert np.isfinite(drawn[0]).all() and np.abs(drawn[0] - drawn[1]).max() > 1e-3 and not drawn[0][2].any()


# --- against NumPy ------------------------------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def dense(p, x):
    return x @ np.asarray(p["kernel"], np.float64) + np.asarray(p.get("bias", 0.0))


def norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(p["scale"]) + np.asarray(p["bias"])


def gru_step(p, h, x):
    reset, update = (sigmoid(dense(p[f"i{g}"], x) + dense(p[f"h{g}"], h)) for g in "rz")
    return (1 - update) * np.tanh(dense(p["in"], x) + reset * dense(p["hn"], h)) + update * h


def lstm_step(p, carry, x):
    c, h = carry
    i, f, g, o = (dense(p[f"i{gate}"], x) + dense(p[f"h{gate}"], h) for gate in "ifgo")
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return c, sigmoid(o) * np.tanh(c)


def inputs_of(p, row):
    """The vectors of a history's items, without what is in front of them."""
    row = row[row != -1]
    own = VECTORS[row].astype(np.float64) * np.sqrt(WIDTH)
    return np.where((row == MASKED)[:, None], np.asarray(p.get("mask_token", 0.0)), own) if MASKED in row else own


def recurrent(p, kind, x):
    if kind == "gru":
        h, out = np.zeros(WIDTH), []
        for v in x:
            h = gru_step(p["gru_0"]["cell"], h, v)
            out.append(h)
        return dense(p["out"], np.array(out))
    both = []
    for way, order in (("forth", range(len(x))), ("back", range(len(x) - 1, -1, -1))):
        carry, out = (np.zeros(WIDTH), np.zeros(WIDTH)), np.zeros((len(x), WIDTH))
        for t in order:
            carry = lstm_step(p[f"lstm_{way}_0"]["cell"], carry, x[t])
            out[t] = carry[1]
        both.append(out)
    return dense(p["out"], dense(p["both_0"], np.concatenate(both, 1)))


def attended(p, kind, x, heads=2):
    x = x + np.asarray(p["position_embeddings"])[-len(x):]
    normed, size = norm(p["norm_0"], x), WIDTH // heads
    query, key, value = (dense(p[f"{n}_0"], normed) for n in ("query", "key", "value"))
    mixed = np.zeros_like(x)
    for t in range(len(x)):
        seen = t + 1 if kind == "sasrec" else len(x)
        for h in range(heads):
            cut = slice(h * size, (h + 1) * size)
            weight = np.exp(key[:seen, cut] @ query[t, cut] / np.sqrt(size))
            mixed[t, cut] = weight @ value[:seen, cut] / weight.sum()
    x = x + dense(p["mix_0"], mixed)
    wide = dense(p["feed_0"], norm(p["norm_feed_0"], x))
    wide = 0.5 * wide * (1 + np.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)))
    return norm(p["norm_out"], x + dense(p["feed_out_0"], wide))


@pytest.mark.parametrize("kind", (*CAUSAL, *BIDIRECTIONAL))
def test_states_are_those_of_numpy(kind):
    model, params = made(kind)
    history, p = HISTORY.copy(), params["params"]["history"]
    if kind in BIDIRECTIONAL:
        history[[0, 1], [3, 0]] = MASKED
    found = states(model, params, history)
    for row in (0, 1, 3):
        x = inputs_of(p, history[row])
        expected = (recurrent if kind in ("gru", "bilstm") else attended)(p, kind, x)
        np.testing.assert_allclose(found[row, -len(x):], expected, atol=2e-4)


# --- rows of the item tower ---------------------------------------------------------------------------------------


def features(num_edges=30, entities=14):
    rng = np.random.default_rng(3)
    head = np.sort(rng.integers(0, ITEMS - 2, num_edges)).astype(np.int32)  # the last two have no edge
    present = {"text": np.arange(ITEMS) != 4, "graph": np.isin(np.arange(ITEMS), head), FREE: np.arange(ITEMS) != 6}
    return jax.tree.map(jnp.asarray, ItemFeatures(
        {"text": rng.normal(size=(ITEMS, 5)).astype(np.float32)}, present,
        rng.normal(size=(entities, 6)).astype(np.float32), rng.normal(size=(4, 6)).astype(np.float32), head,
        rng.integers(0, 4, num_edges).astype(np.int32), rng.integers(0, entities, num_edges).astype(np.int32)))


@pytest.mark.parametrize("entities", [14, 200])  # fewer and more than the rows' edges
def test_rows_are_those_of_the_whole_table(entities):
    held, rows = features(entities=entities), np.array([0, 2, 3, 6, 7, 8, -1, -1], np.int32)
    cfg = TowerConfig(width=WIDTH, max_history=4)
    model = Towers(cfg, ITEMS, row_edges(held, len(rows)))
    params = jax.jit(model.init)(jax.random.key(0), held, np.full((1, 1), -1, np.int32))
    pull = np.random.default_rng(5).normal(size=(len(rows), WIDTH)).astype(np.float32) * (rows >= 0)[:, None]

    def some(p):
        return model.apply(p, held, True, rows, method=Towers.item_vectors)

    def whole(p):
        return jnp.take(model.apply(p, held, method=Towers.item_vectors), rows, axis=0)

    found, expected = (np.asarray(jax.jit(f)(params)) for f in (some, whole))
    np.testing.assert_allclose(found[:6], expected[:6], atol=1e-6)
    assert not found[6:].any()
    ours, theirs = (jax.jit(jax.grad(lambda p, f=f: (f(p) * pull).sum()))(params) for f in (some, whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)


def test_edges_of_rows_are_all_of_theirs():
    held, rows = features(), np.array([5, 1, 8, 0, -1], np.int32)
    place, relation, tail, real = map(np.asarray, RowEdges(25).of(held, rows))
    found = sorted(zip(rows[place][real].tolist(), relation[real].tolist(), tail[real].tolist()))
    edges = zip(np.asarray(held.head).tolist(), np.asarray(held.edge_relation).tolist(), np.asarray(held.tail).tolist())
    assert found == sorted(e for e in edges if e[0] in rows) and (np.diff(place) >= 0).all()


# --- configs and what is on disk ----------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, words", [
    ({"history": "sasrec", "heads": 3}, "fuse.tower.heads: found 3"),
    ({"history": "bert4rec", "heads": 5}, "fuse.tower.heads: found 5"),
    ({"history": "mean", "objective": "next-item"}, "fuse.tower.objective: found next-item with .* mean"),
    ({"history": "bert4rec", "objective": "next-item"}, "fuse.tower.objective: found next-item"),
    ({"history": "gru", "objective": "cloze"}, "fuse.tower.objective: found cloze"),
    ({"candidates": -1}, "fuse.tower.candidates: found -1"), ({"candidate_power": -0.5}, "candidate_power"),
    ({"mask_share": 0.0}, "fuse.tower.mask_share"), ({"hidden_dropout": 1.0}, "fuse.tower.hidden_dropout")])
def test_bad_fields_are_named(changes, words):
    with pytest.raises(KgrecError, match=words):
        fuse.check(fuse.Config(tower=TowerConfig(**changes)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_objective_follows_from_the_encoder(kind):
    fuse.check(fuse.Config(tower=TowerConfig(history=kind)))
    fuse.check(fuse.Config(tower=TowerConfig(history=kind, objective="hidden-share")))
    expected = "next-item" if kind in CAUSAL else "cloze" if kind in BIDIRECTIONAL else "hidden-share"
    assert TowerConfig(history=kind).trained_on == expected


def test_ratings_are_asked_for_where_there_are_none():
    cfg = fuse.Config(tower=TowerConfig(rating_weight="linear"))
    log = types.SimpleNamespace(rating=np.array([1.0, -2.0]))
    with pytest.raises(KgrecError, match="fuse.tower.rating_weight: found linear for x, whose log has no column"):
        fuse.check_data(cfg, types.SimpleNamespace(name="x", has_ratings=False, interactions=log, raw_media={}))
    with pytest.raises(KgrecError, match="has the rating -2"):
        fuse.check_data(cfg, types.SimpleNamespace(name="x", has_ratings=True, interactions=log, raw_media={}))
    fuse.check_data(fuse.Config(), types.SimpleNamespace(name="x", has_ratings=False, interactions=log, raw_media={}))


def test_towers_from_before_the_fields_are_read(tmp_path):
    model, params = made("attention")
    part = TowerPart(model.cfg, params["params"], VECTORS, {"id": VECTORS}, np.ones(ITEMS, bool))
    store.save(tmp_path / "held", part, (TowerConfig, TowerPart), {})
    file = tmp_path / "held" / store.MANIFEST
    manifest = store._read_json(file)
    for name in ("objective", "hidden_dropout", "mask_share", "candidates", "candidate_power", "rating_weight"):
        del manifest["content"]["fields"]["cfg"]["fields"][name]
    store._write_json(file, manifest, indent=1)
    held = store.load(tmp_path / "held", (TowerConfig, TowerPart))
    assert held.cfg == model.cfg
    np.testing.assert_array_equal(held.scores(HISTORY), part.scores(HISTORY))
