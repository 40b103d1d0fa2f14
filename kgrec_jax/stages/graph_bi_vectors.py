"""What a trained bi-encoder says of a graph: vectors of entities and queries, and the neighbourhood's correction."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jax.sharding import Mesh

from kgrec_jax.data.bi_encoder_batches import BiWords, write_rows
from kgrec_jax.errors import KgrecError
from kgrec_jax.evaluation.link_prediction import KnownTails, choices_mrr
from kgrec_jax.models.bi_encoder import BiEncoder
from kgrec_jax.sharding import put_batch

RERANK_HOPS = (2, 3, 5)
RERANK_WEIGHTS = (0.02, 0.05, 0.1, 0.2)


@dataclasses.dataclass(frozen=True)
class Neighbourhood:
    """What is added to the cosine of entities within `hops` of the head in the training graph."""

    hops: int  # 0: nothing is added
    weight: float
    adjacency: sp.csr_matrix  # [N, N] float32, both directions, ones

    def near(self, heads: np.ndarray, hops: int = 0) -> np.ndarray:
        """[B, N] float32: 1 where an entity is within so many hops (0: this one's own) of the head, without itself."""
        start = sp.csr_matrix((np.ones(len(heads), np.float32), (np.arange(len(heads)), heads)),
                              shape=(len(heads), self.adjacency.shape[0]))
        reached, frontier = start, start
        for _ in range(hops or self.hops):
            frontier = frontier @ self.adjacency
            reached = reached + frontier
            reached.data[:] = 1.0
            frontier.data[:] = 1.0
        out = reached.toarray()
        out[np.arange(len(heads)), heads] = 0.0
        return out


@dataclasses.dataclass(frozen=True)
class BiEncoderVectors:
    """What the trained encoder says of a graph, as arrays: entities, and the queries that were asked of it."""

    entities: np.ndarray  # [N, D] float32 unit vectors; zero where an entity has no text
    inverse_temperature: float
    keys: np.ndarray  # [Q] int64, sorted: head * 2R + relation
    vectors: np.ndarray  # [Q, D] float32 unit vectors of the queries
    num_relations: int  # R, without inverses
    neighbourhood: Neighbourhood

    def queries(self, heads: np.ndarray, relations: np.ndarray) -> np.ndarray:
        """Unit vectors [B, D] of queries; KgrecError for one that was not encoded (see `TextEncoding.queries`)."""
        wanted = heads.astype(np.int64) * (2 * self.num_relations) + relations
        place = np.minimum(np.searchsorted(self.keys, wanted), max(len(self.keys) - 1, 0))
        missing = np.flatnonzero(self.keys[place] != wanted) if len(self.keys) else np.arange(len(wanted))
        if len(missing):
            at = missing[0]
            raise KgrecError(f"bi-encoder: found the query (head {heads[at]}, relation {relations[at]}) without a "
                             "vector, expected one of those that were encoded; encode it first")
        return self.vectors[place]

    def scores(self, heads: np.ndarray, relations: np.ndarray) -> jax.Array:
        """[B, N] cosines, with what the neighbourhood adds, over the temperature; an entity without text: −1."""
        near = self.neighbourhood.near(heads) if self.neighbourhood.hops else None
        return self.scaled(self.queries(heads, relations), near, self.neighbourhood.weight)

    def scaled(self, queries: np.ndarray, near: np.ndarray | None, weight: float) -> jax.Array:
        """[B, N] scores of query vectors [B, D] with `weight` added where `near` [B, N]."""
        scores = _cosines(jnp.asarray(queries), jnp.asarray(self.entities))
        if near is not None:
            scores = scores + np.float32(weight) * jnp.asarray(near)
        return np.float32(self.inverse_temperature) * scores


@jax.jit
def _cosines(queries: jax.Array, entities: jax.Array) -> jax.Array:
    return jnp.where((entities != 0.0).any(axis=1)[None, :], queries @ entities.T, -1.0)


@functools.partial(jax.jit, static_argnums=0)  # compiled once for all evaluations of a model
def _encode_rows(model: BiEncoder, weights: dict, ids: jax.Array, mask: jax.Array) -> jax.Array:
    return model.encode_rows(weights, ids, mask)


@dataclasses.dataclass(frozen=True)
class TextEncoding:
    """Encodes the texts of entities and queries, those of new entities too, with given weights."""

    model: BiEncoder
    words: BiWords
    length: int  # tokens of a text at most
    batch: int  # texts that are encoded at once
    mesh: Mesh

    def entities(self, weights: dict) -> np.ndarray:
        """[N, D] float32 unit vectors of the entities of `words`, zero where one has no text."""
        rows = np.array([row for row, ids in enumerate(self.words.entity) if len(ids)], np.int64)
        out = np.zeros((len(self.words.entity), self.model.encoder.hidden_size), np.float32)
        out[rows] = self._encode(weights["entity"], self.words.entity_lengths(rows, self.length),
                                 lambda row, length: self.words.entity_text(rows[row], length))
        return out

    def queries(self, weights: dict, heads: np.ndarray, relations: np.ndarray) -> np.ndarray:
        """[Q, D] float32 unit vectors of the queries (head, relation)."""
        return self._encode(weights["query"], self.words.query_lengths(heads, relations, self.length),
                            lambda row, length: self.words.query_text(heads[row], relations[row], length))

    def _encode(self, weights: dict, lengths: np.ndarray, write: Callable[[int, int], list[int]]) -> np.ndarray:
        """Sorted by length and padded to multiples of eight tokens, so that few shapes are compiled."""
        shares = self.mesh.shape["data"]
        batch = -(-self.batch // shares) * shares
        out = np.zeros((len(lengths), self.model.encoder.hidden_size), np.float32)
        padded = np.minimum(-(-lengths // 8) * 8, self.length)
        for length in np.unique(padded)[::-1].tolist():
            members = np.flatnonzero(padded == length)
            for start in range(0, len(members), batch):
                chosen = members[start:start + batch]
                ids, mask = write_rows(chosen, write, batch, length, self.words.pad)
                vectors = _encode_rows(self.model, weights, *put_batch((ids, mask), self.mesh))
                out[chosen] = np.asarray(vectors)[:len(chosen)]
        return out


def adjacency(triples: np.ndarray, num_entities: int) -> sp.csr_matrix:
    """[N, N] float32: 1 where two entities share a triple of `triples` [T, 3]."""
    head, tail = triples[:, 0], triples[:, 2]
    ones = np.ones(2 * len(triples), np.float32)
    out = sp.csr_matrix((ones, (np.append(head, tail), np.append(tail, head))), shape=(num_entities, num_entities))
    out.data[:] = 1.0
    return out


def choose_neighbourhood(vectors: BiEncoderVectors, triples: np.ndarray, known: KnownTails) -> Neighbourhood:
    """Hops and weight with the best filtered MRR on `triples` [T, 3]; hops 0 where nothing is better than that."""
    around, num_entities = vectors.neighbourhood, len(vectors.entities)
    if not len(triples):
        return dataclasses.replace(around, hops=0)
    grid = [(0, 0.0), *((hops, weight) for hops in RERANK_HOPS for weight in RERANK_WEIGHTS)]

    def score_choices(heads: np.ndarray, relations: np.ndarray) -> Iterator[jax.Array]:
        queries, near = vectors.queries(heads, relations), {0: None}
        near |= {hops: around.near(heads, hops) for hops in RERANK_HOPS}
        return (vectors.scaled(queries, near[hops], weight) for hops, weight in grid)

    mrr = choices_mrr(score_choices, len(grid), triples, known=known, num_entities=num_entities)
    hops, weight = grid[int(mrr.argmax())]  # the first of equals
    return dataclasses.replace(around, hops=hops, weight=weight)
