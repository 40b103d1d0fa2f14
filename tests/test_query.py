"""Free texts against a small named world: by words, by the encoder that read the items, by character n-grams."""

import dataclasses
import types

import numpy as np
import pytest
from tiny_encoder import make_tiny_encoder

from kgrec_jax import checkpoint
from kgrec_jax.data.text import TfidfSvd, TfidfWords, load_tokenizer, tfidf_svd
from kgrec_jax.data.toy import toy_world
from kgrec_jax.errors import KgrecError
from kgrec_jax.models.text_encoder import encode_texts
from kgrec_jax.pretrained import hf
from kgrec_jax.serving import store
from kgrec_jax.serving.query import NGRAMS, RELEASED, QueryEncoder, QueryIndex

CLASSES = (QueryIndex, QueryEncoder, TfidfSvd, TfidfWords)


def make_run(folder, world, encoder="", source="", vectors=None):
    """What the index asks of a run whose fusion stage is finished."""
    def stage(name):
        (folder / name).mkdir(parents=True, exist_ok=True)
        return folder / name

    if vectors is not None:
        np.savez(stage("fuse") / "text.npz", vectors=vectors, source=source)
    said = []
    experiment = types.SimpleNamespace(encoder=str(encoder), seed=0, fuse=types.SimpleNamespace(text_length=32),
                                       pretrain=types.SimpleNamespace(mode="lora"))
    return types.SimpleNamespace(path=folder, dataset=world, experiment=experiment, stage=stage,
                                 tracker=types.SimpleNamespace(say=said.append), said=said)


def titles(index, world, query, k=5, say=None):
    matches = index.matches(query, np.zeros(world.num_items, np.int64), say)
    total = np.where(matches.found, sum(matches.parts.values()), -np.inf)
    return [world.item_names[i] for i in np.argsort(-total, kind="stable")[:k] if total[i] > -np.inf]


@pytest.fixture(scope="module")
def english():
    return toy_world()


@pytest.fixture(scope="module")
def encoder(english, tmp_path_factory):
    return make_tiny_encoder(tmp_path_factory.mktemp("query") / "bert", list(english.item_texts))


def vectors_of(folder, texts, scale=1.0):
    """(vectors, weights) of the encoder with a perturbed word table."""
    held = hf.load_encoder(folder)
    params = {name: held.params[name] for name in ("embeddings", "encoder")}
    words = params["embeddings"]["word_embeddings"]
    params["embeddings"] = params["embeddings"] | {"word_embeddings": {"embedding": words["embedding"] * scale}}
    tokenizer = load_tokenizer(folder, held.config.vocab_size)
    return encode_texts(held, params, tokenizer, texts, max_length=32), params


def test_words_alone(english, tmp_path):
    index = QueryIndex.of(make_run(tmp_path, english))
    assert index.reader is None and index.vectors is None
    wanted = english.item_names[17]
    assert titles(index, english, wanted.upper())[0] == wanted
    for title in titles(index, english, "ghosts in an old house"):
        assert "ghosts" in english.item_texts[english.item_names.index(title)]
    assert titles(index, english, "zebra") == []
    with pytest.raises(KgrecError, match="--query: found an empty text"):
        index.matches("  ", np.zeros(english.num_items))


def test_a_reason_names_the_words_that_count(english, tmp_path):
    index = QueryIndex.of(make_run(tmp_path, english))
    item = next(i for i, text in enumerate(english.item_texts) if "ghosts" in text)
    assert index.matched_words("The Ghosts of unheard-of zebras", item) == ["ghosts"]
    assert index.reason("ghosts", item, 0.0) == "Matches: ghosts"
    assert index.reason("ghosts", item, 2.0) == "Matches: ghosts; its text is close to the query"
    assert index.reason("zebra", item, 0.5) == "Its text is close to the query"
    assert index.reason("zebra", item, -0.5) == "The best of what is left"


def test_popularity_decides_among_equals(english, tmp_path):
    index = QueryIndex.of(make_run(tmp_path, english))
    popularity = np.arange(english.num_items)
    parts = index.matches("ghosts", popularity).parts
    equal = np.flatnonzero(np.isclose(parts["words"], parts["words"].max()))
    assert np.all(np.diff(parts["popularity"][equal]) > 0) and abs(parts["popularity"]).max() < 1


