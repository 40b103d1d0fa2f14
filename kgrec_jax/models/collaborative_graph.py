"""The collaborative knowledge graph as arrays: who touched what, and what the items are linked to.

Nodes are entities (the items first) and then users. Edges of one relation into one node make a pair: models that treat
relations apart sum over a pair's edges first, of which there are far more than pairs.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp

from kgrec_jax.models.message_passing import Links, make_links

BLOCK = 64  # pairs of one relation that are multiplied with its matrix at a time


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TypedEdges:
    """Edges with relations between nodes, and their pairs in blocks of one relation, padded with pairs of no edge."""

    relation: jax.Array  # [blocks] int32 of the pairs, BLOCK of them each: P = blocks · BLOCK
    members: Links  # pairs <- nodes, the edges by pair
    owners: Links  # nodes <- pairs
    heads: Links  # pairs <- nodes: the node that a pair is of
    tail_relation: jax.Array  # [blocks'] int32 of the tails, BLOCK of them each
    tails: Links  # tails <- nodes: the edges' sources, each once a relation
    ends: Links  # pairs <- tails, the edges by pair
    edges: Links  # nodes <- nodes, the edges by target
    place: jax.Array  # [E] int32: where the edges by target stand among the edges by pair


def by_relation(rows: jax.Array, kernel: jax.Array, relation: jax.Array) -> jax.Array:
    """x W_r of every row, [P, K], from rows [P, D] in blocks of one relation, kernel [R, D, K], relation [blocks]."""
    blocks = rows.reshape(relation.shape[0], BLOCK, rows.shape[1])
    return jnp.einsum("nbd,ndk->nbk", blocks, jnp.take(kernel, relation, axis=0)).reshape(-1, kernel.shape[2])


def scaled_by_relation(rows: jax.Array, factors: jax.Array, relation: jax.Array) -> jax.Array:
    """e_r ⊙ x of every row, [P, D], from rows [P, D] in blocks of one relation, factors [R, D], relation [blocks]."""
    blocks = rows.reshape(relation.shape[0], BLOCK, rows.shape[1])
    return (blocks * jnp.take(factors, relation, axis=0)[:, None]).reshape(rows.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CollaborativeGraph:
    """What the propagation models read; arrays on the device, arguments of the step."""

    history: Links  # users <- items
    touched: Links  # items <- users
    typed: TypedEdges  # entities alone (KGIN), entities and users (R-GCN, KGAT) or nothing (LightGCN)


def kept_entities(head: np.ndarray, tail: np.ndarray, num_items: int, num_entities: int) -> np.ndarray:
    """[N] int64: each entity's node or -1; the items keep their rows.

    An entity with fewer than two edges brings nothing together and has no node; so on until none is left.
    """
    is_item = np.arange(num_entities) < num_items
    keep = np.ones(num_entities, bool)
    while True:
        there = keep[head] & keep[tail]
        degree = np.bincount(head[there], minlength=num_entities)
        still = keep & (is_item | (degree >= 2))
        if (still == keep).all():
            return np.where(keep, np.cumsum(keep) - 1, -1)
        keep = still


def learned_nodes(edges: tuple[np.ndarray, np.ndarray, np.ndarray], node: np.ndarray, warm: np.ndarray,
                  hops: int) -> tuple[np.ndarray, np.ndarray]:
    """(nodes [n] bool whose rows training can move, items [I] bool that such a row reaches), both within `hops` edges.

    Of the items the warm ones alone have rows; another is known by what it hangs on, if that hangs on a warm one.
    """
    num_items, num_nodes = len(warm), int(node.max(initial=len(warm) - 1)) + 1
    head, tail = node[edges[0]], node[edges[2]]
    there = (head >= 0) & (tail >= 0)
    links = sp.csr_matrix((np.ones(there.sum(), np.float32), (head[there], tail[there])), shape=(num_nodes, num_nodes))
    reached = np.zeros(num_nodes, bool)
    reached[:num_items] = warm
    for _ in range(hops):
        reached |= links @ reached.astype(np.float32) > 0
    learned = reached.copy()
    learned[:num_items] = warm
    reached = learned.copy()
    for _ in range(hops):
        reached |= links @ reached.astype(np.float32) > 0
    return learned, reached[:num_items]


def make_graph(edges: tuple[np.ndarray, np.ndarray, np.ndarray], node: np.ndarray, num_relations: int,
               matrix: sp.csr_matrix, *, with_edges: bool, with_users: bool) -> CollaborativeGraph:
    """The graph of NumPy arrays.

    Args:
      edges: (head, relation, tail), each [E]: tails are what heads gather; both directions, relations 0 … R-1.
      node: [N] node of each entity, -1 where it has none (`kept_entities`).
      matrix: [Nu, I] who touched what.
      with_edges: the entities' edges. with_users: users are nodes too, and touching is relation R one way and R + 1
        the other.
    """
    num_users, num_items = matrix.shape
    num_nodes = int(node.max(initial=-1)) + 1
    user, item = (np.asarray(a, np.int64) for a in matrix.nonzero())
    by_item = np.lexsort((user, item))
    history = make_links(user, item, num_users, num_items)
    touched = make_links(item[by_item], user[by_item], num_items, num_users)
    rows = [np.zeros((3, 0), np.int64)]
    if with_edges:
        head, relation, tail = (np.asarray(a, np.int64) for a in edges)
        there = (node[head] >= 0) & (node[tail] >= 0)
        rows.append(np.stack([node[head[there]], relation[there], node[tail[there]]]))
    if with_users:
        ends = user + num_nodes
        rows.append(np.stack([ends, np.full(len(user), num_relations), item]))
        rows.append(np.stack([item, np.full(len(user), num_relations + 1), ends]))
    target, relation, source = np.concatenate(rows, axis=1)
    return CollaborativeGraph(history, touched, _typed(
        target, relation, source, num_nodes + (num_users if with_users else 0), num_relations + 2))


def _typed(target: np.ndarray, relation: np.ndarray, source: np.ndarray, num_nodes: int,
           num_relations: int) -> TypedEdges:
    order = np.lexsort((source, target, relation))
    target, relation, source = target[order], relation[order], source[order]
    pair_node, pair, pair_relation = _blocks(target, relation, num_nodes, num_relations)
    tail_node, tail, tail_relation = _blocks(source, relation, num_nodes, num_relations)
    filled, owned = np.flatnonzero(pair_node >= 0), np.flatnonzero(tail_node >= 0)
    by_node = filled[np.argsort(pair_node[filled], kind="stable")]
    by_target = np.lexsort((source, relation, target))
    num_pairs, num_tails = len(pair_node), len(tail_node)
    return TypedEdges(
        relation=pair_relation, members=make_links(pair, source, num_pairs, num_nodes),
        owners=make_links(pair_node[by_node], by_node, num_nodes, num_pairs),
        heads=make_links(filled, pair_node[filled], num_pairs, num_nodes), tail_relation=tail_relation,
        tails=make_links(owned, tail_node[owned], num_tails, num_nodes),
        ends=make_links(pair, tail, num_pairs, num_tails),
        edges=make_links(target[by_target], source[by_target], num_nodes, num_nodes), place=by_target.astype(np.int32))


def _blocks(node: np.ndarray, relation: np.ndarray, num_nodes: int,
            num_relations: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(node of each slot, -1 where it is empty [P], slot of each row (relation, node) [E], relation of each block)."""
    keys, row = np.unique(relation * num_nodes + node, return_inverse=True)
    key_relation, key_node = np.divmod(keys, max(num_nodes, 1))
    count = np.bincount(key_relation, minlength=num_relations)
    blocks = -(-count // BLOCK)
    shift = (np.cumsum(blocks) - blocks) * BLOCK - (np.cumsum(count) - count)  # of a relation's first slot
    slot = np.arange(len(keys)) + shift[key_relation]
    nodes = np.full(int(blocks.sum()) * BLOCK, -1, np.int64)
    nodes[slot] = key_node
    return nodes, slot[row], np.repeat(np.arange(num_relations), blocks).astype(np.int32)
