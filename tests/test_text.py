"""Tokenizers, their coverage of a language, and vectors without a language model."""

import collections
import collections
import json
import shutil

import numpy as np
import pytest

from kgrec_jax import KgrecError
from kgrec_jax.data import text as T

KOREAN = ["한국어 영화 추천", "영화 감독 봉준호", "추천 영화 기생충", "한국 감독 영화"]
ENGLISH = ["the cat sat on the mat", "the dog sat on the log", "a cat and a dog", "café on the mat"]


@pytest.fixture(scope="module")
def korean(tmp_path_factory):
    return T.load_tokenizer(T.train_wordpiece(KOREAN * 5, tmp_path_factory.mktemp("t") / "ko", 80))


@pytest.fixture(scope="module")
def english(tmp_path_factory):
    return T.load_tokenizer(T.train_wordpiece(ENGLISH * 5, tmp_path_factory.mktemp("t") / "en", 80))


def test_a_vocabulary_learned_from_a_language_covers_it(korean, english):
    covered = T.coverage(korean, KOREAN)
    assert covered.unk_share == 0 and covered.tokens_per_word < 2 and covered.reason == ""
    assert "[UNK]" in T.coverage(english, KOREAN).reason
    assert "a word into 4.0 tokens" in T.Coverage(0.0, 4.0).reason
    assert T.coverage(english, ["", " "]) == T.Coverage(0.0, 0.0)


def test_a_chinese_vocabulary_is_learned_character_by_character(english, tmp_path):
    texts = ["北京的天安门广场", "上海的外滩夜景", "北京故宫 Palace"]
    chinese = T.load_tokenizer(T.train_wordpiece(texts, tmp_path / "zh", 60))
    assert T.coverage(chinese, texts).unk_share == 0 and T.coverage(english, texts).unk_share > T.MAX_UNK_SHARE
    assert chinese.backend.convert_ids_to_tokens(chinese.encode(["北京外滩"], 9, special=False)[0]) == list("北京外滩")
    assert chinese.encode(["北鸟"], 9, special=False)[0][1] == chinese.unk_id


def test_accents_and_syllables_survive(korean, english):
    assert english.backend.convert_ids_to_tokens(english.encode(["CAFÉ"], 9, special=False)[0])[0].startswith("c")
    assert "é" in "".join(english.backend.convert_ids_to_tokens(english.encode(["café"], 9)[0]))
    decomposed = "영화"  # NFD of the same word
    assert korean.encode([decomposed], 9) == korean.encode(["영화"], 9)


def test_the_same_texts_give_the_same_files(tmp_path):
    files = [sorted((T.train_wordpiece(ENGLISH, tmp_path / name, 60)).iterdir()) for name in ("a", "b")]
    assert [f.name for f in files[0]] == [f.name for f in files[1]]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))
    with pytest.raises(KgrecError, match="nothing is overwritten"):
        T.train_wordpiece(ENGLISH, tmp_path / "a", 60)


def test_encoding_cuts_and_pads(english):
    whole, short, empty = english.encode([ENGLISH[0], "cat", ""], 5)
    assert len(whole) == 5 and whole[0] == english.cls_id and whole[-1] == english.sep_id
    assert empty == [english.cls_id, english.sep_id]
    assert english.encode([ENGLISH[0]], 99, special=False)[0][:3] == whole[1:4]
    ids, mask = english.pad([whole, short, []], 4)
    assert ids.shape == mask.shape == (3, 4) and ids.dtype == mask.dtype == np.int32
    assert mask.sum(1).tolist() == [4, min(len(short), 4), 0] and (ids[mask == 0] == english.pad_id).all()
    assert english.encode([], 5) == []


def test_a_folder_with_vocab_txt_alone(english, tmp_path):
    words = sorted(english.backend.get_vocab(), key=english.backend.get_vocab().get)
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    old = T.load_tokenizer(tmp_path)
    assert old.vocab_size == english.vocab_size
    assert old.encode(["The cat sat"], 9) == english.encode(["The cat sat"], 9)


