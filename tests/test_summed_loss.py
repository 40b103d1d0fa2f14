"""table_cross_entropy_sum against the sum of table_cross_entropy: value, gradients, padding, meshes, memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kgrec_jax import losses
from kgrec_jax.sharding import TABLE, MeshConfig, P, make_mesh, put, shardings
from kgrec_jax.summed_loss import table_cross_entropy_sum

B, N, D, T = 150, 200, 8, 3


def _data(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 5)
    queries, table = jax.random.normal(keys[0], (B, D), dtype), jax.random.normal(keys[1], (N, D), dtype)
    targets = jax.random.randint(keys[2], (B, T), 0, 190).at[3].set(-1).at[4, 1:].set(-1).at[7, 1].set(2).at[7, 2].set(2)
    return queries, table, jax.random.normal(keys[3], (N,)), targets, jax.random.uniform(keys[4], (B, T))


def _both(loss, queries, table, bias, targets, **more):
    """(value, gradients) of three times the summed loss, so that the cotangent is not one."""
    f = lambda q, t, b: jnp.float32(3) * loss(q, t, targets, bias=b, **more).sum()  # noqa: E731
    return jax.jit(jax.value_and_grad(f, (0, 1) if bias is None else (0, 1, 2)))(queries, table, bias)


@pytest.mark.parametrize("block_bytes", [1, 72 * 4 * N, 2**24])  # blocks of 64 (150 are padded), 72 and all
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("num_rows", [None, 190])
def test_equals_the_sum_of_the_losses(block_bytes, with_bias, num_rows):
    queries, table, bias, targets, weights = _data()
    bias = bias if with_bias else None
    want = _both(losses.table_cross_entropy, queries, table, bias, targets, weights=weights, num_rows=num_rows)
    got = _both(table_cross_entropy_sum, queries, table, bias, targets, weights=weights, num_rows=num_rows,
                block_bytes=block_bytes)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, want)
    assert num_rows is None or not np.asarray(got[1][1])[num_rows:].any()
    alone = table_cross_entropy_sum(queries, table, targets, weights=weights, bias=bias, num_rows=num_rows)
    np.testing.assert_allclose(alone, want[0] / 3, rtol=1e-5)  # without a gradient
    single = targets[:, 0]
    np.testing.assert_allclose(table_cross_entropy_sum(queries, table, single, block_bytes=block_bytes),
                               losses.table_cross_entropy(queries, table, single).sum(), rtol=1e-5)


def test_bfloat16_and_large_scores():
    queries, table, bias, targets, weights = _data(jnp.bfloat16)
    loss = lambda q, t: table_cross_entropy_sum(q, t, targets, weights=weights, block_bytes=1)  # noqa: E731
    value, (d_queries, d_table) = jax.value_and_grad(loss, (0, 1))(queries, table)
    assert (value.dtype, d_queries.dtype, d_table.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    wide = [x.astype(jnp.float32) for x in (queries, table)]
    want = jax.grad(lambda q, t: losses.table_cross_entropy(q, t, targets, weights=weights).sum(), (0, 1))(*wide)
    for a, b in zip((d_queries, d_table), want, strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.02 * float(jnp.abs(b).max()))
    huge = jax.value_and_grad(lambda q: table_cross_entropy_sum(q, wide[1], targets, weights=weights))(wide[0] * 1e4)
    assert all(np.isfinite(x).all() for x in huge)


def test_a_target_outside_the_table_is_not_hidden():
    queries, table, _, targets, weights = _data()
    assert np.isnan(table_cross_entropy_sum(queries, table, targets.at[5, 0].set(190), num_rows=190))
    assert np.isfinite(table_cross_entropy_sum(queries, table, targets.at[5, 0].set(195), num_rows=190,
                                               weights=weights.at[5, 0].set(0.0)))
    with pytest.raises(ValueError, match="num_rows: found 201"):
        table_cross_entropy_sum(queries, table, targets, num_rows=201)


def test_a_row_sharded_table_gives_the_same():
    queries, table, bias, targets, weights = _data()
    mesh = make_mesh(MeshConfig(2, 4))
    tree = {"q": queries[:144], "table": table, "bias": bias, "y": targets[:144], "w": weights[:144]}
    want = _both(table_cross_entropy_sum, tree["q"], table, bias, tree["y"], weights=tree["w"])
    tree = put(tree, shardings(tree, mesh, (("table", TABLE), ("bias", P(("data", "model"))), (".*", P("data")))))
    with jax.set_mesh(mesh):
        got = _both(table_cross_entropy_sum, tree["q"], tree["table"], tree["bias"], tree["y"], weights=tree["w"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, want)


def test_memory_is_a_block_and_never_batch_by_rows():
    queries, table = jnp.ones((512, 8)), jnp.ones((4096, 8))
    grad = jax.jit(jax.grad(lambda q, t: table_cross_entropy_sum(
        q, t, jnp.zeros(512, jnp.int32), block_bytes=64 * 4 * 4096), (0, 1)))
    used = grad.lower(queries, table).compile().memory_analysis().temp_size_in_bytes
    assert used < 512 * 4096 * 4 / 2
