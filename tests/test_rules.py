"""Rules of a graph against brute force over sets of facts, and what is scored, explained and doubted by them."""

import dataclasses
import itertools

import numpy as np
import pytest

from kgrec_jax.data.dataset import Graph
from kgrec_jax.errors import KgrecError
from kgrec_jax.evaluation.link_prediction import KnownTails, evaluate_link_prediction
from kgrec_jax.linear import rule_counts
from kgrec_jax.linear.link_index import LinkIndex, chunks, ranges
from kgrec_jax.linear.rule_checks import CheckConfig, TripleChecker, implied_facts
from kgrec_jax.linear.rule_scorer import TIE, RuleScoreConfig, RuleScorer
from kgrec_jax.linear.rules import RuleConfig, mine_rules

ALL = RuleConfig(min_support=1, min_confidence=0.0, bodies_per_constant=10**6)


def make_graph(triples, relations, num_entities, num_items=0, names=None):
    triples = np.array(sorted(set(map(tuple, triples))), np.int32).reshape(-1, 3)
    names = names or [f"e{k}" for k in range(num_entities)]
    return Graph(tuple(f"id{k}" for k in range(num_entities)), tuple(names), ("",) * num_entities, tuple(relations),
                 tuple(relations), triples, num_items, np.zeros(len(triples), np.int8))


def random_graph(seed, num_entities=14, num_relations=3, count=60):
    """Random triples, loops among them, with some of r0 reversed in r1 so that there are sure rules too."""
    rng = np.random.default_rng(seed)
    triples = np.stack([rng.integers(0, high, count) for high in (num_entities, num_relations, num_entities)], 1)
    copied = triples[(triples[:, 1] == 0) & (rng.random(count) < 0.8)]
    triples = np.concatenate([triples, np.stack([copied[:, 2], copied[:, 1] + 1, copied[:, 0]], 1)])
    return make_graph(triples.tolist(), [f"r{k}" for k in range(num_relations)], num_entities)


def steps_of(graph):
    """{relation of 2R: set of (x, y)}, without an entity's edges to itself."""
    r = graph.num_relations
    out = {s: set() for s in range(2 * r)}
    for h, k, t in graph.triples[graph.part == 0].tolist():
        if h != t:
            out[k].add((h, t))
            out[k + r].add((t, h))
    return out


def path_body(steps, first, second):
    if second < 0:
        return set(steps[first])
    return {(x, y) for x, z in steps[first] for w, y in steps[second] if z == w and x != y}


def brute_paths(graph):
    """{(head, first, second): (support, body, closed body, facts)} of all rules with two variables and support."""
    steps, r, out = steps_of(graph), graph.num_relations, {}
    for head, first, second in itertools.product(range(r), range(2 * r), range(-1, 2 * r)):
        if second < 0 and first == head:
            continue
        body = path_body(steps, first, second)
        domain = {x for x, _ in steps[head]}
        support = len(body & steps[head])
        if support:
            out[head, first, second] = support, len(body), sum(x in domain for x, _ in body), len(steps[head])
    return out


def holders(steps, relation, constant):
    return {x for x, c in steps[relation] if constant in (-1, c)}


def brute_constants(graph):
    """{(head, first, c, c′): the same counts} of all rules first(x, c) ⇒ head(x, c′); c = -1 for any."""
    steps, n, out = steps_of(graph), graph.num_entities, {}
    for head, first, c, end in itertools.product(steps, steps, range(-1, n), range(n)):
        if c == end or (c == -1 and first == head):
            continue
        body, heads = holders(steps, first, c), holders(steps, head, end)
        if body & heads:
            closed = len(body & holders(steps, head, -1))
            out[head, first, c, end] = len(body & heads), len(body), closed, len(heads)
    return out


def counts_of(rules):
    return zip(rules.support.tolist(), rules.body.tolist(), rules.closed_body.tolist(), rules.facts.tolist())


def mined_paths(rules):
    rules = rules.take(rules.head_constant < 0)
    return dict(zip(zip(rules.head.tolist(), rules.first.tolist(), rules.second.tolist()), counts_of(rules)))


