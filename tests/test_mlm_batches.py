"""Masked batches: a function of the step, every text in turn, what was hidden can be put back."""

import numpy as np
import pytest

from kgrec_jax.data.mlm_batches import MaskedTexts
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
