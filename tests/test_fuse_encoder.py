"""A text encoder that learns inside fusion: its batches, its memory, a world in which texts alone decide, serving."""

import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_query import make_run
from tiny_encoder import make_tiny_encoder

from kgrec_jax import pipeline
from kgrec_jax.config import Experiment
from kgrec_jax.data.dataset import Interactions
from kgrec_jax.data.encoded_batches import EncodedBatches
from kgrec_jax.data.folder import DataConfig, write_folder
from kgrec_jax.data.text import load_tokenizer
from kgrec_jax.data.toy import toy_world
from kgrec_jax.errors import KgrecError
from kgrec_jax.models import encoders
from kgrec_jax.models.encoder_config import GptConfig
from kgrec_jax.models.peft import PeftConfig
from kgrec_jax.models.recommender import TOWER
from kgrec_jax.models.text_encoder import encode_texts
from kgrec_jax.models.text_towers import TextReader, memory, remembered
from kgrec_jax.models.tower_config import TowerConfig
from kgrec_jax.models.towers import FREE, ItemFeatures, Towers
from kgrec_jax.optim import OptimConfig
from kgrec_jax.pretrained import hf
from kgrec_jax.serving import store
from kgrec_jax.serving.query import NGRAMS, RELEASED, QueryEncoder, QueryIndex
from kgrec_jax.serving.recommender import Recommender
from kgrec_jax.sharding import make_mesh
from kgrec_jax.stages import fuse, fuse_encoder, fuse_towers, graph, pretrain
from kgrec_jax.stages.fuse_encoder import EncoderTraining, fit_text_towers
from kgrec_jax.stages.fuse_gate import GateConfig
from kgrec_jax.stages.fuse_towers import TowerTraining, fit_towers
from kgrec_jax.tracking import Tracker

KINDS, ITEMS, LENGTH = 8, 160, 10


@dataclasses.dataclass(frozen=True)
class World:
    """Every user likes one kind of items, and one word among many in an item's text says its kind: four words do."""

    kind: np.ndarray  # [I]
    warm: np.ndarray  # [I] bool
    texts: list[str]
    log: Interactions
    encoder: hf.Encoder
    tokenizer: object


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    rng = np.random.default_rng(0)
    words = rng.permutation([a + b for a in "bcdfghklmnprstvz" for b in "aeiou"])[:76]  # each of them is one token
    telling, noise = words[:4 * KINDS].reshape(KINDS, 4), words[4 * KINDS:]
    kind = np.arange(ITEMS) % KINDS
    texts = [" ".join(rng.permutation([rng.choice(telling[k]), *rng.choice(noise, 5)])) for k in kind]
    warm = np.arange(ITEMS) < 112
    user = np.repeat(np.arange(320), 8)
    item = np.concatenate([rng.permutation(np.flatnonzero(warm & (kind == u % KINDS)))[:8] for u in range(320)])
    log = Interactions(user.astype(np.int32), item.astype(np.int32), np.ones(len(user), np.float32),
                       np.zeros(len(user), np.int64))
    encoder = hf.load_encoder(make_tiny_encoder(tmp_path_factory.mktemp("world") / "bert", texts * 3))
    tokenizer = load_tokenizer(encoder.tokenizer_folder, encoder.config.vocab_size)
    return World(kind, warm, texts, log, encoder, tokenizer)


def training_of(world, method, mlm=False, items=64, rank=8):
    backbone = encoders.backbone(world.encoder.config, world.encoder.params)
    ids = world.tokenizer.encode(world.texts, LENGTH, special=False)
    head = pretrain.fresh_head(world.encoder.config, ids, jax.random.key(0)) if mlm else {}
    reader = TextReader(world.encoder.config, PeftConfig(method, rank=rank, patterns=()))
    return EncoderTraining(world.encoder, reader, backbone, head, world.tokenizer, world.texts, LENGTH, items,
                           0.15 if mlm else 0.0, OptimConfig(peak_lr=3e-3))


def first_vectors(world):
    return encode_texts(world.encoder, world.encoder.params, world.tokenizer, world.texts, max_length=LENGTH)


