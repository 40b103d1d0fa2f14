"""Candidates for a graph in a table that a person edits, and what the person decided as triples.

The column `decision` is `accept`, `reject` or empty. A row's entities and relation may be set to an id of the graph or
to `new`; `|` stands between the ids of which one is to be chosen. The column `id` says which candidate the row is.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kgrec_jax.data.dataset import Graph
from kgrec_jax.data.folder import read_folder
from kgrec_jax.data.graph_extend import Fact, check_new, extend_folder
from kgrec_jax.data.importers.linking import Linker
from kgrec_jax.data.importers.surface import entity_key, relation_key
from kgrec_jax.data.importers.tuples import Candidate, gather, read_tuples
from kgrec_jax.data.tables import read_table, write_tsv
from kgrec_jax.data.triples import check_unique
from kgrec_jax.errors import KgrecError

_COLUMNS = ("decision", "subject", "relation", "object", "confidence", "support", "status", "subject_entity",
            "relation_id", "object_entity", "source", "hint", "id")
_NEW, _OR = "new", " | "


@dataclasses.dataclass(frozen=True)
class TuplesConfig:
    """Which tuples go into which graph, and what counts."""

    tuples: Path  # .tsv or .jsonl
    graph: Path  # a dataset folder
    review: Path | None = None  # the edited review file; None: one is written
    min_support: int = 1  # different sources of a statement
    min_confidence: float = 0.5  # of a statement, over its mentions
    auto_accept: float = 2.0  # statements this sure need no decision; above 1: each needs one


@dataclasses.dataclass(frozen=True)
class _Row:
    """One row of the review file: what is decided, and the cells that may be edited."""

    decision: str
    subject: str
    relation: str
    object: str
    subject_entity: str
    relation_id: str
    object_entity: str
    where: Callable[[], str]  # FILE:LINE, found by reading the file up to it


def import_tuples(cfg: TuplesConfig, out: Path) -> list[str]:
    """Write the review file, or `out` with what was accepted; returns lines that account for every tuple.

    Without `cfg.review` the review file OUT.review.tsv is written, and `out` only where `auto_accept` takes something.
    With it `out` is the graph's folder with the accepted triples, each with its source and confidence. Statements that
    are ambiguous, join two unknown entities or an entity to itself are never accepted without a person. Raises
    KgrecError, with file and line, for tuples and decisions that cannot be read.
    """
    check_new(out)
    linker = Linker(read_folder(cfg.graph).graph, cfg.graph)
    mentions = read_tuples(cfg.tuples)
    found = gather(mentions, linker, cfg.min_support, cfg.min_confidence)
    notes = [f"{cfg.tuples.name}: {line}" for line in found.lines()]
    if cfg.review is not None:
        weakest = gather(mentions, linker, 1, 0.0)  # a decision counts whatever the thresholds are now
        return notes + _apply(cfg, linker.graph, found.candidates, weakest.candidates, out)
    path = out.with_name(f"{out.name}.review.tsv")
    if path.exists():
        raise KgrecError(f"{path}: found a review file already, expected none; use it with --review, or move it away")
    if not found.candidates:
        return [*notes, "nothing is left to review, so nothing was written"]
    sure = [c for c in found.candidates if _is_sure(c, cfg.auto_accept)]
    rows = {c.id: _row(c) for c in sure}
    if sure:
        notes += _write(cfg, linker.graph, [(c, rows[c.id]) for c in sure], out)
    _write_review(path, [c for c in found.candidates if c.id not in rows], linker.graph)
    return [*notes, f"{path}: {len(found.candidates) - len(sure):,} rows to review; write accept or reject into the "
            f"column decision, then run again with --review {path}"]


def _is_sure(candidate: Candidate, auto_accept: float) -> bool:
    return candidate.status == "new" and candidate.confidence >= auto_accept


def _row(c: Candidate) -> _Row:
    return _Row("", c.subject, c.relation, c.object, _OR.join(c.subjects) or _NEW, _OR.join(c.relations) or _NEW,
                _OR.join(c.objects) or _NEW, lambda: c.source)


def _write_review(path: Path, candidates: Sequence[Candidate], graph: Graph) -> None:
    wanted = {e for c in candidates for e in (*c.subjects, *c.objects)}
    about = {e: t if t.startswith(n) else f"{n} {t}".strip() for e, n, t in zip(
        graph.entity_ids, graph.entity_names, graph.entity_texts, strict=True) if e in wanted}
    rows = [_row(c) for c in candidates]
    hints = ["; ".join(f"{e}: {about[e][:80]}" for e in (*c.subjects, *c.objects)) for c in candidates]
    same = ("subject", "relation", "object", "subject_entity", "relation_id", "object_entity")
    columns = {name: [getattr(row, name) for row in rows] for name in same}
    columns |= {"decision": [""] * len(rows), "confidence": [f"{c.confidence:.4g}" for c in candidates],
                "support": [str(c.support) for c in candidates], "status": [c.status for c in candidates],
                "source": [c.source for c in candidates], "hint": hints, "id": [c.id for c in candidates]}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tsv(path, {name: columns[name] for name in _COLUMNS})


def _read_review(path: Path, known: Mapping[str, Candidate], tuples: Path) -> dict[str, _Row]:
    """Candidate's id -> row, with every decision checked."""
    if not path.is_file():
        raise KgrecError(f"{path}: found no such file, expected the review file of an earlier run; without --review "
                         "one is written")
    fields = [f.name for f in dataclasses.fields(_Row)][:-1]
    table = read_table(path, {"id": "id"} | dict.fromkeys(fields, "text"), rest_as_text=True)
    check_unique(table, "id")
    out = {}
    for number, identifier in enumerate(table["id"].strings()):
        cells = [table[field][number].strip() for field in fields]
        cells[0] = cells[0].lower()
        if cells[0] not in ("accept", "reject", ""):
            raise KgrecError(f"{table.where(number)}: found the decision {table['decision'][number]!r}, expected "
                             "accept, reject or nothing; correct the column decision")
        if identifier not in known:
            raise KgrecError(f"{table.where(number)}: found the row {identifier!r}, which is no statement of {tuples} "
                             "over this graph, expected rows of its review file; remove the row, or write the review "
                             "file anew")
        out[identifier] = _Row(*cells, functools.partial(table.where, number))
    return out


