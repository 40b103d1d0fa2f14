"""What a data set is in memory: plain NumPy, no JAX."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping

import numpy as np
import scipy.sparse as sp

from kgrec_jax.data.media_files import MediaFiles


@dataclasses.dataclass(frozen=True)
class Interactions:
    """A log of (user, item) pairs, each pair once, as rows of the user and item tables."""

    user: np.ndarray  # [n] int32
    item: np.ndarray  # [n] int32
    rating: np.ndarray  # [n] float32, ones where the log has no ratings
    timestamp: np.ndarray  # [n] int64, zeros where the log has no timestamps

    def __len__(self) -> int:
        return len(self.user)

    def take(self, index: np.ndarray) -> Interactions:
        """The rows that `index` (integers or a mask) selects, in its order."""
        return Interactions(self.user[index], self.item[index], self.rating[index], self.timestamp[index])

    def matrix(self, num_users: int, num_items: int) -> sp.csr_matrix:
        """Binary user-item matrix [Nu, I], float32, column indices sorted."""
        values = np.ones(len(self), np.float32)
        out = sp.csr_matrix((values, (self.user, self.item)), shape=(num_users, num_items), dtype=np.float32)
        out.sum_duplicates()
        out.sort_indices()
        out.data[:] = 1.0
        return out

    @staticmethod
    def empty() -> Interactions:
        """No interaction at all."""
        none = np.zeros(0, np.int32)
        return Interactions(none, none, none.astype(np.float32), none.astype(np.int64))

    @staticmethod
    def concatenate(parts: list[Interactions]) -> Interactions:
        """All rows of `parts`, one after another."""
        names = [f.name for f in dataclasses.fields(Interactions)]
        return Interactions(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


@dataclasses.dataclass(frozen=True)
class Graph:
    """A knowledge graph whose first `num_items` entities are the items, in item order."""

    entity_ids: tuple[str, ...]  # [N]
    entity_names: tuple[str, ...]  # [N], "" where an entity has no name (its vector alone enters the encoder)
    entity_texts: tuple[str, ...]  # [N] descriptions, "" where there is none
    relation_ids: tuple[str, ...]  # [R]
    relation_names: tuple[str, ...]  # [R]
    triples: np.ndarray  # [T, 3] int32: head, relation, tail
    num_items: int
    part: np.ndarray  # [T] int8: 0 train, 1 valid, 2 test of a given link-prediction split; all 0 without one

    @property
    def num_entities(self) -> int:
        """N."""
        return len(self.entity_ids)

    @property
    def num_relations(self) -> int:
        """R, without inverses."""
        return len(self.relation_ids)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set: who touched what, what the items say, how they hang together."""

    name: str
    user_ids: tuple[str, ...]  # [Nu]
    item_ids: tuple[str, ...]  # [I], the candidates
    item_names: tuple[str, ...]  # [I] title, else name, else id
    item_texts: tuple[str, ...]  # [I] the joined text columns, "" where an item has none
    interactions: Interactions
    part: np.ndarray  # [n] int8: 0 train, 1 valid, 2 test where the folder gives a split; all 0 without one
    has_fixed_split: bool
    has_fixed_valid: bool
    has_timestamps: bool
    has_ratings: bool
    graph: Graph
    media: Mapping[str, tuple[np.ndarray, np.ndarray]]  # name -> ([I, d] float32, present [I] bool)
    notes: tuple[str, ...] = ()  # counted warnings of the reader, one line each
    raw_media: Mapping[str, MediaFiles] = dataclasses.field(default_factory=dict)  # name -> files of images or sounds

    @property
    def num_users(self) -> int:
        """Nu."""
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        """I."""
        return len(self.item_ids)

    def content_hash(self) -> str:
        """SHA-256 over everything that a run may depend on, and not over where it was read from."""
        digest = hashlib.sha256()
        graph = self.graph
        for strings in (self.user_ids, self.item_ids, self.item_names, self.item_texts, graph.entity_ids,
                        graph.entity_names, graph.entity_texts, graph.relation_ids, graph.relation_names):
            digest.update(str(len(strings)).encode())
            digest.update("\x00".join(strings).encode("utf-8", "surrogatepass"))
        arrays = [getattr(self.interactions, f.name) for f in dataclasses.fields(Interactions)]
        arrays += [self.part, graph.triples, graph.part]
        for name in sorted(self.media):
            digest.update(name.encode())
            arrays += list(self.media[name])
        for name in sorted(self.raw_media):
            digest.update(f"raw {name} {self.raw_media[name].digest}".encode())
        for array in arrays:
            digest.update(str((array.shape, array.dtype.str)).encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Split:
    """A data set's interactions cut into parts, and what each part may be used for."""

    kind: str
    train: Interactions
    valid: Interactions
    test: Interactions
    valid_given: bool  # a given validation file chooses and is not trained on; one cut by us is given back
    cold_items: np.ndarray  # [c] int32 items that left training and whose interactions are the test's (may be empty)
    valid_cold_items: np.ndarray  # [c] int32, the same for the validation part

    @property
    def fit(self) -> Interactions:
        """What the chosen configuration is refitted on before the test is ranked; also the history then."""
        return self.train if self.valid_given else Interactions.concatenate([self.train, self.valid])

    @property
    def fit_on(self) -> str:
        """The words of the report for `fit`."""
        return "train" if self.valid_given or not len(self.valid) else "train+valid"

    def content_hash(self) -> str:
        """SHA-256 of the pairs in each part."""
        digest = hashlib.sha256(f"{self.kind} {self.valid_given}".encode())
        for part in (self.train, self.valid, self.test):
            order = np.lexsort((part.item, part.user))
            digest.update(np.stack([part.user[order], part.item[order]]).astype(np.int64).tobytes())
        digest.update(np.sort(self.cold_items).astype(np.int64).tobytes())
        digest.update(np.sort(self.valid_cold_items).astype(np.int64).tobytes())
        return digest.hexdigest()
