"""Held-out pairs that leave no trace in train, merged queries against a dictionary, batches in words."""

import numpy as np
import pytest

from kgrec_jax.data.link_batches import (LinkBatch, LinkSource, TextLinkSource, TripleWords, encode_queries,
                                         hide_entities, hold_out, merge_queries)

N, R = 40, 3


@pytest.fixture
def triples():
    rng = np.random.default_rng(0)
    rows = np.stack([rng.integers(0, N, 300), rng.integers(0, R, 300), rng.integers(0, N, 300)], 1)
    return np.unique(rows, axis=0).astype(np.int32)


def test_a_held_out_pair_leaves_no_triple_in_train_and_no_entity_loses_all_pairs(triples):
    part = hold_out(triples, 0.1, 0.1, seed=3)
    pair = [tuple(sorted((h, t))) for h, _, t in triples.tolist()]
    by_part = [{p for p, q in zip(pair, part, strict=True) if q == k} for k in range(3)]
    assert not (by_part[0] & by_part[1]) and not (by_part[0] & by_part[2]) and not (by_part[1] & by_part[2])
    assert set(triples[:, [0, 2]].ravel()) == set(triples[part == 0][:, [0, 2]].ravel())
    for k in (1, 2):
        assert 0.08 * len(triples) <= (part == k).sum() <= 0.12 * len(triples)
    np.testing.assert_array_equal(part, hold_out(triples, 0.1, 0.1, seed=3))
    assert (part != hold_out(triples, 0.1, 0.1, seed=4)).any()


def test_hold_out_keeps_the_limit_and_takes_nothing_from_leaves(triples):
    assert (hold_out(triples, 0.2, 0.2, seed=0, limit=5) == 2).sum() in (5, 6)
    chain = np.array([[0, 0, 1], [0, 0, 2], [0, 0, 3]], np.int32)  # every pair is some entity's only one
    assert not hold_out(chain, 0.4, 0.4, seed=0).any()
    assert hold_out(np.zeros((0, 3), np.int32), 0.1, 0.1, seed=0).shape == (0,)


@pytest.mark.parametrize("width", [1, 4, 100])
def test_merged_queries_hold_every_answer_once(triples, width):
    rows = merge_queries(np.concatenate([triples, triples[:20]]), R, width)
    expected = {(h, r, t) for h, r, t in triples.tolist()} | {(t, r + R, h) for h, r, t in triples.tolist()}
    got = [(h, r, t) for h, r, tails, w in zip(rows.head, rows.relation, rows.tails, rows.weight, strict=True)
           for t, real in zip(tails, w, strict=True) if real]
    assert len(got) == len(expected) and set(got) == expected
    assert (rows.weight.sum(1) >= 1).all() and rows.tails.shape[1] == width


