"""What a recommender keeps so that items can join it later: how its features were made, and what they were compared by.

Statistics over the catalogue (idf, means of vectors, scales of kernels) stay those of the run, so an item that joins
gets what it would have got had it been there as a cold item, but for its own share in those statistics.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.sparse as sp

from kgrec_jax.data import text as texts
from kgrec_jax.data.graph import link_indicators, link_terms, merge_inverse_relations
from kgrec_jax.data.text import TfidfWords
from kgrec_jax.models.media_towers import TrainedMedia
from kgrec_jax.stages import fuse_media, item_features
from kgrec_jax.stages.item_features import ItemContent

JOURNAL = "added.tsv"  # beside the recommender: the items that joined, and from where

@dataclasses.dataclass(frozen=True)
class Block:
    """A feature block of the content ridge."""

    features: sp.csr_matrix | np.ndarray  # [I, F], dense ones centred; rows of items that are not warm do not count
    scale: float  # its weight in the kernel over the mean diagonal of its own kernel


@dataclasses.dataclass(frozen=True)
class Added:
    """An item that joined."""

    item_id: str
    title: str
    links: int  # triples of its own that are known
    parts: tuple[str, ...]  # parts of the score that know it; none: nothing is known of it
    source: str  # where it was read from
    entity_known: bool  # the graph knew it as an entity before


@dataclasses.dataclass(frozen=True)
class Intake:
    """How the features of the items were made."""

    text_columns: tuple[str, ...]  # of the config: columns that make an item's text
    languages: tuple[str, ...]  # of the config: of names and texts in an RDF graph
    means: Mapping[str, np.ndarray]  # dense block -> [d] mean of the vectors that are there: "text" and media
    words: TfidfWords | None  # of the block "words"
    link_entities: np.ndarray  # [F] rows of the entities that are the columns of the block "graph"
    link_idf: np.ndarray  # [F] float32
    blocks: Mapping[str, Block]  # those that the ridge chose, by name
    entity: np.ndarray | None  # [N, De] table V of the graph stage; None without one
    relation: np.ndarray | None  # [2R, De] table U
    turned: Mapping[str, str]  # id of a relation that was merged away -> id of the one that has its triples, reversed
    towers: Mapping[str, TrainedMedia] = dataclasses.field(default_factory=dict)  # of raw images and sounds, by name

    @staticmethod
    def of(run: Any, tuned: np.ndarray | None = None) -> Intake | None:
        """That of a run whose fusion stage is finished; None where it left no choices.

        `tuned`: [I, d] text vectors of an encoder that learned inside fusion.
        """
        held = run.path / "fuse" / "choices.json"
        if not held.is_file():
            return None
        chosen = json.loads(held.read_text(encoding="utf-8"))["content"]
        kept, data, cfg = run.path / "fuse" / "text.npz", run.dataset, run.experiment.data
        vectors, source, _ = item_features.load_texts(kept, data.num_items) if kept.is_file() else (None, "", {})
        content = item_features.build_content(data, run, vectors if tuned is None else tuned, source)
        words = None
        if content.words is not None:
            words = texts.fit_tfidf_words(item_features.item_texts(data), texts.MIN_TEXTS, texts.MAX_WORDS)
        entities, idf = np.zeros(0, np.int64), np.zeros(0, np.float32)
        if content.links is not None:
            entities, idf = link_terms(link_indicators(content.graph, data.num_items))
        return Intake(cfg.text_columns, cfg.languages, _means(content), words, entities.astype(np.int32), idf,
                      _blocks(content, {} if chosen is None else chosen["weights"]), content.entity, content.relation,
                      dict(merge_inverse_relations(data.graph)[1].turned), fuse_media.trained_media(data, run))

    def kernel(self, features: Mapping[str, sp.csr_matrix | np.ndarray]) -> np.ndarray:
        """[n, I] float32: the ridge's kernel of new items, given by their blocks [n, F], with the old ones."""
        total: Any = np.float32(0.0)
        for name, block in self.blocks.items():
            product = features[name] @ block.features.T
            product = product.toarray() if sp.issparse(product) else product
            total = total + np.float32(block.scale) * np.asarray(product, np.float32)
        return total


def _means(content: ItemContent) -> dict[str, np.ndarray]:
    dense = {**({} if content.text is None else {"text": content.text}), **content.media}
    return {name: item_features.mean_of_present(vectors) for name, vectors in dense.items()}


def _blocks(content: ItemContent, weights: Mapping[str, float]) -> dict[str, Block]:
    out, features = {}, content.blocks() if weights else {}
    for name, weight in weights.items():
        held = features[name]
        squares = np.asarray(held.multiply(held).sum(axis=1) if sp.issparse(held) else np.square(held).sum(1)).ravel()
        diagonal = float(squares[squares > 0].mean()) if (squares > 0).any() else 1.0
        out[name] = Block(held, weight / diagonal)
    return out