def mined_constants(rules):
    rules = rules.take(rules.head_constant >= 0)
    return dict(zip(zip(rules.head.tolist(), rules.first.tolist(), rules.body_constant.tolist(),
                        rules.head_constant.tolist()), counts_of(rules)))


@pytest.mark.parametrize("seed", range(3))
def test_every_rule_and_count_is_that_of_brute_force(seed):
    graph = random_graph(seed)
    rules = mine_rules(graph, ALL)
    assert mined_paths(rules) == brute_paths(graph)
    assert mined_constants(rules) == brute_constants(graph)
    assert len(rules) == len(brute_paths(graph)) + len(brute_constants(graph))
    assert not rules.estimated.any() and (np.diff(rules.confidence) <= 0).all()


def test_the_size_of_the_chunks_changes_nothing(monkeypatch):
    graph = random_graph(3)
    whole = mine_rules(graph, ALL)
    scores = RuleScorer(whole, graph).scores(np.arange(14), np.arange(14) % 6)
    for module in ("rule_counts", "rule_scorer"):
        monkeypatch.setattr(f"kgrec_jax.linear.{module}.CHUNK", 7)
    pieces = mine_rules(graph, ALL)
    for field in dataclasses.fields(whole):
        np.testing.assert_array_equal(getattr(pieces, field.name), getattr(whole, field.name))
    np.testing.assert_allclose(RuleScorer(pieces, graph).scores(np.arange(14), np.arange(14) % 6), scores, rtol=1e-6)


@pytest.mark.parametrize("field, value", [("min_confidence", 0.4), ("min_pca_confidence", 0.5), ("min_support", 4),
                                          ("min_head_coverage", 0.3)])
def test_thresholds_keep_exactly_what_reaches_them(field, value):
    graph = random_graph(4)
    numbers = {"min_confidence": lambda s, b, c, f: s / b, "min_pca_confidence": lambda s, b, c, f: s / c,
               "min_support": lambda s, b, c, f: s, "min_head_coverage": lambda s, b, c, f: s / f}[field]
    rules = mine_rules(graph, dataclasses.replace(ALL, **{field: value}))
    for mined, expected in ((mined_paths(rules), brute_paths(graph)), (mined_constants(rules),
                                                                      brute_constants(graph))):
        kept = {key: counts for key, counts in expected.items() if numbers(*counts) >= value}
        assert mined == kept and 0 < len(kept) < len(expected)


@pytest.mark.parametrize("seed", range(10, 13))
def test_a_rule_at_the_threshold_itself_is_kept(seed):
    graph = random_graph(seed)
    paths, constants = brute_paths(graph), brute_constants(graph)
    for value in sorted({support / body for support, body, _, _ in paths.values()})[::3]:
        rules = mine_rules(graph, dataclasses.replace(ALL, min_confidence=value))
        assert mined_paths(rules) == {k: c for k, c in paths.items() if c[0] / c[1] >= value}
        assert mined_constants(rules) == {k: c for k, c in constants.items() if c[0] / c[1] >= value}


@pytest.mark.parametrize("seed", range(3))
def test_bodies_are_bounded_from_below_without_a_product(seed):
    graph = random_graph(seed)
    bodies, steps, tight = rule_counts.Bodies(LinkIndex.of(graph), 10**9, 0), steps_of(graph), 0
    for first, second in itertools.product(range(6), repeat=2):
        body = path_body(steps, first, second)
        x, y, share = bodies.pairs(first, second)
        assert set(zip(x.tolist(), y.tolist())) == body and len(x) == len(body) and share == 1.0
        bound = bodies.at_least(first, second)
        assert bound <= len(body)
        tight += bound > len(body) / 3
    assert tight > 20  # it would prune something


def test_short_bodies_and_no_constants_on_request():
    graph = random_graph(5)
    rules = mine_rules(graph, dataclasses.replace(ALL, max_length=1, constants="off"))
    assert mined_paths(rules) == {k: v for k, v in brute_paths(graph).items() if k[2] < 0}
    assert len(rules) == len(mined_paths(rules))


