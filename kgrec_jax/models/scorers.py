"""Structural scorers of triples, each as a query against the rows of the entity table.

Every scorer turns a head row and a relation row into one query vector, so that

    score(h, r, t) = query(h, r) · t + row_bias(t) + query_bias(query)

Ranking all tails is then a single matrix product, and the loss over all tails is `losses.table_cross_entropy`
(`query_bias` is the same for every tail and drops out of a softmax). Heads are predicted through inverse relations,
which have rows of their own. The "-l1" scorers alone have no such form: their distance is a sum of moduli, and they
learn from sampled rivals. To add a scorer: write its query function (or, where it has weights of its own, a module of
`neural_scorers`) and add one entry to `SCORERS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from kgrec_jax.errors import KgrecError
from kgrec_jax.models.neural_scorers import ConvE, Tucker, dropped, image_shape


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


def complex_relation(h: jax.Array, t: jax.Array) -> jax.Array:
    """What ComplEx multiplies with r: conj(h) t, so that the product's real part is Re Σ h r conj(t)."""
    h_re, h_im = _halves(h)
    return _complex_product(t, jnp.concatenate([h_re, -h_im], axis=-1))


def simple(h: jax.Array, r: jax.Array) -> jax.Array:
    """SimplE (Kazemi & Poole 2018): ½ (Σ s_h r o_t + Σ s_t r⁻¹ o_h).

    An entity row is [s | o], what it is as a subject and as an object; a relation row is [r | r⁻¹].
    """
    h_subject, h_object = _halves(h)
    forward, backward = _halves(r)
    return 0.5 * jnp.concatenate([h_object * backward, h_subject * forward], axis=-1)


def simple_relation(h: jax.Array, t: jax.Array) -> jax.Array:
    """What SimplE multiplies with [r | r⁻¹]: ½ [s_h o_t | s_t o_h]."""
    h_subject, h_object = _halves(h)
    t_subject, t_object = _halves(t)
    return 0.5 * jnp.concatenate([h_subject * t_object, t_subject * h_object], axis=-1)


def transe(h: jax.Array, r: jax.Array) -> jax.Array:
    """TransE (Bordes et al. 2013): −|h + r − t|², or −Σ|h + r − t| as "transe-l1"; returns 2 (h + r)."""
    return 2.0 * (h + r)


def rotate(h: jax.Array, r: jax.Array) -> jax.Array:
    """RotatE (Sun et al. 2019) with the squared distance: −|h∘r − t|², each complex r divided by its modulus.

    The relation row keeps D numbers like every other scorer's (a point on each of D/2 rays instead of an angle).
    "rotate-l1" has the published distance, the sum of the complex moduli |h∘r − t|. Returns 2 h∘r.
    """
    r_re, r_im = _halves(r)
    # The small constant keeps the gradient finite at the origin, where an angle is not defined.
    scale = jax.lax.rsqrt(r_re * r_re + r_im * r_im + 1e-12)
    return 2.0 * _complex_product(h, jnp.concatenate([r_re * scale, r_im * scale], axis=-1))


@dataclasses.dataclass(frozen=True)
class ScorerOptions:
    """What scorers can be told beside their name; a scorer reads what concerns it."""

    input_dropout: float = 0.0  # share of the head rows' numbers that a training step drops
    hidden_dropout: float = 0.0  # share of the feature maps' numbers that a training step drops; conve
    query_dropout: float = 0.0  # share of the queries' numbers that a training step drops
    core_rank: int = 0  # numbers of a relation row that the core tensor reads; 0: all of them; tucker
    channels: int = 32  # filters of the convolution; conve
    kernel: int = 3  # side of the filters; conve


