"""Tables and bridge: losses against NumPy, padding, sampling, meshes, gradients that reach V and U from both sides."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kgrec_jax import checkpoint
from kgrec_jax.data.link_batches import LinkSource, merge_queries
from kgrec_jax.errors import KgrecError
from kgrec_jax.models.graph_embedding import (GRAPH_RULES, GraphEmbedding, init_bridge, link_queries,
                                              load_graph_embedding, soft_tokens)
from kgrec_jax.models.scorers import SCORERS, ScorerOptions
from kgrec_jax.sharding import MeshConfig, NamedSharding, P, make_mesh, put, put_batch, shardings

N, R, D, ROWS = 21, 3, 8, 64
L1 = [name for name, scorer in SCORERS.items() if scorer.l1]
PRODUCTS = [name for name in SCORERS if name not in L1]
BILINEAR = [name for name, scorer in SCORERS.items() if scorer.relation_transform is not None]


def _source(**kwargs):
    rng = np.random.default_rng(0)
    triples = np.stack([rng.integers(0, N, 60), rng.integers(0, R, 60), rng.integers(0, N, 60)], 1)
    return LinkSource(merge_queries(triples, R, 3), batch=16, steps=9, seed=1, num_entities=N, **kwargs)


@pytest.fixture
def batch():
    return _source()[0]


def _tables(model, spread=0.7):
    """Tables that differ from their start everywhere, padding included."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) * np.float32(spread),
                        jax.eval_shape(model.init, jax.random.key(0)))


def _scores(model, tables, batch):
    return np.asarray(jax.jit(model.scores)(tables, batch.head, batch.relation), np.float64)[:, :N]


SHARED, EACH = _source(candidates=24)[0], _source(candidates=24, shared=False)[0]
TEMPERATURES = {"shared": 0.7, "each": 0.0}
MANY = np.random.default_rng(0).integers(0, N, 60_000).astype(np.int32)


@functools.lru_cache
def _computed(name):
    """Everything that a scorer's losses are compared with, from one compilation."""
    model = GraphEmbedding(name, D, N, R, ROWS)
    tables = _tables(model)

    def everything(tables, batch, shared, each):
        out = {"scores": model.scores(tables, batch.head, batch.relation)[:, :N]}
        for kind, links in (("shared", shared), ("each", each)):
            out[kind] = model.margin_losses(tables, links, margin=3.0, temperature=TEMPERATURES[kind])
        if name in PRODUCTS:
            out["softmax"] = model.structure_losses(tables, batch)
            first = batch.tails[:, :1], jnp.ones((16, 1), jnp.float32)
            query = model.queries(tables, batch.head, batch.relation)
            out["full"] = model.query_losses(tables, query, *first, np.zeros(0, np.int32))
            out["sampled"] = model.query_losses(tables, query, *first, MANY)
        return out

    computed = jax.jit(everything)(tables, _source()[0], SHARED, EACH)
    return {key: np.asarray(value, np.float64) for key, value in computed.items()}


