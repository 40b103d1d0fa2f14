"""RDF dumps larger than memory into a dataset folder: everything, or the neighbourhood of the items.

Triples are written as they are parsed. What must be brought together (the mentions of an entity, its names, its
literals) goes to partitions on disk by a hash of the entity, and each partition is then finished by itself. Memory is
that of a batch and of one partition, however large the dump is; beside them stand the relations, the owl:sameAs pairs,
blank nodes that Turtle or RDF/XML leave without a label, and, with items, their neighbourhood.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kgrec_jax.data import graph_endpoint
from kgrec_jax.data.graph_numbers import Numbers, bucket_literals
from kgrec_jax.data.graph_spill import (
    Finished, Keep, Spilled, finish, labels, mentioned, neighbours, redirect, rewrite, spill)
from kgrec_jax.data.graph_workers import Workers
from kgrec_jax.data.names import relation_name
from kgrec_jax.data.rdf_terms import Piece, bare, format_of, pieces
from kgrec_jax.data.rdf_words import SAME_AS, merge_same
from kgrec_jax.data.tables import find_table, read_table, write_tsv
from kgrec_jax.errors import KgrecError
from kgrec_jax.tracking import Tracker

_PARTITION = 48 << 20  # bytes of the dump to one partition on disk


@dataclasses.dataclass(frozen=True)
class BuildConfig:
    """What is made of which RDF."""

    rdf: tuple[Path, ...] = ()  # files; none with an endpoint
    items: Path | None = None  # IRIs, one a line, or a dataset folder; None: everything is converted
    hops: int = 2  # triples that touch an entity fewer than so many steps from an item are kept
    relations: tuple[str, ...] = ()  # IRIs of the relations to keep; none: all
    languages: tuple[str, ...] = ("en",)  # of names and texts, best first
    store: str = "memory"  # "oxigraph" keeps an on-disk store of the dump beside, for SPARQL
    endpoint: str = ""  # a SPARQL endpoint to ask instead of files
    numbers: int = 0  # buckets that the numbers and dates of a relation are put into, as entities; 0: text alone
    processes: int = 1  # beyond one, pieces of N-Triples and several files are parsed at once


def build_graph(cfg: BuildConfig, out: Path, tracker: Tracker) -> list[str]:
    """Write the dataset folder `out` (triples.tsv, entities.tsv, relations.tsv); returns lines that say what was done.

    The source of a triple is the name of its file, or the endpoint's address.
    `out` must not exist or be empty; it appears complete or not at all. Needs room on disk for about twice the dump.
    Raises KgrecError for malformed RDF, items that are no IRIs or nowhere in the dump, two items that owl:sameAs makes
    one, and an endpoint that fails.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise KgrecError(f"{out}: found a file or a folder that is not empty, expected a new one; choose another --out")
    if bool(cfg.rdf) == bool(cfg.endpoint):
        raise KgrecError(f"--rdf: found {'files and' if cfg.rdf else 'neither files nor'} an endpoint, expected one of "
                         "--rdf FILE… and --endpoint URL")
    if cfg.endpoint and not cfg.items:
        raise KgrecError("--items: found none with an endpoint, expected the items whose neighbourhood is asked for")
    if cfg.numbers < 0 or cfg.numbers == 1:
        raise KgrecError(f"--numbers: found {cfg.numbers}, expected at least 2 buckets, or 0 for none")
    if cfg.hops < 1:
        raise KgrecError(f"--hops: found {cfg.hops}, expected at least 1")
    notes: list[str] = []
    items = read_items(cfg.items, notes) if cfg.items else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        folder = Path(scratch) / "folder"
        folder.mkdir()
        files = cfg.rdf
        if cfg.endpoint:
            files = (Path(scratch) / "endpoint.nt",)
            notes += graph_endpoint.fetch(cfg.endpoint, list(items), files[0], cfg.hops, cfg.relations, cfg.languages,
                                          tracker)
        parts = pieces(files, 4 * cfg.processes)
        with Workers(parts, cfg.processes, tracker) as workers:
            notes += _build(cfg, items, parts, Path(scratch), folder, workers)
        if cfg.store == "oxigraph":
            notes.append(_store(files, folder / "store", tracker))
        if out.exists():
            out.rmdir()
        folder.rename(out)
    return notes


