"""What kinds of entities stand where: the observed domain and range of relations, and who could stand there too.

A slot is a place in a triple: slot r is the head of relation r, slot r + R its tail. Entities have no declared types
here, so the slots that an entity stands in are its type.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.sparse as sp

_MIN_ENTITIES = 5  # of a slot from which another is concluded


@dataclasses.dataclass(frozen=True)
class Slots:
    """Slots of the entities in a set of facts."""

    occupied: sp.csr_matrix  # [2R, N] int64 facts of each entity in each slot
    together: sp.csr_matrix  # [2R, 2R] int64 entities in both slots
    num_relations: int

    @staticmethod
    def of(triples: np.ndarray, num_entities: int, num_relations: int) -> Slots:
        """The slots of `triples` [T, 3], each fact once."""
        head, relation, tail = np.unique(triples.astype(np.int64).reshape(-1, 3), axis=0).T
        rows, columns = np.concatenate([relation, relation + num_relations]), np.concatenate([head, tail])
        shape = (2 * num_relations, num_entities)
        occupied = sp.csr_matrix((np.ones(len(rows), np.int64), (rows, columns)), shape=shape)
        occupied.sum_duplicates()
        there = occupied.copy()
        there.data[:] = 1
        return Slots(occupied, sp.csr_matrix(there @ there.T), num_relations)

    def entities(self, slot: int) -> np.ndarray:
        """Entities that stand in a slot, ascending."""
        return np.sort(self.occupied.indices[self.occupied.indptr[slot]:self.occupied.indptr[slot + 1]])

    def sizes(self) -> np.ndarray:
        """[2R] entities of each slot."""
        return np.diff(self.occupied.indptr)

    def plausible(self, slot: int, confidence: float) -> np.ndarray:
        """Entities that stand in a slot or, by another slot of theirs, are likely to: ascending.

        A slot speaks for this one where it has at least five entities and at least the share `confidence` of them
        stands in this one too (most directors have a birthplace). Above 1 none does.
        """
        both = np.asarray(self.together[slot].todense()).reshape(-1)
        sizes = self.sizes()
        speaks = (sizes >= _MIN_ENTITIES) & (both >= confidence * np.maximum(sizes, 1))
        speaks[slot] = True
        return np.flatnonzero(np.asarray(self.occupied.T @ speaks.astype(np.int64)).reshape(-1) > 0)
