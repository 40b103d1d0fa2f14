"""The sum of `losses.table_cross_entropy` over a batch, its gradients made in the forward pass while scores are at hand.

Who needs only the sum knows every query's weight beforehand, so some queries at a time can go all the way: scores,
exponentials, loss and both gradients, before the next ones begin. The scores of one block stay in the processor's cache
and [B, N] is never in memory: three products as where all exponentials are kept, without their traffic. (The same for
language models' vocabularies: Hsu et al. 2024, "Liger Kernel", arXiv 2410.10989.)
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from kgrec_jax.losses import device_rows, kept_backward, kept_forward, table_cross_entropy, targets_and_weights

# A block smaller than this many queries makes thin products; more rows than fit go the way of `losses`.
_MIN_QUERIES, _MAX_BYTES = 64, 2**27


def table_cross_entropy_sum(
    queries: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    *,
    weights: jax.Array | None = None,
    bias: jax.Array | None = None,
    num_rows: int | None = None,
    block_bytes: int = 2**24,
) -> jax.Array:
    """`table_cross_entropy(…).sum()`, [] float32; arguments, padding and NaN as there.

    Scores of so many queries are made at a time that they take about `block_bytes`. On accelerators, where large
    products pay, and under a mesh that splits the table's rows, `losses` does the work.
    """
    rows = table.shape[0]
    block = max(_MIN_QUERIES, block_bytes // (4 * rows) // 8 * 8)
    if jax.default_backend() != "cpu" or device_rows(table) != rows or 4 * rows * block > max(block_bytes, _MAX_BYTES):
        return table_cross_entropy(queries, table, targets, weights=weights, bias=bias, num_rows=num_rows).sum()
    num_rows, targets, weights, outside = targets_and_weights(table, targets, weights, num_rows)
    bias = None if bias is None else bias.astype(jnp.float32)
    number = math.ceil(queries.shape[0] / block)
    block = math.ceil(queries.shape[0] / number / 8) * 8 if number > 1 else queries.shape[0]
    pad = number * block - queries.shape[0]
    split = [jnp.pad(x, ((0, pad), (0, 0)), constant_values=fill).reshape(number, block, -1)
             for x, fill in ((queries, 0), (targets, -1), (weights, 0))]
    return jnp.where(outside.any(), jnp.nan, _summed(*split, table, bias, num_rows))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _summed(queries, targets, weights, table, bias, num_rows):
    def step(total, block):
        return total + _block_loss(*block, table, bias, num_rows)[0], None

    return jax.lax.scan(step, jnp.float32(0), (queries, targets, weights))[0]


def _forward(queries, targets, weights, table, bias, num_rows):
    def step(carry, block):
        loss, d_table, d_bias = carry
        added, shares, total = _block_loss(*block, table, bias, num_rows)
        one = jnp.ones_like(total)
        d_query, more, more_bias = kept_backward(0, (), table, bias, *block, shares, total, one)
        return (loss + added, d_table + more, None if bias is None else d_bias + more_bias), d_query

    zeros = (jnp.float32(0), jnp.zeros(table.shape, jnp.float32),
             None if bias is None else jnp.zeros(bias.shape, jnp.float32))
    (loss, d_table, d_bias), d_queries = jax.lax.scan(step, zeros, (queries, targets, weights))
    # The gradients are kept in the types of what they belong to.
    return loss, (d_queries.astype(queries.dtype), d_table.astype(table.dtype), d_bias)


def _backward(num_rows, saved, g):
    del num_rows
    d_queries, d_table, d_bias = (None if x is None else x * g.astype(x.dtype) for x in saved)
    return d_queries, None, None, d_table, d_bias


_summed.defvjp(_forward, _backward)


def _block_loss(queries, targets, weights, table, bias, num_rows):
    """(summed loss [] of some queries, exp(s − top) [b, N], its sum over the rows [b])."""
    shares, top, total, hit = kept_forward(0, (), table, bias, queries, targets, weights, num_rows=num_rows)
    return (weights.sum(axis=1) * (top + jnp.log(total)) - hit).sum(), shares, total
