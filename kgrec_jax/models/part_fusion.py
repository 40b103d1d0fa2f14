"""How the parts of an item become its vector where they are not just added: attention over them, or an MLP.

Both give back vectors of the same parts that add up to the item's, so that its score still decomposes exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from kgrec_jax.models.history_towers import safe_softmax


class PartFusion(nn.Module):
    """{part: [I, D]} and {part: [I] bool, whether an item has it} -> {part: [I, D]}, adding up to the items' vectors.

    attention: w_m p_m with w the softmax of q·tanh(W p_m + e_m) over the parts that are there.
    concat-mlp: x + W₂ gelu(W₁ [p_1 ⊕ … ⊕ p_M ⊕ flags]) with x = Σ_m p_m. W₁ is kept in a block a part, its bias being
    the column of the part's flag, so z = W₁[…] is Σ_m z_m. Since gelu(z) = Φ(z) z, what part m gives is
    p_m + W₂ (Φ(z) z_m), exactly and with nothing left over: Φ(z), which all parts decide together, weighs what each
    brings (the rescale rule of DeepLIFT with a reference of zero; Shrikumar et al. 2017). Zero for a part that is not
    there.
    """

    kind: Literal["attention", "concat-mlp"]
    width: int  # D

    @nn.compact
    def __call__(self, parts: Mapping[str, jax.Array], present: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        return (self._attention if self.kind == "attention" else self._mlp)(parts, present)

    def _attention(self, parts: Mapping[str, jax.Array], present: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        key = nn.Dense(self.width, use_bias=False, name="key")
        query = self.param("query", nn.initializers.zeros, (self.width,))  # at first all parts count alike
        logits = []
        for name, vectors in parts.items():
            own = self.param(f"{name}_key", nn.initializers.zeros, (self.width,))
            logits.append((nn.tanh(key(vectors) + own[None]) * query[None]).sum(-1))
        there = jnp.stack([present[name] for name in parts], axis=-1)  # [I, M]
        weights = safe_softmax(jnp.stack(logits, axis=-1), there)
        return {name: weights[:, m, None] * vectors for m, (name, vectors) in enumerate(parts.items())}

    def _mlp(self, parts: Mapping[str, jax.Array], present: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        inner = {name: jnp.where(present[name][:, None], nn.Dense(self.width, name=f"{name}_in")(vectors), 0.0)
                 for name, vectors in parts.items()}  # z_m, [I, D]
        opened = jax.scipy.stats.norm.cdf(sum(inner.values()))
        out = nn.Dense(self.width, use_bias=False, kernel_init=nn.initializers.zeros, name="out")  # at first the sum
        return {name: jnp.where(present[name][:, None], vectors + out(opened * inner[name]), 0.0)
                for name, vectors in parts.items()}
