"""table_cross_entropy against the naive form, on one device and on meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kgrec_jax import losses
from kgrec_jax.sharding import MeshConfig, make_mesh, put, shardings, TABLE, P

KEEP = pytest.mark.parametrize("keep_bytes", [0, 2**28])  # the scores are computed again, or kept


def naive(queries, table, targets, weights=None, bias=None, num_rows=None):
    """The textbook form with [B, N] in memory, float32, differentiable by JAX."""
    scores = queries.astype(jnp.float32) @ table.astype(jnp.float32).T
    if bias is not None:
        scores = scores + bias[None]
    num_rows = table.shape[0] if num_rows is None else num_rows
    log_p = jax.nn.log_softmax(scores[:, :num_rows])
    targets = targets[:, None] if targets.ndim == 1 else targets
    weights = jnp.where(targets >= 0, 1.0, 0.0) if weights is None else weights
    taken = jnp.take_along_axis(log_p, jnp.clip(targets, 0), axis=1)
    return -(weights * taken).sum(axis=1)


def make(seed=0, batch=16, rows=200, dim=8, labels=None, scale=2.0):
    rng = np.random.default_rng(seed)
    queries = jnp.asarray(rng.normal(size=(batch, dim)) * scale, jnp.float32)
    table = jnp.asarray(rng.normal(size=(rows, dim)), jnp.float32)
    bias = jnp.asarray(rng.normal(size=rows), jnp.float32)
    targets = jnp.asarray(rng.integers(0, rows - 9, batch if labels is None else (batch, labels)), jnp.int32)
    weights = None if labels is None else jnp.asarray(rng.integers(0, 3, (batch, labels)), jnp.float32)
    return queries, table, bias, targets, weights


def both(fn, queries, table, bias, *args, **kwargs):
    """Value and gradients of a weighted sum, so that each example has a gradient of its own."""
    g = jnp.linspace(0.5, 2.0, queries.shape[0])
    f = lambda q, t, b: (g * fn(q, t, *args, bias=b, **kwargs)).sum()  # noqa: E731
    return jax.jit(lambda q, t, b: (fn(q, t, *args, bias=b, **kwargs), jax.grad(f, (0, 1, 2))(q, t, b)))(
        queries, table, bias)


def assert_same(got, want, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol), got, want)


@pytest.mark.parametrize("block_rows", [8192, 200, 64, 56, 7])
def test_equals_the_naive_form_for_every_block_size(block_rows):
    queries, table, bias, targets, _ = make()
    want = both(naive, queries, table, bias, targets, num_rows=193)
    for keep_bytes in (0, 16 * 200 * 4):
        got = both(losses.table_cross_entropy, queries, table, bias, targets, num_rows=193, block_rows=block_rows,
                   keep_bytes=keep_bytes)
        assert_same(got, want)
        assert got[0].dtype == jnp.float32 and not np.asarray(got[1][1])[193:].any()


@KEEP
@pytest.mark.parametrize("labels", [3, 40])
def test_several_targets_with_weights_and_padding(labels, keep_bytes):
    queries, table, bias, targets, weights = make(labels=labels)
    targets = targets.at[3].set(-1).at[4, 1:].set(-1)
    weights = jnp.where(targets < 0, 0.0, weights)
    loss = functools.partial(losses.table_cross_entropy, block_rows=64, keep_bytes=keep_bytes)
    got = both(loss, queries, table, bias, targets, weights=weights)
    assert_same(got, both(naive, queries, table, bias, targets, weights))
    assert got[0][3] == 0.0 and not np.asarray(got[1][0])[3].any()
    none = both(loss, queries, table, bias, targets)  # a negative target is padding by itself
    assert_same(none, both(naive, queries, table, bias, targets), atol=5e-5)


def test_against_numpy():
    queries, table, bias, targets, _ = make(1)
    scores = np.asarray(queries, np.float64) @ np.asarray(table, np.float64).T + np.asarray(bias, np.float64)
    want = np.log(np.exp(scores).sum(1)) - scores[np.arange(16), np.asarray(targets)]
    got = losses.table_cross_entropy(queries, table, targets, bias=bias, block_rows=64)
    np.testing.assert_allclose(got, want, rtol=2e-6)


@pytest.mark.parametrize("shape", [(1, 1), (8, 1), (2, 4)])
@pytest.mark.parametrize("use_bias", [False, True])
@KEEP
def test_a_row_sharded_table_gives_the_same(shape, use_bias, keep_bytes):
    queries, table, bias, targets, weights = make(rows=256, labels=2)
    mesh = make_mesh(MeshConfig(*shape), jax.devices()[: shape[0] * shape[1]])

    def value_and_grads(queries, table, bias, targets, weights):
        bias = bias if use_bias else None
        fn = functools.partial(losses.table_cross_entropy, targets=targets, weights=weights, bias=bias, num_rows=250,
                               block_rows=16, keep_bytes=keep_bytes)
        return fn(queries, table), *jax.grad(lambda q, t: fn(q, t).sum(), (0, 1))(queries, table)

    want = jax.jit(value_and_grads)(queries, table, bias, targets, weights)
    tree = {"q": queries, "table": table, "bias": bias, "y": targets, "w": weights}
    rules = (("table", TABLE), ("bias", P(("data", "model"))), (".*", P("data")))
    tree = put(tree, shardings(tree, mesh, rules))
    with jax.set_mesh(mesh):
        args = [tree[name] for name in ("q", "table", "bias", "y", "w")]
        compiled = jax.jit(value_and_grads).lower(*args).compile()
        got = compiled(*args)
    assert_same(got, want, atol=1e-5)  # scores near 20 round differently in products of another shape
    if shape != (1, 1):
        text = compiled.as_text()
        assert "f32[256,8]" not in text and "f32[32,8]" in text  # no device ever holds the whole table
        assert "[16,256]" not in text and ("f32[16,32]" in text) == bool(keep_bytes)  # nor all of the scores
        assert got[2].addressable_shards[0].data.shape == (32, 8)


@KEEP
def test_a_device_with_nothing_but_padding_rows(keep_bytes):
    queries, table, _, targets, _ = make(rows=256)
    with jax.set_mesh(make_mesh(MeshConfig())):
        got = jax.jit(jax.value_and_grad(lambda q: losses.table_cross_entropy(
            q, table, targets % 30, num_rows=30, keep_bytes=keep_bytes).sum()))(queries)
    want = jax.value_and_grad(lambda q: naive(q, table, targets % 30, num_rows=30).sum())(queries)
    assert_same(got, want)


@KEEP
def test_bfloat16_inputs_and_large_scores(keep_bytes):
    queries, table, bias, targets, _ = make(scale=20.0)
    low, low_table = queries.astype(jnp.bfloat16), table.astype(jnp.bfloat16)
    loss = functools.partial(losses.table_cross_entropy, block_rows=64, keep_bytes=keep_bytes)
    got = both(loss, low, low_table, bias, targets)
    want = both(naive, low.astype(jnp.float32), low_table.astype(jnp.float32), bias, targets)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-4)
    assert got[1][1].dtype == jnp.bfloat16
    for a, b in zip(got[1], want[1]):
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.02 * float(jnp.abs(b).max()))
    huge, (d_queries, d_table, _) = both(loss, queries * 1e4, table, bias, targets)
    assert np.isfinite(huge).all() and np.isfinite(d_queries).all() and np.isfinite(d_table).all()
    assert_same(huge, naive(queries * 1e4, table, targets, bias=bias))


def test_a_target_outside_the_table_is_not_hidden():
    queries, table, _, targets, _ = make()
    got = losses.table_cross_entropy(queries, table, targets.at[5].set(190), num_rows=190)
    assert np.isnan(got[5]) and np.isfinite(np.delete(np.asarray(got), 5)).all()
    with pytest.raises(ValueError, match="num_rows: found 201"):
        losses.table_cross_entropy(queries, table, targets, num_rows=201)


def test_log_q_is_taken_off_the_scores():
    queries, table, bias, targets, _ = make()
    got = losses.table_cross_entropy(queries, table, targets, log_q=-bias)
    np.testing.assert_allclose(got, naive(queries, table, targets, bias=bias), rtol=1e-5)


def test_no_batch_by_rows_matrix_beyond_the_budget():
    queries, table, _, targets, _ = make(batch=32, rows=4096)
    scores = 32 * 4096 * 4  # bytes

    def compiled(keep_bytes):
        return jax.jit(jax.grad(lambda q, t: losses.table_cross_entropy(
            q, t, targets, block_rows=256, keep_bytes=keep_bytes).sum(), (0, 1))).lower(queries, table).compile()

    walked, kept = compiled(scores - 1), compiled(scores)
    assert "[32,4096]" not in walked.as_text() and "[32,4096]" in kept.as_text()
    assert walked.memory_analysis().temp_size_in_bytes < scores
    assert kept.memory_analysis().temp_size_in_bytes < 2.2 * scores


def test_sampling_all_rows_is_the_full_softmax_and_hits_do_not_count():
    queries, table, bias, targets, weights = make(labels=2)
    targets = targets.at[0, 1].set(-1)
    weights = jnp.where(targets < 0, 0.0, weights)
    uniform = jnp.full((200,), -np.log(200.0), jnp.float32)
    every = jnp.arange(200, dtype=jnp.int32)
    single = losses.sampled_cross_entropy(queries, table, targets[:, 0], every, uniform, bias=bias)
    np.testing.assert_allclose(single, naive(queries, table, targets[:, 0], bias=bias), rtol=1e-4, atol=1e-5)
    got = losses.sampled_cross_entropy(queries, table, targets, every, uniform, weights=weights, bias=bias)
    scores = np.asarray(queries @ table.T + bias[None], np.float64)
    want = np.zeros(16)
    for b in range(16):
        positive = [int(t) for t in targets[b] if t >= 0]
        rest = np.exp(np.delete(scores[b], positive)).sum()
        for t, w in zip(targets[b], weights[b]):
            want[b] += float(w) * (np.log(rest + np.exp(scores[b, t])) - scores[b, t])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_the_sampled_sum_is_unbiased():
    queries, table, _, targets, _ = make(batch=4, rows=50, scale=0.5)
    rng = np.random.default_rng(0)
    q = rng.dirichlet(np.full(50, 5.0))
    log_q = jnp.asarray(np.log(q), jnp.float32)
    draws = jnp.asarray(rng.choice(50, (4000, 20), p=q), jnp.int32)
    each = jax.vmap(lambda c: losses.sampled_cross_entropy(queries, table, targets, c, log_q))(draws)  # [draws, B]
    score = (queries * table[targets]).sum(axis=1)
    mean_sum = np.exp(np.asarray(each + score[None], np.float64)).mean(0)  # the sums that the losses are logs of
    np.testing.assert_allclose(mean_sum, np.exp(queries @ table.T).sum(1), rtol=0.02)


def test_masked_mean_counts_only_what_is_there():
    total, count = losses.masked_mean(jnp.asarray([1.0, jnp.nan, 3.0]), jnp.asarray([1.0, 0.0, 2.0]))
    assert (float(total), float(count)) == (7.0, 3.0)
