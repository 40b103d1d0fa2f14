"""A text encoder that learns inside the towers: vectors of the items of a step, and the memory of those of all others.

The items that a step reads get their vectors in it, with gradients; every other item has the vector of the step in
which it was read last (a memory bank; Wu et al. 2018, and across batches Wang et al. 2020). The bank is a table of the
trained tree that no gradient of a loss reaches: what moves it is a term of value zero.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from kgrec_jax.models import encoders, peft
from kgrec_jax.models.encoder_config import EncoderConfig
from kgrec_jax.models.peft import PeftConfig


@dataclasses.dataclass(frozen=True)
class TextReader:
    """An encoder, and what of it learns."""

    config: EncoderConfig
    peft: PeftConfig  # lora or full, which merge into plain weights
    dtype: str = "float32"  # of the computation

    def init(self, weights: dict, key: jax.Array) -> dict:
        """What learns, beside the backbone's `weights`: it changes no vector yet. KgrecError for a decoder."""
        return peft.init(self.peft, self.config, weights, key)

    def base(self, weights: dict) -> dict:
        """The weights that do not learn."""
        return peft.base(self.peft, self.config, weights)

    def merged(self, base: dict, trainable: dict) -> dict:
        """Plain weights of the backbone: what the vectors are made with in a step, and what is handed on."""
        return peft.merge(self.peft, base, trainable)

    def vectors(self, weights: dict, input_ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Unit vectors [E, d] of texts [E, L], as `text_encoder.encode_texts` gives them (no dropout)."""
        hidden = encoders.hidden_states(self.config, weights, input_ids, mask, dtype=self.dtype)
        return encoders.pool(self.config, hidden[-1], mask)


def remembered(bank: jax.Array, item: jax.Array, vectors: jax.Array) -> jax.Array:
    """0, with the gradient in `bank` [I, d] by which `memory` puts `vectors` [E, d] into its rows `item` [E] int32.

    No row twice; a row beyond the table is none.
    """
    apart = jnp.take(bank, item, axis=0, mode="clip") - jax.lax.stop_gradient(vectors)
    half = 0.5 * jnp.where((item < bank.shape[0])[:, None], jnp.square(apart), 0.0).sum()
    return half - jax.lax.stop_gradient(half)


def memory() -> optax.GradientTransformation:
    """The optimiser of a bank: one plain step of size one, after which the rows are what `remembered` was given."""
    return optax.scale(-1.0)
