"""Batches of the bi-encoder of the graph stage: queries and entities in words, each text near its own length.

Batches are a function of (seed, step) alone, so that a run resumes exactly where it stopped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from kgrec_jax.data.link_batches import LinkRows, LinkSource
from kgrec_jax.evaluation.link_prediction import KnownTails

Rungs = tuple[tuple[int, int], ...]  # (rows, tokens a row), shortest texts first
Write = Callable[[int, int], list[int]]  # (row, length) -> at most `length` token ids


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Texts:
    """B texts sorted by length and cut into rungs, so that short texts are not padded to the longest."""

    ids: tuple[np.ndarray, ...]  # a rung each, [rows, L] int32
    mask: tuple[np.ndarray, ...]  # a rung each, [rows, L] int32
    place: np.ndarray  # [B] int32, where text b stands in the rungs laid end to end


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BiEncoderBatch:
    """Queries with one answer in words, further answers and rivals from the bank; row weight 0 is padding."""

    queries: Texts  # B texts of (head, relation)
    answers: Texts  # B texts, one known tail of each query
    refreshed: Texts  # F texts of entities whose rows of the bank are to be renewed
    head: np.ndarray  # [B] int32
    answer: np.ndarray  # [B] int32, the entity of each answer text
    refreshed_id: np.ndarray  # [F] int32
    tails: np.ndarray  # [B, T] int32, the other known tails
    tail_weight: np.ndarray  # [B, T] float32, 0 is padding
    weight: np.ndarray  # [B] float32
    rivals: np.ndarray  # [C] int32 rows of the bank; [0] where all are rivals
    blocked: np.ndarray  # [B, C or rows of the bank] bool, no rivals of this query: its known tails, all answers
    blocked_answers: np.ndarray  # [B, B] bool, answer texts that are no rivals of this query
    self_rival: np.ndarray  # [B] bool, the head itself is a rival


@dataclasses.dataclass(frozen=True)
class BiWords:
    """Word ids of entities and of relations in both directions, and the encoder's special tokens."""

    entity: Sequence[Sequence[int]]  # N lists, empty where an entity has no text
    relation: Sequence[Sequence[int]]  # 2R lists, r + R: the inverse of r
    cls: int
    sep: int
    pad: int

    def entity_text(self, entity: int, length: int) -> list[int]:
        """"[CLS] words [SEP]", at most `length` ids."""
        return [self.cls, *self.entity[entity][:length - 2], self.sep]

    def query_text(self, head: int, relation: int, length: int) -> list[int]:
        """"[CLS] head's words [SEP] relation's words [SEP]", at most `length` ids; the head's words are cut first."""
        relation_words = self.relation[relation][:max(length - 3, 0)]
        return [self.cls, *self.entity[head][:max(length - 3 - len(relation_words), 0)], self.sep, *relation_words,
                self.sep]

    def entity_lengths(self, entities: np.ndarray, limit: int) -> np.ndarray:
        """Tokens of each entity's text, [n]."""
        return np.minimum([2 + len(self.entity[e]) for e in entities], limit)

    def query_lengths(self, heads: np.ndarray, relations: np.ndarray, limit: int) -> np.ndarray:
        """Tokens of each query's text, [n]."""
        return np.minimum([3 + len(self.entity[h]) + len(self.relation[r])
                           for h, r in zip(heads, relations, strict=True)], limit)


