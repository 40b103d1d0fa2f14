"""Items for a free text: by the meaning of their texts, by their words, and the popular ones first among equals.

    s(q, i) = z_i + 4 · w_i + 4 · t_i + 0.1 · p_i

z: cosine of the query's vector and the item's, both less the mean item vector, standardised over the items with a text.
w: word TF-IDF cosine over its highest value, times the share of the query's (idf-weighted) words that the best item
has: in [0, 1], and an item with every word of the query gains as much as four standard deviations of meaning, which is
about what the nearest texts of a catalogue reach. t: 1 where the query is the item's title, so that "Toy Story" does
not find its sequel first. p: log popularity, standardised.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp

from kgrec_jax.data.text import TfidfSvd, TfidfWords, fit_tfidf_svd, fit_tfidf_words, load_tokenizer, normalise, words
from kgrec_jax.errors import KgrecError
from kgrec_jax.models.recommender import TunedTexts
from kgrec_jax.serving.explain import BEST_LEFT
from kgrec_jax.serving.store import Files
from kgrec_jax.stages import item_features
from kgrec_jax.stages.item_features import NGRAMS, RELEASED

TEXT_WEIGHT, WORDS_WEIGHT, TITLE_WEIGHT, POPULARITY_WEIGHT = 1.0, 4.0, 4.0, 0.1
_ENCODER_FILES = ("config.json", "tokenizer.json", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json",
                  "added_tokens.json")
_CLOSE = 1.0  # standard deviations from which a text is called close to the query
_MATCHES = 4  # words that a reason names
_WORTH_NAMING = 0.1  # share of an item's word score from which a word is named
_COMMON = 1.5  # idf up to which a word is in most texts ("the", in more than 60 % of them) and is not named

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class QueryEncoder:
    """The language model that made the items' vectors: by reference where it is public, else kept here."""

    source: str  # pypi:… or hub:…; "" where weights and files are kept here
    files: Files | None  # config.json and the tokenizer
    params: Mapping[str, Any] | None  # {embeddings, encoder}
    max_length: int  # tokens of a text that are read

    @functools.cached_property
    def _loaded(self) -> tuple[Any, Any]:
        import jax
        import jax.numpy as jnp

        from kgrec_jax.pretrained.hf import Encoder, load_encoder, read_config

        if self.files is None:
            encoder = load_encoder(self.source)
        else:
            folder = self.files.folder
            encoder = Encoder(read_config(folder), jax.tree.map(jnp.asarray, self.params), False, folder)
        return encoder, load_tokenizer(encoder.tokenizer_folder, encoder.config.vocab_size)

    def encode(self, text: str) -> np.ndarray:
        """[d] unit vector; zero for an empty text. Raises KgrecError or OSError where the weights cannot be had."""
        return self.encode_all([text], batch_size=1)[0]

    def encode_all(self, texts: Sequence[str], batch_size: int = 0) -> np.ndarray:
        """[n, d] unit vectors, as `encode` gives them."""
        from kgrec_jax.models.text_encoder import encode_texts

        encoder, tokenizer = self._loaded
        return encode_texts(encoder, encoder.params, tokenizer, texts, max_length=self.max_length,
                            batch_size=batch_size)


@dataclasses.dataclass(frozen=True)
class Matches:
    """What a query finds."""

    parts: dict[str, np.ndarray]  # name -> [I] float64, adding up to the score
    found: np.ndarray  # [I] bool, the items that fit the query in any way


