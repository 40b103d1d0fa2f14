"""The passes over a dump behind `graph_build`: what is kept goes to files and to partitions by entity."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
_MIX, _TAIL = 0x9E3779B97F4A7C15, 8  # of the hash of a term: Fibonacci hashing of its last bytes (Knuth 1973, §6.4)

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


def partitions_of(terms: Sequence[str], count: int) -> np.ndarray:
    """[D] the partition, of `count`, of each term: a hash of its last bytes, where IRIs of one namespace differ."""
    column = pa.array(terms, pa.string())
    offsets = np.frombuffer(column.buffers()[1], np.int32)[:len(terms) + 1].astype(np.int64)
    content = np.frombuffer(column.buffers()[2] or b"\0", np.uint8)
    places = offsets[1:, None] + np.arange(-_TAIL, 0)  # [D, 8]
    tails = np.where(places >= offsets[:-1, None], content[np.maximum(places, 0)], np.uint8(0))
    mixed = np.ascontiguousarray(tails).view("<u8")[:, 0] * np.uint64(_MIX)
    return ((mixed >> np.uint64(40)) % np.uint64(count)).astype(np.int64)


def partition_of(term: str, count: int) -> int:
    """The same for one term."""
    tail = int.from_bytes(term.encode()[-_TAIL:].rjust(_TAIL, b"\0"), "little")
    return ((tail * _MIX % (1 << 64)) >> 40) % count


class _Partitions:
    """Lines on their way to the files NAME.K.NUMBER, K by a hash of their subject."""

    def __init__(self, scratch: Path, name: str, number: int | str, count: int):
        self._scratch, self._name, self._number = scratch, name, number
        self._lines: list[list[str]] = [[] for _ in range(count)]
        self._size = 0

    def add(self, place: int, line: str) -> None:
        self._lines[place].append(line)
        self._took(len(line))

    def add_many(self, places: np.ndarray, lines: Sequence[str]) -> None:
        """Lines in the order of their partitions `places`."""
        starts = np.searchsorted(places, np.arange(len(self._lines) + 1)).tolist()
        for k, (start, stop) in enumerate(zip(starts, starts[1:])):
            self._lines[k].extend(lines[start:stop])
        self._took(sum(map(len, lines)))

    def _took(self, size: int) -> None:
        self._size += size
        if self._size > _BUFFER:
            self.flush()

    def flush(self) -> None:
        for k, lines in enumerate(self._lines):
            if lines:
                file = self._scratch / f"{self._name}.{k}.{self._number}"
                with open(file, "a", encoding="utf-8", newline="\n") as target:
                    target.write("\n".join(lines) + "\n")
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
    """Write the triples that are kept to triples.NUMBER, entities to the partitions `entity`, what is said of them in
    words or types to the partitions `part`."""
    parts, mentions = (_Partitions(scratch, name, f"{number + shift:06}", count) for name in ("part", "entity"))
    relations: set[str] = set()
    predicates: set[str] = set()
    same: list[tuple[str, str]] = []
    triples = quoted = 0
    with open(scratch / f"triples.{number + shift}", "wb") as file:
        for codes, terms, literal, statement in _terms(piece, told):
            is_fact = ~literal[codes[:, 2]]
            words, facts = codes[~is_fact], codes[is_fact]
            places = partitions_of(terms, count)
            predicates.update(terms[k] for k in compact(words[:, 1], len(terms))[0].tolist())
            if keep.words:
                chosen = words if keep.about is None else words[_among(terms, keep.about)[words[:, 0]]]
                _add_statements(parts, places, terms, chosen)
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
            _add_statements(parts, places, terms, facts[facts[:, 1] == kind])  # types of one are counted together
            file.write(_lines(terms, facts, keep.source or piece.path.name))
            rows = compact(facts[:, [0, 2]], len(terms))[0]
            rows = rows[np.argsort(places[rows], kind="stable")]
            mentions.add_many(places[rows], [terms[k] for k in rows.tolist()])
    parts.flush()
    mentions.flush()
    return Spilled(triples, frozenset(relations), frozenset(predicates), same, quoted)


def _add_statements(parts: _Partitions, places: np.ndarray, terms: Sequence[str], codes: np.ndarray) -> None:
    for place, (h, r, t) in zip(places[codes[:, 0]].tolist(), codes.tolist()):
        parts.add(place, f"{terms[h]} {terms[r]} {terms[t]}")


def _lines(terms: Sequence[str], facts: np.ndarray, source: str) -> memoryview:
    """The rows as lines of triples.tsv: Arrow keeps joined strings one after another, just as a file has them."""
    end = "\t" + " ".join(source.split()) + "\n"
    whole = pa.array(terms, pa.string())
    ids = pc.if_else(pc.starts_with(whole, "<"), pc.utf8_slice_codeunits(whole, 1, -1), whole)  # `bare` of each
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


def _partition(scratch: Path, k: int) -> Iterator[str]:
    """The lines of a partition's words and types in the order of the pieces."""
    for path in sorted(scratch.glob(f"part.{k}.*")):
        with open(path, encoding="utf-8", newline="\n") as file:
            for line in file:
                yield line[:-1]


