"""The encoder against a float64 transcription of the formulas, soft tokens, dropout, meshes."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from kgrec_jax import KgrecError
from kgrec_jax.models import bert, encoders
from kgrec_jax.sharding import MeshConfig, make_mesh, put, put_batch, shardings

CONFIG = bert.BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
                         intermediate_size=24, max_position_embeddings=12, type_vocab_size=3, initializer_range=0.5)
NUMPY_ACTIVATIONS = {
    "gelu": lambda x: x * scipy.special.ndtr(x),
    "gelu_new": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x * scipy.special.expit(x),
}


@functools.cache
def weights(config=CONFIG):
    """Weights in which no bias and no scale is what it would be without them."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):  # NumPy's, because a compilation of their initialisers takes longer than most tests here
        mean, spread = {"scale": (1, 0.1), "bias": (0, 0.1)}.get(path[-1].key, (0, config.initializer_range))
        return jnp.asarray(mean + spread * rng.normal(size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, encoders.shapes(config, head=True))


def inputs(seed=0, batch=8, length=9):
    rng = np.random.default_rng(seed)
    mask = (np.arange(length) < rng.integers(3, length + 1, batch)[:, None]).astype(np.int32)
    ids, types = (rng.integers(bound, size=(batch, length)).astype(np.int32) for bound in (30, 3))
    return ids, mask, types


@functools.partial(jax.jit, static_argnames=("config", "deterministic"))
def apply(params, *args, config=CONFIG, **kwargs):
    return bert.Bert(config).apply({"params": params}, *map(jnp.asarray, args), **kwargs)


def numpy_bert(config, params, ids, mask, types):
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    act = NUMPY_ACTIVATIONS[config.hidden_act]

    def norm(x, w):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt(x.var(-1, keepdims=True) + config.layer_norm_eps) * w["scale"] + w["bias"]

    def dense(x, w):
        return x @ w["kernel"] + w["bias"]

    e = p["embeddings"]
    x = norm(e["word_embeddings"]["embedding"][ids] + e["position_embeddings"]["embedding"][: ids.shape[1]]
             + e["token_type_embeddings"]["embedding"][types], e["LayerNorm"])
    states, heads = [x], config.num_attention_heads
    for i in range(config.num_hidden_layers):
        w = p["encoder"]["layer"][str(i)]
        q, k, v = (dense(x, w["attention"]["self"][name]).reshape(*ids.shape, heads, -1).transpose(0, 2, 1, 3)
                   for name in ("query", "key", "value"))
        scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1]) + np.where(mask > 0, 0, -1e30)[:, None, None]
        context = (scipy.special.softmax(scores, -1) @ v).transpose(0, 2, 1, 3).reshape(x.shape)
        x = norm(dense(context, w["attention"]["output"]["dense"]) + x, w["attention"]["output"]["LayerNorm"])
        x = norm(dense(act(dense(x, w["intermediate"]["dense"])), w["output"]["dense"]) + x, w["output"]["LayerNorm"])
        states.append(x)
    head = p["cls"]["predictions"]
    query = norm(act(dense(x, head["transform"]["dense"])), head["transform"]["LayerNorm"])
    return states, query @ e["word_embeddings"]["embedding"].T + head["bias"]


@pytest.mark.parametrize("act, eps", [("gelu", 1e-12), ("gelu_new", 0.05), ("relu", 1e-12), ("silu", 0.05)])
def test_fields_of_the_config_are_honoured(act, eps):
    config = dataclasses.replace(CONFIG, hidden_act=act, layer_norm_eps=eps)
    wanted, wanted_logits = numpy_bert(config, weights(), *inputs())
    states = apply(weights(), *inputs(), config=config)
    for state, want in zip(states, wanted, strict=True):
        np.testing.assert_allclose(state, want, rtol=0, atol=2e-5)
    np.testing.assert_allclose(bert.mlm_logits(config, weights(), states[-1]), wanted_logits, rtol=0, atol=5e-5)


@pytest.mark.parametrize("kind", ["roberta", "distilbert"])
def test_a_position_offset_and_no_token_types(kind):
    """RoBERTa counts from the row behind its padding's, whatever stands before a text; DistilBERT has no types."""
    ids, mask, types = inputs()
    params = jax.tree.map(lambda x: x, weights())
    embeddings = dict(params["embeddings"])
    if kind == "roberta":
        config = dataclasses.replace(CONFIG, model_type=kind, pad_token_id=2, position_offset=3)
        rows = embeddings["position_embeddings"]["embedding"]
        shifted = np.concatenate([np.full((3, 16), 9.0, np.float32), rows])
        other = {**embeddings, "position_embeddings": {"embedding": shifted}}
    else:
        config = dataclasses.replace(CONFIG, model_type=kind, type_vocab_size=0)
        types = np.zeros_like(types)
        other = {name: tree for name, tree in embeddings.items() if name != "token_type_embeddings"}
        first = embeddings["token_type_embeddings"]["embedding"][0]
        other["word_embeddings"] = {"embedding": embeddings["word_embeddings"]["embedding"] + first[None]}
    read = mask > 0
    found = apply({**params, "embeddings": other}, ids, mask, types, config=config)[-1]
    np.testing.assert_allclose(found[read], apply(params, ids, mask, types)[-1][read], rtol=0, atol=1e-5)
    if kind == "roberta":  # padding on the left is none of its business
        left = [np.pad(x, ((0, 0), (3, 0))) for x in (ids, mask, types)]
        again = apply({**params, "embeddings": other}, *left, config=config)[-1][:, 3:]
        np.testing.assert_allclose(again[read], found[read], rtol=0, atol=1e-5)


