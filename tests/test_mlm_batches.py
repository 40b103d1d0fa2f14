"""Masked batches: a function of the step, every text in turn, what was hidden can be put back."""

import numpy as np
import pytest

from kgrec_jax.data import loader
from kgrec_jax.data.mlm_batches import SOURCES, BucketedTexts, MaskedTexts, PackedTexts
from kgrec_jax.data.text import load_tokenizer, train_wordpiece

ENGLISH = ["the cat sat on the mat", "the dog sat on the log", "a cat and a dog", "café on the mat"]


@pytest.fixture(scope="module")
def english(tmp_path_factory):
    return load_tokenizer(train_wordpiece(ENGLISH * 5, tmp_path_factory.mktemp("t") / "en", 80))


def test_masked_batches(english):
    ids = tuple(tuple(row) for row in english.encode(ENGLISH * 3, 99, special=False))
    source = MaskedTexts(ids, english, 6, batch=4, length=8, mask_share=0.3, seed=(0, 1))
    seen = []
    for step in range(3):
        seen += source._texts(step).tolist()
        batch, again = source[step], source[step]
        for name in ("input_ids", "attention_mask", "positions", "targets", "weights"):
            np.testing.assert_array_equal(getattr(batch, name), getattr(again, name))
        for row, text in enumerate(source._texts(step)):
            used = batch.weights[row] > 0
            tokens = batch.input_ids[row].copy()
            tokens[batch.positions[row][used]] = batch.targets[row][used]  # what was hidden goes back
            window = tokens[1 : batch.attention_mask[row].sum() - 1].tolist()
            assert tokens[0] == english.cls_id and len(set(batch.positions[row][used])) == used.sum() > 0
            assert any(window == list(ids[text][s : s + len(window)]) for s in range(len(ids[text])))
            assert len(window) == min(len(ids[text]), 6)
    assert sorted(seen) == list(range(12)), "each text once before any is seen again"
    assert source._texts(3).tolist() != source._texts(0).tolist()


def test_shares_of_mask_random_and_kept(english):
    ids = tuple(tuple(range(10, 30)) for _ in range(64))
    batches = [MaskedTexts(ids, english, 9, 64, 22, 0.5, (3,))[step] for step in range(8)]
    shown = np.concatenate([np.take_along_axis(b.input_ids, b.positions, 1).ravel() for b in batches])
    targets = np.concatenate([b.targets.ravel() for b in batches])
    masked = (shown == english.mask_id).mean()
    kept = (shown == targets).mean()
    assert abs(masked - 0.8) < 0.03 and abs(kept - 0.1) < 0.03


