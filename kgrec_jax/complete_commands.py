"""`kgrec complete RUN`: the triples that a run's graph seems to lack, or those that it seems to have in error."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kgrec_jax.arguments import Parser, positive, share_below_one
from kgrec_jax.errors import KgrecError

if TYPE_CHECKING:
    from kgrec_jax.serving.complete import Completer, Statement
    from kgrec_jax.serving.plausibility import Calibration

HELP = """Propose triples that a run's graph lacks, or show the known ones that do not fit, with probabilities.

  kgrec complete RUN                                        the 50 most probable missing triples
  kgrec complete RUN --relation director --min-probability 0.8 --top 1000 --out proposed.tsv
  kgrec complete RUN --head "Blade Runner" --relation genre
  kgrec complete RUN --doubtful --top 20                    known triples with the lowest probability

RUN is a run whose graph stage is done (kgrec graph CONFIG --workdir RUN); its structural score is asked. Without --head
every head is asked for the relations that its kind makes likely. Probabilities are fitted on the validation triples and
measured on the test triples (both given, or held out by the graph stage), and said so beside the results.

A proposal's probability is the share of held-out facts among candidates that looked alike while those were hidden: a
lower bound if the graph lacks at least as many facts as its validation part holds, and too high if it lacks fewer;
--missing-share takes what you believe it lacks. A known triple's is that of a true statement among as many false ones
of right types; triples of the train part were learned from, so theirs is too high, and only their order says something.

Leaves RUN/graph/calibration.json and RUN/plots/reliability.png, and FILE with --out: a table for a spreadsheet whose
last column, decision, is empty for a reader's accept or reject."""


def complete(argv: Sequence[str]) -> int:
    """`kgrec complete …`; KgrecError for arguments, a run or names that do not fit."""
    args = _parser().parse_args(list(argv))
    _check(args)
    from kgrec_jax import compilation_cache
    from kgrec_jax.commands import new_file
    from kgrec_jax.data.tables import cell, write_tsv
    from kgrec_jax.serving.candidates import Search
    from kgrec_jax.serving.graph_run import find, open_run
    from kgrec_jax.serving.plausibility import CalibrationConfig, held_calibration

    out = new_file(args.out) if args.out else None  # before the work, which may take minutes
    compilation_cache.enable()
    scored = open_run(args.run)
    graph = scored.graph
    relations = [find(word, graph.relation_ids, graph.relation_names, "--relation") for word in args.relation]
    heads = [find(word, graph.entity_ids, graph.entity_names, "--head") for word in args.head]
    search = Search(any_tail=args.any_tail)
    queries = None if args.doubtful else chosen_queries(scored, relations, heads, search)
    path = pathlib.Path(args.run).expanduser()
    cfg = CalibrationConfig(method=args.method)
    calibration = held_calibration(scored, path / "graph", path / "plots", cfg, search)
    scored.tracker.say(measured_line(calibration, "facts" if args.doubtful else "proposals"))
    if args.doubtful:
        from kgrec_jax.linear.rule_checks import TripleChecker

        everything = dataclasses.replace(graph, part=graph.part * 0)  # a doubt may come from a fact of any part
        found = scored.doubtful(calibration.facts, relations=relations, heads=heads, top=args.top,
                                contradicted=TripleChecker(everything).lines)
    else:
        found = scored.propose(calibration.proposals, queries, top=args.top, min_probability=args.min_probability,
                               search=search, missing_share=args.missing_share,
                               rules=rule_lines(scored) if args.rules else None)
    rows = [row_of(statement, scored, args.doubtful) for statement in found]
    if out is not None:
        write_tsv(out, {name: [" ".join(cell(row[name]).split()) for row in rows] for name in columns(args.doubtful)})
        scored.tracker.say(f"{len(rows):,} triples in {out}")
    if args.json:
        print(json.dumps(rows, ensure_ascii=False, indent=1))
    elif out is None:
        print("\n".join(lines(rows)) if rows else "nothing found: no triple is that probable or fits the selection")
    return 0


def chosen_queries(scored: Completer, relations: Sequence[int], heads: Sequence[int], search: Any) -> dict[int, Any]:
    """{relation: heads} to ask: all likely ones, those of some relations or heads, or exactly the named pairs."""
    import numpy as np

    from kgrec_jax.serving.candidates import likely_queries

    if relations and heads:  # named both: asked, however unlikely
        return {r: np.unique(np.array(heads, np.int32)) for r in dict.fromkeys(relations)}
    likely = likely_queries(scored.slots(0, 1, 2), search)
    if relations:
        likely = {r: own for r, own in likely.items() if r in relations}
    if heads:
        likely = {r: own[np.isin(own, heads)] for r, own in likely.items()}
    likely = {r: own for r, own in likely.items() if len(own)}
    if not likely:
        names = ", ".join(repr(scored.graph.entity_ids[h]) for h in heads) or "the graph"
        raise KgrecError(f"--head: found no relation that is likely for {names}, expected an entity like others that "
                         "are heads; name the relation too (--relation)")
    return likely


