"""Queries with weights of their own: TuckER's core tensor and ConvE's convolution.

Both were published with batch normalisation, whose running statistics are state beside the parameters and whose result
depends on the batch and on how it is cut over devices. Here its place is taken by layer normalisation of each example
(Ba et al. 2016), so that a query is a pure function of its rows and weights, in training and in serving.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from kgrec_jax.models.layers import keep_mask


def dropped(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout (Srivastava et al. 2014) of single numbers; `x` itself without a key or at rate 0."""
    if key is None or rate == 0.0:
        return x
    return x * keep_mask(key, rate, x.shape).astype(x.dtype) * (1.0 / (1.0 - rate))


class Tucker(nn.Module):
    """TuckER (Balažević et al. 2019): W ×₁ r ×₂ h, to be multiplied with t, for a core tensor W [d_r, D, D].

    Relation rows keep D numbers as every other reader of the tables expects; the core reads the first `core_rank` (d_r)
    of them. The core starts uniform in [−1, 1] as published; layer normalisation stands before and after it.
    """

    dim: int  # D
    core_rank: int  # d_r

    @nn.compact
    def __call__(self, h: jax.Array, r: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """[B, D], [B, D] -> [B, D]; the key is not used: rows and queries are dropped by `Scorer.query`."""
        del key
        core = self.param("core", lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -1.0, 1.0),
                          (self.core_rank, self.dim, self.dim))
        h = nn.LayerNorm(name="input_norm")(h)
        # One large product instead of a small one for each example's own matrix W ×₁ r [D, D].
        outer = (r[:, :self.core_rank, None] * h[:, None, :]).reshape(h.shape[0], -1)  # [B, d_r · D]
        return nn.LayerNorm(name="query_norm")(outer @ core.reshape(-1, self.dim))


def image_shape(dim: int) -> tuple[int, int]:
    """(height, width) of a row of `dim` numbers as an image, as near to a square as its divisors allow, never tall."""
    height = next(k for k in range(math.isqrt(dim), 0, -1) if dim % k == 0)
    return height, dim // height


class ConvE(nn.Module):
    """ConvE (Dettmers et al. 2018): h above r as one image, convolved, projected to D, to be multiplied with t.

    Rectifiers and the order of layers are as published, `dropout` is of the feature maps' numbers. Its bias of each
    entity stands beside the table: see `Scorer.entity_bias`.
    """

    dim: int  # D
    channels: int
    kernel: int  # side of the filters, in pixels
    dropout: float = 0.0

    @nn.compact
    def __call__(self, h: jax.Array, r: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """[B, D], [B, D] -> [B, D], none of it negative."""
        height, width = image_shape(self.dim)
        image = jnp.concatenate([h.reshape(-1, height, width), r.reshape(-1, height, width)], axis=1)[..., None]
        x = nn.LayerNorm(name="image_norm", reduction_axes=(1, 2, 3), feature_axes=-1)(image)  # [B, 2H, W, 1]
        x = nn.Conv(self.channels, (self.kernel, self.kernel), padding="VALID", name="conv")(x)
        x = nn.relu(nn.LayerNorm(name="map_norm", reduction_axes=(1, 2, 3), feature_axes=-1)(x))  # [B, …, …, C]
        x = dropped(x.reshape(x.shape[0], -1), self.dropout, key)
        return nn.relu(nn.LayerNorm(name="query_norm")(nn.Dense(self.dim, name="project")(x)))
