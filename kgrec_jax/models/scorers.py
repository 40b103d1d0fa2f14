"""Structural scorers of triples, each as a query against the rows of the entity table.

Every scorer turns a head row and a relation row into one query vector, so that

    score(h, r, t) = query(h, r) · t + row_bias(t) + query_bias(query)

Ranking all tails is then a single matrix product, and the loss over all tails is `losses.table_cross_entropy`
(`query_bias` is the same for every tail and drops out of a softmax). Heads are predicted through inverse relations,
which have rows of their own. To add a scorer: write its query function and add one entry to `SCORERS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kgrec_jax.errors import KgrecError


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Real and imaginary parts: a complex row is stored as [real | imaginary]."""
    return tuple(jnp.split(x, 2, axis=-1))


def _complex_product(h: jax.Array, r: jax.Array) -> jax.Array:
    h_re, h_im = _halves(h)
    r_re, r_im = _halves(r)
    return jnp.concatenate([h_re * r_re - h_im * r_im, h_re * r_im + h_im * r_re], axis=-1)


def distmult(h: jax.Array, r: jax.Array) -> jax.Array:
    """DistMult (Yang et al. 2015): Σ h r t. Symmetric in h and t but for the inverse relations' own rows."""
    return h * r


def complex_(h: jax.Array, r: jax.Array) -> jax.Array:
    """ComplEx (Trouillon et al. 2016): Re Σ h r conj(t) over D/2 complex numbers."""
    return _complex_product(h, r)


def transe(h: jax.Array, r: jax.Array) -> jax.Array:
    """TransE (Bordes et al. 2013) with the squared distance: −|h + r − t|²; returns 2 (h + r)."""
    return 2.0 * (h + r)


def rotate(h: jax.Array, r: jax.Array) -> jax.Array:
    """RotatE (Sun et al. 2019) with the squared distance: −|h∘r − t|², each complex r divided by its modulus.

    The relation row keeps D numbers like every other scorer's (a point on each of D/2 rays instead of an angle).
    """
    r_re, r_im = _halves(r)
    # The small constant keeps the gradient finite at the origin, where an angle is not defined.
    scale = jax.lax.rsqrt(r_re * r_re + r_im * r_im + 1e-12)
    return 2.0 * _complex_product(h, jnp.concatenate([r_re * scale, r_im * scale], axis=-1))


@dataclasses.dataclass(frozen=True)
class Scorer:
    """One scoring function and what its tables look like."""

    query: Callable[[jax.Array, jax.Array], jax.Array]  # ([…, D], […, D]) -> […, D]
    distance: bool = False  # −|q − t|² instead of q · t
    complex: bool = False  # rows are D/2 complex numbers, D must be even
    init_norm: float = 0.5  # length of a fresh row

    def row_bias(self, rows: jax.Array) -> jax.Array | None:
        """What each row adds to its own score whatever the query, [N]; None where it adds nothing."""
        return -jnp.sum(rows * rows, axis=-1) if self.distance else None

    def query_bias(self, query: jax.Array) -> jax.Array | None:
        """What a query adds to all of its scores, [B]; None where it adds nothing."""
        return -0.25 * jnp.sum(query * query, axis=-1) if self.distance else None

    def score(self, h: jax.Array, r: jax.Array, t: jax.Array) -> jax.Array:
        """Score of each triple, rows [B, D] -> [B]."""
        query = self.query(h, r)
        out = jnp.sum(query * t, axis=-1)
        if self.distance:
            out = out + self.row_bias(t) + self.query_bias(query)
        return out

    def score_all(self, h: jax.Array, r: jax.Array, table: jax.Array) -> jax.Array:
        """Scores of every tail, rows [B, D] and table [N, D] -> [B, N]; for blocks of an evaluation."""
        query = self.query(h, r)
        out = query @ table.T  # [B, N]
        if self.distance:
            out = out + self.row_bias(table)[None, :] + self.query_bias(query)[:, None]
        return out

    def nuclear_3_norm(self, rows: jax.Array) -> jax.Array:
        """Σ |x|³ over a row's (complex) factors, [B, D] -> [B] (N3, Lacroix et al. 2018)."""
        if self.complex:
            re, im = _halves(rows)
            # The square root has no gradient at 0, where padded rows are.
            return jnp.sum((re * re + im * im + 1e-12) ** 1.5, axis=-1)
        return jnp.sum(jnp.abs(rows) ** 3, axis=-1)


SCORERS: dict[str, Scorer] = {
    "complex": Scorer(complex_, complex=True),
    "distmult": Scorer(distmult),
    "transe": Scorer(transe, distance=True, init_norm=1.0),
    "rotate": Scorer(rotate, distance=True, complex=True, init_norm=1.0),
}


def get_scorer(name: str, dim: int) -> Scorer:
    """The scorer of that name; KgrecError where there is none or where `dim` does not suit it."""
    if name not in SCORERS:
        raise KgrecError(f"graph.scorer: found {name!r}, expected one of {', '.join(SCORERS)}")
    scorer = SCORERS[name]
    if dim < 2 or (scorer.complex and dim % 2):
        need = "an even number of at least 2" if scorer.complex else "at least 2"
        raise KgrecError(f"graph.dim: found {dim}, expected {need} for the scorer {name!r}; change graph.dim")
    return scorer