def features_of(world, vectors):
    blank, none = jnp.zeros((1, 1), jnp.float32), jnp.zeros(0, jnp.int32)
    present = {"text": jnp.ones(ITEMS, bool), "graph": jnp.zeros(ITEMS, bool), FREE: jnp.asarray(world.warm)}
    return ItemFeatures({"text": jnp.asarray(vectors)}, present, blank, blank, none, none, none)


def fitted(world, folder, method, steps=200, devices=1, checkpoint_every=0, mlm=False, items=64, **shape):
    run = types.SimpleNamespace(dataset=types.SimpleNamespace(num_items=ITEMS), tracker=Tracker(folder, quiet=True),
                                mesh=make_mesh(devices=jax.devices()[:devices]))
    cfg = TowerTraining(steps, 32, OptimConfig(peak_lr=1e-2, weight_decay=1e-4), 0.2, 10, checkpoint_every,
                        mlm_weight=0.1 if mlm else 0.0)
    shape = TowerConfig(**{"width": 16, "max_history": 8, "free_dropout": 0.5, **shape})
    known = features_of(world, first_vectors(world))
    if method == "frozen":
        return fit_towers(shape, cfg, known, world.log, folder / "tower", run, 0)
    training = training_of(world, method, mlm, items)
    return fit_text_towers(shape, cfg, training, known, world.log, folder / "tower", run, 0)


def cold_precision(world, tower):
    """Share of a user's kind among the six cold items that are best for them: six of 48 are, so .125 by chance."""
    rng = np.random.default_rng(1)
    kinds = np.arange(KINDS).repeat(8)
    histories = np.stack([rng.permutation(np.flatnonzero(world.warm & (world.kind == k)))[:6] for k in kinds])
    scores = tower.scores(histories.astype(np.int32))[:, ~world.warm]
    best = np.argsort(-scores, axis=1)[:, :6]
    return float((world.kind[~world.warm][best] == kinds[:, None]).mean())


# Decided before anything was run: a tenth ahead of the frozen random encoder. LoRA was to be a fiftieth ahead and is
# not: sums to the queries and values of a random encoder, whose word table stays, do not find the word.
@pytest.mark.slow
def test_an_encoder_that_learns_along_finds_the_word_that_decides(world, tmp_path):
    found = {method: cold_precision(world, fitted(world, tmp_path / method, method)) for method in ("frozen", "full")}
    assert found["full"] > found["frozen"] + 0.1, found


# --- batches ----------------------------------------------------------------------------------------------------------


def source_of(world, candidates=0, items=24, ids=None, mask_share=0.15, multiple=1):
    told = fuse_towers.batches(TowerConfig(max_history=8, candidates=candidates), 4, 30, world.log, ITEMS, 0)
    ids = world.tokenizer.encode(world.texts, LENGTH) if ids is None else ids
    return EncodedBatches.of(told, ids, world.tokenizer, items=items, length=LENGTH, mask_share=mask_share, seed=3,
                             multiple=multiple)


@pytest.mark.parametrize("candidates", [0, pytest.param(16, marks=pytest.mark.slow)])
def test_a_step_reads_its_own_items_first_and_none_twice(world, candidates):
    source = source_of(world, candidates)
    ids = source.ids
    for step in (0, 7):
        batch, again = source[step], source[step]
        jax.tree.map(np.testing.assert_array_equal, batch, again)
        assert len(np.unique(batch.item)) == 24 and batch.input_ids.shape == (24, LENGTH)
        told = batch.told.told if candidates else batch.told
        named = np.concatenate([told.history.ravel(), told.targets.ravel()])
        named = np.unique(batch.told.rows[batch.told.rows >= 0] if candidates else named[named >= 0])
        assert len(np.intersect1d(batch.item, named)) >= min(18, len(named)) - 6
        for item, place, tokens, mask in zip(batch.item, batch.place, batch.input_ids, batch.attention_mask):
            assert tokens[mask > 0].tolist() == ids[item][:LENGTH]
            if candidates and item in named:
                assert batch.told.rows[place] == item
            else:
                assert place == (len(batch.told.rows) if candidates else item)
        hidden = batch.masked.weights > 0
        assert hidden.any(1).all() and (batch.masked.positions[hidden] > 0).all()
        rows, places = np.nonzero(hidden)[0], batch.masked.positions[hidden]
        np.testing.assert_array_equal(batch.masked.targets[hidden], batch.input_ids[rows, places])


