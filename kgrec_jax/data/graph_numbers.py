"""Numbers and dates among the literals of a dump as relations: `born 1943` becomes a triple to a bucket of years.

As all of `graph_build`, in memory that does not depend on the dump: the numbers stand in files beside its partitions,
a sample of each relation's decides where its buckets end, and what they are called is found in a second reading.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np

from kgrec_jax.data.buckets import FEW, NUMERIC, bucket_of, cuts, number, span
from kgrec_jax.data.rdf_terms import bare
from kgrec_jax.data.rdf_words import Words

_SAMPLE = 1 << 14  # numbers of a relation that decide where its buckets end
_LINES = 1 << 16


@dataclasses.dataclass(frozen=True)
class Numbers:
    """What was made of the literals."""

    triples: int
    relations: frozenset[str]  # terms
    entities: int  # buckets
    notes: list[str]


class _Relation:
    """A sample of the numbers of a relation, drawn as they pass (algorithm R), and counts."""

    def __init__(self) -> None:
        self.sample = np.zeros(_SAMPLE)
        self.seen = self.others = 0

    def add(self, values: np.ndarray, rng: np.random.Generator) -> None:
        finite = values[np.isfinite(values)]
        self.others += len(values) - len(finite)
        place = np.arange(self.seen, self.seen + len(finite))
        late = place >= _SAMPLE
        place[late] = (rng.random(int(late.sum())) * (place[late] + 1)).astype(np.int64)
        kept = place < _SAMPLE
        self.sample[place[kept]] = finite[kept]
        self.seen += len(finite)

    @property
    def values(self) -> np.ndarray:
        return self.sample[:min(self.seen, _SAMPLE)]


def write_literals(words: Words, entities: Collection[str], path: Path) -> None:
    """Write the literals, other than names and descriptions, of the entities as lines `subject relation value`."""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for subject, relations in words.texts.items():
            if subject in entities:
                file.writelines(f"{subject} {relation} {value}\n" for relation, values in relations.items()
                                for value in values)


def bucket_literals(scratch: Path, count: int, buckets: int, source: str, triples: Path, entities: Path) -> Numbers:
    """Write triples from entities to buckets of their numbers, and the buckets as entities, as lines of the tables.

    A relation is numeric where 95 % of its literals are numbers or dates and more than ten of them differ. Each has at
    most `buckets` buckets, of about equal size, called by their least and greatest value. The literals stay in the
    entities' texts.
    """
    rng, found = np.random.default_rng(0), {}
    for relations, _, values in _blocks(scratch, count):
        for relation in np.unique(relations):
            found.setdefault(relation, _Relation()).add(values[relations == relation], rng)
    chosen = {relation: cuts(r.values, buckets) for relation, r in sorted(found.items())
              if r.seen and r.seen >= NUMERIC * (r.seen + r.others) and len(np.unique(r.values)) > FEW}
    low = {relation: np.full(len(ends) + 1, np.inf) for relation, ends in chosen.items()}
    high = {relation: np.full(len(ends) + 1, -np.inf) for relation, ends in chosen.items()}
    for relation, _, values in _chosen(scratch, count, chosen):
        rows = bucket_of(values, chosen[relation])
        np.minimum.at(low[relation], rows, values)
        np.maximum.at(high[relation], rows, values)
    names = {r: [span(a, b) for a, b in zip(low[r], high[r], strict=True)] for r in chosen}
    total = 0
    with open(triples, "w", encoding="utf-8", newline="\n") as file:
        for relation, subjects, values in _chosen(scratch, count, chosen):
            own, rows = bare(relation), bucket_of(values, chosen[relation]).tolist()
            lines = dict.fromkeys(f"{bare(s)}\t{own}\t{own}/{names[relation][k]}\t{source}\n"
                                  for s, k in zip(subjects.tolist(), rows, strict=True))
            file.writelines(lines)
            total += len(lines)
    with open(entities, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{bare(r)}/{name}\t{name}\t\n" for r in chosen for name in names[r])
    others = sum(found[r].others for r in chosen)
    notes = [f"{len(chosen):,} relations of numbers and dates: {total:,} triples to {sum(map(len, names.values())):,} "
             "buckets (counted above)"]
    notes += [f"{others:,} literals of these are no numbers: text alone"] * bool(others)
    return Numbers(total, frozenset(chosen), sum(map(len, names.values())), notes)


def _blocks(scratch: Path, count: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(relations, subjects, values) of some thousand literals at a time; NaN for what is no number."""
    for k in range(count):
        with open(scratch / f"literals.{k}", encoding="utf-8", newline="\n") as file:
            while lines := file.readlines(_LINES * 64):
                parts = [line[:-1].split(" ", 2) for line in lines]
                yield (np.array([p[1] for p in parts], object), np.array([p[0] for p in parts], object),
                       np.array([number(p[2]) for p in parts]))


def _chosen(scratch: Path, count: int,
            chosen: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(relation, subjects, values): the numbers of the chosen relations, block by block."""
    for relations, subjects, values in _blocks(scratch, count):
        for relation in np.unique(relations):
            if relation in chosen:
                own = (relations == relation) & np.isfinite(values)
                if own.any():
                    yield relation, subjects[own], values[own]