def make_rungs(lengths: np.ndarray, batch: int, rungs: int, devices: int, limit: int) -> Rungs:
    """Rungs of equal numbers of rows that hold almost any batch of texts whose `lengths` are like these.

    Each is as long as the quantile of its longest text, and a little longer for the luck of the draw. There are fewer
    where the rows of a batch do not divide by `rungs` · `devices`.
    """
    number = max(k for k in range(1, rungs + 1) if k == 1 or batch % (k * devices) == 0)
    slack = 1.5 / np.sqrt(batch)  # three standard deviations of a median
    tops = [np.quantile(lengths, min(1.0, (k + 1) / number + slack)) for k in range(number)]
    return tuple((batch // number, int(min(limit, -(-top // 2) * 2))) for top in tops)


def lay_out(lengths: np.ndarray, write: Write, rungs: Rungs, pad: int) -> Texts:
    """The texts `write(row, …)` of all rows, shortest first; one that its rung cannot hold is written shorter."""
    order = np.argsort(lengths, kind="stable")
    place = np.empty(len(order), np.int32)
    place[order] = np.arange(len(order))
    all_ids, all_mask, start = [], [], 0
    for rows, length in rungs:
        ids, mask = write_rows(order[start:start + rows], write, rows, length, pad)
        all_ids.append(ids)
        all_mask.append(mask)
        start += rows
    return Texts(tuple(all_ids), tuple(all_mask), place)


def write_rows(chosen: np.ndarray, write: Write, rows: int, length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, mask), both [rows, length] int32: the texts `write(row, length)` of the chosen rows, then empty ones."""
    ids, mask = np.full((rows, length), pad, np.int32), np.zeros((rows, length), np.int32)
    for k, row in enumerate(chosen.tolist()):
        tokens = write(row, length)
        ids[k, :len(tokens)], mask[k, :len(tokens)] = tokens, 1
    return ids, mask


def readable_rows(rows: LinkRows, words: BiWords) -> LinkRows:
    """The query rows without tails that have no text; a row that has none left is dropped."""
    named = np.array([bool(w) for w in words.entity], bool)
    weight = np.where(named[rows.tails], rows.weight, np.float32(0))
    kept = weight.any(axis=1)
    return LinkRows(rows.head[kept], rows.relation[kept], rows.tails[kept], weight[kept])


class BiEncoderSource:
    """Batches in words over a `LinkSource`, whose rows all have a tail with a text.

    `known` are the training triples' answers, which are never rivals. `seen` [S] are the entities in the bank:
    `refresh` of them, in turn, are encoded anew each step. At most `rivals` rows of the bank are judged a step, drawn
    for the whole batch where there are more; `bank_rows` are the rows of the bank with its padding.
    """

    def __init__(self, links: LinkSource, words: BiWords, known: KnownTails, seen: np.ndarray, *, length: int,
                 rungs: int, refresh: int, rivals: int, self_negatives: bool, bank_rows: int, devices: int):
        self.links, self.words, self.known, self.seen, self.length = links, words, known, seen, length
        self.self_negatives, self.bank_rows = self_negatives, bank_rows
        refresh, rivals = (-(-number // devices) * devices for number in (refresh, rivals))  # as many for each device
        self.refresh, self.drawn = refresh, rivals if rivals < len(seen) else 0
        rows = links.rows
        entity_lengths = words.entity_lengths(seen, length)
        self.query_rungs = make_rungs(words.query_lengths(rows.head, rows.relation, length), links.batch, rungs,
                                      devices, length)
        self.answer_rungs = make_rungs(entity_lengths, links.batch, rungs, devices, length)
        self.refresh_rungs = make_rungs(entity_lengths, refresh, rungs, devices, length) if refresh else ()

    def __len__(self) -> int:
        return len(self.links)

    @property
    def tokens(self) -> tuple[int, int]:
        """Padded tokens of a step: (trained, only encoded)."""
        trained = sum(rows * length for rows, length in (*self.query_rungs, *self.answer_rungs))
        return trained, sum(rows * length for rows, length in self.refresh_rungs)

    def __getitem__(self, step: int) -> BiEncoderBatch:
        links = self.links[step]
        rng = np.random.default_rng([self.links.seed, 41, step])
        answer, others = _draw_answers(links.tails, links.weight, rng)
        weight = links.weight.any(axis=1).astype(np.float32)
        refreshed = self.seen[(step * self.refresh + np.arange(self.refresh)) % len(self.seen)].astype(np.int32)
        row, tail = self.known.pairs(links.head, links.relation)
        rivals, blocked = self._rivals(links.head, answer, row, tail, rng)
        blocked_answers = _blocked_answers(answer, weight, row, tail, self.bank_rows)
        own = links.head[:, None] == answer[None, :]
        known_self = np.zeros(len(answer), bool)
        known_self[row[tail == links.head[row]]] = True
        if not self.self_negatives:
            blocked_answers |= own
        self_rival = self.self_negatives & ~known_self & ~(own & (weight > 0)[None, :]).any(axis=1)
        return BiEncoderBatch(
            self.query_texts(links.head, links.relation, self.query_rungs),
            self.entity_texts(answer, self.answer_rungs), self.entity_texts(refreshed, self.refresh_rungs), links.head,
            answer, refreshed, links.tails, others, weight, rivals, blocked, blocked_answers, self_rival)

    def query_texts(self, heads: np.ndarray, relations: np.ndarray, rungs: Rungs) -> Texts:
        """The texts of queries, laid out."""
        lengths = self.words.query_lengths(heads, relations, self.length)
        return lay_out(lengths, lambda row, length: self.words.query_text(heads[row], relations[row], length), rungs,
                       self.words.pad)

    def entity_texts(self, entities: np.ndarray, rungs: Rungs) -> Texts:
        """The texts of entities, laid out."""
        lengths = self.words.entity_lengths(entities, self.length)
        return lay_out(lengths, lambda row, length: self.words.entity_text(entities[row], length), rungs,
                       self.words.pad)

    def _rivals(self, head: np.ndarray, answer: np.ndarray, row: np.ndarray, tail: np.ndarray,
                rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(rivals [C], blocked [B, C]): known tails, the answers (they are there afresh) and the head are blocked."""
        rivals, column = np.zeros(0, np.int32), np.arange(self.bank_rows)
        width = self.bank_rows
        if self.drawn:
            rivals = np.sort(rng.choice(self.seen, self.drawn, replace=False)).astype(np.int32)
            width = self.drawn
            column = np.full(self.bank_rows, -1)
            column[rivals] = np.arange(self.drawn)
        blocked = np.zeros((len(head), width + 1), bool)  # the last column takes what was not drawn
        blocked[row, column[tail]] = True
        blocked[:, column[answer]] = True
        blocked[np.arange(len(head)), column[head]] = True
        return rivals, blocked[:, :width]


def _draw_answers(tails: np.ndarray, weight: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(one tail of each row [B], the weights [B, T] of the others)."""
    draw = np.where(weight > 0, rng.random(weight.shape), -1.0)
    slot = draw.argmax(axis=1)
    at = np.arange(len(tails))
    others = weight.copy()
    others[at, slot] = 0.0
    return tails[at, slot], others


def _blocked_answers(answer: np.ndarray, weight: np.ndarray, row: np.ndarray, tail: np.ndarray,
                     rows: int) -> np.ndarray:
    """[B, B] bool: answer j is known of query b, is its own, or belongs to padding."""
    batch = len(answer)
    pair = np.arange(batch)[:, None] * rows + answer[None, :]
    blocked = np.isin(pair, row.astype(np.int64) * rows + tail)
    blocked |= np.eye(batch, dtype=bool) | (weight == 0)[None, :]
    return blocked
