"""Low-rank sums beside frozen kernels: LoRA (Hu et al. 2022) and AdaLoRA (Zhang et al. 2023), both mergeable."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kgrec_jax.errors import KgrecError

# LoRA's choice: adapting the attention's queries and values is enough for most tasks (Hu et al. 2022, section 7.1).
ATTENTION = (r"attention/self/(query|value)/kernel$",)
# AdaLoRA finds out by itself which matrices need rank, so it begins with all of them (Zhang et al. 2023, section 4).
EVERY_KERNEL = (r"layer/\d+/.*/kernel$",)

_EXACT = jax.lax.Precision.HIGHEST


def lora_init(params: dict, key: jax.Array, rank: int, patterns: tuple[str, ...] = ATTENTION) -> dict:
    """Adapters {"a": [in, rank], "b": [rank, out]} for every kernel [in, out] whose path a pattern matches.

    The tree has the names of `params`, matched kernels only. `b` is zero, so that merging changes nothing at first.
    """

    def make(key: jax.Array, shape: tuple[int, int]) -> dict:
        rows, columns = shape
        a = jax.random.normal(key, (rows, rank), jnp.float32) / jnp.sqrt(jnp.float32(rows))
        return {"a": a, "b": jnp.zeros((rank, columns), jnp.float32)}

    return _beside(params, key, rank, patterns, make)


def lora_merge(params: dict, lora: dict, alpha: float) -> dict:
    """`params` with kernel + alpha / rank · a b in place of every adapted kernel; the others are the same arrays."""

    def delta(adapter: dict) -> jax.Array:
        scale = jnp.float32(alpha / adapter["a"].shape[1])
        return scale * jnp.dot(adapter["a"], adapter["b"], precision=_EXACT)

    return _merge(params, lora, {"a", "b"}, delta)


def adalora_init(params: dict, key: jax.Array, rank: int, patterns: tuple[str, ...] = EVERY_KERNEL) -> dict:
    """Triplets {"p": [in, rank], "lam": [rank], "q": [rank, out]} for every matched kernel (equation 3).

    `p` has orthonormal columns and `q` orthonormal rows, so that the penalty begins at zero; `lam` is zero, so that
    merging changes nothing.
    """

    def make(key: jax.Array, shape: tuple[int, int]) -> dict:
        rows, columns = shape
        left, right = jax.random.split(key)
        orthonormal = jax.nn.initializers.orthogonal()
        return {"p": orthonormal(left, (rows, rank), jnp.float32), "lam": jnp.zeros((rank,), jnp.float32),
                "q": orthonormal(right, (rank, columns), jnp.float32)}

    return _beside(params, key, rank, patterns, make)


def adalora_merge(params: dict, adalora: dict, alpha: float) -> dict:
    """`params` with kernel + alpha / rank · p diag(lam) q in place of every adapted kernel."""

    def delta(triplet: dict) -> jax.Array:
        scale = jnp.float32(alpha / triplet["lam"].shape[0])
        return scale * jnp.dot(triplet["p"] * triplet["lam"][None], triplet["q"], precision=_EXACT)

    return _merge(params, adalora, {"p", "lam", "q"}, delta)


def orthogonality(tree: Any) -> jax.Array:
    """Σ ‖pᵀp − I‖² + ‖q qᵀ − I‖² (Frobenius) over the triplets anywhere in a tree, [] float32 (equation 4)."""
    total = jnp.zeros((), jnp.float32)
    for triplet in filter(is_triplet, jax.tree.leaves(tree, is_leaf=is_triplet)):
        unit = jnp.eye(triplet["lam"].shape[0], dtype=jnp.float32)
        total = total + jnp.square(jnp.dot(triplet["p"].T, triplet["p"], precision=_EXACT) - unit).sum()
        total = total + jnp.square(jnp.dot(triplet["q"], triplet["q"].T, precision=_EXACT) - unit).sum()
    return total


def is_triplet(node: Any) -> bool:
    """Whether a node of a tree is an AdaLoRA triplet."""
    return isinstance(node, dict) and node.keys() == {"p", "lam", "q"}


class AllocationState(NamedTuple):
    """What the rank budget is decided by."""

    inner: Any  # the state of the wrapped optimiser
    count: jax.Array  # [] int32, steps done
    sensitivity: list  # smoothed |w · ∂w| of each triplet
    uncertainty: list  # smoothed deviation from it
    kept: jax.Array  # [all ranks] bool, the singular values that the last allocation kept


def budget(step: jax.Array, first: int, last: int, start: int, stop: int) -> jax.Array:
    """Ranks of all matrices at a step: `first`, falling cubically from `start` to `last` at `stop` (eq. 12)."""
    way = jnp.clip((step - start).astype(jnp.float32) / jnp.float32(max(stop - start, 1)), 0.0, 1.0)
    return jnp.round(jnp.float32(last) + jnp.float32(first - last) * (1.0 - way) ** 3).astype(jnp.int32)


def allocate(tx: optax.GradientTransformation, *, target_rank: int, num_steps: int, start_share: float,
             settle_share: float, every: int, beta1: float, beta2: float) -> optax.GradientTransformation:
    """`tx` with AdaLoRA's rank allocation over all triplets of the tree (Zhang et al. 2023, algorithm 1).

    Importance of a weight: its smoothed sensitivity |w · ∂w| times its smoothed uncertainty (equations 8 to
    11); of a rank: that of its singular value plus the means over its column of p and row of q (equation 7).
    After `start_share` of the steps, every `every` steps the singular values outside the top b are set to zero, b
    falling to `target_rank` a matrix; a pruned one may come back at the next allocation. In the last `settle_share`
    of the steps the choice stands and holds at every step. A tree without triplets is `tx`'s alone.
    """
    start, stop = round(start_share * num_steps), max(round((1 - settle_share) * num_steps), 1)

    def init(params):
        triplets = _triplets(params)
        zeros = jax.tree.map(jnp.zeros_like, triplets)
        number = sum(t["lam"].shape[0] for t in triplets)
        return AllocationState(tx.init(params), jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.zeros_like, zeros),
                               jnp.ones((number,), bool))

    def update(grads, state, params=None):
        updates, inner = tx.update(grads, state.inner, params)
        weights, slopes = _triplets(params), _triplets(grads)
        if not weights:
            return updates, state._replace(inner=inner, count=state.count + 1)
        now = jax.tree.map(lambda w, g: jnp.abs(w * g), weights, slopes)
        sensitivity = jax.tree.map(lambda old, new: beta1 * old + (1 - beta1) * new, state.sensitivity, now)
        uncertainty = jax.tree.map(lambda old, new, mean: beta2 * old + (1 - beta2) * jnp.abs(new - mean),
                                   state.uncertainty, now, sensitivity)
        step, number = state.count + 1, state.kept.shape[0]
        allowed = budget(step, number, target_rank * len(weights), start, stop)
        importance = jnp.concatenate(_rank_importance(sensitivity, uncertainty))
        order = jnp.argsort(-importance)  # stable: of equals the first, and exactly `allowed` of them
        place = jnp.zeros((number,), jnp.int32).at[order].set(jnp.arange(number, dtype=jnp.int32))
        allocates = (step > start) & (step <= stop) & ((step % every == 0) | (step == stop))
        kept = jnp.where(allocates, place < allowed, state.kept)
        masks = allocates | (step > stop)
        dropped = iter(_split(masks & ~kept, [t["lam"].shape[0] for t in weights]))
        values = iter(weights)
        pruned = jax.tree.map(lambda node: _pruned(node, next(values), next(dropped)) if is_triplet(node) else node,
                              updates, is_leaf=is_triplet)
        return pruned, AllocationState(inner, step, sensitivity, uncertainty, kept)

    return optax.GradientTransformation(init, update)


def ranks(tree: Any) -> list[int]:
    """How many singular values of each triplet are not zero."""
    return [int((triplet["lam"] != 0).sum()) for triplet in _triplets(tree)]


def _triplets(tree: Any) -> list[dict]:
    return [node for node in jax.tree.leaves(tree, is_leaf=is_triplet) if is_triplet(node)]


def _rank_importance(sensitivity: list, uncertainty: list) -> list[jax.Array]:
    each = jax.tree.map(jnp.multiply, sensitivity, uncertainty)
    return [t["lam"] + t["p"].mean(axis=0) + t["q"].mean(axis=1) for t in each]


def _split(flat: jax.Array, sizes: list[int]) -> list[jax.Array]:
    ends = [sum(sizes[:i + 1]) for i in range(len(sizes))]
    return [flat[end - size:end] for end, size in zip(ends, sizes, strict=True)]


def _pruned(updates: dict, weights: dict, dropped: jax.Array) -> dict:
    """The updates after which the dropped singular values are exactly zero."""
    return {**updates, "lam": jnp.where(dropped, -weights["lam"], updates["lam"])}


def _beside(params: dict, key: jax.Array, rank: int, patterns: tuple[str, ...],
            make: Callable[[jax.Array, tuple[int, int]], dict]) -> dict:
    """A tree with the names of `params` that has `make(key, shape)` in place of every matched kernel."""
    matched = [(path, leaf) for path, leaf in leaves(params) if any(re.search(p, "/".join(path)) for p in patterns)]
    if not matched:
        raise KgrecError(f"lora patterns: found no parameter that {', '.join(patterns)} matches, expected paths like "
                         "encoder/layer/0/attention/self/query/kernel")
    tree: dict = {}
    for i, (path, kernel) in enumerate(matched):
        if kernel.ndim != 2 or not 0 < rank <= min(kernel.shape):
            raise KgrecError(f"lora_rank: found {rank} for {'/'.join(path)} of shape {tuple(kernel.shape)}, expected "
                             "a matrix and a rank from 1 to its shorter side")
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = make(jax.random.fold_in(key, i), kernel.shape)
    return tree


def _merge(params: dict, adapters: dict, kind: set[str], delta: Callable[[dict], jax.Array]) -> dict:
    unknown = sorted(adapters.keys() - params.keys())
    if unknown:
        raise KgrecError(f"adapters: found {', '.join(unknown)}, expected names among {', '.join(sorted(params))}; "
                         "they are of another encoder")
    merged = dict(params)
    for name, adapter in adapters.items():
        if set(adapter) == kind:
            merged[name] = params[name] + delta(adapter).astype(params[name].dtype)
        else:
            merged[name] = _merge(params[name], adapter, kind, delta)
    return merged


def leaves(tree: dict, path: tuple[str, ...] = ()):
    """(path, leaf) of every leaf of nested dicts, in the order of the names."""
    for name in sorted(tree):
        if isinstance(tree[name], dict):
            yield from leaves(tree[name], (*path, name))
        else:
            yield (*path, name), tree[name]
