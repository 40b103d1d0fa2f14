"""Towers that several domains share, and what each domain makes of them: experts under a gate of its own.

    h_d(x) = Σ_k g_{d,k}(x) E_k(x),    g_d(x) = softmax(W_d x + b_d),    E_k(x) = x + B_k gelu(A_k x + a_k)

MMoE (Ma et al. 2018, KDD, eq. 4-7): every domain mixes the same experts. PLE (Tang et al. 2020, RecSys, eq. 2-7): a
domain mixes the shared experts with experts of its own; of several levels, each but the last also mixes all experts for
what the shared ones read next. Experts begin as the identity, so that a head begins as the towers without it; the
gates' weights add up to one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp

from kgrec_jax.models.history_towers import HistoryTower
from kgrec_jax.models.tower_config import TowerConfig
from kgrec_jax.models.towers import ItemFeatures, ItemTower

READS = ("mean", "attention")  # histories as sets, which is what a part of the fused score is told of them
_NUMBERS = 1 << 25  # of gathered history items at a time: 128 MB


@dataclasses.dataclass(frozen=True)
class HeadsConfig:
    """What a domain makes of the vectors that all domains share, for users and for items."""

    kind: Literal["shared", "mmoe", "ple"] = "mmoe"  # shared: nothing, one space for all domains
    experts: int = 4  # mmoe, ple: that all domains share
    own_experts: int = 2  # ple: of each domain by itself
    levels: int = 1  # ple: of extraction, one above another
    width: int = 64  # hidden units of an expert


class Expert(nn.Module):
    """x + B gelu(A x + a), [n, D]; B begins at zero."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        bent = nn.gelu(nn.Dense(self.width, name="in")(x), approximate=True)
        return x + nn.Dense(x.shape[-1], use_bias=False, kernel_init=nn.initializers.zeros, name="out")(bent)


class DomainHeads(nn.Module):
    """Vectors of the shared space [n, D] -> vectors of one domain's space [n, D]."""

    cfg: HeadsConfig
    num_domains: int

    def setup(self):
        cfg, own = self.cfg, self.cfg.kind == "ple"
        levels = cfg.levels if own else 1
        self.shared = [[Expert(cfg.width, name=f"shared_{v}_{k}") for k in range(cfg.experts)] for v in range(levels)]
        self.own = [[[Expert(cfg.width, name=f"own_{v}_{d}_{k}") for k in range(cfg.own_experts)]
                     for d in range(self.num_domains)] for v in range(levels if own else 0)]
        count = cfg.experts + (cfg.own_experts if own else 0)
        self.gates = [[nn.Dense(count, name=f"gate_{v}_{d}") for d in range(self.num_domains)] for v in range(levels)]
        everything = cfg.experts + self.num_domains * cfg.own_experts
        self.shared_gates = [nn.Dense(everything, name=f"gate_{v}_shared") for v in range(levels - 1)]

    def __call__(self, x: jax.Array, domain: int) -> jax.Array:
        if self.cfg.kind == "shared":
            return x
        if self.cfg.kind == "mmoe":
            return _mixed(self.gates[0][domain](x), [expert(x) for expert in self.shared[0]])
        common, states = x, [x] * self.num_domains
        for level in range(self.cfg.levels - 1):
            told = [expert(common) for expert in self.shared[level]]
            own = [[expert(states[d]) for expert in self.own[level][d]] for d in range(self.num_domains)]
            states = [_mixed(self.gates[level][d](states[d]), told + own[d]) for d in range(self.num_domains)]
            common = _mixed(self.shared_gates[level](common), told + [y for mine in own for y in mine])
        told = [expert(common) for expert in self.shared[-1]] + [e(states[domain]) for e in self.own[-1][domain]]
        return _mixed(self.gates[-1][domain](states[domain]), told)


def _mixed(logits: jax.Array, told: Sequence[jax.Array]) -> jax.Array:
    """[n, D]: what K experts say, weighed by softmax(logits [n, K])."""
    return jnp.einsum("nk,knd->nd", jax.nn.softmax(logits, axis=-1), jnp.stack(told))