@pytest.mark.parametrize("source, scale", [(RELEASED, 1.0), ("pretrain", 3.0)])
def test_the_encoder_that_read_the_items_reads_the_query(english, encoder, tmp_path, source, scale):
    vectors, params = vectors_of(encoder, list(english.item_texts), scale)
    run = make_run(tmp_path / "run", english, encoder, source, vectors)
    if source != RELEASED:
        checkpoint.save_tree(run.stage(source) / "encoder", params)
    store.save(tmp_path / "held", QueryIndex.of(run), CLASSES, {})
    index = store.load(tmp_path / "held", CLASSES)
    assert index.reader.source == ""  # a folder of this machine is kept and not named
    text = english.item_texts[23]
    np.testing.assert_allclose(index.reader.encode(text), vectors[23], atol=1e-5)
    by_text = index.matches(text, np.zeros(english.num_items)).parts["text"]
    assert by_text.argmax() == 23 and abs(by_text.mean()) < 1e-6 and by_text.std() == pytest.approx(1)


def test_a_public_encoder_is_kept_by_name_and_may_be_out_of_reach(english, encoder, tmp_path, monkeypatch):
    vectors, _ = vectors_of(encoder, list(english.item_texts))
    run = make_run(tmp_path, english, "pypi:some-encoder==1.0#model", RELEASED, vectors)
    index = QueryIndex.of(run)
    assert index.reader == QueryEncoder("pypi:some-encoder==1.0#model", None, None, 32)

    def fail(*_, **__):
        raise KgrecError("some-encoder: found no network")

    monkeypatch.setattr(hf, "load_encoder", fail)
    said = []
    assert titles(index, english, english.item_names[5], say=said.append)[0] == english.item_names[5]
    assert len(said) == 1 and "no network" in said[0] and "words alone" in said[0]


def test_weights_that_are_gone_leave_the_words(english, encoder, tmp_path):
    vectors, _ = vectors_of(encoder, list(english.item_texts))
    run = make_run(tmp_path, english, encoder, "graph", vectors)
    assert QueryIndex.of(run).reader is None and "words alone" in run.said[-1]


def test_chinese_by_character_ngrams(tmp_path):
    world = toy_world(language="zh")
    vectors = tfidf_svd(list(world.item_texts), 30, 0)
    run = make_run(tmp_path / "run", world, "", NGRAMS, vectors)
    store.save(tmp_path / "held", QueryIndex.of(run), CLASSES, {})
    index = store.load(tmp_path / "held", CLASSES)
    np.testing.assert_allclose(index.reader.encode(world.item_texts), vectors, atol=1e-4)
    assert titles(index, world, world.item_names[17])[0] == world.item_names[17]
    for title in titles(index, world, "老屋里的鬼魂"):
        assert "鬼魂" in world.item_texts[world.item_names.index(title)]
    item = next(i for i, text in enumerate(world.item_texts) if "鬼魂" in text)
    assert index.matched_words("鬼魂", item) == ["鬼魂"] and index.matched_words("老屋里的鬼魂", item) == ["老屋里的鬼魂"]


def test_items_without_any_text_have_no_index(english, tmp_path):
    bare = dataclasses.replace(english, item_names=english.item_ids, item_texts=("",) * english.num_items)
    assert QueryIndex.of(make_run(tmp_path, bare)) is None


def test_korean_finds_inflected_words_by_their_characters(english, tmp_path):
    texts = ("우주에서 온 외계인의 이야기", "바다를 건너는 해적들의 모험", "요리사가 되고 싶은 생쥐", "사막을 걷는 고독한 기사",
             "학교에 다니는 마법사 소년")
    some = dataclasses.replace(english, item_ids=tuple("abcde"), item_names=tuple("abcde"), item_texts=texts)
    index = QueryIndex.of(make_run(tmp_path, some, "", NGRAMS, tfidf_svd(texts, 4, 0)))
    for query, wanted in (("외계인", "a"), ("해적", "b"), ("마법사", "e"), ("고독", "d")):
        assert titles(index, some, query)[0] == wanted
