"""Optimisers: a schedule, clipping, weight decay where it belongs, and a small state for large tables."""

from __future__ import annotations

import dataclasses
import re
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
    clip_norm: float = 1.0  # largest global norm of the gradients; 0: never clipped
    b1: float = 0.9  # adamw: decay of the first moment; sgd: momentum
    b2: float = 0.999  # adamw: decay of the second moment
    eps: float = 1e-8  # adamw and adagrad: added to the denominator
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


def make_optimizer(cfg: OptimConfig, num_steps: int) -> optax.GradientTransformation:
    """The optimiser of a run of `num_steps` steps: clips, then moves dense parameters, tables and frozen ones apart.

    Call `init` and `update` under `jax.numpy_dtype_promotion("standard")` where strict promotion is on: Optax's moments
    and schedules mix weak and strong types. Raises KgrecError where a field is out of its range.
    """
    _check(cfg)
    inner = {"adamw": lambda: optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps),
             "adagrad": lambda: optax.scale_by_rss(initial_accumulator_value=0.1, eps=cfg.eps),
             "sgd": lambda: optax.trace(cfg.b1) if cfg.b1 else optax.identity()}
    dense = optax.chain(inner[cfg.name](), *_decay(cfg), scale_by_schedule(learning_rate(cfg, num_steps)))
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


def decays(params: Any) -> Any:
    """Which parameters weight decay acts on: matrices and tables, not biases, scales and other vectors."""

    def one(path, leaf):
        return leaf.ndim > 1 and not re.search(r"(^|/)(bias|scale)$", path_name(path))

    return jax.tree_util.tree_map_with_path(one, params)


def _row_scale(sum_of_squares: jax.Array, eps: float, like: jax.Array) -> jax.Array:
    scale = jnp.where(sum_of_squares > 0, jax.lax.rsqrt(sum_of_squares + eps), 0.0)
    return jnp.broadcast_to(scale, like.shape).astype(like.dtype)


def _decay(cfg: OptimConfig) -> list[optax.GradientTransformation]:
    return [optax.add_decayed_weights(cfg.weight_decay, decays)] if cfg.weight_decay else []


def _check(cfg: OptimConfig) -> None:
    at_least_zero = [(name, 0, None) for name in ("peak_lr", "table_peak_lr", "clip_norm", "weight_decay", "eps")]
    for name, low, high in [*at_least_zero, ("warmup_share", 0, 1), ("b1", 0, 1), ("b2", 0, 1)]:
        value = getattr(cfg, name)
        if not value >= low or (high is not None and value > high):
            span = f"at least {low}" if high is None else f"{low} to {high}"
            raise KgrecError(f"optim.{name}: found {value}, expected {span}")
    for name in ("table_patterns", "frozen_patterns"):
        for pattern in getattr(cfg, name):
            try:
                re.compile(pattern)
            except re.error as error:
                raise KgrecError(f"optim.{name}: found {pattern!r}, expected a regular expression ({error})") from None
