"""Horn rules of a knowledge graph with their confidence: mined without training, exact, and readable.

    first(x, y) ⇒ head(x, y)        first(x, z) ∧ second(z, y) ⇒ head(x, y)        first(x, c) ⇒ head(x, c′)

in every direction of their relations (row r + R walks r backwards). A rule has support (pairs for which body and head
both hold), standard confidence (support over pairs for which the body holds), PCA confidence (the same over those of
them whose x has any fact of the head's relation: Galárraga et al., "AMIE", WWW 2013) and head coverage (support over
the facts that its head matches). x, y and z are distinct; a triple from an entity to itself takes no part. Rules whose
head stands in the body are none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from kgrec_jax.data.dataset import Graph
from kgrec_jax.errors import KgrecError
from kgrec_jax.linear.link_index import LinkIndex
from kgrec_jax.linear.rule_counts import Bodies, Facts, path_supports, step_supports


@dataclasses.dataclass(frozen=True)
class RuleConfig:
    """Which rules are kept, and how much is spent on a body."""

    max_length: int = 2  # atoms of a body with variables alone: 1 or 2
    min_support: int = 5
    min_confidence: float = 0.05  # standard confidence, from 0 to 1
    min_pca_confidence: float = 0.0
    min_head_coverage: float = 0.0
    constants: Literal["on", "off"] = "on"  # also first(x, c) ⇒ head(x, c′), and first(x, any) ⇒ head(x, c′)
    bodies_per_constant: int = 100  # rules kept for each head(x, c′), the surest first
    max_paths: int = 50_000_000  # paths of one body; a larger one is estimated from a part of its x, and said to be
    seed: int = 0  # of that part


@dataclasses.dataclass(frozen=True)
class Rules:
    """Mined rules as columns, the surest first. Relations are rows of 2R."""

    head: np.ndarray  # [n] int32, below R where the head has two variables
    first: np.ndarray  # [n] int32
    second: np.ndarray  # [n] int32, -1 where the body is one atom
    body_constant: np.ndarray  # [n] int32 entity c, -1: any, or a rule of variables alone
    head_constant: np.ndarray  # [n] int32 entity c′, -1: the rule has variables alone
    support: np.ndarray  # [n] int64
    body: np.ndarray  # [n] int64 pairs (x, y), or x, for which the body holds
    closed_body: np.ndarray  # [n] int64 those of them whose x has any fact of the head's relation
    facts: np.ndarray  # [n] int64 facts that the head matches
    estimated: np.ndarray  # [n] bool: body and closed_body come from a part of the x
    num_relations: int  # R, without inverses

    def __len__(self) -> int:
        return len(self.head)

    @property
    def confidence(self) -> np.ndarray:
        """[n] standard confidence."""
        return self.support / np.maximum(self.body, 1)

    @property
    def pca_confidence(self) -> np.ndarray:
        """[n] confidence under the partial completeness assumption."""
        return self.support / np.maximum(self.closed_body, 1)

    @property
    def head_coverage(self) -> np.ndarray:
        """[n] share of the head's facts that the rule explains."""
        return self.support / np.maximum(self.facts, 1)

    def take(self, index: np.ndarray) -> Rules:
        """The rules that `index` (integers or a mask) selects, in its order."""
        columns = {f.name: getattr(self, f.name)[index] for f in dataclasses.fields(self) if f.name != "num_relations"}
        return Rules(**columns, num_relations=self.num_relations)

    def text(self, rule: int, graph: Graph) -> str:
        """`director(x, z) ∧ spouse(z, y) ⇒ producer(x, y)`, with names."""
        if self.head_constant[rule] >= 0:
            constant = int(self.body_constant[rule])
            body = [atom(graph, int(self.first[rule]), "x", entity_name(graph, constant) if constant >= 0 else "any")]
            head = atom(graph, int(self.head[rule]), "x", entity_name(graph, int(self.head_constant[rule])))
        else:
            body = _body(self, rule, graph, "x", "z", "y")
            head = atom(graph, int(self.head[rule]), "x", "y")
        return f"{' ∧ '.join(body)} ⇒ {head}"

    def grounding(self, rule: int, graph: Graph, head: int, tail: int, middle: int = -1) -> str:
        """The body for one triple, `director(Alien, Ridley Scott) ∧ spouse(Ridley Scott, Giannina Facio)`."""
        if self.head_constant[rule] >= 0:
            constant = int(self.body_constant[rule])
            x = head if self.head_constant[rule] == tail else tail
            end = entity_name(graph, constant) if constant >= 0 else "any"
            return atom(graph, int(self.first[rule]), entity_name(graph, x), end)
        names = [entity_name(graph, e) if e >= 0 else "" for e in (head, middle, tail)]
        return " ∧ ".join(_body(self, rule, graph, *names))

    def number(self, rule: int) -> str:
        """`0.83 (41 of 49)`; with "about" where the body was estimated."""
        about = "about " if self.estimated[rule] else ""
        return f"{about}{self.confidence[rule]:.2f} ({self.support[rule]:,} of {about}{self.body[rule]:,})"


