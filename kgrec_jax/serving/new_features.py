"""What content says of new items, in the features that a run made of its own: texts, links, media, towers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp

from kgrec_jax.data.dataset import Dataset
from kgrec_jax.data.graph import Neighbours, edges
from kgrec_jax.data.media_read import decoded
from kgrec_jax.data.text import TfidfSvd
from kgrec_jax.errors import KgrecError
from kgrec_jax.models.recommender import TowerPart
from kgrec_jax.models.towers import FREE, ItemFeatures, Towers
from kgrec_jax.serving.intake import Intake
from kgrec_jax.serving.new_graph import Joined
from kgrec_jax.serving.query import QueryIndex
from kgrec_jax.serving.resize import with_rows
from kgrec_jax.stages import item_features

Say = Callable[[str], None]
_AT_ONCE = 256  # files that are in memory together
_FITTED = 3_000  # items on which the map from neighbours to rows is fitted


def read_vectors(index: QueryIndex | None, intake: Intake, rows: list[str], say: Say) -> np.ndarray | None:
    """[n, d] vectors of the texts by what read the run's items, 0 where there is no text; None without it."""
    if "text" not in intake.means:
        return None
    width, reader = len(intake.means["text"]), None if index is None else index.reader
    if reader is None:
        say("the encoder of the items was not kept in this recommender: text vectors of the new ones are missing, "
            "their words alone speak for them")
        return np.zeros((len(rows), width), np.float32)
    if isinstance(reader, TfidfSvd):
        return reader.encode(rows)
    return reader.encode_all(rows)


def media_vectors(intake: Intake, new: Dataset, say: Say) -> dict[str, np.ndarray]:
    """name -> [n, d] vectors, 0 where there is none, of the media that the run knows.

    Raw files become vectors by the run's own towers; KgrecError for a file that cannot be read, for sounds where the
    run knows images, and for vectors of another width.
    """
    given = {**new.media, **_embedded(intake, new, say)}
    out = {}
    for name, mean in intake.means.items():
        if name == "text":
            continue
        vectors, present = given.get(name, (np.zeros((new.num_items, len(mean)), np.float32),
                                                np.zeros(new.num_items, bool)))
        if vectors.shape[1] != len(mean):
            raise KgrecError(f"media/{name}.npy: found vectors of width {vectors.shape[1]}, expected {len(mean)}, as "
                             "in the run's data set; make them in the same way")
        out[name] = np.where(present[:, None], vectors, 0.0).astype(np.float32)
    strange = sorted({*new.media, *new.raw_media} - set(out))
    if strange:
        say(f"media: {', '.join(strange)} not used: the run knows no vectors of that name")
    return out


def _embedded(intake: Intake, new: Dataset, say: Say) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """name -> ([n, d] vectors, [n] bool present) of the raw files that the run has towers for."""
    out = {}
    for name, files in new.raw_media.items():
        tower = intake.towers.get(name)
        if tower is None:
            if name in intake.means:
                say(f"media: the files of media/{name} are not used: the run knows vectors of that name and no tower "
                    f"that makes them; give media/{name}.npy")
            continue
        if files.kind != tower.form.kind:
            raise KgrecError(f"media/{name}: found {files.kind}s, expected {tower.form.kind}s as in the run's data set; "
                             "give them a folder of another name")
        vectors = np.zeros((new.num_items, tower.cfg.out), np.float32)
        for first in range(0, len(files.rows), _AT_ONCE):
            rows = files.rows[first:first + _AT_ONCE]
            arrays = np.stack(list(decoded([files.paths[row] for row in rows], tower.form)))
            vectors[rows] = tower.mixed(tower.embed(arrays))
        out[name] = vectors, np.isin(np.arange(new.num_items), files.rows)
    return out


def entity_rows(intake: Intake, joined: Joined, first: int, count: int, links: Neighbours) -> np.ndarray | None:
    """[n, De] rows of the new items in the entity table, None without a table.

    The trained row where the graph knew the item as an entity; else what a ridge regression from the rows of neighbours
    to the unit rows of items, over the run's own items, makes of the neighbours that have a trained row; 0 without any.
    """
    if intake.entity is None:
        return None
    table, relations, before = np.asarray(intake.entity), np.asarray(intake.relation), joined.order[first:first + count]
    out = np.zeros((count, table.shape[1]), np.float32)
    out[before >= 0] = table[before[before >= 0]]
    around = joined.order[links.entity]
    item, has = np.repeat(np.arange(count), np.diff(links.indptr)), around >= 0
    lacking = np.zeros(count, bool)
    lacking[item[has]] = True
    lacking &= before < 0
    if not lacking.any():
        return out
    sample = np.sort(np.random.default_rng(0).permutation(first)[:_FITTED])
    rows, graph = np.full(joined.graph.num_entities, -1, np.int64), joined.graph
    rows[sample] = np.arange(len(sample))
    own = (rows[graph.triples[:, [0, 2]]] >= 0).any(1)
    head, relation, tail = edges(dataclasses.replace(graph, triples=graph.triples[own], part=graph.part[own]))
    # What has no trained row itself, the new items, is left out on both sides.
    fit = (rows[head] >= 0) & (joined.order[tail] >= 0)
    inputs = _from_neighbours(table, relations, rows[head[fit]], relation[fit], joined.order[tail[fit]], len(sample))
    linked = inputs[:, -1] > 0
    inputs, wanted = inputs[linked], item_features.unit_rows(table[sample])[linked]
    system = inputs.T @ inputs + np.eye(inputs.shape[1], dtype=np.float32)
    map_ = np.linalg.solve(system, inputs.T @ wanted)
    guessed = _from_neighbours(table, relations, item[has], links.relation[has], around[has], count) @ map_
    return np.where(lacking[:, None], guessed, out).astype(np.float32)