def test_the_surest_bodies_of_a_constant_are_kept():
    graph = random_graph(6)
    rules = mine_rules(graph, dataclasses.replace(ALL, bodies_per_constant=2))
    by_head: dict = {}
    for (head, _, _, end), (support, body, _, _) in brute_constants(graph).items():
        by_head.setdefault((head, end), []).append((support / body, support))
    mined: dict = {}
    for (head, _, _, end), (support, body, _, _) in mined_constants(rules).items():
        mined.setdefault((head, end), []).append((support / body, support))
    assert {k: sorted(v)[-2:] for k, v in by_head.items()} == {k: sorted(v) for k, v in mined.items()}


def planted():
    """Forty films with a director; half of the directors' spouses produce the film; friends in both directions."""
    films, directors, spouses = range(40), range(40, 60), range(60, 80)
    triples = [(f, 0, 40 + f % 20) for f in films]
    triples += [(d, 1, s) for d, s in zip(directors, spouses)]
    triples += [(f, 2, 60 + f % 20) for f in films if f % 20 < 10] + [(f, 2, 79) for f in films if f % 20 == 15]
    triples += [(a, 3, b) for a, b in itertools.permutations(range(60, 66), 2)][:-3]
    return make_graph(triples, ["director", "spouse", "producer", "friend"], 80, 40)


def test_planted_rules_are_found_with_their_numbers_and_said_in_words():
    graph = planted()
    rules = mine_rules(graph, RuleConfig(min_confidence=0.4))
    texts = {rules.text(k, graph): k for k in range(len(rules))}
    path = texts["director(x, z) ∧ spouse(z, y) ⇒ producer(x, y)"]
    assert rules.number(path) == "0.50 (20 of 40)"
    assert rules.pca_confidence[path] == 20 / 22 and rules.head_coverage[path] == 20 / 22
    friend = texts["friend(y, x) ⇒ friend(x, y)"]
    assert (rules.support[friend], rules.body[friend]) == (24, 27)
    assert not any(text.startswith("friend(x, y) ⇒") for text in texts)
    assert rules.grounding(path, graph, 0, 60, 40) == "director(e0, e40) ∧ spouse(e40, e60)"


def test_a_body_of_too_many_paths_is_estimated_and_says_so(monkeypatch):
    monkeypatch.setattr(rule_counts, "SAMPLED_ROWS", 20)
    rng = np.random.default_rng(0)
    triples = [(x, 0, 400 + int(z)) for x in range(400) for z in rng.choice(30, 3, replace=False)]
    triples += [(400 + z, 1, 430 + int(y)) for z in range(30) for y in rng.choice(60, 8, replace=False)]
    triples += [(x, 2, 430 + x % 60) for x in range(0, 400, 2)]
    graph = make_graph(triples, ["a", "b", "c"], 490)
    cfg = RuleConfig(min_confidence=0.0, constants="off")
    exact, rough = mine_rules(graph, cfg), mine_rules(graph, dataclasses.replace(cfg, max_paths=3000))
    assert rough.estimated.any() and not exact.estimated.any()
    held = mined_paths(exact)
    for key, (support, body, closed, facts) in mined_paths(rough).items():
        assert (support, facts) == (held[key][0], held[key][3])  # never estimated
        assert body == pytest.approx(held[key][1], rel=0.15) and closed == pytest.approx(held[key][2], rel=0.3)
    k = int(np.flatnonzero(rough.estimated)[0])
    assert rough.number(k).startswith("about ") and "of about" in rough.number(k)
    again = mine_rules(graph, dataclasses.replace(cfg, max_paths=3000))
    np.testing.assert_array_equal(again.body, rough.body)


def derivations(graph, rules):
    """{(h, relation of 2R, t): list of rule rows}, by brute force over all rules."""
    steps, r, out = steps_of(graph), graph.num_relations, {}
    for k in range(len(rules)):
        head, first, second = int(rules.head[k]), int(rules.first[k]), int(rules.second[k])
        if rules.head_constant[k] < 0:
            pairs = path_body(steps, first, second)
        else:
            end = int(rules.head_constant[k])
            pairs = {(x, end) for x in holders(steps, first, int(rules.body_constant[k])) if x != end}
        for x, y in pairs:
            out.setdefault((x, head, y), []).append(k)
            out.setdefault((y, (head + r) % (2 * r), x), []).append(k)
    return out