def entity_name(graph: Graph, entity: int) -> str:
    """An entity's name, its id where it has none."""
    return graph.entity_names[entity] or graph.entity_ids[entity]


def atom(graph: Graph, relation: int, start: str, end: str) -> str:
    """`relation(start, end)`, turned round for a relation walked backwards."""
    name = graph.relation_names[relation % graph.num_relations]
    return f"{name}({start}, {end})" if relation < graph.num_relations else f"{name}({end}, {start})"


def _body(rules: Rules, rule: int, graph: Graph, x: str, z: str, y: str) -> list[str]:
    first, second = int(rules.first[rule]), int(rules.second[rule])
    return [atom(graph, first, x, y)] if second < 0 else [atom(graph, first, x, z), atom(graph, second, z, y)]


def check(cfg: RuleConfig) -> None:
    """Raises KgrecError where a threshold is out of its range."""
    if cfg.max_length not in (1, 2):
        raise KgrecError(f"max_length: found {cfg.max_length}, expected 1 or 2")
    for name in ("min_support", "bodies_per_constant", "max_paths"):
        if getattr(cfg, name) < 1:
            raise KgrecError(f"{name}: found {getattr(cfg, name)}, expected a whole number of at least 1")
    for name in ("min_confidence", "min_pca_confidence", "min_head_coverage"):
        if not 0 <= getattr(cfg, name) <= 1:
            raise KgrecError(f"{name}: found {getattr(cfg, name)}, expected a share from 0 to 1")


def mine_rules(graph: Graph, cfg: RuleConfig = RuleConfig()) -> Rules:
    """All rules of the training triples that pass the thresholds of `cfg`, the surest first.

    Counts are exact, but for bodies of more than `max_paths` paths, which are marked as estimated. Time goes with the
    triangles of the graph and the sizes of the bodies that may pass. Raises KgrecError for thresholds out of range.
    """
    check(cfg)
    index = LinkIndex.of(graph)
    parts = [_steps(index)]
    if cfg.max_length == 2:
        parts.append(_paths(index, cfg))
    if cfg.constants == "on":
        parts.append(_implications(index, cfg))
    columns = {f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(Rules)
               if f.name != "num_relations"}
    rules = Rules(**columns, num_relations=graph.num_relations)
    rules = rules.take((rules.support >= cfg.min_support) & (rules.confidence >= cfg.min_confidence)
                       & (rules.pca_confidence >= cfg.min_pca_confidence)
                       & (rules.head_coverage >= cfg.min_head_coverage))
    names = (rules.head_constant, rules.body_constant, rules.second, rules.first, rules.head)
    return rules.take(np.lexsort((*names, -rules.support, -rules.confidence)))