def _from_neighbours(table: np.ndarray, relations: np.ndarray, item: np.ndarray, relation: np.ndarray,
                     entity: np.ndarray, count: int) -> np.ndarray:
    """[n, F] means over each item's edges of the neighbour's unit row V, of V ⊙ U and of V with its halves swapped ⊙ U
    (which products of complex numbers are made of), and 1; a row of zeros without an edge."""
    vectors = item_features.unit_rows(table[entity])  # [E, De]
    blocks = [vectors]
    if relations.shape[1] == table.shape[1]:
        turn = item_features.unit_rows(relations[relation]) * np.float32(np.sqrt(table.shape[1]))
        blocks += [vectors * turn, np.roll(vectors, table.shape[1] // 2, axis=1) * turn]
    edge_values = np.concatenate([*blocks, np.ones((len(item), 1), np.float32)], axis=1)
    size = np.maximum(np.bincount(item, minlength=count), 1)[item]
    share = sp.csr_matrix(((1.0 / size).astype(np.float32), (item, np.arange(len(item)))), (count, len(item)))
    return np.asarray(share @ edge_values, np.float32)


def block_features(intake: Intake, joined: Joined, links: Neighbours, rows: list[str],
              dense: Mapping[str, np.ndarray]) -> dict[str, sp.csr_matrix | np.ndarray]:
    """Block -> [n, F] features of the new items as those of the run were made."""
    column = np.full(joined.graph.num_entities, -1, np.int64)
    column[joined.place[intake.link_entities]] = np.arange(len(intake.link_entities))
    item = np.repeat(np.arange(len(rows)), np.diff(links.indptr))
    pairs = np.unique(np.stack([item, column[links.entity]], 1)[column[links.entity] >= 0], axis=0)
    shape = len(rows), len(intake.link_entities)
    out: dict[str, Any] = {
        "graph": sp.csr_matrix((intake.link_idf[pairs[:, 1]], (pairs[:, 0], pairs[:, 1])), shape, dtype=np.float32)}
    for name, vectors in dense.items():
        out[name] = item_features.centred(vectors, intake.means[name])
    if intake.words is not None:
        out["words"] = intake.words.encode(rows, unit=False)
    return out


def with_tower_vectors(tower: TowerPart, dense: Mapping[str, np.ndarray], entity: np.ndarray | None, intake: Intake,
                       joined: Joined, links: Neighbours) -> TowerPart:
    """The towers with the vectors of the new items, which come last: all parts but the free row."""
    count = len(links.indptr) - 1
    first = len(tower.known) - count
    head, relation, tail = np.repeat(np.arange(count), np.diff(links.indptr)), links.relation, links.entity
    if entity is None or "graph" not in tower.item_parts:
        head, relation, tail = head[:0], relation[:0], tail[:0]
    # A table of the new items and of what they are linked to alone.
    around, place = np.unique(tail, return_inverse=True)
    rows, relations = np.zeros((count, 1), np.float32), np.zeros((1, 1), np.float32)
    if len(head):
        far = np.asarray(intake.entity)[np.maximum(joined.order[around], 0)]
        near = entity[np.clip(around - first, 0, count - 1)]
        is_new = (around >= first) & (around < first + count)
        rows, relations = np.concatenate([entity, np.where(is_new[:, None], near, far)]), np.asarray(intake.relation)
    present = {name: jnp.asarray(np.abs(vectors).sum(1) > 0) for name, vectors in dense.items()}
    present["graph"] = jnp.asarray(np.isin(np.arange(count), head))
    present[FREE] = jnp.zeros(count, bool)
    vectors = {name: jnp.asarray(rows) for name, rows in dense.items() if name in tower.item_parts}
    ints = [jnp.asarray(x, jnp.int32) for x in (head, relation, count + place.reshape(-1))]
    features = ItemFeatures(vectors, present, jnp.asarray(rows, jnp.float32), jnp.asarray(relations), *ints)
    free = tower.params["items"]["item_embeddings"]
    items = {**tower.params["items"], "item_embeddings": np.zeros((count, free.shape[1]), np.float32)}
    found = Towers(tower.cfg, count).apply({"params": {**tower.params, "items": items}}, features,
                                           method=Towers.item_parts)
    parts = {name: with_rows(held, first, np.asarray(found[name]) if name in found else 0.0)
             for name, held in tower.item_parts.items()}
    known = np.any([np.asarray(there) for name, there in present.items() if name in found], axis=0)
    total = with_rows(tower.item_vectors, first, sum(part[first:] for part in parts.values()))
    others = tuple(with_tower_vectors(other, dense, entity, intake, joined, links) for other in tower.others)
    return dataclasses.replace(tower, item_parts=parts, known=with_rows(tower.known, first, known), item_vectors=total,
                               others=others)
