"""Softmax cross-entropy against the rows of a table: the one loss of every stage, per example.

A large table is walked in blocks with a running log-sum-exp (Milakov & Gimelshein, 2018, "Online normalizer calculation
for softmax") and the backward pass computes the scores again, so that [B, N] is never in memory. Where [B, N] is small,
the exponentials of the forward pass are kept instead: three products instead of four. Under a mesh each device works
on its own rows, and a row-sharded table never moves.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from kgrec_jax.sharding import active_mesh

# Targets whose rows are gathered at a time: [B, T, D] of a query with hundreds of targets would outgrow the table.
_TARGET_CHUNK = 16


def table_cross_entropy(
    queries: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    *,
    weights: jax.Array | None = None,
    bias: jax.Array | None = None,
    num_rows: int | None = None,
    block_rows: int = 4096,
    keep_bytes: int = 2**28,
    log_q: jax.Array | None = None,
) -> jax.Array:
    """The per-example losses Σ_t w_t (log Σ_j exp s_j − s_{y_t}) [B] float32, with scores s_j = q·table_j + bias_j.

    queries [B, D] and table [N, D] are float32 or bfloat16; sums are float32. targets int32, [B] or [B, T] rows of the
    table; a negative target is padding, one at or beyond `num_rows` makes the loss NaN. weights [B] or [B, T] (1 where
    absent) carry no gradient; a row without any weight has loss 0. bias [N] is differentiable; log_q [N] (the log
    of the probability that sampling shows a row as a target) is taken off the scores.
    Rows from `num_rows` on are padding and take no part. Where the scores of a device's rows, B × rows × 4 bytes, fit
    in `keep_bytes`, they stay in memory from the forward to the backward pass (0: never); where they do not, both walk
    the rows in blocks and `block_rows` bounds the memory to [B, block_rows]. Both ways give the same up to rounding.

    Under `jax.set_mesh` with a table whose rows divide by the devices, each device works on N/devices rows and only
    [B]- and [B, D]-sized sums travel; the result is the same up to rounding.
    """
    num_rows, targets, weights, outside = targets_and_weights(table, targets, weights, num_rows)
    if bias is not None:
        bias = bias.astype(jnp.float32)
    if log_q is not None:
        taken_off = jax.lax.stop_gradient(log_q.astype(jnp.float32))
        bias = -taken_off if bias is None else bias - taken_off
    if 4 * queries.shape[0] * device_rows(table) <= keep_bytes:
        losses = _kept_cross_entropy(queries, table, bias, targets, weights, num_rows)
    else:
        losses = _cross_entropy(queries, table, bias, targets, weights, num_rows, block_rows)
    return jnp.where(outside, jnp.nan, losses)


def targets_and_weights(table: jax.Array, targets: jax.Array, weights: jax.Array | None, num_rows: int | None
                        ) -> tuple[int, jax.Array, jax.Array, jax.Array]:
    """(rows that take part, targets [B, T] with −1 at padding, weights [B, T] with 0 there, target beyond them [B])."""
    rows = table.shape[0]
    num_rows = rows if num_rows is None else num_rows
    if not 0 < num_rows <= rows:
        raise ValueError(f"num_rows: found {num_rows}, expected 1 to the table's {rows} rows")
    targets, weights = _shown(targets, weights)
    outside = ((targets >= num_rows) & (weights != 0)).any(axis=1)
    return num_rows, jnp.where(weights != 0, targets, -1), weights, outside


def _shown(targets: jax.Array, weights: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Targets and weights as [B, T], weights 0 at negative targets and without a gradient."""
    if targets.ndim == 1:
        targets = targets[:, None]  # [B, 1]
        weights = None if weights is None else weights[:, None]
    weights = jnp.ones(targets.shape, jnp.float32) if weights is None else weights.astype(jnp.float32)
    return targets, jax.lax.stop_gradient(jnp.where(targets < 0, 0.0, weights))


