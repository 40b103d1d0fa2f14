"""Heads against NumPy, joined graphs by brute force, the loss of a domain, what training leaves, resume."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp
from domain_world import SHAPE, content_of, some_run, training, two_domains

from kgrec_jax.data.domains import union
from kgrec_jax.data.graph import edges
from kgrec_jax.data.history_batches import HistoryBatches
from kgrec_jax.models.domain_towers import DomainHeads, DomainTowers, HeadsConfig
from kgrec_jax.models.towers import FREE
from kgrec_jax.stages.domains_towers import batches, fit_shared, init, item_edges, loss
from kgrec_jax.stages.graph import training_graph


@pytest.fixture(scope="module")
def pair():
    """(rich, poor)."""
    return two_domains()[:2]


# --- heads --------------------------------------------------------------------------------------------------------


def mixed(weights, name, x, told):
    logits = x @ np.asarray(weights[name]["kernel"]) + np.asarray(weights[name]["bias"])
    raised = np.exp(logits - logits.max(1, keepdims=True))
    return sum((raised / raised.sum(1, keepdims=True))[:, [k]] * y for k, y in enumerate(told))


def expert(weights, name, x):
    h = x @ np.asarray(weights[name]["in"]["kernel"]) + np.asarray(weights[name]["in"]["bias"])
    h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h ** 3)))
    return x + h @ np.asarray(weights[name]["out"]["kernel"])


def reference(cfg, weights, x, domain, count):
    if cfg.kind == "mmoe":
        return mixed(weights, f"gate_0_{domain}", x, [expert(weights, f"shared_0_{k}", x) for k in range(cfg.experts)])
    common, states = x, [x] * count
    for v in range(cfg.levels):
        told = [expert(weights, f"shared_{v}_{k}", common) for k in range(cfg.experts)]
        own = [[expert(weights, f"own_{v}_{d}_{k}", states[d]) for k in range(cfg.own_experts)] for d in range(count)]
        new = [mixed(weights, f"gate_{v}_{d}", states[d], told + own[d]) for d in range(count)]
        if v < cfg.levels - 1:
            common = mixed(weights, f"gate_{v}_shared", common, told + sum(own, []))
        states = new
    return states[domain]


@pytest.mark.parametrize("cfg", [
    HeadsConfig("mmoe", experts=3, width=7), HeadsConfig("ple", experts=2, own_experts=3, width=7),
    HeadsConfig("ple", experts=2, own_experts=1, levels=3, width=5)], ids=["mmoe", "ple", "ple-3-levels"])
def test_heads_are_what_the_papers_say(cfg):
    rng, model, count = np.random.default_rng(0), DomainHeads(cfg, 3), 3
    x = rng.normal(size=(6, 8)).astype(np.float32)

    def every(module, x):
        return [module(x, d) for d in range(count)]

    params = model.init(jax.random.key(0), x, method=every)["params"]
    for y in model.apply({"params": params}, x, method=every):  # it begins as the identity
        np.testing.assert_allclose(y, x, atol=1e-6)
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) * 0.5, jnp.float32), params)
    out = model.apply({"params": params}, x, method=every)
    for domain in range(count):
        np.testing.assert_allclose(out[domain], reference(cfg, params, x.astype(np.float64), domain, count), atol=2e-4)
    assert not np.allclose(out[0], out[1], atol=1e-2)


def test_without_heads_there_is_one_space():
    model = DomainHeads(HeadsConfig("shared"), 2)
    x = np.ones((2, 3), np.float32)
    assert model.init(jax.random.key(0), x, 1) == {}
    np.testing.assert_array_equal(model.apply({}, x, 1), x)


# --- the union ----------------------------------------------------------------------------------------------------


def facts(data):
    """{(item id or entity id, relation id, entity id)} of a data set's triples."""
    ids, rel = data.graph.entity_ids, data.graph.relation_ids
    return {(ids[h], rel[r], ids[t]) for h, r, t in data.graph.triples}


def sharing(pair, agree):
    """The two domains with ten films in common, under the same names or not."""
    rich, poor = pair
    ids, names = list(poor.graph.entity_ids), list(poor.item_names)
    for k in range(10):
        ids[k] = rich.graph.entity_ids[3 * k]
        names[k] = rich.item_names[3 * k] if agree else f"another {k}"
    own = dataclasses.replace(poor.graph, entity_ids=tuple(ids))
    return {"rich": rich, "poor": dataclasses.replace(poor, graph=own, item_names=tuple(names))}


