"""What stands on an encoder when it is tuned for a task: pooling, and the losses of four tasks, per example."""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp

from kgrec_jax import losses
from kgrec_jax.errors import KgrecError

MAX_SCALE = 100.0  # of learned temperatures: below 0.01 the loss is unstable (Radford et al. 2021, section 2.5)

Pooling = Literal["mean", "cls"]


def pool(hidden: jax.Array, mask: jax.Array, kind: Pooling) -> jax.Array:
    """One vector a text [B, D] float32 of hidden [B, L, D], not normalised; zero where the mask [B, L] is empty.

    mean: over the positions of the mask; cls: the first position's.
    """
    wide = hidden.astype(jnp.float32)
    if kind == "cls":
        return jnp.where(mask[:, :1] > 0, wide[:, 0], 0.0)
    if kind != "mean":
        raise KgrecError(f"pooling: found {kind!r}, expected mean or cls")
    weight = (mask > 0).astype(jnp.float32)[:, :, None]
    return (wide * weight).sum(1) / jnp.maximum(weight.sum(1), 1.0)


def unit(vectors: jax.Array) -> jax.Array:
    """Vectors [..., D] of length one; a zero vector stays, and has no NaN as its gradient."""
    squared = jnp.square(vectors).sum(-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.maximum(squared, 1e-24))


# --- classification -----------------------------------------------------------------------------------------------


def init_classification(dim: int, classes: int, key: jax.Array) -> dict:
    """{"table": [classes, D], "bias": [classes]}; small, so that all classes begin about equally likely."""
    return {"table": 0.02 * jax.random.normal(key, (classes, dim), jnp.float32),
            "bias": jnp.zeros((classes,), jnp.float32)}


def class_logits(head: dict, vectors: jax.Array) -> jax.Array:
    """Logits [B, classes] of vectors [B, D]."""
    return vectors @ head["table"].T + head["bias"][None]


def class_losses(head: dict, vectors: jax.Array, targets: jax.Array, weight: jax.Array) -> jax.Array:
    """Softmax cross-entropy [B] of vectors [B, D] at targets [B] int32; 0 where the weight [B] is."""
    return losses.table_cross_entropy(vectors, head["table"], targets, weights=weight, bias=head["bias"])


# --- regression ---------------------------------------------------------------------------------------------------


def init_regression(dim: int) -> dict:
    """{"kernel": [D], "bias": []}, zeros: the mean of the standardised targets is the first guess."""
    return {"kernel": jnp.zeros((dim,), jnp.float32), "bias": jnp.zeros((), jnp.float32)}


def regress(head: dict, vectors: jax.Array) -> jax.Array:
    """Standardised values [B] of vectors [B, D]."""
    return vectors @ head["kernel"] + head["bias"]


def regression_losses(head: dict, vectors: jax.Array, targets: jax.Array, weight: jax.Array) -> jax.Array:
    """Squared errors [B] against standardised targets [B]; 0 where the weight [B] is."""
    return weight * jnp.square(regress(head, vectors) - targets)


# --- matching and contrast ----------------------------------------------------------------------------------------


def init_matching(temperature: float) -> dict:
    """{"log_scale": []}: the logarithm of 1 / temperature, which learns."""
    return {"log_scale": jnp.asarray(-math.log(temperature), jnp.float32)}


def learned_scale(head: dict) -> jax.Array:
    """1 / temperature, at most MAX_SCALE."""
    return jnp.minimum(jnp.exp(head["log_scale"]), jnp.float32(MAX_SCALE))


def pair_scores(first: jax.Array, second: jax.Array, scale: jax.Array | float, weight: jax.Array,
                same: jax.Array | None = None) -> jax.Array:
    """Scaled cosines [B, B] of row i of `first` [B, D] and row j of `second`; −inf where j is no rival of i.

    No rival is a row of weight 0 and, off the diagonal, a text that is the very same: same [B, B] bool.
    """
    scores = jnp.einsum("bd,cd->bc", unit(first), unit(second), precision=jax.lax.Precision.HIGHEST) * scale
    own = jnp.eye(first.shape[0], dtype=bool)
    out = (weight <= 0)[None, :] if same is None else (weight <= 0)[None, :] | same
    return jnp.where(out & ~own, -jnp.inf, scores)


def info_nce(scores: jax.Array, weight: jax.Array) -> jax.Array:
    """Losses [B] of telling a row's own column from the others of scores [B, B] (van den Oord et al. 2018, eq. 4)."""
    own = jnp.diagonal(scores)
    return jnp.where(weight > 0, weight * (jax.nn.logsumexp(scores, axis=1) - own), 0.0)


def in_batch_right(scores: jax.Array, weight: jax.Array) -> jax.Array:
    """[B] float32: 1 where a row's own column has the highest score of all, alone."""
    own = jnp.diagonal(scores)
    return jnp.where(weight > 0, ((scores >= own[:, None]).sum(axis=1) == 1).astype(jnp.float32), 0.0)


def same_rows(ids: jax.Array) -> jax.Array:
    """[B, B] bool: which rows of token ids [B, L] are equal."""
    return (ids[:, None, :] == ids[None, :, :]).all(axis=-1)


def alignment(first: jax.Array, second: jax.Array) -> jax.Array:
    """Mean squared distance of paired unit vectors [n, D], lower is better (Wang & Isola 2020, section 4.1.1)."""
    return jnp.square(first - second).sum(-1).mean()


def uniformity(vectors: jax.Array) -> jax.Array:
    """log of the mean of exp(−2 ‖x − y‖²) over distinct pairs of unit vectors [n, D], lower is better (ibid. 4.1.2)."""
    number = vectors.shape[0]
    cosines = jnp.einsum("nd,md->nm", vectors, vectors, precision=jax.lax.Precision.HIGHEST)
    apart = jnp.where(jnp.eye(number, dtype=bool), -jnp.inf, 4.0 * (cosines - 1.0))  # −2 ‖x − y‖² of unit vectors
    return jax.nn.logsumexp(apart) - math.log(number * (number - 1))
