"""The gate: a sum of named, standardised parts with weights that depend on what is known of the user and the item.

    s(u, i) = exp(t) Σ_m w_m(u, i, ẑ) ẑ_m(u, i),    w_m ∝ present_m(u, i) · exp(a_{m, warm or cold} + h_m(u, i, ẑ))

    additive    h_m = b_m·f(u) + c_m·f(i)
    attention   h_m = q·k_m / √d,  q = Q [1, cold, f(u), f(i)],  k_m = e_m + K [t(ẑ_m), t(ẑ_m − mean of the present ẑ)]
    mlp         h = B tanh(A [t(ẑ) ⊕ present ⊕ cold ⊕ f(u) ⊕ f(i)] + a)

with t(x) = tanh(x / 3). Whatever the head, it gives weights alone: those of the parts that are present add up to one,
so a part that knows nothing of a user or an item leaves the others in the same scale, and the score is a sum that
decomposes exactly into its parts. Which head a gate has is told by the names of its parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Head = Literal["additive", "attention", "mlp"]
ATTENTION_WIDTH, MLP_WIDTH = 8, 16  # d, and hidden units: there are a dozen parts and few held-out interactions
ALONE = 20.0  # logit that makes one part's weight all there is
UNKNOWN = -10.0  # the score of an item of which no part knows anything: below every other


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GateInputs:
    """Candidates of some users, and what the parts say about them."""

    scores: jax.Array  # [B, K, P] float32, standardised per user
    present: jax.Array  # [B, K, P] bool, the part knows the user and the item
    cold: jax.Array  # [B, K] bool
    user: jax.Array  # [B, Fu] float32, features of the user
    item: jax.Array  # [B, K, Fi] float32, features of the item


def gate_init(num_parts: int, num_user: int, num_item: int, head: Head = "additive",
              key: jax.Array | None = None) -> dict[str, jax.Array]:
    """Equal weights; attention and mlp need a `key`."""
    params = {"warm": jnp.zeros(num_parts), "cold": jnp.zeros(num_parts), "log_scale": jnp.zeros(()),
              "level": jnp.zeros(())}
    if head == "additive":
        return {**params, "user": jnp.zeros((num_user, num_parts)), "item": jnp.zeros((num_item, num_parts))}
    one, other = jax.random.split(key)
    if head == "attention":
        return {**params, "query": jnp.zeros((2 + num_user + num_item, ATTENTION_WIDTH)),
                "part_key": jax.random.normal(one, (num_parts, ATTENTION_WIDTH), jnp.float32),
                "score_key": jax.random.normal(other, (2, ATTENTION_WIDTH), jnp.float32)}
    inputs = 2 * num_parts + 1 + num_user + num_item
    return {**params, "mlp_in": jax.random.normal(one, (inputs, MLP_WIDTH), jnp.float32) / np.float32(inputs ** 0.5),
            "mlp_bias": jnp.zeros(MLP_WIDTH), "mlp_out": jnp.zeros((MLP_WIDTH, num_parts))}


def gate_weights(params: dict[str, jax.Array], inputs: GateInputs) -> jax.Array:
    """[B, K, P]: the weight of each part, adding up to one over the parts that are present (0 where none is)."""
    logits = jnp.where(inputs.cold[..., None], params["cold"][None, None], params["warm"][None, None])
    if "user" in params:
        logits = logits + (inputs.user @ params["user"])[:, None, :] + inputs.item @ params["item"]
    else:
        more = (_attended if "query" in params else _bent)(params, inputs)
        # A part that decides alone does so whatever the head says: see `alone`.
        deaf = jnp.where(inputs.cold, "cold_alone" in params, "warm_alone" in params)
        logits = logits + jnp.where(deaf[..., None], 0.0, more)
    highest = jax.lax.stop_gradient(jnp.where(inputs.present, logits, -jnp.inf).max(-1, keepdims=True))
    raised = jnp.where(inputs.present, jnp.exp(logits - jnp.where(jnp.isfinite(highest), highest, 0.0)), 0.0)
    return raised / jnp.maximum(raised.sum(-1, keepdims=True), 1e-9)


def _attended(params: dict[str, jax.Array], inputs: GateInputs) -> jax.Array:
    """[B, K, P]: q·k_m / √d; the keys themselves, [B, K, P, d], are never made."""
    query = _known(inputs) @ params["query"]  # [B, K, d]
    count = jnp.maximum(inputs.present.sum(-1, keepdims=True), 1).astype(jnp.float32)
    scores = jnp.where(inputs.present, inputs.scores, 0.0)
    apart = scores - scores.sum(-1, keepdims=True) / count
    by_score = query @ params["score_key"].T  # [B, K, 2]
    logits = (query @ params["part_key"].T + by_score[..., :1] * _squashed(scores)
              + by_score[..., 1:] * _squashed(apart))
    return logits / jnp.sqrt(jnp.float32(params["query"].shape[1]))


def _bent(params: dict[str, jax.Array], inputs: GateInputs) -> jax.Array:
    """[B, K, P]: what the MLP makes of all scores, of which are there, and of what is known of user and item."""
    present = inputs.present.astype(jnp.float32)
    seen = jnp.concatenate([_squashed(inputs.scores) * present, present, _known(inputs)[..., 1:]], axis=-1)
    return jnp.tanh(seen @ params["mlp_in"] + params["mlp_bias"][None, None]) @ params["mlp_out"]


def _known(inputs: GateInputs) -> jax.Array:
    """[B, K, 2 + Fu + Fi]: 1, whether the item is cold, f(u), f(i)."""
    cold = inputs.cold.astype(jnp.float32)[..., None]
    user = jnp.broadcast_to(inputs.user[:, None, :], (*inputs.cold.shape, inputs.user.shape[-1]))
    return jnp.concatenate([jnp.ones_like(cold), cold, user, inputs.item], axis=-1)


def _squashed(scores: jax.Array) -> jax.Array:
    return jnp.tanh(scores / 3.0)


def warm_shares(params: Mapping[str, np.ndarray]) -> np.ndarray:
    """[P] what each part weighs for warm items before users, items and scores have their say, adding up to 1."""
    weights = np.exp(params["warm"] - params["warm"].max())
    return weights / weights.sum()


def alone(params: dict, part: int, cold: bool) -> dict:
    """The gate in which one part decides the order of the cold items, or of the warm ones."""
    side = "cold" if cold else "warm"
    weights = np.zeros(len(params[side]), np.float32)
    weights[part] = ALONE
    deaf = {} if "user" in params else {f"{side}_alone": np.ones((), np.float32)}
    return {**params, side: weights, **deaf}


def gate_contributions(params: dict[str, jax.Array], inputs: GateInputs) -> jax.Array:
    """[B, K, P + 1]: what each part adds to the score, and last the level of cold (or unknown) items."""
    parts = jnp.exp(params["log_scale"]) * gate_weights(params, inputs) * inputs.scores
    level = jnp.where(inputs.cold, params["level"], 0.0)
    level = jnp.where(inputs.present.any(-1), level, UNKNOWN)
    return jnp.concatenate([jnp.where(inputs.present, parts, 0.0), level[..., None]], axis=-1)


def gate_scores(params: dict[str, jax.Array], inputs: GateInputs) -> jax.Array:
    """[B, K]: the fused score."""
    return gate_contributions(params, inputs).sum(-1)


def gate_penalty(params: dict[str, jax.Array]) -> jax.Array:
    """How far the weights depend on user, item and scores: what little data says about it should be pulled to zero."""
    depends = ("user", "item") if "user" in params else ("query",) if "query" in params else ("mlp_out",)
    total = jnp.square(params[depends[0]]).sum()
    for name in depends[1:]:
        total = total + jnp.square(params[name]).sum()
    return total
