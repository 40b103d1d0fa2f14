"""Optimisers: a schedule, clipping, weight decay where it belongs, a small state for large tables, and what a step does
with gradients and weights beside: accumulation over parts of a batch, a moving average."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kgrec_jax.errors import KgrecError
from kgrec_jax.sharding import path_name


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """How parameters move."""

    name: Literal["adamw", "adagrad", "sgd"] = "adamw"  # the optimiser of everything but the tables
    peak_lr: float = 1e-3  # the learning rate after the warm-up
    warmup_share: float = 0.1  # share of the steps in which the learning rate rises from zero
    schedule: Literal["constant", "cosine", "linear"] = "cosine"  # how it falls after the warm-up, to zero at the end
    weight_decay: float = 0.0  # decoupled; not on biases, normalisation scales and other vectors
    no_decay_patterns: tuple[str, ...] = ()  # what else is spared from it: regular expressions on paths like a/b/c
    layer_decay: float = 1.0  # learning rate of a layer over that of the layer above it; 1: the same everywhere
    clip_norm: float = 1.0  # largest global norm of the gradients; 0: never clipped
    b1: float = 0.9  # adamw: decay of the first moment; sgd: momentum
    b2: float = 0.999  # adamw: decay of the second moment
    eps: float = 1e-8  # adamw and adagrad: added to the denominator
    accumulator: float = 0.1  # adagrad: the sum of squared gradients before the first step
    table_name: Literal["same", "rowwise-adagrad"] = "same"  # the optimiser of the tables
    table_patterns: tuple[str, ...] = ()  # which parameters are tables [N, D]: regular expressions on paths like a/b/c
    table_peak_lr: float = 0.05  # rowwise-adagrad: the learning rate of the tables after the warm-up
    frozen_patterns: tuple[str, ...] = ()  # parameters that do not move: regular expressions on paths like a/b/c


class LearningRateState(NamedTuple):
    """Steps done, and the learning rate of the last one for the log."""

    count: jax.Array  # [] int32
    learning_rate: jax.Array  # [] float32


class RowwiseAdagradState(NamedTuple):
    """The sum of each row's mean squared gradient."""

    sum_of_squares: Any  # like the parameters, [N, 1] for a table [N, D]


def learning_rate(cfg: OptimConfig, num_steps: int, peak: float | None = None) -> optax.Schedule:
    """Step -> learning rate: rises from zero to `peak` in the warm-up, then falls to zero at `num_steps`."""
    peak = cfg.peak_lr if peak is None else peak
    warmup = round(cfg.warmup_share * num_steps)
    rest = max(num_steps - warmup, 1)
    falls = {"constant": lambda: optax.constant_schedule(peak),
             "cosine": lambda: optax.cosine_decay_schedule(peak, rest),
             "linear": lambda: optax.linear_schedule(peak, 0.0, rest)}
    fall = falls[cfg.schedule]()
    # The first step of a warm-up already moves: a learning rate of zero would waste it.
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, fall], [warmup]) if warmup else fall


def by_part(parts: dict[str, optax.GradientTransformation]) -> optax.GradientTransformation:
    """Each top-level part of the parameters by the optimiser of its name."""

    def label(params: dict) -> dict:
        return {name: jax.tree.map(lambda _, name=name: name, tree) for name, tree in params.items()}

    return optax.partition(parts, label)


def make_optimizer(cfg: OptimConfig, num_steps: int) -> optax.GradientTransformation:
    """The optimiser of a run of `num_steps` steps: clips, then moves dense parameters, tables and frozen ones apart.

    Call `init` and `update` under `jax.numpy_dtype_promotion("standard")` where strict promotion is on: Optax's moments
    and schedules mix weak and strong types. Raises KgrecError where a field is out of its range.
    """
    _check(cfg)
    inner = {"adamw": lambda: optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps),
             "adagrad": lambda: optax.scale_by_rss(initial_accumulator_value=cfg.accumulator, eps=cfg.eps),
             "sgd": lambda: optax.trace(cfg.b1) if cfg.b1 else optax.identity()}
    by_layer = [scale_by_layer(cfg.layer_decay)] if cfg.layer_decay != 1.0 else []
    dense = optax.chain(inner[cfg.name](), *_decay(cfg), *by_layer, scale_by_schedule(learning_rate(cfg, num_steps)))
    table = optax.chain(rowwise_adagrad(), *_decay(cfg),
                        scale_by_schedule(learning_rate(cfg, num_steps, cfg.table_peak_lr)))
    parts = {"dense": dense, "frozen": optax.set_to_zero()}
    if cfg.table_name == "rowwise-adagrad":
        parts["table"] = table

    def kind(path, leaf):
        name = path_name(path)
        if any(re.search(p, name) for p in cfg.frozen_patterns):
            return "frozen"
        return "table" if "table" in parts and any(re.search(p, name) for p in cfg.table_patterns) else "dense"

    def kinds(tree):
        return jax.tree_util.tree_map_with_path(kind, tree)

    def frozen(tree):
        return jax.tree.map(lambda k: k == "frozen", kinds(tree))

    plain = not cfg.frozen_patterns and len(parts) == 2
    steps = [] if not cfg.frozen_patterns else [optax.masked(optax.set_to_zero(), frozen)]  # out of the norm, too
    steps += [optax.clip_by_global_norm(cfg.clip_norm)] if cfg.clip_norm else []
    return optax.chain(*steps, dense if plain else optax.partition(parts, kinds))


