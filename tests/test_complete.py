"""`kgrec complete` in a planted world: what is missing is proposed first and at its probability, lies stand out."""

import csv
import dataclasses
import json
import types

import jax.numpy as jnp
import numpy as np
import pytest

from kgrec_jax import cli, pipeline
from kgrec_jax.config import Experiment
from kgrec_jax.data.folder import DataConfig
from kgrec_jax.evaluation.link_prediction import KnownTails
from kgrec_jax.evaluation.reliability import calibration_metrics
from kgrec_jax.serving import plausibility
from kgrec_jax.serving.candidates import Search, candidates, likely_queries, some_queries
from kgrec_jax.serving.graph_run import find, open_run
from kgrec_jax.serving.plausibility import CalibrationConfig, calibrate, held_calibration, proposal_examples
from kgrec_jax.serving.slots import Slots
from kgrec_jax.stages import graph as stage
from kgrec_jax.stages import pretrain

GROUPS, MEMBERS = 6, 9
RELATIONS = ("knows", "sees", "hears")
N = GROUPS * MEMBERS


def write_world(folder, given_split=True):
    """Groups whose members are all linked to all members of one other group by each relation.

    Of these facts 8 % are valid, 8 % test, and 8 % are written nowhere; 16 lies of right types are among the others,
    half of them in train. Returns (missing, lies) as sets of id triples.
    """
    rng = np.random.default_rng(0)
    shift = {"knows": 1, "sees": 2, "hears": 4}
    facts = [(f"e{a}", r, f"e{b}") for r in RELATIONS for a in range(N) for b in range(N)
             if b // MEMBERS == (a // MEMBERS + shift[r]) % GROUPS]
    facts = [facts[k] for k in rng.permutation(len(facts))]
    cut = round(0.08 * len(facts))
    missing, valid, test, train = facts[:cut], facts[cut:2 * cut], facts[2 * cut:3 * cut], facts[3 * cut:]
    true, lies = set(facts), []
    while len(lies) < 16:
        lie = (f"e{rng.integers(N)}", RELATIONS[rng.integers(3)], f"e{rng.integers(N)}")
        if lie not in true and lie not in lies and lie[0] != lie[2]:
            lies.append(lie)
    parts = {"train": train + lies[:8], "valid": valid, "test": test + lies[8:]}
    if not given_split:
        parts = {"": [t for part in parts.values() for t in part]}
    folder.mkdir()
    for part, triples in parts.items():
        rows = "".join("\t".join(t) + "\n" for t in triples)
        (folder / (f"triples.{part}.tsv" if part else "triples.tsv")).write_text("head_id\trelation\ttail_id\n" + rows)
    names = "".join(f"e{k}\t{'twin' if k in (3, 4) else f'Name {k}'}\n" for k in range(N))
    (folder / "entities.tsv").write_text("entity_id\tname\n" + names)
    return set(missing), set(lies)


def experiment(path, **graph):
    cfg = stage.Config(**{"dim": 32, "steps": 300, "batch": 128, "encoder_mode": "off", "n3": 0.05, **graph})
    return Experiment(name="world", data=DataConfig(path=str(path)), graph=cfg, pretrain=pretrain.Config(mode="off"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(run folder, missing, lies) of a run that stopped after the graph stage."""
    folder = tmp_path_factory.mktemp("complete")
    missing, lies = write_world(folder / "data")
    pipeline.run(experiment(folder / "data"), folder / "run", quiet=True, until="graph")
    return folder / "run", missing, lies


@pytest.fixture(scope="module")
def scored(trained):
    return open_run(trained[0], quiet=True)


@pytest.fixture(scope="module")
def calibration(scored):
    return calibrate(scored)


def named(scored, statement):
    g = scored.graph
    return g.entity_ids[statement.head], g.relation_ids[statement.relation], g.entity_ids[statement.tail]


# --- the planted world --------------------------------------------------------------------------------------------


def test_missing_facts_are_proposed_first_at_their_probability(trained, scored, calibration):
    _, missing, _ = trained
    found = scored.propose(calibration.proposals, top=2 * len(missing))
    right = np.array([named(scored, s) in missing for s in found])
    p = np.array([s.probability for s in found])
    assert right[:50].mean() > 0.95 and right.sum() > 0.85 * len(missing)
    assert (np.diff(p) <= 0).all()
    # The validation part has as many facts as are written nowhere, and the latter count as wrong there: half of what
    # looks like a fact is one of the former. So the probability is a lower bound, everywhere.
    assert 0.35 < p[:50].mean() < 0.65
    for cut in np.array_split(np.arange(len(p)), 6):
        assert right[cut].mean() > p[cut].mean() - 0.05
    known = {tuple(t) for t in scored.graph.triples.tolist()}
    assert not known & {s.triple for s in found} and len({s.triple for s in found}) == len(found)
    assert all(s.reason.startswith("like ") and s.part == "" for s in found[:20])


def test_probabilities_hold_on_the_test_part(calibration):
    facts, proposals = calibration.measured["facts"], calibration.measured["proposals"]
    assert facts["ece"] < 0.08 and facts["auc"] > 0.9 and facts["positives"] == facts["examples"] / 2
    assert proposals["ece"] < 0.05 and proposals["auc"] > 0.9


def test_where_nothing_else_is_missing_probabilities_are_those_of_the_proposals(trained, scored):
    _, missing, lies = trained
    g = scored.graph
    rows = {name: k for k, name in enumerate(g.entity_ids)}, {name: k for k, name in enumerate(g.relation_ids)}
    more = np.array([[rows[0][h], rows[1][r], rows[0][t]] for h, r, t in sorted(missing)], np.int32)
    whole = dataclasses.replace(scored, graph=dataclasses.replace(g, triples=np.concatenate([g.triples, more])),
                                part=np.append(scored.part, np.zeros(len(more), np.int8)))
    made = calibrate(whole)
    assert made.measured["proposals"]["precision@0.8"] > 0.9 and made.measured["proposals"]["ece"] < 0.03
    # The test part is what this graph lacks: as many facts as the validation part has, and no others.
    hidden = {named(scored, _triple(t)) for t in whole.triples(2)}
    kept = whole.part < 2
    lacking = dataclasses.replace(whole, graph=dataclasses.replace(g, triples=whole.graph.triples[kept]),
                                  part=whole.part[kept])
    found = lacking.propose(made.proposals, top=2 * len(hidden))
    p, right = np.array([s.probability for s in found]), np.array([named(scored, s) in hidden for s in found])
    assert right[:60].mean() > 0.95 and right.sum() > 0.8 * len(hidden - lies)
    assert calibration_metrics(p, right)["ece"] < 0.06
    assert (p >= 0.8).sum() > 0.6 * len(hidden) and right[p >= 0.8].mean() > 0.9


def _triple(row):
    return types.SimpleNamespace(head=row[0], relation=row[1], tail=row[2])


def test_lies_are_flagged(trained, scored, calibration):
    _, _, lies = trained
    found = scored.doubtful(calibration.facts, top=16, contradicted=lambda triples: ["why"] * len(triples))
    flagged = [named(scored, s) for s in found]
    assert sum(t in lies for t in flagged) >= 14
    p = np.array([s.probability for s in found])
    assert (np.diff(p) >= 0).all() and p[:8].max() < 0.2
    part = {tuple(t): ("train", "valid", "test")[k] for t, k in zip(scored.graph.triples.tolist(), scored.part)}
    assert all(part[s.triple] == s.part and s.reason == "why" for s in found)
    only = scored.doubtful(calibration.facts, relations=[1], heads=[5, 6], top=1000)
    assert {s.triple for s in only} == {tuple(t) for t in scored.graph.triples.tolist() if t[1] == 1 and t[0] in (5, 6)}


def test_more_missing_facts_make_every_proposal_likelier(scored, calibration):
    usual, more = (scored.propose(calibration.proposals, top=30, missing_share=s) for s in (0.0, 0.5))
    assert all(b.probability >= a.probability for a, b in zip(usual, more))
    assert more[-1].probability > usual[-1].probability
    valid, odds = int((scored.part == 1).sum()), [s.probability / (1 - s.probability) for s in (usual[20], more[20])]
    assert odds[1] / odds[0] == pytest.approx(len(scored.part) / valid, rel=1e-6)


# --- what is asked ------------------------------------------------------------------------------------------------


def test_candidates_are_those_of_a_sort(scored):
    n, r = scored.graph.num_entities, scored.graph.num_relations
    rng = np.random.default_rng(3)
    cube = rng.standard_normal((n, 2 * r, n + 3)).astype(np.float32)
    cube[:, :, n:] = 1e6  # padding
    cube[5, 0, 7] = np.nan
    triples = np.unique(np.stack([rng.integers(n, size=300), rng.integers(r, size=300), rng.integers(20, size=300)], 1),
                        axis=0).astype(np.int32)
    known, slots = KnownTails.of(triples, r), Slots.of(triples, n, r)
    for search in (Search(per_query=4), Search(per_query=4, any_tail=True)):
        queries = {1: np.arange(n), 0: np.array([5])}
        found = np.concatenate(list(candidates(lambda h, k: jnp.asarray(cube[h, k]), queries, known=known, slots=slots,
                                               num_entities=n, search=search)))
        for relation, heads in queries.items():
            own = triples[triples[:, 1] == relation]
            loops = (own[:, 0] == own[:, 2]).any()
            for head in heads:
                left = [t for t in (range(n) if search.any_tail else np.unique(own[:, 2]))
                        if t not in own[own[:, 0] == head, 2] and (t != head or loops)
                        and not np.isnan(cube[head, relation, t])]
                want = sorted(left, key=lambda t: -cube[head, relation, t])[:4]
                got = found[(found[:, 0] == head) & (found[:, 1] == relation), 2].tolist()
                assert got == want


def test_kinds_say_which_queries_are_likely():
    # Ten directors, nine of whom have a birthplace; three films; a place.
    triples = np.array([[d, 0, 10] for d in range(9)] + [[11 + d % 3, 1, d] for d in range(10)])
    slots = Slots.of(triples, 15, 2)
    assert slots.plausible(0, 0.5).tolist() == list(range(10))  # the tenth too
    assert slots.plausible(0, 0.95).tolist() == list(range(9)) and slots.plausible(1, 0.5).tolist() == [11, 12, 13]
    assert slots.entities(1 + 2).tolist() == list(range(10))
    queries = likely_queries(slots, Search())
    assert {r: len(h) for r, h in queries.items()} == {0: 10, 1: 3}
    some = some_queries(queries, 6, seed=1)
    assert sum(map(len, some.values())) == 6 and all(np.isin(h, queries[r]).all() for r, h in some.items())
    assert some_queries(queries, 13, seed=1).keys() == queries.keys()


def test_examples_of_proposals_know_neither_part_in_advance(scored):
    cfg, search = CalibrationConfig(), Search(per_query=5)
    features, relations, labels, groups = proposal_examples(scored, 2, cfg, search)
    assert len(features) == len(relations) == len(labels) == len(groups)
    test = {tuple(t) for t in scored.triples(2).tolist()}
    assert labels.sum() > 0.5 * len(test)
    assert np.bincount(np.unique(groups, return_inverse=True)[1]).max() <= 5


# --- the run folder -----------------------------------------------------------------------------------------------


def test_calibration_is_kept_and_made_anew_for_other_settings(scored, trained, tmp_path, monkeypatch):
    small = CalibrationConfig(triples=60, queries=100)
    made = held_calibration(scored, tmp_path, tmp_path / "plots", small)
    assert (tmp_path / "plots" / "reliability.png").is_file()
    times = []
    monkeypatch.setattr(plausibility, "calibrate", lambda *a: times.append(a) or made)
    again = held_calibration(scored, tmp_path, tmp_path / "plots", small)
    assert not times and again.measured == made.measured
    np.testing.assert_array_equal(again.proposals.weights, made.proposals.weights)
    held_calibration(scored, tmp_path, tmp_path / "plots", dataclasses.replace(small, seed=1))
    assert len(times) == 1
    (tmp_path / "calibration.json").write_text("{")
    held_calibration(scored, tmp_path, tmp_path / "plots", small)
    assert len(times) == 2


def test_held_out_pairs_serve_where_no_split_is_given(tmp_path):
    write_world(tmp_path / "data", given_split=False)
    setting = experiment(tmp_path / "data", steps=5, valid_share=0.1, test_share=0.1)
    pipeline.run(setting, tmp_path / "run", quiet=True, until="graph")
    scored = open_run(tmp_path / "run", quiet=True)
    graph, _ = stage.training_graph(scored.graph)
    np.testing.assert_array_equal(scored.part, stage.link_data(setting.graph, graph, setting.seed).part)
    assert (scored.part == 1).sum() > 50 and (scored.part == 2).sum() > 50
    none = dataclasses.replace(scored, part=np.where(scored.part == 1, 0, scored.part))
    with pytest.raises(plausibility.KgrecError, match="no held-out triple.*graph.valid_share"):
        calibrate(none)


# --- the command --------------------------------------------------------------------------------------------------


def read_tsv(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def test_command_writes_a_review_table(trained, tmp_path, capsys):
    run, missing, lies = trained
    out = tmp_path / "new" / "proposed.tsv"
    assert cli.main(["complete", str(run), "--top", "40", "--min-probability", "0.3", "--out", str(out)]) == 0
    stdout, stderr = capsys.readouterr()
    assert stdout == "" and "calibration error" in stderr and f"40 triples in {out}" in stderr
    rows = read_tsv(out)
    assert list(rows[0])[-1] == "decision" and all(row["decision"] == "" for row in rows)
    right = [(row["head_id"], row["relation"], row["tail_id"]) in missing for row in rows]
    assert np.mean(right) > 0.95 and all(float(row["probability"]) >= 0.3 for row in rows)
    assert (run / "graph" / "calibration.json").is_file() and (run / "plots" / "reliability.png").is_file()
    assert cli.main(["complete", str(run), "--doubtful", "--top", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum((row["head_id"], row["relation"], row["tail_id"]) in lies for row in found) >= 7
    assert {"part", "reason"} <= found[0].keys()


def test_command_restricts_and_names_rules(trained, capsys):
    run = str(trained[0])
    assert cli.main(["complete", run, "--head", "name 7", "e9", "--relation", "sees", "--rules", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows and {row["head_id"] for row in rows} <= {"e7", "e9"} and {row["relation"] for row in rows} == {"sees"}
    assert cli.main(["complete", run, "--relation", "hears", "--top", "3"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert len(lines) == 3 and all("| hears |" in line and "rank" in line for line in lines)


@pytest.mark.parametrize("argv, words", [
    (["--relation", "knowz"], ("--relation: found the unknown 'knowz'", "did you mean 'knows'?")),
    (["--head", "Name 77x"], ("--head: found the unknown 'Name 77x'", "did you mean 'Name 7'")),
    (["--head", "twin"], ("--head: found the name 'twin' 2 times", "'e3', 'e4'")),
    (["--min-probability", "2"], ("--min-probability: found '2', expected a number from 0 to below 1",)),
    (["--top", "0"], ("--top: found '0'",)),
    (["--doubtful", "--rules"], ("--rules: found with --doubtful",)),
    (["--out", "."], ("--out: found a folder at .",)),
])
def test_wrong_arguments_end_in_one_line(argv, words, trained, capsys):
    assert cli.main(["complete", str(trained[0]), *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("kgrec: ") and err.count("\n") == 1, err
    assert all(word in err for word in words), err


def test_runs_that_cannot_be_completed(trained, tmp_path, capsys):
    def wrong(path):
        assert cli.main(["complete", str(path)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("kgrec: ") and err.count("\n") == 1, err
        return err

    assert "found no experiment.json" in wrong(tmp_path / "nowhere")
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "experiment.json").write_bytes((trained[0] / "experiment.json").read_bytes())
    assert "graph stage is not finished" in wrong(begun) and "kgrec graph CONFIG" in wrong(begun)
    (begun / "graph").mkdir()
    (begun / "graph" / "done.json").write_text('{"format_version": 1, "skipped": "the data set has no triples"}')
    assert "run without a graph (the data set has no triples)" in wrong(begun)
    (begun / "graph" / "done.json").write_text('{"format_version": 1}')
    assert "found no tables" in wrong(begun)


def test_find_prefers_ids():
    assert find("b", ("a", "b"), ("b", "c"), "--head") == 1 and find("C", ("a", "b"), ("b", "c"), "--head") == 1
