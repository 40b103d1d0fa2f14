"""The feature ridge: what an item's text and graph say carries EASE's scores to items that nobody has touched.

For warm items w with features F_w, EASE weights B (history → warm item) and any item c with features f_c,

    W[:, c] = B (K_ww + λ I)⁻¹ k_wc,     K = Σ_b weight_b F_b F_bᵀ,

a kernel ridge regression of each user's EASE scores on item features that is linear in the history, so it serves new
users as well. A warm item's own column uses the leave-one-out form of the same regression: the part then says about
warm items what it would have said had they been cold, its scale is the same for both, and every warm item serves as a
validation item at no cost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import scipy.sparse as sp

from kgrec_jax.linear.ease import FLOAT64_BELOW, invert_spd
from kgrec_jax.linear.parts import ItemWeights, RidgeWeights

L2 = (1.0, 3.0, 10.0, 30.0)  # λ, in units of the mean diagonal of the kernel
BLOCK_WEIGHTS = (0.1, 0.3, 1.0, 3.0)


@dataclasses.dataclass(frozen=True)
class Choice:
    """A kernel: the weight of each feature block, and λ."""

    weights: Mapping[str, float]
    l2: float
    score: float = float("nan")  # leave-one-out recall that chose it

    def words(self) -> str:
        """For logs: `graph 1 + text 0.3, l2 3`."""
        return " + ".join(f"{name} {weight:g}" for name, weight in self.weights.items()) + f", l2 {self.l2:g}"


def kernel(features: sp.csr_matrix | np.ndarray) -> np.ndarray:
    """F Fᵀ [I, I] float32, scaled to a mean diagonal of 1 over the items that have features.

    Rows are not normalised to unit length on purpose: an item that much is known about is more often a popular one, and
    the longer row carries that.
    """
    product = features @ features.T
    out = np.asarray(product.toarray() if sp.issparse(product) else product, np.float32)
    diagonal = np.diagonal(out)
    present = diagonal > 0
    return out / np.float32(diagonal[present].mean()) if present.any() else out


def _combine(kernels: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    return sum(np.float32(weight) * kernels[name] for name, weight in weights.items())


def inverse(kernel_warm: np.ndarray, l2: float) -> np.ndarray:
    """(K + λ I)⁻¹, [w, w]; float64 below 5,000 items, else float32."""
    system = np.array(kernel_warm, np.float64 if len(kernel_warm) < FLOAT64_BELOW else np.float32, order="F")
    system[np.diag_indices(len(system))] += l2
    return invert_spd(system, "fuse.content.l2")


def leave_one_out(ease_weights: np.ndarray, inverted: np.ndarray) -> np.ndarray:
    """[w, w]: EASE weights B of each warm item predicted from all the others, B − (B C) / diag(C); the diagonal is 0.

    `inverted` is C = (K + λ I)⁻¹. A zero diagonal also takes the item itself out of the histories, as if nobody had
    touched it.
    """
    out = ease_weights - (ease_weights @ inverted.astype(np.float32)) / _diagonal(inverted)[None, :]
    np.fill_diagonal(out, 0.0)
    return out


def _diagonal(inverted: np.ndarray) -> np.ndarray:
    return np.diagonal(inverted).astype(np.float32)


def _own(ease_weights: np.ndarray, inverted: np.ndarray) -> np.ndarray:
    """[w] float32: diagonal of B C."""
    return np.einsum("ij,ji->i", ease_weights, inverted).astype(np.float32)


def _recall(scores: np.ndarray, relevant: sp.csr_matrix, k: int) -> float:
    """Mean Recall@k over the users with something relevant, ranking all columns."""
    k = min(k, scores.shape[1])
    top = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    rows = np.repeat(np.arange(len(scores)), k)
    listed = sp.csr_matrix((np.ones(top.size, np.float32), (rows, top.ravel())), shape=scores.shape)
    hits = np.asarray(listed.multiply(relevant).sum(axis=1)).ravel()
    count = relevant.getnnz(axis=1)
    has = count > 0
    return float((hits[has] / count[has]).mean()) if has.any() else 0.0


def choose(train: sp.csr_matrix, ease_part: ItemWeights, kernels: Mapping[str, np.ndarray], *, fold_items: int = 200,
           k: int = 20, max_users: int = 4_000, max_items: int = 4_000, seed: int = 0,
           say: Callable[[str], None] | None = None) -> Choice:
    """Kernel weights and λ by leave-one-out Recall@k of warm items ranked among folds of themselves.

    Greedy: the best single block with its λ, then one block at a time is added with the weight that helps most.

    Args:
      train: [Nu, I] binary. kernels: name → [I, I] from `kernel`.
      fold_items: items ranked against each other, as cold items will be.
      max_users, max_items: drawn for the comparison.
    """
    rng = np.random.default_rng(seed)
    warm = np.flatnonzero(ease_part.known)
    if len(warm) > max_items:
        warm = np.sort(rng.choice(warm, max_items, replace=False))
    users = np.arange(train.shape[0])
    if len(users) > max_users:
        users = np.sort(rng.choice(users, max_users, replace=False))
    histories = train[users][:, warm]
    folds = np.array_split(rng.permutation(len(warm)), max(1, len(warm) // fold_items))
    weights = np.asarray(ease_part.weights[np.ix_(warm, warm)], np.float32)
    carried = histories @ weights  # [users, w]
    on_warm = {name: matrix[np.ix_(warm, warm)] for name, matrix in kernels.items()}
    tried: dict[tuple, float] = {}

    def value(blocks: Mapping[str, float], l2: float) -> float:
        key = (tuple(sorted(blocks.items())), l2)
        if key not in tried:
            # histories @ leave_one_out(weights, C), whose diagonal is 0, without the product of two w × w matrices.
            inverted = inverse(_combine(on_warm, blocks), l2)
            own = _own(weights, inverted) / _diagonal(inverted)
            scores = carried - (carried @ inverted.astype(np.float32)) / _diagonal(inverted)[None, :]
            scores += histories.multiply(own[None, :]).toarray()
            tried[key] = float(np.mean([_recall(scores[:, fold], histories[:, fold], k) for fold in folds]))
        return tried[key]

    def best_of(options: list[tuple[dict[str, float], float]]) -> Choice:
        values = [value(blocks, l2) for blocks, l2 in options]
        at = int(np.argmax(values))
        return Choice(options[at][0], options[at][1], values[at])

    best = best_of([({name: 1.0}, l2) for name in kernels for l2 in L2[:3]])
    remaining = [name for name in kernels if name not in best.weights]
    while remaining:
        options = [({**best.weights, name: w}, best.l2) for name in remaining for w in BLOCK_WEIGHTS]
        grown = best_of(options)
        grown = best_of([(dict(grown.weights), l2) for l2 in L2])
        if grown.score <= best.score:
            break
        best = grown
        remaining = [name for name in remaining if name not in best.weights]
    if say:
        say(f"content part: {best.words()} (leave-one-out recall@{k} {best.score:.4f}, {len(tried)} kernels compared)")
    return best


def combine(kernels: Mapping[str, np.ndarray], choice: Choice) -> np.ndarray:
    """[I, I]: the kernels with the weights of the choice."""
    return _combine(kernels, choice.weights)


def content(ease_part: ItemWeights, kernel: np.ndarray, l2: float) -> RidgeWeights:
    """The ridge as a part of the score: history → every item that has a feature in one of the chosen blocks.

    Args:
      ease_part: dense EASE weights [I, I], known = warm items. kernel: [I, I] of the features of all items.
    """
    warm = np.flatnonzero(ease_part.known)
    known = np.diagonal(kernel) > 0
    cold = np.flatnonzero(~ease_part.known & known)
    weights = np.zeros(kernel.shape, np.float32)
    diagonal, own = np.zeros((2, len(known)), np.float32)
    if not len(warm):
        return RidgeWeights(weights, known, diagonal, own)
    inverted = inverse(kernel[np.ix_(warm, warm)], l2)
    to_warm = np.asarray(ease_part.weights[np.ix_(warm, warm)], np.float32)
    weights[np.ix_(warm, warm)] = leave_one_out(to_warm, inverted)
    diagonal[warm], own[warm] = _diagonal(inverted), _own(to_warm, inverted)
    if len(cold):
        carried = inverted @ kernel[np.ix_(warm, cold)].astype(inverted.dtype)
        weights[np.ix_(warm, cold)] = to_warm @ carried.astype(np.float32)
    return RidgeWeights(weights, known, diagonal, own)


def later_columns(ease_part: ItemWeights, part: RidgeWeights, kernel: np.ndarray) -> np.ndarray:
    """[I, n]: the columns of n items that came after the fit, as if they had been there and cold.

    W_new = M k with M = B C and C = (K_ww + λ I)⁻¹. M is not kept: off its diagonal it is (B − W) diag(C), for that is
    what the leave-one-out columns W were made of, and its own diagonal is `part.own`.

    Args:
      ease_part: the dense weights B that `part` was made of. kernel: [n, I] of the new items' features and the old
        ones', in the units of the kernel of the fit; what it says of items that are not warm does not count.
    """
    scaled = (kernel * part.inverse_diagonal).T  # [I, n]
    out = ease_part.weights @ scaled - part.weights @ scaled
    return np.asarray(out + part.own[:, None] * kernel.T, np.float32)


def later_values(values: np.ndarray, expected: np.ndarray, inverse_diagonal: np.ndarray,
                 kernel: np.ndarray) -> np.ndarray:
    """[n] float32: what `predicted` would have said of items that came after it.

    `expected` [I] is what it said of `values` [I]; inverse_diagonal as in `RidgeWeights`; kernel [n, I]. The dual
    coefficients are its leave-one-out residuals times the diagonal.
    """
    warm = inverse_diagonal > 0
    mean = values[warm].mean() if warm.any() else np.float32(0.0)
    alpha = (values - expected) * inverse_diagonal
    return np.asarray(kernel @ alpha + mean, np.float32)


def predicted(values: np.ndarray, known: np.ndarray, kernel: np.ndarray, l2: float) -> np.ndarray:
    """[I] float32: `values` of the known items as the features predict them, leave-one-out for these themselves."""
    warm = np.flatnonzero(known)
    if not len(warm):
        return np.zeros(len(values), np.float32)
    mean = values[warm].mean()
    inverted = inverse(kernel[np.ix_(warm, warm)], l2)
    alpha = inverted @ (values[warm] - mean).astype(inverted.dtype)
    out = (kernel[:, warm] @ alpha).astype(np.float32)
    out[warm] = (values[warm] - mean - alpha / np.diagonal(inverted)).astype(np.float32)  # leave-one-out residuals
    return out + np.float32(mean)