def rowwise_adagrad(initial: float = 0.0, eps: float = 1e-10) -> optax.GradientTransformation:
    """Adagrad with one accumulator a row: the update g / sqrt(Σ mean_D g²), to be scaled by a learning rate.

    For a table [N, D] the state is N numbers where Adam keeps 2 N D; a row without gradient does not move. Parameters
    of one dimension count each entry as a row. (Duchi et al., 2011; by row as in Mudigere et al., 2022, DLRM.)
    """

    def squares(g):
        squared = jnp.square(g.astype(jnp.float32))
        return squared.mean(axis=-1, keepdims=True) if g.ndim > 1 else squared  # [N, 1]

    def init(params):
        return RowwiseAdagradState(jax.tree.map(lambda p: jnp.full(
            p.shape[:-1] + (1,) if p.ndim > 1 else p.shape, initial, jnp.float32), params))

    def update(grads, state, params=None):
        del params
        total = jax.tree.map(lambda s, g: s + squares(g), state.sum_of_squares, grads)
        updates = jax.tree.map(lambda g, s: (g * _row_scale(s, eps, g)).astype(g.dtype), grads, total)
        return updates, RowwiseAdagradState(total)

    return optax.GradientTransformation(init, update)


def scale_by_schedule(schedule: optax.Schedule) -> optax.GradientTransformation:
    """Multiplies updates by −schedule(step); the state keeps the learning rate that was used, for the log."""

    def init(params):
        del params
        return LearningRateState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))

    def update(updates, state, params=None):
        del params
        rate = jnp.asarray(schedule(state.count), jnp.float32)
        updates = jax.tree.map(lambda u: u * (-rate).astype(u.dtype), updates)
        return updates, LearningRateState(state.count + 1, rate)

    return optax.GradientTransformation(init, update)


def scale_by_layer(decay: float) -> optax.GradientTransformation:
    """Multiplies the updates of a parameter by decay**(layers above it): what lies deep moves less.

    The head counts as the top; layer k of n (paths with layer/k/ or h/k/) has n − k above it, the embeddings n + 1.
    (Layer-wise rate decay: Howard & Ruder, 2018; Clark et al., 2020, ELECTRA.)
    """

    def update(updates, state, params=None):
        del params
        above = layers_above(updates)
        return jax.tree.map(lambda u, n: u * jnp.asarray(decay**n, u.dtype), updates, above), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def layers_above(params: Any) -> Any:
    """Like `params`, the number of layers above each parameter: 0 for a head, most for the embeddings."""
    places = [_layer(path_name(path)) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    top = max((p for p in places if p is not None), default=-1) + 1
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: top - (top if (at := _layer(path_name(path))) is None else at), params)


def _layer(name: str) -> int | None:
    """The number of the layer that a parameter is in: -1 for embeddings, None for what lies above all layers."""
    found = re.search(r"(?:^|/)(?:layer|h)/(\d+)/", name)
    if found:
        return int(found[1])
    return -1 if re.search(r"(^|/)(embeddings|wte|wpe)(/|$)", name) else None