def test_equal_ids_are_one_row(pair):
    both = sharing(pair, agree=True)
    joined = union(both)
    graph = joined.graph
    assert len(set(graph.entity_ids)) == graph.num_entities
    assert set(graph.entity_ids) == {i for d in both.values() for i in d.graph.entity_ids}
    said = {(graph.entity_ids[h], graph.relation_ids[r], graph.entity_ids[t]) for h, r, t in graph.triples}
    assert said == facts(both["rich"]) | facts(both["poor"]) and len(said) == len(graph.triples)
    assert joined.common == {"items": 10, "relations": 4, "entities": 10 + 26}
    for d, data in enumerate(both.values()):
        at = joined.item_entity[joined.starts[d]:joined.starts[d + 1]]
        assert [graph.entity_ids[e] for e in at] == list(data.graph.entity_ids[:data.num_items])
        assert joined.item_texts[joined.starts[d]:joined.starts[d + 1]] == data.item_texts
    assert (joined.item_entity < graph.num_items).all() and graph.num_items == joined.num_items - 10
    assert "10 items of poor have the entity_id of an item of rich, 10 of them its name too" in joined.notes[0]


def test_edges_of_an_item_are_those_of_its_entity(pair):
    joined = union(sharing(pair, agree=True))
    head, relation, tail = item_edges(joined)
    merged = training_graph(joined.graph)[0]
    expected = [(i, r, t) for i, e in enumerate(joined.item_entity)
                for h, r, t in zip(*edges(merged)) if h == e]
    assert [(h, r, t - joined.num_items) for h, r, t in zip(head, relation, tail)] == expected
    twins = np.flatnonzero(joined.item_entity == joined.item_entity[joined.starts[1]])  # of the poor one's first film
    assert len(twins) == 2
    own = [{(r, t) for h, r, t in zip(head, relation, tail) if h == i} for i in twins]
    assert own[0] == own[1] and own[0]


def test_ids_that_mean_other_things_stay_apart(pair):
    joined = union(sharing(pair, agree=False))
    assert joined.common["items"] == 0 and joined.graph.num_items == joined.num_items
    assert "stay apart" in joined.notes[0]
    rich, poor = pair

    def numbered(data):
        own = dataclasses.replace(data.graph, entity_ids=tuple(str(k) for k in range(data.graph.num_entities)),
                                  relation_ids=("0", "1", "2", "3"))
        return dataclasses.replace(data, graph=own)

    apart = union({"rich": numbered(rich), "poor": numbered(poor)})
    assert apart.common == {"items": 0, "relations": 0, "entities": 0}
    assert apart.graph.num_entities == rich.graph.num_entities + poor.graph.num_entities


def test_given_parts_of_a_graph_are_not_trained_on(pair):
    rich, poor = pair
    part = np.zeros(len(poor.graph.triples), np.int8)
    part[:5] = 2
    held = dataclasses.replace(poor, graph=dataclasses.replace(poor.graph, part=part))
    joined = union({"rich": rich, "poor": held})
    lost = {(joined.graph.entity_ids[h], joined.graph.entity_ids[t]) for h, _, t in joined.graph.triples}
    ids = poor.graph.entity_ids
    assert not {(ids[h], ids[t]) for h, _, t in poor.graph.triples[:5]} & lost


def test_vectors_of_media_are_joined_by_name_and_width(pair):
    rich, poor = pair
    seen = np.arange(rich.num_items) % 2 == 0
    rich = dataclasses.replace(rich, media={"sound": (np.ones((rich.num_items, 3), np.float32), seen)})
    poor = dataclasses.replace(poor, media={"sound": (np.ones((poor.num_items, 3), np.float32), np.ones(
        poor.num_items, bool))})
    vectors, present = union({"rich": rich, "poor": poor}).media["sound"]
    assert vectors.shape == (160, 3) and present.sum() == seen.sum() + poor.num_items
    other = dataclasses.replace(poor, media={"sound": (np.ones((poor.num_items, 2), np.float32), np.ones(
        poor.num_items, bool))})
    assert set(union({"rich": rich, "poor": other}).media) == {"sound-3", "sound-2"}


# --- training -----------------------------------------------------------------------------------------------------