def _steps(index: LinkIndex) -> Rules:
    """first(x, y) ⇒ head(x, y)."""
    keys, support = step_supports(index)
    head, first = np.divmod(keys, 2 * index.num_relations)
    body, facts = np.diff(index.step_starts)[first], np.diff(index.step_starts)[head]
    closed, weight = np.zeros(len(keys), np.int64), np.zeros(index.num_entities, np.int64)
    for k, (r, s) in enumerate(zip(head.tolist(), first.tolist(), strict=True)):
        x, count = np.unique(index.step(s)[0], return_counts=True)
        closed[k] = _inside(weight, x, count, np.unique(index.step(r)[0]))
    return _table(index, head, first, support, body, closed, facts)


def _inside(weight: np.ndarray, x: np.ndarray, count: np.ndarray, domain: np.ndarray) -> int:
    """Σ of the counts of those x that are in `domain`; `weight` [N] is a scratch of zeros."""
    weight[x] = count
    total = int(weight[domain].sum())
    weight[x] = 0
    return total


def _paths(index: LinkIndex, cfg: RuleConfig) -> Rules:
    """first(x, z) ∧ second(z, y) ⇒ head(x, y), those that reach the confidence.

    A body and its reverse are one product: the rows of one are the columns of the other.
    """
    twice = 2 * index.num_relations
    keys, support = path_supports(index, cfg.min_support)
    head, body_code = np.divmod(keys, twice * twice)
    first, second = np.divmod(body_code, twice)
    reverse = index.inverse(second) * twice + index.inverse(first)
    turned = reverse < body_code
    order = np.argsort(np.where(turned, reverse, body_code), kind="stable")
    codes, starts = np.unique(np.where(turned, reverse, body_code)[order], return_index=True)
    bodies = Bodies(index, cfg.max_paths, cfg.seed)
    domains = [np.unique(index.step(r)[0]) for r in range(index.num_relations)]
    weight = np.zeros(index.num_entities, np.int64)
    size, closed, estimated = np.zeros(len(keys), np.int64), np.zeros(len(keys), np.int64), np.zeros(len(keys), bool)
    for code, members in zip(codes.tolist(), np.split(order, starts[1:]) if len(codes) else [], strict=True):
        one, two = divmod(code, twice)
        # Both bounds are of one size: the pairs of a body are those of its reverse. A rounding error drops no rule.
        most = support[members].max() / max(cfg.min_confidence, 1e-9) * (1 + 1e-9)
        if bodies.at_least(one, two) > most or bodies.at_least(index.inverse(two), index.inverse(one)) > most:
            continue
        x, y, share = bodies.pairs(one, two)
        size[members], estimated[members] = round(len(x) / share), share < 1
        for side, ends in ((False, x), (True, y)):
            some = members[turned[members] == side]
            if len(some) and len(ends):
                entities, count = np.unique(ends, return_counts=True)
                for k in some:
                    closed[k] = round(_inside(weight, entities, count, domains[head[k]]) / share)
    kept = size > 0
    facts = np.diff(index.step_starts)[head]
    return _table(index, head[kept], first[kept], support[kept], size[kept], closed[kept], facts[kept],
                  second=second[kept], estimated=estimated[kept])


def _implications(index: LinkIndex, cfg: RuleConfig) -> Rules:
    """first(x, c) ⇒ head(x, c′)."""
    facts = Facts(index, cfg.min_support)
    body, head, support, closed = facts.implications(cfg.min_support, cfg.min_confidence, cfg.bodies_per_constant).T
    return _table(index, facts.relation[head], facts.relation[body], support, facts.count[body], closed,
                  facts.count[head], body_constant=facts.constant[body], head_constant=facts.constant[head])


def _table(index: LinkIndex, head: np.ndarray, first: np.ndarray, support: np.ndarray, body: np.ndarray,
           closed: np.ndarray, facts: np.ndarray, **others: np.ndarray) -> Rules:
    none = np.full(len(head), -1)
    ids: Sequence[np.ndarray] = (head, first, *(others.get(n, none) for n in ("second", "body_constant",
                                                                             "head_constant")))
    counts = (np.asarray(c, np.int64) for c in (support, body, closed, facts))
    return Rules(*(np.asarray(i, np.int32) for i in ids), *counts,
                 others.get("estimated", np.zeros(len(head), bool)), index.num_relations)