def test_an_epoch_shows_every_row_once_and_batches_depend_on_seed_and_step_alone(triples):
    rows = merge_queries(triples, R, 4)
    source = LinkSource(rows, batch=64, steps=100, seed=5, num_entities=N, candidates=7)
    steps = -(-len(rows) // 64)
    for epoch in (0, 1):
        parts = [source.index(epoch * steps + s) for s in range(steps)]
        seen = np.concatenate([index[~padding] for index, padding in parts])
        assert sorted(seen) == list(range(len(rows)))
    last = source[steps - 1]
    assert last.head.shape == (64,) and last.weight.sum() < 64 * 4
    assert last.candidates.shape == (7,) and last.candidates.max() < N
    again = LinkSource(rows, batch=64, steps=100, seed=5, num_entities=N, candidates=7)[steps - 1]
    np.testing.assert_array_equal(last.tails, again.tails)
    np.testing.assert_array_equal(last.candidates, again.candidates)
    assert (source[0].head != source[steps].head).any()


def test_rivals_of_each_row_are_drawn_over_all_entities_and_by_seed_and_step_alone(triples):
    rows = merge_queries(triples, R, 1)
    make = lambda seed: LinkSource(rows, batch=64, steps=100, seed=seed, num_entities=N, candidates=5,  # noqa: E731
                                   shared=False)
    source = make(5)
    drawn = np.stack([source[step].candidates for step in range(20)])  # [20, B, 5]
    assert drawn.shape == (20, 64, 5) and drawn.dtype == np.int32
    counts = np.bincount(drawn.ravel(), minlength=N)
    assert len(counts) == N and abs(counts / counts.sum() - 1 / N).max() < 0.2 / N
    assert (drawn[0] != drawn[1]).any() and (drawn[0, 0] != drawn[0, 1]).any()
    np.testing.assert_array_equal(make(5)[7].candidates, drawn[7])
    assert (make(6)[7].candidates != drawn[7]).any()


WORDS = TripleWords([[11, 12], [], [13, 14, 15, 16, 17, 18, 19]], [[30], [31, 32]], cls=1, sep=2, mask=3, pad=0,
                    vocab_size=50)


def _batch(head, relation):
    n = len(head)
    return LinkBatch(np.array(head), np.array(relation), np.zeros((n, 1), np.int32), np.ones((n, 1), np.float32),
                     np.zeros(0, np.int32))


def test_sentences_of_both_directions():
    assert WORDS.sentence(0, 0, 16) == ([1, 0, 11, 12, 2, 30, 3, 2], 1, 6, [2, 3, 5])
    assert WORDS.sentence(0, 3, 16) == ([1, 3, 31, 32, 2, 0, 11, 12, 2], 5, 1, [6, 7, 2, 3])
    unnamed = WORDS.sentence(1, 1, 16)
    assert unnamed[0] == [1, 0, 2, 31, 32, 3, 2]  # its vector alone, never its id
    for relation in (0, 1, 2, 3):
        ids, soft, hidden, places = WORDS.sentence(2, relation, 9)
        assert len(ids) == 9 and ids[soft] == 0 and ids[hidden] == 3
        assert all(ids[p] >= 11 for p in places)


def test_encoded_queries_without_masking_point_at_their_slots():
    text = encode_queries(_batch([0, 2, 1], [0, 2, 3]), WORDS, 12)
    rows = np.arange(3)
    assert (text.input_ids[rows, text.hidden_position[:, 0]] == 3).all()
    assert text.attention_mask.sum(1).tolist() == [8, 12, 7]
    assert not text.word_weight.any()


def test_masked_words_are_words_and_withheld_vectors_are_not_read():
    rows = merge_queries(np.array([[0, 0, 2], [2, 1, 0], [1, 1, 0]]), 2, 2)
    links = LinkSource(rows, batch=8, steps=50, seed=0, num_entities=3)
    source = TextLinkSource(links, WORDS, length=16, withhold=0.5, mask_share=0.3)
    withheld = total = masked = 0
    for step in range(50):
        batch, padding = source[step], links.index(step)[1]
        named = np.array([len(WORDS.entity[h]) > 0 for h in batch.links.head])
        off = batch.soft_position[:, 0] < 0
        assert not (off & ~named).any()
        withheld, total = withheld + off.sum(), total + named.sum()
        for row in range(8):
            sentence, soft, hidden, places = WORDS.sentence(batch.links.head[row], batch.links.relation[row], 16)
            assert batch.attention_mask[row].sum() == len(sentence) - off[row]
            slots = batch.word_positions[row], batch.word_targets[row], batch.word_weight[row]
            for p, target, w in zip(*slots, strict=True):
                if w:
                    assert p in places and target == sentence[p] and not padding[row]
                    masked += batch.input_ids[row, p] == WORDS.mask
    assert 0.35 < withheld / total < 0.65 and masked > 50
    np.testing.assert_array_equal(source[7].input_ids, source[7].input_ids)


def test_fitting_length_is_the_shortest_that_holds_the_sentences():
    rows = merge_queries(np.array([[0, 0, 1]]), 2, 1)
    assert WORDS.fitting_length(rows, 64) == 8
    rows = merge_queries(np.array([[2, 1, 0]]), 2, 1)
    assert WORDS.fitting_length(rows, 64) == 16 and WORDS.fitting_length(rows, 10) == 10


def test_hidden_entities_are_in_no_training_triple():
    rng = np.random.default_rng(0)
    triples = np.stack([rng.integers(50, size=400), rng.integers(3, size=400), rng.integers(50, size=400)], 1)
    part = hide_entities(triples, 50, 0.2, seed=4)
    ends = [set(triples[part == k][:, [0, 2]].ravel().tolist()) for k in range(3)]
    hidden = (ends[1] | ends[2]) - ends[0]
    assert len(hidden) == 10
    for (h, _, t), p in zip(triples.tolist(), part.tolist(), strict=True):
        assert (p > 0) == bool({h, t} & hidden)
    np.testing.assert_array_equal(part, hide_entities(triples, 50, 0.2, seed=4))
    assert (part != hide_entities(triples, 50, 0.2, seed=5)).any()
    assert not hide_entities(triples, 50, 0.0, seed=4).any()