def test_a_domain_is_told_from_its_own_items_alone(pair):
    both = dict(zip(("rich", "poor"), pair))
    content, cfg = content_of(both), training(4, 8)
    logs = {name: data.interactions for name, data in both.items()}
    features = content.features(logs)
    model = DomainTowers(SHAPE, HeadsConfig("mmoe", experts=2, width=8), content.union.starts)
    params = init(model, features, jax.random.key(0))
    batch = batches(SHAPE, cfg, 4, content.union, logs, 0)[1]
    assert [b.history.shape[0] for b in batch] == [8, 8]
    key = jax.random.key(1)
    value, told = loss(cfg, model, params, features, batch, key)
    out = model.apply({"params": params}, features, [b.history for b in batch], deterministic=False,
                      rngs={"dropout": key})
    free, expected = np.asarray(params["items"]["item_embeddings"]), 0.0
    for d, (b, (users, items)) in enumerate(zip(batch, out)):
        assert items.shape[0] == both[("rich", "poor")[d]].num_items
        rec = costs(np.asarray(users), np.asarray(items), b)
        np.testing.assert_allclose(float(told[f"rec_loss_{d}"][0]), rec, rtol=1e-4)
        own = free[content.union.starts[d]:content.union.starts[d + 1]]
        mean = np.stack([own[h[h >= 0]].mean(0) if (h >= 0).any() else own[0] * 0 for h in b.history])
        expected += (rec + cfg.cf_weight * costs(mean * 10, own, b)) / (b.weights.sum(1) > 0).sum()
    np.testing.assert_allclose(float(value), expected / 2, rtol=1e-4)


def costs(users, table, batch):
    """Σ over users and targets of weight · −log softmax, in NumPy."""
    scores = users.astype(np.float64) @ table.T.astype(np.float64)
    log = scores - np.log(np.exp(scores - scores.max(1, keepdims=True)).sum(1, keepdims=True)) - scores.max(
        1, keepdims=True)
    return -sum(w * log[u, t] for u in range(len(users)) for t, w in zip(batch.targets[u], batch.weights[u]) if t >= 0)


@pytest.mark.slow
def test_a_part_scores_as_the_towers_do(pair, tmp_path):
    both = dict(zip(("rich", "poor"), pair))
    logs = {name: data.interactions for name, data in both.items()}
    logs["poor"] = logs["poor"].take(logs["poor"].item != 2)
    content, heads = content_of(both), HeadsConfig("ple", experts=2, own_experts=1, width=8)
    parts = fit_shared(SHAPE, heads, training(3), 3, content, logs, tmp_path, some_run(tmp_path), 0)
    model = DomainTowers(SHAPE, heads, content.union.starts)
    history = np.full((3, 5), -1, np.int32)
    history[0, :3], history[2, :5] = [7, 1, 4], [0, 9, 3, 11, 30]
    users, items = model.apply({"params": parts["poor"].params}, content.features(logs), [history] * 2)[1]
    matrix = sp.lil_matrix((3, both["poor"].num_items), dtype=np.float32)
    for row, items_of in enumerate(history):
        matrix[row, items_of[items_of >= 0]] = 1.0
    np.testing.assert_allclose(parts["poor"].scores(matrix.tocsr()), np.asarray(users @ items.T), atol=1e-5)
    assert (parts["poor"].scores(matrix.tocsr())[1] == 0).all()
    assert not content.features(logs).present[FREE][content.union.starts[1] + 2] and parts["poor"].known.all()


@pytest.mark.slow
def test_resumes_to_the_same_towers(pair, tmp_path, monkeypatch):
    both = dict(zip(("rich", "poor"), pair))
    logs, content = {name: data.interactions for name, data in both.items()}, content_of(both)
    fit = functools.partial(fit_shared, SHAPE, HeadsConfig(experts=2, width=8), training(12, 8, checkpoint_every=4), 12,
                            content, logs, run=some_run(tmp_path), seed=0)
    whole, drawn = fit(tmp_path / "whole"), HistoryBatches.__getitem__

    def breaks(self, step):
        if step == 7:
            raise KeyboardInterrupt
        return drawn(self, step)

    monkeypatch.setattr(HistoryBatches, "__getitem__", breaks)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "broken")
    monkeypatch.setattr(HistoryBatches, "__getitem__", drawn)
    again = fit(tmp_path / "broken")
    jax.tree.map(np.testing.assert_array_equal, again["poor"].params, whole["poor"].params)