@pytest.mark.parametrize("name", PRODUCTS)
def test_losses_equal_a_softmax_over_the_scores_of_every_entity(name, batch):
    computed = _computed(name)
    scores = computed["scores"]
    lse = np.log(np.exp(scores).sum(1))
    expected = (batch.weight * (lse[:, None] - np.take_along_axis(scores, batch.tails, 1))).sum(1)
    np.testing.assert_allclose(computed["softmax"], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(computed["sampled"], computed["full"], atol=0.05)


def _margin_loss(scores, batch, candidates, margin, temperature):
    """Sun et al. 2019, eq. 5, one triple and one rival at a time."""
    log_sigmoid = lambda x: -np.log1p(np.exp(-x))  # noqa: E731
    out = []
    for b in range(len(scores)):
        answers = {int(t): w for t, w in zip(batch.tails[b], batch.weight[b], strict=True) if w}
        rivals = [scores[b, c] for c in candidates[b] if int(c) not in answers]
        total = sum(np.exp(temperature * s) for s in rivals)
        pushed = sum(np.exp(temperature * s) / total * log_sigmoid(-margin - s) for s in rivals)
        out.append(sum(-w * (log_sigmoid(margin + scores[b, t]) + pushed) for t, w in answers.items()))
    return np.array(out)


@pytest.mark.parametrize("name", SCORERS)
def test_margin_losses_equal_the_published_formula(name):
    computed = _computed(name)
    for kind, links in (("shared", SHARED), ("each", EACH)):
        candidates = np.broadcast_to(links.candidates, (16, 24))
        own = (candidates[:, :, None] == links.tails[:, None]) & (links.weight[:, None] > 0)
        assert own.any() and not own.any(axis=2).all()  # false negatives among the drawn ones
        expected = _margin_loss(computed["scores"], links, candidates, 3.0, TEMPERATURES[kind])
        np.testing.assert_allclose(computed[kind], expected, rtol=2e-4, atol=2e-4)


def test_a_row_whose_rivals_are_all_answers_learns_from_these_and_stays_finite():
    model = GraphEmbedding("rotate-l1", D, N, R, ROWS)
    tables = _tables(model)
    batch = dataclasses.replace(EACH, candidates=EACH.tails[:, :1])

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(tables):
        each = model.margin_losses(tables, batch, margin=3.0, temperature=1.0)
        return each.sum(), each

    (_, each), grads = loss(tables)
    answered = np.take_along_axis(_scores(model, tables, batch), batch.tails, 1)
    np.testing.assert_allclose(each, (batch.weight * np.log1p(np.exp(-(3.0 + answered)))).sum(1), rtol=1e-4)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_the_weights_of_rivals_carry_no_gradient():
    model, batch = GraphEmbedding("distmult", D, N, R, ROWS), EACH
    tables = _tables(model)
    rivals = np.take_along_axis(_scores(model, tables, batch), batch.candidates, 1)
    wrong = ~((batch.candidates[:, :, None] == batch.tails[:, None]) & (batch.weight[:, None] > 0)).any(2)
    share = np.where(wrong, np.exp(0.5 * rivals), 0)
    share = (share / share.sum(1, keepdims=True)).astype(np.float32)

    def with_fixed_weights(tables):
        scores = model.scores(tables, batch.head, batch.relation)
        push = jax.nn.log_sigmoid(-3.0 - jnp.take_along_axis(scores, batch.candidates, 1))
        pull = jax.nn.log_sigmoid(3.0 + jnp.take_along_axis(scores, batch.tails, 1))
        return -((batch.weight * pull).sum() + (batch.weight.sum(1, keepdims=True) * share * push).sum())

    loss = lambda tables: model.margin_losses(tables, batch, margin=3.0, temperature=0.5).sum()  # noqa: E731
    expected, got = jax.jit(lambda tables: (jax.grad(with_fixed_weights)(tables), jax.grad(loss)(tables)))(tables)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, expected)


@pytest.mark.parametrize("name", BILINEAR)
def test_relation_losses_are_a_softmax_over_relations(name, batch):
    model = GraphEmbedding(name, D, N, R, ROWS)
    tables, every = _tables(model), np.arange(2 * R)
    grid = np.broadcast_arrays(batch.head[:, None, None], every, batch.tails[:, :, None])  # [B, T, 2R]
    scores = jax.jit(model.triple_scores)(tables, *(x.reshape(-1) for x in grid))
    scores = np.asarray(scores, np.float64).reshape(grid[0].shape)
    own = np.take_along_axis(scores, np.broadcast_to(batch.relation[:, None, None], (16, 3, 1)), 2)[..., 0]
    expected = (batch.weight * (np.log(np.exp(scores).sum(2)) - own)).sum(1)
    np.testing.assert_allclose(jax.jit(model.relation_losses)(tables, batch), expected, rtol=1e-4, atol=1e-4)
    if name == "complex":
        drawn = jax.jit(jax.vmap(lambda key: model.relation_losses(tables, batch, key)))(
            jax.random.split(jax.random.key(0), 3000))
        assert np.asarray(drawn).std(0).max() > 0.01  # it does draw
        np.testing.assert_allclose(np.asarray(drawn).mean(0), expected, rtol=0.1, atol=0.1)


