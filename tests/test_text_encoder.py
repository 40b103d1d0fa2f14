"""Vectors of texts against one text at a time without padding."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoints import make_checkpoint
from tiny_encoder import make_tiny_encoder

from kgrec_jax import KgrecError
from kgrec_jax.data.text import coverage, load_tokenizer
from kgrec_jax.models import encoders, text_encoder
from kgrec_jax.models.encoder_config import BertConfig, GptConfig
from kgrec_jax.models.text_encoder import encode_texts
from kgrec_jax.pretrained import load_encoder
from kgrec_jax.sharding import MeshConfig, make_mesh

TEXTS = ["a cat", "", "the dog sat on the log " * 6, "the cat sat on the mat and the dog ran", " ", "dog", "mat " * 18]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    encoder = load_encoder(make_tiny_encoder(tmp_path_factory.mktemp("e") / "tiny", TEXTS))
    return encoder, load_tokenizer(encoder.tokenizer_folder, encoder.config.vocab_size)


@functools.partial(jax.jit, static_argnums=0)
def last_states(config, params, ids):
    return encoders.hidden_states(config, params, ids, jnp.ones_like(ids))[-1]


def one_by_one(encoder, tokenizer, max_length):
    out = np.zeros((len(TEXTS), encoder.config.hidden_size), np.float32)
    for i, text in enumerate(TEXTS):
        if text.strip():
            ids = jnp.asarray(tokenizer.encode([text], max_length), jnp.int32)
            mean = np.asarray(last_states(encoder.config, encoder.params, ids)[0]).mean(0)
            out[i] = mean / np.linalg.norm(mean)
    return out


@pytest.mark.parametrize("max_length", [8, 128])
def test_vectors_are_those_of_each_text_alone(tiny, max_length):
    encoder, tokenizer = tiny
    done = []
    found = encode_texts(encoder, encoder.params, tokenizer, TEXTS, max_length=max_length, batch_size=2,
                         progress=done.append)
    # 128 tokens are more than this encoder's 40 positions: it reads what it can.
    np.testing.assert_allclose(found, one_by_one(encoder, tokenizer, min(max_length, 40)), rtol=0, atol=2e-6)
    assert not found[1].any() and not found[4].any() and sum(done) == len(TEXTS)


@pytest.mark.parametrize("kind", ["roberta", "distilbert", "gpt2"])
def test_every_family_reads_with_its_own_tokenizer(kind, tmp_path):
    encoder = load_encoder(make_checkpoint(kind, tmp_path / "x", TEXTS))
    tokenizer = load_tokenizer(encoder.tokenizer_folder, encoder.config.vocab_size)
    found = encode_texts(encoder, encoder.params, tokenizer, TEXTS, max_length=16, batch_size=8)
    ids, mask = tokenizer.pad(tokenizer.encode([TEXTS[0], TEXTS[3]], 16), 16)
    if kind != "gpt2":
        assert ids[0, 0] == tokenizer.cls_id and ids[0, mask[0].sum() - 1] == tokenizer.sep_id and tokenizer.mask_id > 0
    states = np.asarray(jax.jit(encoder.hidden_states)(encoder.params, ids, mask)[-1])
    for row, state, length in zip((0, 3), states, mask.sum(1), strict=True):
        vector = state[length - 1] if kind == "gpt2" else state[:length].mean(0)
        np.testing.assert_allclose(found[row], vector / np.linalg.norm(vector), rtol=0, atol=2e-6)
    assert not found[1].any() and not found[4].any()
    if kind == "gpt2":
        assert tokenizer.mask_id == -1 and tokenizer.unk_id == -1 and tokenizer.pad_id == 0
        assert coverage(tokenizer, TEXTS).unk_share == 0


def test_pooling():
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 5)), jnp.float32)
    mask = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    by_hand = {"mean": [hidden[0].mean(0), hidden[1, :2].mean(0)], "cls": [hidden[0, 0], hidden[1, 0]],
               "last": [hidden[0, 3], hidden[1, 1]]}
    for kind, rows in by_hand.items():
        found = encoders.pool(BertConfig(), hidden, mask, kind)
        for row, vector in zip(found, rows, strict=False):
            np.testing.assert_allclose(row, vector / jnp.linalg.norm(vector), rtol=0, atol=1e-6)
        assert not found[2].any()
    for config, kind in ((BertConfig(), "mean"), (GptConfig(), "last")):
        np.testing.assert_array_equal(encoders.pool(config, hidden, mask), encoders.pool(config, hidden, mask, kind))
    with pytest.raises(KgrecError, match="pooling: found 'max', expected one of auto, mean, cls, last"):
        encoders.pool(BertConfig(), hidden, mask, "max")


def test_neither_batch_size_nor_mesh_matters(tiny):
    encoder, tokenizer = tiny
    encode = functools.partial(encode_texts, encoder, encoder.params, tokenizer, TEXTS)
    one = encode(max_length=16, batch_size=4)
    np.testing.assert_array_equal(encode(max_length=16, batch_size=4), one)
    np.testing.assert_allclose(encode(max_length=16, batch_size=7), one, rtol=0, atol=1e-6)
    mesh = make_mesh(MeshConfig(data=4, model=2))
    np.testing.assert_allclose(encode(max_length=16, batch_size=3, mesh=mesh), one, rtol=0, atol=1e-6)
    assert encode_texts(encoder, encoder.params, tokenizer, []).shape == (0, 48)


@pytest.mark.parametrize("longest", [12, 40, 128, 256])
def test_padded_lengths_cost_the_least_of_all_ladders(longest, monkeypatch):
    monkeypatch.setattr(text_encoder, "SHAPE_PRICE", 300)
    powers = {16 << k for k in range(16) if 16 << k < longest} | {longest}
    every = sorted({*range(16, longest, 16), *powers})
    rng = np.random.default_rng(longest)
    lengths = np.minimum(rng.geometric(1 / 50, 60), longest)
    total = lambda ladder: sum(ladder[np.searchsorted(ladder, n)] for n in lengths)  # noqa: E731
    price = lambda ladder: 300 * len(set(ladder) - powers)  # noqa: E731
    found = text_encoder.padded_lengths(lengths, longest)
    extra = [rung for rung in every if rung not in powers]
    ladders = [sorted(powers | set(more)) for k in range(4) for more in itertools.combinations(extra, k)]
    assert sorted(found) == found and set(found) <= set(every) and found[-1] >= lengths.max()
    assert total(found) + price(found) <= min(total(ladder) + price(ladder) for ladder in ladders)
    assert text_encoder.padded_lengths(lengths[:0], longest) == []
    if longest == 256:
        assert set(found) - powers  # sixty texts of some fifty tokens are worth another length at this price


def test_long_texts_are_fewer_in_a_step(tiny, monkeypatch):
    encoder, tokenizer = tiny
    monkeypatch.setattr(text_encoder, "FULL_LENGTH", 16)
    shapes = []
    real = text_encoder.encode_batch
    monkeypatch.setattr(text_encoder, "encode_batch",
                        lambda *args, **kw: shapes.append(args[3].shape) or real(*args, **kw))
    texts = ["red fox " * 30] * 5 + ["red fox"] * 5
    found = encode_texts(encoder, encoder.params, tokenizer, texts, max_length=40, batch_size=4)
    assert shapes == [(1, 40)] * 5 + [(4, 16)] * 2 and np.abs(found).sum(1).all()
    np.testing.assert_allclose(found[4], found[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(found[5:], found[5:6].repeat(5, 0), rtol=0, atol=1e-6)
    assert encoder.config.max_position_embeddings == 40
