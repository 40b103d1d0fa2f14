"""The bi-encoder: its loss against NumPy, its batches, its bank, and a small world whose answers are in the words."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.serialization import to_bytes

from kgrec_jax import sharding
from kgrec_jax.data.bi_encoder_batches import BiEncoderSource, BiWords, lay_out, make_rungs, readable_rows
from kgrec_jax.data.dataset import Graph
from kgrec_jax.data.link_batches import LinkSource, merge_queries
from kgrec_jax.data.text import train_wordpiece
from kgrec_jax.errors import KgrecError
from kgrec_jax.evaluation.link_prediction import KnownTails
from kgrec_jax.models import bert, bi_encoder
from kgrec_jax.models.bi_encoder import BiEncoder
from kgrec_jax.optim import OptimConfig
from kgrec_jax.sharding import MeshConfig, make_mesh
from kgrec_jax.stages import graph_bi_encoder as stage
from kgrec_jax.stages import graph_bi_vectors, graph_config, pretrain
from kgrec_jax.stages.graph_data import link_data
from kgrec_jax.tracking import Tracker

COLOURS = ("red", "green", "blue", "black", "white", "pink", "brown", "gold")
THINGS = ("stone", "tree", "house", "river", "cloud", "horse", "bird", "chair", "table", "lamp", "boat", "shoe")
FIRST = len(COLOURS)  # entities from here on are things; a thing's colour is in its text
ONE = make_mesh(MeshConfig(), jax.devices()[:1])
SMALL = stage.Config(mode="full", batch=32, steps=100, length=16, rungs=2, refresh=8, eval_triples=30, encode_batch=16,
                     log_every=10, checkpoint_every=25,
                     optim=OptimConfig(peak_lr=3e-3, schedule="linear", warmup_share=0.1))


def small_world(texts=True):
    """Eight colours and 96 things of one colour each; what is held out is all there is of a thing."""
    names, triples, part = list(COLOURS), [], []
    for thing, name in enumerate(THINGS):
        for colour in range(FIRST):
            names.append(name)
            triples.append((FIRST + thing * FIRST + colour, 0, colour))
            part.append((0, 0, 0, 0, 0, 1, 2, 0)[(thing + colour) % 8] if thing < 10 else (0, 2)[thing == 11])
    descriptions = [""] * FIRST + [f"a {COLOURS[c]} {name}" for name in THINGS for c in range(FIRST)]
    n = len(names)
    if not texts:
        names, descriptions = [""] * n, [""] * n
    return Graph(tuple(f"e{k}" for k in range(n)), tuple(names), tuple(descriptions), ("r",), ("has colour",),
                 np.array(triples, np.int32), 0, np.array(part, np.int8))


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder") / "bert"
    world = small_world()
    train_wordpiece([*stage.entity_texts(world), *stage.relation_texts(world)], folder, vocab_size=220)
    config = bert.BertConfig(vocab_size=220, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                             intermediate_size=64, max_position_embeddings=32)
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    (folder / "flax_model.msgpack").write_bytes(to_bytes({"bert": bert.init_encoder(config, jax.random.key(0))}))
    return folder


class Run:
    """As much of a run as the training asks for."""

    def __init__(self, path, mesh=ONE):
        self.path, self.mesh, self.tracker, self.lines = path, mesh, Tracker(path, quiet=True), []
        self.tracker.say = self.lines.append

    def stage(self, name):
        (self.path / name).mkdir(parents=True, exist_ok=True)
        return self.path / name


def train(path, encoder, cfg=SMALL, graph=None, mesh=ONE):
    data = link_data(graph_config.Config(tails=4), small_world() if graph is None else graph, 3)
    experiment = types.SimpleNamespace(seed=3, encoder=str(encoder), graph=types.SimpleNamespace(bi_encoder=cfg),
                                       pretrain=pretrain.Config())
    return *stage.train_bi_encoder(experiment, Run(path, mesh), data), data


@pytest.fixture(scope="module")
def finished(encoder_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("finished")
    return path, *train(path, encoder_folder)


WORDS = BiWords([[10 + k] * (k % 5) for k in range(20)], [[40], [41, 42], [43], [44]], cls=1, sep=2, pad=0)


def make_source(**changed):
    rng = np.random.default_rng(0)
    triples = np.unique(np.stack([rng.integers(0, 18, 90), rng.integers(0, 2, 90), rng.integers(0, 18, 90)], 1), axis=0)
    rows = readable_rows(merge_queries(triples.astype(np.int32), 2, 3), WORDS)
    known = KnownTails.of(triples, 2)
    seen = np.array([k for k in range(18) if k % 5])
    fields = {"length": 8, "rungs": 2, "refresh": 4, "rivals": 100, "self_negatives": True, "bank_rows": 24,
              "devices": 1} | changed
    links = LinkSource(rows, batch=8, steps=20, seed=1, num_entities=20)
    return BiEncoderSource(links, WORDS, known, seen, **fields), known


# --- batches ------------------------------------------------------------------------------------------------------


def test_texts_are_cut_where_they_can_spare_it_and_laid_out_by_length():
    assert WORDS.query_text(4, 1, 7) == [1, 14, 14, 2, 41, 42, 2] and WORDS.query_text(4, 1, 20).count(14) == 4
    assert WORDS.entity_text(4, 5) == [1, 14, 14, 14, 2] and WORDS.entity_text(5, 5) == [1, 2]
    entities = np.array([4, 0, 3, 6, 9, 1, 2, 8])
    lengths = WORDS.entity_lengths(entities, 32)
    rungs = make_rungs(lengths, 8, 2, 1, 32)
    assert [rows for rows, _ in rungs] == [4, 4] and rungs[-1][1] == 6 and rungs[0][1] <= 6
    texts = lay_out(lengths, lambda row, length: WORDS.entity_text(entities[row], length), rungs, 0)
    flat = [[t for t, m in zip(row, mask, strict=True) if m] for ids, masks in zip(texts.ids, texts.mask, strict=True)
            for row, mask in zip(ids.tolist(), masks, strict=True)]
    for b, entity in enumerate(entities):
        assert flat[texts.place[b]] == WORDS.entity_text(entity, 32)
    assert len(make_rungs(lengths, 8, 4, 8, 32)) == 1 and len(make_rungs(lengths, 8, 4, 2, 32)) == 4


@pytest.mark.parametrize("drawn", [False, True])
def test_no_known_tail_is_a_rival(drawn):
    source, known = make_source(rivals=6 if drawn else 100)
    some_self = False
    for step in range(len(source)):
        batch, links = source[step], source.links[step]
        columns = batch.rivals if drawn else np.arange(24)
        assert batch.blocked.shape == (8, len(columns))
        for b in range(8):
            _, tails = known.pairs(links.head[b:b + 1], links.relation[b:b + 1])
            off = {*tails.tolist(), *batch.answer.tolist(), int(links.head[b])}
            assert {int(c) for c, x in zip(columns, batch.blocked[b], strict=True) if x} == off & set(columns.tolist())
            off_answers = [j == b or not batch.weight[j] or a in tails for j, a in enumerate(batch.answer)]
            assert batch.blocked_answers[b].tolist() == off_answers
            fresh = links.head[b] in batch.answer[batch.weight > 0]
            assert batch.self_rival[b] == (links.head[b] not in tails and not fresh)
            some_self |= bool(batch.self_rival[b])
            if batch.weight[b]:
                assert batch.answer[b] in links.tails[b][links.weight[b] > 0] and len(WORDS.entity[batch.answer[b]])
                assert batch.tail_weight[b].sum() == links.weight[b].sum() - 1
    assert some_self and not make_source(self_negatives=False)[0][0].self_rival.any()


def test_batches_are_a_function_of_the_step_and_renew_the_bank_in_turn():
    source, _ = make_source()
    again = make_source()[0]
    assert jax.tree.all(jax.tree.map(np.array_equal, source[7], again[7]))
    renewed = np.concatenate([source[step].refreshed_id for step in range(len(source.seen))])
    assert set(renewed) == set(source.seen) and renewed[:4].tolist() == source.seen[:4].tolist()


# --- loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drawn", [False, True])
def test_losses_are_numpys(drawn):
    batch = make_source(rivals=6 if drawn else 100)[0][3]
    weight = batch.weight.copy()
    weight[2] = 0.0
    batch = dataclasses.replace(batch, weight=weight, blocked_answers=batch.blocked_answers | (weight == 0)[None])
    rng = np.random.default_rng(2)
    queries, answers, bank = (unit(rng.normal(size=(n, 5))) for n in (8, 8, 24))
    bank[[1, 2, 13]] = 0.0  # not yet encoded
    got = jax.jit(bi_encoder.contrast)(*map(jnp.asarray, (queries, answers, bank)), jnp.float32(7.0), jnp.float32(0.1),
                                       batch)
    columns = batch.rivals if drawn else np.arange(24)
    softplus = lambda x: np.logaddexp(0.0, x)  # noqa: E731
    for b in range(8):
        own = 7 * (queries[b] @ answers[b] - 0.1)
        rivals = [7 * queries[b] @ answers[j] for j in range(8) if not batch.blocked_answers[b, j]]
        rivals += [7 * queries[b] @ bank[c] for k, c in enumerate(columns) if bank[c].any() and not batch.blocked[b, k]]
        if batch.self_rival[b] and bank[batch.head[b]].any():
            rivals.append(7 * queries[b] @ bank[batch.head[b]])
        top = np.log(np.exp(rivals).sum())
        loss = softplus(top - own)
        others = [softplus(top - 7 * (queries[b] @ bank[t] - 0.1)) for t, w in
                  zip(batch.tails[b], batch.tail_weight[b], strict=True) if w and bank[t].any()]
        loss = 0.5 * (loss + np.mean(others)) if others else loss
        np.testing.assert_allclose(got[0][b], loss, rtol=2e-5)
        back = [7 * queries[j] @ answers[b] for j in range(8) if weight[j] and not batch.blocked_answers[j, b]]
        np.testing.assert_allclose(got[1][b], softplus(np.log(np.exp(back).sum()) - own) if back else 0.0, rtol=2e-5)
        assert float(got[2][b]) == float(own > max(rivals))


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def small_model(**changed):
    config = bert.BertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                             intermediate_size=32, max_position_embeddings=16)
    return BiEncoder(config, **{"mode": "full"} | changed), bert.init_encoder(config, jax.random.key(0))


@pytest.mark.parametrize("mode,towers", [pytest.param("full", "shared", marks=pytest.mark.slow), ("lora", "two")])
def test_a_step_puts_what_it_encoded_into_the_bank(mode, towers):
    model, given = small_model(mode=mode, towers=towers)
    params, batch = model.init(given, 24, 0.05, jax.random.key(1)), make_source()[0][0]
    constants = {} if mode == "full" else given
    (loss, metrics), grads = jax.jit(jax.value_and_grad(model.loss, has_aux=True))(params, constants, batch)
    np.testing.assert_allclose(loss, sum(metrics[n][0] / metrics[n][1] for n in ("query_loss", "answer_loss")),
                               rtol=1e-6)
    bank = params["bank"]["rows"] - grads["bank"]["rows"]
    weights, encode = model.merged(params, given), jax.jit(model.encode_rows)
    encoded = {*batch.answer[batch.weight > 0].tolist(), *batch.refreshed_id.tolist()}
    assert set(np.flatnonzero(np.asarray(bank).any(axis=1)).tolist()) == encoded
    for entity in encoded:
        text = WORDS.entity_text(entity, 8)
        ids, mask = (np.array([row + [0] * (8 - len(row))], np.int32) for row in (text, [1] * len(text)))
        np.testing.assert_allclose(bank[entity], encode(weights["entity"], ids, mask)[0], atol=2e-6)
    assert set(params["encoder"]) == ({"query", "entity"} if towers == "two" else {"query"})
    assert float(jnp.abs(grads["scale"]["log"])) > 0


def test_rows_that_no_step_has_encoded_are_no_rivals():
    model, given = small_model()
    batch = dataclasses.replace(make_source()[0][0], self_rival=np.zeros(8, bool))
    params = model.init(given, 24, 0.05, jax.random.key(1))
    alone = dataclasses.replace(batch, blocked=np.ones_like(batch.blocked))
    loss = jax.jit(lambda batch: model.loss(params, {}, batch)[0])
    assert float(loss(batch)) == float(loss(alone))


@pytest.mark.slow
def test_a_mesh_gives_the_same_loss_and_gradients():
    model, given = small_model()
    mesh = make_mesh(MeshConfig(data=4, model=2))
    source = make_source(devices=4, bank_rows=64)[0]
    params, batch = model.init(given, 64, 0.05, jax.random.key(1)), source[1]
    params["bank"]["rows"] = jnp.asarray(unit(np.random.default_rng(0).normal(size=(64, 16)))) * (
        jnp.arange(64)[:, None] < 18).astype(jnp.float32)
    step = jax.jit(lambda p, b: jax.value_and_grad(model.loss, has_aux=True)(p, {}, b))
    expected = step(params, batch)
    with jax.set_mesh(mesh):
        places = sharding.shardings(params, mesh, bi_encoder.rules(model.encoder))
        assert places["bank"]["rows"].spec == sharding.TABLE
        got = step(sharding.put(params, places), sharding.put_batch(batch, mesh))
    np.testing.assert_allclose(got[0][0], expected[0][0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6 * max(1.0, float(jnp.abs(b).max()))), got[1],
                 expected[1])


# --- stage --------------------------------------------------------------------------------------------------------


def test_learns_the_answers_that_are_in_the_words_of_unseen_entities_too(finished):
    _, _, results, data = finished
    tail, head = results["link_prediction"]["tail/mrr"], results["link_prediction"]["head/mrr"]
    assert not data.seen[data.triples(2)[:, 0]].any()  # things of which training says nothing
    assert tail > 0.95 and head > 0.8
    assert results["first"] > 0.9 and {"link_prediction_words_alone", "link_prediction_valid"} <= results.keys()


def test_scores_are_the_cosines_of_the_saved_vectors(finished):
    path, vectors, _, data = finished
    weights, entities, scale = stage.load_bi_encoder(path / "graph")
    assert np.array_equal(entities, vectors.entities) and scale == vectors.inverse_temperature
    np.testing.assert_allclose(np.linalg.norm(entities, axis=1), 1.0, atol=1e-5)
    heads, relations = data.triples(2)[:5, 0], np.zeros(5, np.int32)
    around = vectors.neighbourhood
    bare = dataclasses.replace(vectors, neighbourhood=dataclasses.replace(around, hops=2, weight=0.5))
    expected = scale * (vectors.queries(heads, relations) @ entities.T + 0.5 * around.near(heads, 2))
    np.testing.assert_allclose(bare.scores(heads, relations), expected, rtol=1e-5, atol=1e-5)
    none = dataclasses.replace(bare, entities=entities * (np.arange(len(entities)) != 3)[:, None],
                               neighbourhood=dataclasses.replace(around, hops=0))
    assert (np.asarray(none.scores(heads, relations))[:, 3] == np.float32(-scale)).all()
    with pytest.raises(KgrecError, match="head 9, relation 0.*without a vector"):
        vectors.queries(np.array([9]), np.array([0]))
    assert set(weights) == {"query", "entity"}


def test_near_is_breadth_first_search():
    rng = np.random.default_rng(1)
    triples = np.stack([rng.integers(0, 30, 32), np.zeros(32, np.int64), rng.integers(0, 30, 32)], 1)
    around = graph_bi_vectors.Neighbourhood(0, 0.0, graph_bi_vectors.adjacency(triples, 30))
    links = {k: {*triples[triples[:, 0] == k, 2], *triples[triples[:, 2] == k, 0]} for k in range(30)}
    for hops in (1, 2, 3):
        near = around.near(np.arange(30), hops)
        for k in range(30):
            reached = {k}
            for _ in range(hops):
                reached |= set().union(*(links[j] for j in reached))
            assert set(np.flatnonzero(near[k])) == reached - {k}


def test_the_neighbourhood_is_chosen_where_it_helps():
    num, rng = 40, np.random.default_rng(0)
    ring = np.array([(k, 0, (k + 1) % num) for k in range(num)], np.int32)
    held = np.array([(k, 1, (k + 2) % num) for k in range(0, num, 4)], np.int32)
    known = KnownTails.of(np.concatenate([ring, held]), 2)
    queries = np.unique(np.concatenate([held[:, 0] * 4 + 1, held[:, 2] * 4 + 3])).astype(np.int64)
    around = graph_bi_vectors.Neighbourhood(0, 0.0, graph_bi_vectors.adjacency(ring, num))
    vectors = graph_bi_vectors.BiEncoderVectors(unit(rng.normal(size=(num, 4))), 20.0, queries,
                                                unit(rng.normal(size=(len(queries), 4))), 2, around)
    chosen = graph_bi_vectors.choose_neighbourhood(vectors, held, known)
    assert chosen.hops == 2 and chosen.weight == 0.2
    assert graph_bi_vectors.choose_neighbourhood(vectors, held[:0], known).hops == 0


def test_goes_on_bit_for_bit_after_a_break(encoder_folder, finished, tmp_path, monkeypatch):
    read = BiEncoderSource.__getitem__

    def breaking(self, step):
        if step == 60:
            raise RuntimeError("the power is gone")
        return read(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(BiEncoderSource, "__getitem__", breaking)
        with pytest.raises(RuntimeError, match="the power is gone"):
            train(tmp_path, encoder_folder)
    vectors, _, _ = train(tmp_path, encoder_folder)
    path, expected, *_ = finished
    assert np.array_equal(vectors.entities, expected.entities) and np.array_equal(vectors.vectors, expected.vectors)
    both = [jax.tree.leaves(stage.load_bi_encoder(p / "graph")[0]) for p in (tmp_path, path)]
    assert all(np.array_equal(a, b) for a, b in zip(*both, strict=True))


@pytest.mark.slow
def test_adapters_of_two_towers_learn_from_drawn_rivals_on_a_mesh(encoder_folder, tmp_path):
    cfg = dataclasses.replace(SMALL, steps=4, batch=16, mode="lora", towers="two", rivals=20, eval_every=2)
    vectors, results, data = train(tmp_path, encoder_folder, cfg, mesh=make_mesh(MeshConfig()))
    assert np.isfinite(results["query_loss"]) and len(vectors.entities) == data.graph.num_entities
    assert "valid_mrr" in results
    weights, _, _ = stage.load_bi_encoder(tmp_path / "graph")
    assert not all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, weights.values()), strict=True))


def test_a_graph_without_words_is_skipped_with_the_reason(encoder_folder, tmp_path):
    vectors, results, _ = train(tmp_path, encoder_folder, graph=small_world(texts=False))
    assert vectors is None and "no entity of a training triple has a name" in results["skipped"]
    assert "mode is off" in train(tmp_path, encoder_folder, stage.Config())[1]["skipped"]
    assert not (tmp_path / "graph").exists()


def test_new_entities_are_encoded_by_their_texts_and_those_without_are_zero():
    model, given = small_model()
    texts = graph_bi_vectors.TextEncoding(model, WORDS, 8, 4, ONE)
    vectors = texts.entities({"query": {}, "entity": given})
    named = np.array([bool(len(ids)) for ids in WORDS.entity])
    assert not vectors[~named].any() and named.sum() == 16
    np.testing.assert_allclose(np.linalg.norm(vectors[named], axis=1), 1.0, atol=1e-5)
    more = dataclasses.replace(WORDS, entity=[[], *WORDS.entity[1:3], [], WORDS.entity[4]])
    some = dataclasses.replace(texts, words=more, batch=1).entities({"query": {}, "entity": given})
    np.testing.assert_allclose(some[[1, 2, 4]], vectors[[1, 2, 4]], atol=2e-6)


@pytest.mark.parametrize("field,value", [("batch", 1), ("length", 4), ("temperature", 0.0), ("rivals", 0)])
def test_bad_fields_are_named(field, value):
    with pytest.raises(KgrecError, match=f"graph.bi_encoder.{field}: found {value}"):
        stage.check(dataclasses.replace(SMALL, **{field: value}))
    with pytest.raises(KgrecError, match="graph.bi_encoder.optim.peak_lr"):
        stage.check(dataclasses.replace(SMALL, optim=OptimConfig(peak_lr=-1.0)))


def test_texts_say_a_name_once_and_relations_have_inverses():
    graph = small_world()
    texts = ("red, the colour", "", "plain", *graph.entity_texts[3:])
    graph = dataclasses.replace(graph, entity_texts=texts, relation_names=("",))
    assert stage.entity_texts(graph)[:3] == ["red: the colour", "green", "blue: plain"]
    assert stage.relation_texts(graph) == ["r", "inverse r"]
