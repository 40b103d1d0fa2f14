"""A small Transformer over patches of an image or of a log-mel spectrogram, which gives one vector.

Images as ViT reads them (Dosovitskiy et al. 2021), spectrograms as AST does (Gong et al. 2021): patches, a dense layer,
learned positions, pre-norm blocks; the mean over the patches in the place of a class token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kgrec_jax.data.media_batches import standardised
from kgrec_jax.data.media_read import Form
from kgrec_jax.models.history_towers import transformer_block
from kgrec_jax.models.layers import Dense


@dataclasses.dataclass(frozen=True)
class MediaTowerConfig:
    """Shape of a media tower."""

    patch: int  # rows and columns of a patch: pixels, or frames and mel bands
    width: int
    layers: int
    heads: int
    hidden_dropout: float
    out: int  # F of the vector that it gives


def patches(values: jax.Array, size: int) -> jax.Array:
    """[B, H, W, C] -> [B, N, size · size · C], row by row; rows and columns that fill no patch are left out."""
    batch, height, width, channels = values.shape
    down, across = height // size, width // size
    cut = values[:, :down * size, :across * size].reshape(batch, down, size, across, size, channels)
    return cut.transpose(0, 1, 3, 2, 4, 5).reshape(batch, down * across, size * size * channels)


class MediaTower(nn.Module):
    """Standardised arrays [B, H, W, C] -> vectors [B, F]."""

    cfg: MediaTowerConfig

    @nn.compact
    def __call__(self, values: jax.Array, deterministic: bool = True) -> jax.Array:
        cfg = self.cfg
        hidden = Dense(cfg.width, name="patch")(patches(values, cfg.patch))  # [B, N, D]
        position = self.param("position_embeddings", nn.initializers.normal(0.02), hidden.shape[1:])
        hidden = hidden + position[None]
        everywhere = jnp.ones((1, 1, 1, hidden.shape[1]), bool)
        for layer in range(cfg.layers):
            hidden = transformer_block(cfg, hidden, everywhere, layer, deterministic)
        pooled = nn.LayerNorm(name="norm_out")(hidden).mean(1)  # [B, D]
        return nn.Dense(cfg.out, name="out")(pooled)


@dataclasses.dataclass(frozen=True)
class TrainedMedia:
    """Trained media towers of one media/NAME/, and all that a new file needs to get a vector of the same space."""

    cfg: MediaTowerConfig
    form: Form
    mean: float  # of the values in training
    deviation: float
    unit: bool  # vectors are made of unit length
    params: tuple[Mapping[str, Any], ...]  # of the towers; their mean is what an item gets that none of them learned

    def embed(self, values: np.ndarray) -> np.ndarray:
        """[towers, B, F] float32 of arrays [B, H, W, C] as `form` reads them."""
        given = standardised(values, self.mean, self.deviation)
        found = np.stack([np.asarray(_apply(self.cfg, params, given)) for params in self.params])
        return found / np.maximum(np.linalg.norm(found, axis=-1, keepdims=True), 1e-9) if self.unit else found

    def mixed(self, vectors: np.ndarray) -> np.ndarray:
        """[B, F] of [towers, B, F]: their mean, of unit length where each of them is."""
        mean = vectors.mean(0)
        return mean / np.maximum(np.linalg.norm(mean, axis=-1, keepdims=True), 1e-9) if self.unit else mean


def _forward(cfg: MediaTowerConfig, params: Any, values: jax.Array) -> jax.Array:
    return MediaTower(cfg).apply({"params": params}, values)


_apply = jax.jit(_forward, static_argnums=0)
