"""Texts to vectors: the mean of an encoder's last hidden states, of unit length."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kgrec_jax.models import bert

if TYPE_CHECKING:
    from kgrec_jax.data.text import Tokenizer
    from kgrec_jax.pretrained.hf import Encoder

MIN_LENGTH = 16  # shortest padded length; shorter buckets cost a compilation each and save little


def mean_pool(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """Unit vectors [B, D] float32: the mean of hidden [B, L, D] over the positions of mask [B, L]; zero without any."""
    weight = mask.astype(jnp.float32)[:, :, None]
    total = (hidden.astype(jnp.float32) * weight).sum(1)
    mean = total / jnp.maximum(weight.sum(1), 1.0)
    # Reimers & Gurevych (2019) pool like this; normalised as the released sentence encoders do.
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)


@functools.partial(jax.jit, static_argnums=(0, 1))
def encode_batch(config: bert.BertConfig, dtype: str, params: dict, input_ids: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean-pooled unit vectors [B, D] of token ids [B, L]."""
    hidden = bert.Bert(config, jnp.dtype(dtype)).apply({"params": params}, input_ids, mask, jnp.zeros_like(input_ids))
    return mean_pool(hidden[-1], mask)


def encode_texts(encoder: Encoder, params: dict, tokenizer: Tokenizer, texts: Sequence[str], *, max_length: int = 128,
                 batch_size: int = 64, progress: Callable[[int], None] | None = None,
                 mesh: Mesh | None = None) -> np.ndarray:
    """[n, D] float32 unit vectors of `texts`; an empty text gets a zero row (see `data.text.present_texts`).

    Texts are sorted by length and padded to the next of a few lengths, so that few shapes are compiled; the batch is
    padded to `batch_size` rows. `progress(n)` is called with the number of texts done since the last call. With a
    `mesh` the rows of a batch are spread over its axis "data".
    """
    max_length = min(max_length, encoder.config.max_position_embeddings)
    shares = mesh.shape["data"] if mesh is not None else 1
    batch_size = -(-batch_size // shares) * shares
    out = np.zeros((len(texts), encoder.config.hidden_size), np.float32)
    rows = np.array([row for row, text in enumerate(texts) if text.strip()], np.int64)
    ids = tokenizer.encode([texts[row] for row in rows], max_length)
    lengths = np.array([len(tokens) for tokens in ids], np.int64)
    order = np.argsort(-lengths, kind="stable")  # longest first: running out of memory shows at once
    bounds = [MIN_LENGTH << k for k in range(16) if MIN_LENGTH << k < max_length] + [max_length]
    bucket = np.searchsorted(bounds, lengths)
    for k in reversed(range(len(bounds))):
        members = order[bucket[order] == k]
        for start in range(0, len(members), batch_size):
            chosen = members[start : start + batch_size]
            input_ids, mask = tokenizer.pad([ids[i] for i in chosen], bounds[k])
            fill = batch_size - len(chosen)
            batch = [np.pad(array, ((0, fill), (0, 0))) for array in (input_ids, mask)]
            if mesh is not None:
                batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data", None)))
            vectors = encode_batch(encoder.config, encoder.dtype, params, *batch)
            out[rows[chosen]] = np.asarray(vectors)[: len(chosen)]
            if progress is not None:
                progress(len(chosen))
    if progress is not None and len(rows) < len(texts):
        progress(len(texts) - len(rows))
    return out
