"""LoRA (Hu et al. 2022): low-rank adapters beside frozen kernels, merged before a checkpoint crosses a stage."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp

from kgrec_jax.errors import KgrecError

# The paper's choice: adapting the attention's queries and values is enough for most tasks.
ATTENTION = (r"attention/self/(query|value)/kernel$",)


def lora_init(params: dict, key: jax.Array, rank: int, patterns: tuple[str, ...] = ATTENTION) -> dict:
    """Adapters {"a": [in, rank], "b": [rank, out]} for every kernel [in, out] whose path a pattern matches.

    The tree has the names of `params`, matched kernels only. `b` is zero, so that merging changes nothing at first.
    """
    matched = [(path, leaf) for path, leaf in _leaves(params) if any(re.search(p, "/".join(path)) for p in patterns)]
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
        rows, columns = kernel.shape
        a = jax.random.normal(jax.random.fold_in(key, i), (rows, rank), jnp.float32) / jnp.sqrt(jnp.float32(rows))
        node[path[-1]] = {"a": a, "b": jnp.zeros((rank, columns), jnp.float32)}
    return tree


def lora_merge(params: dict, lora: dict, alpha: float) -> dict:
    """`params` with kernel + alpha / rank · a b in place of every adapted kernel; the others are the same arrays."""
    unknown = sorted(lora.keys() - params.keys())
    if unknown:
        raise KgrecError(f"adapters: found {', '.join(unknown)}, expected names among {', '.join(sorted(params))}; "
                         "they are of another encoder")
    merged = dict(params)
    for name, adapter in lora.items():
        if set(adapter) == {"a", "b"}:
            scale = jnp.float32(alpha / adapter["a"].shape[1])
            delta = scale * jnp.dot(adapter["a"], adapter["b"], precision=jax.lax.Precision.HIGHEST)
            merged[name] = params[name] + delta.astype(params[name].dtype)
        else:
            merged[name] = lora_merge(params[name], adapter, alpha)
    return merged


def _leaves(tree: dict, path: tuple[str, ...] = ()):
    for name in sorted(tree):
        if isinstance(tree[name], dict):
            yield from _leaves(tree[name], (*path, name))
        else:
            yield (*path, name), tree[name]