@dataclasses.dataclass(frozen=True)
class Scorer:
    """One scoring function and what its tables look like."""

    transform: Callable[[jax.Array, jax.Array], jax.Array] | None = None  # ([…, D], […, D]) -> […, D]
    module: Callable[[int, ScorerOptions], nn.Module] | None = None  # in its place, with weights; (D, options)
    relation_transform: Callable[[jax.Array, jax.Array], jax.Array] | None = None  # (h, t) -> query against U
    distance: bool = False  # −|q/2 − t|² instead of q · t
    l1: bool = False  # −Σ|q/2 − t| over the (complex) numbers of a row instead of q · t
    complex: bool = False  # rows are D/2 complex numbers, D must be even
    paired: bool = False  # rows are two halves of real numbers, D must be even
    entity_bias: bool = False  # every entity has a learned bias of its own, a number beside its row
    init_norm: float = 0.5  # length of a fresh row; with `l1` the sum of its moduli
    options: ScorerOptions = ScorerOptions()

    def init_scale(self, dim: int) -> float:
        """Standard deviation of a fresh row's numbers."""
        # A sum of moduli grows with D, and the margin that it is measured against does not.
        return self.init_norm / (dim if self.l1 else dim**0.5)

    def init(self, dim: int, key: jax.Array) -> dict:
        """Fresh weights of the query; empty where it has none."""
        if self.module is None:
            return {}
        row = jnp.zeros((1, dim), jnp.float32)
        return self.module(dim, self.options).init(key, row, row)["params"]

    def query(self, h: jax.Array, r: jax.Array, weights: dict | None = None, key: jax.Array | None = None) -> jax.Array:
        """Queries of rows [B, D] and the weights of `init` -> [B, D]; dropout only with a key."""
        keys = (None, None, None) if key is None else jax.random.split(key, 3)
        h = dropped(h, self.options.input_dropout, keys[0])
        if self.module is None:
            out = self.transform(h, r)
        else:
            out = self.module(h.shape[-1], self.options).apply({"params": weights}, h, r, keys[1])
        return dropped(out, self.options.query_dropout, keys[2])

    def row_bias(self, rows: jax.Array, own: jax.Array | None = None) -> jax.Array | None:
        """What each row [..., D] adds to its score whatever the query, [...]; None where it adds nothing.

        `own` [...] are the learned biases of these rows where the scorer has them.
        """
        return -jnp.sum(rows * rows, axis=-1) if self.distance else own

    def query_bias(self, query: jax.Array) -> jax.Array | None:
        """What a query adds to all of its scores, [B]; None where it adds nothing."""
        return -0.25 * jnp.sum(query * query, axis=-1) if self.distance else None

    def compare(self, query: jax.Array, rows: jax.Array, own: jax.Array | None = None) -> jax.Array:
        """Scores [B, C] of queries [B, D] and rows [C, D] that all share, or rows [B, C, D] of each query.

        `own` [C] or [B, C]: learned biases of the rows.
        """
        each = rows.ndim == 3
        if self.l1:
            # [B, C, D] is summed as it is made; only a gradient keeps it.
            return -self._moduli(0.5 * query[:, None, :] - (rows if each else rows[None])).sum(axis=-1)
        out = jnp.sum(query[:, None, :] * rows, axis=-1) if each else query @ rows.T
        bias, shift = self.row_bias(rows, own), self.query_bias(query)
        if bias is not None:
            out = out + (bias if each else bias[None, :])
        return out if shift is None else out + shift[:, None]

    def score(self, h: jax.Array, r: jax.Array, t: jax.Array, weights: dict | None = None,
              own: jax.Array | None = None) -> jax.Array:
        """Score of each triple, rows [B, D] -> [B]; `own` [B]: learned biases of the tails."""
        own = None if own is None else own[:, None]
        return self.compare(self.query(h, r, weights), t[:, None, :], own)[:, 0]

    def score_all(self, h: jax.Array, r: jax.Array, table: jax.Array, weights: dict | None = None,
                  own: jax.Array | None = None) -> jax.Array:
        """Scores of every tail, rows [B, D] and table [N, D] -> [B, N]; for blocks of an evaluation."""
        return self.compare(self.query(h, r, weights), table, own)

    def nuclear_3_norm(self, rows: jax.Array) -> jax.Array:
        """Σ |x|³ over a row's (complex) factors, [B, D] -> [B] (N3, Lacroix et al. 2018)."""
        return jnp.sum(self._moduli(rows) ** 3, axis=-1)

    def _moduli(self, rows: jax.Array) -> jax.Array:
        if self.complex:
            re, im = _halves(rows)
            # The square root has no gradient at 0, where padded rows are.
            return jnp.sqrt(re * re + im * im + 1e-12)
        return jnp.abs(rows)


SCORERS: dict[str, Scorer] = {
    "complex": Scorer(complex_, relation_transform=complex_relation, complex=True),
    "distmult": Scorer(distmult, relation_transform=distmult),
    "simple": Scorer(simple, relation_transform=simple_relation, paired=True),
    "transe": Scorer(transe, distance=True, init_norm=1.0),
    "transe-l1": Scorer(transe, l1=True, init_norm=8.0),
    "rotate": Scorer(rotate, distance=True, complex=True, init_norm=1.0),
    "rotate-l1": Scorer(rotate, l1=True, complex=True, init_norm=8.0),
    "tucker": Scorer(module=lambda dim, options: Tucker(dim, options.core_rank or dim)),
    "conve": Scorer(module=lambda dim, options: ConvE(dim, options.channels, options.kernel, options.hidden_dropout),
                    entity_bias=True),
}


def get_scorer(name: str, dim: int, options: ScorerOptions = ScorerOptions()) -> Scorer:
    """The scorer of that name; KgrecError where there is none or where `dim` or the options do not suit it."""
    if name not in SCORERS:
        raise KgrecError(f"graph.scorer: found {name!r}, expected one of {', '.join(SCORERS)}")
    scorer = SCORERS[name]
    halves = scorer.complex or scorer.paired
    if dim < 2 or (halves and dim % 2):
        need = "an even number of at least 2" if halves else "at least 2"
        raise KgrecError(f"graph.dim: found {dim}, expected {need} for the scorer {name!r}; change graph.dim")
    _check_options(name, dim, options)
    return scorer if options == scorer.options else dataclasses.replace(scorer, options=options)


def _check_options(name: str, dim: int, options: ScorerOptions) -> None:
    for field in ("input_dropout", "hidden_dropout", "query_dropout"):
        rate = getattr(options, field)
        if not 0.0 <= rate < 1.0:
            raise KgrecError(f"graph.options.{field}: found {rate}, expected a share from 0 to below 1")
    if name == "tucker" and not 0 <= options.core_rank <= dim:
        raise KgrecError(f"graph.options.core_rank: found {options.core_rank}, expected 1 to graph.dim ({dim}), "
                         "or 0 for all of a relation's numbers")
    if name != "conve":
        return
    if options.channels < 1 or options.kernel < 1:
        raise KgrecError(f"graph.options: found channels {options.channels} and kernel {options.kernel}, "
                         "expected at least 1 of each")
    height, width = image_shape(dim)
    if min(2 * height, width) < options.kernel:
        raise KgrecError(f"graph.dim: found {dim}, a row as an image of {height} × {width}, two of which are smaller "
                         f"than the filters of {options.kernel} × {options.kernel}; change graph.dim to a product of "
                         "near-equal factors (128, 200) or lower graph.options.kernel")
