"""RDF as a graph in memory: integers for entities and relations, their names and texts, what was left out counted."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from kgrec_jax.data.names import relation_name
from kgrec_jax.data.rdf_terms import BlankNodes, Piece, bare, coded, format_of, pieces, statements
from kgrec_jax.data.rdf_words import SAME_AS, TYPE, Words, merge_same

_WORTH_A_PROCESS = 1 << 27  # bytes of N-Triples; below, starting one takes longer than it saves


@dataclasses.dataclass(frozen=True)
class RdfGraph:
    """What RDF files say. Entities are those that stand in a triple, in the order of their first appearance."""

    entity_ids: list[str]  # whole IRIs; blank nodes as _:fFILE.LABEL
    relation_ids: list[str]
    triples: np.ndarray  # [T, 3] int32: head, relation, tail; repeats included
    names: Mapping[str, str]  # entity or relation (or what stands in no triple) -> its label in the languages wanted
    texts: Mapping[str, str]  # the same -> description and other literals
    notes: list[str]


@dataclasses.dataclass(frozen=True)
class _Parsed:
    """One piece of a file: the distinct terms of its triples, the triples as rows of them, and all else it says."""

    terms: list[str]
    rows: np.ndarray  # [T, 3] int32
    same: list[tuple[str, str]]
    words: Words
    quoted: int  # statements about statements


def rdf_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files graph.ttl, graph.nt.gz … of a dataset folder, by name."""
    return sorted(p for p in folder.iterdir() if p.name.startswith("graph.") and p.name.count(".") <= 2
                  and format_of(p) and p.is_file())


