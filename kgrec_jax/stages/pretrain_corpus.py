"""What the pretraining stage reads: texts of the data set or a corpus of files, as tokens, some held out."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kgrec_jax.data import corpus
from kgrec_jax.data.dataset import Dataset
from kgrec_jax.data.text import Tokenizer, train_wordpiece
from kgrec_jax.data.token_store import marked, open_store, sample_texts
from kgrec_jax.stages.pretrain_config import Config

TOKENS_PER_TEXT = 512  # of a long text of the data set no more is read
SAMPLE = 2000  # documents by which the tokenizer's fit is judged
VOCABULARY_BYTES = 20_000_000  # of a corpus, by which a vocabulary is learned


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Texts as token ids, some of them held out."""

    train: Sequence[Sequence[int]]
    valid: Sequence[Sequence[int]]
    documents: int = 0  # with the doubled ones
    tokens: int = 0


def texts_of(dataset: Dataset) -> list[str]:
    """Every distinct non-empty text of items and entities, in order. Interactions have no part in it."""
    graph = dataset.graph
    others = zip(graph.entity_names[graph.num_items:], graph.entity_texts[graph.num_items:], strict=True)
    entities = [f"{name}. {text}" if name else text for name, text in others if text.strip()]
    return list(dict.fromkeys(text for text in [*dataset.item_texts, *entities] if text.strip()))


def make_corpus(cfg: Config, texts: list[str], tokenizer: Tokenizer, seed: int) -> Corpus:
    """Token ids of `texts`, `valid_share` of them held out by the seed."""
    if cfg.masking == "token":
        rows = tokenizer.encode(texts, TOKENS_PER_TEXT, special=False)
    else:
        rows = [row.tolist() for row in marked(tokenizer, texts, TOKENS_PER_TEXT, cfg.masking == "segment")]
    ids = [tuple(row) for row in rows if row]
    order = np.random.default_rng(seed).permutation(len(ids))
    held_out = min(int(cfg.valid_share * len(ids)), cfg.valid_limit)
    train, valid = np.sort(order[held_out:]), np.sort(order[:held_out])
    return Corpus(tuple(ids[i] for i in train), tuple(ids[i] for i in valid), len(ids), sum(map(len, ids)))


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the documents come from, to be read as often as there is need."""

    read: Callable[[], Iterator[tuple[str, int]]]  # (text, position so far of `total`)
    total: int  # bytes on disk, or characters
    identity: dict[str, Any]  # of the content, as far as it can be told without reading it
    files: int  # 0: the texts of the data set

    def sample(self) -> list[str]:
        """The first documents."""
        return [text for text, _ in itertools.islice(self.read(), SAMPLE)]


def source_of(cfg: Config, run: Any) -> Source | None:
    """The corpus that the config names, else the texts of the run's data set; None where it has none.

    Raises KgrecError for paths that do not exist or hold nothing that can be read.
    """
    if cfg.corpus:
        files = corpus.find_files(cfg.corpus, run.tracker.say)
        named = [[file.path.name, file.size] for file in files]
        return Source(lambda: corpus.documents(files), sum(f.size for f in files), {"files": named}, len(files))
    texts = texts_of(run.dataset)
    if not texts:
        return None
    ends = np.cumsum([len(text) for text in texts]).tolist()
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    return Source(lambda: zip(texts, ends, strict=True), ends[-1], {"texts": digest}, 0)


def learn_vocabulary(cfg: Config, source: Source, folder: Path, seed: int, say: Callable[[str], None]) -> Path:
    """`folder` with a WordPiece tokenizer of the corpus (of a drawn part of it, where it is large); made once."""
    if not folder.is_dir():
        share = VOCABULARY_BYTES / max(source.total, 1)
        say(f"pretrain: learning {cfg.shape.vocab_size:,} word pieces"
            + (f" from about {share:.1%} of the documents" if share < 1 else ""))
        train_wordpiece(sample_texts(source.read(), share, seed), folder, cfg.shape.vocab_size,
                        cfg.shape.lower_case == "yes")
    return folder


def open_corpus(cfg: Config, source: Source, tokenizer: Tokenizer, run: Any, seed: int) -> Corpus:
    """The corpus as tokens: in memory for the texts of a data set, a text a row; else on disk under the stage."""
    if not source.files and cfg.mode != "scratch" and cfg.rows == "texts":
        return make_corpus(cfg, [text for text, _ in source.read()], tokenizer, seed)
    segmented = cfg.masking == "segment"
    vocabulary = sorted(tokenizer.backend.get_vocab().items(), key=lambda pair: pair[1])
    digest = hashlib.sha256(repr(vocabulary).encode()).hexdigest()
    store = open_store(run.stage("pretrain") / "tokens", source.read(), tokenizer,
                       {**source.identity, "vocabulary": digest, "segmented": segmented}, total=source.total,
                       segmented=segmented, tracker=run.tracker)
    train, valid = store.split(cfg.valid_share, cfg.valid_limit, seed)
    doubled = len(store.hashes) - len(train) - len(valid)
    run.tracker.say(f"pretrain: {len(store.hashes):,} documents, {len(store.ids):,} tokens"
                    + (f" ({doubled:,} documents that are there twice or empty are left out)" if doubled else ""))
    return Corpus(train, valid, len(store.hashes), len(store.ids))
