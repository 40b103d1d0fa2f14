"""Two catalogues of one toy world, one of them with few interactions, and what towers over both are trained with."""

from __future__ import annotations

import dataclasses
import types

import jax
import numpy as np

from kgrec_jax.data.domains import union
from kgrec_jax.data.text import tfidf_svd
from kgrec_jax.data.toy import toy_world
from kgrec_jax.models.tower_config import TowerConfig
from kgrec_jax.optim import OptimConfig
from kgrec_jax.sharding import make_mesh
from kgrec_jax.stages.domains_towers import Content
from kgrec_jax.stages.fuse_towers import TowerTraining
from kgrec_jax.stages.graph import training_graph
from kgrec_jax.tracking import Tracker

SHAPE = TowerConfig(width=16, max_history=12)
USERS, ITEMS = 500, 160


def part_of(world, name, items, users, most, prefix):
    """A domain: some items and users of a world, of each user at most so many interactions. Item ids are its own."""
    log = world.interactions
    keep = np.isin(log.item, items) & np.isin(log.user, users)
    order = np.flatnonzero(keep)
    nth = np.array([int((log.user[order[:n]] == log.user[row]).sum()) for n, row in enumerate(order)])
    rows = log.take(order[nth < most])
    place = np.full(world.num_items, -1, np.int32)
    place[items] = np.arange(len(items))
    graph = world.graph
    rest = np.arange(world.num_items, graph.num_entities)
    entity = np.full(graph.num_entities, -1, np.int32)
    entity[np.concatenate([items, rest])] = np.arange(len(items) + len(rest))
    triples = graph.triples[entity[graph.triples[:, 0]] >= 0]
    triples = np.stack([entity[triples[:, 0]], triples[:, 1], entity[triples[:, 2]]], 1).astype(np.int32)

    def of(values):
        return tuple(values[i] for i in np.concatenate([items, rest]))

    own = dataclasses.replace(
        graph, entity_ids=of(graph.entity_ids), entity_names=of(graph.entity_names),
        entity_texts=of(graph.entity_texts), triples=triples, num_items=len(items),
        part=np.zeros(len(triples), np.int8))
    log = dataclasses.replace(rows, user=np.searchsorted(users, rows.user).astype(np.int32), item=place[rows.item])
    return dataclasses.replace(
        world, name=name, user_ids=tuple(f"{prefix}{u}" for u in users), interactions=log, graph=own,
        item_ids=tuple(f"{prefix}{world.item_ids[i]}" for i in items), part=np.zeros(len(log), np.int8),
        item_names=tuple(world.item_names[i] for i in items), item_texts=tuple(world.item_texts[i] for i in items))


def two_domains():
    """(rich, poor, fresh): two catalogues of one world, and in the poor one 40 users of at most four films each, beside
    200 users like them whom nobody learns from."""
    world = toy_world(num_users=USERS, num_items=ITEMS)
    films = np.random.default_rng(3).permutation(ITEMS)
    rich = part_of(world, "rich", np.sort(films[:90]), np.arange(260), 99, "r")
    poor, fresh = (part_of(world, "poor", np.sort(films[90:]), users, 4, "p")
                   for users in (np.arange(260, 300), np.arange(300, 500)))
    return rich, poor, fresh


def some_run(folder, **fields):
    mesh = make_mesh(devices=jax.devices()[:1])
    return types.SimpleNamespace(tracker=Tracker(folder, quiet=True), mesh=mesh, **fields)


def content_of(datasets, width=24):
    """Texts by n-grams and a table of random vectors: what an entity is, and nothing of what anybody likes."""
    joined = union(datasets)
    rng = np.random.default_rng(5)
    vector = {i: rng.normal(size=width) for data in datasets.values() for i in data.graph.entity_ids}
    entity = np.stack([vector[i] for i in joined.graph.entity_ids]).astype(np.float32)
    relation = rng.normal(size=(2 * training_graph(joined.graph)[0].num_relations, width)).astype(np.float32)
    return Content(joined, tfidf_svd(list(joined.item_texts), 24, 0), entity, relation)


def training(steps, batch=32, **fields):
    return TowerTraining(steps, batch, OptimConfig(peak_lr=5e-3, weight_decay=1e-4), 0.2, 50,
                         fields.get("checkpoint_every", 0))