def read_rdf(paths: Sequence[pathlib.Path], languages: Sequence[str] = ("en",), items: Mapping[str, str] | None = None,
             processes: int = 1, told: Callable[[int], None] | None = None) -> RdfGraph:
    """Read RDF files as one graph.

    IRIs and blank nodes are entities; owl:sameAs merges them, and an item (`items`: entity -> item) stands for its
    group. Literals are names, descriptions and other text, never entities. `processes` beyond one parse parts of large
    N-Triples files. Raises KgrecError for malformed RDF, and for two items stated to be one thing.
    """
    items = {f"<{entity}>": item for entity, item in (items or {}).items()}
    parts = pieces(paths, processes, _WORTH_A_PROCESS // 2)
    if len(parts) > 1 and processes > 1 and sum(p.path.stat().st_size for p in parts) >= _WORTH_A_PROCESS:
        context = multiprocessing.get_context("spawn")  # a fork would copy JAX's threads in mid-flight
        with concurrent.futures.ProcessPoolExecutor(processes, context) as pool:
            parsed = list(pool.map(_parse, parts, [tuple(languages)] * len(parts)))
    else:
        parsed = [_parse(piece, languages, told) for piece in parts]
    return _join(parsed, languages, items, ", ".join(p.name for p in paths))


def _parse(piece: Piece, languages: Sequence[str], told: Callable[[int], None] | None = None) -> _Parsed:
    ids: dict[str, int] = {}
    words, blocks = Words(languages), [np.zeros((0, 3), np.int32)]
    for batch in statements(piece, told):
        codes, terms, literal, _ = coded(batch)
        fact = ~literal[codes[:, 2]]
        for head, relation, tail in codes[~fact].tolist():
            words.add(terms[head], terms[relation], terms[tail])
        codes = codes[fact]
        used, codes = compact(codes, len(terms))
        rows = np.fromiter((ids.setdefault(terms[k], len(ids)) for k in used.tolist()), np.int32, len(used))
        blocks.append(rows[codes])
    blank = BlankNodes(piece)
    terms, rows = [blank(term) for term in ids], np.concatenate(blocks)
    is_same = rows[:, 1] == ids.get(SAME_AS, -1)
    same = [(terms[a], terms[b]) for a, _, b in rows[is_same].tolist()]
    is_quoted = np.array([term.startswith("<<") for term in terms], bool)
    is_quoted = is_quoted[rows[:, 2]] if is_quoted.any() else np.zeros(len(rows), bool)
    return _Parsed(terms, rows[~is_same & ~is_quoted], same, words.renamed(blank), int((is_quoted & ~is_same).sum()))


def _join(parsed: list[_Parsed], languages: Sequence[str], items: Mapping[str, str], where: str) -> RdfGraph:
    ids: dict[str, int] = {}
    blocks = [np.zeros((0, 3), np.int32)]
    words = parsed[0].words if parsed else Words(languages)
    for number, part in enumerate(parsed):
        rows = np.array([ids.setdefault(term, len(ids)) for term in part.terms], np.int32)
        blocks.append(rows[part.rows] if len(rows) else part.rows)
        if number:
            words.merge(part.words)
    triples = np.concatenate(blocks)
    same = merge_same([pair for part in parsed for pair in part.same], items)
    if same:
        known = [term for term in ids if term in same]
        for term in known:
            ids.setdefault(same[term], len(ids))
        target = np.arange(len(ids), dtype=np.int32)
        target[[ids[term] for term in known]] = [ids[same[term]] for term in known]
        triples[:, [0, 2]] = target[triples[:, [0, 2]]]
        words = words.renamed(lambda term: same.get(term, term))
    notes = [f"{where}: owl:sameAs merges {len(same):,} entities into others"] if same else []
    quoted = sum(part.quoted for part in parsed)
    if quoted:
        notes.append(f"{where}: {quoted:,} statements about statements are not used")
    if TYPE in ids:
        notes += _types(triples, ids[TYPE], where)
    return _graph(triples, ids, words, notes, where)


def _types(triples: np.ndarray, relation: int, where: str) -> list[str]:
    """How many entities have several types: worth a look, and no error."""
    typed = np.unique(triples[triples[:, 1] == relation], axis=0)[:, 0]
    several = int((np.unique(typed, return_counts=True)[1] > 1).sum())
    return [f"{where}: {several:,} entities have more than one type; each type is a triple"] if several else []


def _graph(triples: np.ndarray, ids: dict[str, int], words: Words, notes: list[str], where: str) -> RdfGraph:
    terms = list(ids)
    entity, ends = compact(triples[:, [0, 2]], len(terms))
    relation, middle = compact(triples[:, 1], len(terms))
    relations = [terms[k] for k in relation]
    spoken = {r for texts in words.texts.values() for r in texts}  # relations whose tails are literals
    labels = {r: name for r in {*relations, *spoken} if (name := words.name(r))}
    unnamed = [r for r in relations if r not in labels]
    if unnamed:
        notes.append(f"{where}: {len(unnamed):,} of {len(relations):,} relations have no label (first: "
                     f"{bare(unnamed[0])}); each is called by the end of its IRI, such as "
                     f"{relation_name(bare(unnamed[0]))!r}")
    subjects = dict.fromkeys([*words.names, *words.descriptions, *words.texts])
    astray = [s for s in subjects if s not in ids and s not in spoken]
    if astray:
        notes.append(f"{where}: {len(astray):,} subjects have literals and stand in no triple (first: "
                     f"{bare(astray[0])}); they are no entities unless a table lists them")
    names = {bare(s): name for s, (_, name) in words.names.items()}
    texts = {bare(s): words.text(s, labels) for s in dict.fromkeys([*words.descriptions, *words.texts])}
    rows = np.stack([ends[:, 0], middle, ends[:, 1]], 1).astype(np.int32)
    return RdfGraph([bare(terms[k]) for k in entity], [bare(r) for r in relations], rows, names, texts,
                    [*notes, *words.notes(where)])


def compact(codes: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(the codes below `size` that occur, in ascending order; the array as positions among them)."""
    occurs = np.zeros(size, bool)
    occurs[codes] = True
    return np.flatnonzero(occurs), (np.cumsum(occurs) - 1)[codes]