@pytest.mark.parametrize("aggregation", ["max", "noisy-or"])
def test_scores_are_those_of_brute_force(aggregation):
    graph = random_graph(7)
    rules = mine_rules(graph, dataclasses.replace(ALL, min_confidence=0.3, min_support=2))
    scorer = RuleScorer(rules, graph, RuleScoreConfig(aggregation, unseen=2.0))
    heads, relations = (g.ravel() for g in np.meshgrid(np.arange(14), np.arange(6), indexing="ij"))
    expected = np.zeros((len(heads), 14))
    for (x, relation, y), some in derivations(graph, rules).items():
        weight = rules.support[some] / (rules.body[some] + 2.0)
        evidence = -np.log1p(-weight).sum()
        value = evidence if aggregation == "noisy-or" else weight.max() + TIE * evidence / (1 + evidence)
        expected[x * 6 + relation, y] = value
    shuffle = np.random.default_rng(0).permutation(len(heads))
    found = scorer.scores(heads[shuffle], relations[shuffle])
    assert found.dtype == np.float32 and (expected > 0).sum() > 100
    np.testing.assert_allclose(found, expected[shuffle], rtol=1e-5)
    top = scorer.probability(found).max()
    assert 0 < top <= 1
    assert scorer.sparse(np.zeros(0, int), np.zeros(0, int)).shape == (0, 14)


def test_support_of_names_every_rule_that_derives_a_triple():
    graph = random_graph(8)
    rules = mine_rules(graph, dataclasses.replace(ALL, min_confidence=0.2, min_support=2))
    scorer, steps = RuleScorer(rules, graph), steps_of(graph)
    derived = derivations(graph, rules)
    triples = np.array(list(itertools.product(range(14), range(3), range(14))))
    for (h, r, t), some in zip(triples.tolist(), scorer.support_of(triples), strict=True):
        assert [s.rule for s in some] == sorted(set(derived.get((h, r, t), [])))
        for s in some:
            second = int(rules.second[s.rule])
            if second >= 0:
                first = int(rules.first[s.rule])
                assert set(s.groundings) == {z for z in range(14) if (h, z) in steps[first] and (z, t) in steps[second]}
                assert len(s.groundings) == len(set(s.groundings)) > 0
            else:
                assert s.groundings == ()
    assert all(len(some) <= 1 for some in scorer.support_of(triples, limit=1))


def test_a_proposed_triple_is_explained_by_its_best_rule_in_names():
    graph = planted()
    scorer = RuleScorer(mine_rules(graph, RuleConfig(min_confidence=0.4)), graph)
    some = scorer.support_of(np.array([(15, 2, 75)]))[0]  # film 15, whose director's spouse is 75
    best = some[0]
    assert scorer.rules.text(best.rule, graph) == "director(x, z) ∧ spouse(z, y) ⇒ producer(x, y)"
    assert best.groundings == (55,) and best.confidence == 0.5
    assert scorer.lines(np.array([(15, 2, 75), (15, 2, 3)])) == [
        "director(e15, e55) ∧ spouse(e55, e75); director(x, z) ∧ spouse(z, y) ⇒ producer(x, y) 0.50 (20 of 40)", ""]


def test_link_prediction_takes_the_scorer_and_finds_what_is_planted():
    graph = planted()
    held = np.array([(f, 2, 60 + f % 20) for f in (0, 1, 2)], np.int32)
    left = graph.triples[~(graph.triples[:, None] == held[None]).all(-1).any(-1)]
    graph = dataclasses.replace(graph, triples=np.concatenate([left, held]),
                                part=np.array([0] * len(left) + [2] * 3, np.int8))
    rules = mine_rules(graph, RuleConfig(min_confidence=0.3))
    found = evaluate_link_prediction(RuleScorer(rules, graph).scores, held, num_entities=80,
                                     known=KnownTails.of(graph.triples, 4))
    assert found["tail/mrr"] == 1.0 and found["mrr"] > 0.7


