"""Queries in words through a small BERT: what they depend on, their losses against brute force, who gets gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kgrec_jax.data.link_batches import (LinkBatch, LinkSource, TextLinkSource, TripleWords, encode_queries,
                                         merge_queries)
from kgrec_jax.models import bert
from kgrec_jax.models.graph_embedding import GraphEmbedding
from kgrec_jax.models.triple_encoder import TRIPLE_ENCODER_RULES, TripleEncoder
from kgrec_jax.sharding import MeshConfig, make_mesh, shardings

N, R, D, ROWS = 21, 3, 8, 64
CONFIG = bert.BertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                         intermediate_size=32, max_position_embeddings=24)
# Every third entity has no name.
WORDS = TripleWords([[] if e % 3 == 0 else [5 + e, 6 + e] for e in range(N)], [[30], [31, 32], [33]], cls=1, sep=2,
                    mask=3, pad=0, vocab_size=60)


@pytest.fixture(scope="module")
def encoder():
    """A random encoder with a head."""
    weights = bert.init_encoder(CONFIG, jax.random.key(0))
    return {**jax.tree.map(lambda x: x * 3.0, weights), "cls": bert.init_head(CONFIG, jax.random.key(1))}


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    triples = np.stack([rng.integers(0, N, 60), rng.integers(0, R, 60), rng.integers(0, N, 60)], 1)
    links = LinkSource(merge_queries(triples, R, 3), batch=16, steps=9, seed=1, num_entities=N)
    return TextLinkSource(links, WORDS, length=12, withhold=0.3, mask_share=0.3)[0]


def make(scorer="complex", mode="lora", seed=4):
    graph = GraphEmbedding(scorer, D, N, R, ROWS)
    tables = jax.tree.map(lambda x: 3.0 * x, graph.init(jax.random.key(seed)))
    return TripleEncoder(graph, CONFIG, mode, 0.05, lora_rank=4), tables


def test_adapters_change_nothing_at_first_and_modes_train_what_they_say(encoder):
    for mode, trained in (("frozen", None), ("lora", "adapters"), ("full", "all")):
        model, tables = make(mode=mode)
        params = model.init(tables, encoder, jax.random.key(0))
        assert ("encoder" in params) == (trained is not None)
        jax.tree.map(np.testing.assert_array_equal, model.merged_encoder(params, encoder), encoder)
        if trained == "adapters":
            leaves = jax.tree_util.tree_leaves_with_path(params["encoder"])
            assert {path[-1].key for path, _ in leaves} == {"a", "b"}


def test_withheld_vectors_are_not_read_and_others_are(encoder, batch):
    model, tables = make()
    params = model.init(tables, encoder, jax.random.key(0))
    other = {**params, "tables": make(seed=5)[1]}
    jitted = jax.jit(lambda p: model.queries(p, model.hidden(p, encoder, batch), batch))
    queries = lambda p: np.asarray(jitted(p))  # noqa: E731
    moved = np.abs(queries(params) - queries(other)).max(1)
    withheld = batch.soft_position[:, 0] < 0
    assert withheld.any() and not moved[withheld].any() and (moved[~withheld] > 1e-6).all()


def test_padding_does_not_matter(encoder):
    model, tables = make()
    params = model.init(tables, encoder, jax.random.key(0))
    links = LinkBatch(np.array([1, 3, 4]), np.array([0, 4, 2]), np.zeros((3, 1), np.int32), np.ones((3, 1), np.float32),
                      np.zeros(0, np.int32))
    short, long = (jax.jit(model.scores)(params, encoder, encode_queries(links, WORDS, length)) for length in (10, 20))
    np.testing.assert_allclose(short, long, atol=1e-5)


@pytest.mark.parametrize("scorer", ["complex", "transe"])
def test_link_losses_are_a_softmax_over_the_scores_of_every_entity(encoder, batch, scorer):
    model, tables = make(scorer)
    params = model.init(tables, encoder, jax.random.key(0))
    scores = np.asarray(jax.jit(model.scores)(params, encoder, batch), np.float64)[:, :N]
    hidden = jax.jit(model.hidden)(params, encoder, batch)
    if scorer == "transe":  # −|q/2 − t|² up to what is the same for every entity
        query = np.asarray(model.queries(params, hidden, batch), np.float64)
        rows = np.asarray(tables["entity"]["embedding"], np.float64)[:N]
        np.testing.assert_allclose(scores - (query**2).sum(1, keepdims=True) / 4,
                                   -((query[:, None] / 2 - rows[None]) ** 2).sum(-1), atol=1e-4)
    log_sum = np.log(np.exp(scores).sum(1))
    answers = zip(batch.links.tails, batch.links.weight, strict=True)
    expected = [sum(w * (log_sum[b] - scores[b, t]) for t, w in zip(tails, weight, strict=True))
                for b, (tails, weight) in enumerate(answers)]
    np.testing.assert_allclose(model.link_losses(params, hidden, batch), expected, rtol=1e-4, atol=1e-4)


def test_word_loss_counts_masked_words_alone(encoder, batch):
    model, tables = make()
    params = model.init(tables, encoder, jax.random.key(0))
    hidden = jax.jit(model.hidden)(params, encoder, batch)
    total, count = model.word_loss(encoder, hidden, batch)
    log_p = np.asarray(jax.nn.log_softmax(bert.mlm_logits(CONFIG, encoder, hidden)), np.float64)  # [B, L, vocab]
    expected = [-w * log_p[b, p, t] for b in range(len(log_p)) for p, t, w in
                zip(batch.word_positions[b], batch.word_targets[b], batch.word_weight[b], strict=True)]
    assert count == batch.word_weight.sum() > 0
    np.testing.assert_allclose(total, sum(expected), rtol=1e-4)


@pytest.mark.parametrize("mode", ["frozen", "lora", "full"])
def test_the_text_loss_teaches_tables_bridge_and_encoder(encoder, batch, mode):
    model, tables = make(mode=mode)
    params = model.init(tables, encoder, jax.random.key(0))

    def loss(params):
        weights = model.merged_encoder(params, encoder)
        return model.link_losses(params, model.hidden(params, weights, batch), batch).sum()

    grads = jax.jit(jax.grad(loss))(params)
    size = lambda tree: max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))  # noqa: E731
    read = batch.soft_position[:, 0] >= 0
    relation = np.asarray(grads["tables"]["relation"]["embedding"])
    assert np.abs(relation[np.unique(batch.links.relation[read])]).max(1).all()  # through the soft token alone
    for part in (grads["tables"]["entity"], grads["bridge"]["soft"], grads["bridge"]["link"]):
        assert size(part) > 0
    assert not np.asarray(grads["tables"]["entity"]["embedding"][N:]).any()
    if mode != "frozen":
        assert size(grads["encoder"]) > 0


def test_rules_shard_the_table_and_the_encoder(encoder):
    model, tables = make(mode="full")
    abstract = jax.eval_shape(lambda: model.init(tables, encoder, jax.random.key(0)))
    placed = shardings(abstract, make_mesh(MeshConfig(data=4, model=2)), TRIPLE_ENCODER_RULES)
    assert placed["tables"]["entity"]["embedding"].spec == jax.P(("data", "model"), None)
    assert placed["encoder"]["encoder"]["layer"]["0"]["intermediate"]["dense"]["kernel"].spec == jax.P(None, "model")
    assert placed["bridge"]["link"]["dense"]["kernel"].is_fully_replicated