class DomainTowers(nn.Module):
    """Item and history towers over the catalogues of all domains, with heads of each domain; scores are cosines.

    `starts` [D + 1]: the items of domain d are the rows starts[d] … starts[d + 1] - 1 of the features.
    """

    cfg: TowerConfig
    heads: HeadsConfig
    starts: tuple[int, ...]

    def setup(self):
        domains = len(self.starts) - 1
        self.items = ItemTower(self.cfg, self.starts[-1])
        self.history = HistoryTower(self.cfg)
        self.user_heads = DomainHeads(self.heads, domains)
        self.item_heads = DomainHeads(self.heads, domains)
        self.log_scale = self.param("log_scale", nn.initializers.constant(-jnp.log(self.cfg.temperature)), (domains,))

    def __call__(self, features: ItemFeatures, histories: Sequence[jax.Array],
                 deterministic: bool = True) -> list[tuple[jax.Array, jax.Array]]:
        """For each domain (user vectors [B, D] scaled for its softmax, vectors of its items [I_d, D] of unit length).

        histories: [B, H] int32 of each domain, rows of its own items, -1 where there is none.
        """
        vectors = self.item_vectors(features, deterministic)  # [I, D]
        out = []
        for domain, history in enumerate(histories):
            own = vectors[self.starts[domain]:self.starts[domain + 1]]  # [I_d, D]
            out.append((self.user_vectors(own, history, domain, deterministic), self.domain_items(own, domain)))
        return out

    def item_vectors(self, features: ItemFeatures, deterministic: bool = True) -> jax.Array:
        """[I, D] of unit length in the space that all domains share; 0 for an item without any part."""
        return _unit(sum(self.items(features, deterministic).values()))

    def domain_items(self, vectors: jax.Array, domain: int) -> jax.Array:
        """[n, D] shared vectors -> [n, D] of unit length in a domain's space."""
        return _unit(self.item_heads(vectors, domain))

    def user_vectors(self, own: jax.Array, history: jax.Array, domain: int, deterministic: bool = True) -> jax.Array:
        """[B, D] for histories [B, H] over a domain's items, whose shared vectors are `own` [I_d, D]."""
        mask = history >= 0
        items = jnp.take(own, jnp.maximum(history, 0), axis=0)  # [B, H, D]
        user = _unit(self.user_heads(self.history(items, mask, deterministic), domain)) * jnp.exp(
            self.log_scale[domain])
        return jnp.where(mask.any(-1, keepdims=True), user, 0.0)


def _unit(rows: jax.Array) -> jax.Array:
    return rows / jnp.sqrt(jnp.maximum(jnp.square(rows).sum(-1, keepdims=True), 1e-12))


@dataclasses.dataclass(frozen=True)
class DomainPart:
    """The shared towers as one domain's part of the fused score: a function of histories over its own items."""

    cfg: TowerConfig
    heads: HeadsConfig
    starts: tuple[int, ...]
    domain: int
    params: Mapping
    shared_vectors: np.ndarray  # [I_d, D] of the space that all domains share: what histories are made of
    item_vectors: np.ndarray  # [I_d, D] of the domain's space: what is scored
    known: np.ndarray  # [I_d] bool

    def for_serving(self) -> DomainPart:
        """The same with only the parameters that a history's vector is made of: no item tower, and of the heads those
        of users that this domain reads."""
        model = DomainTowers(self.cfg, self.heads, self.starts)
        read = jax.eval_shape(
            lambda key, own: model.init(key, own, np.full((1, 1), -1, np.int32), self.domain,
                                        method=DomainTowers.user_vectors)["params"],
            jax.random.key(0), jax.ShapeDtypeStruct(self.shared_vectors.shape, np.float32))
        return dataclasses.replace(self, params=_taken(self.params, read))

    def user_vectors(self, history: sp.csr_matrix) -> np.ndarray:
        """[b, D] for histories [b, I_d], read as sets and whole, however long."""
        history = sp.csr_matrix(history)
        length = history.getnnz(axis=1)
        width = 1 << (max(int(length.max(initial=1)), 1) - 1).bit_length()  # few shapes, so few compilations
        rows = np.repeat(np.arange(len(length)), length)
        sequence = np.full((len(length), width), -1, np.int32)
        sequence[rows, np.arange(history.nnz) - np.repeat(history.indptr[:-1], length)] = history.indices
        size = max(1, _NUMBERS // (width * self.item_vectors.shape[1]))
        blocks = [np.asarray(_user_vectors(self.cfg, self.heads, self.starts, self.domain, self.params,
                                           self.shared_vectors, sequence[at:at + size]))
                  for at in range(0, len(length), size)]
        return np.concatenate(blocks) if blocks else np.zeros((0, self.item_vectors.shape[1]), np.float32)

    def scores(self, history: sp.csr_matrix) -> np.ndarray:
        """[b, I_d] float32 for histories [b, I_d]."""
        return self.user_vectors(history) @ self.item_vectors.T


def _taken(params: Mapping, like: Mapping) -> dict:
    """Of a tree of parameters, those that another tree has."""
    return {name: _taken(params[name], below) if isinstance(below, Mapping) else params[name]
            for name, below in like.items()}


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _user_vectors(cfg: TowerConfig, heads: HeadsConfig, starts: tuple[int, ...], domain: int, params, own,
                  sequence) -> jax.Array:
    return DomainTowers(cfg, heads, starts).apply({"params": params}, own, sequence, domain,
                                                  method=DomainTowers.user_vectors)