def test_duality_norms_are_what_a_squared_distance_adds_to_a_product(batch):
    model = GraphEmbedding("complex", D, N, R, ROWS)
    tables = _tables(model)
    v, u = (np.asarray(tables[k]["embedding"], np.float64) for k in ("entity", "relation"))
    v, u = (x[:, :D // 2] + 1j * x[:, D // 2:] for x in (v, u))
    expected = [sum(w * ((np.abs(v[h] * u[r]) ** 2).sum() + (np.abs(v[t]) ** 2).sum())
                    for t, w in zip(ts, ws, strict=True))
                for h, r, ts, ws in zip(batch.head, batch.relation, batch.tails, batch.weight, strict=True)]
    np.testing.assert_allclose(jax.jit(model.duality_norms)(tables, batch), expected, rtol=1e-4)


def test_what_a_scorer_cannot_do_is_said(batch):
    tables = _tables(GraphEmbedding("rotate", D, N, R, ROWS))
    with pytest.raises(KgrecError, match="'rotate-l1' with a softmax.*or 'rotate'"):
        GraphEmbedding("rotate-l1", D, N, R, ROWS).structure_losses(tables, batch)
    with pytest.raises(KgrecError, match="'rotate' with relation prediction, expected one of complex, dist"):
        GraphEmbedding("rotate", D, N, R, ROWS).relation_losses(tables, batch)
    with pytest.raises(KgrecError, match="'conve' with DURA"):
        GraphEmbedding("conve", D, N, R, ROWS).duality_norms(tables, batch)
    with pytest.raises(ValueError, match="candidates: found none"):
        GraphEmbedding("rotate", D, N, R, ROWS).margin_losses(tables, batch, margin=1.0, temperature=0.0)
    with pytest.raises(ValueError, match="candidates: found shape .16, 2."):
        GraphEmbedding("rotate", D, N, R, ROWS).structure_losses(tables, _source(candidates=2, shared=False)[0])


def test_padding_changes_neither_start_nor_loss_nor_gradient(batch):
    small, large = (GraphEmbedding("complex", D, N, R, rows) for rows in (N, ROWS))
    a, b = (jax.jit(model.init)(jax.random.key(0)) for model in (small, large))
    np.testing.assert_array_equal(a["entity"]["embedding"], b["entity"]["embedding"][:N])
    grad = lambda model: jax.jit(jax.grad(lambda tables: model.structure_losses(tables, batch).sum()))  # noqa: E731
    ga, gb = jax.device_get(grad(small)(a)), jax.device_get(grad(large)(b))
    assert not gb["entity"]["embedding"][N:].any()
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y[:len(x)], atol=1e-6), ga, gb)


def test_an_entity_learns_a_bias_and_padding_none(batch):
    model = GraphEmbedding("conve", D, N, R, ROWS)
    grads = jax.jit(jax.grad(lambda tables: model.structure_losses(tables, batch).sum()))(_tables(model))
    bias, rows = np.asarray(grads["scorer"]["entity_bias"]), np.asarray(grads["entity"]["embedding"])
    assert bias[:N].all() and not bias[N:].any() and not rows[N:].any()


def _steps(mesh, tables, loss_fn, batches):
    """Losses and tables after a few steps of plain descent with everything placed on the mesh."""
    places = shardings(tables, mesh, GRAPH_RULES)

    @functools.partial(jax.jit, out_shardings=(places, NamedSharding(mesh, P())))
    def step(tables, batch):
        loss, grads = jax.value_and_grad(loss_fn)(tables, batch)
        return jax.tree.map(lambda x, g: x - 0.01 * g, tables, grads), loss

    with jax.set_mesh(mesh):
        tables, values = put(tables, places), []
        for batch in batches:
            tables, loss = step(tables, put_batch(batch, mesh))
            values.append(float(loss))
    return values, jax.device_get(tables)


@pytest.mark.parametrize(("name", "shared"), [pytest.param("conve", True, marks=pytest.mark.slow), ("simple", False),
                                            ("rotate-l1", False)])
def test_a_mesh_of_eight_devices_equals_one(name, shared):
    model = GraphEmbedding(name, D, N, R, ROWS, ScorerOptions(query_dropout=0.2))
    source = _source(candidates=8, shared=shared)

    def loss_fn(tables, batch):
        key = jax.random.key(7)
        out = model.margin_losses(tables, batch, margin=2.0, temperature=1.0, key=key)
        if name == "simple":
            out = out + model.relation_losses(tables, batch, key) + 0.1 * model.duality_norms(tables, batch)
        if shared:  # against all entities, and against the drawn ones
            out = out + model.structure_losses(tables, batch, key) + model.nuclear_3_norms(tables, batch)
            full = dataclasses.replace(batch, candidates=np.zeros(0, np.int32))
            out = out + model.structure_losses(tables, full, key)
        return out.sum()

    tables, batches = _tables(model, 0.3), [source[s] for s in range(3)]
    one = _steps(make_mesh(devices=jax.devices()[:1]), tables, loss_fn, batches)
    eight = _steps(make_mesh(MeshConfig(data=4, model=2)), tables, loss_fn, batches)
    np.testing.assert_allclose(eight[0], one[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), eight[1], one[1])


