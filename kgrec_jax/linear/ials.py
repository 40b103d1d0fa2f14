"""iALS: implicit matrix factorisation by alternating least squares (Hu, Koren, Volinsky 2008).

The objective is that of Rendle et al. 2022, "Revisiting the Performance of iALS on Item Recommendation Benchmarks",

    Σ_{(u,i) ∈ S} (x_u·h_i − 1)² + α Σ_{u,i} (x_u·h_i)²
        + λ Σ_u (|S_u| + α I)^ν |x_u|² + λ Σ_i (|S_i| + α Nu)^ν |h_i|²,

and every half of a step is solved exactly. A user is no more than a solve for its history, so users who came after
training are served like the others, and only the items' factors are kept. Nothing is ever [Nu, I]: memory is the two
tables of factors beside the log.
"""

from __future__ import annotations

import dataclasses
import pathlib
import zlib
from collections.abc import Callable

import numpy as np
import scipy.sparse as sp

from kgrec_jax.linear.least_squares import outer_sum, padded, solve_rows
from kgrec_jax.linear.parts import FoldIn
from kgrec_jax.tracking import NPZ_ERRORS, write_npz

START = 0.1  # standard deviation of a factor's length at the start, before the division by √D


@dataclasses.dataclass(frozen=True)
class Settings:
    """What an iALS model is fitted with."""

    dim: int = 64  # D of the factors
    l2: float = 0.01  # λ
    unobserved: float = 0.1  # α: weight of a pair that is not in the log
    exponent: float = 1.0  # ν: how λ grows with a row's entries
    iterations: int = 16  # of both halves


def ials(train: sp.csr_matrix, settings: Settings = Settings(), *, seed: int = 0, keep: pathlib.Path | None = None,
         advance: Callable[[int], None] | None = None) -> FoldIn:
    """The items' factors of a log, as a part that folds histories in.

    Args:
      train: [Nu, I] binary CSR.
      keep: a file that holds the factors after every iteration; the same call on the same log goes on from it.
      advance: called with the iterations that are done, for a progress bar.
    """
    touched = train.getnnz(axis=0) > 0
    lengths, by_item = np.diff(train.indptr), train.T.tocsr()
    item_lengths, rest = np.diff(by_item.indptr), settings.unobserved * float(touched.sum())
    per_user = settings.l2 * (lengths + rest) ** settings.exponent
    per_item = settings.l2 * (item_lengths + settings.unobserved * float((lengths > 0).sum())) ** settings.exponent
    rng = np.random.default_rng(seed)
    start = rng.normal(0.0, START / np.sqrt(settings.dim), (train.shape[1], settings.dim)).astype(np.float32)
    mark = f"{settings} {seed} {train.shape} {train.nnz} {zlib.crc32(train.indices)} {zlib.crc32(train.indptr)}"
    done, held = _read(keep, mark)
    items = padded(np.where(touched[:, None], start, 0.0) if held is None else held)
    alpha = np.float32(settings.unobserved)
    if advance and done:
        advance(done)
    for iteration in range(done, settings.iterations):
        users = solve_rows(train, items, alpha * outer_sum(items), per_user)
        items = solve_rows(by_item, users, alpha * outer_sum(users), per_item)
        items.block_until_ready()
        if keep is not None:
            write_npz(keep, mark=mark, done=iteration + 1, items=np.asarray(items)[:-1])
        if advance:
            advance(1)
    shared = np.asarray(alpha * outer_sum(items))
    return FoldIn(np.asarray(items)[:-1].copy(), shared, settings.l2, rest, settings.exponent, touched)


def _read(path: pathlib.Path | None, mark: str) -> tuple[int, np.ndarray | None]:
    """(iterations done, items' factors) of a file that is whole and of this very fit; (0, None) else."""
    if path is None or not path.is_file():
        return 0, None
    try:
        with np.load(path, allow_pickle=False) as held:
            return (int(held["done"]), held["items"]) if str(held["mark"]) == mark else (0, None)
    except NPZ_ERRORS:
        return 0, None  # a damaged file costs the iterations that it held
