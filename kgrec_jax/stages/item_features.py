"""What the fusion stage knows of items beside who touched them: text, words, graph and media.

No interaction enters, but those that `fuse_media` learned the vectors of raw images and sounds from.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.sparse as sp

from kgrec_jax import checkpoint
from kgrec_jax.data import text as texts
from kgrec_jax.data.dataset import Graph
from kgrec_jax.data.graph import edges, graph_features
from kgrec_jax.errors import KgrecError
from kgrec_jax.linear import ridge
from kgrec_jax.linear.parts import ItemWeights
from kgrec_jax.models import encoders
from kgrec_jax.models.text_encoder import encode_texts
from kgrec_jax.pretrained.hf import Encoder
from kgrec_jax.stages.fuse_media import media_blocks
from kgrec_jax.stages.graph import training_graph
from kgrec_jax.stages.pretrain import released_encoder
from kgrec_jax.tracking import NPZ_ERRORS, write_npz

FALLBACK_WIDTH = 128  # of character n-gram vectors, where no encoder knows the language
RELEASED, NGRAMS = "released encoder", "character n-grams"  # what reads the items, beside "pretrain" and "graph"
MIN_COMPARED, COMPARED_TOKENS = 400, 40_000  # items on which encoders are compared: at least, and by their tokens


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


def centred(vectors: np.ndarray, mean: np.ndarray | None = None) -> np.ndarray:
    """Vectors less the mean of those that are there, or a given one; the others stay 0.

    What all texts share says nothing about any; without this an encoder's common direction would dominate a kernel.
    """
    mean = mean_of_present(vectors) if mean is None else mean
    present = np.abs(vectors).sum(1, keepdims=True) > 0
    return np.where(present, vectors - mean, 0.0).astype(np.float32)


def mean_of_present(vectors: np.ndarray) -> np.ndarray:
    """[d] the mean of the rows that are not 0; 0 without any."""
    present = np.abs(vectors).sum(1) > 0
    return vectors[present].mean(0) if present.any() else np.zeros(vectors.shape[1], np.float32)


def unit_rows(matrix: np.ndarray | sp.csr_matrix) -> np.ndarray | sp.csr_matrix:
    """Rows of unit length; a row of zeros stays one."""
    if sp.issparse(matrix):
        length = np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1)).ravel())
        return (sp.diags((1.0 / np.maximum(length, 1e-6)).astype(np.float32)) @ matrix).tocsr()
    return matrix / np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-6)


def item_texts(dataset: Any) -> list[str]:
    """The text of each item that an encoder reads: its text columns, its name where there are none, never its id."""
    rows = zip(dataset.item_texts, dataset.item_names, dataset.item_ids, strict=True)
    return [text if text.strip() else (name if name != item else "") for text, name, item in rows]


def text_candidates(experiment: Any, run: Any, encoder: Encoder) -> dict[str, Any]:
    """{source: weights} of what may read the items: the released `encoder` first, then what the stages left."""
    out = {RELEASED: encoder.params}
    for stage in ("graph",) if experiment.pretrain.mode == "scratch" else ("pretrain", "graph"):
        folder = run.stage(stage) / "encoder"
        if folder.is_dir():
            out[stage] = checkpoint.load_part(folder, encoders.backbone(encoder.config, encoder.params))
    return out


def read_texts(experiment: Any, run: Any, train_matrix: sp.csr_matrix | None,
               part: ItemWeights | None) -> tuple[np.ndarray | None, str, dict[str, float]]:
    """(text vectors [I, d] or None, which weights read them, recall of each candidate on held-out items).

    Kept in the stage's folder, so that a run that goes on reads nothing twice. `part`: EASE weights that the
    comparison carries to held-out items; without it the released encoder reads the items.
    """
    cfg, rows = experiment.fuse, item_texts(run.dataset)
    held = run.stage("fuse") / "text.npz"
    if held.is_file():
        return load_texts(held, len(rows))
    if not any(r.strip() for r in rows):
        return None, "", {}
    encoder = released_encoder(experiment, run)
    tokenizer = texts.load_tokenizer(encoder.tokenizer_folder, encoder.config.vocab_size)
    reason = texts.coverage(tokenizer, [r for r in rows if r.strip()]).reason
    compared: dict[str, float] = {}
    if reason:
        run.tracker.say(f"fuse: {reason}: the text part uses character n-grams")
        width = min(FALLBACK_WIDTH, max(2, len(rows) // 4))
        vectors, source = texts.tfidf_svd(rows, width, experiment.seed), NGRAMS
    else:
        candidates = text_candidates(experiment, run, encoder)
        source = RELEASED
        if cfg.text_encoder == "choose" and part is not None and len(candidates) > 1:
            compared = _compare(candidates, encoder, tokenizer, rows, cfg, run, train_matrix, part)
            best = max(compared, key=compared.get)
            # The released encoder stays unless another is clearly ahead: item vectors spoil easily.
            source = best if compared[best] > compared[source] * 1.02 else source
            run.tracker.say("fuse: recall on held-out items by text: "
                            + ", ".join(f"{n} {v:.4f}" for n, v in compared.items()) + f"; {source} reads the items")
        length = min(cfg.text_length, encoder.config.max_position_embeddings)
        vectors = encode(encoder, candidates[source], tokenizer, rows, length, run, "item texts")
    save_texts(held, vectors, source, compared)
    return vectors, source, compared


def save_texts(path: pathlib.Path, vectors: np.ndarray, source: str, compared: Mapping[str, float]) -> None:
    """Keeps text vectors for `read_texts` to find."""
    write_npz(path, vectors=vectors, source=source, compared=json.dumps(compared))


def load_texts(path: pathlib.Path, num_items: int) -> tuple[np.ndarray, str, dict[str, float]]:
    """What `read_texts` kept; KgrecError where the file is damaged or of other items."""
    try:
        with np.load(path, allow_pickle=False) as file:
            vectors, source, compared = file["vectors"], str(file["source"]), json.loads(str(file["compared"]))
        if len(vectors) != num_items:
            raise ValueError(f"{len(vectors):,} vectors for {num_items:,} items")
    except NPZ_ERRORS as error:
        reason = str(error).partition("\n")[0]
        raise KgrecError(f"{path}: found a damaged file ({reason}), expected the text vectors that the fusion stage "
                         "wrote; remove it and run it again") from None
    return vectors, source, compared


def _compare(candidates: dict[str, Any], encoder: Encoder, tokenizer: texts.Tokenizer, rows: list[str], cfg: Any,
             run: Any, train_matrix: sp.csr_matrix, part: ItemWeights) -> dict[str, float]:
    """{encoder: recall on held-out items by text alone}, on as many warm items as a few seconds of reading allow."""
    length = min(cfg.text_length, 64)
    warm = np.flatnonzero(part.known & np.array([bool(r.strip()) for r in rows]))
    tokens = [len(ids) for ids in tokenizer.encode([rows[i] for i in warm[:200]], length)]
    count = int(max(MIN_COMPARED, COMPARED_TOKENS / max(np.mean(tokens), 1.0))) if tokens else 0
    sample = np.sort(np.random.default_rng(run.experiment.seed).permutation(warm)[:count])
    sub = ItemWeights(np.asarray(part.weights)[np.ix_(sample, sample)], np.ones(len(sample), bool))
    log, out = train_matrix[:, sample].tocsr(), {}
    for name, weights in candidates.items():
        some = encode(encoder, weights, tokenizer, [rows[i] for i in sample], length, run, f"texts by {name}")
        out[name] = ridge.choose(log, sub, {"text": ridge.kernel(centred(some))}, fold_items=100).score
    return out


def encode(encoder: Encoder, weights: Any, tokenizer: texts.Tokenizer, rows: list[str], length: int, run: Any,
           label: str) -> np.ndarray:
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
        media={name: np.where(present[:, None], vectors, 0.0).astype(np.float32)
               for name, (vectors, present) in dataset.media.items()} | media_blocks(dataset, run),
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