def test_every_text_has_its_turn_and_none_is_made_up(world):
    ids = world.tokenizer.encode(world.texts, LENGTH)
    ids[5], ids[9] = [], []
    source = source_of(world, ids=ids)
    read = [set(source[step].item.tolist()) for step in range(27)]
    assert set().union(*read) == set(range(ITEMS)) - {5, 9}
    few = source_of(world, items=24, ids=[tokens if row < 3 else [] for row, tokens in enumerate(ids)], multiple=8)
    batch = few[0]
    assert few.num_rows == 8 and sorted(batch.item.tolist()) == [0, 1, 2, *[ITEMS] * 5]
    assert (batch.place[3:] == ITEMS).all() and batch.attention_mask.any(1).all()
    assert not batch.masked.weights[3:].any()


# --- the step ---------------------------------------------------------------------------------------------------------


def test_the_memory_takes_what_was_read_and_nothing_else():
    rng = np.random.default_rng(0)
    bank, vectors = (jnp.asarray(rng.standard_normal((n, 3)), jnp.float32) for n in (7, 4))
    item = jnp.array([5, 0, 7, 2], jnp.int32)  # 7: none
    value, gradient = jax.value_and_grad(remembered)(bank, item, vectors)
    assert float(value) == 0.0
    updates, _ = memory().update(gradient, memory().init(bank))
    after = np.asarray(bank + updates)
    np.testing.assert_allclose(after[[5, 0, 2]], vectors[jnp.array([0, 1, 3])], atol=1e-6)
    np.testing.assert_array_equal(after[[1, 3, 4, 6]], bank[jnp.array([1, 3, 4, 6])])
    assert not np.asarray(jax.grad(remembered, argnums=2)(bank, item, vectors)).any()


