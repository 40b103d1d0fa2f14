"""The gate: a sum of named, standardised parts with weights that depend on what is known of the user and the item.

    s(u, i) = exp(t) Σ_m w_m(u, i) ẑ_m(u, i),    w_m ∝ present_m(u, i) · exp(a_{m, warm or cold} + b_m·f(u) + c_m·f(i))

The weights of the parts that are present add up to one, so a part that knows nothing of a user or an item leaves the
others in the same scale. A sum, so every score decomposes exactly into its parts.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

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


def gate_init(num_parts: int, num_user: int, num_item: int) -> dict[str, jax.Array]:
    """Equal weights."""
    return {"warm": jnp.zeros(num_parts), "cold": jnp.zeros(num_parts), "user": jnp.zeros((num_user, num_parts)),
            "item": jnp.zeros((num_item, num_parts)), "log_scale": jnp.zeros(()), "level": jnp.zeros(())}


def gate_weights(params: dict[str, jax.Array], inputs: GateInputs) -> jax.Array:
    """[B, K, P]: the weight of each part, adding up to one over the parts that are present (0 where none is)."""
    logits = jnp.where(inputs.cold[..., None], params["cold"][None, None], params["warm"][None, None])
    logits = logits + (inputs.user @ params["user"])[:, None, :] + inputs.item @ params["item"]
    highest = jax.lax.stop_gradient(jnp.where(inputs.present, logits, -jnp.inf).max(-1, keepdims=True))
    raised = jnp.where(inputs.present, jnp.exp(logits - jnp.where(jnp.isfinite(highest), highest, 0.0)), 0.0)
    return raised / jnp.maximum(raised.sum(-1, keepdims=True), 1e-9)


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
    """How far the weights depend on the user and the item: what little data says about it should be pulled to zero."""
    return jnp.square(params["user"]).sum() + jnp.square(params["item"]).sum()
