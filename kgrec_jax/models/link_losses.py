"""The margin loss of sampled rivals, from scores alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def wrong_rivals(tails: jax.Array, weight: jax.Array, candidates: jax.Array) -> jax.Array:
    """[B, C] bool: False where a candidate, [C] or [B, C], is one of its row's own answers, tails and weight [B, T].

    Answers that the row does not hold (another row's, those of other parts) are not known here.
    """
    if candidates.ndim == 1:
        candidates = candidates[None]
    answer = (candidates[:, None, :] == tails[:, :, None]) & (weight[:, :, None] > 0)  # [B, T, C]
    return ~answer.any(axis=1)


def self_adversarial(positive: jax.Array, weight: jax.Array, negative: jax.Array, wrong: jax.Array, *, margin: float,
                     temperature: float) -> jax.Array:
    """Σ_t w_t (−log σ(γ + s_t) − Σ_i p_i log σ(−γ − s_i)), p = softmax_i(α s_i) without a gradient: [B].

    RotatE's loss (Sun et al. 2019, eq. 5) for scores −d of answers, `positive` and `weight` [B, T], and of rivals,
    `negative` [B, C], `margin` γ and `temperature` α (0: all rivals count alike). A rival that is not `wrong` [B, C]
    does not count; a row without rivals learns from its answers alone.
    """
    weight, negative = jax.lax.stop_gradient(weight), jnp.where(wrong, negative, 0.0)
    # The large constant instead of −inf: a row whose rivals are all answers must not become NaN.
    share = jnp.where(wrong, jax.nn.softmax(jnp.where(wrong, temperature * negative, -1e30), axis=1), 0.0)
    pushed = -(jax.lax.stop_gradient(share) * jax.nn.log_sigmoid(-margin - negative)).sum(axis=1)  # [B]
    pulled = -(weight * jax.nn.log_sigmoid(margin + positive)).sum(axis=1)
    return pulled + weight.sum(axis=1) * pushed
