"""Texts to vectors of unit length: an encoder's last hidden states, pooled."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kgrec_jax.models import encoders
from kgrec_jax.models.encoders import EncoderConfig, Pooling

if TYPE_CHECKING:
    from kgrec_jax.data.text import Tokenizer
    from kgrec_jax.pretrained.hf import Encoder

MIN_LENGTH = 16  # shortest padded length, and the step between two lengths
FULL_LENGTH = 64  # padded length up to which a step reads a whole batch of texts; of longer ones as many fewer
SHAPE_PRICE = 4000  # padding tokens that a further padded length must save, as it costs a compilation


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames=("pooling",))
def encode_batch(config: EncoderConfig, dtype: str, params: dict, input_ids: jax.Array, mask: jax.Array,
                 pooling: Pooling = "auto") -> jax.Array:
    """Unit vectors [B, D] of token ids [B, L], pooled as `encoders.pool` says."""
    hidden = encoders.hidden_states(config, params, input_ids, mask, dtype=dtype)
    return encoders.pool(config, hidden[-1], mask, pooling)


def padded_lengths(lengths: np.ndarray, longest: int) -> list[int]:
    """Ascending lengths to which texts of `lengths` [n] tokens are padded, the last of them at least their greatest.

    Powers of two from MIN_LENGTH on and `longest` are there for nothing; of the other multiples of MIN_LENGTH those
    are taken that save more padding than SHAPE_PRICE each, by dynamic programming. So a catalogue gets a finer ladder
    than a query, and programs are shared between catalogues.
    """
    powers = {MIN_LENGTH << k for k in range(16) if MIN_LENGTH << k < longest} | {longest}
    ladder = sorted({*range(MIN_LENGTH, longest, MIN_LENGTH), *powers})
    within = np.searchsorted(np.sort(lengths), ladder, side="right")  # texts of at most so many tokens
    best, taken = [0.0], [[]]  # for the texts up to the rung before: (tokens and prices, the lengths used)
    for j, top in enumerate(ladder):
        price = 0 if top in powers else SHAPE_PRICE
        before = [0, *within[:j]]
        costs = [best[i] + (top * (within[j] - before[i]) + price if within[j] > before[i] else 0.0)
                 for i in range(j + 1)]
        i = int(np.argmin(costs))
        best.append(costs[i])
        taken.append(taken[i] + ([top] if within[j] > before[i] else []))
    return taken[-1]


def encode_texts(encoder: Encoder, params: dict, tokenizer: Tokenizer, texts: Sequence[str], *, max_length: int = 128,
                 batch_size: int = 0, progress: Callable[[int], None] | None = None,
                 mesh: Mesh | None = None, pooling: Pooling = "auto") -> np.ndarray:
    """[n, D] float32 unit vectors of `texts`; an empty text gets a zero row (see `data.text.present_texts`).

    Texts are sorted by length and padded to `padded_lengths`, so that few shapes are compiled. A step reads at most
    `batch_size` texts (0: as many as suit the device), and beyond FULL_LENGTH tokens as many fewer: what a step holds
    stays in a processor's cache. `progress(n)` is called with the number of texts done since the last call. With
    a `mesh` the rows of a step are spread over its axis "data". `pooling` as in `encoders.pool`.
    """
    max_length = min(max_length, encoder.config.max_position_embeddings)
    shares = mesh.shape["data"] if mesh is not None else 1
    batch_size = batch_size or (32 if jax.default_backend() == "cpu" else 1024)
    out = np.zeros((len(texts), encoder.config.hidden_size), np.float32)
    rows = np.array([row for row, text in enumerate(texts) if text.strip()], np.int64)
    ids = tokenizer.encode([texts[row] for row in rows], max_length)
    lengths = np.array([len(tokens) for tokens in ids], np.int64)
    order = np.argsort(-lengths, kind="stable")  # longest first: running out of memory shows at once
    bounds = padded_lengths(lengths, max_length)
    waiting: list[tuple[np.ndarray, jax.Array]] = []

    def collect() -> None:
        chosen, vectors = waiting.pop()
        out[rows[chosen]] = np.asarray(vectors)[: len(chosen)]
        if progress is not None:
            progress(len(chosen))

    start = 0
    while start < len(order):
        length = bounds[np.searchsorted(bounds, lengths[order[start]])]
        size = -(-max(1, min(batch_size, batch_size * FULL_LENGTH // length)) // shares) * shares
        chosen = order[start : start + size]
        start += size
        arrays = tokenizer.pad([ids[i] for i in chosen], length)
        batch = [np.pad(array, ((0, size - len(chosen)), (0, 0))) for array in arrays]  # [size, length]
        if mesh is not None:
            batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data", None)))
        vectors = encode_batch(encoder.config, encoder.dtype, params, *batch, pooling=pooling)
        if waiting:  # the next batch is prepared while this one is computed
            collect()
        waiting.append((chosen, vectors))
    if waiting:
        collect()
    if progress is not None and len(rows) < len(texts):
        progress(len(texts) - len(rows))
    return out
