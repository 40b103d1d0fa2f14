"""Parameter-efficient tuning: what of an encoder learns, as a tree of its own beside given weights.

Every method is three pure functions behind one interface: `init` makes the tree that is trained, `hidden_states` runs
the encoder with it, `merge` turns both into plain weights where the method allows. A fresh tree changes no output.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kgrec_jax.errors import KgrecError
from kgrec_jax.models import bert, peft_hooks, peft_lowrank
from kgrec_jax.models.peft_lowrank import ATTENTION, EVERY_KERNEL, leaves, lora_init, lora_merge

__all__ = ["ATTENTION", "EVERY_KERNEL", "METHODS", "PeftConfig", "base", "check", "hidden_states", "init",
           "is_mergeable", "lora_init", "lora_merge", "merge", "optimizer", "penalty", "share", "size"]

METHODS = ("full", "frozen", "lora", "adalora", "houlsby", "prefix", "prompt", "layers", "bitfit")

_NOT_WEIGHTS = {"houlsby": "the adapters' bottlenecks are not linear",
                "prefix": "the prefixes are keys and values, which no weight holds",
                "prompt": "the soft tokens are a part of the input"}


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """Which method tunes an encoder, and how much it adds."""

    method: Literal["full", "frozen", "lora", "adalora", "houlsby", "prefix", "prompt", "layers", "bitfit"] = "lora"
    rank: int = 8  # lora, adalora: rank of the sums at the start
    alpha: float = 16.0  # lora, adalora: the sums count alpha / rank
    patterns: tuple[str, ...] = ()  # lora, adalora: which kernels; none: queries and values (lora), all (adalora)
    target_rank: int = 4  # adalora: ranks a kernel at the end, on average
    start_share: float = 0.1  # adalora: share of the steps before the budget falls
    settle_share: float = 0.3  # adalora: share of the steps at the end with the final ranks
    every: int = 10  # adalora: steps between two allocations
    beta1: float = 0.85  # adalora: decay of the smoothed sensitivity
    beta2: float = 0.85  # adalora: decay of its uncertainty
    orthogonality: float = 0.1  # adalora: weight of the orthogonality term
    bottleneck: int = 16  # houlsby: width of the adapters
    prefix_length: int = 16  # prefix: keys and values of every layer
    prompt_length: int = 16  # prompt: soft tokens; 0: the output is that of the given weights
    frozen_layers: int = -1  # layers: so many first layers (and the embeddings) stay; -1: all but the last


def check(cfg: PeftConfig, config: bert.BertConfig) -> None:
    """KgrecError naming the first of the method's fields that is out of bounds for this shape, or a decoder."""
    if not isinstance(config, bert.BertConfig):
        raise KgrecError(f"encoder: found a {config.model_type}, expected a BERT, RoBERTa or DistilBERT; the tuning "
                         "methods know their layers alone")
    width, many = config.hidden_size, 1 << 20
    sums = {"rank": (1, width), "alpha": (0.0, 1e6)}
    bounds = {"lora": sums, "adalora": sums | {
        "target_rank": (1, cfg.rank), "start_share": (0.0, 1.0), "settle_share": (0.0, 1.0), "every": (1, many),
        "beta1": (0.0, 1.0), "beta2": (0.0, 1.0), "orthogonality": (0.0, 1e6)},
        "houlsby": {"bottleneck": (1, many)}, "prefix": {"prefix_length": (1, many)},
        "prompt": {"prompt_length": (0, config.max_position_embeddings - 1)},
        "layers": {"frozen_layers": (-1, config.num_hidden_layers)}}
    if cfg.method not in METHODS:
        raise KgrecError(f"peft.method: found {cfg.method!r}, expected one of {', '.join(METHODS)}")
    for name, (low, high) in bounds.get(cfg.method, {}).items():
        value = getattr(cfg, name)
        if not low <= value <= high:
            raise KgrecError(f"peft.{name}: found {value}, expected {low} to {high}; change peft.{name}")
    if cfg.method == "adalora" and cfg.start_share + cfg.settle_share > 1:
        raise KgrecError(f"peft.settle_share: found {cfg.settle_share} beside start_share {cfg.start_share}, expected "
                         "at most 1 together; lower one of them")


