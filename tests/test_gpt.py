"""The decoder against Hugging Face's outputs, and what a causal model must not see."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from tiny_encoder import ORACLE, write_checkpoint

from kgrec_jax import KgrecError, losses
from kgrec_jax.models import encoders, gpt
from kgrec_jax.models.encoder_config import GptConfig
from kgrec_jax.pretrained import load_encoder
from kgrec_jax.sharding import MeshConfig, make_mesh, put, put_batch, shardings

FLAGS = {"": {}, "inverse_": {"scale_attn_by_inverse_layer_idx": True}, "unscaled_": {"scale_attn_weights": False},
         "upcast_": {"reorder_and_upcast_attn": True}, "relu_": {"activation_function": "relu"}}


@functools.cache
def oracle():
    with np.load(ORACLE / "gpt2" / "reference_outputs.npz") as saved:
        return load_encoder(ORACLE / "gpt2"), {name: saved[name] for name in saved}


@functools.partial(jax.jit, static_argnames=("config", "deterministic"))
def apply(params, ids, mask, *soft, config=None, **kwargs):
    return gpt.Gpt(config or oracle()[0].config).apply({"params": params}, jnp.asarray(ids), jnp.asarray(mask), *soft,
                                                       **kwargs)


def words():
    encoder, wanted = oracle()
    return encoder, wanted["input_ids"], wanted["attention_mask"]


@pytest.mark.parametrize("label", list(FLAGS))
def test_every_field_that_changes_the_function_is_honoured(label):
    encoder, wanted = oracle()
    fields = json.loads((ORACLE / "gpt2" / "config.json").read_text()) | FLAGS[label]
    encoder = dataclasses.replace(encoder, config=GptConfig.from_hf(fields))
    states = jax.jit(encoder.hidden_states)(encoder.params, wanted["input_ids"], wanted["attention_mask"])
    for i, state in enumerate(states):
        np.testing.assert_allclose(state, wanted[f"{label}hidden_{i}"], rtol=0, atol=2e-5)
    logits = encoders.logits(encoder.config, encoder.params, states[-1])
    np.testing.assert_allclose(logits, wanted[f"{label}prediction_logits"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("field, value", [
    ("activation_function", "gelu_fast"), ("tie_word_embeddings", False), ("add_cross_attention", True),
    ("n_embd", 33), ("n_layer", 0), ("n_inner", "48"), ("scale_attn_weights", 1), ("layer_norm_epsilon", -1.0),
    ("quantization_config", {"bits": 4})])
def test_what_it_cannot_compute_is_refused_by_name(tmp_path, field, value):
    fields = json.loads((ORACLE / "gpt2" / "config.json").read_text()) | {field: value}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(KgrecError, match=f"{'n_head' if field == 'n_embd' else field}: found"):
        load_encoder(tmp_path)


def test_the_config_survives_its_own_json_and_null_is_four_times_the_width():
    config = GptConfig(hidden_size=24, intermediate_size=10, hidden_act="relu", scale_attn_weights=False)
    assert GptConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    fields = GptConfig().to_hf() | {"n_inner": None, "n_embd": 48}
    assert GptConfig.from_hf(fields).intermediate_size == 192


def test_later_words_and_padding_are_not_seen():
    encoder, ids, mask = words()
    states = apply(encoder.params, ids, mask)[-1]
    later, padding = ids.copy(), np.where(mask > 0, ids, 7)
    later[:, 5:] = (ids[:, 5:] + 3) % 140
    np.testing.assert_array_equal(states[:, :5], apply(encoder.params, later, mask)[-1][:, :5])
    np.testing.assert_array_equal(states[mask > 0], apply(encoder.params, padding, mask)[-1][mask > 0])
    assert np.abs(states[0, 5:] - apply(encoder.params, later, mask)[-1][0, 5:]).max() > 0.1


def test_the_loss_over_the_word_table_is_that_of_the_logits():
    encoder, ids, mask = words()
    states = apply(encoder.params, ids, mask)[-1]
    hidden = states[:, :-1].reshape(-1, 32)
    targets, counts = ids[:, 1:].reshape(-1), mask[:, 1:].reshape(-1).astype(np.float32)
    queries, bias = encoders.queries(encoder.config, encoder.params, hidden)
    assert bias is None
    each = losses.table_cross_entropy(queries, encoders.word_table(encoder.config, encoder.params), targets,
                                      weights=counts, bias=bias)
    logits = np.asarray(jax.jit(encoder.causal_logits)(encoder.params, ids, mask))
    np.testing.assert_allclose(logits, oracle()[1]["prediction_logits"], rtol=0, atol=2e-5)
    wanted = -scipy.special.log_softmax(logits[:, :-1].reshape(-1, 140), axis=-1)
    np.testing.assert_allclose(each, wanted[np.arange(len(targets)), targets] * counts, rtol=0, atol=3e-5)


def test_a_soft_token_stands_for_a_word():
    encoder, ids, mask = words()
    positions = np.array([[1, -1], [3, 0], [-1, -1], [0, -1]], np.int32)
    table = np.asarray(gpt.word_table(encoder.params))
    own = table[np.take_along_axis(ids, np.maximum(positions, 0), axis=1)]
    for a, b in zip(apply(encoder.params, ids, mask, own, positions), apply(encoder.params, ids, mask), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    other = own + np.random.default_rng(0).normal(size=own.shape).astype(np.float32)
    moved = np.abs(apply(encoder.params, ids, mask, other, positions)[-1] - apply(encoder.params, ids, mask)[-1])
    assert moved[0, 0].max() < 1e-5 and moved[0, 1:].max(-1).min() > 1e-3 and moved[2].max() < 1e-5


def test_dropout_and_bfloat16():
    encoder, ids, mask = words()

    def run(seed):
        return apply(encoder.params, ids, mask, deterministic=False, rngs={"dropout": jax.random.key(seed)})[-1]

    np.testing.assert_array_equal(run(0), run(0))
    assert np.abs(run(0) - run(1)).max() > 0.1
    half = dataclasses.replace(encoder, dtype="bfloat16")
    narrow = jax.jit(half.hidden_states)(encoder.params, ids, mask)[-1]
    wide = apply(encoder.params, ids, mask)[-1]
    assert narrow.dtype == jnp.bfloat16 and np.abs(np.asarray(narrow, np.float32) - wide).mean() < 0.05


def test_a_mesh_changes_nothing():
    encoder, ids, mask = words()
    mesh = make_mesh(MeshConfig(data=2, model=4))
    placed = put(encoder.params, shardings(encoder.params, mesh, encoders.rules(encoder.config)))
    kernel = placed["h"]["0"]["mlp"]["c_fc"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (32, 12)
    with jax.set_mesh(mesh):
        state = apply(placed, *put_batch((ids, mask), mesh))[-1]
    np.testing.assert_allclose(state, apply(encoder.params, ids, mask)[-1], rtol=0, atol=1e-5)


def test_fresh_weights_have_the_papers_spread():
    config = GptConfig(vocab_size=500, hidden_size=64, num_hidden_layers=1, num_attention_heads=4,
                       intermediate_size=256, initializer_range=0.1)
    params = jax.jit(functools.partial(encoders.init, config, head=True))(jax.random.key(0))
    assert set(params) == {"wte", "wpe", "h", "ln_f"} and encoders.has_head(config, params)
    assert np.std(params["wte"]["embedding"]) == pytest.approx(0.1, rel=0.05)
    assert np.std(params["h"]["0"]["mlp"]["c_proj"]["kernel"]) == pytest.approx(0.1 / np.sqrt(2), rel=0.05)
    again = jax.tree.map(lambda leaf: leaf.shape, encoders.shapes(config))
    assert again == jax.tree.map(lambda leaf: leaf.shape, params)


def test_what_is_asked_of_the_wrong_kind(tmp_path):
    encoder, ids, mask = words()
    with pytest.raises(KgrecError, match="masked-LM head"):
        encoder.mlm_logits(encoder.params, ids, mask)
    bert = load_encoder(ORACLE / "torch-mlm")
    with pytest.raises(KgrecError, match="found a bert.*expected a causal model"):
        bert.causal_logits(bert.params, ids, mask)
    with pytest.raises(KgrecError, match="31 tokens: this encoder has 30 positions"):
        encoder.hidden_states(encoder.params, np.zeros((1, 31), np.int32), np.ones((1, 31), np.int32))
    with pytest.raises(KgrecError, match="missing: h/0/attn/c_attn/bias, .* and 31 more; extra"):
        load_encoder(write_checkpoint(tmp_path / "x", encoder.config.to_hf(), {"wpe.weight": np.ones((30, 32), "f4")}))
