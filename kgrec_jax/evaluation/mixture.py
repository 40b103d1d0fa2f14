"""A validated mixture of scorers: what structure and text say of a triple, in one score.

Each scorer's scores are standardised per query over all entities, so that a weight means the same for every query, and
the weights are those of the best filtered MRR on validation queries. Every scorer alone is among the choices, so the
mixture is behind the better one by no more than what the validation triples mislead.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from kgrec_jax.evaluation.link_prediction import KnownTails, ScoreBlock, choices_mrr

@dataclasses.dataclass(frozen=True)
class Mixture:
    """Weights of named scorers; they sum to 1."""

    weights: dict[str, float]

    def score_block(self, scorers: Mapping[str, ScoreBlock], num_entities: int) -> ScoreBlock:
        """The mixed scores as one scorer."""
        named = [(scorers[name], weight) for name, weight in self.weights.items() if weight > 0]
        if len(named) == 1:  # alone it needs no common scale
            return named[0][0]

        def mixed(heads: np.ndarray, relations: np.ndarray) -> jax.Array:
            held = [standardised(block(heads, relations), num_entities) for block, _ in named]
            return _mix(np.array([weight for _, weight in named], np.float32), held)

        return mixed


def standardised(scores: jax.Array, num_entities: int) -> jax.Array:
    """Scores [B, Np] less their mean over the first `num_entities` columns, over their standard deviation: [B, N]."""
    return _standardised(scores[:, :num_entities])


@jax.jit
def _standardised(scores: jax.Array) -> jax.Array:
    centred = scores - scores.mean(axis=1, keepdims=True)
    return centred * jax.lax.rsqrt((centred * centred).mean(axis=1, keepdims=True) + 1e-12)


def choose_mixture(scorers: Mapping[str, ScoreBlock], triples: np.ndarray, *, known: KnownTails, num_entities: int,
                   parts: int = 10, say: Callable[[str], None] | None = None) -> Mixture:
    """The weights, multiples of 1 / `parts`, with the best filtered MRR on `triples` [T, 3]; ties: the fewest scorers.

    Without a triple to choose on, all have the same weight. Scores of a query are computed once by each scorer and
    mixed for every choice of weights, a block of queries at a time.
    """
    names = list(scorers)
    if len(names) == 1 or not len(triples):
        return Mixture({name: 1.0 / len(names) for name in names})
    grid = [np.array(w, np.float32) / parts for w in itertools.product(range(parts + 1), repeat=len(names))
            if sum(w) == parts]

    def score_choices(heads: np.ndarray, relations: np.ndarray) -> Iterator[jax.Array]:
        held = [standardised(jnp.asarray(scorers[name](heads, relations)), num_entities) for name in names]
        return (_mix(weights, held) for weights in grid)

    mrr = choices_mrr(score_choices, len(grid), triples, known=known, num_entities=num_entities)
    best = max(range(len(grid)), key=lambda place: (round(mrr[place], 9), -np.count_nonzero(grid[place])))
    chosen = {name: round(float(weight), 6) for name, weight in zip(names, grid[best], strict=True)}
    if say is not None:
        words = ", ".join(f"{name} {weight:.1f}" for name, weight in chosen.items())
        say(f"mixture: {words}; validation MRR {mrr[best]:.4f}")
    return Mixture(chosen)


@jax.jit
def _mix(weights: jax.Array, held: list[jax.Array]) -> jax.Array:
    return sum(weights[k] * scores for k, scores in enumerate(held))