def test_a_second_tail_of_a_functional_relation_is_doubtful():
    triples = [(x, 0, 50 + x % 9) for x in range(50)] + [(x, 1, 60 + y) for x in range(50) for y in range(2)]
    graph = make_graph(triples, ["born in", "likes"], 64)
    asked = np.array([(0, 0, 51), (0, 0, 50), (0, 1, 62)])
    doubts = TripleChecker(graph).contradicted(asked)
    assert [[d.kind for d in some] for some in doubts] == [["functional"], [], []]
    assert doubts[0][0].entities == (50,) and doubts[0][0].share == 1.0
    assert doubts[0][0].text(graph, asked[0]) == "born in has one tail for 100% of its heads, here e50 already"
    # A stated second tail is doubtful by the other one, in a graph that is functional but for it.
    stated = make_graph([*triples, (0, 0, 51)], ["born in", "likes"], 64)
    assert [len(d) for d in TripleChecker(stated).contradicted(asked[:2])] == [1, 1]
    assert not any(TripleChecker(stated, CheckConfig(functional=0.99)).contradicted(asked))


def test_an_end_of_a_foreign_kind_is_doubtful():
    people, towns, films = range(30), range(30, 60), range(60, 100)
    triples = [(p, 0, 30 + (p + k) % 30) for p in people for k in range(2)] + [(f, 1, f % 30) for f in films]
    triples += [(f, 1, (f + 7) % 30) for f in films] + [(t, 2, 100) for t in towns]
    graph = make_graph(triples, ["lives in", "starring", "country"], 101)
    asked = np.array([(0, 0, 61), (62, 0, 30), (0, 0, 35), (3, 0, 100)])
    doubts = TripleChecker(graph).contradicted(asked)
    assert [[d.kind for d in some] for some in doubts[:3]] == [["range"], ["domain"], []]
    assert TripleChecker(graph).lines(asked[[0, 2]]) == [
        "e61 is a head of starring, and 0.0% of those are a tail of lives in", ""]
    # The same two stated: what they alone claim speaks for neither.
    graph = make_graph([*triples, *map(tuple, asked[:2].tolist())], ["lives in", "starring", "country"], 101)
    assert [[d.kind for d in some] for some in TripleChecker(graph).contradicted(asked[:3])] == [["range"], ["domain"],
                                                                                                []]


def test_implied_facts_are_new_sure_and_shared():
    graph = planted()
    scorer = RuleScorer(mine_rules(graph, RuleConfig(min_confidence=0.4)), graph, RuleScoreConfig(unseen=0.0))
    implied = implied_facts(scorer, 40, min_confidence=0.45)
    steps, dense = steps_of(graph), implied.matrix.toarray()
    assert dense.shape == (40, len(implied.columns))
    rows, columns = np.nonzero(dense)
    assert all((i, int(implied.columns[c, 1])) not in steps[int(implied.columns[c, 0])] for i, c in zip(rows, columns))
    assert ((dense > 0).sum(0) >= 2).all() and dense[dense > 0].min() >= 0.45 and dense.max() <= 1
    column = [k for k, c in enumerate(implied.columns.tolist()) if c == [2, 71]]
    assert len(column) == 1 and set(np.flatnonzero(dense[:, column[0]])) == {11, 31}
    np.testing.assert_allclose(dense[[11, 31], column[0]], scorer.probability(scorer.scores([11, 31], [2, 2]))[:, 71])
    assert implied_facts(scorer, 0).matrix.shape == (0, 0)


def test_graphs_without_triples_or_with_loops_alone_have_no_rules():
    for triples in ([], [(0, 0, 0), (1, 0, 1)]):
        graph = make_graph(triples, ["r"], 3)
        rules = mine_rules(graph, ALL)
        scorer = RuleScorer(rules, graph)
        assert len(rules) == 0 and not scorer.scores(np.array([0]), np.array([1])).any()
        assert scorer.support_of(np.array([(0, 0, 1)])) == [[]]
        assert TripleChecker(graph).contradicted(np.array([(0, 0, 1)])) == [()]