def read_items(path: Path, notes: list[str]) -> dict[str, str]:
    """{"<IRI>": item} from a file with an IRI a line, or from the column entity_id (else item_id) of a dataset folder.

    `notes` gets a line on what is no IRI. Raises KgrecError where there is none.
    """
    if path.is_dir():
        found = find_table(path, "items")
        if not found:
            raise KgrecError(f"{path}: found no items.tsv, expected a dataset folder with items, or a file of IRIs")
        table = read_table(found, {"item_id": "id"}, {"entity_id": "text"})
        ids = table["item_id"].strings()
        pairs = list(zip(table["entity_id"] if "entity_id" in table else ids, ids, strict=True))
    elif path.is_file():
        lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        pairs = [(line.strip().strip("<>"), line.strip()) for line in lines if line.strip()]
    else:
        raise KgrecError(f"{path}: found no such file or folder, expected IRIs, one a line, or a dataset folder")
    items = {f"<{entity}>": item for entity, item in pairs if _is_iri(entity)}
    if not items:
        raise KgrecError(f"{path}: found no IRI, expected one a line, or the column entity_id of a dataset folder")
    others = [item for entity, item in pairs if not _is_iri(entity)]
    if others:
        notes.append(f"{path}: {len(others):,} of {len(pairs):,} items have no IRI (first: {others[0]}): not looked "
                     "for")
    return items


def _is_iri(word: str) -> bool:
    return ":" in word and not set(word) & set(' <>"\t')


def _build(cfg: BuildConfig, items: Mapping[str, str], parts: Sequence[Piece], scratch: Path, folder: Path,
           workers: Workers) -> list[str]:
    wanted = frozenset(f"<{r.strip('<>')}>" for r in cfg.relations)
    count = _partitions(parts)
    notes: list[str] = []
    near = _reach(items, cfg.hops, wanted, workers, notes) if items and not cfg.endpoint else None
    while True:
        total = Spilled.join(workers.map("triples", spill, scratch, count,
                                         Keep(near, wanted, near is None, source=cfg.endpoint)))
        others = frozenset(e for pair in total.same for e in pair) - near if near is not None else frozenset()
        if not others:
            break
        near |= others  # owl:sameAs is no step: what other names say is as near
        for path in itertools.chain.from_iterable(scratch.glob(f"{name}.*") for name in ("part", "entity", "triples")):
            path.unlink()
    if not total.triples:
        raise KgrecError(f"{parts[0].path}: found no triple {'that touches an item' if items else 'between entities'}"
                         f"{' by the relations given' if wanted else ''}, expected some; check "
                         f"{'the IRIs of --items' if items else 'the file'}")
    if near is not None:  # names of the outermost entities are wanted too: only now are they known
        about = frozenset().union(*(mentioned(scratch, k) for k in range(count))) | near | total.relations | total.predicates
        second = workers.map("names", spill, scratch, count, Keep(frozenset(), wanted, True, about), len(parts))
        total = dataclasses.replace(total, predicates=total.predicates | Spilled.join(second).predicates)
    same = merge_same(total.same, items)
    if same:
        redirect(scratch, count, same)
        notes.append(f"owl:sameAs merges {len(same):,} entities into others")
    names = _relation_names(cfg, total, scratch, count, notes)
    finished = workers.each(finish, range(count), scratch, cfg.languages, names, frozenset(items), cfg.numbers > 0)
    numbers = Numbers(0, frozenset(), 0, [])
    if cfg.numbers:
        source = cfg.endpoint or ", ".join(path.name for path in cfg.rdf)
        numbers = bucket_literals(scratch, count, cfg.numbers, source, scratch / f"triples.{len(parts)}",
                                  scratch / f"entities.{count}")
    relations = sorted(total.relations | numbers.relations)
    write_tsv(folder / "relations.tsv", {"relation": [bare(r) for r in relations],
                                         "name": [names[r] for r in relations]})
    _concatenate(folder / "entities.tsv", "entity_id\tname\tdescription\n",
                 [scratch / f"entities.{k}" for k in range(count + 1)])
    _concatenate(folder / "triples.tsv", "head_id\trelation\ttail_id\tsource\n",
                 [scratch / f"triples.{k}" for k in range(len(parts) + 1)],
                 (lambda path: rewrite(path, same)) if same else None)
    return _summary(items, wanted, total, numbers, finished, len(relations), notes)


