"""Items that join a recommender without training, and leave it again.

Nobody has touched them, so they are cold: content speaks for them. Of each part of the score they get what the run
would have given a cold item with this content; the parts of behaviour, and propagation over the graph, know nothing of
them and the gate does without. See `intake` for what is kept of the run, and so differs from a run with these items.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp

from kgrec_jax.data.dataset import Dataset
from kgrec_jax.data.text import TfidfWords, words
from kgrec_jax.errors import KgrecError
from kgrec_jax.linear import ridge
from kgrec_jax.linear.parts import Constant, Factors, RidgeWeights
from kgrec_jax.models.recommender import FusedModel, Histories
from kgrec_jax.serving.intake import Added, Block, Intake
from kgrec_jax.serving.new_features import (
    block_features,
    entity_rows,
    media_vectors,
    read_vectors,
    with_tower_vectors,
)
from kgrec_jax.serving.new_graph import Joined, join, reordered
from kgrec_jax.serving.query import QueryIndex
from kgrec_jax.serving.recommender import Recommender
from kgrec_jax.serving.resize import along, check_resizable, resized_model, with_rows
from kgrec_jax.stages import item_features

Say = Callable[[str], None]
_SHOWN = 3  # ids that a line names


def add_items(held: Recommender, new: Dataset, source: str, say: Say) -> Recommender:
    """The recommender with the items of `new`; says in lines what of them is known and what was left out.

    Raises KgrecError for a recommender of an older version, an item or entity that is there already, vectors of another
    width, and where the encoder that read the items cannot be had.
    """
    intake, before = _intake_of(held), set(held.item_ids)
    there = [item for item in new.item_ids if item in before]
    if there:
        others = f" ({len(there):,} such items)" if len(there) > 1 else ""
        raise KgrecError(f"{source}: found the item {there[0]!r}{others}, which the recommender has already, expected "
                         "new items alone; remove its row, or take it out first (kgrec items remove)")
    count, first = new.num_items, len(held.item_ids)
    joined = join(held.graph, new.graph, intake.turned)
    links = joined.of_items(first)
    rows = item_features.item_texts(new)
    dense = {"text": read_vectors(held.query_index, intake, rows, say), **media_vectors(intake, new, say)}
    dense = {name: vectors for name, vectors in dense.items() if name in intake.means}
    entity = entity_rows(intake, joined, first, count, links)
    features = block_features(intake, joined, links, rows, dense)
    keep = np.arange(first)
    resized = resized_model(held.model, keep, count)
    kernel = intake.kernel(features) if intake.blocks else None
    own = sum((np.asarray(abs(features[name]).sum(axis=1)).ravel() for name in intake.blocks), np.zeros(count))
    parts = _parts(resized, held.model, features, kernel, own > 0)
    tower = None if resized.tower is None else with_tower_vectors(resized.tower, dense, entity, intake, joined, links)
    model = dataclasses.replace(resized, parts=parts, tower=tower)
    known = {name: column[first:] for name, column in zip(model.names, model.known())}
    own_links, entity_known = np.diff(links.indptr).tolist(), (joined.order[first:first + count] >= 0).tolist()
    added = tuple(Added(new.item_ids[n], new.item_names[n], own_links[n],
                        tuple(name for name, has in known.items() if has[n]), source, entity_known[n])
                  for n in range(count))
    _tell(joined, new, added, rows, dense, say)
    index = held.query_index
    return dataclasses.replace(
        _with_items(held, joined, model, keep, count, entity), item_ids=(*held.item_ids, *new.item_ids),
        item_names=(*held.item_names, *new.item_names), added=(*held.added, *added),
        query_index=index and _indexed(index, new, rows, dense.get("text")))


def remove_items(held: Recommender, ids: Sequence[str]) -> Recommender:
    """The recommender without items that were added; KgrecError for any other."""
    added = {a.item_id: a for a in held.added}
    for item in ids:
        if item not in added:
            found = "an item of the run itself" if item in held.item_ids else "no such item"
            raise KgrecError(f"ID: found {item!r}, {found}, expected one that was added (added.tsv lists them)")
    return drop_items(held, np.array([held.item_ids.index(item) for item in dict.fromkeys(ids)], np.int64))


def drop_items(held: Recommender, rows: np.ndarray) -> Recommender:
    """The recommender without the items of some rows; KgrecError for one that somebody has touched."""
    _intake_of(held)
    if (np.asarray(held.model.popularity)[rows] > 0).any() or held.known[:, rows].nnz:
        raise KgrecError("items: found an item that users have touched, expected cold ones")
    first = len(held.item_ids)
    keep = np.setdiff1d(np.arange(first), rows)
    by_id = {a.item_id: a for a in held.added}
    staying = np.array([r for r in np.sort(rows) if (a := by_id.get(held.item_ids[r])) and a.entity_known], np.int64)
    order = np.concatenate([keep, staying, np.arange(first, held.graph.num_entities)])
    joined = reordered(held.graph, order, len(keep))
    ids = tuple(held.item_ids[r] for r in keep)
    index = held.query_index
    if index is not None:
        vectors = None if index.vectors is None else along(index.vectors, 0, keep, 0)
        index = dataclasses.replace(index, documents=along(index.documents, 0, keep, 0), vectors=vectors)
    gone = {held.item_ids[r] for r in rows}
    return dataclasses.replace(
        _with_items(held, joined, resized_model(held.model, keep, 0), keep, 0, None), item_ids=ids,
        item_names=tuple(held.item_names[r] for r in keep), query_index=index,
        added=tuple(a for a in held.added if a.item_id not in gone))


def _intake_of(held: Recommender) -> Intake:
    for part in held.model.parts.values():
        check_resizable(part)
    if held.intake is None:
        raise KgrecError("recommender: found none of what new items need, expected a recommender that this version of "
                         "kgrec wrote; write it again with kgrec evaluate RUN or kgrec refit RUN OUT")
    return held.intake


def _with_items(held: Recommender, joined: Joined, model: FusedModel, keep: np.ndarray, blank: int,
                entity: np.ndarray | None) -> Recommender:
    """`held` with another model and graph, and with everything else that has a row or a column for each item."""
    intake = held.intake
    links = joined.place[intake.link_entities]
    table = intake.entity
    if table is not None:
        table = np.zeros((len(joined.order), table.shape[1]), np.float32)
        old = joined.order >= 0
        table[old] = np.asarray(intake.entity)[joined.order[old]]
        if entity is not None:
            table[len(keep):len(keep) + blank] = entity
    blocks = {name: Block(along(b.features, 0, keep, blank), b.scale) for name, b in intake.blocks.items()}
    moved = np.full(len(held.item_ids), -1, np.int32)
    moved[keep] = np.arange(len(keep))
    sequence = np.where(held.histories.sequence >= 0, moved[held.histories.sequence], -1).astype(np.int32)
    categories = held.categories
    if categories is not None:
        categories = dataclasses.replace(categories, shares=along(categories.shares, 0, keep, blank))
    return dataclasses.replace(
        held, model=model, graph=joined.graph, known=along(held.known, 1, keep, blank), categories=categories,
        histories=Histories(along(held.histories.matrix, 1, keep, blank), sequence),
        intake=dataclasses.replace(intake, link_entities=links.astype(np.int32), entity=table, blocks=blocks))


def _parts(resized: FusedModel, before: FusedModel, features: Mapping[str, Any], kernel: np.ndarray | None,
           known: np.ndarray) -> dict[str, Any]:
    """The parts with what content says of the new items; `kernel` [n, I], known [n]: a chosen block has features."""
    parts, first = dict(resized.parts), before.num_items
    for name, rows in features.items():  # profiles: cosine with the history's unit vectors
        part = parts.get(name)
        if isinstance(part, Factors):
            unit = item_features.unit_rows(rows)
            if sp.issparse(unit):
                encode = sp.vstack([part.encode[:first], unit]).tocsr()
                decode = sp.csr_matrix(encode.T)
            else:
                encode = with_rows(part.encode, first, unit)
                decode = np.ascontiguousarray(encode.T)
            has = with_rows(part.known, first, np.asarray(abs(unit).sum(axis=1)).ravel() > 0)
            parts[name] = dataclasses.replace(part, encode=encode, decode=decode, known=has)
    part, old = parts.get("features"), before.parts.get("features")
    if kernel is None or not isinstance(old, RidgeWeights):
        return parts
    columns = ridge.later_columns(before.parts["collaborative"], old, kernel)  # [I, n]
    weights = part.weights
    weights[:first, first:] = columns
    parts["features"] = dataclasses.replace(part, weights=weights, known=with_rows(part.known, first, known))
    base, expected = before.parts.get("popularity"), before.parts.get("expected-popularity")
    if isinstance(base, Constant) and isinstance(expected, Constant):
        values = ridge.later_values(base.values, expected.values, old.inverse_diagonal, kernel)
        grown = parts["expected-popularity"]
        parts["expected-popularity"] = Constant(with_rows(grown.values, first, values),
                                                with_rows(grown.known, first, known))
    return parts


def _indexed(index: QueryIndex, new: Dataset, rows: list[str], vectors: np.ndarray | None) -> QueryIndex:
    """The index with the new items' documents; words that no item had get a column and an idf of their own."""
    named = [name if name != item else "" for name, item in zip(new.item_names, new.item_ids, strict=True)]
    documents = [f"{name}\n{text}" for name, text in zip(named, rows, strict=True)]
    counts = collections.Counter(word for document in documents for word in set(words(document)))
    fresh = sorted(word for word in counts if word not in index.words.vocabulary)
    width, total = len(index.words.idf), index.documents.shape[0] + len(documents)
    vocabulary = {**index.words.vocabulary, **{word: width + n for n, word in enumerate(fresh)}}
    idf = np.log((1 + total) / (1 + np.array([counts[w] for w in fresh], np.float64))) + 1
    held = TfidfWords(vocabulary, np.concatenate([index.words.idf, idf.astype(np.float32)]))
    wide = along(index.documents, 1, np.arange(width), len(fresh))
    if index.vectors is not None:
        present = np.zeros((len(rows), 1), bool) if vectors is None else np.abs(vectors).sum(1, keepdims=True) > 0
        moved = 0.0 if vectors is None else vectors - index.mean
        unit = item_features.unit_rows(np.where(present, moved, np.zeros((1, len(index.mean)), np.float32)))
        index = dataclasses.replace(index, vectors=np.concatenate([index.vectors, unit.astype(np.float32)]))
    return dataclasses.replace(index, words=held, documents=sp.vstack([wide, held.encode(documents)]).tocsr())


def _tell(joined: Joined, new: Dataset, added: Sequence[Added], rows: list[str], dense: Mapping[str, np.ndarray],
          say: Say) -> None:
    for note in new.notes:
        say(note)
    if joined.left_out:
        kinds = (("entities", joined.unknown_entities), ("relations", joined.unknown_relations))
        unknown = " and ".join(f"{len(ids):,} {kind} that the graph lacks ({_some(ids)})" for kind, ids in kinds if ids)
        say(f"graph: {joined.left_out:,} triples left out: they name {unknown}")
    if joined.about_others:
        say(f"graph: {joined.about_others:,} triples left out: no new item is in them")
    told = [f"text {sum(bool(r.strip()) for r in rows):,}", f"links {sum(a.links > 0 for a in added):,}"]
    told += [f"{name} {int((np.abs(v).sum(1) > 0).sum()):,}" for name, v in dense.items() if name != "text"]
    say(f"{len(added):,} items added, of these with {', '.join(told)}")
    nothing = [a.item_id for a in added if not a.parts]
    if nothing:
        say(f"note: nothing is known of {len(nothing):,} of them ({_some(nothing)}), so they come last in every list")


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:_SHOWN]) + (", …" if len(ids) > _SHOWN else "")
