"""Schedules, clipping, decay, frozen parts and row-wise Adagrad."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kgrec_jax.errors import KgrecError
from kgrec_jax.optim import (OptimConfig, accumulated, ema_update, layers_above, learning_rate, make_optimizer,
                             rowwise_adagrad)

PLAIN = OptimConfig(schedule="constant", warmup_share=0.0, clip_norm=0.0)


def params():
    rng = np.random.default_rng(0)
    make = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {"entity": {"embedding": make(6, 4)}, "dense": {"kernel": make(4, 3), "bias": make(3)},
            "LayerNorm": {"scale": make(4)}}


def steps(tx, tree, grads, n=1):
    with jax.numpy_dtype_promotion("standard"):
        state = tx.init(tree)
        for _ in range(n):
            updates, state = tx.update(grads, state, tree)
            tree = optax.apply_updates(tree, updates)
    return tree, state


@pytest.mark.parametrize("name,reference", [
    ("adamw", optax.adam(1e-2)), ("sgd", optax.sgd(1e-2, momentum=0.9)),
    ("adagrad", optax.adagrad(1e-2, initial_accumulator_value=0.1, eps=1e-8))])
def test_equals_optax(name, reference):
    tx = make_optimizer(dataclasses.replace(PLAIN, name=name, peak_lr=1e-2), 10)
    got, _ = steps(tx, params(), params(), 3)
    want, _ = steps(reference, params(), params(), 3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)


def test_the_first_accumulator_of_adagrad():
    """From 0 the first step of each number is the learning rate, whatever its gradient."""
    tx = make_optimizer(dataclasses.replace(PLAIN, name="adagrad", peak_lr=1e-2, accumulator=0.0), 10)
    got, _ = steps(tx, params(), params(), 1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b - 1e-2 * np.sign(b), rtol=1e-4, atol=1e-6), got, params())
    reference = optax.adagrad(1e-2, initial_accumulator_value=0.0, eps=1e-8)
    want, _ = steps(reference, params(), params(), 3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
                 steps(tx, params(), params(), 3)[0], want)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_the_learning_rate_rises_and_falls(schedule):
    rate = learning_rate(OptimConfig(peak_lr=2.0, warmup_share=0.2, schedule=schedule), 100)
    with jax.numpy_dtype_promotion("standard"):
        values = np.array([float(rate(s)) for s in range(101)])
    assert 0 < values[0] < values[10] < values[20] == pytest.approx(2.0) == values.max()
    assert values[100] == pytest.approx(2.0 if schedule == "constant" else 0.0, abs=1e-6)
    middle = {"constant": 2.0, "cosine": 1.0, "linear": 1.0}[schedule]
    assert values[60] == pytest.approx(middle, abs=1e-5)


def test_the_state_tells_the_learning_rate():
    cfg = OptimConfig(peak_lr=0.5, warmup_share=0.0, schedule="constant")
    _, state = steps(make_optimizer(cfg, 10), params(), params())
    assert float(optax.tree_utils.tree_get_all_with_path(state, "learning_rate")[0][1]) == 0.5


def test_decay_acts_on_matrices_only():
    zero = jax.tree.map(jnp.zeros_like, params())
    moved, _ = steps(make_optimizer(dataclasses.replace(PLAIN, weight_decay=0.1, peak_lr=0.5), 10), params(), zero)
    np.testing.assert_allclose(moved["dense"]["kernel"], 0.95 * params()["dense"]["kernel"], rtol=1e-6)
    np.testing.assert_allclose(moved["entity"]["embedding"], 0.95 * params()["entity"]["embedding"], rtol=1e-6)
    np.testing.assert_array_equal(moved["dense"]["bias"], params()["dense"]["bias"])
    np.testing.assert_array_equal(moved["LayerNorm"]["scale"], params()["LayerNorm"]["scale"])


def test_frozen_parts_stay_and_do_not_count_in_the_norm():
    cfg = dataclasses.replace(PLAIN, name="sgd", b1=0.0, peak_lr=1.0, clip_norm=1.0, weight_decay=0.1,
                              frozen_patterns=("^dense/",))
    grads = jax.tree.map(jnp.ones_like, params())
    grads["dense"] = jax.tree.map(lambda g: g * 1e6, grads["dense"])
    moved, _ = steps(make_optimizer(cfg, 10), params(), grads)
    np.testing.assert_array_equal(moved["dense"]["kernel"], params()["dense"]["kernel"])
    scale = params()["LayerNorm"]["scale"] - moved["LayerNorm"]["scale"]
    np.testing.assert_allclose(scale, 1 / np.sqrt(28), rtol=1e-5)  # 24 entries of the table and 4 of the scale


def test_rowwise_adagrad_against_numpy():
    tx = optax.chain(rowwise_adagrad(), optax.scale(-0.1))
    table, total = np.asarray(params()["entity"]["embedding"], np.float64), np.zeros((6, 1))
    tree = {"entity": jnp.asarray(table, jnp.float32)}
    state = tx.init(tree)
    for seed in range(4):
        grad = np.random.default_rng(seed).normal(size=(6, 4))
        grad[seed] = 0.0
        updates, state = tx.update({"entity": jnp.asarray(grad, jnp.float32)}, state, tree)
        tree = optax.apply_updates(tree, updates)
        total += (grad**2).mean(1, keepdims=True)
        table -= np.where(total > 0, 0.1 * grad / np.sqrt(np.maximum(total, 1e-30)), 0.0)
    np.testing.assert_allclose(tree["entity"], table, rtol=1e-5)
    assert state[0].sum_of_squares["entity"].shape == (6, 1)


def test_tables_have_an_optimiser_of_their_own():
    cfg = dataclasses.replace(PLAIN, table_name="rowwise-adagrad", table_patterns=("embedding$",), table_peak_lr=0.1)
    grads = jax.tree.map(jnp.zeros_like, params())
    grads["entity"]["embedding"] = grads["entity"]["embedding"].at[2].set(3.0)
    grads["dense"]["kernel"] = grads["dense"]["kernel"] + 1.0
    moved, state = steps(make_optimizer(cfg, 10), params(), grads)
    change = moved["entity"]["embedding"] - params()["entity"]["embedding"]
    np.testing.assert_allclose(change[2], -0.1, rtol=1e-5)
    assert not change[jnp.arange(6) != 2].any()
    np.testing.assert_allclose(moved["dense"]["kernel"] - params()["dense"]["kernel"], -1e-3, rtol=1e-3)
    sizes = sum(x.size for x in jax.tree.leaves(state))
    assert sizes < 2 * (12 + 3 + 4) + 6 + 8  # Adam's moments of the dense part, six rows, a few scalars


@pytest.mark.parametrize("change,words", [
    ({"peak_lr": -1.0}, "optim.peak_lr: found -1.0"), ({"warmup_share": 1.5}, "optim.warmup_share: found 1.5"),
    ({"layer_decay": 1.1}, "optim.layer_decay: found 1.1"),
    ({"peak_lr": float("nan")}, "optim.peak_lr"), ({"table_patterns": ("(",)}, "optim.table_patterns")])
def test_bad_fields(change, words):
    with pytest.raises(KgrecError) as error:
        make_optimizer(dataclasses.replace(OptimConfig(), **change), 10)
    assert words in str(error.value)


ENCODER = {"embeddings": {"word_embeddings": {"embedding": (5, 4)}},
           "encoder": {"layer": {"0": {"dense": {"kernel": (4, 4), "bias": (4,)}},
                                 "10": {"dense": {"kernel": (4, 4)}}}},
           "cls": {"bias": (5,)}}


def ones(shapes):
    return jax.tree.map(jnp.ones, shapes, is_leaf=lambda x: isinstance(x, tuple))


def test_lower_layers_move_less():
    cfg = dataclasses.replace(PLAIN, name="sgd", b1=0.0, peak_lr=1.0, layer_decay=0.5)
    tree = ones(ENCODER)
    moved, _ = steps(make_optimizer(cfg, 10), tree, tree)
    change = jax.tree.map(lambda a, b: float((a - b).ravel()[0]), tree, moved)
    assert change["cls"]["bias"] == 1 and change["encoder"]["layer"]["10"]["dense"]["kernel"] == 0.5
    assert change["encoder"]["layer"]["0"]["dense"]["bias"] == pytest.approx(0.5**11, rel=1e-6)
    assert change["embeddings"]["word_embeddings"]["embedding"] == pytest.approx(0.5**12, rel=1e-6)
    gpt = layers_above({"wte": {"embedding": 0}, "h": {"0": {"attn": 0}, "1": {"attn": 0}}, "ln_f": {"scale": 0}})
    assert gpt == {"wte": {"embedding": 3}, "h": {"0": {"attn": 2}, "1": {"attn": 1}}, "ln_f": {"scale": 0}}


def test_patterns_spare_from_decay():
    cfg = dataclasses.replace(PLAIN, weight_decay=0.1, peak_lr=0.5, no_decay_patterns=("^entity/",))
    moved, _ = steps(make_optimizer(cfg, 10), params(), jax.tree.map(jnp.zeros_like, params()))
    np.testing.assert_array_equal(moved["entity"]["embedding"], params()["entity"]["embedding"])
    np.testing.assert_allclose(moved["dense"]["kernel"], 0.95 * params()["dense"]["kernel"], rtol=1e-6)


def masked_loss(tree, constants, batch, key):
    """A mean over entries that count, of which rows have different numbers."""
    out = jnp.tanh(batch["x"] @ tree["dense"]["kernel"] + tree["dense"]["bias"][None] + constants)
    each = jnp.square(out) * batch["weights"]
    return each.sum() / jnp.maximum(batch["weights"].sum(), 1.0), {
        "loss": (each.sum(), batch["weights"].sum()), "half": jnp.float32(0.5)}


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_accumulated_gradients_are_those_of_the_whole_batch(parts):
    rng = np.random.default_rng(1)
    weights = (rng.random((12, 3)) < 0.4).astype(np.float32)
    weights[0::2] = 0  # with two parts, one of them counts nothing
    batch = {"x": jnp.asarray(rng.normal(size=(12, 4)), jnp.float32), "weights": jnp.asarray(weights),
             "n": jnp.ones(())}
    args = params(), jnp.float32(0.1), batch, jax.random.key(0)
    (want, _), whole = jax.value_and_grad(masked_loss, has_aux=True)(*args)
    (got, pairs), grads = jax.jit(accumulated(masked_loss, parts))(*args)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, whole)
    assert float(pairs["loss"][1]) == weights.sum() and float(pairs["half"][0] / pairs["half"][1]) == 0.5


def test_what_cannot_be_accumulated():
    batch = {"x": jnp.ones((4, 4)), "weights": jnp.ones((4, 3))}
    with pytest.raises(KgrecError, match="found a batch of 4 rows, expected a multiple of 3"):
        accumulated(masked_loss, 3)(params(), jnp.float32(0), batch, jax.random.key(0))
    with pytest.raises(KgrecError, match="found a loss without its"):
        accumulated(lambda *args: (masked_loss(*args)[0], {}), 2)(params(), jnp.float32(0), batch, jax.random.key(0))


def test_the_moving_average_against_numpy():
    average, wanted = {"a": jnp.zeros(3)}, np.zeros(3)
    for step in range(1, 40):
        value = np.random.default_rng(step).normal(size=3).astype(np.float32)
        average = ema_update(average, {"a": jnp.asarray(value)}, jnp.int32(step), 0.7)
        keep = min(0.7, (1 + step) / (10 + step))
        wanted = keep * wanted + (1 - keep) * value
    np.testing.assert_allclose(average["a"], wanted, rtol=1e-5)
