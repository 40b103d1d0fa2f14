"""The passes over a dump behind `graph_build`: what is kept goes to files and to partitions by entity."""

from __future__ import annotations

import dataclasses
import os
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kgrec_jax.data.graph_numbers import write_literals
from kgrec_jax.data.names import name_from_id
from kgrec_jax.data.rdf import compact
from kgrec_jax.data.rdf_terms import BlankNodes, Piece, bare, coded, statements
from kgrec_jax.data.rdf_words import NAMES, SAME_AS, TYPE, Words

_BUFFER = 1 << 24  # characters on their way to the partitions
_SEEN = 1 << 17  # entities remembered as written: most mentions of an entity stand close together

Told = Callable[[int], None] | None


@dataclasses.dataclass(frozen=True)
class Keep:
    """What a pass keeps."""

    near: frozenset[str] | None  # triples with an end in it; None: all
    relations: frozenset[str]  # triples of these; none: all
    words: bool  # whether literals are kept
    about: frozenset[str] | None = None  # literals of these subjects; None: all
    source: str = ""  # who states the triples; "": the file that is read


@dataclasses.dataclass(frozen=True)
class Spilled:
    """What a pass over a piece has found, beside what it wrote."""

    triples: int
    relations: frozenset[str]
    predicates: frozenset[str]  # relations whose tails are literals
    same: list[tuple[str, str]]
    quoted: int

    @staticmethod
    def join(parts: Sequence[Spilled]) -> Spilled:
        """All of them as one."""
        return Spilled(sum(p.triples for p in parts), frozenset().union(*(p.relations for p in parts)),
                       frozenset().union(*(p.predicates for p in parts)), [s for p in parts for s in p.same],
                       sum(p.quoted for p in parts))


@dataclasses.dataclass(frozen=True)
class Finished:
    """Counts of one partition."""

    entities: int
    unnamed: int
    items: int
    several_types: int  # entities of more than one rdf:type
    counts: Counter[str]


class _Partitions:
    """Lines on their way to the files part.K.NUMBER, K by a hash of their subject."""

    def __init__(self, scratch: Path, number: int | str, count: int):
        self._scratch, self._number, self._lines = scratch, number, [[] for _ in range(count)]
        self._size = 0

    def add(self, subject: str, line: str) -> None:
        self._lines[zlib.crc32(subject.encode()) % len(self._lines)].append(line)
        self._size += len(line)
        if self._size > _BUFFER:
            self.flush()

    def flush(self) -> None:
        for k, lines in enumerate(self._lines):
            if lines:
                with open(self._scratch / f"part.{k}.{self._number}", "a", encoding="utf-8", newline="\n") as file:
                    file.write("\n".join(lines) + "\n")
                lines.clear()
        self._size = 0


def _terms(piece: Piece, told: Told) -> object:
    """(codes, terms, [D] literal, [D] statement or None) of each batch, blank nodes by their lasting names."""
    blank = BlankNodes(piece)
    for batch in statements(piece, told):
        codes, terms, literal, odd = coded(batch)
        if not odd:
            yield codes, terms, literal, None
            continue
        statement = np.fromiter((t.startswith("<<") for t in terms), bool, len(terms))
        yield codes, [t if t[0] != "_" else blank(t) for t in terms], literal, statement


def _among(terms: Sequence[str], chosen: Collection[str]) -> np.ndarray:
    """[D] whether each term is among the chosen."""
    return np.fromiter((t in chosen for t in terms), bool, len(terms))


def spill(piece: Piece, number: int, told: Told, scratch: Path, count: int, keep: Keep, shift: int = 0) -> Spilled:
    """Write the triples that are kept to triples.NUMBER, entities and literals to the partitions."""
    parts = _Partitions(scratch, f"{number + shift:06}", count)
    relations: set[str] = set()
    predicates: set[str] = set()
    seen: set[str] = set()
    same: list[tuple[str, str]] = []
    triples = quoted = 0
    with open(scratch / f"triples.{number + shift}", "wb") as file:
        for codes, terms, literal, statement in _terms(piece, told):
            is_fact = ~literal[codes[:, 2]]
            words, facts = codes[~is_fact], codes[is_fact]
            predicates.update(terms[k] for k in compact(words[:, 1], len(terms))[0].tolist())
            if keep.words:
                chosen = words if keep.about is None else words[_among(terms, keep.about)[words[:, 0]]]
                for h, r, t in chosen.tolist():
                    parts.add(terms[h], f"{terms[h]} {terms[r]} {terms[t]}")
            if keep.near is not None:
                near = _among(terms, keep.near) if keep.near else np.zeros(len(terms), bool)
                facts = facts[near[facts[:, 0]] | near[facts[:, 2]]]
            odd = facts[:, 1] == (terms.index(SAME_AS) if SAME_AS in terms else -1)
            same += [(terms[h], terms[t]) for h, _, t in facts[odd].tolist()]
            facts = facts[~odd]
            if statement is not None:
                quoted += int(statement[facts[:, 2]].sum())
                facts = facts[~statement[facts[:, 2]]]
            if keep.relations:
                facts = facts[_among(terms, keep.relations)[facts[:, 1]]]
            if not len(facts):
                continue
            triples += len(facts)
            relations.update(terms[k] for k in compact(facts[:, 1], len(terms))[0].tolist())
            kind = terms.index(TYPE) if TYPE in terms else -1
            for h, r, t in facts[facts[:, 1] == kind].tolist():
                parts.add(terms[h], f"{terms[h]} {terms[r]} {terms[t]}")  # types of an entity are counted together
            file.write(_lines(terms, facts, keep.source or piece.path.name))
            if len(seen) > _SEEN:
                seen = set()
            for k in compact(facts[:, [0, 2]], len(terms))[0].tolist():
                entity = terms[k]
                if entity not in seen:
                    seen.add(entity)
                    parts.add(entity, entity)
    parts.flush()
    return Spilled(triples, frozenset(relations), frozenset(predicates), same, quoted)