@dataclasses.dataclass(frozen=True)
class QueryIndex:
    """The items' texts as a query meets them."""

    words: TfidfWords
    documents: sp.csr_matrix  # [I, F] unit rows: title and text, so that a title's words count twice
    vectors: np.ndarray | None  # [I, d] float32 centred unit vectors, 0 where an item has no text
    mean: np.ndarray | None  # [d] of the vectors before they were centred
    reader: QueryEncoder | TfidfSvd | None  # a query to its vector

    @staticmethod
    def of(run: Any, tuned: TunedTexts | None = None) -> QueryIndex | None:
        """The index of a run whose fusion stage has read the texts; None where items have neither texts nor names.

        `tuned`: of an encoder that learned inside fusion, which then reads the queries too.
        """
        data = run.dataset
        texts = item_features.item_texts(data)
        named = [name if name != item else "" for name, item in zip(data.item_names, data.item_ids, strict=True)]
        documents = [f"{name}\n{text}" for name, text in zip(named, texts, strict=True)]
        if not any(d.strip() for d in documents):
            return None
        index = fit_tfidf_words(documents)
        vectors, reader = _vectors(run, texts, tuned)
        if vectors is None:
            return QueryIndex(index, index.encode(documents), None, None, None)
        present = np.abs(vectors).sum(1) > 0
        mean = vectors[present].mean(0) if present.any() else np.zeros(vectors.shape[1], np.float32)
        centred = item_features.unit_rows(item_features.centred(vectors))
        return QueryIndex(index, index.encode(documents), centred, mean, reader)

    def matches(self, query: str, popularity: np.ndarray, say: Say | None = None,
                titled: Sequence[int] = ()) -> Matches:
        """The parts of every item's score for one query.

        popularity: [I] training users of each item. titled: rows whose title the query is. `say` is told in one line
        where the encoder cannot be had. Raises KgrecError for an empty query.
        """
        if not query.strip():
            raise KgrecError("--query: found an empty text, expected words that say what is looked for")
        by_words = self._words(query)
        found = by_words > 0
        parts = {}
        by_text = self._text(query, say)
        if by_text is not None:
            present = np.abs(self.vectors).sum(1) > 0
            parts["text"] = TEXT_WEIGHT * _standardise(by_text, present)
            found = found | present
        parts["words"] = WORDS_WEIGHT * by_words
        if len(titled):
            parts["title"] = np.zeros(len(popularity))
            parts["title"][list(titled)] = TITLE_WEIGHT
            found[list(titled)] = True
        everything = np.ones(len(popularity), bool)
        parts["popularity"] = POPULARITY_WEIGHT * _standardise(np.log1p(popularity.astype(np.float64)), everything)
        return Matches(parts, found)

    def reason(self, query: str, item: int, text: float) -> str:
        """One line on why an item fits; `text` is its contribution of that name."""
        clauses = []
        matched = self.matched_words(query, item)
        if matched:
            clauses.append(f"matches: {', '.join(matched)}")
        if text >= TEXT_WEIGHT * _CLOSE or (text > 0 and not matched):
            clauses.append("its text is close to the query")
        line = "; ".join(clauses) or BEST_LEFT
        return line[0].upper() + line[1:]

    def matched_words(self, query: str, item: int) -> list[str]:
        """The query's words that the item has, in the query's order, without those that hardly count."""
        row = self.documents[item]
        here = dict(zip(row.indices.tolist(), row.data.tolist()))
        idf = self.words.idf
        weight = {w: here[c] * float(idf[c]) for w, c in self._columns(query).items() if c in here and idf[c] > _COMMON}
        runs: dict[str, float] = {}
        for word, value in weight.items():
            # Chinese: the pairs 老屋, 屋里 are said as the run 老屋里, and a character of a pair not at all.
            last = next(reversed(runs), "")
            if any(word != pair and len(pair) == 2 and word in pair for pair in weight):
                continue
            if len(word) == 2 and last[-1:] == word[0] and last + word[1] in normalise(query):
                value, word = value + runs.pop(last), last + word[1]
            runs[word] = value
        worth = [w for w in runs if runs[w] >= _WORTH_NAMING * sum(runs.values())]
        named = sorted(worth, key=lambda w: -runs[w])[:_MATCHES]
        return [w for w in worth if w in named]

    def _columns(self, query: str) -> dict[str, int]:
        """The query's words that some item has, in the query's order, and their columns."""
        known = self.words.vocabulary
        return {w: known[w] for w in words(query) if w in known}

    def _words(self, query: str) -> np.ndarray:
        """[I] float64 in [0, 1]."""
        row = self.words.encode([query])
        cosine = np.asarray((self.documents @ row.T).todense(), np.float64).ravel()
        if not cosine.any():
            return cosine
        best = int(cosine.argmax())
        has = set(self.documents[best].indices.tolist())
        unseen = float(np.log(1 + len(cosine)) + 1)  # the idf of a word that no item has
        known = self._columns(query)
        idf = {w: float(self.words.idf[known[w]]) if w in known else unseen for w in words(query)}
        share = sum(v for w, v in idf.items() if known.get(w) in has) / sum(idf.values())
        return cosine / cosine[best] * share

    def _text(self, query: str, say: Say | None) -> np.ndarray | None:
        """[I] float64 cosines; None without vectors, without the encoder, or where it can make nothing of the query."""
        if self.vectors is None or self.reader is None:
            return None
        try:
            vector = self.reader.encode([query])[0] if isinstance(self.reader, TfidfSvd) else self.reader.encode(query)
        except (KgrecError, OSError) as error:
            if say:
                say(f"--query: the encoder could not be loaded ({_line(error)}): the words alone decide")
            return None
        if not vector.any():
            return None
        return (self.vectors @ item_features.unit_rows((vector - self.mean)[None])[0]).astype(np.float64)