def test_a_tokenizer_that_does_not_fit(english, tmp_path):
    with pytest.raises(KgrecError, match=f"a tokenizer of {english.vocab_size} tokens, expected at most the 40 rows"):
        T.load_tokenizer(english.folder, vocab_size=40)
    with pytest.raises(KgrecError, match="neither tokenizer.json nor vocab.txt"):
        T.load_tokenizer(tmp_path)
    damaged = shutil.copytree(english.folder, tmp_path / "damaged")
    (damaged / "tokenizer.json").write_text("{]")
    with pytest.raises(KgrecError, match="no readable tokenizer") as caught:
        T.load_tokenizer(damaged)
    assert "\n" not in str(caught.value)
    bare = shutil.copytree(english.folder, tmp_path / "bare")
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    (bare / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "mask_token"}))
    with pytest.raises(KgrecError, match="without the special tokens mask"):
        T.load_tokenizer(bare)


def test_no_text_to_learn_from(tmp_path):
    with pytest.raises(KgrecError, match="found no text"):
        T.train_wordpiece(["", "  "], tmp_path / "x")
    with pytest.raises(KgrecError, match="vocab_size: found 5"):
        T.train_wordpiece(["a"], tmp_path / "x", 5)


def test_words_in_two_scripts():
    assert T.words("Toy Story 2, ＴＯＹ!") == ["toy", "story", "2", "toy"]
    assert T.words("北京大学 ok") == ["北", "京", "大", "学", "北京", "京大", "大学", "ok"]
    assert T.words("영화 추천") == ["영화", "추천"]
    assert T.char_ngrams("ab", 2, 3) == [" a", "ab", "b ", " ab", "ab "]


def test_word_tfidf_against_the_formula():
    texts = ["red red fox", "red dog", "blue dog", "", "unique"]
    rows = T.tfidf_words(texts).toarray()
    idf = np.log(6 / 3) + 1  # both known words stand in two of five texts
    red, dog = (1 + np.log(2)) * idf, idf
    assert rows.shape == (5, 2) and rows.dtype == np.float32
    np.testing.assert_allclose(rows, [[0, 1], [1, 1] / np.sqrt(2), [1, 0], [0, 0], [0, 0]], atol=1e-6)
    plain = T.tfidf_words(texts, unit=False)
    assert plain.dtype == np.float32
    np.testing.assert_allclose(plain.toarray(), [[0, red], [dog, idf], [dog, 0], [0, 0], [0, 0]], rtol=1e-6)
    assert T.tfidf_words([]).shape == (0, 0) and T.tfidf_words(["", ""]).shape == (2, 0)


def test_the_fallback_equals_an_exact_svd():
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(["alpha", "beta", "gamma", "delta", "epsilon", "zeta"], 5)) for _ in range(40)]
    fitted = T.fit_tfidf_svd(texts, 4, seed=1)
    found = fitted.encode(texts)
    full = T.fit_tfidf_svd(texts, 40, seed=1)
    basis = full.components  # of full rank: the rows of the TF-IDF matrix up to a rotation
    counts = [collections.Counter(T.char_ngrams(text)) for text in texts]
    matrix = T._tfidf_rows(counts, fitted.vocabulary, fitted.idf).toarray()
    np.testing.assert_allclose(matrix @ basis @ basis.T, matrix, atol=1e-4)
    left, values, _ = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    rows = left[:, :4] * values[:4]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(found @ found.T, rows @ rows.T, atol=1e-3)
    np.testing.assert_array_equal(found, T.tfidf_svd(texts, 4, seed=1))


def test_the_fallback_reads_any_script_and_survives_its_file(tmp_path):
    texts = ["北京的天安门广场", "北京的故宫博物院", "上海的外滩夜景", "", "上海外滩的建筑"]
    fitted = T.fit_tfidf_svd(texts, 8, seed=0)
    vectors = fitted.encode(texts)
    assert vectors.shape == (5, 8) and not vectors[3].any()
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] and vectors[2] @ vectors[4] > vectors[2] @ vectors[1]
    assert not fitted.encode(["latin only"]).any()
    fitted.save(tmp_path / "svd.npz")
    np.testing.assert_array_equal(T.TfidfSvd.load(tmp_path / "svd.npz").encode(texts), vectors)
    assert T.tfidf_svd(["", ""], 3, 0).shape == (2, 3)
    assert T.present_texts(texts).tolist() == [True, True, True, False, True]