def _summary(items: Mapping[str, str], wanted: frozenset[str], total: Spilled, numbers: Numbers,
             finished: Sequence[Finished], relations: int, notes: list[str]) -> list[str]:
    """Counts of what was written first, of what was left out last; nothing goes without one."""
    entities, unnamed = sum(f.entities for f in finished) + numbers.entities, sum(f.unnamed for f in finished)
    notes = [f"{total.triples + numbers.triples:,} triples, {entities:,} entities, {relations:,} relations; "
             f"{unnamed:,} entities have no name", *notes, *numbers.notes]
    if total.quoted:
        notes.append(f"{total.quoted:,} statements about statements: not used")
    several = sum(f.several_types for f in finished)
    if several:
        notes.append(f"{several:,} entities have more than one type; each type is a triple")
    unused = sorted(wanted - total.relations - numbers.relations - {SAME_AS})
    if unused:
        notes.append(f"{len(unused):,} of {len(wanted):,} relations of --relations are in no triple kept (first: "
                     f"{bare(unused[0])})")
    absent = len(items) - sum(f.items for f in finished)
    if items and absent:
        notes.append(f"{absent:,} of {len(items):,} items are in no triple")
    counts = sum((f.counts for f in finished), Counter())
    return notes + [f"{n:,} {kind}: not used" for kind, n in sorted(counts.items())]


def _partitions(parts: Sequence[Piece]) -> int:
    sizes = {p.path: p.path.stat().st_size * (8 if p.path.suffix in (".gz", ".bz2") else 1) for p in parts}
    return min(max(sum(sizes.values()) // _PARTITION, 8), 1024)


def _reach(items: Mapping[str, str], hops: int, wanted: frozenset[str], workers: Workers,
           notes: list[str]) -> frozenset[str]:
    """The entities fewer than `hops` steps from an item; a pass over the dump for each step.

    owl:sameAs is no step: where a pass finds other names of what is reached, the pass is made again with them.
    """
    reached, steps = frozenset(items), 1
    while steps < hops:
        found = workers.map(f"step {steps}", neighbours, reached, wanted)
        others = frozenset().union(*(alias for _, alias in found)) - reached
        if others:
            reached |= others
            continue
        reached |= frozenset().union(*(near for near, _ in found))
        notes.append(f"step {steps}: {len(reached):,} entities reached")
        steps += 1
    return reached


def _relation_names(cfg: BuildConfig, total: Spilled, scratch: Path, count: int, notes: list[str]) -> dict[str, str]:
    """A name for each relation and each predicate of literals."""
    given = labels(scratch, count, total.relations | total.predicates, cfg.languages)
    without = sorted(total.relations - set(given))
    if without:
        notes.append(f"{len(without):,} of {len(total.relations):,} relations have no label (first: "
                     f"{bare(without[0])}); each is called by the end of its IRI")
    return {r: given.get(r) or relation_name(bare(r)) for r in total.relations | total.predicates | {SAME_AS}}


def _concatenate(path: Path, header: str, files: Sequence[Path], change: Callable[[Path], None] | None = None) -> None:
    """One file of many, each removed when it was taken over."""
    with open(path, "wb") as target:
        target.write(header.encode())
        for part in files:
            if not part.is_file():
                continue
            if change:
                change(part)
            with open(part, "rb") as source:
                shutil.copyfileobj(source, target, 1 << 22)
            os.remove(part)


def _store(files: Sequence[Path], path: Path, tracker: Tracker) -> str:
    """An on-disk Oxigraph store of the files, for SPARQL."""
    import pyoxigraph

    from kgrec_jax.data.rdf_terms import unpacked

    store = pyoxigraph.Store(str(path))
    megabytes = [file.stat().st_size >> 20 for file in files]
    with tracker.progress("store (MB)", sum(megabytes)) as bar:
        for file, size in zip(files, megabytes, strict=True):
            with open(file, "rb") as raw, unpacked(file, raw) as stream:
                store.bulk_load(stream, format=getattr(pyoxigraph.RdfFormat, format_of(file)))
            bar.advance(size)
    store.flush()
    count = len(store)
    del store  # RocksDB lets go of the folder before it moves
    return f"store: {count:,} statements in {path.name}/ for SPARQL (pyoxigraph.Store)"