def _vectors(run: Any, texts: list[str],
             tuned: TunedTexts | None) -> tuple[np.ndarray | None, QueryEncoder | TfidfSvd | None]:
    """([I, d] text vectors that the fusion stage left, what reads a query like them); None twice without them."""
    held = run.path / "fuse" / "text.npz"
    if not held.is_file():
        return None, None
    with np.load(held, allow_pickle=False) as file:
        vectors, source = file["vectors"], str(file["source"])
    if source == NGRAMS:
        reader = fit_tfidf_svd(texts, vectors.shape[1], run.experiment.seed)
        return reader.encode(texts), reader
    try:
        return (vectors if tuned is None else tuned.vectors), _reader(run, source, tuned)
    except (KgrecError, OSError) as error:
        run.tracker.say(f"recommender: the encoder could not be kept ({_line(error)}): queries go by words alone")
        return None, None


def _reader(run: Any, source: str, tuned: TunedTexts | None) -> QueryEncoder:
    """The encoder by the name that the fusion stage gave its weights, or with those that it tuned itself."""
    from kgrec_jax.models import encoders
    from kgrec_jax.pretrained.hf import load_encoder

    if run.experiment.pretrain.mode == "scratch":
        raise KgrecError("pretrain.mode: found scratch, whose encoder is not kept for queries")
    name, length = run.experiment.encoder, run.experiment.fuse.text_length
    if tuned is None and source == RELEASED and not pathlib.Path(name).expanduser().is_dir():
        return QueryEncoder(name, None, None, length)
    # A folder of this machine, or weights that the run has tuned: they go along, or the recommender could not be moved.
    encoder = load_encoder(name, say=run.tracker.say)
    if tuned is not None:
        params = tuned.weights
    elif source == RELEASED:
        params = encoder.params
    else:
        params = item_features.text_candidates(run.experiment, run, encoder).get(source)
    if params is None:
        raise KgrecError(f"{run.path}: found no weights of {source!r}, expected those that read the items")
    folder = encoder.tokenizer_folder
    files = Files(folder, tuple(file for file in _ENCODER_FILES if (folder / file).is_file()))
    return QueryEncoder("", files, encoders.backbone(encoder.config, params), length)


def _standardise(values: np.ndarray, present: np.ndarray) -> np.ndarray:
    """[I]: less the mean and over the deviation of those present; 0 for the others and where all are equal."""
    if not present.any() or values[present].std() < 1e-9:
        return np.zeros(len(values))
    return np.where(present, (values - values[present].mean()) / values[present].std(), 0.0)


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
