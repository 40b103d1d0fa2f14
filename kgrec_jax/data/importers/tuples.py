"""Tuples extracted from text by a program (subject, relation, object, confidence, source) as candidates of a graph."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from kgrec_jax.data.importers.linking import Linker
from kgrec_jax.data.importers.surface import entity_key, relation_key, shown
from kgrec_jax.data.lines import read_lines
from kgrec_jax.errors import KgrecError

Status = Literal["new", "ambiguous", "unlinked", "loop"]
_FIELDS = {"subject": ("subject", "subj", "arg1", "head"), "relation": ("relation", "predicate", "pred", "rel"),
           "object": ("object", "obj", "arg2", "tail"), "confidence": ("confidence", "conf", "score"),
           "source": ("source", "sentence", "doc", "document")}
_NEEDED = ("subject", "relation", "object")


@dataclasses.dataclass(frozen=True)
class Mention:
    """One row of the file."""

    subject: str
    relation: str
    object: str
    confidence: float  # 0 to 1
    source: str  # what the row says, else FILE:LINE


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One statement, of however many mentions."""

    id: str  # 10 hex digits of what it says: the same in every run over the same graph
    subject: str  # as most mentions write it
    relation: str
    object: str
    subjects: tuple[str, ...]  # ids of the graph that the subject may mean; none: it is new
    relations: tuple[str, ...]
    objects: tuple[str, ...]
    confidence: float  # that at least one mention is right: 1 - Π (1 - c), mentions taken as independent
    support: int  # different sources
    source: str  # the most confident one
    status: Status


@dataclasses.dataclass(frozen=True)
class Gathered:
    """What became of the mentions: each is in a candidate or in one of the counts."""

    candidates: list[Candidate]  # for review, the surest first
    mentions: int
    statements: int  # distinct
    empty: int  # mentions whose subject, object or relation is empty, an article or a pronoun
    first_empty: str
    known: int  # statements that the graph has already
    weak: int  # statements below the thresholds
    first_weak: str

    def lines(self) -> list[str]:
        """The counts in words."""
        out = [f"{self.mentions:,} mentions of {self.statements:,} statements"]
        out += [f"{self.empty:,} mentions have a pronoun or nothing as an end or relation: not used (first: "
                f"{self.first_empty})"] * bool(self.empty)
        out += [f"{self.known:,} statements are in the graph already"] * bool(self.known)
        out += [f"{self.weak:,} statements are below --min-support or --min-confidence: not used (first: "
                f"{self.first_weak})"] * bool(self.weak)
        status = Counter(c.status for c in self.candidates)
        words = {"new": "with a known end", "ambiguous": "whose names several entities or relations share",
                 "unlinked": "with no known end", "loop": "from an entity to itself"}
        return out + [f"{status[key]:,} statements {said}: for review" for key, said in words.items() if status[key]]


def read_tuples(path: Path) -> list[Mention]:
    """The mentions of a file: JSON lines (.jsonl), or tab-separated with a header or in the order subject, relation,
    object, confidence, source, of which the last two may be missing.

    A mention without confidence counts as certain. Raises KgrecError with the line of what cannot be read.
    """
    if not path.is_file():
        raise KgrecError(f"{path}: found no such file, expected tuples as .tsv or .jsonl; check the path")
    lines = [(number, line) for number, line in enumerate(read_lines(path), 1) if line.strip()]
    if path.suffix in (".jsonl", ".json", ".ndjson"):
        rows = [_json_row(path, number, line) for number, line in lines]
    else:
        rows = _tabbed(path, lines)
    if not rows:
        raise KgrecError(f"{path}: found no tuple, expected rows of subject, relation, object and confidence")
    return [_mention(path, number, row) for (number, _), row in zip(lines[-len(rows):], rows, strict=True)]