def test_held_out_triples_are_not_mined():
    graph = random_graph(9)
    part = (np.arange(len(graph.triples)) % 5 == 0).astype(np.int8)
    parted = dataclasses.replace(graph, part=part)
    assert mined_paths(mine_rules(parted, ALL)) == brute_paths(parted) != brute_paths(graph)


def test_bad_input_is_said():
    graph = random_graph(0)
    for change, words in (({"min_confidence": 1.5}, "min_confidence: found 1.5, expected a share"),
                          ({"min_support": 0}, "min_support: found 0"),
                          ({"max_length": 3}, "found 3, expected 1 or 2")):
        with pytest.raises(KgrecError, match=words):
            mine_rules(graph, dataclasses.replace(ALL, **change))
    rules = mine_rules(graph, ALL)
    with pytest.raises(KgrecError, match="unseen: found -1"):
        RuleScorer(rules, graph, RuleScoreConfig(unseen=-1.0))
    with pytest.raises(KgrecError, match="3 relations for a graph of 2"):
        RuleScorer(rules, random_graph(0, num_relations=2))
    scorer = RuleScorer(rules, graph)
    for heads, relations in (([14], [0]), ([0], [6]), ([-1], [0])):
        with pytest.raises(KgrecError, match="entities below 14 and relations below 6"):
            scorer.scores(np.array(heads), np.array(relations))
    for ask in (scorer.support_of, TripleChecker(graph).contradicted):
        with pytest.raises(KgrecError, match="entities below 14 and relations below 3"):
            ask(np.array([(0, 3, 1)]))
    with pytest.raises(KgrecError, match="type_share: found 2"):
        TripleChecker(graph, CheckConfig(type_share=2))
    with pytest.raises(KgrecError, match="num_items: found 15"):
        implied_facts(scorer, 15)


def test_pieces_of_ranges():
    assert ranges(np.array([5, 9, 2]), np.array([2, 0, 3])).tolist() == [5, 6, 2, 3, 4]
    assert chunks(np.array([3, 3, 9, 0, 1]), 6) == [slice(0, 2), slice(2, 3), slice(3, 5)]
    assert LinkIndex.of(random_graph(1)).pairs_of(np.array([0]), np.array([0])).tolist() == [-1]


@pytest.fixture
def folder(tmp_path):
    rows = [f"{h}\t{r}\t{t}" for h, r, t in planted().triples[:, [0, 1, 2]].tolist()]
    (tmp_path / "triples.tsv").write_text("head_id\trelation\ttail_id\n" + "\n".join(rows) + "\n")
    (tmp_path / "relations.tsv").write_text(
        "relation\tname\n0\tdirector\n1\tspouse\n2\tproducer\n3\tfriend\n")
    return tmp_path


def test_the_command_prints_and_writes_the_rules(folder, capsys):
    from kgrec_jax.data_commands import main

    out = folder / "rules.out.tsv"
    assert main(["rules", str(folder), "--min-confidence", "0.4", "--out", str(out), "--relation", "producer"]) == 0
    printed = capsys.readouterr().out
    assert "     0.50  0.91       20    90.9%  director(x, z) ∧ spouse(z, y) ⇒ producer(x, y)" in printed
    lines = out.read_text().splitlines()
    header, rows = lines[0].split("\t"), [line.split("\t") for line in lines[1:]]
    row = dict(zip(header, next(r for r in rows if r[0].startswith("director(x, z)"))))
    assert (row["support"], row["body"], row["closed_body"], row["confidence"]) == ("20", "40", "22", "0.5")
    assert all("⇒ producer" in r[0] for r in rows)


@pytest.mark.parametrize("argv, words", [
    (["--min-confidence", "2"], "--min-confidence: found '2', expected a share"),
    (["--max-length", "3"], "max_length: found 3, expected 1 or 2"),
    (["--relation", "nobody"], "--relation: found 'nobody', expected one of the graph's relations, such as 'director'"),
    (["--out", "no/such/folder/x.tsv"], "--out: found no folder at no/such/folder")])
def test_the_command_says_what_is_wrong(folder, argv, words):
    from kgrec_jax.data_commands import main

    with pytest.raises(KgrecError, match=words):
        main(["rules", str(folder), *argv])
