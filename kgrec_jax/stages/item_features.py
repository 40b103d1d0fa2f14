"""What the fusion stage knows of items beside who touched them: text, words, graph and media. No interaction enters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.sparse as sp

from kgrec_jax import checkpoint
from kgrec_jax.data import text as texts
from kgrec_jax.data.dataset import Graph
from kgrec_jax.data.graph import edges, graph_features
from kgrec_jax.models.text_encoder import encode_texts
from kgrec_jax.pretrained.hf import Encoder, load_encoder
from kgrec_jax.stages.graph import training_graph

FALLBACK_WIDTH = 128  # of character n-gram vectors, where no encoder knows the language


@dataclasses.dataclass(frozen=True)
class ItemContent:
    """Features of the items; a block that the data set has nothing for is absent."""

    graph: Graph  # the training graph of the graph stage: what `edges` and tables refer to
    text: np.ndarray | None  # [I, d] float32 unit vectors, 0 where an item has no text
    words: sp.csr_matrix | None  # [I, F] tf-idf
    links: sp.csr_matrix | None  # [I, F] idf-weighted graph neighbours
    media: Mapping[str, np.ndarray]  # name -> [I, d] float32, 0 where absent
    entity: np.ndarray | None  # [N, De] table V of the graph stage
    relation: np.ndarray | None  # [2R, De] table U
    text_source: str  # "released encoder", "pretrain", "graph" or "character n-grams"; "" without texts

    def blocks(self) -> dict[str, sp.csr_matrix | np.ndarray]:
        """The feature blocks of the content ridge, by name; dense ones are centred."""
        out: dict[str, Any] = {}
        if self.links is not None:
            out["graph"] = self.links
        if self.text is not None:
            out["text"] = centred(self.text)
        if self.words is not None:
            out["words"] = self.words
        return out | {name: centred(vectors) for name, vectors in self.media.items()}


def centred(vectors: np.ndarray) -> np.ndarray:
    """Vectors less the mean of those that are there; the others stay 0.

    What all texts share says nothing about any; without this an encoder's common direction would dominate a kernel.
    """
    present = np.abs(vectors).sum(1) > 0
    return np.where(present[:, None], vectors - vectors[present].mean(0) if present.any() else vectors, 0.0).astype(np.float32)


def item_texts(dataset: Any) -> list[str]:
    """The text of each item that an encoder reads: its text columns, or its name where there are none."""
    named = dataset.item_names != dataset.item_ids
    return [t if t.strip() else (n if named else "") for t, n in zip(dataset.item_texts, dataset.item_names, strict=True)]


def text_candidates(experiment: Any, run: Any) -> dict[str, Any]:
    """{source: weights} of the encoders that may read the items: the released one first, then what the stages left."""
    encoder = load_encoder(experiment.encoder, say=run.tracker.say)
    out = {"released encoder": encoder.params}
    for stage in ("pretrain", "graph"):
        folder = run.stage(stage) / "encoder"
        if folder.is_dir():
            backbone = {name: encoder.params[name] for name in ("embeddings", "encoder")}
            out[stage] = checkpoint.load_part(folder, backbone)
    return out


def encode(encoder: Encoder, weights: Any, tokenizer: texts.Tokenizer, rows: list[str], length: int, run: Any, label: str) -> np.ndarray:
    """[n, d] unit vectors, with progress."""
    with run.tracker.progress(label, sum(bool(r.strip()) for r in rows)) as bar:
        return encode_texts(encoder, weights, tokenizer, rows, max_length=length, progress=bar.advance)


def build_content(dataset: Any, run: Any, text: np.ndarray | None, text_source: str) -> ItemContent:
    """All features but the text vectors, which are given."""
    graph, _ = training_graph(dataset.graph)
    num_items = dataset.num_items
    links = graph_features(graph, num_items, unit=False) if len(graph.triples) else None
    rows = item_texts(dataset)
    some_text = any(r.strip() for r in rows)
    tables = run.stage("graph") / "tables"
    held = checkpoint.load_tree(tables) if tables.is_dir() else None
    return ItemContent(
        graph=graph, text=text, words=texts.tfidf_words(rows, unit=False) if some_text else None,
        links=links if links is not None and links.nnz else None,
        media={name: np.where(present[:, None], vectors, 0.0).astype(np.float32) for name, (vectors, present) in dataset.media.items()},
        entity=None if held is None else np.asarray(held["entity"], np.float32),
        relation=None if held is None else np.asarray(held["relation"], np.float32), text_source=text_source)


def item_edges(content: ItemContent, num_items: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(head, relation, tail) of the edges that leave items, sorted by head; empty without tables."""
    if content.entity is None:
        none = np.zeros(0, np.int32)
        return none, none, none
    head, relation, tail = edges(content.graph)
    stop = int(np.searchsorted(head, num_items))
    return head[:stop], relation[:stop], tail[:stop]