def _json_row(path: Path, number: int, line: str) -> dict[str, str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise KgrecError(f"{path}:{number}: found malformed JSON ({error.msg}, column {error.colno}), expected an "
                         "object a line") from None
    if not isinstance(row, dict):
        raise KgrecError(f"{path}:{number}: found no object, expected one with subject, relation and object")
    lower = {str(key).lower(): value for key, value in row.items()}
    found = {field: next((lower[n] for n in names if n in lower), None) for field, names in _FIELDS.items()}
    bad = next((f for f in _NEEDED if not isinstance(found[f], str)), "")
    if bad:
        raise KgrecError(f"{path}:{number}: found {found[bad]!r} for the {bad}, expected a string under one of "
                         f"{', '.join(_FIELDS[bad])}")
    return {field: str(value) for field, value in found.items() if value is not None}


def _tabbed(path: Path, lines: Sequence[tuple[int, str]]) -> list[dict[str, str]]:
    if not lines:
        return []
    header = [cell.strip().lower() for cell in lines[0][1].split("\t")]
    fields = [next((f for f, names in _FIELDS.items() if cell in names), "") for cell in header]
    has_header = all(field in fields for field in _NEEDED)
    if not has_header:
        fields = list(_FIELDS)[:len(header)]
        if len(header) < 3 or len(header) > len(_FIELDS):
            raise KgrecError(f"{path}:{lines[0][0]}: found {len(header)} fields, expected subject, relation, object "
                             "and perhaps confidence and source, between tabs")
    rows = []
    for number, line in lines[has_header:]:
        cells = line.split("\t")
        if len(cells) != len(fields):
            raise KgrecError(f"{path}:{number}: found {len(cells)} field{'s' * (len(cells) != 1)}, expected "
                             f"{len(fields)} as in the first line; check tabs inside a value")
        rows.append({field: cell for field, cell in zip(fields, cells, strict=True) if field})
    return rows


def _mention(path: Path, number: int, row: dict[str, str]) -> Mention:
    word = row.get("confidence", "").strip() or "1"
    try:
        confidence = float(word)
    except ValueError:
        confidence = math.nan
    if not 0 <= confidence <= 1:
        raise KgrecError(f"{path}:{number}: found the confidence {word!r}, expected a number from 0 to 1; rescale or "
                         "correct it")
    source = " ".join(row.get("source", "").split())
    return Mention(row["subject"], row["relation"], row["object"], confidence, source or f"{path.name}:{number}")


def gather(mentions: Sequence[Mention], linker: Linker, min_support: int = 1, min_confidence: float = 0.5) -> Gathered:
    """Mentions that say the same as one candidate each, linked to the graph and held against the thresholds.

    Two mentions say the same where both ends and the relation are linked to the same, or have equal keys
    (`surface.entity_key`, `surface.relation_key`). One source counts once, with its most confident mention.
    """
    groups: dict[tuple[str, str, str], list[Mention]] = {}
    empty: list[Mention] = []
    for mention in mentions:
        key = (_end(linker, mention.subject), _relation(linker, mention.relation), _end(linker, mention.object))
        groups.setdefault(key, []).append(mention) if all(key) else empty.append(mention)
    graph = linker.graph
    known = {(f"={graph.entity_ids[h]}", f"={graph.relation_ids[r]}", f"={graph.entity_ids[t]}")
             for h, r, t in graph.triples.tolist()}
    candidates, weak = [], []
    for key, group in groups.items():
        if key not in known:
            candidate = _candidate(key, group, linker)
            strong = candidate.support >= min_support and candidate.confidence >= min_confidence
            (candidates if strong else weak).append(candidate)
    candidates.sort(key=lambda c: (-c.confidence, -c.support, c.id))
    first = weak[0] if weak else None
    return Gathered(candidates, len(mentions), len(groups), len(empty),
                    f"{empty[0].subject!r}, {empty[0].relation!r}, {empty[0].object!r}" if empty else "",
                    len(groups.keys() & known), len(weak),
                    f"{first.subject}, {first.relation}, {first.object}: {first.confidence:.2f}, {first.support}"
                    if first else "")


def _end(linker: Linker, form: str) -> str:
    """`=ID` of a form that is linked, `~KEY` of one that is not, "" of one without content."""
    found, key = linker.entities(form), entity_key(form)
    return f"={found[0]}" if len(found) == 1 else f"~{key}" if key else ""


def _relation(linker: Linker, form: str) -> str:
    found, key = linker.relations(form), relation_key(form)
    return f"={found[0]}" if len(found) == 1 else f"~{key}" if key else ""


def _candidate(key: tuple[str, str, str], group: Sequence[Mention], linker: Linker) -> Candidate:
    best: dict[str, float] = {}
    for mention in group:
        best[mention.source] = max(best.get(mention.source, 0.0), mention.confidence)
    subject, relation, obj = (_usual([shown(getattr(m, field)) for m in group]) for field in _NEEDED)
    subjects, relations, objects = linker.entities(subject), linker.relations(relation), linker.entities(obj)
    status: Status = "new"
    if max(map(len, (subjects, relations, objects))) > 1:
        status = "ambiguous"
    elif key[0] == key[2]:
        status = "loop"
    elif not subjects and not objects:
        status = "unlinked"
    return Candidate(hashlib.sha256("\t".join(key).encode()).hexdigest()[:10], subject, relation, obj, subjects,
                     relations, objects, 1.0 - math.prod(1.0 - c for c in best.values()), len(best),
                     max(best, key=best.__getitem__), status)


def _usual(forms: Sequence[str]) -> str:
    """The most frequent form; of equally frequent ones the shortest that does not shout."""
    count = Counter(forms)
    return min(count, key=lambda form: (-count[form], form.isupper(), len(form)))
