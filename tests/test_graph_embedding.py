"""Tables and bridge: losses against NumPy, padding and sampling, gradients that reach V and U from both sides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kgrec_jax.data.link_batches import LinkSource, merge_queries
from kgrec_jax.models.graph_embedding import GraphEmbedding, init_bridge, link_queries, soft_tokens
from kgrec_jax.models.scorers import SCORERS

N, R, D = 21, 3, 8


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    triples = np.stack([rng.integers(0, N, 60), rng.integers(0, R, 60), rng.integers(0, N, 60)], 1)
    return LinkSource(merge_queries(triples, R, 3), batch=16, steps=9, seed=1, num_entities=N)[0]


def _tables(model, spread=0.7):
    tables = model.init(jax.random.key(0))
    noise = np.random.default_rng(1).normal(size=(model.entity_rows, D)).astype(np.float32) * spread
    relation = np.random.default_rng(2).normal(size=(2 * R, D)).astype(np.float32) * spread
    return {"entity": {"embedding": tables["entity"]["embedding"] + noise},
            "relation": {"embedding": jnp.asarray(relation)}}


@pytest.mark.parametrize("name", SCORERS)
def test_losses_equal_a_softmax_over_the_scores_of_every_entity(name, batch):
    model = GraphEmbedding(name, D, N, R, 64)
    tables = _tables(model)
    scores = np.asarray(model.scores(tables, batch.head, batch.relation), np.float64)[:, :N]
    lse = np.log(np.exp(scores).sum(1))
    expected = (batch.weight * (lse[:, None] - np.take_along_axis(scores, batch.tails, 1))).sum(1)
    np.testing.assert_allclose(model.structure_losses(tables, batch), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SCORERS)
def test_sampled_rivals_estimate_the_full_loss(name, batch):
    model = GraphEmbedding(name, D, N, R, 64)
    tables = _tables(model)
    many = np.random.default_rng(0).integers(0, N, 60_000).astype(np.int32)
    one_answer = np.zeros_like(batch.weight)
    one_answer[:, 0] = 1
    query = model.scorer.query(*model.rows(tables, batch.head, batch.relation))
    tails, weight = batch.tails[:, :1], one_answer[:, :1]
    full = model.query_losses(tables, query, tails, weight, np.zeros(0, np.int32))
    sampled = model.query_losses(tables, query, tails, weight, many)
    np.testing.assert_allclose(sampled, full, atol=0.05)


def test_padding_changes_neither_start_nor_loss_nor_gradient(batch):
    small, large = (GraphEmbedding("complex", D, N, R, rows) for rows in (N, 64))
    a, b = small.init(jax.random.key(0)), large.init(jax.random.key(0))
    np.testing.assert_array_equal(a["entity"]["embedding"], b["entity"]["embedding"][:N])
    grad = jax.grad(lambda tables, model: model.structure_losses(tables, batch).sum())
    ga, gb = grad(a, small), grad(b, large)
    np.testing.assert_allclose(ga["entity"]["embedding"], gb["entity"]["embedding"][:N], atol=1e-6)
    assert not np.asarray(gb["entity"]["embedding"][N:]).any()


def test_n3_counts_each_answer_with_its_head_and_relation(batch):
    model = GraphEmbedding("complex", D, N, R, N)
    tables = _tables(model)
    norm = lambda x: (np.abs(x[: D // 2] + 1j * x[D // 2 :]) ** 3).sum()  # noqa: E731
    v, u = np.asarray(tables["entity"]["embedding"]), np.asarray(tables["relation"]["embedding"])
    expected = [sum(w * (norm(v[h]) + norm(u[r]) + norm(v[t])) for t, w in zip(ts, ws, strict=True))
                for h, r, ts, ws in zip(batch.head, batch.relation, batch.tails, batch.weight, strict=True)]
    np.testing.assert_allclose(model.nuclear_3_norms(tables, batch), expected, rtol=1e-4)


def test_soft_tokens_depend_on_direction_and_carry_gradients_to_both_tables(batch):
    model = GraphEmbedding("complex", D, N, R, N)
    tables, bridge = _tables(model), init_bridge(D, 12, 0.05, jax.random.key(3))

    def through(tables):
        soft = soft_tokens(bridge, *model.rows(tables, batch.head, batch.relation))
        assert soft.shape == (16, 1, 12)
        return link_queries(bridge, soft[:, 0]).sum()

    grads = jax.grad(through)(tables)
    touched = np.unique(batch.head)
    assert np.abs(grads["entity"]["embedding"][touched]).sum(1).all()
    assert np.abs(grads["relation"]["embedding"][np.unique(batch.relation)]).sum(1).all()
    h, r = model.rows(tables, batch.head, batch.relation)
    np.testing.assert_allclose(soft_tokens(bridge, 3 * h, 3 * r), soft_tokens(bridge, h, r), rtol=1e-4, atol=1e-6)