def test_the_interface_of_all_encoders_is_that_of_the_module():
    ids, mask, types = inputs()
    states = jax.jit(encoders.hidden_states, static_argnums=0)(CONFIG, weights(), ids, mask, types)
    np.testing.assert_allclose(states[-1], apply(weights(), ids, mask, types)[-1], rtol=0, atol=1e-5)
    queries, bias = encoders.queries(CONFIG, weights(), states[-1])
    logits = queries @ encoders.word_table(CONFIG, weights()).T + bias[None, None]
    np.testing.assert_allclose(logits, encoders.logits(CONFIG, weights(), states[-1]), rtol=0, atol=1e-4)
    assert encoders.backbone(CONFIG, weights()).keys() == {"embeddings", "encoder"}
    assert encoders.has_head(CONFIG, weights()) and not encoders.has_head(CONFIG, encoders.backbone(CONFIG, weights()))
    with pytest.raises(KgrecError, match="model_type: found 'gpt2', expected one of bert"):
        bert.BertConfig(model_type="gpt2")


def test_gathering_the_masked_positions_first_gives_the_same_logits():
    hidden = apply(weights(), *inputs())[-1]
    positions = jnp.array([[0, 2]] * 8)
    logits = bert.mlm_logits(CONFIG, weights(), bert.gather_positions(hidden, positions))
    np.testing.assert_allclose(logits, bert.mlm_logits(CONFIG, weights(), hidden)[:, [0, 2]], rtol=0, atol=1e-5)


def test_what_stands_at_padding_is_not_read():
    ids, mask, types = inputs()
    other = np.where(mask > 0, ids, (ids + 7) % 30)
    read = mask > 0
    np.testing.assert_array_equal(np.asarray(apply(weights(), ids, mask, types)[-1])[read],
                                  np.asarray(apply(weights(), other, mask, types)[-1])[read])


def test_a_soft_token_stands_for_a_word():
    """A word's own embedding as a soft vector changes nothing; another vector acts like a new row of the word table."""
    ids, mask, types = inputs()
    table = np.asarray(bert.word_table(weights()))
    positions = np.array([[1, 3, -1]] * 7 + [[-1, -1, -1]], np.int32)
    own = table[np.take_along_axis(ids, np.maximum(positions, 0), axis=1)]
    own[:, 2] = np.nan  # an unused slot is not read
    plain = apply(weights(), ids, mask, types)
    for a, b in zip(apply(weights(), ids, mask, types, own, positions), plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-6)

    soft = np.random.default_rng(1).normal(size=(8, 3, 16)).astype(np.float32)
    grown = dataclasses.replace(CONFIG, vocab_size=30 + 24)
    params = jax.tree.map(lambda x: x, weights())
    words = {"embedding": np.concatenate([table, soft.reshape(24, 16)])}
    params["embeddings"] = {**params["embeddings"], "word_embeddings": words}
    as_words = ids.copy()
    for b in range(8):
        for s in range(3):
            if positions[b, s] >= 0:
                as_words[b, positions[b, s]] = 30 + 3 * b + s
    wanted = apply(params, as_words, mask, types, config=grown)
    for a, b in zip(apply(weights(), ids, mask, types, soft, positions), wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-6)


def test_gradients_reach_soft_vectors_and_not_the_words_that_they_replace():
    ids, mask, types = inputs(batch=1)
    ids[0] = np.arange(9)

    def total(table, soft):
        params = {**weights(), "embeddings": {**weights()["embeddings"], "word_embeddings": {"embedding": table}}}
        return (apply(params, ids, mask, types, soft, jnp.array([[2, -1]]))[-1][0, 0] ** 3).sum()

    to_table, to_soft = jax.grad(total, (0, 1))(bert.word_table(weights()), jnp.ones((1, 2, 16)))
    assert np.abs(to_soft[0, 0]).max() > 1e-4 and not np.any(to_soft[0, 1])
    assert np.abs(to_table[1]).max() > 1e-4 and not np.any(to_table[2])


def test_dropout_is_a_function_of_its_key():
    def run(seed):
        return np.asarray(apply(weights(), *inputs(), deterministic=False, rngs={"dropout": jax.random.key(seed)})[-1])

    np.testing.assert_array_equal(run(0), run(0))
    assert np.abs(run(0) - run(1)).max() > 0.1


def test_bfloat16_is_near_float32():
    wide, narrow = apply(weights(), *inputs())[-1], bert.Bert(CONFIG, jnp.bfloat16).apply(
        {"params": weights()}, *map(jnp.asarray, inputs()))[-1]
    assert narrow.dtype == jnp.bfloat16 and np.abs(np.asarray(narrow, np.float32) - wide).mean() < 0.05


@pytest.mark.parametrize("data, model", [(8, 1), (2, 4)])
def test_a_mesh_changes_nothing(data, model):
    mesh = make_mesh(MeshConfig(data=data, model=model))
    placed = put(weights(), shardings(weights(), mesh, bert.BERT_RULES))
    kernel = placed["encoder"]["layer"]["0"]["intermediate"]["dense"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (16, 24 // model)
    with jax.set_mesh(mesh):
        state = apply(placed, *put_batch(inputs(), mesh))[-1]
    np.testing.assert_allclose(state, apply(weights(), *inputs())[-1], rtol=0, atol=1e-5)


def test_bad_calls():
    ids = np.zeros((1, 13), np.int32)
    with pytest.raises(KgrecError, match="13 tokens: this encoder has 12 positions"):
        apply(weights(), ids, ids, ids)
    with pytest.raises(KgrecError, match="soft_vectors and soft_positions"):
        apply(weights(), *inputs(), jnp.zeros((8, 1, 16)))
