"""Missing triples proposed and known ones doubted, with the probabilities of `serving.plausibility`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from kgrec_jax.data.dataset import Graph
from kgrec_jax.errors import KgrecError
from kgrec_jax.evaluation.calibration import Calibrator
from kgrec_jax.evaluation.link_prediction import KnownTails, ScoreBlock
from kgrec_jax.evaluation.triple_features import FEATURES, triple_features
from kgrec_jax.linear.rules import atom, entity_name
from kgrec_jax.serving.candidates import Search, candidates, likely_queries
from kgrec_jax.serving.slots import Slots
from kgrec_jax.tracking import Tracker

PARTS = ("train", "valid", "test")
_RANKS = (FEATURES.index("tail log rank"), FEATURES.index("head log rank"))
_SCORE = FEATURES.index("tail score")
_CHUNK = 4096  # known triples that are weighed at once

Reasons = Callable[[np.ndarray], Sequence[str]]  # triples [n, 3] -> a line for each, "" where there is nothing to say


@dataclasses.dataclass(frozen=True)
class Statement:
    """A triple with its probability."""

    head: int
    relation: int
    tail: int
    probability: float
    score: float
    tail_rank: float  # of the tail among the unknown answers of (head, relation, ?), 1 is best
    head_rank: float  # of the head among those of (?, relation, tail)
    part: str  # "train", "valid" or "test" of a known triple, "" of a proposal
    rule: str  # the rule that derives it, "" without one
    reason: str  # the nearest known fact of a proposal; what speaks against a known triple; "" without any

    @property
    def triple(self) -> tuple[int, int, int]:
        """(head, relation, tail)."""
        return self.head, self.relation, self.tail


@dataclasses.dataclass(frozen=True)
class Completer:
    """A scored graph: what it takes to calibrate, propose and doubt."""

    graph: Graph
    part: np.ndarray  # [T] int8 of graph.triples: 0 train, 1 valid, 2 test
    score_block: ScoreBlock
    tracker: Tracker
    vectors: np.ndarray | None = None  # [N, D] entity vectors, to find the nearest known fact

    def triples(self, *parts: int) -> np.ndarray:
        """[n, 3] triples of some parts."""
        return self.graph.triples[np.isin(self.part, parts)]

    def known(self, *parts: int) -> KnownTails:
        """The answers in some parts."""
        return KnownTails.of(self.triples(*parts), self.graph.num_relations)

    def slots(self, *parts: int) -> Slots:
        """The slots in some parts."""
        return Slots.of(self.triples(*parts), self.graph.num_entities, self.graph.num_relations)

    def features(self, triples: np.ndarray, known: KnownTails,
                 advance: Callable[[int], None] | None = None) -> np.ndarray:
        """Features [n, 8] of triples [n, 3]."""
        return triple_features(self.score_block, triples, known=known, num_entities=self.graph.num_entities,
                               advance=advance)

    def keys(self, triples: np.ndarray) -> np.ndarray:
        """[n] int64, one number a triple; divided by N one a query."""
        head, relation, tail = triples.astype(np.int64).reshape(-1, 3).T
        return (head * self.graph.num_relations + relation) * self.graph.num_entities + tail

    def propose(self, calibrator: Calibrator, queries: Mapping[int, np.ndarray] | None = None, *, top: int = 50,
                min_probability: float = 0.0, search: Search = Search(), missing_share: float = 0.0,
                rules: Reasons | None = None) -> list[Statement]:
        """The `top` most probable triples that no part knows, the most probable first.

        `queries`: {relation: heads} to ask; None: all that are likely. `missing_share`: of all facts, known and
        missing, the share that is believed to be missing; 0: as many as the validation part has. Probabilities are a
        lower bound where at least so many are missing (see `serving.plausibility`). `rules`: what says which rule
        derives a triple.
        """
        known, slots = self.known(0, 1, 2), self.slots(0, 1, 2)
        queries = likely_queries(slots, search) if queries is None else queries
        shift = self.prior_shift(missing_share)
        best = (np.zeros((0, 3), np.int32), np.zeros((0, len(FEATURES))), np.zeros(0))
        with self.tracker.progress("queries", sum(map(len, queries.values()))) as bar:
            for asked in candidates(self.score_block, queries, known=known, slots=slots, search=search,
                                    num_entities=self.graph.num_entities, advance=bar.advance):
                features = self.features(asked, known)
                p = calibrator.probabilities(features, asked[:, 1], shift)
                likely = p >= min_probability
                best = _best_of(best, (asked[likely], features[likely], p[likely]), top, falling=True)
        lines = [""] * len(best[0]) if rules is None else rules(best[0])
        near = [self.nearest_fact(*(int(x) for x in triple), known) for triple in best[0]]
        return _statements(best, [""] * len(lines), lines, near)

    def doubtful(self, calibrator: Calibrator, *, relations: Sequence[int] = (), heads: Sequence[int] = (),
                 top: int = 50, contradicted: Reasons | None = None) -> list[Statement]:
        """The `top` known triples with the lowest probability of being true, the lowest first.

        `relations` and `heads`: only triples with these, where given. `contradicted`: what speaks against triples
        otherwise. Leave-one-out would need a training for each: of a training triple the scorer has seen that it is
        stated, so its probability is too high; what stands low all the same does not fit the rest.
        """
        kept = np.ones(len(self.part), bool)
        for column, wanted in ((1, relations), (0, heads)):
            if len(wanted):
                kept &= np.isin(self.graph.triples[:, column], wanted)
        triples, part = self.graph.triples[kept], self.part[kept]
        known = self.known(0, 1, 2)
        order = np.lexsort((triples[:, 0], triples[:, 1]))
        best = (np.zeros((0, 3), np.int32), np.zeros((0, len(FEATURES))), np.zeros(0))
        with self.tracker.progress("triples", 2 * len(triples)) as bar:
            for start in range(0, len(order), _CHUNK):
                some = triples[order[start:start + _CHUNK]]
                features = self.features(some, known, bar.advance)
                p = calibrator.probabilities(features, some[:, 1])
                best = _best_of(best, (some, features, p), top, falling=False)
        part_of = dict(zip(self.keys(triples).tolist(), part.tolist(), strict=True))
        against = [""] * len(best[0]) if contradicted is None else contradicted(best[0])
        parts = [PARTS[part_of[key]] for key in self.keys(best[0]).tolist()]
        return _statements(best, parts, [""] * len(parts), against)

    def answers(self, triple: np.ndarray, known: KnownTails) -> tuple[np.ndarray, np.ndarray]:
        """(known tails of (h, r), known heads of (r, t))."""
        h, r, t = (np.array([x], np.int32) for x in triple)
        return known.pairs(h, r)[1], known.pairs(t, r + np.int32(self.graph.num_relations))[1]

    def nearest_fact(self, head: int, relation: int, tail: int, known: KnownTails) -> str:
        """The known fact that differs in one end, by the most similar entity (cosine of vectors); "" without one."""
        if self.vectors is None:
            return ""
        tails, heads = self.answers(np.array([head, relation, tail]), known)
        ways = [(others, self._cosine(own, others), is_tail)
                for own, others, is_tail in ((head, heads, False), (tail, tails, True)) if len(others)]
        if not ways:
            return ""
        others, similar, is_tail = max(ways, key=lambda way: way[1].max())
        other = entity_name(self.graph, int(others[similar.argmax()]))
        ends = (entity_name(self.graph, head), other) if is_tail else (other, entity_name(self.graph, tail))
        return f"like {atom(self.graph, relation, *ends)}"

    def _cosine(self, entity: int, others: np.ndarray) -> np.ndarray:
        own, rows = self.vectors[entity], self.vectors[others]
        return rows @ own / np.maximum(np.linalg.norm(rows, axis=1) * np.linalg.norm(own), 1e-12)

    def prior_shift(self, missing_share: float) -> float:
        """Log of how many times more facts are missing than the validation part has; 0 for a share of 0."""
        if not missing_share:
            return 0.0
        if not 0 < missing_share < 1:
            raise KgrecError(f"missing_share: found {missing_share}, expected a share from 0 to below 1")
        missing = missing_share / (1 - missing_share) * len(self.part)
        return math.log(missing / max(int((self.part == 1).sum()), 1))


_Weighed = tuple[np.ndarray, np.ndarray, np.ndarray]  # triples [n, 3], features [n, 8], probabilities [n]


def _best_of(a: _Weighed, b: _Weighed, count: int, falling: bool) -> _Weighed:
    """The `count` of both with the highest (falling) or lowest probability; ties by head, relation, tail."""
    triples, features, p = (np.concatenate(pair) for pair in zip(a, b, strict=True))
    order = np.lexsort((triples[:, 2], triples[:, 1], triples[:, 0], -p if falling else p))[:count]
    return triples[order], features[order], p[order]


def _statements(weighed: _Weighed, parts: Sequence[str], rules: Sequence[str],
                reasons: Sequence[str]) -> list[Statement]:
    ranks = np.round(2 * np.exp(weighed[1][:, _RANKS])) / 2  # a rank among ties may end in a half
    return [Statement(int(t[0]), int(t[1]), int(t[2]), float(p), float(f[_SCORE]), float(r[0]), float(r[1]), *more)
            for t, f, p, r, *more in zip(*weighed, ranks, parts, rules, reasons, strict=True)]