def init(cfg: PeftConfig, config: bert.BertConfig, params: dict, key: jax.Array) -> dict:
    """The tree that is trained, beside the encoder's given weights `params` {embeddings, encoder}.

    {"values"}: parameters in their own shape that take the place of given ones; {"lora"}, {"adalora"}: sums to kernels;
    {"houlsby"}, {"prefix"}, {"prompt"}: what is added inside. Raises KgrecError for a field out of bounds.
    """
    check(cfg, config)
    tree: dict[str, Any] = {}
    values = _values(cfg, config, params)
    if values:
        tree["values"] = values
    if cfg.method == "lora":
        tree["lora"] = lora_init(params, key, cfg.rank, cfg.patterns or ATTENTION)
    elif cfg.method == "adalora":
        tree["adalora"] = peft_lowrank.adalora_init(params, key, cfg.rank, cfg.patterns or EVERY_KERNEL)
    elif cfg.method == "houlsby":
        tree["houlsby"] = peft_hooks.houlsby_init(config, key, cfg.bottleneck)
    elif cfg.method == "prefix":
        tree["prefix"] = peft_hooks.prefix_init(config, key, cfg.prefix_length)
    elif cfg.method == "prompt":
        tree["prompt"] = peft_hooks.prompt_init(params, key, cfg.prompt_length)
    return tree


def base(cfg: PeftConfig, config: bert.BertConfig, params: dict) -> dict:
    """The given weights that are not trained themselves: what a training passes as constants, held once."""
    return _without(params, _values(cfg, config, params))


def hidden_states(cfg: PeftConfig, config: bert.BertConfig, params: dict, trainable: dict, ids: jax.Array,
                  mask: jax.Array, types: jax.Array, *, soft_vectors: jax.Array | None = None,
                  soft_positions: jax.Array | None = None, key: jax.Array | None = None,
                  dtype: Any = jnp.float32) -> list[jax.Array]:
    """The encoder's hidden states, layers + 1 arrays [B, L, D], as `bert.Bert` gives them.

    `params` are the given weights or `base` of them; ids, mask and types are [B, L] integers; with a `key` there is
    dropout. A prompt is behind the words and is cut off again. Raises KgrecError where the words and the prompt are
    more than the encoder's positions.
    """
    weights = _weights(cfg, params, trainable)
    length, hooks = ids.shape[1], {}
    if cfg.method == "prompt" and cfg.prompt_length:
        limit = config.max_position_embeddings
        if length + cfg.prompt_length > limit:
            raise KgrecError(f"peft.prompt_length: found {cfg.prompt_length} beside texts of {length} tokens, expected "
                             f"at most {limit} positions together; shorten one of them")
        ids, mask, types, soft_vectors, soft_positions = peft_hooks.with_prompt(
            trainable["prompt"], ids, mask, types, soft_vectors, soft_positions)
    elif cfg.method == "houlsby":
        hooks = peft_hooks.houlsby_hooks(config, trainable["houlsby"])
    elif cfg.method == "prefix":
        hooks = peft_hooks.prefix_hooks(trainable["prefix"])
    rngs = None if key is None else {"dropout": key}
    with peft_hooks.intercept(hooks) if hooks else contextlib.nullcontext():
        states = bert.Bert(config, jnp.dtype(dtype)).apply(
            {"params": weights}, ids, mask, types, soft_vectors, soft_positions, deterministic=key is None, rngs=rngs)
    return [state[:, :length] for state in states]


def is_mergeable(cfg: PeftConfig) -> bool:
    """Whether `merge` can turn what was trained into plain weights; an empty prompt is none."""
    return cfg.method not in _NOT_WEIGHTS or (cfg.method == "prompt" and cfg.prompt_length == 0)