def mentioned(scratch: Path, k: int) -> set[str]:
    """The entities of a partition."""
    found: set[str] = set()
    for path in scratch.glob(f"entity.{k}.*"):
        found.update(path.read_text(encoding="utf-8").split("\n"))
    return found - {""}


def redirect(scratch: Path, count: int, same: Mapping[str, str]) -> None:
    """Move what is said of an entity that stands under another name now to that one's partition."""
    for name in ("part", "entity"):
        moved = _Partitions(scratch, name, "same", count)
        for path in sorted(scratch.glob(f"{name}.*.[0-9]*")):
            fresh = path.with_name(f"fresh.{path.name}")
            with open(path, encoding="utf-8", newline="\n") as old, open(fresh, "w", encoding="utf-8",
                                                                        newline="\n") as new:
                for line in old:
                    subject, space, rest = line[:-1].partition(" ")
                    other = same.get(subject)
                    if other is None:
                        new.write(line)
                    else:
                        moved.add(partition_of(other, count), other + space + rest)
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
    for k in sorted({partition_of(r, count) for r in wanted}):
        for line in _partition(scratch, k):
            subject, _, rest = line.partition(" ")
            if subject in wanted:
                relation, _, literal = rest.partition(" ")
                if relation in NAMES:
                    words.add(subject, relation, literal)
    return {r: words.name(r) for r in words.names}


def finish(k: int, scratch: Path, languages: Sequence[str], relation_names: Mapping[str, str],
           items: Collection[str], numbers: bool = False) -> Finished:
    """Write entities.K from a partition, which is removed, and with `numbers` its literals to literals.K."""
    words, entities, types = Words(languages), mentioned(scratch, k), {}
    for line in _partition(scratch, k):
        head, _, rest = line.partition(" ")
        relation, _, literal = rest.partition(" ")
        if literal[0] == '"':
            words.add(head, relation, literal)
        else:
            types.setdefault(head, set()).add(literal)
    unnamed = 0
    with open(scratch / f"entities.{k}", "w", encoding="utf-8", newline="\n") as file:
        for entity in sorted(entities):  # the same order however many processes parsed
            name = words.name(entity) or name_from_id(bare(entity))
            unnamed += not name
            file.write(f"{bare(entity)}\t{name}\t{words.text(entity, relation_names)}\n")
    if numbers:
        write_literals(words, entities, scratch / f"literals.{k}")
    for path in [*scratch.glob(f"part.{k}.*"), *scratch.glob(f"entity.{k}.*")]:
        path.unlink()
    counts = words.counts
    astray = {*words.names, *words.descriptions, *words.texts} - entities - relation_names.keys()
    if astray:
        counts["subjects of literals that stand in no triple"] += len(astray)
    several = sum(len(found) > 1 for found in types.values())
    return Finished(len(entities), unnamed, sum(e in items for e in entities), several, counts)
