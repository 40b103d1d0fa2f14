"""Link prediction by rules: every tail that a rule derives, and which rules say so of one triple."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

import numpy as np
import scipy.sparse as sp

from kgrec_jax.data.dataset import Graph
from kgrec_jax.errors import KgrecError
from kgrec_jax.linear.link_index import LinkIndex, chunks, ranges
from kgrec_jax.linear.rule_counts import CHUNK
from kgrec_jax.linear.rules import Rules

TIE = 1e-3  # how far further rules may lift a tail beyond its best rule


@dataclasses.dataclass(frozen=True)
class RuleScoreConfig:
    """How rules that derive the same triple add up."""

    aggregation: Literal["max", "noisy-or"] = "max"  # the surest rule, further ones break ties; or all as independent
    unseen: float = 5.0  # confidence is support / (body + unseen): a rule seen three times is less sure than its 3 of 3


@dataclasses.dataclass(frozen=True)
class Support:
    """One rule that derives a triple."""

    rule: int  # row of Rules
    groundings: tuple[int, ...]  # entities z of its body; empty for a body of one atom
    confidence: float  # standard confidence


class RuleScorer:
    """Scores of all tails of (h, r, ?), r of 2R, by the rules over a graph's training triples.

    With "max" a score is the confidence of the surest rule plus up to `TIE` for all others together, which approximates
    the lexicographic comparison of AnyBURL (Meilicke et al. 2019). With "noisy-or" it is −log Π (1 − confidence), so
    1 − exp(−score) is the probability; it orders as the probability does and does not saturate. What no rule derives
    scores 0, and an entity is never its own tail.
    """

    def __init__(self, rules: Rules, graph: Graph, cfg: RuleScoreConfig = RuleScoreConfig()):
        if rules.num_relations != graph.num_relations:
            raise KgrecError(f"rules: found rules over {rules.num_relations} relations for a graph of "
                             f"{graph.num_relations}, expected those mined from it")
        if cfg.unseen < 0:
            raise KgrecError(f"unseen: found {cfg.unseen}, expected a number of at least 0")
        self.rules, self.graph, self.index, self.cfg = rules, graph, LinkIndex.of(graph), cfg
        weight = rules.support / np.maximum(rules.body + cfg.unseen, 1)
        self._weight = np.minimum(weight, 1 - 1e-6)  # a rule without an exception is still no proof
        constant = rules.head_constant >= 0
        self._paths = _groups(np.flatnonzero(~constant), rules.head, rules.num_relations)
        self._constants = _groups(np.flatnonzero(constant), rules.head, 2 * rules.num_relations)

    def scores(self, heads: np.ndarray, relations: np.ndarray) -> np.ndarray:
        """[B, N] float32 for heads [B] and relations [B] of 2R; a `ScoreBlock` of link prediction."""
        return self.sparse(heads, relations).toarray()

    def sparse(self, heads: np.ndarray, relations: np.ndarray) -> sp.csr_matrix:
        """The same scores as sparse rows [B, N] float32: the derived tails alone, stated ones included."""
        heads, relations = np.asarray(heads, np.int64), np.asarray(relations, np.int64)
        n, r = self.index.num_entities, self.index.num_relations
        if len(heads) and not (0 <= heads.min() and heads.max() < n and 0 <= relations.min() < 2 * r > relations.max()):
            raise KgrecError(f"rules: found heads up to {heads.max()} and relations up to {relations.max()}, expected "
                             f"entities below {n} and relations below {2 * r} (inverses included)")
        rows, columns, values = [], [], []
        for relation in np.unique(relations):
            where = np.flatnonzero(relations == relation)
            own, place = np.unique(heads[where], return_inverse=True)
            matrix = self._of_relation(own, int(relation))[place].tocoo()
            rows.append(where[matrix.row])
            columns.append(matrix.col)
            values.append(matrix.data)
        joined = [np.concatenate([np.zeros(0, t), *parts]) for t, parts in
                  ((np.int64, rows), (np.int64, columns), (np.float32, values))]
        return sp.csr_matrix((joined[2].astype(np.float32), (joined[0], joined[1])), shape=(len(heads), n))

    def probability(self, scores: np.ndarray) -> np.ndarray:
        """Scores as probabilities, 0 to 1: of the surest rule, or with "noisy-or" of any rule."""
        return -np.expm1(-scores) if self.cfg.aggregation == "noisy-or" else np.minimum(scores, 1.0)

    def _of_relation(self, heads: np.ndarray, relation: int) -> sp.csr_matrix:
        """[b, N] scores of distinct heads for one relation."""
        n = self.index.num_entities
        held, waiting = (np.zeros(0, np.int64), np.zeros(0), np.zeros(0)), []
        for row, tail, rule in self._derived(heads, relation):
            true = tail != heads[row]
            weight = self._weight[rule[true]]
            waiting.append((row[true] * n + tail[true], weight, -np.log1p(-weight)))
            if sum(len(part[0]) for part in waiting) > CHUNK:
                held, waiting = _aggregate([held, *waiting]), []
        held = _aggregate([held, *waiting])
        key, best, evidence = held
        values = evidence if self.cfg.aggregation == "noisy-or" else best + TIE * evidence / (1 + evidence)
        return sp.csr_matrix((values.astype(np.float32), (key // n, key % n)), shape=(len(heads), n))

    def _derived(self, heads: np.ndarray, relation: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Chunks of (row of heads, tail, rule), each combination once."""
        first, second, rules = self._bodies(relation)
        for cut in chunks(np.full(len(heads), max(len(rules), 1)), CHUNK):
            rows = np.arange(cut.start, cut.stop)
            row, rule = np.repeat(rows, len(rules)), np.tile(np.arange(len(rules)), len(rows))
            at, z = self.index.follow(first[rule], heads[row])
            row, rule = row[at], rule[at]
            short = second[rule] < 0
            yield row[short], z[short].astype(np.int64), rules[rule[short]]
            row, rule, z = row[~short], rule[~short], z[~short]
            yield from self._second_steps(row, rule, z, second, rules)
            yield self._from_facts(heads, rows, relation)
            yield from self._to_facts(heads, rows, relation)

    def _second_steps(self, row: np.ndarray, rule: np.ndarray, z: np.ndarray, second: np.ndarray,
                      rules: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        n, k = self.index.num_entities, len(rules)
        start = np.flatnonzero(np.append(True, (row[1:] != row[:-1]) | (rule[1:] != rule[:-1]))) if len(row) else row
        widths = np.add.reduceat(self.index.count(second[rule], z), start) if len(row) else row
        ends = np.append(start, len(row))
        for cut in chunks(widths, CHUNK):
            some = slice(ends[cut.start], ends[cut.stop])
            at, y = self.index.follow(second[rule[some]], z[some])
            key = np.unique((row[some][at] * k + rule[some][at]) * n + y)
            yield key // n // k, key % n, rules[key // n % k]

    def _bodies(self, relation: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(first [k], second [k], rule [k]) of the rules with two variables, read from the head of `relation`."""
        r, index = self.index.num_relations, self.index
        rules = self._paths[relation % r]
        first, second = self.rules.first[rules].astype(np.int64), self.rules.second[rules].astype(np.int64)
        if relation < r:
            return first, second, rules
        short = second < 0
        return index.inverse(np.where(short, first, second)), np.where(short, -1, index.inverse(first)), rules

    def _from_facts(self, heads: np.ndarray, rows: np.ndarray, relation: int) -> tuple[np.ndarray, ...]:
        """(row, c′, rule) of first(x, c) ⇒ relation(x, c′), x the head."""
        rules, n = self._constants[relation], self.index.num_entities
        if not len(rules):
            return (np.zeros(0, np.int64),) * 3
        codes = self.rules.first[rules].astype(np.int64) * (n + 1) + self.rules.body_constant[rules] + 1
        order = np.argsort(codes, kind="stable")
        row, said, constant = self.index.facts_of(heads[rows])
        facts = said.astype(np.int64) * (n + 1)
        # Each fact s(x, c), and s(x, any) once.
        facts, row = np.concatenate([facts + constant + 1, facts]), np.concatenate([row, row])
        unique = np.unique(row * ((n + 1) * 2 * self.index.num_relations) + facts)
        row, facts = np.divmod(unique, (n + 1) * 2 * self.index.num_relations)
        low, high = (np.searchsorted(codes[order], facts, side) for side in ("left", "right"))
        rule = rules[order[ranges(low, high - low)]]
        return rows[np.repeat(row, high - low)], self.rules.head_constant[rule].astype(np.int64), rule

    def _to_facts(self, heads: np.ndarray, rows: np.ndarray, relation: int) -> Iterator[tuple[np.ndarray, ...]]:
        """(row, x, rule) of first(x, c) ⇒ head(x, c′), c′ the head of the query and its relation head's inverse."""
        rules, index = self._constants[self.index.inverse(relation)], self.index
        constants = self.rules.head_constant[rules]
        order = np.argsort(constants, kind="stable")
        low, high = (np.searchsorted(constants[order], heads[rows], side) for side in ("left", "right"))
        rule, row = rules[order[ranges(low, high - low)]], np.repeat(rows, high - low)
        stated = self.rules.body_constant[rule] >= 0
        at, x = index.follow(index.inverse(self.rules.first[rule[stated]]), self.rules.body_constant[rule[stated]])
        yield row[stated][at], x.astype(np.int64), rule[stated][at]
        for r, k in zip(row[~stated], rule[~stated], strict=True):
            x = np.unique(index.step(int(self.rules.first[k]))[0]).astype(np.int64)
            yield np.full(len(x), r), x, np.full(len(x), k)

    def support_of(self, triples: np.ndarray, limit: int = 0) -> list[list[Support]]:
        """For each of `triples` [T, 3] (relations of R) the rules that derive it, the surest first; at most `limit`.

        A triple is never among the reasons for itself. No limit: 0.
        """
        return [self._support(int(h), int(r), int(t), limit) for h, r, t in self.index.check(triples)]

    def words(self, triple: np.ndarray, support: Support) -> str:
        """One reason for a triple in names: its body as it holds here, the rule, and how often that was right.

        `director(Alien, Ridley) ∧ spouse(Ridley, Ann); director(x, z) ∧ spouse(z, y) ⇒ producer(x, y) 0.83 (41 of 49)`
        """
        middle = support.groundings[0] if support.groundings else -1
        holds = self.rules.grounding(support.rule, self.graph, int(triple[0]), int(triple[2]), middle)
        more = f" and {len(support.groundings) - 1} more" if len(support.groundings) > 1 else ""
        return f"{holds}{more}; {self.rules.text(support.rule, self.graph)} {self.rules.number(support.rule)}"

    def lines(self, triples: np.ndarray) -> list[str]:
        """The words of the surest rule for each of `triples` [T, 3], "" where no rule derives it."""
        some = self.support_of(triples, limit=1)
        return [self.words(t, s[0]) if s else "" for t, s in zip(np.asarray(triples).reshape(-1, 3), some, strict=True)]

    def _support(self, head: int, relation: int, tail: int, limit: int) -> list[Support]:
        if head == tail:
            return []
        found: dict[int, list[int]] = {}
        first, second, rules = self._bodies(relation)
        at, z = self.index.follow(first, np.full(len(rules), head))
        short = second[at] < 0
        for k in at[short & (z == tail)]:
            found[int(rules[k])] = []
        at, z = at[~short], z[~short]
        met = self.index.has(second[at], z, np.full(len(z), tail))
        for k, middle in zip(at[met], z[met], strict=True):
            found.setdefault(int(rules[k]), []).append(int(middle))
        r = self.index.num_relations
        for x, said, constant in ((head, relation, tail), (tail, relation + r, head)):
            _, ends, rule = self._from_facts(np.array([x]), np.zeros(1, np.int64), said)
            found |= {int(k): [] for k in rule[ends == constant]}
        order = sorted(found)  # rules are sorted, the surest first
        return [Support(k, tuple(found[k]), float(self.rules.confidence[k])) for k in order[:limit or None]]


def _groups(rules: np.ndarray, head: np.ndarray, num_groups: int) -> list[np.ndarray]:
    """`rules` by their head relation, in their order."""
    order = rules[np.argsort(head[rules], kind="stable")]
    return np.split(order, np.searchsorted(head[order], np.arange(1, num_groups)))


def _aggregate(parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(distinct keys, largest weight, sum of evidence) of parts (key, weight, evidence)."""
    key, weight, evidence = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(key, kind="stable")
    key, start = key[order], np.flatnonzero(np.append(True, np.diff(key[order]) != 0)) if len(key) else order
    return (key[start], np.maximum.reduceat(weight[order], start) if len(key) else weight,
            np.add.reduceat(evidence[order], start) if len(key) else evidence)