@pytest.mark.parametrize("candidates", [0, 16])
def test_a_step_scores_as_if_the_table_held_its_vectors(world, candidates):
    """The loss against the towers' own on a table with the fresh vectors; its gradient reaches the encoder alone."""
    batch = source_of(world, candidates, mask_share=0.0)[0]
    known = features_of(world, first_vectors(world))
    edges = fuse_towers.row_edges(known, len(batch.told.rows)) if candidates else None
    cfg = TowerTraining(1, 4, OptimConfig(), 0.2, 1, 0)
    model = Towers(TowerConfig(width=8, max_history=8, part_dropout=0.3, candidates=candidates), ITEMS, edges)
    training = training_of(world, "full")
    towers = fuse_towers.init(cfg, model, known, jax.random.key(0))
    rng = np.random.default_rng(0)
    encoder = jax.tree.map(lambda x: x + jnp.asarray(0.1 * rng.standard_normal(x.shape), jnp.float32),
                           training.reader.init(training.weights, jax.random.key(1)))
    bank = jnp.asarray(rng.standard_normal(known.vectors["text"].shape), jnp.float32)
    others, key = dataclasses.replace(known, vectors={}), jax.random.key(2)
    params = {"towers": towers, "encoder": encoder, "bank": bank}
    run = functools.partial(fuse_encoder.loss, cfg, model, training.reader)
    constants = {"features": others, "encoder": {}}
    (found, _), gradient = jax.jit(jax.value_and_grad(run, has_aux=True))(params, constants, batch, key)
    fresh = training.reader.vectors(training.reader.merged({}, encoder), batch.input_ids, batch.attention_mask)
    table = bank.at[batch.item].set(fresh)
    plain = dataclasses.replace(known, vectors={"text": table})
    expected, _ = jax.jit(functools.partial(fuse_towers.loss, cfg, model))(towers, plain, batch.told,
                                                                           jax.random.split(key)[0])
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_allclose(bank - gradient["bank"], table, atol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    words = gradient["encoder"]["values"]["embeddings"]["word_embeddings"]["embedding"]
    assert np.abs(words).max() > 0


def test_the_words_join_the_loss(world):
    batch = source_of(world)[0]
    known, training = features_of(world, first_vectors(world)), training_of(world, "lora", mlm=True)
    model = Towers(TowerConfig(width=8, max_history=8), ITEMS)
    plain = TowerTraining(1, 4, OptimConfig(), 0.2, 1, 0)
    params = {"towers": fuse_towers.init(plain, model, known, jax.random.key(0)),
              "encoder": training.reader.init(training.weights, jax.random.key(1)), "head": training.head,
              "bank": known.vectors["text"]}
    constants = {"features": dataclasses.replace(known, vectors={}), "encoder": training.weights}
    total = {}
    for weight in (0.0, 0.5):
        cfg = dataclasses.replace(plain, mlm_weight=weight)
        total[weight], told = jax.jit(functools.partial(fuse_encoder.loss, cfg, model, training.reader))(
            params, constants, batch, jax.random.key(3))
    hidden, count = told["mlm_loss"]
    assert float(count) == batch.masked.weights.sum() and 0 < float(hidden / count) < 12
    assert float(told["mlm_weight"]) == 0.5
    assert float(total[0.5] - total[0.0]) == pytest.approx(0.5 * float(hidden / count), rel=1e-4)


# --- what a training leaves -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    return fitted(world, folder, "lora", steps=24, mlm=True, items=16, checkpoint_every=8), folder


def test_its_vectors_are_those_of_the_merged_weights(world, lora):
    part, folder = lora
    vectors = encode_texts(world.encoder, part.tuned.weights, world.tokenizer, world.texts, max_length=LENGTH)
    np.testing.assert_array_equal(part.tuned.vectors, vectors)
    assert np.abs(vectors - first_vectors(world)).max() > 1e-3
    moved = {jax.tree_util.keystr(path) for path, leaf in jax.tree_util.tree_leaves_with_path(jax.tree.map(
        lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), part.tuned.weights,
        encoders.backbone(world.encoder.config, world.encoder.params))) if leaf > 0}
    assert moved and all("attention" in path and ("query" in path or "value" in path) for path in moved), moved
    features = features_of(world, vectors)
    expected = Towers(part.cfg, ITEMS).apply({"params": part.params}, features, method=Towers.item_vectors)
    np.testing.assert_allclose(part.item_vectors, expected, atol=1e-6)
    rows = [json.loads(line) for line in (folder / "tower" / "metrics.jsonl").read_text().splitlines()]
    assert {"rec_loss", "cf_loss", "mlm_loss", "rec_weight", "cf_weight", "mlm_weight"} <= set(rows[-1])


@pytest.mark.slow
def test_it_resumes_to_the_same_weights(world, lora, tmp_path, monkeypatch):
    drawn = EncodedBatches.__getitem__

    def breaks(self, step):
        if step == 19:
            raise KeyboardInterrupt
        return drawn(self, step)

    monkeypatch.setattr(EncodedBatches, "__getitem__", breaks)
    fit = functools.partial(fitted, world, tmp_path, "lora", steps=24, mlm=True, items=16, checkpoint_every=8)
    with pytest.raises(KeyboardInterrupt):
        fit()
    monkeypatch.setattr(EncodedBatches, "__getitem__", drawn)
    again = fit()
    jax.tree.map(np.testing.assert_array_equal, again.tuned.weights, lora[0].tuned.weights)
    np.testing.assert_array_equal(again.item_vectors, lora[0].item_vectors)


def test_a_query_is_read_as_the_items_were(world, lora, tmp_path):
    names = tuple(f"i{n}" for n in range(ITEMS))
    data = types.SimpleNamespace(item_texts=tuple(world.texts), item_names=names, item_ids=names, num_items=ITEMS)
    run = make_run(tmp_path, data, world.encoder.tokenizer_folder, RELEASED, first_vectors(world))
    run.experiment.fuse.text_length = LENGTH
    index = QueryIndex.of(run, lora[0].tuned)
    np.testing.assert_allclose(index.mean, lora[0].tuned.vectors.mean(0), atol=1e-6)
    store.save(tmp_path / "held", index, (QueryIndex, QueryEncoder, type(index.words)), {})
    held = store.load(tmp_path / "held", (QueryIndex, QueryEncoder, type(index.words)))
    for row in (0, 77):
        np.testing.assert_allclose(held.reader.encode(world.texts[row]), lora[0].tuned.vectors[row], atol=1e-5)
        assert np.argmax(held._text(world.texts[row], None)) == row
    plain = QueryIndex.of(run)
    assert np.abs(plain.reader.encode(world.texts[0]) - lora[0].tuned.vectors[0]).max() > 1e-3