def sampled_cross_entropy(
    queries: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    candidates: jax.Array,
    log_q: jax.Array,
    *,
    weights: jax.Array | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """`table_cross_entropy` estimated from sampled rows, for tables too large even to walk: [B] float32.

    candidates [C] int32 are rows drawn with replacement, shared by the batch; log_q [N] is the log of the probability
    that one draw gives a row. Each candidate counts 1/(C q), so that E[Σ_c exp(s_c)/(C q_c)] is the sum over all other
    rows; the target is there for certain and is not corrected (Bengio & Senécal, 2008, with the target apart). A
    candidate that equals a target of its example is left out. targets, weights and bias as there.
    """
    targets, weights = _shown(targets, weights)

    def score(rows):  # rows [..., D] of the table against their queries
        return jnp.einsum("bd,b...d->b...", queries, rows, preferred_element_type=jnp.float32)

    inside = jnp.where(targets < 0, 0, targets)
    target = score(jnp.take(table, inside, axis=0))  # [B, T]
    rows = jnp.take(table, candidates, axis=0)  # [C, D]
    others = jnp.einsum("bd,cd->bc", queries, rows, preferred_element_type=jnp.float32)  # [B, C]
    if bias is not None:
        target = target + jnp.take(bias, inside).astype(jnp.float32)
        others = others + jnp.take(bias, candidates).astype(jnp.float32)[None]
    expected_count = math.log(candidates.shape[0]) + jnp.take(log_q, candidates).astype(jnp.float32)  # [C], in logs
    hit = (candidates[None, None, :] == targets[:, :, None]).any(axis=1)  # [B, C]
    others = jnp.where(hit, -jnp.inf, others - jax.lax.stop_gradient(expected_count)[None])
    rest = jax.nn.logsumexp(others, axis=1, keepdims=True)  # [B, 1]
    return (weights * (jnp.logaddexp(target, rest) - target)).sum(axis=1)


def masked_mean(values: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(Σ mask·values, Σ mask) in float32: a mean that adds up over batches. A NaN under 0 does not count."""
    mask = mask.astype(jnp.float32)
    return jnp.where(mask != 0, values.astype(jnp.float32) * mask, 0.0).sum(), mask.sum()


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _kept_cross_entropy(queries, table, bias, targets, weights, num_rows):
    return _kept_forward(queries, table, bias, targets, weights, num_rows)[0]


def _kept_forward(queries, table, bias, targets, weights, num_rows):
    walk = functools.partial(kept_forward, num_rows=num_rows)
    rows = _over_rows(walk, table, ("columns", P(), P(), P()))
    shares, top, total, hit = rows(table, bias, queries, targets, weights)
    return weights.sum(axis=1) * (top + jnp.log(total)) - hit, (queries, table, bias, targets, weights, shares, total)


def _kept_backward(num_rows, saved, g):
    del num_rows
    queries, table, bias, targets, weights, shares, total = saved
    rows = _over_rows(kept_backward, table, (P(), "table", "bias"), columns=3)
    d_queries, d_table, d_bias = rows(table, bias, queries, targets, weights, shares, total, g)
    d_bias = None if bias is None else d_bias
    return d_queries.astype(queries.dtype), d_table.astype(table.dtype), d_bias, None, None


_kept_cross_entropy.defvjp(_kept_forward, _kept_backward)


def kept_forward(offset, axes, table, bias, queries, targets, weights, *, num_rows):
    """(exp(s − top) [B, n] of this device's rows; top [B], Σ exp(s − top) [B] and Σ_t w_t s_{y_t} [B] of all rows)."""
    _, _, scores = _scores(queries, table, bias, 0, table.shape[0], offset, num_rows)
    local, mine = _local_targets(offset, table.shape[0], targets)
    taken = jnp.take_along_axis(scores, jnp.where(mine, local, 0), axis=1)  # [B, T]
    hit = jnp.where(mine, weights * taken, 0.0).sum(axis=1)
    top = scores.max(axis=1)
    top = jax.lax.pmax(top, axes) if axes else top
    shares = jnp.exp(scores - top[:, None])
    total = shares.sum(axis=1)
    return (shares, top, *(jax.lax.psum((total, hit), axes) if axes else (total, hit)))


def kept_backward(offset, axes, table, bias, queries, targets, weights, shares, total, g):
    """(d queries [B, D] of all rows, d table, d bias of this device's rows), float32.

    d scores = scale (exp(s − top) − w total / Σw): the scale of a query goes to [B, D] and never over [B, n].
    """
    all_weights = weights.sum(axis=1)  # [B]
    local, mine = _local_targets(offset, table.shape[0], targets)
    pull = weights * (total / jnp.where(all_weights == 0, 1.0, all_weights))[:, None]  # [B, T]
    place = jnp.where(mine, local, table.shape[0])  # what is not of this device is dropped
    pulled = shares.at[jnp.arange(place.shape[0])[:, None], place].add(-pull, mode="drop").astype(queries.dtype)
    scale = (g * all_weights / total)[:, None]  # [B, 1]
    d_queries = scale * jnp.einsum("bn,nd->bd", pulled, table, preferred_element_type=jnp.float32)
    scaled = (scale * queries.astype(jnp.float32)).astype(queries.dtype)
    d_table = jnp.einsum("bn,bd->nd", pulled, scaled, preferred_element_type=jnp.float32)
    d_bias = None if bias is None else jnp.einsum("bn,b->n", pulled, scale[:, 0].astype(pulled.dtype),
                                                  preferred_element_type=jnp.float32)
    d_queries = jax.lax.psum(d_queries, axes) if axes else d_queries
    return d_queries, d_table, d_bias


def _local_targets(offset, rows, targets):
    """(row on this device, whether it is one of its rows), each [B, T]."""
    local = targets - offset
    return local, (local >= 0) & (local < rows) & (targets >= 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _cross_entropy(queries, table, bias, targets, weights, num_rows, block_rows):
    return _forward(queries, table, bias, targets, weights, num_rows, block_rows)[0]


def _forward(queries, table, bias, targets, weights, num_rows, block_rows):
    walk = functools.partial(_walk_forward, num_rows=num_rows, block_rows=block_rows)
    lse, mean, mean_bias = _over_rows(walk, table, (P(), P(), P()))(table, bias, queries, targets, weights)
    hit = (queries.astype(jnp.float32) * mean).sum(axis=1) + mean_bias
    losses = weights.sum(axis=1) * lse - hit  # [B]
    return losses, (queries, table, bias, targets, weights, lse, mean)


def _backward(num_rows, block_rows, saved, g):
    queries, table, bias, targets, weights, lse, mean = saved
    walk = functools.partial(_walk_backward, num_rows=num_rows, block_rows=block_rows)
    rows = _over_rows(walk, table, (P(), "table", "bias"))
    d_queries, d_table, d_bias = rows(table, bias, queries, targets, weights, lse, g)
    d_queries = d_queries - g[:, None] * mean
    return (d_queries.astype(queries.dtype), d_table, None if bias is None else d_bias, None, None)


_cross_entropy.defvjp(_forward, _backward)


def device_rows(table) -> int:
    """The rows of a table that one device works on."""
    mesh = active_mesh()
    return table.shape[0] if mesh is None or table.shape[0] % mesh.size else table.shape[0] // mesh.size


def _over_rows(walk, table, out_specs, columns=None):
    """`walk(offset, axes, table, bias, *rest)` on the whole table, or on each device's rows under a mesh.

    `columns`: the place in `rest` of an array [B, N] that is laid out like the table's rows.
    """
    mesh = active_mesh()
    if device_rows(table) == table.shape[0]:
        return lambda table, bias, *rest: walk(0, (), table, bias, *rest)
    axes = tuple(mesh.axis_names)
    by_rows = {"table": P(axes, None), "bias": P(axes), "columns": P(None, axes)}

    def of_device(table, bias, *rest):
        return walk(jax.lax.axis_index(axes) * table.shape[0], axes, table, bias, *rest)

    def sharded(table, bias, *rest):
        others = (by_rows["columns"] if place == columns else P() for place in range(len(rest)))
        in_specs = (by_rows["table"], None if bias is None else by_rows["bias"], *others)
        outs = tuple(by_rows[s] if isinstance(s, str) else s for s in out_specs)
        if bias is None and "bias" in out_specs:
            outs = outs[:-1] + (None,)
        return jax.shard_map(of_device, in_specs=in_specs, out_specs=outs, check_vma=False)(table, bias, *rest)

    return sharded


def _blocks(rows: int, block_rows: int) -> tuple[int, int]:
    """(number, rows of each) of near-equal blocks; the last one reaches back where they do not tile the table."""
    number = math.ceil(rows / block_rows)
    return (1, rows) if number == 1 else (number, min(math.ceil(rows / number / 8) * 8, rows))


def _scores(queries, table, bias, block, size, offset, num_rows):
    """(start, rows [n, D], scores [B, n] float32, −inf at padding and at rows that an earlier block has had)."""
    rows = table.shape[0]
    start = jnp.minimum(block * size, rows - size)
    part = jax.lax.dynamic_slice_in_dim(table, start, size)  # [n, D]
    scores = jnp.einsum("bd,nd->bn", queries, part, preferred_element_type=jnp.float32)
    if bias is not None:
        scores = scores + jax.lax.dynamic_slice_in_dim(bias, start, size)[None]
    row = start + jnp.arange(size)
    live = (row >= block * size) & (row + offset < num_rows)
    return start, part, jnp.where(live[None], scores, -jnp.inf)


def _walk_forward(offset, axes, table, bias, queries, targets, weights, *, num_rows, block_rows):
    """(log-sum-exp [B], Σ_t w_t table[y_t] [B, D], Σ_t w_t bias[y_t] [B]) over the rows of all devices."""
    number, size = _blocks(table.shape[0], block_rows)

    def step(block, carry):
        top, total = carry
        _, _, scores = _scores(queries, table, bias, block, size, offset, num_rows)
        new_top = jnp.maximum(top, scores.max(axis=1))
        at = jnp.where(jnp.isneginf(new_top), 0.0, new_top)  # a device whose rows are all padding has no maximum
        return new_top, total * jnp.exp(top - at) + jnp.exp(scores - at[:, None]).sum(axis=1)

    batch = queries.shape[0]
    carry = (jnp.full((batch,), -jnp.inf, jnp.float32), jnp.zeros((batch,), jnp.float32))
    top, total = step(0, carry) if number == 1 else jax.lax.fori_loop(0, number, step, carry)
    mean, mean_bias = _target_mean(offset, table, bias, targets, weights)
    if axes:
        # One all-reduce of [B] for the maximum, one of [B, D + 2] for everything else.
        highest = jax.lax.pmax(top, axes)
        total, mean, mean_bias = jax.lax.psum((total * jnp.exp(top - highest), mean, mean_bias), axes)
        top = highest
    return top + jnp.log(total), mean, mean_bias


def _target_mean(offset, table, bias, targets, weights):
    """This device's share of (Σ_t w_t table[y_t] [B, D], Σ_t w_t bias[y_t] [B]), some targets at a time."""

    def step(_, chunk, carry):
        mean, mean_bias = carry
        local, weight = chunk
        taken = jnp.take(table, local, axis=0, mode="clip").astype(jnp.float32)  # [B, t, D]
        mean = mean + jnp.einsum("bt,btd->bd", weight, taken)
        if bias is not None:
            mean_bias = mean_bias + (weight * jnp.take(bias, local, mode="clip")).sum(axis=1)
        return mean, mean_bias

    zeros = (jnp.zeros((targets.shape[0], table.shape[1]), jnp.float32), jnp.zeros(targets.shape[:1], jnp.float32))
    return _over_targets(step, offset, table.shape[0], targets, weights, zeros)


def _over_targets(step, offset, rows, targets, weights, carry):
    """Folds `step` over chunks of (row of this device, weight) [B, t]; rows of other devices have weight 0."""
    local, mine = _local_targets(offset, rows, targets)
    local, weights = jnp.where(mine, local, 0), jnp.where(mine, weights, 0.0)
    batch, number = targets.shape
    if number <= _TARGET_CHUNK:
        return step(0, (local, weights), carry)
    pad = -number % _TARGET_CHUNK
    split = [jnp.pad(x, ((0, 0), (0, pad))).reshape(batch, -1, _TARGET_CHUNK).swapaxes(0, 1) for x in (local, weights)]
    return jax.lax.fori_loop(0, split[0].shape[0], lambda i, c: step(i, (split[0][i], split[1][i]), c), carry)


def _walk_backward(offset, axes, table, bias, queries, targets, weights, lse, g, *, num_rows, block_rows):
    """(d queries [B, D] of all rows without the targets' part, d table, d bias of this device's rows)."""
    number, size = _blocks(table.shape[0], block_rows)
    scale = (g * weights.sum(axis=1))[:, None]  # [B, 1]
    bare = queries.astype(jnp.float32)

    def add_targets(_, chunk, carry):
        d_table, d_bias = carry
        local, weight = chunk
        pull = -g[:, None] * weight  # [B, t]
        d_table = d_table.at[local].add(pull[:, :, None] * bare[:, None, :], mode="drop")
        return d_table, None if d_bias is None else d_bias.at[local].add(pull, mode="drop")

    def step(block, carry):
        d_queries, d_table, d_bias = carry
        start, part, scores = _scores(queries, table, bias, block, size, offset, num_rows)
        share = scale * jnp.exp(scores - lse[:, None])  # [B, n]
        low = share.astype(queries.dtype)
        d_queries = d_queries + jnp.einsum("bn,nd->bd", low, part, preferred_element_type=jnp.float32)
        block_grad = jnp.einsum("bn,bd->nd", low, queries, preferred_element_type=jnp.float32)
        d_table = _add_rows(d_table, block_grad, start)
        return d_queries, d_table, None if d_bias is None else _add_rows(d_bias, share.sum(axis=0), start)

    d_bias = None if bias is None else jnp.zeros(bias.shape, jnp.float32)
    d_table = jnp.zeros(table.shape, jnp.float32)
    d_table, d_bias = _over_targets(add_targets, offset, table.shape[0], targets, weights, (d_table, d_bias))
    carry = (jnp.zeros(queries.shape, jnp.float32), d_table, d_bias)
    d_queries, d_table, d_bias = step(0, carry) if number == 1 else jax.lax.fori_loop(0, number, step, carry)
    if axes:
        d_queries = jax.lax.psum(d_queries, axes)
    return d_queries, d_table.astype(table.dtype), d_bias


def _add_rows(x, update, start):
    old = jax.lax.dynamic_slice_in_dim(x, start, update.shape[0])
    return jax.lax.dynamic_update_slice_in_dim(x, old + update, start, axis=0)