def test_rules_cut_what_has_a_row_for_each_entity_and_nothing_else():
    model = GraphEmbedding("conve", D, N, R, ROWS)
    places = shardings(jax.eval_shape(model.init, jax.random.key(0)), make_mesh(), GRAPH_RULES)
    assert places["entity"]["embedding"].spec == P(("data", "model"), None)
    assert places["scorer"]["entity_bias"].spec == P(("data", "model"))
    assert all(place.spec == P() for place in jax.tree.leaves((places["scorer"]["query"], places["relation"])))


@pytest.mark.parametrize("name", ["complex", "conve"])
def test_saved_tables_score_as_before_on_any_number_of_devices(name, batch, tmp_path):
    model = GraphEmbedding(name, D, N, R, ROWS, ScorerOptions(core_rank=4, channels=5))
    tables = _tables(model)
    checkpoint.save_tree(tmp_path / "tables", jax.device_get(model.to_saved(tables)))
    told = json.loads(json.dumps(model.describe()))
    saved = checkpoint.load_tree(tmp_path / "tables")
    assert saved["entity"].shape == (N, D) and ("scorer" in saved) == (name != "complex")
    for devices in (1, 8):
        other, loaded = load_graph_embedding(told, saved, devices)
        assert other == dataclasses.replace(model, entity_rows=24 if devices == 1 else 64)
        np.testing.assert_allclose(_scores(other, loaded, batch), _scores(model, tables, batch), rtol=1e-5, atol=1e-5)
    with pytest.raises(KgrecError, match="entity vectors .21, 8., expected 20 × 8"):
        load_graph_embedding({**told, "entities": 20}, saved)


def test_tables_of_earlier_versions_are_read():
    model = GraphEmbedding("rotate", D, N, R, 24)
    saved = model.to_saved(_tables(model))
    assert set(saved) == {"entity", "relation"}
    assert load_graph_embedding({"scorer": "rotate", "dim": D, "entities": N}, saved)[0] == model