def test_held_out_batches_cover_every_text_once(english):
    ids = tuple((10 + i, 11 + i, 12 + i) for i in range(10))
    source = MaskedTexts(ids, english, 3, 4, 8, 0.15, (0, 0), cover=True)
    assert [source._texts(step).tolist() for step in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert source[2].weights.sum() == 2 and not source[2].attention_mask[2:].any()


def numbered(n, length=6):
    """Texts whose tokens say which text they are of."""
    return tuple(tuple(10 + i for _ in range(1 + (i * 7) % length)) for i in range(n))


def same(a, b):
    for name in ("input_ids", "attention_mask", "positions", "targets", "weights"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def restored(batch, row):
    """The tokens of a row with what was hidden put back."""
    used, tokens = batch.weights[row] > 0, batch.input_ids[row].copy()
    tokens[batch.positions[row][used]] = batch.targets[row][used]
    return tokens[: batch.attention_mask[row].sum()]


@pytest.mark.parametrize("cover", [False, True])
def test_packed_rows_lose_nothing(english, cover):
    ids = numbered(23)
    source = PackedTexts(ids, english, 40, batch=3, length=9, mask_share=0.2, seed=(0, 1), cover=cover)
    for epoch in range(1 if cover else 2):
        order = source._epoch(epoch)[0]
        stream = np.concatenate([source.row(epoch, at)[1:] for at in range(source.rows)])
        want = np.concatenate([[*ids[i], english.sep_id] for i in order])
        np.testing.assert_array_equal(stream, want)
        assert all(len(source.row(epoch, at)) == 9 for at in range(source.rows - 1))
    rows = [(step, row) for step in range(source.per_epoch) for row in range(3)][: source.rows]
    for at, (step, row) in enumerate(rows):
        np.testing.assert_array_equal(restored(source[step], row), source.row(0, at))
        batch = source[step]
        assert not np.isin(batch.targets[row][batch.weights[row] > 0], (english.cls_id, english.sep_id)).any()
    if cover:
        assert not source[source.per_epoch - 1].weights[len(rows) % 3 or 3:].any()
    else:
        assert source._epoch(0)[0].tolist() != source._epoch(1)[0].tolist()


def test_texts_of_like_length_stand_together(english):
    ids = numbered(101, length=60)
    source = BucketedTexts(ids, english, 99, batch=2, length=64, mask_share=0.2, seed=(0, 1))
    assert source.bounds == [16, 32, 64]
    for epoch in range(2):
        seen = []
        for step in range(epoch * source.per_epoch, (epoch + 1) * source.per_epoch):
            batch = source[step]
            assert batch.input_ids.shape in ((8, 16), (4, 32), (2, 64)) and batch.input_ids.size == 128
            assert batch.positions.shape[1] == max(1, round(0.2 * (batch.input_ids.shape[1] - 2)))
            for row in np.flatnonzero(batch.attention_mask[:, 0]):
                tokens = restored(batch, row)[1:-1]
                seen.append(int(tokens[0]) - 10)
                assert tuple(tokens) == ids[seen[-1]]
        assert sorted(seen) == list(range(101)), "every text once an epoch"
    cover = BucketedTexts(ids, english, 9, 2, 64, 0.2, (0, 0), cover=True)
    assert sum(int(cover[s].attention_mask[:, 0].sum()) for s in range(cover.per_epoch)) == 101


@pytest.mark.parametrize("kind", sorted(SOURCES))
@pytest.mark.parametrize("masking", ["token", "word", "next"])
def test_a_batch_is_a_function_of_its_step(english, kind, masking):
    """What a killed run sees after it goes on: another source, asked for later steps in another order."""
    whole, resumed = (SOURCES[kind](numbered(37), english, 60, 4, 16, 0.3, (5, 2), False, masking) for _ in range(2))
    batches = [whole[step] for step in range(60)]
    for step in (59, 31, 30, 32, 0):
        same(resumed[step], batches[step])
    with_loader = list(loader.iterate(resumed, 33))
    assert len(with_loader) == 27
    for step, batch in enumerate(with_loader, 33):
        same(batch, batches[step])
    other = SOURCES[kind](numbered(37), english, 60, 4, 16, 0.3, (6, 2), False, masking)
    assert any((other[s].input_ids.shape != batches[s].input_ids.shape)
               or (other[s].input_ids != batches[s].input_ids).any() for s in range(4))


def test_whole_words_are_hidden_together(english):
    words = [(20,), (21, ~22), (23, ~24, ~25), (26,), (27, ~28)] * 3
    text = tuple(t for word in words for t in word)  # 27 tokens
    source = MaskedTexts((text,), english, 200, 1, 29, 0.2, (0, 1), masking="word")
    starts = np.flatnonzero(np.array(text) >= 0)
    shown = []
    for step in range(200):
        batch = source[step]
        used = batch.positions[0][batch.weights[0] > 0] - 1
        hidden = np.zeros(len(text), bool)
        hidden[used] = True
        for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
            assert len(set(hidden[start:end])) == 1, "a word in part"
        assert 3 <= len(used) <= 5 and batch.positions.shape == (1, 5)  # 0.2 of 27 tokens
        shown.append(hidden)
    shares = np.mean(shown, axis=0)
    assert shares.min() > 0.08 and abs(shares.mean() - 0.2) < 0.04
    long = MaskedTexts(((20, ~21, ~22, ~23, ~24, ~25),), english, 1, 1, 8, 0.3, (0, 1), masking="word")[0]
    assert long.weights.sum() == 2 and long.positions[0].tolist() == [1, 2], "a part of a word longer than the share"


def test_the_next_token_is_asked_for(english):
    batch = MaskedTexts(((20, ~21, 22), (23,)), english, 1, 2, 8, 0.15, (0, 1), cover=True, masking="next")[0]
    assert batch.input_ids[0].tolist()[:5] == [english.cls_id, 20, 21, 22, english.sep_id]
    assert batch.targets[0].tolist() == [20, 21, 22, english.sep_id, 0, 0, 0]
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 0, 0, 0] and batch.weights.sum(1).tolist() == [4, 2]
