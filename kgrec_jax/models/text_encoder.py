"""Texts to vectors of unit length: an encoder's last hidden states, pooled."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kgrec_jax.models import encoders
from kgrec_jax.models.encoders import EncoderConfig, Pooling

if TYPE_CHECKING:
    from kgrec_jax.data.text import Tokenizer
    from kgrec_jax.pretrained.hf import Encoder

MIN_LENGTH = 16  # shortest padded length; shorter buckets cost a compilation each and save little


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames=("pooling",))
def encode_batch(config: EncoderConfig, dtype: str, params: dict, input_ids: jax.Array, mask: jax.Array,
                 pooling: Pooling = "auto") -> jax.Array:
    """Unit vectors [B, D] of token ids [B, L], pooled as `encoders.pool` says."""
    hidden = encoders.hidden_states(config, params, input_ids, mask, dtype=dtype)
    return encoders.pool(config, hidden[-1], mask, pooling)


def encode_texts(encoder: Encoder, params: dict, tokenizer: Tokenizer, texts: Sequence[str], *, max_length: int = 128,
                 batch_size: int = 64, progress: Callable[[int], None] | None = None,
                 mesh: Mesh | None = None, pooling: Pooling = "auto") -> np.ndarray:
    """[n, D] float32 unit vectors of `texts`; an empty text gets a zero row (see `data.text.present_texts`).

    Texts are sorted by length and padded to the next of a few lengths, so that few shapes are compiled; the batch is
    padded to `batch_size` rows. `progress(n)` is called with the number of texts done since the last call. With a
    `mesh` the rows of a batch are spread over its axis "data". `pooling` as in `encoders.pool`.
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
            vectors = encode_batch(encoder.config, encoder.dtype, params, *batch, pooling=pooling)
            out[rows[chosen]] = np.asarray(vectors)[: len(chosen)]
            if progress is not None:
                progress(len(chosen))
    if progress is not None and len(rows) < len(texts):
        progress(len(texts) - len(rows))
    return out
