"""Triples as training batches: held-out pairs, merged queries with all of their answers, and the words of a triple.

Batches are a function of (seed, step) alone, so that a run resumes exactly where it stopped.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinkBatch:
    """Queries (head, relation, ?) with their known answers; weight 0 is padding."""

    head: np.ndarray  # [B] int32
    relation: np.ndarray  # [B] int32, below 2R
    tails: np.ndarray  # [B, T] int32
    weight: np.ndarray  # [B, T] float32
    candidates: np.ndarray  # [C] int32 sampled rivals, or [B, k] of each row; [0] where all entities are rivals


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextLinkBatch:
    """The same queries in words, with a slot for the soft token and one for the hidden entity."""

    links: LinkBatch
    input_ids: np.ndarray  # [B, L] int32
    attention_mask: np.ndarray  # [B, L] int32
    soft_position: np.ndarray  # [B, 1] int32, -1 where the vectors are withheld
    hidden_position: np.ndarray  # [B, 1] int32
    word_positions: np.ndarray  # [B, M] int32 masked words
    word_targets: np.ndarray  # [B, M] int32
    word_weight: np.ndarray  # [B, M] float32, 0 is padding


def some_triples(triples: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """At most `limit` of the triples [n, 3], drawn by the seed, in their order."""
    if len(triples) <= limit:
        return triples
    return triples[np.sort(np.random.default_rng([seed, 31]).permutation(len(triples))[:limit])]


def hold_out(triples: np.ndarray, valid_share: float, test_share: float, *, seed: int, limit: int = 5000) -> np.ndarray:
    """The part of each triple, [T] int8: 0 train, 1 valid, 2 test, drawn by `seed`, each share at most `limit` triples.

    A pair of entities is held out as a whole, in both directions and under every relation: no triple of a held-out pair
    stays behind that would give the others away. Every entity keeps a pair in train.
    """
    low, high = np.minimum(triples[:, 0], triples[:, 2]), np.maximum(triples[:, 0], triples[:, 2])
    num_entities = int(high.max(initial=-1)) + 1
    keys, pair_of = np.unique(low.astype(np.int64) * max(num_entities, 1) + high, return_inverse=True)
    size = np.bincount(pair_of, minlength=len(keys))
    ends = np.stack([keys // max(num_entities, 1), keys % max(num_entities, 1)], axis=1)
    degree = np.bincount(ends.ravel(), minlength=num_entities)
    wanted = [(2, min(int(test_share * len(triples)), limit)), (1, min(int(valid_share * len(triples)), limit))]
    part_of_pair, taken = np.zeros(len(keys), np.int8), 0
    part, quota = wanted.pop(0)
    for pair in np.random.default_rng([seed, 17]).permutation(len(keys)):
        while taken >= quota and wanted:
            (part, quota), taken = wanted.pop(0), 0
        if taken >= quota:
            break
        a, b = ends[pair]
        if a != b and degree[a] > 1 and degree[b] > 1:
            degree[[a, b]] -= 1
            part_of_pair[pair], taken = part, taken + size[pair]
    return part_of_pair[pair_of.reshape(-1)]


def hide_entities(triples: np.ndarray, num_entities: int, share: float, *, seed: int,
                  valid_share: float = 0.25) -> np.ndarray:
    """The part of each triple, [T] int8, of an inductive split: `share` of the entities are in no training triple.

    A quarter of the hidden entities (`valid_share`) are of the validation part, where no test entity occurs; a triple
    with a hidden entity of the test part is of the test part.
    """
    order = np.random.default_rng([seed, 37]).permutation(num_entities)
    hidden = order[:round(share * num_entities)]
    part_of = np.zeros(num_entities, np.int8)
    part_of[hidden] = 2
    part_of[hidden[:round(valid_share * len(hidden))]] = 1
    return np.maximum(part_of[triples[:, 0]], part_of[triples[:, 2]])


@dataclasses.dataclass(frozen=True)
class LinkRows:
    """The distinct (head, relation) queries of a graph and its inverse, each with all of its tails.

    A query with more than T tails takes several rows. One row costs one product with the entity table whatever the
    number of its tails: on FB15k-237 an epoch is 150 thousand rows instead of 544 thousand triples.
    """

    head: np.ndarray  # [Q] int32
    relation: np.ndarray  # [Q] int32
    tails: np.ndarray  # [Q, T] int32
    weight: np.ndarray  # [Q, T] float32: 1 for a tail, 0 for padding

    def __len__(self) -> int:
        return len(self.head)

    def take(self, index: np.ndarray, padding: np.ndarray, candidates: np.ndarray) -> LinkBatch:
        """The batch of rows `index` [B], with weight 0 where `padding` [B]."""
        weight = np.where(padding[:, None], np.float32(0), self.weight[index])
        return LinkBatch(self.head[index], self.relation[index], self.tails[index], weight, candidates)


def merge_queries(triples: np.ndarray, num_relations: int, width: int) -> LinkRows:
    """`triples` [T, 3] and their inverses (relation + R) as rows of at most `width` tails."""
    head, relation, tail = triples.astype(np.int64).T
    both = np.concatenate([np.stack([head, relation, tail], 1), np.stack([tail, relation + num_relations, head], 1)])
    both = np.unique(both, axis=0)
    query = both[:, 0] * (2 * num_relations) + both[:, 1]
    first = np.flatnonzero(np.append(True, query[1:] != query[:-1])) if len(query) else np.zeros(0, np.int64)
    count = np.diff(np.append(first, len(query)))
    rows_of = -(-count // width)
    row_query = np.repeat(np.arange(len(first)), rows_of)
    within = (np.arange(len(row_query)) - np.repeat(np.cumsum(rows_of) - rows_of, rows_of)) * width
    place = within[:, None] + np.arange(width)  # [Q, T]
    real = place < count[row_query][:, None]
    tails = np.where(real, both[np.minimum(first[row_query][:, None] + place, max(len(both) - 1, 0)), 2], 0)
    start = first[row_query]
    return LinkRows(both[start, 0].astype(np.int32), both[start, 1].astype(np.int32), tails.astype(np.int32),
                    real.astype(np.float32))


class LinkSource:
    """Batches of `steps` steps: every epoch is one seeded order of all rows, its last batch padded with weight 0.

    `candidates` entities are drawn uniformly each step, for the whole batch or, unless `shared`, for every row.
    """

    def __init__(self, rows: LinkRows, *, batch: int, steps: int, seed: int, num_entities: int, candidates: int = 0,
                 shared: bool = True):
        self.rows, self.batch, self.steps, self.seed = rows, batch, steps, seed
        self.num_entities, self.candidates, self.shared = num_entities, candidates, shared
        self._order = functools.lru_cache(maxsize=2)(self._draw_order)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> LinkBatch:
        index, padding = self.index(step)
        rng = np.random.default_rng([self.seed, 23, step])
        shape = self.candidates if self.shared else (self.batch, self.candidates)
        rivals = rng.integers(0, self.num_entities, shape).astype(np.int32)
        return self.rows.take(index, padding, rivals)

    def index(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows [B], is padding [B]) of a step."""
        epoch, position = divmod(step, -(-len(self.rows) // self.batch))
        place = position * self.batch + np.arange(self.batch)
        return self._order(epoch)[np.minimum(place, len(self.rows) - 1)], place >= len(self.rows)

    def _draw_order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, 19, epoch]).permutation(len(self.rows))


