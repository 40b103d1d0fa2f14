"""Tuning that adds something inside a frozen encoder: Houlsby adapters, prefixes, prompts.

The encoder's code knows nothing of them: its submodules are intercepted by their path while it runs
(`flax.linen.intercept_methods`), so the names of the checkpoint's parameters are all that this depends on.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from kgrec_jax.models import bert

Path = tuple[str, ...]
Hook = Callable[[jax.Array], jax.Array]  # a submodule's output -> what the encoder goes on with


def layer_path(layer: int, *below: str) -> Path:
    """The path of a submodule of a layer."""
    return ("encoder", "layer", str(layer), *below)


def intercept(hooks: dict[Path, Hook]):
    """A context in which the output of every submodule at a path of `hooks` goes through its hook, once a call."""
    running: set[Path] = set()

    def interceptor(next_fun, args, kwargs, context):
        path = context.module.path
        # A module that calls its parent class's __call__ comes here twice.
        if path not in hooks or path in running or context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        running.add(path)
        try:
            out = next_fun(*args, **kwargs)
        finally:
            running.discard(path)
        return hooks[path](out)

    return nn.intercept_methods(interceptor)


# --- Houlsby adapters ---------------------------------------------------------------------------------------------

_SUBLAYERS = {"attention": ("attention", "output", "dense"), "feedforward": ("output", "dense")}


def houlsby_init(config: bert.BertConfig, key: jax.Array, width: int) -> dict:
    """Bottlenecks D -> width -> D of both halves of every layer; `up` is zero, so that nothing changes at first."""
    dim, tree = config.hidden_size, {}
    for layer in range(config.num_hidden_layers):
        tree[str(layer)] = {}
        for i, name in enumerate(_SUBLAYERS):
            kernel = jax.random.normal(jax.random.fold_in(key, 2 * layer + i), (dim, width), jnp.float32)
            tree[str(layer)][name] = {
                "down": {"kernel": kernel / jnp.sqrt(jnp.float32(dim)), "bias": jnp.zeros((width,), jnp.float32)},
                "up": {"kernel": jnp.zeros((width, dim), jnp.float32), "bias": jnp.zeros((dim,), jnp.float32)}}
    return tree


def houlsby_hooks(config: bert.BertConfig, adapters: dict) -> dict[Path, Hook]:
    """h + up(act(down(h))) after the last dense layer of both halves, before the residual (Houlsby et al. 2019, §2.1).

    Their LayerNorms are trained beside the adapters, as there.
    """
    act = bert.ACTIVATIONS[config.hidden_act]

    def hook(adapter: dict) -> Hook:
        down, up = adapter["down"], adapter["up"]

        def apply(h: jax.Array) -> jax.Array:  # [B, L, D]
            narrow = act(h @ down["kernel"].astype(h.dtype) + down["bias"].astype(h.dtype)[None, None])
            return h + narrow @ up["kernel"].astype(h.dtype) + up["bias"].astype(h.dtype)[None, None]

        return apply

    return {layer_path(int(layer), *_SUBLAYERS[name]): hook(adapter)
            for layer, both in adapters.items() for name, adapter in both.items()}


# --- prefixes -----------------------------------------------------------------------------------------------------


def prefix_init(config: bert.BertConfig, key: jax.Array, length: int) -> dict:
    """Keys and values [length, heads, D / heads] of every layer, and a gate [heads] that begins closed, at zero."""
    heads, tree = config.num_attention_heads, {}
    shape = length, heads, config.hidden_size // heads
    for layer in range(config.num_hidden_layers):
        keys, values = jax.random.split(jax.random.fold_in(key, layer))
        tree[str(layer)] = {"key": jax.random.normal(keys, shape, jnp.float32),
                            "value": jax.random.normal(values, shape, jnp.float32),
                            "gate": jnp.zeros((heads,), jnp.float32)}
    return tree


def prefix_hooks(prefixes: dict) -> dict[Path, Hook]:
    """Attention to a layer's own keys and values (Li & Liang 2021, "Prefix-tuning", equation 3), gated by head.

    By He et al. (2022, "Towards a unified view", equation 7) a prefix interpolates between attention to the words and
    attention to the prefix; with one softmax for both it changes the output from the first step on. Here each has its
    own softmax and the second counts tanh(gate), zero at first (Zhang et al. 2024, "LLaMA-Adapter", section 3.2): the
    output is then unchanged, and the gate has a gradient where the values have none yet.
    """
    hooks: dict[Path, Hook] = {}
    for name, prefix in prefixes.items():
        path, seen = layer_path(int(name), "attention", "self"), {}

        def keep_query(query, seen=seen):
            seen["query"] = query  # of this very call of the layer: its attention takes it below
            return query

        def add(out, prefix=prefix, seen=seen):
            length, heads, dim = prefix["key"].shape
            query = seen.pop("query").reshape(*out.shape[:2], heads, dim)  # [B, L, heads, dim]
            scores = jnp.einsum("blhd,phd->bhlp", query, prefix["key"].astype(out.dtype)).astype(jnp.float32)
            weights = jax.nn.softmax(scores / jnp.sqrt(jnp.float32(dim)), axis=-1)
            weights = (weights * jnp.tanh(prefix["gate"])[None, :, None, None]).astype(out.dtype)
            return out + jnp.einsum("bhlp,phd->blhd", weights, prefix["value"].astype(out.dtype)).reshape(out.shape)

        hooks[(*path, "query")], hooks[path] = keep_query, add
    return hooks


# --- prompts ------------------------------------------------------------------------------------------------------


def prompt_init(params: dict, key: jax.Array, length: int) -> jax.Array:
    """Soft tokens [length, D] that begin as rows of the word table (Lester et al. 2021, section 3.2)."""
    table = jnp.asarray(bert.word_table(params))
    return table[jax.random.randint(key, (length,), 0, table.shape[0])].astype(jnp.float32)


def with_prompt(prompt: jax.Array, ids: jax.Array, mask: jax.Array, types: jax.Array, soft_vectors: jax.Array | None,
                soft_positions: jax.Array | None) -> tuple[jax.Array, ...]:
    """Inputs [B, L + length] with the prompt behind the words (and their padding), and the soft tokens' two arrays.

    Behind, so that no word's position moves: attention is to all positions, and the order of keys has no meaning.
    """
    (batch, words), (length, dim) = ids.shape, prompt.shape
    wide = [jnp.pad(x, ((0, 0), (0, length)), constant_values=fill) for x, fill in ((ids, 0), (mask, 1), (types, 0))]
    vectors = jnp.broadcast_to(prompt[None], (batch, length, dim))
    places = jnp.broadcast_to(words + jnp.arange(length, dtype=jnp.int32)[None], (batch, length))
    if soft_vectors is not None:
        vectors = jnp.concatenate([soft_vectors.astype(jnp.float32), vectors], axis=1)
        places = jnp.concatenate([soft_positions.astype(jnp.int32), places], axis=1)
    return (*wide, vectors, places)