@pytest.mark.slow
def test_on_several_devices(world, tmp_path):
    one, many = (fitted(world, tmp_path / str(n), "lora", steps=6, devices=n, mlm=True, items=16) for n in (1, 8))
    np.testing.assert_allclose(many.tuned.vectors, one.tuned.vectors, atol=5e-4)


# --- bad input, and a whole run ---------------------------------------------------------------------------------------


def test_a_decoder_is_refused():
    gpt = GptConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(KgrecError, match="encoder: found a gpt2, expected a BERT"):
        TextReader(gpt, PeftConfig("full")).init({}, jax.random.key(0))


def test_a_rank_beyond_the_encoder_is_refused(world):
    with pytest.raises(KgrecError, match="rank: found 999, expected 1 to 48"):
        training_of(world, "lora", rank=999).reader.init({}, jax.random.key(0))


@pytest.mark.parametrize("source, why", [("", "no item has a text"), (NGRAMS, "character n-grams read the items")])
def test_without_an_encoder_that_read_the_items_it_stays_frozen(source, why):
    said = []
    run = types.SimpleNamespace(tracker=types.SimpleNamespace(say=said.append))
    experiment = Experiment(fuse=fuse.Config(encoder="lora"))
    assert EncoderTraining.of(experiment, run, source) is None and why in said[0]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_in_a_whole_run(tmp_path, method):
    world = toy_world(num_users=80, num_items=60)
    write_folder(world, tmp_path / "toy")
    encoder = make_tiny_encoder(tmp_path / "bert", [*world.item_texts, *world.graph.entity_names])
    cfg = fuse.Config(tower=TowerConfig(width=8, max_history=8, fusion="concat-mlp"), steps=8, batch=16, text_length=16,
                      text_encoder="released", gate=GateConfig(head="attention", steps=8, batch=16), encoder=method,
                      encoder_items=8, loss_weights="uncertainty")
    experiment = Experiment(encoder=str(encoder), data=DataConfig(path=str(tmp_path / "toy")), fuse=cfg,
                            pretrain=pretrain.Config(mode="off"),
                            graph=graph.Config(dim=8, steps=4, batch=32, encoder_mode="off"))
    report = pipeline.run(experiment, tmp_path / "run", quiet=True)
    assert 0 < report.models[TOWER]["ndcg@10"] <= 1
    held = Recommender.load(tmp_path / "run")
    assert held.model.tower.tuned is None
    vectors = np.load(tmp_path / "run" / "fuse" / "tower" / "text.npz")["vectors"]
    read = held.query_index.reader.encode_all(list(world.item_texts))
    np.testing.assert_allclose(read, vectors, atol=1e-5)
    np.testing.assert_allclose(held.intake.means["text"], vectors.mean(0), atol=1e-5)
    unit = vectors - vectors.mean(0)
    np.testing.assert_allclose(held.model.parts["text"].encode, unit / np.linalg.norm(unit, axis=1, keepdims=True),
                               atol=1e-5)
    rows = [json.loads(line) for line in (tmp_path / "run/fuse/tower/metrics.jsonl").read_text().splitlines()]
    assert {"mlm_loss", "mlm_weight", "rec_weight"} <= set(rows[-1])
    empty = np.flatnonzero(held.histories.matrix.getnnz(axis=1) == 0)
    assert len(empty) and np.isfinite(held.model.scores(held.histories.take(empty))).all()
    assert held.recommend(query="a western", k=2) and held.recommend(history=[held.item_names[3]], k=2)
    again = pipeline.refit(tmp_path / "run", tmp_path / "all", quiet=True)
    new = np.load(tmp_path / "all" / "tower" / "text.npz")["vectors"]
    assert np.abs(new - vectors).max() > 0
    np.testing.assert_allclose(again.query_index.reader.encode(world.item_texts[7]), new[7], atol=1e-5)