@dataclasses.dataclass(frozen=True)
class TripleWords:
    """What a triple's text is made of: word ids of entities and relations, and the encoder's special tokens."""

    entity: Sequence[Sequence[int]]  # N lists, empty where an entity has no name
    relation: Sequence[Sequence[int]]  # R lists
    cls: int
    sep: int
    mask: int
    pad: int
    vocab_size: int

    def sentence(self, head: int, relation: int, length: int) -> tuple[list[int], int, int, list[int]]:
        """(ids, place of the soft token, place of the hidden entity, places of words), at most `length` ids.

        A query (h, r, ?) reads "[CLS] soft h-words [SEP] r-words [MASK] [SEP]"; the inverse (?, r, h) reads
        "[CLS] [MASK] r-words [SEP] soft h-words [SEP]", so that a relation needs no name for its inverse. The head's
        words are cut first; the soft token's own id never counts, since a vector takes its place.
        """
        forward = relation < len(self.relation)
        relation_words = list(self.relation[relation % len(self.relation)])[:length - 5]
        words = list(self.entity[head])[:length - 5 - len(relation_words)]
        if forward:
            ids = [self.cls, self.pad, *words, self.sep, *relation_words, self.mask, self.sep]
            soft, hidden, word_at, relation_at = 1, len(ids) - 2, 2, 3 + len(words)
        else:
            ids = [self.cls, self.mask, *relation_words, self.sep, self.pad, *words, self.sep]
            soft, hidden, word_at, relation_at = 3 + len(relation_words), 1, 4 + len(relation_words), 2
        places = [*range(word_at, word_at + len(words)), *range(relation_at, relation_at + len(relation_words))]
        return ids, soft, hidden, places

    def fitting_length(self, rows: LinkRows, limit: int, share: float = 0.98) -> int:
        """The shortest multiple of 8, at most `limit`, that holds `share` of the rows' sentences whole."""
        entity = np.array([len(words) for words in self.entity])
        relation = np.array([len(words) for words in self.relation])
        lengths = 5 + entity[rows.head] + relation[rows.relation % len(relation)]
        return int(min(limit, -(-np.quantile(lengths, share) // 8) * 8))


class TextLinkSource:
    """Batches in words over a `LinkSource`.

    `withhold`: the share of named heads whose vectors are left out, so that words alone learn to answer too.
    `mask_share`: of the words, for the masked language model; 0.8 / 0.1 / 0.1 are masked, replaced, kept.
    """

    def __init__(self, links: LinkSource, words: TripleWords, *, length: int, withhold: float, mask_share: float):
        self.links, self.words, self.length = links, words, length
        self.withhold, self.mask_share = withhold, mask_share
        self.num_masked = max(1, round(mask_share * length))

    def __len__(self) -> int:
        return len(self.links)

    def __getitem__(self, step: int) -> TextLinkBatch:
        links = self.links[step]
        return encode_queries(links, self.words, self.length, withhold=self.withhold, mask_share=self.mask_share,
                              num_masked=self.num_masked, rng=np.random.default_rng([self.links.seed, 29, step]))


def encode_queries(links: LinkBatch, words: TripleWords, length: int, *, withhold: float = 0.0, mask_share: float = 0.0,
                   num_masked: int = 1, rng: np.random.Generator | None = None) -> TextLinkBatch:
    """The queries of `links` in words, [B, length]; without `rng` no word is masked.

    `withhold` is the share of heads that are known by their words alone (without `rng`: 0 or 1, unnamed heads too).
    """
    size = len(links.head)
    ids, mask = np.full((size, length), words.pad, np.int32), np.zeros((size, length), np.int32)
    soft_at, hidden_at = np.zeros((size, 1), np.int32), np.zeros((size, 1), np.int32)
    positions, targets = np.zeros((size, num_masked), np.int32), np.zeros((size, num_masked), np.int32)
    weight = np.zeros((size, num_masked), np.float32)
    for row, (head, relation) in enumerate(zip(links.head.tolist(), links.relation.tolist(), strict=True)):
        sentence, soft, hidden, places = words.sentence(head, relation, length)
        ids[row, :len(sentence)] = sentence
        mask[row, :len(sentence)] = 1
        soft_at[row], hidden_at[row] = soft, hidden
        if withhold >= 1 if rng is None else len(words.entity[head]) and rng.random() < withhold:
            soft_at[row], mask[row, soft] = -1, 0
        if rng is None:
            continue
        chosen = [place for place in places if rng.random() < mask_share]
        if len(chosen) > num_masked:
            chosen = rng.permutation(chosen)[:num_masked].tolist()
        for k, place in enumerate(chosen):
            positions[row, k], targets[row, k], weight[row, k] = place, ids[row, place], 1.0
            draw = rng.random()
            if draw < 0.9:
                ids[row, place] = words.mask if draw < 0.8 else rng.integers(words.vocab_size)
    if rng is not None:
        weight *= links.weight.any(axis=1)[:, None]  # a padded row teaches nothing
    return TextLinkBatch(links, ids, mask, soft_at, hidden_at, positions, targets, weight)
