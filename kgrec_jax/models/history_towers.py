"""User vectors from histories of item vectors: pooled, or read in order.

Histories lie right in their arrays, the latest item last; what is in front of a shorter one is no item and changes
nothing. A history without items gives the zero vector.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from kgrec_jax.models.tower_config import BIDIRECTIONAL, TowerConfig


def safe_softmax(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax over the last axis where mask is True; all zeros, and not NaN, where nothing is."""
    logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
    raised = jnp.where(mask, jnp.exp(logits - logits.max(-1, keepdims=True)), 0.0)
    return raised / jnp.maximum(raised.sum(-1, keepdims=True), 1e-9)


def _shown(module: nn.Module, mask: jax.Array, rate: float) -> jax.Array:
    """The mask [B, H] without a share of its items, drawn anew; a history keeps at least one of its own."""
    shown = jax.random.bernoulli(module.make_rng("dropout"), 1.0 - rate, mask.shape)
    return mask & jnp.where((mask & shown).any(-1, keepdims=True), shown, True)


class HistoryTower(nn.Module):
    """Histories of item vectors [B, H, D], the latest last, with a mask [B, H] -> user vectors [B, D]: pooled.

    An empty history gives the zero vector.
    """

    cfg: TowerConfig

    @nn.compact
    def __call__(self, items: jax.Array, mask: jax.Array, deterministic: bool = True) -> jax.Array:
        cfg = self.cfg
        if not deterministic:
            mask = _shown(self, mask, cfg.history_dropout)
        hidden = items  # [B, H, D]
        if cfg.history == "transformer":
            position = self.param("position_embeddings", nn.initializers.normal(0.02), (cfg.max_history, cfg.width))
            hidden = hidden + position[None, -hidden.shape[1]:]
            for layer in range(cfg.layers):
                hidden = transformer_block(cfg, hidden, mask[:, None, None, :], layer)
        if cfg.history == "mean":
            weights = mask.astype(hidden.dtype)  # [B, H]
            pooled = (weights[..., None] * hidden).sum(1) / jnp.maximum(weights.sum(1, keepdims=True), 1.0)
        else:
            bent = nn.tanh(nn.Dense(cfg.width, name="pool_in")(hidden))
            logits = nn.Dense(1, use_bias=False, name="pool")(bent)[..., 0]  # [B, H]
            pooled = (safe_softmax(logits, mask)[..., None] * hidden).sum(1)  # [B, D]
        turn = nn.Dense(cfg.width, use_bias=False, kernel_init=nn.initializers.zeros, name="out")
        out = pooled + turn(nn.tanh(pooled))
        return jnp.where(mask.any(-1, keepdims=True), out, 0.0)


def transformer_block(cfg: TowerConfig, x: jax.Array, mask: jax.Array, layer: int,
                      deterministic: bool = True) -> jax.Array:
    """A pre-norm transformer block over [B, H, D], its parameters in the module that calls it.

    `mask` says which keys a query may see and is broadcast to [B, heads, H, H]; a query that sees none gets nothing.
    """
    batch, length, width = x.shape
    drop = nn.Dropout(cfg.hidden_dropout, deterministic=deterministic)
    normed = nn.LayerNorm(name=f"norm_{layer}")(x)
    query, key, value = (nn.Dense(width, name=f"{name}_{layer}")(normed).reshape(batch, length, cfg.heads, -1)
                         for name in ("query", "key", "value"))
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) / jnp.sqrt(jnp.float32(width // cfg.heads))
    weights = safe_softmax(logits, mask)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(batch, length, width)
    x = x + drop(nn.Dense(width, name=f"mix_{layer}")(mixed))
    normed = nn.LayerNorm(name=f"norm_feed_{layer}")(x)
    wide = nn.gelu(nn.Dense(2 * width, name=f"feed_{layer}")(normed), approximate=True)
    return x + drop(nn.Dense(width, name=f"feed_out_{layer}")(wide))


class _Step(nn.Module):
    """One step of a recurrent cell, left out where there is no item."""

    kind: str
    width: int

    @nn.compact
    def __call__(self, carry, inputs):
        x, there = inputs  # [B, D], [B]
        cell = nn.GRUCell if self.kind == "gru" else nn.OptimizedLSTMCell
        new, _ = cell(self.width, name="cell")(carry, x)
        carry = jax.tree.map(lambda fresh, old: jnp.where(there[:, None], fresh, old), new, carry)
        return carry, carry if self.kind == "gru" else carry[1]


def _recurrent(kind: str, name: str, x: jax.Array, mask: jax.Array, reverse: bool = False) -> jax.Array:
    """States [B, H, D] after each position of x [B, H, D], from the front or from the end."""
    batch, _, width = x.shape
    zeros = jnp.zeros((batch, width), x.dtype)
    scanned = nn.scan(_Step, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1,
                      reverse=reverse)
    return scanned(kind, width, name=name)(zeros if kind == "gru" else (zeros, zeros), (x, mask))[1]


class SequenceTower(nn.Module):
    """Histories of item vectors read in order -> a state [B, H, D] for each position.

    The state at a position is of the items up to it (gru, sasrec) or of all but what is masked (bilstm, bert4rec).
    `mask` [B, H]: there is an item; `hidden` [B, H]: it is not shown, and a learned token stands in its place.
    """

    cfg: TowerConfig

    @nn.compact
    def __call__(self, items: jax.Array, mask: jax.Array, hidden: jax.Array, deterministic: bool = True) -> jax.Array:
        cfg, length = self.cfg, items.shape[1]
        if not deterministic and cfg.trained_on == "hidden-share":
            mask = _shown(self, mask & ~hidden, cfg.history_dropout) | hidden
        # Item vectors are of unit length; the scale makes their components as large as those of other hidden states.
        x = items * jnp.sqrt(jnp.float32(cfg.width))
        if cfg.history in BIDIRECTIONAL:
            token = self.param("mask_token", nn.initializers.normal(1.0), (cfg.width,))
            x = jnp.where(hidden[..., None], token[None, None], x)
        x = jnp.where(mask[..., None], x, 0.0)
        if cfg.history in ("sasrec", "bert4rec"):
            # One more than a history has: the mask token behind it.
            shape = (cfg.max_history + 1, cfg.width)
            x = x + self.param("position_embeddings", nn.initializers.normal(0.02), shape)[None, -length:]
        x = nn.Dropout(cfg.hidden_dropout, deterministic=deterministic)(x)
        if cfg.history in ("sasrec", "bert4rec"):
            sees = mask[:, None, None, :]
            if cfg.history == "sasrec":
                sees = sees & jnp.tril(jnp.ones((length, length), bool))[None, None]
            for layer in range(cfg.layers):
                x = transformer_block(cfg, x, sees, layer, deterministic)
            return nn.LayerNorm(name="norm_out")(x)
        for layer in range(cfg.layers):
            drop = nn.Dropout(cfg.hidden_dropout, deterministic=deterministic)
            if cfg.history == "gru":
                x = drop(_recurrent("gru", f"gru_{layer}", x, mask))
            else:
                both = [_recurrent("lstm", f"lstm_{way}_{layer}", x, mask, way == "back") for way in ("forth", "back")]
                x = drop(nn.Dense(cfg.width, name=f"both_{layer}")(jnp.concatenate(both, -1)))
        return nn.Dense(cfg.width, name="out")(x)