def _apply(cfg: TuplesConfig, graph: Graph, candidates: Sequence[Candidate], weakest: Sequence[Candidate],
           out: Path) -> list[str]:
    known = {c.id: c for c in weakest}
    rows = _read_review(cfg.review, known, cfg.tuples)
    rejected = [i for i, row in rows.items() if row.decision == "reject"]
    taken = [(known[i], row) for i, row in rows.items() if row.decision == "accept"]
    sure = [(c, rows.get(c.id, _row(c))) for c in candidates
            if _is_sure(c, cfg.auto_accept) and (c.id not in rows or not rows[c.id].decision)]
    done = {*rejected, *(c.id for c, _ in taken + sure)}
    blank = sum(i not in done for i in rows)
    fresh = [c for c in candidates if c.id not in rows and c.id not in done]
    notes = [f"{cfg.review.name}: {len(taken):,} accepted, {len(rejected):,} rejected, {blank:,} without a decision "
             "(not used)"]
    if fresh:
        notes.append(f"{len(fresh):,} statements are not in the review file (first: {fresh[0].subject}, "
                     f"{fresh[0].relation}, {fresh[0].object}): not used")
    if not taken and not sure:
        raise KgrecError(f"{cfg.review}: found no accepted row, expected at least one; write accept into the column "
                         "decision, or give --auto-accept")
    return notes + [f"{len(sure):,} more are accepted by --auto-accept {cfg.auto_accept:g}"] * bool(sure) \
        + _write(cfg, graph, taken + sure, out)


def _write(cfg: TuplesConfig, graph: Graph, taken: Sequence[tuple[Candidate, _Row]], out: Path) -> list[str]:
    entity_ids, relation_ids = set(graph.entity_ids), set(graph.relation_ids)
    entities: dict[str, tuple[str, str]] = {}  # key of a new one -> (id, name)
    relations: dict[str, tuple[str, str]] = {}
    facts = []
    for candidate, row in taken:
        head = _resolve(row.subject_entity, row.subject, entity_ids, entities, row.where, "subject_entity")
        tail = _resolve(row.object_entity, row.object, entity_ids, entities, row.where, "object_entity")
        relation = _resolve(row.relation_id, row.relation, relation_ids, relations, row.where, "relation_id")
        more = f" (and {candidate.support - 1:,} more)" if candidate.support > 1 else ""
        source = candidate.source if candidate.source.startswith(cfg.tuples.name) else \
            f"{cfg.tuples.name}: {candidate.source}"
        facts.append(Fact(head, relation, tail, source + more, candidate.confidence))
    done = extend_folder(cfg.graph, out, facts, dict(entities.values()), dict(relations.values()))
    notes = [f"{out}: {done.added:,} triples added, {len(entities):,} new entities, {len(relations):,} new relations"]
    if done.known or done.repeated:
        notes.append(f"{done.known:,} of the accepted were in the graph already, {done.repeated:,} say what another "
                     "accepted one says")
    return notes


def _resolve(cell: str, form: str, known: set[str], new: dict[str, tuple[str, str]], where: Callable[[], str],
             column: str) -> str:
    """The id that a cell names; `new` makes one of the form, the same for forms of one key."""
    if cell in known and cell != _NEW:
        return cell
    if _OR.strip() in cell:
        raise KgrecError(f"{where()}: found the choice {cell!r} in the column {column} of an accepted row, expected "
                         f"one of the ids, or {_NEW}")
    if cell not in (_NEW, ""):
        raise KgrecError(f"{where()}: found {cell!r} in the column {column}, expected an id of the graph, or {_NEW}")
    key = relation_key(form) if column == "relation_id" else entity_key(form)
    if not key:
        raise KgrecError(f"{where()}: found the form {form!r} for a new {column}, expected a name; correct or reject "
                         "the row")
    if key not in new:
        stem = re.sub(r"\W+", "_", form).strip("_") or form
        base = stem.lower() if column == "relation_id" else f"entity/{stem}"
        taken = known | {identifier for identifier, _ in new.values()}
        numbered = (f"{base}_{n}" for n in range(2, len(taken) + 3))
        new[key] = (base if base not in taken else next(i for i in numbered if i not in taken), form)
    return new[key][0]
