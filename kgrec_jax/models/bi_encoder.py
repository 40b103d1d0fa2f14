"""A bi-encoder of triples in words (SimKGC, Wang et al. 2022): (head, relation) and entity, each to a unit vector.

The score of a tail is the cosine over a learned temperature. Rivals of an answer are the other answers of the batch,
the head itself, and the rows of a bank that holds every entity's vector as it was last encoded (Wu et al. 2018,
"Unsupervised feature learning via non-parametric instance discrimination"); SimKGC's pre-batch negatives are its newest
rows.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kgrec_jax.data.bi_encoder_batches import BiEncoderBatch, Texts
from kgrec_jax.models import encoders, peft
from kgrec_jax.models.encoder_config import EncoderConfig
from kgrec_jax.sharding import TABLE, Rules

_NEVER = -1e9  # a score that takes no part; −inf would make NaN of a row without rivals


@dataclasses.dataclass(frozen=True)
class BiEncoder:
    """Pure functions of what is trained, `params`, and of the encoder's given weights.

    `params` is {"encoder": {"query", and with two towers "entity"}, "scale": {"log"}, "bank": {"rows"}}, each tower its
    adapters or all of its weights.
    """

    encoder: EncoderConfig
    mode: Literal["lora", "full"]
    towers: Literal["shared", "two"] = "shared"
    margin: float = 0.02  # taken off the cosine of an answer
    lora_rank: int = 16
    lora_alpha: float = 32.0
    dtype: str = "float32"

    def init(self, weights: dict, bank_rows: int, temperature: float, key: jax.Array) -> dict:
        """The towers as given, the temperature, and an empty bank [bank_rows, D]: a zero row takes no part."""
        if self.mode == "full":
            towers = {"query": weights}
            if self.towers == "two":  # adding zero makes an array of its own: two that are one could not be donated
                towers["entity"] = jax.tree.map(lambda x: x + jnp.zeros((), x.dtype), weights)
        else:
            keys = jax.random.split(key, 2)
            towers = {"query": peft.lora_init(weights, keys[0], self.lora_rank)}
            if self.towers == "two":
                towers["entity"] = peft.lora_init(weights, keys[1], self.lora_rank)
        return {"encoder": towers, "scale": {"log": -jnp.log(jnp.float32(temperature))},
                "bank": {"rows": jnp.zeros((bank_rows, self.encoder.hidden_size), jnp.float32)}}

    def merged(self, params: dict, given: dict) -> dict:
        """{"query", "entity"}: both towers' weights with what was learned in them, one and the same where shared."""
        towers = params["encoder"]
        if self.mode == "lora":
            towers = {name: peft.lora_merge(given, tree, self.lora_alpha) for name, tree in towers.items()}
        return {"query": towers["query"], "entity": towers["entity" if self.towers == "two" else "query"]}

    def encode(self, weights: dict, texts: Texts) -> jax.Array:
        """Unit vectors [B, D] of texts that were laid out in rungs."""
        laid = [self.encode_rows(weights, ids, mask) for ids, mask in zip(texts.ids, texts.mask, strict=True)]
        return jnp.concatenate(laid)[jnp.asarray(texts.place)]

    def encode_rows(self, weights: dict, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Unit vectors [B, D] float32 of token ids [B, L]."""
        hidden = encoders.hidden_states(self.encoder, weights, ids, mask, dtype=self.dtype)
        return encoders.pool(self.encoder, hidden[-1], jnp.asarray(mask))

    def loss(self, params: dict, given: dict, batch: BiEncoderBatch) -> tuple[jax.Array, dict]:
        """InfoNCE of queries against entities and of answers against queries, and metrics as (sum, count).

        The gradient of `bank/rows` is (old − new), so that plain descent at rate 1 puts in what this step has encoded;
        it adds nothing to the loss.
        """
        weights = self.merged(params, given)
        queries, answers = self.encode(weights["query"], batch.queries), self.encode(weights["entity"], batch.answers)
        bank, scale = params["bank"]["rows"], jnp.exp(params["scale"]["log"])
        by_query, by_answer, top = contrast(queries, answers, jax.lax.stop_gradient(bank), scale, self.margin, batch)
        weight = jnp.asarray(batch.weight)
        count = jnp.maximum(weight.sum(), 1.0)
        total, back = (by_query * weight).sum(), (by_answer * weight).sum()
        renewed = self._renewed(bank, weights["entity"], answers, batch)
        towards = 0.5 * jnp.square(bank - renewed).sum()
        loss = (total + back) / count + towards - jax.lax.stop_gradient(towards)
        return loss, {"query_loss": (total, count), "answer_loss": (back, count),
                      "first": ((top * weight).sum(), count), "inverse_temperature": scale}

    def _renewed(self, bank: jax.Array, weights: dict, answers: jax.Array, batch: BiEncoderBatch) -> jax.Array:
        """The bank with the rows that this step has encoded; nothing here is trained."""
        if batch.refreshed.ids:
            vectors = self.encode(jax.lax.stop_gradient(weights), batch.refreshed)
            bank = bank.at[jnp.asarray(batch.refreshed_id)].set(vectors)
        ids = jnp.where(jnp.asarray(batch.weight) > 0, jnp.asarray(batch.answer), bank.shape[0])  # padding is dropped
        return jax.lax.stop_gradient(bank.at[ids].set(answers, mode="drop"))


def contrast(queries: jax.Array, answers: jax.Array, bank: jax.Array, scale: jax.Array, margin: float,
             batch: BiEncoderBatch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(losses of queries [B], losses of answers [B], whether the answer is above all rivals [B]).

    Each answer of a query, the one in words and those in the bank, stands against the query's rivals alone and never
    against another answer: softplus(log Σ exp rival − answer). The bank's answers count as much together as the fresh
    one. An answer's rivals are the queries that it does not answer.
    """
    among = scale * (queries @ answers.T)  # [B, B]
    own = jnp.diagonal(among) - scale * margin  # [B]
    open_answers = ~jnp.asarray(batch.blocked_answers)
    chosen = jnp.asarray(batch.rivals)
    rows = bank[chosen] if chosen.shape[0] else bank  # [C, D]
    encoded = (rows != 0.0).any(axis=1)  # [C]
    heads, tails = bank[jnp.asarray(batch.head)], bank[jnp.asarray(batch.tails)]  # [B, D], [B, T, D]
    banked = jnp.where(encoded[None, :] & ~jnp.asarray(batch.blocked), scale * (queries @ rows.T), _NEVER)  # [B, C]
    self_open = jnp.asarray(batch.self_rival) & (heads != 0.0).any(axis=1)
    self_score = jnp.where(self_open, scale * (queries * heads).sum(axis=1), _NEVER)
    rivals = jnp.concatenate([jnp.where(open_answers, among, _NEVER), banked, self_score[:, None]], axis=1)
    above = jax.nn.logsumexp(rivals, axis=1)  # [B]
    fresh = jax.nn.softplus(above - own)
    others = scale * (jnp.einsum("bd,btd->bt", queries, tails) - margin)  # [B, T]
    counts = jnp.asarray(batch.tail_weight) * (tails != 0.0).any(axis=2).astype(jnp.float32)
    total = counts.sum(axis=1)
    rest = (jax.nn.softplus(above[:, None] - others) * counts).sum(axis=1) / jnp.maximum(total, 1.0)
    by_query = jnp.where(total > 0, 0.5 * (fresh + rest), fresh)
    real = (jnp.asarray(batch.weight) > 0)[:, None]
    from_queries = jax.nn.logsumexp(jnp.where(open_answers & real, among, _NEVER), axis=0)  # [B]
    return by_query, jax.nn.softplus(from_queries - own), (own > rivals.max(axis=1)).astype(jnp.float32)


def rules(config: EncoderConfig) -> Rules:
    """Path patterns -> PartitionSpec of `BiEncoder`'s params: the bank by rows, the towers as the encoder's own."""
    return ((r"(^|/)bank/rows$", TABLE), (r"(^|/)scale/log$", PartitionSpec()), *encoders.rules(config))
