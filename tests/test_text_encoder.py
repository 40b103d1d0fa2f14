"""Vectors of texts against one text at a time without padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_encoder import make_tiny_encoder

from kgrec_jax.data.text import load_tokenizer
from kgrec_jax.models.text_encoder import encode_texts
from kgrec_jax.pretrained import load_encoder
from kgrec_jax.sharding import MeshConfig, make_mesh

TEXTS = ["a cat", "", "the dog sat on the log " * 6, "the cat sat on the mat and the dog ran", " ", "dog", "mat " * 18]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    encoder = load_encoder(make_tiny_encoder(tmp_path_factory.mktemp("e") / "tiny", TEXTS))
    return encoder, load_tokenizer(encoder.tokenizer_folder, encoder.config.vocab_size)


def one_by_one(encoder, tokenizer, max_length):
    out = np.zeros((len(TEXTS), encoder.config.hidden_size), np.float32)
    for i, text in enumerate(TEXTS):
        if text.strip():
            ids = jnp.asarray(tokenizer.encode([text], max_length), jnp.int32)
            states = jax.jit(encoder.hidden_states)(encoder.params, ids, jnp.ones_like(ids), jnp.zeros_like(ids))
            mean = np.asarray(states[-1][0]).mean(0)
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


def test_neither_batch_size_nor_mesh_matters(tiny):
    encoder, tokenizer = tiny
    encode = functools.partial(encode_texts, encoder, encoder.params, tokenizer, TEXTS)
    one = encode(max_length=16, batch_size=4)
    np.testing.assert_array_equal(encode(max_length=16, batch_size=4), one)
    np.testing.assert_allclose(encode(max_length=16, batch_size=7), one, rtol=0, atol=1e-6)
    mesh = make_mesh(MeshConfig(data=4, model=2))
    np.testing.assert_allclose(encode(max_length=16, batch_size=3, mesh=mesh), one, rtol=0, atol=1e-6)
    assert encode_texts(encoder, encoder.params, tokenizer, []).shape == (0, 48)