def merge(cfg: PeftConfig, params: dict, trainable: dict) -> dict:
    """Plain weights with the same function; KgrecError where the method has none, naming why."""
    if not is_mergeable(cfg):
        raise KgrecError(f"peft.method: found {cfg.method}, which cannot be merged: {_NOT_WEIGHTS[cfg.method]}; "
                         "expected full, frozen, lora, adalora, layers or bitfit where plain weights are handed on")
    return _weights(cfg, params, trainable)


def penalty(cfg: PeftConfig, trainable: dict) -> jax.Array:
    """What the method adds to the loss, [] float32: AdaLoRA's orthogonality term (Zhang et al. 2023, equation 4)."""
    if cfg.method != "adalora" or not cfg.orthogonality:
        return jnp.zeros((), jnp.float32)
    return jnp.float32(cfg.orthogonality) * peft_lowrank.orthogonality(trainable)


def optimizer(cfg: PeftConfig, tx: optax.GradientTransformation, num_steps: int) -> optax.GradientTransformation:
    """`tx` with what the method does after a step: AdaLoRA's rank allocation, wherever its triplets are in the tree."""
    if cfg.method != "adalora":
        return tx
    return peft_lowrank.allocate(tx, target_rank=cfg.target_rank, num_steps=num_steps, start_share=cfg.start_share,
                                 settle_share=cfg.settle_share, every=cfg.every, beta1=cfg.beta1, beta2=cfg.beta2)


def size(tree: Any) -> int:
    """The number of parameters in a tree."""
    return sum(int(np.prod(np.shape(leaf))) for leaf in jax.tree.leaves(tree))


def share(params: dict, trainable: dict) -> float:
    """Parameters that are trained, per parameter of the given weights (all of them, not `base`)."""
    return size(trainable) / size(params)


def _weights(cfg: PeftConfig, params: dict, trainable: dict) -> dict:
    """The given weights with replaced values and with low-rank sums in them."""
    weights = _overlay(params, trainable["values"]) if "values" in trainable else params
    if cfg.method == "lora":
        return lora_merge(weights, trainable["lora"], cfg.alpha)
    if cfg.method == "adalora":
        return peft_lowrank.adalora_merge(weights, trainable["adalora"], cfg.alpha)
    return weights


def _values(cfg: PeftConfig, config: bert.BertConfig, params: dict) -> dict:
    """The given parameters that are trained themselves.

    BitFit: all biases (Ben Zaken et al. 2022). Houlsby: the LayerNorms of the layers, as in its section 2.1.
    """
    frozen = cfg.frozen_layers if cfg.frozen_layers >= 0 else config.num_hidden_layers - 1
    later = "|".join(str(i) for i in range(frozen, config.num_hidden_layers))
    patterns = {"full": r".*", "bitfit": r"/bias$", "houlsby": r"layer/\d+/.*LayerNorm/",
                "layers": rf"^encoder/layer/({later})/" if later else r"$^"}
    if cfg.method not in patterns:
        return {}
    tree: dict = {}
    for path, leaf in leaves(params):
        if re.search(patterns[cfg.method], "/".join(path)):
            node = tree
            for name in path[:-1]:
                node = node.setdefault(name, {})
            node[path[-1]] = jnp.asarray(leaf)
    return tree


def _overlay(params: dict, values: dict) -> dict:
    """`params` with the leaves of `values` in place of, or beside, its own."""
    out = dict(params)
    for name, value in values.items():
        out[name] = _overlay(params.get(name, {}), value) if isinstance(value, dict) else value
    return out


def _without(params: dict, values: dict) -> dict:
    """`params` without the leaves that `values` has."""
    out = {}
    for name, value in params.items():
        if name not in values:
            out[name] = value
        elif isinstance(value, dict) and (rest := _without(value, values[name])):
            out[name] = rest
    return out
