"""Texts to token ids, and the two ways to vectors that need no language model. Plain NumPy and SciPy."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import re
import shutil
import unicodedata
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from kgrec_jax.errors import KgrecError

# Above either bound a tokenizer does not know the language, and the encoder's vectors mean little.
MAX_UNK_SHARE = 0.2
MAX_TOKENS_PER_WORD = 3.0

# Chinese characters are words of their own (BERT splits them too); any other script's words are runs of \w.
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_WORD = re.compile(f"[{_HAN}]|[^\\W{_HAN}]+")
_PIECE = re.compile(f"[{_HAN}]|[^\\W{_HAN}]+|[^\\w\\s]")
_RUN = re.compile(r"\w+")
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def present_texts(texts: Sequence[str]) -> np.ndarray:
    """[n] bool: which texts say anything at all; the others get a zero row and are masked."""
    return np.array([bool(text.strip()) for text in texts], bool)


# --- a language model's tokenizer ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A checkpoint's own tokenizer; truncates, never pads."""

    backend: Any  # transformers' fast tokenizer
    folder: Path
    vocab_size: int
    pad_id: int
    unk_id: int
    cls_id: int
    sep_id: int
    mask_id: int  # -1 where there is none: a decoder's tokenizer hides no words

    def encode(self, texts: Sequence[str], max_length: int, special: bool = True) -> list[list[int]]:
        """Token ids of each text, cut to `max_length` tokens; with [CLS] … [SEP], if any, unless `special` is False."""
        if not len(texts):
            return []
        out = self.backend(list(texts), add_special_tokens=special, truncation=True, max_length=max_length,
                           padding=False, return_attention_mask=False, return_token_type_ids=False)
        return out["input_ids"]

    def pad(self, ids: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids, attention_mask), both [n, length] int32, padded on the right; longer rows are cut."""
        input_ids = np.full((len(ids), length), self.pad_id, np.int32)
        mask = np.zeros((len(ids), length), np.int32)
        for row, tokens in enumerate(ids):
            kept = tokens[:length]
            input_ids[row, : len(kept)] = kept
            mask[row, : len(kept)] = 1
        return input_ids, mask

    def check_fits(self, vocab_size: int) -> None:
        """An error unless every token id is a row of a word table with `vocab_size` rows."""
        if self.vocab_size > vocab_size:
            raise KgrecError(f"{self.folder}: found a tokenizer of {self.vocab_size} tokens, expected at most the "
                             f"{vocab_size} rows of the encoder's word embeddings; take the tokenizer files from the "
                             "folder that the weights come from")


def load_tokenizer(folder: str | Path, vocab_size: int = 0) -> Tokenizer:
    """The tokenizer in `folder` (tokenizer.json, vocab.txt, or vocab.json with merges.txt).

    With `vocab_size` it is checked against the encoder. Where a decoder's tokenizer has nothing but an end of text
    (GPT-2), that stands for padding, beginning and end, and there is no mask.
    """
    # Transformers tells every user that PyTorch was not found unless it is asked beforehand to be quiet.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import AutoTokenizer, BertTokenizer

    folder = Path(folder)
    present = [name for name in ("tokenizer.json", "vocab.json", "vocab.txt") if (folder / name).is_file()]
    if not present:
        raise KgrecError(f"{folder}: found neither tokenizer.json nor vocab.txt, expected the tokenizer of the encoder")
    try:
        if present[0] != "vocab.txt":
            backend = AutoTokenizer.from_pretrained(str(folder), use_fast=True)
        else:
            # The keyword vocab_file is ignored in silence since transformers 5; the positional argument is not.
            backend = BertTokenizer(str(folder / "vocab.txt"), do_lower_case=_lower_case(folder))
    except Exception as error:  # tokenizers raises bare Exception on a damaged file
        raise KgrecError(f"{folder}: found no readable tokenizer ({str(error).splitlines()[0]}); "
                         "take the tokenizer files from the folder that the weights come from") from error
    ids = {name: getattr(backend, f"{name}_token_id") for name in ("pad", "unk", "cls", "sep", "mask")}
    if ids["mask"] is ids["cls"] is ids["sep"] is None and backend.eos_token_id is not None:
        end = backend.eos_token_id
        ids = {name: end if value is None else value for name, value in ids.items()} | {"mask": -1}
        ids["unk"] = -1 if ids["unk"] == end else ids["unk"]  # GPT-2 names its end of text so, and never uses it
    absent = [name for name, value in ids.items() if value is None]
    if absent:
        raise KgrecError(f"{folder}: found a tokenizer without the special tokens {', '.join(absent)}, "
                         "expected a BERT tokenizer with pad, unk, cls, sep and mask")
    size = max(backend.get_vocab().values()) + 1
    tokenizer = Tokenizer(backend, folder, size, *(int(ids[n]) for n in ("pad", "unk", "cls", "sep", "mask")))
    if vocab_size:
        tokenizer.check_fits(vocab_size)
    return tokenizer


def _lower_case(folder: Path) -> bool:
    path = folder / "tokenizer_config.json"
    return bool(json.loads(path.read_text(encoding="utf-8")).get("do_lower_case", True)) if path.is_file() else True


@dataclasses.dataclass(frozen=True)
class Coverage:
    """How well a tokenizer knows some texts."""

    unk_share: float  # of the tokens
    tokens_per_word: float  # a Chinese character and a punctuation mark count as words

    @property
    def reason(self) -> str:
        """Why the text part falls back, "" where the tokenizer fits the language."""
        if self.unk_share > MAX_UNK_SHARE:
            return f"the tokenizer reads {self.unk_share:.0%} of the tokens as [UNK] (more than {MAX_UNK_SHARE:.0%})"
        if self.tokens_per_word > MAX_TOKENS_PER_WORD:
            return (f"the tokenizer cuts a word into {self.tokens_per_word:.1f} tokens "
                    f"(more than {MAX_TOKENS_PER_WORD:.0f})")
        return ""


def coverage(tokenizer: Tokenizer, texts: Sequence[str], sample: int = 2000) -> Coverage:
    """Share of [UNK] and tokens a word over at most `sample` evenly spaced non-empty texts; zeros without any."""
    present = [text for text in texts if text.strip()]
    step = max(1, len(present) // sample)
    chosen = present[::step][:sample]
    words = sum(len(_PIECE.findall(text)) for text in chosen)
    ids = tokenizer.encode(chosen, max_length=1_000_000, special=False)
    tokens = sum(map(len, ids))
    unknown = sum(row.count(tokenizer.unk_id) for row in ids)
    return Coverage(unknown / max(tokens, 1), tokens / max(words, 1))


def train_wordpiece(texts: Iterable[str], folder: str | Path, vocab_size: int = 8000, lower_case: bool = True) -> Path:
    """Learns a WordPiece vocabulary (Schuster & Nakajima 2012) and writes tokenizer files into `folder`.

    Accents are kept, because in most of the world's scripts they are letters. The same texts give the same files.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [text for text in texts if text.strip()]
    if not texts:
        raise KgrecError("WordPiece: found no text, expected at least one text to learn a vocabulary from")
    if vocab_size <= len(SPECIAL_TOKENS):
        raise KgrecError(f"WordPiece: vocab_size: found {vocab_size}, expected more than {len(SPECIAL_TOKENS)}")
    bert = normalizers.BertNormalizer(clean_text=True, handle_chinese_chars=True, strip_accents=False,
                                      lowercase=lower_case)
    normalizer = normalizers.Sequence([normalizers.NFC(), bert])
    splitter = pre_tokenizers.BertPreTokenizer()
    # The trainer numbers the inner characters in the order of a hash table, and ties go by number: naming them
    # beforehand, as special tokens, makes it deterministic. A second tokenizer then gets the vocabulary without them.
    words_of = (word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    inner = sorted({"##" + char for word in set(words_of) for char in word[1:]})
    learner = Backend(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer, learner.pre_tokenizer = normalizer, splitter
    learner.train_from_iterator(texts, trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=[*SPECIAL_TOKENS, *inner], show_progress=False))
    vocabulary = dict(sorted(learner.get_vocab().items(), key=lambda pair: pair[1]))
    backend = Backend(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizer, splitter
    backend.decoder = decoders.WordPiece()
    cls, sep = (backend.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    backend.post_processor = processors.BertProcessing(("[SEP]", sep), ("[CLS]", cls))
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, **dict(zip(names, SPECIAL_TOKENS, strict=True)))
    folder = Path(folder)
    if folder.exists():
        raise KgrecError(f"{folder}: found an existing file or folder, expected a new one; nothing is overwritten")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        fast.save_pretrained(str(temporary))
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


# --- words and characters, without a language model ---------------------------------------------------------------


def normalise(text: str) -> str:
    """NFKC, lower case: one spelling a word."""
    return unicodedata.normalize("NFKC", text).lower()


def words(text: str) -> list[str]:
    """Words of a text in any script; of a Chinese run its characters and its pairs of characters."""
    out = []
    for run in _RUN.findall(normalise(text)):
        pieces = _WORD.findall(run)
        out += pieces
        out += [a + b for a, b in zip(pieces, pieces[1:], strict=False) if len(a) == len(b) == 1]
    return out


def char_ngrams(text: str, low: int = 2, high: int = 4) -> list[str]:
    """Character n-grams inside word boundaries; a blank marks the boundary."""
    out = []
    for run in _RUN.findall(normalise(text)):
        padded = f" {run} "
        for n in range(low, high + 1):
            out += [padded[i : i + n] for i in range(len(padded) - n + 1)]
    return out


def _tfidf_rows(counts: list[collections.Counter], vocabulary: dict[str, int], idf: np.ndarray,
                unit: bool = True) -> sp.csr_matrix:
    """Rows of (1 + log count) · idf, of unit length unless `unit` is False; unknown terms are left out."""
    columns, values, starts = [], [], [0]
    for counter in counts:
        row = sorted((vocabulary[term], count) for term, count in counter.items() if term in vocabulary)
        columns += [column for column, _ in row]
        values += [count for _, count in row]
        starts.append(len(columns))
    columns = np.array(columns, np.int32)
    data = (1 + np.log(np.array(values, np.float32))) * idf[columns] if len(columns) else np.zeros(0, np.float32)
    out = sp.csr_matrix((data.astype(np.float32), columns, np.array(starts)), shape=(len(counts), len(vocabulary)))
    if not unit:
        return out
    length = np.sqrt(np.asarray(out.multiply(out).sum(1)).ravel())
    return sp.csr_matrix(sp.diags_array(1 / np.where(length > 0, length, 1)).astype(np.float32) @ out)


def _fit_terms(counts: list[collections.Counter], min_df: int, max_terms: int) -> tuple[dict[str, int], np.ndarray]:
    """(vocabulary, smoothed idf) of the terms of at least `min_df` texts, the most frequent `max_terms` of them."""
    document_frequency = collections.Counter()
    for counter in counts:
        document_frequency.update(counter.keys())
    enough = [term for term, df in document_frequency.items() if df >= min_df]
    frequent = sorted(enough, key=lambda term: (-document_frequency[term], term))
    vocabulary = {term: i for i, term in enumerate(sorted(frequent[:max_terms]))}
    df = np.array([document_frequency[term] for term in vocabulary], np.float64)
    return vocabulary, (np.log((1 + len(counts)) / (1 + df)) + 1).astype(np.float32)


MIN_TEXTS, MAX_WORDS = 2, 50_000  # of the words that compare texts with each other: in how many, and how many


def tfidf_words(texts: Sequence[str], min_df: int = MIN_TEXTS, max_terms: int = MAX_WORDS,
                unit: bool = True) -> sp.csr_matrix:
    """Word TF-IDF [n, F] float32, (1 + log count) · idf; a row is zero where a text has no known word.

    With `unit` every other row has unit length; without, a text of more and rarer words has a longer row.
    """
    counts = [collections.Counter(words(text)) for text in texts]
    return _tfidf_rows(counts, *_fit_terms(counts, min_df, max_terms), unit)


@dataclasses.dataclass(frozen=True)
class TfidfWords:
    """Word TF-IDF that was fitted on some texts and reads any others."""

    vocabulary: dict[str, int]  # word -> column
    idf: np.ndarray  # [F] float32

    def encode(self, texts: Sequence[str], unit: bool = True) -> sp.csr_matrix:
        """[n, F] float32 rows, of unit length unless `unit` is False; zero where a text has no known word."""
        return _tfidf_rows([collections.Counter(words(text)) for text in texts], self.vocabulary, self.idf, unit)


def fit_tfidf_words(texts: Sequence[str], min_df: int = 1, max_terms: int = 200_000) -> TfidfWords:
    """The words of `texts` and how rare they are; with `min_df` 1 also those of a single text, which name it best."""
    return TfidfWords(*_fit_terms([collections.Counter(words(text)) for text in texts], min_df, max_terms))


@dataclasses.dataclass(frozen=True)
class TfidfSvd:
    """Character n-gram TF-IDF projected on its leading singular vectors (Deerwester et al. 1990)."""

    vocabulary: dict[str, int]  # n-gram -> column
    idf: np.ndarray  # [F] float32
    components: np.ndarray  # [F, D] float32

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """[n, D] float32 rows of unit length; zero where a text is empty or shares no n-gram with the fitted ones."""
        counts = [collections.Counter(char_ngrams(text)) for text in texts]
        rows = np.asarray(_tfidf_rows(counts, self.vocabulary, self.idf) @ self.components, np.float32)
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        # Below this a row is rounding noise of a text outside the span, not a direction.
        return np.where(length > 1e-6, rows / np.maximum(length, 1e-6), 0).astype(np.float32)

    def save(self, path: str | Path) -> None:
        """Writes one .npz file."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.npz")
        terms = np.array(list(self.vocabulary), dtype=np.str_)
        np.savez(temporary, terms=terms, idf=self.idf, components=self.components)
        os.replace(temporary, path)

    @staticmethod
    def load(path: str | Path) -> TfidfSvd:
        """Reads what `save` wrote."""
        with np.load(path) as saved:
            vocabulary = {str(term): i for i, term in enumerate(saved["terms"])}
            return TfidfSvd(vocabulary, saved["idf"], saved["components"])


def fit_tfidf_svd(texts: Sequence[str], dim: int, seed: int, max_terms: int = 50_000) -> TfidfSvd:
    """Fits the projection on `texts` by a seeded randomised SVD (Halko et al. 2011); dims beyond the rank are zero."""
    counts = [collections.Counter(char_ngrams(text)) for text in texts]
    # With few texts an n-gram of a single text is all that tells it apart.
    vocabulary, idf = _fit_terms(counts, 2 if len(texts) > 50 else 1, max_terms)
    matrix = _tfidf_rows(counts, vocabulary, idf)
    rank = min(dim, *matrix.shape)
    components = np.zeros((matrix.shape[1], dim), np.float32)
    if rank:
        width = min(rank + 10, *matrix.shape)
        basis = matrix @ np.random.default_rng(seed).standard_normal((matrix.shape[1], width)).astype(np.float32)
        for _ in range(4):
            basis = matrix @ (matrix.T @ np.linalg.qr(basis)[0])
        wide = (matrix.T @ np.linalg.qr(basis)[0]).astype(np.float64)  # [F, width]
        squares, rotation = np.linalg.eigh(wide.T @ wide)  # ascending; far cheaper than the SVD of the tall matrix
        values = np.sqrt(np.maximum(squares[::-1][:rank], 0))
        kept = int((values > 1e-5 * max(values[0], 1e-30)).sum())
        components[:, :kept] = wide @ rotation[:, ::-1][:, :kept] / values[:kept]
    return TfidfSvd(vocabulary, idf, components)


def tfidf_svd(texts: Sequence[str], dim: int, seed: int) -> np.ndarray:
    """[n, dim] float32 unit vectors of texts in any language: the fallback where no tokenizer knows the words."""
    return fit_tfidf_svd(texts, dim, seed).encode(texts)