def _lines(terms: Sequence[str], facts: np.ndarray, source: str) -> memoryview:
    """The rows as lines of triples.tsv: Arrow keeps joined strings one after another, just as a file has them."""
    end = "\t" + " ".join(source.split()) + "\n"
    ids = pa.array([bare(t) for t in terms], pa.string())
    ends = pc.binary_join_element_wise(ids, end, "")
    rows = pc.binary_join_element_wise(ids.take(pa.array(facts[:, 0])), ids.take(pa.array(facts[:, 1])),
                                       ends.take(pa.array(facts[:, 2])), "\t")
    offsets = np.frombuffer(rows.buffers()[1], np.int32)[rows.offset:rows.offset + len(rows) + 1]
    return memoryview(rows.buffers()[2])[offsets[0]:offsets[-1]]


def neighbours(piece: Piece, number: int, told: Told, reached: frozenset[str],
               relations: frozenset[str]) -> tuple[set[str], set[str]]:
    """(entities that a triple joins to those reached, other names of those reached)."""
    near: set[str] = set()
    alias: set[str] = set()
    for codes, terms, literal, _ in _terms(piece, told):
        known = _among(terms, reached)
        if not known.any():
            continue
        facts = codes[~literal[codes[:, 2]]]
        facts = facts[known[facts[:, 0]] | known[facts[:, 2]]]
        same = _among(terms, (SAME_AS,))[facts[:, 1]]
        alias.update(terms[k] for k in facts[same][:, [0, 2]].ravel().tolist())
        facts = facts[~same]
        if relations:
            facts = facts[_among(terms, relations)[facts[:, 1]]]
        near.update(t for k in facts[:, [0, 2]].ravel().tolist() if not (t := terms[k]).startswith("<<"))
    return near, alias


def _partition(scratch: Path, k: int) -> object:
    """The lines of a partition in the order of the pieces."""
    for path in sorted(scratch.glob(f"part.{k}.*")):
        with open(path, encoding="utf-8", newline="\n") as file:
            for line in file:
                yield line[:-1]


def redirect(scratch: Path, count: int, same: Mapping[str, str]) -> None:
    """Move what is said of an entity that stands under another name now to that one's partition."""
    moved = _Partitions(scratch, "same", count)
    for k in range(count):
        for path in sorted(scratch.glob(f"part.{k}.[0-9]*")):
            fresh = path.with_name(f"fresh.{path.name}")
            with open(path, encoding="utf-8", newline="\n") as old, open(fresh, "w", encoding="utf-8",
                                                                        newline="\n") as new:
                for line in old:
                    subject, space, rest = line[:-1].partition(" ")
                    other = same.get(subject)
                    if other is None:
                        new.write(line)
                    else:
                        moved.add(other, other + space + rest)
            os.replace(fresh, path)
    moved.flush()


def rewrite(path: Path, same: Mapping[str, str]) -> None:
    """Put the entities that stand for others into a file of triples."""
    names = {bare(a): bare(b) for a, b in same.items()}
    fresh = path.with_name(f"fresh.{path.name}")
    with open(path, encoding="utf-8", newline="\n") as old, open(fresh, "w", encoding="utf-8", newline="\n") as new:
        for line in old:
            head, relation, tail, rest = line.split("\t")
            new.write(f"{names.get(head, head)}\t{relation}\t{names.get(tail, tail)}\t{rest}")
    os.replace(fresh, path)


def labels(scratch: Path, count: int, wanted: Collection[str], languages: Sequence[str]) -> dict[str, str]:
    """The names of relations, from the partitions that hold them."""
    words = Words(languages)
    for k in sorted({zlib.crc32(r.encode()) % count for r in wanted}):
        for line in _partition(scratch, k):
            subject, _, rest = line.partition(" ")
            if rest and subject in wanted:
                relation, _, literal = rest.partition(" ")
                if relation in NAMES:
                    words.add(subject, relation, literal)
    return {r: words.name(r) for r in words.names}


def finish(k: int, scratch: Path, languages: Sequence[str], relation_names: Mapping[str, str],
           items: Collection[str], numbers: bool = False) -> Finished:
    """Write entities.K from a partition, which is removed, and with `numbers` its literals to literals.K."""
    words, entities, types = Words(languages), {}, {}
    for line in _partition(scratch, k):
        head, _, rest = line.partition(" ")
        if rest:
            relation, _, literal = rest.partition(" ")
            if literal[0] == '"':
                words.add(head, relation, literal)
            else:
                types.setdefault(head, set()).add(literal)
        else:
            entities[head] = None
    unnamed = 0
    with open(scratch / f"entities.{k}", "w", encoding="utf-8", newline="\n") as file:
        for entity in sorted(entities):  # the same order however many processes parsed
            name = words.name(entity) or name_from_id(bare(entity))
            unnamed += not name
            file.write(f"{bare(entity)}\t{name}\t{words.text(entity, relation_names)}\n")
    if numbers:
        write_literals(words, entities, scratch / f"literals.{k}")
    for path in scratch.glob(f"part.{k}.*"):
        path.unlink()
    counts = words.counts
    astray = {*words.names, *words.descriptions, *words.texts} - entities.keys() - relation_names.keys()
    if astray:
        counts["subjects of literals that stand in no triple"] += len(astray)
    several = sum(len(found) > 1 for found in types.values())
    return Finished(len(entities), unnamed, sum(e in items for e in entities), several, counts)