def test_n3_counts_each_answer_with_its_head_and_relation(batch):
    model = GraphEmbedding("complex", D, N, R, N)
    tables = _tables(model)
    norm = lambda x: (np.abs(x[: D // 2] + 1j * x[D // 2 :]) ** 3).sum()  # noqa: E731
    v, u = np.asarray(tables["entity"]["embedding"]), np.asarray(tables["relation"]["embedding"])
    expected = [sum(w * (norm(v[h]) + norm(u[r]) + norm(v[t])) for t, w in zip(ts, ws, strict=True))
                for h, r, ts, ws in zip(batch.head, batch.relation, batch.tails, batch.weight, strict=True)]
    np.testing.assert_allclose(jax.jit(model.nuclear_3_norms)(tables, batch), expected, rtol=1e-4)


# A small world: 12 people live in 4 towns of 2 countries; where one lives decides whose citizen one is.
PEOPLE, TOWNS, COUNTRIES = range(12), range(12, 16), range(16, 18)
LIVES, LIES, CITIZEN = range(3)


def _world():
    """(training triples, held-out citizenships): one person of each town has no citizenship in training."""
    lives = [(p, LIVES, 12 + p % 4) for p in PEOPLE]
    lies = [(t, LIES, 16 + t % 2) for t in TOWNS]
    citizens = [(p, CITIZEN, 16 + p % 2) for p in PEOPLE]
    return np.array(lives + lies + citizens[4:], np.int32), np.array(citizens[:4], np.int32)


def _learn(model, loss_fn, batches, steps, rate=0.02):
    """Tables after some steps of Adam; `batches` [S, …] are taken in turn."""
    tx = optax.adam(rate)
    stacked = jax.tree.map(lambda *xs: jnp.asarray(np.stack(xs)), *batches)

    def step(index, carry):
        tables, state = carry
        batch = jax.tree.map(lambda x: x[index % len(batches)], stacked)
        grads = jax.grad(loss_fn)(tables, batch, jax.random.key(index))
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(grads, state, tables)
            return optax.apply_updates(tables, updates), state

    tables = jax.jit(model.init)(jax.random.key(0))
    with jax.numpy_dtype_promotion("standard"):
        state = jax.jit(tx.init)(tables)
    return jax.jit(lambda carry: jax.lax.fori_loop(0, steps, step, carry))((tables, state))[0]


def _best(model, tables, triples, known):
    """The best-scored tail of each triple among all entities but the other known answers."""
    scores = np.array(jax.jit(model.scores)(tables, triples[:, 0], triples[:, 1]))[:, :model.num_entities]
    for row, (h, r, t) in enumerate(triples):
        scores[row, [e for e in known.get((h, r), ()) if e != t]] = -np.inf
    return scores.argmax(1)


def _known(triples):
    out = {}
    for h, r, t in triples.tolist():
        out.setdefault((h, r), set()).add(t)
    return out


@pytest.mark.parametrize("name", SCORERS)
def test_every_scorer_infers_what_follows_and_remembers_what_is_told(name):
    train, test = _world()
    # Without dropout the convolution learns the told triples by heart.
    options = ScorerOptions(channels=8, input_dropout=0.2, query_dropout=0.2) if name == "conve" else ScorerOptions()
    model = GraphEmbedding(name, 16, 18, 3, 24, options)
    sampled = {"candidates": 8, "shared": False} if name in L1 else {}
    source = LinkSource(merge_queries(train, 3, 6), batch=32, steps=16, seed=0, num_entities=18, **sampled)

    def loss_fn(tables, batch, key):
        if name in L1:
            return model.margin_losses(tables, batch, margin=4.0, temperature=0.5, key=key).sum() / 32
        n3 = model.nuclear_3_norms(tables, batch).sum()
        return (model.structure_losses(tables, batch, key).sum() + 0.01 * n3) / 32

    tables = _learn(model, loss_fn, [source[s] for s in range(16)], 300)
    known, both = _known(np.concatenate([train, test])), np.concatenate([train, test])
    np.testing.assert_array_equal(_best(model, tables, both, known), both[:, 2])


@pytest.mark.parametrize(("name", "shared"), [("rotate-l1", False), ("complex", True)])
def test_the_margin_loss_learns_a_ring_from_a_few_rivals(name, shared):
    """A ring of 12 with steps of one and of three: what comes next must not be confused with what came before."""
    model = GraphEmbedding(name, 16, 12, 2, 16)
    ring = np.array([(e, r, (e + jump) % 12) for e in range(12) for r, jump in enumerate((1, 3))], np.int32)
    source = LinkSource(merge_queries(ring, 2, 1), batch=48, steps=64, seed=0, num_entities=12, candidates=4,
                        shared=shared)

    def loss_fn(tables, batch, key):
        return model.margin_losses(tables, batch, margin=4.0, temperature=0.5, key=key).sum() / 48

    tables = _learn(model, loss_fn, [source[s] for s in range(64)], 600)
    np.testing.assert_array_equal(_best(model, tables, ring, _known(ring)), ring[:, 2])


def test_relation_prediction_teaches_relations_apart():
    train, _ = _world()
    model = GraphEmbedding("complex", 16, 18, 3, 24)
    source = LinkSource(merge_queries(train, 3, 6), batch=32, steps=1, seed=0, num_entities=18)
    loss_fn = lambda tables, batch, key: model.relation_losses(tables, batch, key).sum() / 32  # noqa: E731
    tables = _learn(model, loss_fn, [source[0]], 200)
    h, r, t = train.T
    score = jax.jit(model.triple_scores)
    scores = np.stack([score(tables, h, np.full_like(h, k), t) for k in range(6)])
    np.testing.assert_array_equal(scores.argmax(0), r)


def test_soft_tokens_depend_on_direction_and_carry_gradients_to_both_tables(batch):
    model = GraphEmbedding("complex", D, N, R, N)
    tables, bridge = _tables(model), init_bridge(D, 12, 0.05, jax.random.key(3))

    def through(tables):
        soft = soft_tokens(bridge, *model.rows(tables, batch.head, batch.relation))
        assert soft.shape == (16, 1, 12)
        return link_queries(bridge, soft[:, 0]).sum()

    grads = jax.jit(jax.grad(through))(tables)
    touched = np.unique(batch.head)
    assert np.abs(grads["entity"]["embedding"][touched]).sum(1).all()
    assert np.abs(grads["relation"]["embedding"][np.unique(batch.relation)]).sum(1).all()
    h, r = model.rows(tables, batch.head, batch.relation)
    np.testing.assert_allclose(soft_tokens(bridge, 3 * h, 3 * r), soft_tokens(bridge, h, r), rtol=1e-4, atol=1e-6)