def accumulated(loss_fn: Callable, parts: int) -> Callable:
    """(params, constants, batch, key) -> ((loss, metrics), gradients), the batch taken in `parts` equal parts.

    Row i of a batch [parts · B, …] is in part i modulo `parts` (so each device splits its own rows). The loss must be a
    mean whose numerator and denominator it gives as metrics["loss"]: the gradients are then those of the whole batch,
    up to rounding, at the memory of one part. Other metrics are summed if they are (sum, count) pairs, else averaged.
    Part i draws from fold_in(key, i). Raises KgrecError for a batch that does not divide, or a loss without the pair.
    """

    def split(x):
        if not jnp.ndim(x):
            return jnp.broadcast_to(x, (parts,))
        if x.shape[0] % parts:
            raise KgrecError(f"accumulate: found a batch of {x.shape[0]} rows, expected a multiple of {parts}")
        return jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)  # [parts, B, …]

    def total_fn(params, constants, batch, key):
        loss, metrics = loss_fn(params, constants, batch, key)
        if not isinstance(metrics.get("loss"), tuple):
            raise KgrecError("accumulate: found a loss without its (sum, count) in metrics['loss'], expected the pair")
        pairs = {n: v if isinstance(v, tuple) else (v, jnp.ones((), jnp.float32)) for n, v in metrics.items()}
        return loss * jax.lax.stop_gradient(pairs["loss"][1]), pairs

    def run(params, constants, batch, key):
        def step(carry, part):
            index, rows = part
            grads, pairs = jax.grad(total_fn, has_aux=True)(params, constants, rows, jax.random.fold_in(key, index))
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype), carry, (grads, pairs)), None

        rows = jax.tree.map(split, batch)
        first = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(
            jax.grad(total_fn, has_aux=True), params, constants, jax.tree.map(lambda x: x[0], rows), key))
        (grads, pairs), _ = jax.lax.scan(step, first, (jnp.arange(parts), rows))
        total, count = pairs["loss"]
        count = jnp.maximum(count, jnp.ones_like(count))
        return (total / count, pairs), jax.tree.map(lambda g: g / count.astype(g.dtype), grads)

    return run


def ema_update(average: Any, params: Any, step: jax.Array, decay: float) -> Any:
    """The exponential moving average after `step` updates ([] int32, this one included).

    The decay grows as (1 + step) / (10 + step) until it has reached `decay`, so that a short run's average is not
    that of its first weights.
    """
    step = step.astype(jnp.float32)
    keep = jnp.minimum(jnp.float32(decay), (jnp.float32(1) + step) / (jnp.float32(10) + step))
    return jax.tree.map(lambda a, p: a + (jnp.float32(1) - keep).astype(a.dtype) * (p - a), average, params)


def decays(params: Any, spared: tuple[str, ...] = ()) -> Any:
    """Which parameters weight decay acts on: matrices and tables, not biases, scales and other vectors.

    Nor on what a regular expression of `spared` finds in the path.
    """

    def one(path, leaf):
        name = path_name(path)
        vector = leaf.ndim <= 1 or re.search(r"(^|/)(bias|scale)$", name)
        return not vector and not any(re.search(pattern, name) for pattern in spared)

    return jax.tree_util.tree_map_with_path(one, params)


def _row_scale(sum_of_squares: jax.Array, eps: float, like: jax.Array) -> jax.Array:
    scale = jnp.where(sum_of_squares > 0, jax.lax.rsqrt(sum_of_squares + eps), 0.0)
    return jnp.broadcast_to(scale, like.shape).astype(like.dtype)


def _decay(cfg: OptimConfig) -> list[optax.GradientTransformation]:
    if not cfg.weight_decay:
        return []
    return [optax.add_decayed_weights(cfg.weight_decay, functools.partial(decays, spared=cfg.no_decay_patterns))]


def _check(cfg: OptimConfig) -> None:
    at_least_zero = [(name, 0, None) for name in ("peak_lr", "table_peak_lr", "clip_norm", "weight_decay", "eps",
                                                     "accumulator")]
    for name, low, high in [*at_least_zero, ("warmup_share", 0, 1), ("b1", 0, 1), ("b2", 0, 1),
                            ("layer_decay", 0, 1)]:
        value = getattr(cfg, name)
        if not value >= low or (high is not None and value > high):
            span = f"at least {low}" if high is None else f"{low} to {high}"
            raise KgrecError(f"optim.{name}: found {value}, expected {span}")
    for name in ("table_patterns", "frozen_patterns", "no_decay_patterns"):
        for pattern in getattr(cfg, name):
            try:
                re.compile(pattern)
            except re.error as error:
                raise KgrecError(f"optim.{name}: found {pattern!r}, expected a regular expression ({error})") from None
