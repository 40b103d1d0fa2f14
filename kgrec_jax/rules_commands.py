"""`kgrec data rules`: the regularities of a graph as a table to read."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from kgrec_jax.arguments import Parser, positive, share
from kgrec_jax.errors import KgrecError

if TYPE_CHECKING:
    from kgrec_jax.data.dataset import Graph
    from kgrec_jax.linear.rules import Rules


def rules(argv: Sequence[str]) -> int:
    """`kgrec data rules FOLDER`: mine, print the surest, and with --out write all of them as a table."""
    from kgrec_jax.data.folder import read_folder
    from kgrec_jax.data.graph import merge_inverse_relations
    from kgrec_jax.linear.rules import RuleConfig, check, mine_rules

    args = _parser().parse_args(argv)
    cfg = RuleConfig(max_length=args.max_length, min_support=args.min_support, min_confidence=args.min_confidence,
                     min_pca_confidence=args.min_pca_confidence, min_head_coverage=args.min_head_coverage,
                     constants="on" if args.constants else "off")
    check(cfg)  # before the folder is read
    out = pathlib.Path(args.out).expanduser() if args.out else None
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise KgrecError(f"--out: found {'a folder' if out.is_dir() else 'no folder'} at "
                         f"{out if out.is_dir() else out.parent}, expected a file to write in a folder that is there")
    graph = read_folder(args.folder).graph
    if not len(graph.triples):
        raise KgrecError(f"{args.folder}: found no triples, expected a folder with a graph (triples.tsv)")
    graph, report = merge_inverse_relations(graph)
    for line in report.lines():
        print(line)
    mined = mine_rules(graph, cfg)
    if args.relation:
        named = [k for k, names in enumerate(zip(graph.relation_ids, graph.relation_names)) if args.relation in names]
        if not named:
            raise KgrecError(f"--relation: found {args.relation!r}, expected one of the graph's relations, such as "
                             f"{graph.relation_names[0]!r}")
        mined = mined.take(np.isin(mined.head % graph.num_relations, named))
    print("\n".join(table(mined, graph, args.top)))
    if out is not None:
        write(mined, graph, out)
        print(f"{len(mined):,} rules in {out}")
    return 0


def table(mined: Rules, graph: Graph, top: int) -> list[str]:
    """Lines of text: how many rules of each kind, and the first `top` of variables alone, then of constants."""
    constant = mined.head_constant >= 0
    lines = []
    kinds = {"between entities": np.flatnonzero(~constant), "on single entities": np.flatnonzero(constant)}
    for kind, some in kinds.items():
        lines.append(f"{len(some):,} rules {kind}{', the surest' if len(some) > top else ''}")
        if len(some):
            lines.append("confidence  PCA   support  of head  rule")
        for k in some[:top]:
            about = "~" if mined.estimated[k] else " "
            lines.append(f"{about}{mined.confidence[k]:9.2f}  {mined.pca_confidence[k]:4.2f}  {mined.support[k]:7,}  "
                         f"{mined.head_coverage[k]:7.1%}  {mined.text(k, graph)}")
    if mined.estimated.any():
        lines.append(f"~ {int(mined.estimated.sum()):,} confidences are estimated from a part of their body's entities")
    return lines


def write(mined: Rules, graph: Graph, path: pathlib.Path) -> None:
    """All rules as a .tsv; appears complete or not at all."""
    from kgrec_jax.data.tables import write_tsv

    write_tsv(path, {
        "rule": [mined.text(k, graph) for k in range(len(mined))], "confidence": np.round(mined.confidence, 6),
        "pca_confidence": np.round(mined.pca_confidence, 6), "head_coverage": np.round(mined.head_coverage, 6),
        "support": mined.support, "body": mined.body, "closed_body": mined.closed_body,
        "head_facts": mined.facts, "estimated": mined.estimated.astype(np.int8)})


def _parser() -> Parser:
    parser = Parser("data rules", """Mine the Horn rules of a graph, with their confidence.

  kgrec data rules data/ml-100k --min-confidence 0.5
  kgrec data rules ../shared/data/wn18rr --out rules.tsv

Bodies have one or two atoms: spouse(y, x) ⇒ spouse(x, y), director(x, z) ∧ spouse(z, y) ⇒ producer(x, y), and with
constants genre(x, Western) ⇒ country(x, United States). Relations that are one reversed are merged first, as in
training; only training triples count. PCA confidence counts a body against a rule only where the head's relation is
known of x at all.""")
    parser.add_argument("folder", metavar="FOLDER", help="a dataset folder with a graph")
    parser.add_argument("--max-length", type=positive, default=2, metavar="N",
                        help="atoms of a body, 1 or 2 (default 2)")
    parser.add_argument("--min-support", type=positive, default=5, metavar="N",
                        help="pairs for which body and head hold (default 5)")
    parser.add_argument("--min-confidence", type=share, default=0.3, metavar="X",
                        help="standard confidence (default 0.3)")
    parser.add_argument("--min-pca-confidence", type=share, default=0.0, metavar="X",
                        help="PCA confidence (default 0)")
    parser.add_argument("--min-head-coverage", type=share, default=0.0, metavar="X",
                        help="share of the head's facts that a rule explains (default 0)")
    parser.add_argument("--no-constants", dest="constants", action="store_false",
                        help="rules of variables alone")
    parser.add_argument("--relation", metavar="NAME", help="only rules that derive this relation")
    parser.add_argument("--top", type=positive, default=20, metavar="N", help="lines printed of each kind (default 20)")
    parser.add_argument("--out", metavar="FILE", help="write all rules as a table (.tsv)")
    return parser