def rule_lines(scored: Completer) -> Any:
    """What says which rule derives each of some triples; the rules are mined from the training triples here."""
    from kgrec_jax.linear.rule_scorer import RuleScorer
    from kgrec_jax.linear.rules import mine_rules

    training = dataclasses.replace(scored.graph, part=scored.part)
    mined = mine_rules(training)
    scored.tracker.say(f"{len(mined):,} rules of the training triples")
    return RuleScorer(mined, training).lines


def measured_line(calibration: Calibration, kind: str) -> str:
    """How far the probabilities can be believed, in one line."""
    m = calibration.measured.get(kind)
    if not m:
        return "probabilities: no test triple to measure them on"
    some = m.get("count@0.5", 0)
    held = f"; of {some:,.0f} at 0.5 or more {m['precision@0.5']:.1%} are facts" if some else ""
    area = f", AUC {m['auc']:.4f}" if "auc" in m else ""
    return (f"probabilities on {m['examples']:,.0f} {'statements' if kind == 'facts' else 'candidates'} of the test "
            f"part: calibration error {m['ece']:.4f}, Brier score {m['brier']:.4f}{area}{held}")


def columns(doubtful: bool) -> list[str]:
    """Columns of the table."""
    more = ["part", "reason"] if doubtful else ["rule", "like"]
    return ["head_id", "head", "relation", "relation_name", "tail_id", "tail", "probability", "score", "tail_rank",
            "head_rank", *more, "decision"]


def row_of(statement: Statement, scored: Completer, doubtful: bool) -> dict[str, Any]:
    """One row of the table."""
    graph, (h, r, t) = scored.graph, statement.triple
    more = (statement.part, statement.reason) if doubtful else (statement.rule, statement.reason)
    values = (graph.entity_ids[h], graph.entity_names[h], graph.relation_ids[r], graph.relation_names[r],
              graph.entity_ids[t], graph.entity_names[t], round(statement.probability, 6),
              float(f"{statement.score:.6g}"), statement.tail_rank, statement.head_rank, *more, "")
    return dict(zip(columns(doubtful), values, strict=True))


def lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows for a terminal: a line a triple, and one below it for what speaks for or against it."""
    out = []
    for row in rows:
        head, tail = row["head"] or row["head_id"], row["tail"] or row["tail_id"]
        part = f", {row['part']}" if "part" in row else ""
        out.append(f"{row['probability']:.3f}  {head} | {row['relation_name']} | {tail}  "
                   f"(rank {row['tail_rank']:g} as tail, {row['head_rank']:g} as head{part})")
        out += [f"       {row[name]}" for name in ("rule", "like", "reason") if row.get(name)]
    return out


def _check(args: argparse.Namespace) -> None:
    with_doubts = [flag for flag, given in (("--min-probability", args.min_probability), ("--rules", args.rules),
                                            ("--missing-share", args.missing_share)) if given]
    if args.doubtful and with_doubts:
        raise KgrecError(f"{with_doubts[0]}: found with --doubtful, expected it with proposals alone; leave one out")


def _parser() -> argparse.ArgumentParser:
    parser = Parser("complete", HELP)
    parser.add_argument("run", metavar="RUN", help="the folder of a run whose graph stage is done")
    parser.add_argument("--relation", nargs="+", default=[], metavar="R", help="only these relations, by id or name")
    parser.add_argument("--head", nargs="+", default=[], metavar="ENTITY", help="only these heads, by id or name")
    parser.add_argument("--top", type=positive, default=50, metavar="K", help="triples at most (default 50)")
    parser.add_argument("--min-probability", type=share_below_one, default=0.0, metavar="P",
                        help="leave out what is less probable")
    parser.add_argument("--missing-share", type=share_below_one, default=0.0, metavar="S",
                        help="share of all facts that the graph lacks, as you believe")
    parser.add_argument("--any-tail", action="store_true", help="also tails that the relation has never had")
    parser.add_argument("--rules", action="store_true", help="mine rules and name the one that derives a proposal")
    parser.add_argument("--doubtful", action="store_true",
                        help="known triples that do not fit, in place of missing ones")
    parser.add_argument("--method", choices=("logistic", "isotonic"), default="logistic",
                        help="how scores become probabilities; isotonic needs thousands of held-out triples")
    parser.add_argument("--out", metavar="FILE",
                        help="a table (TSV) in place of the list; an existing file is replaced")
    parser.add_argument("--json", action="store_true", help="a JSON list on the standard output")
    return parser
